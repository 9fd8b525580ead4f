"""The process groups: of all ranks, of each row and column of the grid, and of each link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_dgl.distributed.topology import Topology

# Links wait for as long as their stages do, which the watchdog limits; a gloo link that has timed out is lost.
_FOR_EVER = timedelta(days=365)


@dataclass(frozen=True)
class Groups:
    """A rank's place, and the process groups that it belongs to.

    Attributes:
        topology: where this rank stands.
        mesh: all ranks, with dimensions "data" (replicas) and "block" (stages).
        everyone: all ranks.
        links: for each link that this rank has an end of, by (sender, receiver), a group of these two.
    """

    topology: Topology
    mesh: DeviceMesh
    everyone: dist.ProcessGroup
    links: dict[tuple[int, int], dist.ProcessGroup]

    @classmethod
    def make(cls, num_ranks: int, num_replicas: int, device_type: str, backend: str, timeout: timedelta) -> Groups:
        """Make all groups; all ranks must call it, at the same point of the program."""
        topology = Topology(dist.get_rank(), num_replicas, num_ranks // num_replicas)
        grid = torch.arange(num_ranks).view(num_replicas, topology.num_stages)

        def make(ranks: Sequence[int], timeout: timedelta = timeout) -> list[dist.ProcessGroup]:
            group = dist.new_group(list(ranks), timeout=timeout, backend=backend)
            return [group] if isinstance(group, dist.ProcessGroup) else []  # else this rank is not in it

        (everyone,) = make(range(num_ranks))
        (data,) = [group for column in grid.T.tolist() for group in make(column)]
        (block,) = [group for row in grid.tolist() for group in make(row)]
        mesh = DeviceMesh.from_group([data, block], device_type, grid, mesh_dim_names=("data", "block"))
        links = {ends: group for ends in topology.links for group in make(ends, _FOR_EVER)}
        return cls(topology, mesh, everyone, links)

    @property
    def data(self) -> dist.ProcessGroup:
        """The ranks that hold the same blocks as this one."""
        return self.mesh["data"].get_group()

    @property
    def block(self) -> dist.ProcessGroup:
        """The ranks of this one's replica, first stage first."""
        return self.mesh["block"].get_group()
