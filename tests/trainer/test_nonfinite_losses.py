"""Losses that are not finite."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dgl import DGLModule, NonFiniteLossError
from tests.runs import MakeTrainer, block_weights, loader, make_module, same, small_data


class Spoiled(DGLModule):
    """The loss of block 1 is NaN in step 2."""

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        loss = super().local_loss(block, scores, targets)
        return loss * float("nan") if self.trainer.training and (block, self.trainer.global_step) == (1, 2) else loss


class Record(L.Callback):
    """Every block's state before training and after each step."""

    def __init__(self) -> None:
        self.states: list[list[dict[str, Tensor]]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.states.append(block_weights(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.states.append(block_weights(pl_module))

    def changed(self, step: int) -> list[bool]:
        return [not same(a, b) for a, b in zip(self.states[step], self.states[step + 1], strict=True)]


def test_a_loss_that_is_not_finite_stops_with_block_and_step(make_trainer: MakeTrainer) -> None:
    module, record = make_module(4, kind=Spoiled), Record()
    with pytest.raises(NonFiniteLossError, match=r"(?s)block 1 .*nan at step 2"):
        make_trainer(callbacks=[record]).fit(module, loader())
    parameters = [name for name, _ in module.blocks[0].named_parameters()]
    after = block_weights(module)[0]
    assert all(torch.equal(after[name], record.states[-1][0][name]) for name in parameters)
    assert len(record.states) == 3


def test_skip_leaves_out_only_that_block_s_update(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    module, record = make_module(4, kind=Spoiled, on_nonfinite="skip"), Record()
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(callbacks=[record], logger=logger, log_every_n_steps=1)
    trainer.fit(module, loader())
    for step in range(5):
        assert record.changed(step) == [True, step != 2, True, True]
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/skipped_block1"]]
    assert [float(row["train/skipped_block1"]) for row in rows] == [0, 0, 1, 1, 1]
    assert {float(row["train/skipped_block0"]) for row in rows} == {0}


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_an_input_that_is_not_finite(on_nonfinite: str, make_trainer: MakeTrainer) -> None:
    data = small_data(24)
    data.tensors[0][10] = float("inf")
    batches = DataLoader(data, batch_size=8)
    module, record = make_module(4, on_nonfinite=on_nonfinite), Record()
    trainer = make_trainer(callbacks=[record])
    if on_nonfinite == "raise":
        with pytest.raises(NonFiniteLossError, match="block 0"):
            trainer.fit(module, batches)
    else:
        trainer.fit(module, batches)
        assert record.changed(0) == [True] * 4
        assert record.changed(1) == [False] * 4
        assert record.changed(2) == [True] * 4
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_a_network_in_one_block_skips_too(make_trainer: MakeTrainer) -> None:
    class SpoiledWhole(DGLModule):
        def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
            return super().local_loss(block, scores, targets) * (float("nan") if self.trainer.global_step == 1 else 1)

    record = Record()
    make_trainer(callbacks=[record]).fit(make_module(1, kind=SpoiledWhole, on_nonfinite="skip"), loader())
    assert [record.changed(step) for step in range(5)] == [[True], [False], [True], [True], [True]]
