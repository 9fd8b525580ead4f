"""Schedules: which block takes its local step when.

A schedule yields block numbers, and knows nothing of networks or links: ``turns`` of three blocks, batch by batch::

    Synchronous                      Asynchronous in one process            Sequential (epoch of block 1)
    0 1 2 | 0 1 2 | 0 1 2 | ...      0 1 2 | 0 1 2 | 0 2 1 1 | 0 | ...      0 1 | 0 1 | 0 1 | ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from typing_extensions import override

from lightning_dgl._arguments import check_at_least
from lightning_dgl.replay import ReplayBuffer


class Schedule:
    """The base of all schedules.

    Attributes:
        draws_blocks: whether blocks are drawn, so that one batch of data makes some step several times, others not at
            all, each on what its replay buffer holds.
        counts_own_epochs: whether a block's epochs, and with them its learning rate, go by its own updates.
        may_drop: whether a stage drops outputs that the next stage is too slow to take, rather than wait for it.
    """

    draws_blocks = False
    counts_own_epochs = False
    may_drop = False

    def num_epochs(self, max_epochs: int | None, num_blocks: int) -> int | None:
        """Return how many epochs to train for; by default ``max_epochs``.

        Raises:
            ValueError: if ``max_epochs`` does not suit the schedule.
        """
        return max_epochs

    def start(self, blocks: range, num_blocks: int, seed: int) -> None:
        """Prepare for a run.

        Args:
            blocks: the consecutive blocks of this process.
            num_blocks: J, of all processes.
            seed: of whatever is drawn at random.

        Raises:
            ValueError: if the schedule does not fit the blocks.
        """

    def turns(self, blocks: range, epoch: int) -> Iterator[int]:
        """Yield the blocks whose turn it is during one batch of data; by default each of ``blocks`` once, in order.

        Args:
            blocks: the consecutive blocks of this process.
            epoch: the Trainer's epoch, from 0.
        """
        yield from blocks

    def is_finished(self, block: int, epoch: int, updates: int, batches_per_epoch: float) -> bool:
        """Return whether a block that has taken ``updates`` local steps only passes on its output from now on."""
        return False

    def only_block(self, epoch: int) -> int | None:
        """Return the one block that trains in ``epoch``; None if all do."""
        return None

    def new_buffer(self) -> ReplayBuffer | None:
        """Make a replay buffer for a block to train from; None if blocks train on what comes, as it comes."""
        return None

    def may_read(self, lead: int, is_exhausted: bool) -> bool:
        """Return whether a stage may train on its replay buffer now rather than wait for the stage before it.

        Args:
            lead: how many batches the stage is ahead of the newest one in the buffer, within the epoch.
            is_exhausted: whether every batch in the buffer was used as often as allowed.
        """
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the schedule."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""


class Synchronous(Schedule):
    """Algorithm 1 of the paper: every block takes one local step on every batch, in forward order.

    A block reads its predecessor's output from before this step's update, so no block waits for another's backward. On
    several ranks, blocks work on different batches at once, and come to the same weights::

        rank 0:   data -> step block 0 -> step block 0 -> step block 0 -> ...
                                  ↘               ↘               ↘
        rank 1:                    step block 1 -> step block 1 -> step block 1 -> ...
    """


class Asynchronous(Schedule):
    """Algorithm 2 of the paper: every block trains at its own pace, on what its replay buffer holds.

    **On several ranks** a stage takes a step whenever it has finished the last one. Its buffer is filled by what it
    receives meanwhile; once there is a first batch it does not wait for the stage before it, unless it is further ahead
    than ``max_lead``. It does not wait for a slow successor either: what that has not taken when newer output is there
    is dropped. All stages take as many steps an epoch as there are batches, or skip some (``max_reuse``), and meet at
    its end and for validation, which is as with the synchronous schedule. Blocks of one stage step in forward order.

    **In one process** this is the paper's simulation of that. Each training step begins with a local step of block 0 on
    a batch of data. Then blocks are drawn, each with a probability proportional to 1 / S, S being its slow-down, and
    take a local step on their buffer, until block 0 is drawn again. So a block takes on average 1 / S as many updates
    as others. As warm-up, on the first two batches, every block takes a step in order.

    Blocks then count their own epochs, one for as many updates as there are batches, and their learning-rate schedulers
    go by that, as in the paper. ``Trainer(max_epochs=...)`` and ``global_step`` count batches of data.

    A checkpoint holds weights, optimizers, the updates of each block and the state of the draws, but not the buffers: a
    resumed run warms up again, and does not come to exactly the same weights as an uninterrupted one.

    Args:
        buffer_size: M, how many batches a block's replay buffer holds.
        max_reuse: how many times a block trains on a batch at most. One whose every batch was used that often skips
            its turn. On several ranks it first waits for the next batch, unless the stage before it is already past
            this step (some of its batches were dropped or overwritten); replicas, which take each step together, then
            use one more often.
        slowdown: S ≥ 1 by block, in one process; other blocks have 1. On several ranks their real speeds decide.
        max_lead: on several ranks, how many batches a stage may be ahead of the one before it, within an epoch; by
            default four times ``buffer_size``. Else a stage that is much faster would train on the epoch's first few
            batches only, and then wait all the same.
        epochs_per_block: after how many of its epochs a block stops training and only passes on its output, in
            eval mode, as in the paper; give a slowed block time for them by a larger ``max_epochs``.

    Raises:
        ValueError: for an argument that does not fit; the message names it, its value and the remedy.
    """

    may_drop = True

    def __init__(
        self,
        buffer_size: int = 8,
        max_reuse: int | None = None,
        slowdown: Mapping[int, float] | None = None,
        *,
        max_lead: int | None = None,
        epochs_per_block: int | None = None,
    ) -> None:
        check_at_least("buffer_size", buffer_size, 1)
        for name, value, least in (
            ("max_reuse", max_reuse, 1),
            ("max_lead", max_lead, 0),
            ("epochs_per_block", epochs_per_block, 1),
        ):
            if value is not None:
                check_at_least(name, value, least)
        for block, factor in dict(slowdown or {}).items():
            if not isinstance(factor, (int, float)) or not 1 <= factor < float("inf"):
                raise ValueError(
                    f"slowdown of block {block} must be at least 1, a block that is {factor!r} times as slow would be "
                    "faster than the others; slow the others down instead."
                )
        self.buffer_size = buffer_size
        self.max_reuse = max_reuse
        self.slowdown = dict(slowdown or {})
        self.max_lead = 4 * buffer_size if max_lead is None else max_lead
        self.epochs_per_block = epochs_per_block
        self._num_warm_up = 0
        self._weights: list[float] = []
        self._generator: torch.Generator | None = None

    @override
    def is_finished(self, block: int, epoch: int, updates: int, batches_per_epoch: float) -> bool:
        return self.epochs_per_block is not None and updates >= self.epochs_per_block * batches_per_epoch

    @override
    def new_buffer(self) -> ReplayBuffer:
        return ReplayBuffer(self.buffer_size, self.max_reuse)

    @override
    def may_read(self, lead: int, is_exhausted: bool) -> bool:
        # The stage before this one may already wait for it at the next place where all ranks meet. So a stage that is
        # not ahead never waits for another batch, even if those that it has are used up: it skips the step.
        return lead <= self.max_lead and (lead <= 0 or not is_exhausted)

    @override
    def start(self, blocks: range, num_blocks: int, seed: int) -> None:
        unknown = [block for block in self.slowdown if block not in range(num_blocks)]
        if unknown:
            raise ValueError(
                f"slowdown is given for block {unknown[0]!r}, but there are blocks 0 to {num_blocks - 1} only."
            )
        self.draws_blocks = self.counts_own_epochs = len(blocks) == num_blocks
        if self.slowdown and not self.draws_blocks:
            raise ValueError(
                f"slowdown={self.slowdown} simulates slow blocks in one process; on several ranks their real speeds "
                "decide. Leave it out, or train with devices=1."
            )
        self._num_warm_up = 2
        self._weights = [1 / self.slowdown.get(j, 1) for j in range(num_blocks)]
        self._generator = torch.Generator().manual_seed(seed % 2**63)

    @override
    def turns(self, blocks: range, epoch: int) -> Iterator[int]:
        if not self.draws_blocks:
            yield from blocks
        elif self._num_warm_up > 0:
            self._num_warm_up -= 1
            yield from blocks
        else:
            yield blocks[0]
            while (block := self.next_block()) != 0:
                yield block

    def next_block(self) -> int:
        """Return the block whose turn is next, in one process; override it for another order than a random one."""
        return int(torch.multinomial(torch.tensor(self._weights, device="cpu"), 1, generator=self._generator))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._generator is None else {"generator": self._generator.get_state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._generator is not None and "generator" in state_dict:
            self._generator.set_state(state_dict["generator"])


class Sequential(Schedule):
    """Greedy training one block after another, the baseline that decoupled training is compared with.

    Block 0 trains for ``epochs_per_block`` epochs; then it is frozen, its BatchNorm in eval mode, and block 1 trains on
    its output; and so on. ``Trainer(max_epochs=...)`` counts the epochs of all blocks together; training ends when the
    last block has had its own. Each block's learning-rate scheduler starts with its first epoch. ``val/loss`` and
    ``val/acc`` are the last block's, which stays as it was initialised until its turn: callbacks that stop or choose by
    them do so too early.

    Args:
        epochs_per_block: None shares ``max_epochs`` equally among the blocks.

    Raises:
        ValueError: when training starts, if ``max_epochs`` does not leave as many for each block, or there are several
            ranks: all but one of them would idle.
    """

    counts_own_epochs = True

    def __init__(self, epochs_per_block: int | None = None) -> None:
        if epochs_per_block is not None:
            check_at_least("epochs_per_block", epochs_per_block, 1)
        self.epochs_per_block = epochs_per_block
        self._epochs_each = 1
        self._num_blocks = 1

    @override
    def num_epochs(self, max_epochs: int | None, num_blocks: int) -> int | None:
        limit = None if max_epochs == -1 else max_epochs
        if self.epochs_per_block is not None:
            self._epochs_each = self.epochs_per_block
        elif limit is not None and limit % num_blocks == 0:
            self._epochs_each = limit // num_blocks
        else:
            raise ValueError(
                f"max_epochs={max_epochs} cannot be shared equally among {num_blocks} blocks. Pass a multiple of "
                f"{num_blocks}, or DGLStrategy(Sequential(epochs_per_block=...))."
            )
        needed = self._epochs_each * num_blocks
        if limit is not None and limit < needed:
            raise ValueError(
                f"max_epochs={max_epochs} is too few for {num_blocks} blocks × {self._epochs_each} epochs_per_block. "
                f"Pass Trainer(max_epochs={needed}), or -1."
            )
        self._num_blocks = num_blocks
        return needed

    @override
    def only_block(self, epoch: int) -> int:
        return min(epoch // self._epochs_each, self._num_blocks - 1)

    @override
    def turns(self, blocks: range, epoch: int) -> Iterator[int]:
        yield from blocks[: self.only_block(epoch) + 1]

    @override
    def is_finished(self, block: int, epoch: int, updates: int, batches_per_epoch: float) -> bool:
        return block < self.only_block(epoch)


SCHEDULES: dict[str, type[Schedule]] = {"sync": Synchronous, "async": Asynchronous, "sequential": Sequential}


def make_schedule(schedule: str | Schedule) -> Schedule:
    """Return the schedule that ``schedule`` names or is.

    Raises:
        ValueError: if there is no schedule of that name.
        TypeError: if it is neither a name nor a schedule.
    """
    known = ", ".join(map(repr, SCHEDULES))
    if not isinstance(schedule, str):
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be one of {known}, or a Schedule, got {type(schedule).__name__}.")
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {known}, or a Schedule, got {schedule!r}.")
    return SCHEDULES[schedule]()
