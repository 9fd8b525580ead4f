"""Schedules: which block takes its local step when, and on what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

LocalStep = Callable[[int, Tensor, Tensor], Tensor]
"""``(block, inputs, targets) -> output``: trains one block and returns its detached output."""


class Schedule(Protocol):
    """What a batch of data sets in motion."""

    def step(self, local_step: LocalStep, blocks: range, inputs: Tensor, targets: Tensor) -> None:
        """Take the local steps that one batch calls for, of the consecutive ``blocks`` that this process holds."""


class Synchronous:
    """Algorithm 1 of the paper: every block takes one local step on every batch, in forward order.

    A block reads its predecessor's output from before this step's update, so no block waits for another's backward. On
    several ranks, blocks work on different batches at once, and come to the same weights::

        rank 0:   data -> step block 0 -> step block 0 -> step block 0 -> ...
                                  ↘               ↘               ↘
        rank 1:                    step block 1 -> step block 1 -> step block 1 -> ...
    """

    def step(self, local_step: LocalStep, blocks: range, inputs: Tensor, targets: Tensor) -> None:
        """Take one local step of each of ``blocks``, on ``inputs`` and what its predecessor makes of them."""
        for block in blocks:
            inputs = local_step(block, inputs, targets)


SCHEDULES: dict[str, type[Synchronous]] = {"sync": Synchronous}


def make_schedule(schedule: str | Schedule) -> Schedule:
    """The schedule that ``schedule`` names or is.

    Raises:
        ValueError: if there is no schedule of that name.
        TypeError: if it is neither a name nor a schedule.
    """
    known = ", ".join(map(repr, SCHEDULES))
    if not isinstance(schedule, str):
        if not callable(getattr(schedule, "step", None)):
            raise TypeError(f"schedule must be one of {known}, or a schedule object, got {type(schedule).__name__}.")
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {known}, or a schedule object, got {schedule!r}.")
    return SCHEDULES[schedule]()
