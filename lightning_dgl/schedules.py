"""Schedules: which block takes its local step when, and on what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

LocalStep = Callable[[int, Tensor, Tensor], Tensor]
"""``(block, inputs, targets) -> output``: trains one block and returns its detached output."""


class Schedule(Protocol):
    """What a batch of data sets in motion."""

    def step(self, local_step: LocalStep, num_blocks: int, inputs: Tensor, targets: Tensor) -> None:
        """Take the local steps that one batch of data calls for."""


class Synchronous:
    """Algorithm 1 of the paper: every block takes one local step on every batch, in forward order.

    A block reads its predecessor's output from before this step's update, so no block waits for another's backward::

        data -> step block 0 -> step block 1 -> ... -> step block J-1
    """

    def step(self, local_step: LocalStep, num_blocks: int, inputs: Tensor, targets: Tensor) -> None:
        """Take one local step of every block on ``inputs`` and what its predecessor makes of them."""
        for block in range(num_blocks):
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
