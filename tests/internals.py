"""The one place where tests look behind the package's public names."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import lightning as L
import torch

from lightning_dgl import Asynchronous, DGLModule, ReplayBuffer
from lightning_dgl.address import Address
from lightning_dgl.distributed import Inbox
from lightning_dgl.lightning_internals import take_over
from lightning_dgl.links import Link, Traffic, make_links

__all__ = [
    "InOrder",
    "another_version",
    "blocks_here",
    "buffers",
    "bytes_sent",
    "links_of",
    "num_dropped",
    "slow_link",
    "take_over",
    "traffic",
    "turns_of",
    "updates",
]

# What a run holds


def links_of(module: L.LightningModule) -> list[Link]:
    """Return the links that lead to each block, and the one after the last."""
    run: Any = module.run
    return run.links


def updates(module: DGLModule) -> list[int]:
    """Return how many local steps each block has taken."""
    return [progress.updates for progress in module.progress]


def traffic(module: DGLModule) -> list[Traffic]:
    """Return what has passed from each block to the next: batches, raw_bytes, encoded_bytes."""
    return [link.traffic for link in links_of(module)[1:]]


def blocks_here(trainer: L.Trainer) -> range:
    """Return the blocks that this rank trains."""
    blocks: range = trainer.strategy.run.stage.blocks  # type: ignore[attr-defined]
    return blocks


def bytes_sent(trainer: L.Trainer) -> int:
    """Return how many bytes this rank has sent to the next."""
    return trainer.strategy.run.outgoing.bytes_sent or 0  # type: ignore[attr-defined]


def num_dropped(trainer: L.Trainer) -> int:
    """Return how many batches this rank has dropped because the next one did not take them in time."""
    dropped: int = trainer.strategy.run.outgoing.num_dropped  # type: ignore[attr-defined]
    return dropped


def buffers(links: list[Link]) -> dict[int, ReplayBuffer]:
    """Return the replay buffer of each block that reads from one."""
    return {j: link.buffer for j, link in enumerate(links) if link.buffer is not None}


# What decides on turns


class InOrder(Asynchronous):
    """Blocks take turns in a given order, over and over, or a random one; ``drawn`` tells which."""

    def __init__(self, order: list[int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._order = order
        self.drawn: list[int] = []

    def next_block(self) -> int:
        order = self._order
        self.drawn.append(super().next_block() if order is None else order[len(self.drawn) % len(order)])
        return self.drawn[-1]


def turns_of(schedule: Asynchronous, num_blocks: int, num_batches: int, seed: int = 0) -> tuple[list[int], list[Link]]:
    """Take turns without training anything; return how many local steps each block has taken, and the links."""
    steps, blocks = [0] * num_blocks, range(num_blocks)
    batch = torch.zeros(1)
    schedule.start(blocks, num_blocks, seed)
    links = make_links([None] * (num_blocks - 1), ["?"] * num_blocks, blocks, new_buffer=schedule.new_buffer)
    for i in range(num_batches):
        address = Address("train", 0, 0, i, i)
        links[0].put(address, (batch, batch))
        for block in schedule.turns(blocks, 0):
            if links[block].is_ready(address):
                links[block + 1].send(address, *links[block].receive(address))
                steps[block] += 1
    return steps, links


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
    return mock.patch("lightning_dgl.trainer_checks.__version__", version)
