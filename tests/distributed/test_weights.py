"""Blocks on several ranks come to what one process comes to: the same weights, values and files, bit for bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from torch import nn

from lightning_dgl import DGLModule, DGLStrategy
from tests.distributed.ranks import Launch, Notes, Run, assert_same_outcome, comparable, dropout_module, fit
from tests.runs import adam, differences, loader, small_cnn, small_data, step_lr, weights

NAMES = {
    f"{phase}/{what}{suffix}"
    for phase in ("train", "val")
    for what in ("loss", "acc")
    for suffix in ("", "_block0", "_block1", "_block2", "_block3")
} | {"val/acc_ensemble"}


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_weights_and_metrics_do_not_depend_on_the_number_of_ranks(num_ranks: int, launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        return launch(
            num_ranks,
            lambda trainer: fit(trainer, dropout_module(lr_scheduler=step_lr), (loader(38, shuffle=True), loader(20))),
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
        )

    one, several = run(1), run(num_ranks)
    assert_same_outcome(several, one)
    assert len(several.ranks) == num_ranks
    for note in several.ranks:
        assert set(note["metrics"]) == NAMES
    # What the process that started the ranks is left with.
    assert differences(dict(several.result.state_dict()), one.ranks[0]["weights"]) == []
    assert differences(dict(several.trainer.callback_metrics), one.ranks[0]["metrics"]) == []
    # An untrained module has other weights: training has reached every block.
    L.seed_everything(3, verbose=False)
    fresh = dropout_module().state_dict()
    changed = {name for name, value in several.result.state_dict().items() if not torch.equal(value, fresh[name])}
    assert changed == set(fresh)
    # All blocks' values of a step have arrived at the logger, whichever rank measured them.
    logged = [row for row in several.rows.values() if "train/loss" in row]
    assert len(logged) > 2
    for row in logged:
        assert {name for name in NAMES if name.startswith("train/")} <= row.keys()


@pytest.mark.slow
def test_ranks_are_spawned(launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        data = (loader(16, shuffle=True), loader(8))
        return launch(
            num_ranks, lambda trainer: fit(trainer, dropout_module(), data), start_method="spawn", max_epochs=1
        )

    assert_same_outcome(run(2), run(1))


def test_augmented_heads_are_those_of_one_process(launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        data = (loader(38, shuffle=True), loader(20))
        return launch(num_ranks, lambda trainer: fit(trainer, dropout_module(head="augmented"), data), max_epochs=1)

    one, two = run(1), run(2)
    assert any(".units." in name for name in two.result.state_dict())
    assert_same_outcome(two, one)


class Unlike(L.Callback):
    """Gives every rank but the first other weights, and another random state."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.global_rank > 0:
            torch.manual_seed(100 + trainer.global_rank)
            for p in pl_module.parameters():
                nn.init.normal_(p)


def test_ranks_that_start_unlike_take_after_rank_0(launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        return launch(
            num_ranks, lambda trainer: fit(trainer, dropout_module(), (loader(), loader(20))), callbacks=[Unlike()]
        )

    assert_same_outcome(run(3), run(1))


class CutsElsewhere(DGLStrategy):
    """Lets rank 1 cut the network elsewhere, as if it had measured other times."""

    def setup_environment(self) -> None:
        assert isinstance(self.lightning_module, DGLModule)
        if self.local_rank == 1:
            own = self.lightning_module.measured_cuts
            self.lightning_module.cut_at(["6" if own == ["2"] else "2"])
        super().setup_environment()


def test_blocks_balanced_by_time_are_those_of_rank_0(launch: Launch) -> None:
    module = DGLModule(small_cnn(dropout=0.2), 2, example_input=(8, 3, 8, 8), balance="time", optimizer=adam)

    def run(num_ranks: int, **kwargs: Any) -> Run:
        own = copy.deepcopy(module)
        return launch(num_ranks, lambda trainer: fit(trainer, own, (loader(), loader(20))), **kwargs)

    two = run(2, strategy=CutsElsewhere(timeout=60, start_method="fork"))
    assert_same_outcome(two, run(1))
    assert two.result.measured_cuts == module.measured_cuts


# One Trainer after another


def everything(num_ranks: int, folder: Path) -> None:
    """A script that uses one Trainer after another, for all that a Trainer can do."""
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    module = dropout_module(optimizer=adam)
    data = (loader(38, shuffle=True), loader(20))
    several = [loader(20), loader(12, 4)]

    def make_trainer(max_epochs: int) -> L.Trainer:
        return L.Trainer(
            accelerator="cpu",
            devices=num_ranks,
            strategy=DGLStrategy(timeout=120),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            max_epochs=max_epochs,
            callbacks=[ModelCheckpoint(folder, filename="best", monitor="val/loss", enable_version_counter=False)],
        )

    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, *data)
    trainer.save_checkpoint(folder / "after_fit.ckpt")
    notes: Notes = {"weights": weights(module), "metrics": _values(trainer)}
    notes["scores"] = module.eval().block_scores(small_data(8).tensors[0])
    module.train()
    notes["validate"] = trainer.validate(module, loader(20), verbose=False)
    notes["test"] = trainer.test(module, several, ckpt_path="best", weights_only=True, verbose=False)
    notes["best weights"] = weights(module)
    notes["predict"] = trainer.predict(module, loader(20))
    notes["predict several"] = trainer.predict(module, several)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, *data)
    notes["fitted on"] = weights(module), _values(trainer)

    other, resumed = make_trainer(max_epochs=3), dropout_module(optimizer=adam)
    other.predict(module, loader(8))
    other.fit(resumed, *data, ckpt_path=folder / "after_fit.ckpt", weights_only=True)
    notes["resumed"] = weights(resumed), _values(other)
    torch.save(notes, folder / f"rank{trainer.global_rank}.pt")


def _values(trainer: L.Trainer) -> dict[str, Any]:
    return dict(trainer.callback_metrics)


def test_a_script_with_one_trainer_after_another(tmp_path: Path) -> None:
    script = "import sys, pathlib; from tests.distributed.test_weights import everything\n"
    script += "if __name__ == '__main__': everything(int(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for num_ranks in (1, 2):
        (tmp_path / str(num_ranks)).mkdir()
    with mock.patch.dict(os.environ):
        everything(1, tmp_path / "1")
    command = [sys.executable, str(tmp_path / "script.py"), "2", str(tmp_path / "2")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    one = torch.load(tmp_path / "1" / "rank0.pt", weights_only=False)
    assert [len(scores) for scores in one["predict"]] == [8, 8, 4]
    assert [[len(scores) for scores in part] for part in one["predict several"]] == [[8, 8, 4], [4, 4, 4]]
    assert len(one["test"]) == 2
    for rank in range(2):
        note = torch.load(tmp_path / "2" / f"rank{rank}.pt", weights_only=False)
        assert differences(note, one) == []
    for name in ("best.ckpt", "after_fit.ckpt"):
        assert differences(comparable(tmp_path / "2" / name), comparable(tmp_path / "1" / name)) == []
