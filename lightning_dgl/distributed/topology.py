"""The grid of ranks, replicas × stages, and the process groups of its rows, columns and wires."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# A wire waits as long as its stages do, which the watchdog limits: a gloo group that has timed out is lost.
_UNLIMITED = timedelta(days=365)


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
    def wires(self) -> list[tuple[int, int]]:
        """Every pair of ranks (sender, receiver), in the same order on every rank."""
        starts = range(0, self.num_ranks, self.num_stages)
        return [(start + s, start + s + 1) for start in starts for s in range(self.num_stages - 1)]


@dataclass(frozen=True)
class Groups:
    """A rank's place, and the process groups that it belongs to.

    Attributes:
        topology: where this rank stands.
        mesh: all ranks, with dimensions "data" (replicas) and "block" (stages).
        everyone: all ranks.
        wires: for each wire that this rank has an end of, by (sender, receiver), a group of these two.
    """

    topology: Topology
    mesh: DeviceMesh
    everyone: dist.ProcessGroup
    wires: dict[tuple[int, int], dist.ProcessGroup]

    @classmethod
    def make(cls, num_ranks: int, num_replicas: int, device: torch.device, backend: str, timeout: timedelta) -> Groups:
        """Make all groups; all ranks must call it, at the same point of the program."""
        topology = Topology(dist.get_rank(), num_replicas, num_ranks // num_replicas)
        grid = torch.arange(num_ranks, device="cpu").view(num_replicas, topology.num_stages)

        def make(ranks: Sequence[int], **options: Any) -> list[dist.ProcessGroup]:
            group = dist.new_group(list(ranks), backend=backend, **{"timeout": timeout, **options})
            return [group] if isinstance(group, dist.ProcessGroup) else []  # else this rank is not in it

        (everyone,) = make(range(num_ranks))
        (data,) = [group for column in grid.T.tolist() for group in make(column)]
        (block,) = [group for row in grid.tolist() for group in make(row)]
        mesh = DeviceMesh.from_group([data, block], device.type, grid, mesh_dim_names=("data", "block"))
        # NCCL connects the ranks of a group when it is first used, if ever. Wires are always used, by threads; these
        # should not all connect at once. The default group must not be bound, or all ranks would join in every group.
        bound = device if f"{device.type}:nccl" in backend else None
        wires = {pair: group for pair in topology.wires for group in make(pair, timeout=_UNLIMITED, device_id=bound)}
        return cls(topology, mesh, everyone, wires)

    @property
    def data(self) -> dist.ProcessGroup:
        """Return the ranks that hold the same blocks as this one."""
        return self.mesh["data"].get_group()

    @property
    def block(self) -> dist.ProcessGroup:
        """Return the ranks of this one's replica, first stage first."""
        return self.mesh["block"].get_group()


def blocks_in_words(blocks: range) -> str:
    """Return the name of consecutive blocks in messages: "block 2", or "blocks 2 to 4"."""
    return f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}"
