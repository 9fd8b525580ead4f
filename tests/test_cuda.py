"""What only a GPU can show, in one process."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dgl import DGLModule, DGLStrategy, VectorQuantizer
from lightning_dgl.nearest_codes import nearest_codes
from lightning_dgl.training import RandomStreams
from tests.runs import MakeTrainer, block_weights, loader, make_module, pieces, same, small_cnn, weights
from tests.schedules.plain import algorithm_1

DEVICE = "cuda"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic=True sets it too, but cuBLAS reads it once
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Let the GPU compute in full float32, and convolutions by the same algorithm in every run."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(before)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-3, atol: float = 1e-4) -> None:
    for name, value in expected.items():
        assert torch.allclose(got[name].cpu(), value.cpu(), rtol=rtol, atol=atol), name


def test_weights_equal_the_plain_loop(make_trainer: MakeTrainer) -> None:
    module = make_module(4)
    blocks, heads = ([part.to(DEVICE) for part in parts] for parts in pieces(module))
    algorithm_1(blocks, heads, [(x.to(DEVICE), y.to(DEVICE)) for x, y in loader()], max_steps=5)  # type: ignore[arg-type]
    make_trainer(accelerator=DEVICE).fit(module, loader())
    expected = [tensor for block in blocks for tensor in block.state_dict().values()]
    for got, want in zip(module.network.state_dict().values(), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_every_block_trains(precision: str, clip: float | None, make_trainer: MakeTrainer) -> None:
    module = make_module(4)
    before = block_weights(module)
    trainer = make_trainer(accelerator=DEVICE, precision=precision, gradient_clip_val=clip, max_epochs=2)
    trainer.fit(module, loader(), loader())
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    for old, new in zip(before, block_weights(module), strict=True):
        assert not any(torch.equal(old[name], new[name].cpu()) for name in old if name.endswith("weight"))


def test_splitting_works_on_the_device() -> None:
    module = DGLModule(small_cnn().to(DEVICE), 3, example_input=[2, 3, 8, 8])
    assert module(torch.randn(4, 3, 8, 8, device=DEVICE), block=0).shape == (4, 4)


# Random numbers


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_splitting_leaves_the_seed_and_the_state_of_the_device(device: str) -> None:
    network = small_cnn(dropout=0.3).to(device)
    L.seed_everything(1234, verbose=False)
    expected = torch.rand(3, device=DEVICE)
    L.seed_everything(1234, verbose=False)
    DGLModule(network, 3, example_input=[2, 3, 8, 8])
    assert torch.cuda.initial_seed() == 1234
    assert torch.equal(torch.rand(3, device=DEVICE), expected)


def test_random_streams_differ_and_leave_the_default_generators_alone() -> None:
    streams, device = RandomStreams(3), torch.device(DEVICE)
    streams.seed = 7
    torch.manual_seed(5)
    expected = torch.rand(4, device=device)
    torch.manual_seed(5)
    drawn = []
    for block in (1, 2, 1):
        with streams.of(block, device):
            drawn.append(torch.rand(4, device=device))
    assert torch.equal(torch.rand(4, device=device), expected)
    assert len({tuple(values.tolist()) for values in drawn}) == 3


def test_dropout_resumes_from_a_checkpoint(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    whole, first, resumed = (make_module(4, dropout=0.3, seed=0) for _ in range(3))
    for module, epochs, kwargs in (
        (whole, 2, {}),
        (first, 1, {}),
        (resumed, 2, {"ckpt_path": tmp_path / "a.ckpt", "weights_only": True}),
    ):
        L.seed_everything(3, verbose=False)
        trainer = make_trainer(accelerator=DEVICE, max_epochs=epochs)
        trainer.fit(module, loader(), **kwargs)
        if module is first:
            trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert_close(weights(resumed), weights(whole))


# Determinism


@pytest.mark.parametrize("head", ["linear", "mlp", "mlp_sr", "cnn"])
def test_a_deterministic_trainer_repeats_itself(head: str, make_trainer: MakeTrainer) -> None:
    def train() -> dict[str, Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 2), *small_cnn()[3:])  # 7 × 7: no pool's size divides that
        module = DGLModule(network, 2, example_input=[2, 3, 8, 8], head=head)
        codec = VectorQuantizer(64, 4)  # so many that some are drawn anew
        make_trainer(accelerator=DEVICE, strategy=DGLStrategy(codec=codec), deterministic=True).fit(module, loader())
        return weights(module)

    try:
        assert same(train(), train())
    finally:
        torch.use_deterministic_algorithms(False)


# Waiting for the device


class Waits(L.Callback):
    """Where torch waits for the device in one training batch and in one batch of validation."""

    def __init__(self) -> None:
        self.train: list[str] = []
        self.val: list[str] = []
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def _noting(self, seen: list[str]) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            yield
            torch.cuda.set_sync_debug_mode("default")
        seen += [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self._stack.enter_context(self._noting(self.train))

    def on_train_batch_end(self, *_: Any) -> None:
        self._stack.close()

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, _: int = 0) -> None:
        if batch_idx == 2:
            self._stack.enter_context(self._noting(self.val))

    def on_validation_batch_end(self, *_: Any) -> None:
        self._stack.close()


@pytest.mark.parametrize(
    ("arguments", "codec", "most"),
    [({}, None, 1), ({"precision": "16-mixed"}, None, 2), ({}, VectorQuantizer(16, 4), 1 + 3)],
)
def test_waits_in_a_step_of_four_blocks(
    arguments: dict[str, Any], codec: VectorQuantizer | None, most: int, make_trainer: MakeTrainer
) -> None:
    waits = Waits()
    trainer = make_trainer(accelerator=DEVICE, strategy=DGLStrategy(codec=codec), callbacks=[waits], **arguments)
    trainer.fit(make_module(4), loader(), loader())
    assert len(waits.train) <= most, waits.train
    assert waits.val == []


# Memory, the compiler, the quantizer


def test_step_needs_less_memory_than_backpropagation(make_trainer: MakeTrainer) -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(12):
        layers += [nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    data = TensorDataset(torch.randn(64, 3, 64, 64), torch.zeros(64, dtype=torch.int64))
    peaks = []
    for num_blocks in (1, 4):
        module = DGLModule(network, num_blocks, example_input=[2, 3, 64, 64], head="linear", balance="memory")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.backends.cudnn.flags(enabled=False):  # its workspaces would be counted
            make_trainer(accelerator=DEVICE).fit(module, DataLoader(data, batch_size=64))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.6 * peaks[0]


def test_compiled_blocks_come_to_the_same_weights(make_trainer: MakeTrainer) -> None:
    plain, compiled = (make_module(2, seed=0, compile=compile) for compile in (False, True))
    for module in (plain, compiled):
        make_trainer(accelerator=DEVICE).fit(module, loader())
    assert_close(weights(compiled), weights(plain), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("tf32", [False, True])
def test_codes_are_as_near_as_on_a_cpu(tf32: bool) -> None:
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    x, codebook = torch.randn(8, 4, 8, 256), torch.randn(256, 8)
    distances = [
        (x.movedim(2, -1) - codebook[codes.long().cpu()]).square().sum(-1)
        for codes in (nearest_codes(x, codebook), nearest_codes(x.to(DEVICE), codebook.to(DEVICE)))
    ]
    assert torch.allclose(distances[1], distances[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"num_codebooks": 2}, {"compile": True}])
def test_a_quantizer_learns_on_the_device(arguments: dict[str, Any]) -> None:
    quantizers = [VectorQuantizer(300, 4, decay=0.9, **arguments).to(device) for device in ("cpu", DEVICE)]
    for _ in range(10):
        x = torch.randn(16, 16, 8, 8).relu()
        for quantizer, device in zip(quantizers, ("cpu", DEVICE), strict=True):
            quantizer.update(x.to(device))
    assert quantizers[1].error == pytest.approx(quantizers[0].error, rel=0.1)
    assert quantizers[1].perplexity == pytest.approx(quantizers[0].perplexity, rel=0.1)
    x = x.to(DEVICE)
    assert (quantizers[1].encode(x).decode() - x).square().mean() < 0.2 * x.var()
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantizers[1].update(x / 0)
