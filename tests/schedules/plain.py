"""The paper's algorithms as plain PyTorch loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from tests.runs import loader, sgd, step_lr


def algorithm_1(
    blocks: list[nn.Module],
    heads: list[nn.Module],
    data: DataLoader[tuple[Tensor, ...]],
    max_steps: int,
    lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
) -> None:
    """Train ``blocks`` in place for ``max_steps`` batches; schedulers step after each pass through the data.

    Block 0 draws from the default random stream, which is seeded anew for each step; block j from one of its own,
    seeded with j.
    """
    optimizers = [sgd([*block.parameters(), *head.parameters()]) for block, head in zip(blocks, heads, strict=True)]
    schedulers = [] if lr_scheduler is None else [lr_scheduler(optimizer) for optimizer in optimizers]
    streams = [torch.Generator().manual_seed(j).get_state() for j in range(len(blocks))]
    step = 0
    while step < max_steps:
        for inputs, targets in data:
            streams[0] = torch.Generator().manual_seed(step).get_state()
            x = inputs
            for j, (block, head, optimizer) in enumerate(zip(blocks, heads, optimizers, strict=True)):
                torch.set_rng_state(streams[j])
                output = block(x)
                loss = nn.functional.cross_entropy(head(output), targets)
                streams[j] = torch.get_rng_state()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                x = output.detach()
            step += 1
            if step == max_steps:
                break
        for scheduler in schedulers:
            scheduler.step()


BATCHES = 5  # of each epoch; the last one is smaller


def data() -> DataLoader[tuple[Tensor, ...]]:
    return loader(num_samples=38)


class PlainBlock:
    """A block, its head, optimizer, scheduler and buffer; the buffer follows the rule by looking at all entries."""

    def __init__(self, block: nn.Module, head: nn.Module, buffer_size: int, max_reuse: int | None = None) -> None:
        self.block, self.head = block, head
        self.parameters = [*block.parameters(), *head.parameters()]
        self.optimizer = sgd(self.parameters)
        self.scheduler = step_lr(self.optimizer)
        self.updates = 0
        self._entries: list[list[Any]] = []
        self._buffer_size, self._max_reuse = buffer_size, max_reuse

    def put(self, activation: Tensor, targets: Tensor) -> None:
        self._entries = [*self._entries, [0, activation, targets]][-self._buffer_size :]

    def read(self) -> tuple[Tensor, Tensor] | None:
        readable = [entry for entry in self._entries if self._max_reuse is None or entry[0] < self._max_reuse]
        if not readable:
            return None
        entry = [e for e in readable if e[0] == min(e[0] for e in readable)][-1]
        entry[0] += 1
        return entry[1], entry[2]

    def step(self, x: Tensor, targets: Tensor, clip: float | None = None) -> Tensor:
        """Train on a batch; the scheduler counts this block's own epochs."""
        output = self.block(x)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.head(output), targets).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, clip)
        self.optimizer.step()
        self.updates += 1
        if self.updates % BATCHES == 0:
            self.scheduler.step()
        return output.detach()


def algorithm_2(
    plain: list[PlainBlock], epochs: int, turns: list[int], clip: float | None = None, warm_up: int = 2
) -> None:
    """Train in place: one step of block 0 on each batch of data, and ``turns`` of all blocks in between."""
    left = iter(turns)

    def train(j: int, batch: tuple[Tensor, Tensor] | None) -> None:
        if batch is not None:
            output = plain[j].step(*batch, clip)
            if j + 1 < len(plain):
                plain[j + 1].put(output, batch[1])

    for _ in range(epochs):
        for inputs, targets in data():
            train(0, (inputs, targets))
            if warm_up > 0:
                warm_up -= 1
                for j in range(1, len(plain)):
                    train(j, plain[j].read())
                continue
            while (j := next(left)) != 0:
                train(j, plain[j].read())


def greedy(
    blocks: list[nn.Module],
    heads: list[nn.Module],
    epochs: int,
    accumulate: int = 1,
    lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
) -> None:
    """Train in place, each block for so many epochs on what the frozen ones before it make of the data."""
    for j, (block, head) in enumerate(zip(blocks, heads, strict=True)):
        optimizer = sgd([*block.parameters(), *head.parameters()])
        scheduler = None if lr_scheduler is None else lr_scheduler(optimizer)
        for frozen in blocks[:j]:
            frozen.eval()
        for _ in range(epochs):
            for i, (x, targets) in enumerate(data()):
                with torch.no_grad():
                    for frozen in blocks[:j]:
                        x = frozen(x)
                (nn.functional.cross_entropy(head(block(x)), targets) / accumulate).backward()
                if (i + 1) % accumulate == 0 or i + 1 == len(data()):
                    optimizer.step()
                    optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
