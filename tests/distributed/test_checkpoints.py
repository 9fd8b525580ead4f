"""Checkpoints of several ranks are those of one process, and resume on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
)

from lightning_dgl import DGLModule
from lightning_dgl.optim import BlockOptimizer
from tests.distributed.ranks import Launch, Run, comparable, dropout_module, fit, scaled
from tests.internals import blocks_here
from tests.runs import ResumableLoader, adam, differences, loader, make_module, quiet_trainer, small_cnn, step_lr


class Held(L.Callback):
    """Checks while training that a rank holds the optimizer states of its own blocks only."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, ...]] = set()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._look(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > 0:  # resumed
            self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        optimizer: Any = trainer.optimizers[0]
        assert isinstance(optimizer, BlockOptimizer)
        held = tuple(j for j, own in enumerate(optimizer.optimizers) if len(own.state) > 0)
        self.seen.add(held)
        assert set(held) <= set(blocks_here(trainer))


class Best(L.Callback):
    """Remembers which checkpoint is the best."""

    def __init__(self) -> None:
        self.seen: Any = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        keep: Any = trainer.checkpoint_callback
        self.seen = Path(keep.best_model_path).name, keep.best_model_score


def test_after_training_the_process_that_has_forked_ranks_saves_their_weights(launch: Launch) -> None:
    trained = launch(2, lambda trainer: fit(trainer, make_module(2), (loader(),)))
    trainer, module, path = trained.trainer, trained.result, trained.folder / "saved.ckpt"
    assert module.trainer is trainer
    with pytest.warns(UserWarning, match="Only weights are saved: optimizers were in the processes that trained"):
        trainer.save_checkpoint(path)
    loaded = DGLModule.load_from_checkpoint(path, network=small_cnn(), example_input=(2, 3, 8, 8))
    for state in (module.state_dict(), loaded.state_dict()):
        assert differences(dict(state), trained.ranks[0]["weights"]) == []
    with pytest.raises(KeyError, match="checkpoint contains only the model"):  # none to resume from
        quiet_trainer(max_epochs=3).fit(loaded, loader(), ckpt_path=path)


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        *((3, "32-true"), (2, "16-mixed")),
        pytest.param(2, "32-true", marks=pytest.mark.slow),
        pytest.param(3, "16-mixed", marks=pytest.mark.slow),
    ],
)
def test_checkpoints_hold_what_one_process_saves(num_ranks: int, settings: str, launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        keep = ModelCheckpoint(monitor="val/acc", mode="max", save_top_k=1, save_last=True)
        kwargs = scaled() if settings == "16-mixed" else {}

        def act(trainer: L.Trainer) -> None:
            module = dropout_module(lr_scheduler=step_lr, optimizer=adam)
            fit(trainer, module, (loader(38, shuffle=True), loader(20)))

        callbacks = [keep, Best(), EarlyStopping("val/loss", patience=10)]
        return launch(num_ranks, act, callbacks=callbacks, max_epochs=3, enable_checkpointing=True, **kwargs)

    one, several = run(1), run(num_ranks)
    assert len(one.checkpoints) == 2
    assert several.checkpoints.keys() == one.checkpoints.keys()
    for name, path in one.checkpoints.items():
        assert differences(comparable(several.checkpoints[name]), comparable(path)) == []
    for note in several.ranks:
        assert differences(note["seen"], one.ranks[0]["seen"]) == []
    # Every block's moments, random stream (block 0 draws from the default one), and scale.
    checkpoint = comparable(several.checkpoints["last.ckpt"])
    for state in checkpoint["optimizer_states"][0]["blocks"]:
        assert len(state["state"]) == len(state["param_groups"][0]["params"])
    assert [state is None for state in checkpoint["lightning_dgl"]["random_state"]["blocks"]] == [True] + [False] * 3
    if settings == "16-mixed":
        assert len({scaler["scale"] for scaler in checkpoint["MixedPrecision"]["blocks"]}) > 1


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("saved_on", "resumed_on", "settings"),
    [
        *((1, 3, "32-true"), (4, 2, "16-mixed")),
        pytest.param(3, 1, "32-true", marks=pytest.mark.slow),
        pytest.param(2, 3, "32-true", marks=pytest.mark.slow),
        pytest.param(1, 3, "16-mixed", marks=pytest.mark.slow),
    ],
)
def test_a_run_saved_on_some_ranks_is_resumed_on_others(
    saved_on: int, resumed_on: int, settings: str, launch: Launch
) -> None:
    def run(num_ranks: int, max_epochs: int, ckpt_path: Path | None = None) -> Run:
        keep = ModelCheckpoint(filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        kwargs = scaled() if settings == "16-mixed" else {}

        def act(trainer: L.Trainer) -> None:
            torch.manual_seed(3 if ckpt_path is None else 77)  # a resumed run finds everything in the checkpoint
            module = dropout_module(optimizer=adam, lr_scheduler=step_lr)
            fit(trainer, module, (loader(38, shuffle=True), loader(20)), ckpt_path=ckpt_path, weights_only=True)

        callbacks = [keep, Held()]
        return launch(num_ranks, act, callbacks=callbacks, max_epochs=max_epochs, enable_checkpointing=True, **kwargs)

    whole = run(1, max_epochs=3)
    first = run(saved_on, max_epochs=1)
    resumed = run(resumed_on, max_epochs=3, ckpt_path=first.checkpoints["epoch=0.ckpt"])
    for note in resumed.ranks:
        assert differences(note["weights"], whole.ranks[0]["weights"]) == []
        assert differences(note["metrics"], whole.ranks[0]["metrics"]) == []
    last, expected = (comparable(run.checkpoints["epoch=2.ckpt"]) for run in (resumed, whole))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "lightning_dgl"):
        assert differences(last[part], expected[part]) == []
    assert last.get("MixedPrecision") == expected.get("MixedPrecision")
    # Before and after, each rank has held the optimizer states of its own blocks.
    for run_of_ranks in (first, resumed):
        held = [set().union(*note["seen"][0]) for note in run_of_ranks.ranks]
        assert sorted(block for own in held for block in own) == [0, 1, 2, 3]


@pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:You're resuming from a checkpoint that ended before"
)
@pytest.mark.parametrize("make_loader", [ResumableLoader, lambda: loader(40)], ids=["resumable loader", "plain loader"])
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_resuming_within_an_epoch(num_ranks: int, make_loader: Callable[[], Any], launch: Launch) -> None:
    def run(num_ranks: int, ckpt_path: Path | None = None) -> Run:
        keep = ModelCheckpoint(filename="{step}", every_n_train_steps=1, save_top_k=-1)

        def act(trainer: L.Trainer) -> None:
            torch.manual_seed(3 if ckpt_path is None else 77)
            fit(trainer, dropout_module(), (make_loader(),), ckpt_path=ckpt_path, weights_only=True)

        return launch(num_ranks, act, callbacks=[keep], max_epochs=2, enable_checkpointing=True)

    one, several = run(1), run(num_ranks)
    name = "step=7.ckpt"  # of five batches in each epoch
    for name in one.checkpoints:
        assert differences(comparable(several.checkpoints[name]), comparable(one.checkpoints[name])) == []
    continued, expected = run(num_ranks, several.checkpoints[name]), run(1, one.checkpoints[name])
    for note in continued.ranks:
        for what in ("weights", "metrics", "progress"):
            assert differences(note[what], expected.ranks[0][what]) == []
    if make_loader is ResumableLoader:
        assert differences(expected.ranks[0]["weights"], one.ranks[0]["weights"]) == []
