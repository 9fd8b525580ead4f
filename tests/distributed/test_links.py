"""Links between ranks: what they carry, and how far ahead they let a stage run."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)

from lightning_dgl import VectorQuantizer
from tests.distributed.ranks import Launch, Run, assert_same_outcome, comparable, dropout_module, fit
from tests.internals import bytes_sent
from tests.runs import differences, loader

CODECS = {
    "half": "half",
    "quantizer": VectorQuantizer(16, 4),
    "one for each boundary": [None, "half", VectorQuantizer(8, 2, num_codebooks=2)],
}


class BytesSent(L.Callback):
    """What this rank has sent when training ends."""

    seen = 0

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.seen = bytes_sent(trainer)


@pytest.mark.parametrize(
    ("num_ranks", "codec"),
    [
        *((2, "half"), (3, "quantizer"), (3, "one for each boundary")),
        pytest.param(3, "half", marks=pytest.mark.slow),
        pytest.param(2, "quantizer", marks=pytest.mark.slow),
        pytest.param(2, "one for each boundary", marks=pytest.mark.slow),
    ],
)
def test_codecs_do_the_same_on_any_number_of_ranks(codec: str, num_ranks: int, launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        keep = ModelCheckpoint(save_last=True)

        def act(trainer: L.Trainer) -> None:
            fit(trainer, dropout_module(), (loader(38, shuffle=True), loader(20)))

        return launch(num_ranks, act, codec=CODECS[codec], callbacks=[keep], enable_checkpointing=True)

    one, several = run(1), run(num_ranks)
    assert_same_outcome(several, one)
    last, expected = (comparable(run.checkpoints["last.ckpt"]) for run in (several, one))
    assert differences(last["lightning_dgl"], expected["lightning_dgl"]) == []


@pytest.mark.parametrize(("precision", "bytes_each"), [("32-true", 4), ("bf16-mixed", 2)])
def test_links_carry_what_codecs_make(precision: Any, bytes_each: int, launch: Launch) -> None:
    def sent(codec: Any) -> int:
        def act(trainer: L.Trainer) -> None:
            fit(trainer, dropout_module(), (loader(40),))

        run = launch(2, act, codec=codec, callbacks=[BytesSent()], precision=precision)
        return int(run.ranks[0]["seen"][0])

    values, labels, header = 8 * 8 * 64, 8 * 8, 512
    steps, ends_of_epochs = 2 * 5, 2 * header
    codebook = 16 * 4 * 4
    assert sent(None) == ends_of_epochs + steps * (header + bytes_each * values + labels)
    assert sent("half") == ends_of_epochs + steps * (header + 2 * values + labels)
    assert sent(VectorQuantizer(16, 4)) == ends_of_epochs + steps * (header + values // 4 + codebook + labels)


class Pace(L.Callback):
    """On the last rank, lets the first one run as far ahead as it can, and then sees how far that is."""

    def __init__(self, num_ranks: int, at_least: int) -> None:
        self.started = torch.zeros(num_ranks, dtype=torch.int64).share_memory_()  # batches, by rank
        self.at_least = at_least
        self.seen: list[int] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        rank = trainer.global_rank
        self.started[rank] = batch_idx + 1
        if rank == len(self.started) - 1 and batch_idx in (2, 5):
            deadline = time.monotonic() + 40
            while self.started[0] - self.started[rank] < self.at_least and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.3)  # it may not go on
            self.seen.append(int(self.started[0] - self.started[rank]))


@pytest.mark.parametrize(
    ("num_ranks", "prefetch"),
    [
        *((2, 4), (3, 1)),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(3, 4, marks=pytest.mark.slow),
    ],
)
def test_a_stage_runs_ahead_of_the_next_by_a_bounded_number_of_batches(
    num_ranks: int, prefetch: int, launch: Launch
) -> None:
    links = num_ranks - 1
    pace = Pace(num_ranks, at_least=links * (prefetch + 1))

    def act(trainer: L.Trainer) -> None:
        fit(trainer, dropout_module(), (loader(200),))

    run = launch(num_ranks, act, prefetch=prefetch, max_epochs=1, callbacks=[pace])
    (ahead,) = run.ranks[-1]["seen"]
    # On each link, batches wait in the receiver's queue; one each waits in the sender's queue and in either thread, and
    # one is being worked on.
    assert len(ahead) == 2
    for batches in ahead:
        assert links * (prefetch + 1) <= batches <= links * (prefetch + 4)
