"""Mixed and reduced precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_dgl import DGLModule
from tests.runs import (
    PRECISIONS,
    Backpropagation,
    MakeTrainer,
    Shifted,
    block_parameters,
    half,
    loader,
    make_module,
    same,
    sgd,
    small_cnn,
    small_data,
    weights,
)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_block_equals_plain_lightning(precision: str, make_trainer: MakeTrainer) -> None:
    network = small_cnn()
    plain = Backpropagation(copy.deepcopy(network))
    make_trainer(strategy="auto", gradient_clip_val=0.5, **PRECISIONS[precision]()).fit(plain, loader())
    module = DGLModule(network, num_blocks=1, example_input=(2, 3, 8, 8), optimizer=sgd)
    make_trainer(gradient_clip_val=0.5, **PRECISIONS[precision]()).fit(module, loader())
    assert same(weights(module.network), weights(plain.network))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_fused_optimizer_with_clipping(precision: str, make_trainer: MakeTrainer) -> None:
    def train(fused: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = make_module(2, optimizer=lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, fused=fused))
        make_trainer(gradient_clip_val=0.5, **PRECISIONS[precision]()).fit(module, loader())
        return weights(module)

    plain = train(False)
    for name, weight in train(True).items():
        torch.testing.assert_close(
            weight, plain[name], rtol=2e-2, atol=1e-4 if weight.dtype != torch.bfloat16 else 2e-2
        )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strategy", ["dgl", "auto"])
def test_several_blocks_train_and_evaluate(precision: str, strategy: str, make_trainer: MakeTrainer) -> None:
    module = make_module(4)
    before = weights(module)
    trainer = make_trainer(strategy=strategy, max_epochs=2, **PRECISIONS[precision]())
    trainer.fit(module, loader(), loader())
    assert all(torch.isfinite(trainer.callback_metrics[f"val/loss_block{j}"]) for j in range(4))
    trained = dict(module.named_parameters())
    assert all(not torch.equal(before[name].to(p.dtype), p) for name, p in trained.items() if name.endswith("weight"))
    trainer.test(module, loader(), verbose=False)
    predictions = trainer.predict(module, loader())
    assert predictions is not None
    assert all(p.isfinite().all() for p in predictions)  # type: ignore[union-attr]


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_true_precision_with_parameters_and_buffers_of_the_root(
    precision: str, dtype: torch.dtype, make_trainer: MakeTrainer
) -> None:
    torch.manual_seed(0)
    module = DGLModule(Shifted(), split_at=["first"], example_input=(2, 3, 8, 8), head="linear", optimizer=sgd)
    trainer = make_trainer(precision=precision)
    trainer.fit(module, loader(), loader())
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module.network.shift.dtype == dtype
    assert module.network.scale.any()
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    x = small_data(4).tensors[0].to(dtype)
    module.eval()
    assert torch.equal(module(x), module.block_scores(x)[-1])


# Loss scaling: one scaler for each block


class Overflow(DGLModule):
    """The gradients of block 1 overflow in step 2, though its loss is finite."""

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        loss = super().local_loss(block, scores, targets)
        if self.trainer.training and (block, self.trainer.global_step) == (1, self.overflow_at):
            loss = loss * 1e37
        return loss

    overflow_at = 2


class Watch(L.Callback):
    """Which blocks' parameters changed in each batch, and each block's loss scale after it, as in a checkpoint."""

    def __init__(self) -> None:
        self.changed: list[list[bool]] = []
        self.scales: list[list[float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self._before = self._parameters(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        after = self._parameters(pl_module)
        blocks = zip(self._before, after, strict=True)
        self.changed.append([any(not torch.equal(a, b) for a, b in zip(*block, strict=True)) for block in blocks])
        self.scales.append([state["scale"] for state in scaler_states(trainer)])

    @staticmethod
    def _parameters(module: DGLModule) -> list[list[Tensor]]:
        return [[p.detach().clone() for p in parameters] for parameters in block_parameters(module)]


def scaler_states(trainer: L.Trainer) -> list[dict[str, Any]]:
    return trainer.precision_plugin.state_dict()["blocks"]


@pytest.mark.parametrize("clip", [None, "norm", "value"])
def test_an_overflow_skips_only_that_block_s_update(clip: str | None, make_trainer: MakeTrainer) -> None:
    module, watch = make_module(4, kind=Overflow), Watch()
    clipping = {} if clip is None else {"gradient_clip_val": 0.1, "gradient_clip_algorithm": clip}
    make_trainer(plugins=[half()], callbacks=[watch], **clipping).fit(module, loader())
    assert watch.changed == [[True, step != 2, True, True] for step in range(5)]
    assert watch.scales[1] == [1024.0] * 4
    assert watch.scales[2] == [1024.0, 512.0, 1024.0, 1024.0]
    assert watch.scales[4] == [1024.0, 512.0, 1024.0, 1024.0]
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_an_overflow_leaves_the_other_blocks_as_without_it(make_trainer: MakeTrainer) -> None:
    class Never(Overflow):
        overflow_at = -1

    overflowing, undisturbed = make_module(4, kind=Overflow), make_module(4, kind=Never)
    undisturbed.load_state_dict(overflowing.state_dict())
    make_trainer(plugins=[half()]).fit(overflowing, loader())
    make_trainer(plugins=[half()]).fit(undisturbed, loader())
    assert same(weights(overflowing.blocks[0]), weights(undisturbed.blocks[0]))
    assert same(weights(overflowing.heads[0]), weights(undisturbed.heads[0]))
    assert not same(weights(overflowing.blocks[1]), weights(undisturbed.blocks[1]))


def test_scale_does_not_change_what_is_learned(make_trainer: MakeTrainer) -> None:
    results = []
    start = weights(make_module(4))
    for scale in (1.0, 2.0**12):
        module = make_module(4)
        module.load_state_dict(start)
        make_trainer(plugins=[half(scale)], gradient_clip_val=0.1, accumulate_grad_batches=2).fit(module, loader())
        results.append(weights(module))
    for name in start:
        assert torch.allclose(results[0][name].float(), results[1][name].float(), rtol=1e-2, atol=2e-3), name


def test_a_scale_that_is_too_large_comes_down(make_trainer: MakeTrainer) -> None:
    module, watch = make_module(4), Watch()
    make_trainer(max_epochs=6, plugins=[half(2.0**40)], callbacks=[watch]).fit(module, loader())
    assert watch.changed[0] == [False] * 4
    assert watch.changed[-1] == [True] * 4


def test_scales_are_in_the_checkpoint_and_restored(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    module = make_module(4, kind=Overflow)
    trainer = make_trainer(plugins=[half(growth_interval=2)])
    trainer.fit(module, loader())
    states = scaler_states(trainer)
    assert [state["scale"] for state in states] == [4096.0, 2048.0, 4096.0, 4096.0]
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    whole, resumed = make_module(4, kind=Overflow), make_module(4, kind=Overflow)
    whole.load_state_dict(resumed.state_dict())
    saver = make_trainer(max_epochs=1, plugins=[half(growth_interval=2)])
    saver.fit(resumed, loader())
    saver.save_checkpoint(tmp_path / "b.ckpt")
    watch = Watch()
    make_trainer(max_epochs=2, plugins=[half(growth_interval=2)], callbacks=[watch]).fit(whole, loader())
    other = make_module(4, kind=Overflow)
    again = Watch()
    trainer = make_trainer(max_epochs=2, plugins=[half(growth_interval=2)], callbacks=[again])
    trainer.fit(other, loader(), ckpt_path=tmp_path / "b.ckpt", weights_only=True)
    assert again.scales == watch.scales[5:]
    assert same(weights(other), weights(whole))


def test_fit_again_with_the_same_trainer(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(plugins=[half()])
    trainer.fit(make_module(4), loader())
    trainer.fit_loop.max_epochs = 2
    other = make_module(2)
    before = weights(other)
    trainer.fit(other, loader())
    assert not same(before, weights(other))


def test_a_checkpoint_of_full_precision_continues_in_mixed_precision(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.fit(make_module(2), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = make_trainer(max_epochs=2, plugins=[half()])
    second.fit(make_module(2), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert second.global_step == 10
    second.save_checkpoint(tmp_path / "b.ckpt")
    third = make_trainer(max_epochs=3)
    third.fit(make_module(2), loader(), ckpt_path=tmp_path / "b.ckpt", weights_only=True)
    assert third.global_step == 15
