"""Which rank holds which blocks, of which replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from lightning_dgl.splitting import balanced_cuts


@dataclass(frozen=True)
class Topology:
    """Where a rank stands in the grid of data replicas × stages.

    Neighbouring stages have neighbouring ranks, so that activations stay on a node wherever they can::

        replica 0:   rank 0 (stage 0) -> rank 1 (stage 1) -> rank 2 (stage 2)
        replica 1:   rank 3 (stage 0) -> rank 4 (stage 1) -> rank 5 (stage 2)
    """

    rank: int
    num_replicas: int
    num_stages: int

    @property
    def num_ranks(self) -> int:
        """How many ranks there are in all."""
        return self.num_replicas * self.num_stages

    @property
    def replica(self) -> int:
        """Which of the data replicas this rank belongs to."""
        return self.rank // self.num_stages

    @property
    def stage(self) -> int:
        """Which of the stages this rank holds."""
        return self.rank % self.num_stages

    @property
    def previous(self) -> int | None:
        """The rank that sends to this one; None for a first stage, which reads the data."""
        return self.rank - 1 if self.stage > 0 else None

    @property
    def next(self) -> int | None:
        """The rank that this one sends to; None for a last stage."""
        return self.rank + 1 if self.stage < self.num_stages - 1 else None

    @property
    def links(self) -> list[tuple[int, int]]:
        """Every pair of ranks (sender, receiver), in the same order on every rank."""
        starts = range(0, self.num_ranks, self.num_stages)
        return [(start + s, start + s + 1) for start in starts for s in range(self.num_stages - 1)]


def assign_blocks(costs: Sequence[float], num_stages: int) -> list[range]:
    """Deal consecutive blocks to stages, so that the most expensive stage costs least.

    Args:
        costs: cost of each block, heads counted in.
        num_stages: at most as many as there are blocks.

    Example::

        >>> assign_blocks([1, 1, 1, 3], num_stages=2)
        [range(0, 3), range(3, 4)]
    """
    num_cuts = len(costs) - 1
    cuts = balanced_cuts([0] * num_cuts, list(accumulate(costs)), [0.0] * num_cuts, num_stages)
    ends = [cut + 1 for cut in cuts] + [len(costs)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def blocks_in_words(blocks: range) -> str:
    """How messages speak of consecutive blocks: "block 2", or "blocks 2 to 4"."""
    return f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}"
