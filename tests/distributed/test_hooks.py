"""Callbacks and hooks on several ranks."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from lightning_dgl import DGLModule
from tests.distributed.ranks import Launch, Run, assert_same_outcome, dropout_module, fit
from tests.runs import differences, loader


class StopAt(L.Callback):
    """Stops training in the middle of an epoch, on every rank."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


def test_a_callback_may_stop_within_an_epoch(launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        def act(trainer: L.Trainer) -> None:
            fit(trainer, dropout_module(), (loader(38, shuffle=True), loader(20)))

        return launch(num_ranks, act, callbacks=[StopAt(7)])

    one, several = run(1), run(3)
    assert one.trainer.global_step == 7
    # The log is not compared: Lightning adds a row when training stops, in which most values are of the step before.
    for note in several.ranks:
        for what in ("weights", "metrics", "progress"):
            assert differences(note[what], one.ranks[0][what]) == []


# Hooks on batches


class Doubling:
    """Hooks on batches, of a module or of a data module."""

    calls: list[str]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("before")
        return [batch[0] + 1, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("after")
        return [2 * batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]]


class DoublingModule(Doubling, DGLModule):
    pass


class DoublingData(Doubling, L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(38, shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(20)


class Calls(L.Callback):
    """Notes how often hooks on batches were called on this rank."""

    def __init__(self) -> None:
        self.seen: Any = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        hooked = pl_module if isinstance(pl_module, Doubling) else trainer.datamodule  # type: ignore[attr-defined]
        self.seen = {name: hooked.calls.count(name) for name in ("before", "after")}


@pytest.mark.parametrize("owner", ["module", "data module"])
def test_hooks_on_batches_run_once_for_each_batch(owner: str, launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        def act(trainer: L.Trainer) -> None:
            module, data = dropout_module(kind=DoublingModule if owner == "module" else DGLModule), DoublingData()
            for hooked in (module, data):
                hooked.calls = []
            fit(trainer, module, (data,) if owner == "data module" else (loader(38, shuffle=True), loader(20)))

        return launch(num_ranks, act, callbacks=[Calls()], num_sanity_val_steps=0)

    one, several = run(1), run(3)
    assert_same_outcome(several, one)
    times = 2 * (5 + 3)
    assert [note["seen"] for note in several.ranks] == [
        [{"before": times, "after": times}],
        *2 * [[{"before": 0, "after": 0}]],
    ]
    plain = launch(1, lambda trainer: fit(trainer, dropout_module(), (loader(38, shuffle=True), loader(20))))
    assert differences(plain.ranks[0]["weights"], one.ranks[0]["weights"]) != []
