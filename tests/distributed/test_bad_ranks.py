"""Whatever happens to any rank in any phase: all ranks end in time, and the user reads once who failed and how.

The cases are chosen so that each failure in each phase strikes in both grids of ranks, and each failure strikes every
rank under both schedules.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.distributed.jobs import Job, Outcome, by_hand
from tests.distributed.training import PHASES, train

TIMEOUT = 15
"""Seconds: longer than a rank may keep others waiting by itself on a busy machine."""

FAILURES = {
    "raise": "failed; the run was stopped:",
    "device memory": "failed; the run was stopped:",
    "host memory": "failed; the run was stopped:",
    "interrupt": "failed; the run was stopped:",
    "kill": "exited without an error message; the run was stopped: ",
    "freeze": "hangs; the run was stopped: ",
}
"""How a rank fails, and how its message goes on after its name."""
CAUSES = {
    "raise": "ZeroDivisionError: the culprit",
    "device memory": "OutOfMemoryError: the culprit",
    "host memory": "MemoryError: the culprit",
    "interrupt": "KeyboardInterrupt",
}
AFTER_TRAINING = ("end of training", "end of fit", "tear-down")
STAGES = {3: ["blocks 0 to 1", "block 2", "block 3"], 2: ["blocks 0 to 1", "blocks 2 to 3"]}


class Case(NamedTuple):
    """A failure of one rank."""

    phase: str
    failure: str
    schedule: str
    num_replicas: int
    num_stages: int
    rank: int

    def __str__(self) -> str:
        return "-".join(map(str, self)).replace(" ", "_")


def cases() -> Iterator[Case]:
    ranks = {grid: itertools.cycle(range(grid[0] * grid[1])) for grid in [(1, 3), (2, 2)]}
    schedules = itertools.cycle(["sync", "async", "async", "sync", "sync"])
    for failure in FAILURES:
        for phase in PHASES:
            for grid, rank in ranks.items():
                yield Case(phase, failure, next(schedules), *grid, next(rank))


def messages(outcome: Outcome) -> list[str]:
    """The first line of each message about ranks that the user reads."""
    return re.findall(r"^(?:\[rank\d+\]: )?(?:\S*RankFailedError|Watchdog): (.*)", outcome.output, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_bad_rank(case: Case, job: Job) -> None:
    num_ranks = case.num_replicas * case.num_stages
    job.start_ranks(
        train,
        by_hand(num_ranks),
        devices=num_ranks,
        data_parallel_size=case.num_replicas,
        schedule=case.schedule,
        timeout=TIMEOUT,
        fault=case.failure,
        on=case.rank,
        phase=case.phase,
    )
    outcome = job.wait()
    seconds = time.time() - float((job.folder / "struck").read_text())
    print(f"{case}: {seconds:.1f} s, codes {outcome.codes}")
    assert 0 not in outcome.codes, str(outcome)
    assert outcome.left == [], str(outcome)
    assert outcome.weights == [], str(outcome)
    assert seconds < TIMEOUT + 10, str(outcome)

    name = f"Rank {case.rank} ({STAGES[case.num_stages][case.rank % case.num_stages]})"
    cause = CAUSES.get(case.failure)
    if cause is not None and case.rank == 0:  # its own error, which is in its traceback unless the user knows it
        assert messages(outcome) == [], str(outcome)
        if case.failure == "interrupt":
            assert outcome.output.count("Detected KeyboardInterrupt") == 1, str(outcome)
        else:
            assert outcome.output.count(f"{cause}\n") == 1, str(outcome)
    else:
        told = messages(outcome)
        assert len(told) == 1 and told[0].startswith(f"{name} {FAILURES[case.failure]}"), str(outcome)
        assert cause is None or outcome.output.count(f"{cause}\n") == 1, str(outcome)
    assert_checkpoints_are_whole(job.folder, case)


def assert_checkpoints_are_whole(folder: Path, case: Case) -> None:
    """Every checkpoint of an epoch that has ended, and the last one, can be loaded."""
    files = {path.name: path for path in (folder / "checkpoints").glob("*")}
    num_epochs = 0 if case.phase in ("set-up", "sanity check") else 2 if case.phase in AFTER_TRAINING else 1
    expected = ["last.ckpt", "epoch=0.ckpt", "epoch=1.ckpt"][: num_epochs + 1 if num_epochs else 0]
    if case.phase == "checkpoint" and case.rank > 0:  # rank 0 has all it needs to save this one, too
        files.pop("epoch=1.ckpt", None)
    assert sorted(files) == sorted(expected)
    for path in files.values():
        checkpoint = torch.load(path, weights_only=True)
        assert all(block["state"] for block in checkpoint["optimizer_states"][0]["blocks"])
