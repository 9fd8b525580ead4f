"""Users override hooks as in any LightningModule, without super(): nothing of the plugin's own work is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy

from lightning_dgl import DGLModule
from tests.runs import Backpropagation, MakeTrainer, block_weights, half, loader, make_module, same, small_cnn

HOOKS = (
    *("setup", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "teardown"),
    *("on_train_epoch_start", "on_train_epoch_end", "on_validation_epoch_start", "on_validation_epoch_end"),
    *("on_validation_start", "on_validation_end", "on_test_epoch_start", "on_test_epoch_end"),
    *("on_save_checkpoint", "on_load_checkpoint", "configure_callbacks", "on_train_batch_start", "on_train_batch_end"),
)


def _do_nothing(self: Any, *_: Any, **__: Any) -> None:
    pass


Overridden: type[DGLModule] = type("Overridden", (DGLModule,), dict.fromkeys(HOOKS, _do_nothing))
"""Overrides every hook, and calls super() in none."""


def run(
    kind: type[DGLModule], folder: Path, make_trainer: MakeTrainer, **kwargs: Any
) -> tuple[DGLModule, dict[str, Any]]:
    """Train two epochs, then two more from the checkpoint of the first, and test."""
    save = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    L.seed_everything(1, verbose=False)
    trainer = make_trainer(max_epochs=2, callbacks=[save], enable_checkpointing=True, **kwargs)
    trainer.fit(make_module(kind=kind, dropout=0.3), loader(shuffle=True), loader())
    L.seed_everything(2, verbose=False)
    module = make_module(kind=kind, dropout=0.3)
    trainer = make_trainer(max_epochs=3, **kwargs)
    trainer.fit(module, loader(shuffle=True), loader(), ckpt_path=folder / "epoch=0.ckpt")
    metrics = dict(trainer.callback_metrics)
    trainer.test(module, loader(), verbose=False)
    return module, metrics | dict(trainer.callback_metrics)


@pytest.mark.parametrize("strategy", ["dgl", "auto", "dgl_async"])
def test_hooks_without_super_change_nothing(strategy: str, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    plain, expected = run(DGLModule, tmp_path / "plain", make_trainer, strategy=strategy)
    module, metrics = run(Overridden, tmp_path / "overridden", make_trainer, strategy=strategy)
    assert same(block_weights(module), block_weights(plain))
    assert {name: value.item() for name, value in metrics.items()} == {n: v.item() for n, v in expected.items()}
    assert {"val/loss", "val/acc_ensemble", "test/acc_block0"} <= set(metrics)


def test_mixed_precision_needs_no_super(make_trainer: MakeTrainer) -> None:
    make_trainer(plugins=[half()]).fit(make_module(kind=Overridden), loader())


def test_weights_only_checkpoints_name_their_blocks(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    module, trainer = make_module(), make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert (
        torch.load(tmp_path / "weights.ckpt", weights_only=True)["lightning_dgl"]["block_names"] == module.block_names
    )
    other = make_module(split_at=["2", "5", "10"])
    with pytest.raises(ValueError, match=r"checkpoint's blocks are .* Make the module with split_at"):
        make_trainer().validate(other, loader(), ckpt_path=tmp_path / "weights.ckpt", verbose=False)


def test_a_trainer_keeps_one_callback_of_the_plugin(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    for _ in range(2):
        trainer.fit(make_module(), loader())
        trainer.fit_loop.max_epochs = 1
    assert [type(callback).__name__ for callback in trainer.callbacks].count("Bookkeeping") == 1  # type: ignore[attr-defined]


def test_the_same_trainer_may_go_on_with_another_module(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(strategy="auto")
    trainer.fit(make_module(), loader(), loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Backpropagation(small_cnn()), loader())
    assert trainer.current_epoch == 2


def test_strategies_that_take_blocks_apart_are_refused(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.strategy.__class__ = FSDPStrategy  # only its type is looked at
    module = make_module()
    module.trainer = trainer
    with pytest.raises(TypeError, match=r"DGLModule trains under DGLStrategy, .* got FSDPStrategy"):
        module.start_run_if_none()
