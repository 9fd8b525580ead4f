"""The run: what a module needs to know while a Trainer runs. The strategy makes it; the module reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_dgl.address import Address
from lightning_dgl.distributed import Stage
from lightning_dgl.links import Link
from lightning_dgl.metrics import EpochMetrics
from lightning_dgl.other_blocks import OtherBlocks
from lightning_dgl.schedules import Schedule


@dataclass
class Run:
    """One call of ``Trainer.fit``, ``validate``, ``test`` or ``predict``, on one rank.

    Attributes:
        stage: the blocks of this rank, and how it talks to the other ranks.
        schedule: which block steps when.
        links: what each block reads from and sends to: block j reads from ``links[j]`` and sends to ``links[j + 1]``.
        metrics: of this rank's blocks, for each phase and data loader.
        others: the blocks of other ranks, as this one has them.
        stepped: the blocks that Lightning updates after the present training step.
        num_skipped: by block, how many batches were skipped because its loss was not finite.
        latest: the newest training values of this rank's blocks.
        unreported: the step whose logged values rank 0 has yet to be told.
        from_reports: names of values that rank 0 knows from reports.
        from_others: names of training values that other ranks have shared, until the next step.
        reductions: by name, how values that users log are reduced over ranks.
        random_state: the random state of a checkpoint, until training continues from it.
    """

    stage: Stage
    schedule: Schedule
    links: list[Link]
    metrics: EpochMetrics
    others: OtherBlocks
    stepped: list[int] = field(default_factory=list)
    num_skipped: dict[int, int] = field(default_factory=dict)
    latest: dict[str, Tensor] = field(default_factory=dict)
    unreported: int | None = None
    from_reports: set[str] = field(default_factory=set)
    from_others: set[str] = field(default_factory=set)
    reductions: dict[str, str] = field(default_factory=dict)
    random_state: dict[str, Any] | None = None

    @property
    def incoming(self) -> Link:
        """The link that this stage reads from: data, or what the previous stage sends."""
        return self.links[self.stage.blocks[0]]

    @property
    def outgoing(self) -> Link:
        """The link that this stage sends to."""
        return self.links[self.stage.blocks[-1] + 1]

    def copy_other_blocks(self, mark: Address) -> None:
        """Let this rank read the weights of all blocks; all ranks must call it, at ``mark``.

        Raises:
            RuntimeError: if the stage before this one is somewhere else.
        """
        # Ranks that have come apart would wait for each other, each in a collective of its own.
        self.incoming.await_mark(mark)
        self.outgoing.send_mark(mark)
        self.others.copy_if_hidden()

    def drain(self) -> None:
        """Wait until everything is sent and read; ranks still watch over each other afterwards."""
        self.outgoing.close()
        self.incoming.close()

    def abandon(self) -> None:
        """Leave the other ranks after a failure."""
        self.stage.abandon()
        for link in (self.incoming, self.outgoing):
            link.abandon()
