"""The one place where tests look behind the package's public names."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import lightning as L
import torch
from torch import Tensor

from lightning_dgl import Asynchronous, DGLModule, ReplayBuffer
from lightning_dgl.distributed.link import Inbox
from lightning_dgl.distributed.signals import take_over

__all__ = [
    "InOrder",
    "another_version",
    "blocks_here",
    "buffers",
    "bytes_sent",
    "num_dropped",
    "slow_link",
    "take_over",
    "traffic",
    "updates",
    "updates_of",
]

# What a run holds


def updates(module: DGLModule) -> list[int]:
    """Return how many local steps each block has taken."""
    return [progress.updates for progress in module.progress]


def traffic(module: DGLModule) -> list[Any]:
    """Return what has passed from each block to the next: batches, raw_bytes, encoded_bytes."""
    return module.boundaries.traffic


def blocks_here(trainer: L.Trainer) -> range:
    """Return the blocks that this rank trains."""
    blocks: range = trainer.strategy.stage.blocks  # type: ignore[attr-defined]
    return blocks


def bytes_sent(trainer: L.Trainer) -> int:
    """Return how many bytes this rank has sent to the next."""
    outbox = trainer.strategy.stage.outbox  # type: ignore[attr-defined]
    return 0 if outbox is None else outbox.bytes_sent


def num_dropped(trainer: L.Trainer) -> int:
    """Return how many batches this rank has dropped because the next one did not take them in time."""
    outbox = trainer.strategy.stage.outbox  # type: ignore[attr-defined]
    return 0 if outbox is None else outbox.num_dropped


def buffers(schedule: Asynchronous) -> dict[int, ReplayBuffer]:
    """Return the replay buffer of each block that reads from one."""
    return schedule.buffers


# What decides on turns


class InOrder(Asynchronous):
    """Blocks take turns in a given order, over and over, or a random one; the turns can be read afterwards."""

    def __init__(self, order: list[int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._order = order
        self.turns: list[int] = []

    def next_block(self) -> int:
        order = self._order
        self.turns.append(super().next_block() if order is None else order[len(self.turns) % len(order)])
        return self.turns[-1]


def updates_of(schedule: Asynchronous, num_blocks: int, num_batches: int, seed: int = 0) -> list[int]:
    """Return how many local steps each block takes, without training anything."""
    steps = [0] * num_blocks
    targets = torch.zeros(1)

    def local_step(block: int, x: Tensor, y: Tensor) -> Tensor:
        steps[block] += 1
        return x

    schedule.start(range(num_blocks), num_blocks, seed)
    for _ in range(num_batches):
        schedule.step(local_step, range(num_blocks), targets, targets)
    return steps


# What tests replace


@contextmanager
def slow_link(trainer: L.Trainer, seconds: float) -> Iterator[None]:
    """Let the link into this rank take so much longer for each message of training."""
    receive = Inbox._receive

    def slowly(self: Inbox) -> Any:
        batch = receive(self)
        if trainer.training:
            time.sleep(seconds)
        return batch

    with mock.patch.object(Inbox, "_receive", slowly):
        yield


def another_version(version: str) -> Any:
    """Let this rank believe that it runs another version of the package; a context manager."""
    return mock.patch("lightning_dgl.preconditions.__version__", version)
