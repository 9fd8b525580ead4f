"""How often the host waits for the device, counted on a CPU: by the operations that read values of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dgl import DGLStrategy, VectorQuantizer
from lightning_dgl.checks import check_batch
from lightning_dgl.codecs import Half, _draw_by_whole_numbers
from lightning_dgl.metrics import BlockMetrics, add_vote, metric_collection
from lightning_dgl.nearest_codes import _search_by_argmax, nearest_codes
from tests.runs import MakeTrainer, half, loader, make_module

READS = ("_local_scalar_dense", "item", "nonzero", "bincount", "unique", "_unique2", "unique_dim", "masked_select")


class Waits(TorchDispatchMode):
    """Counts operations for which the host waits if their tensors are on an accelerator.

    Attributes:
        seen: their names.
        on_host: tensors that stay on the host, which cost nothing to read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.on_host: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if by_mask or (name in READS and not any(args[0] is tensor for tensor in self.on_host)):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class OneBatch(L.Callback):
    """Counts waits in one training batch and in one batch of validation, neither the first nor one that is logged."""

    def __init__(self) -> None:
        self.train, self.val = Waits(), Waits()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            codecs = [link.codec for link in pl_module.run.links]
            self.train.on_host = [codec.num_updates for codec in codecs if isinstance(codec, VectorQuantizer)]
            self.train.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.train.__exit__(None, None, None)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, _: int = 0) -> None:
        if batch_idx == 2:
            self.val.__enter__()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        if batch_idx == 2:
            self.val.__exit__(None, None, None)


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the ways that the package takes on an accelerator: labels are looked at once, codes are found by argmax."""
    monkeypatch.setattr("lightning_dgl.nearest_codes._GridSearch", _search_by_argmax)
    monkeypatch.setattr(torch, "multinomial", _draw_by_whole_numbers)
    read = Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        tensor.flatten()[0].item()  # to be counted; on a CPU tolist reads the memory without an operation
        return read(tensor)

    monkeypatch.setattr(Tensor, "tolist", tolist)
    monkeypatch.setattr(
        "lightning_dgl.module.check_batch",
        lambda batch, batch_idx, *rest: check_batch(batch, batch_idx, *rest) if batch_idx == 0 else batch,
    )


@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize(
    ("trainer_arguments", "arguments", "codec", "most"),
    [
        (dict, {}, None, 1),
        (dict, {"on_nonfinite": "skip"}, None, 1),
        (lambda: {"gradient_clip_val": 0.5}, {}, "half", 1),
        (lambda: {"plugins": [half()], "gradient_clip_val": 0.5}, {}, None, 2),
        (dict, {}, VectorQuantizer(16, 4), 1 + 3),
        (dict, {}, VectorQuantizer(16, 2, num_codebooks=2), 1 + 3),
    ],
)
def test_waits_in_a_step_of_four_blocks(
    trainer_arguments: Callable[[], dict[str, Any]],
    arguments: dict[str, Any],
    codec: Any,
    most: int,
    make_trainer: MakeTrainer,
) -> None:
    count = OneBatch()
    trainer = make_trainer(strategy=DGLStrategy(codec=codec), callbacks=[count], **trainer_arguments())
    trainer.fit(make_module(4, **arguments), loader(), loader())
    assert 0 < len(count.train.seen) <= most, count.train.seen
    assert count.val.seen == []


# Fake tensors on CUDA: they raise where a value is read, and where a tensor on the CPU is mixed in


@pytest.fixture
def fake_cuda() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def test_fake_tensors_notice_what_these_tests_look_for(fake_cuda: FakeTensorMode) -> None:
    with fake_cuda:
        x = torch.randn(3, device="cuda")
        with pytest.raises(DataDependentOutputException):
            bool(x.sum() > 0)
        with pytest.raises(RuntimeError, match="device"):
            x + torch.randn(3, device="cpu")


@pytest.mark.parametrize("ignore_index", [None, -100])
def test_evaluation_on_cuda(ignore_index: int | None, fake_cuda: FakeTensorMode) -> None:
    metrics = BlockMetrics(metric_collection(None, ignore_index), 2, range(2))
    with fake_cuda:
        metrics.to("cuda")
        with torch.device("cuda"):
            scores, loss, targets = torch.randn(8, 4), torch.randn(()), torch.zeros(8, dtype=torch.long)
        _, targets = check_batch((scores, targets), 1, 4, ignore_index)
        votes = None
        for j in range(2):
            votes = add_vote(votes, j, scores)
            metrics.update(j, loss, scores, targets)
        metrics.update_ensemble(votes, targets)
        values = {**metrics.batch_values({0: (loss, scores, targets)}), **metrics.compute()}
    assert {value.device.type for value in values.values()} == {"cuda"}


def test_labels_of_a_first_batch_are_looked_at_on_cuda(fake_cuda: FakeTensorMode) -> None:
    with fake_cuda, torch.device("cuda"), pytest.raises(DataDependentOutputException):
        check_batch((torch.randn(8, 3), torch.zeros(8, dtype=torch.long)), 0, 4, None)


def test_coding_on_cuda(fake_cuda: FakeTensorMode) -> None:
    quantizer = VectorQuantizer(300, 4, num_codebooks=2)
    quantizer.update(torch.randn(4, 16, 5, 5))
    with fake_cuda:
        quantizer.to("cuda")
        quantizer.num_updates = torch.tensor(1)  # it stays on the host, with a value
        x = torch.randn(4, 16, 5, 5, device="cuda", dtype=torch.bfloat16)
        for codec in (Half(), quantizer):
            decoded = codec.encode(x).decode()
            assert (decoded.shape, decoded.dtype, decoded.device.type) == (x.shape, x.dtype, "cuda")
        assert nearest_codes(torch.randn(2, 3, 4, 9, device="cuda"), quantizer.codebook[:300]).dtype == torch.int16
