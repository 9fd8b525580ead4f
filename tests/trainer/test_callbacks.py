"""Callbacks that read or change gradients and weights, and blocks that do not train."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
)
from torch import Tensor

from lightning_dgl import BlockSummary, DGLModule
from tests.runs import (
    BackpropagationWithSchedule,
    MakeTrainer,
    cosine,
    loader,
    make_module,
    rates,
    same,
    sgd,
    small_cnn,
    weights,
)


def test_hooks_see_gradients(make_trainer: MakeTrainer) -> None:
    seen: dict[str, list[bool]] = {}

    class Watch(L.Callback):
        def _see(self, hook: str, pl_module: L.LightningModule) -> None:
            seen.setdefault(hook, []).append(all(p.grad is not None for p in pl_module.parameters()))

        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            self._see("on_before_zero_grad", pl_module)

        def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
            self._see("on_before_backward", pl_module)

        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self._see("on_after_backward", pl_module)

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            self._see("on_before_optimizer_step", pl_module)

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            self._see("on_train_batch_end", pl_module)

    make_trainer(limit_train_batches=2, callbacks=[Watch()]).fit(make_module(4), loader())
    assert seen == {
        "on_before_zero_grad": [False, False],  # those of the step before have made place for the new ones
        "on_before_backward": [False, False],
        "on_after_backward": [True, True],
        "on_before_optimizer_step": [True, True],
        "on_train_batch_end": [True, True],
    }


def test_changing_gradients_in_a_hook_changes_the_step(make_trainer: MakeTrainer) -> None:
    class NoGradients(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            for p in pl_module.parameters():
                p.grad = torch.zeros_like(p)

    module = make_module(4, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    before = [p.clone() for p in module.parameters()]
    make_trainer(callbacks=[NoGradients()]).fit(module, loader())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


class RecordParameters(L.Callback):
    """The module's parameters after each step and after each epoch."""

    def __init__(self) -> None:
        self.after_steps: list[list[Tensor]] = []
        self.after_epochs: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.after_steps.append([p.detach().clone() for p in pl_module.parameters()])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.after_epochs.append([p.detach().clone() for p in pl_module.parameters()])


def test_ema_weight_averaging(make_trainer: MakeTrainer) -> None:
    module, record = make_module(4), RecordParameters()
    averaging = EMAWeightAveraging(decay=0.9)
    make_trainer(max_epochs=2, callbacks=[record, averaging]).fit(module, loader(), loader())
    average, *others = record.after_steps
    for values in others:
        average = [0.9 * a + 0.1 * b for a, b in zip(average, values, strict=True)]
    for got, want in zip(module.parameters(), average, strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    assert len(record.after_steps) == 10


def test_stochastic_weight_averaging(make_trainer: MakeTrainer) -> None:
    def averaging() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)

    network = small_cnn()
    plain = BackpropagationWithSchedule(copy.deepcopy(network))
    make_trainer(strategy="auto", max_epochs=4, callbacks=[averaging()]).fit(plain, loader())
    module = DGLModule(network, num_blocks=1, example_input=(2, 3, 8, 8), optimizer=sgd, lr_scheduler=cosine)
    make_trainer(max_epochs=4, callbacks=[averaging()]).fit(module, loader())
    assert same(weights(module.network), weights(plain.network))

    blocks, record = make_module(4), RecordParameters()
    make_trainer(max_epochs=4, callbacks=[record, averaging()]).fit(blocks, loader())
    assert rates(blocks) == pytest.approx([0.01] * 4)
    for last, averaged in zip(record.after_epochs[3], blocks.parameters(), strict=True):
        assert torch.isfinite(averaged).all()
        assert not torch.equal(last, averaged)


# Frozen blocks


def test_a_frozen_block_stays_as_it_is(make_trainer: MakeTrainer) -> None:
    module = make_module(4)
    module.blocks[0].requires_grad_(False)
    before = [{n: p.clone() for n, p in block.named_parameters()} for block in module.blocks]
    head = weights(module.heads[0])
    make_trainer(max_epochs=2).fit(module, loader(), loader())
    after = [dict(block.named_parameters()) for block in module.blocks]
    assert [same(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False, False]
    assert not same(head, weights(module.heads[0]))


def test_a_frozen_last_block_stays_as_it_is(make_trainer: MakeTrainer) -> None:
    module = make_module(4)
    module.blocks[3].requires_grad_(False)
    before = [{n: p.clone() for n, p in block.named_parameters()} for block in module.blocks]
    make_trainer(gradient_clip_val=0.1).fit(module, loader(), loader())
    after = [dict(block.named_parameters()) for block in module.blocks]
    assert [same(a, b) for a, b in zip(before, after, strict=True)] == [False, False, False, True]


def test_a_block_unfrozen_later_trains_from_then_on(make_trainer: MakeTrainer) -> None:
    changed: list[bool] = []

    class Unfreeze(L.Callback):
        def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
            pl_module.blocks[0].requires_grad_(False)

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.blocks[0].requires_grad_(True)
            self.before = {n: p.clone() for n, p in pl_module.blocks[0].named_parameters()}

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            changed.append(not same(self.before, dict(pl_module.blocks[0].named_parameters())))

    make_trainer(max_epochs=2, callbacks=[Unfreeze()]).fit(make_module(4), loader())
    assert changed == [False, True]


# The table of blocks


def test_model_summary_brings_the_table_of_blocks(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(enable_model_summary=False, fast_dev_run=True).fit(make_module(4), loader())
    assert "MLPSRHead" not in capsys.readouterr().out
    make_trainer(enable_model_summary=True, fast_dev_run=True).fit(make_module(4), loader())
    assert capsys.readouterr().out.count("MLPSRHead") == 3
    own = make_trainer(enable_model_summary=True, fast_dev_run=True, callbacks=[BlockSummary()])
    own.fit(make_module(4), loader())
    assert capsys.readouterr().out.count("MLPSRHead") == 3
