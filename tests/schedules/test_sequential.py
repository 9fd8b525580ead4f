"""Sequential greedy training, one block after another, against a plain PyTorch loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint

from lightning_dgl import DGLModule, DGLStrategy, Sequential, VectorQuantizer
from tests.internals import updates
from tests.runs import (
    MakeTrainer,
    ResumableLoader,
    assert_equal,
    block_weights,
    loader,
    make_module,
    pieces,
    same,
    step_lr,
)
from tests.schedules.plain import data, greedy


@pytest.mark.parametrize("num_blocks", [1, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_equal_the_plain_loop_bit_for_bit(num_blocks: int, accumulate: int, make_trainer: MakeTrainer) -> None:
    module = make_module(num_blocks, lr_scheduler=step_lr)
    blocks, heads = pieces(module)
    greedy(blocks, heads, epochs=3, accumulate=accumulate, lr_scheduler=step_lr)
    strategy = DGLStrategy(Sequential(epochs_per_block=3))
    trainer = make_trainer(strategy=strategy, max_epochs=-1, accumulate_grad_batches=accumulate)
    trainer.fit(module, data(), loader(8))
    assert_equal(module, blocks, heads)
    assert trainer.current_epoch == 3 * num_blocks
    assert updates(module) == [3 * len(data())] * num_blocks


def test_max_epochs_are_shared_equally(make_trainer: MakeTrainer) -> None:
    module = make_module()
    blocks, heads = pieces(module)
    greedy(blocks, heads, epochs=2)
    make_trainer(strategy=DGLStrategy("sequential"), max_epochs=8).fit(module, data())
    assert_equal(module, blocks, heads)


@pytest.mark.parametrize("saved", ["step=8", "epoch=2"])  # within an epoch of block 0, and where block 1 is to begin
def test_resumes_bit_for_bit(saved: str, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    def train(module: DGLModule, **kwargs: Any) -> None:
        strategy = DGLStrategy(Sequential(epochs_per_block=3), codec=VectorQuantizer(8, 4))
        callbacks = [
            ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1),
            ModelCheckpoint(tmp_path, filename="{epoch}", save_on_train_epoch_end=True, save_top_k=-1),
        ]
        trainer = make_trainer(strategy=strategy, max_epochs=12, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(module, ResumableLoader(), **kwargs)
        assert updates(module) == [15] * 4

    whole, resumed = make_module(lr_scheduler=step_lr), make_module(lr_scheduler=step_lr)
    train(whole)
    train(resumed, ckpt_path=tmp_path / f"{saved}.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_blocks_that_are_not_training_stay_as_they_are(make_trainer: MakeTrainer) -> None:
    module = make_module()
    seen: list[list[bool]] = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self._before = block_weights(module)

        def on_train_epoch_end(self, *_: Any) -> None:
            seen.append([not same(a, b) for a, b in zip(block_weights(module), self._before, strict=True)])

    make_trainer(strategy=DGLStrategy("sequential"), max_epochs=4, callbacks=[Watch()]).fit(module, data())
    assert seen == [[j == epoch for j in range(4)] for epoch in range(4)]


def test_a_plateau_lowers_the_rate_of_the_block_that_trains(make_trainer: MakeTrainer) -> None:
    def plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e6, factor=0.5)

    module = make_module(lr_scheduler=plateau)
    rates: list[list[float]] = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append([group["lr"] / 0.05 for group in trainer.optimizers[0].param_groups])

    strategy = DGLStrategy(Sequential(epochs_per_block=2))
    make_trainer(strategy=strategy, max_epochs=8, callbacks=[Watch()]).fit(module, data(), loader(8))
    assert rates == [[0.25] * (epoch // 2) + [0.5 ** (epoch % 2)] + [1] * (3 - epoch // 2) for epoch in range(8)]


@pytest.mark.parametrize(
    ("schedule", "max_epochs", "message"),
    [
        (Sequential(3), 8, r"max_epochs=8 is too few for 4 blocks × 3 epochs_per_block. Pass Trainer\(max_epochs=12\)"),
        ("sequential", 7, "max_epochs=7 cannot be shared equally among 4 blocks. Pass a multiple of 4"),
        ("sequential", -1, "max_epochs=-1 cannot be shared equally"),
    ],
)
def test_epochs_that_do_not_fit(schedule: Any, max_epochs: int, message: str, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(strategy=DGLStrategy(schedule), max_epochs=max_epochs)
    with pytest.raises(ValueError, match=message):
        trainer.fit(make_module(), data())


def test_several_devices_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="Sequential trains one block at a time, so of 2 ranks all but one would idle"):
        make_trainer(strategy=DGLStrategy("sequential"), devices=2, max_epochs=4)


def test_no_epochs_for_a_block() -> None:
    with pytest.raises(ValueError, match="epochs_per_block must be"):
        Sequential(0)


class Backbone(DGLModule):
    backbone = property(lambda self: self.network[:9])  # in blocks 0, 1 and 2


def test_a_backbone_that_is_frozen_while_block_0_trains(make_trainer: MakeTrainer) -> None:
    module = make_module(4, kind=Backbone)
    before = {name: parameter.clone() for name, parameter in module.network.named_parameters()}
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)
    make_trainer(strategy=DGLStrategy(Sequential(1)), max_epochs=-1, callbacks=[callback]).fit(module, data())
    kept = {name for name, parameter in module.network.named_parameters() if torch.equal(parameter, before[name])}
    assert kept == {"0.weight", "0.bias"}  # its norm is trained, by the callback's own rule
