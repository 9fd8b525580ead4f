"""Where ranks stand in the grid of replicas × stages, which groups they form, and which blocks they get."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_dgl.distributed import Groups, Topology, blocks_in_words
from lightning_dgl.splitting import assign_blocks


def test_neighbouring_stages_have_neighbouring_ranks() -> None:
    grid = [Topology(rank, num_replicas=2, num_stages=3) for rank in range(6)]
    assert [(own.replica, own.stage) for own in grid] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [own.previous for own in grid] == [None, 0, 1, None, 3, 4]
    assert [own.next for own in grid] == [1, 2, None, 4, 5, None]
    assert grid[0].wires == [(0, 1), (1, 2), (3, 4), (4, 5)]
    assert {own.num_ranks for own in grid} == {6}


@given(st.integers(1, 4), st.integers(1, 4))
def test_every_wire_joins_a_rank_and_its_next(num_replicas: int, num_stages: int) -> None:
    grid = [Topology(rank, num_replicas, num_stages) for rank in range(num_replicas * num_stages)]
    ends = [(own.rank, own.next) for own in grid if own.next is not None]
    assert ends == grid[0].wires
    assert all(grid[receiver].previous == sender for sender, receiver in ends)


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize(
    ("device", "backend", "bound"),
    [("cpu", "gloo", None), ("cuda:1", "gloo", None), ("cuda:1", "cpu:gloo,cuda:nccl", "cuda:1")],
)
def test_all_ranks_make_the_same_groups_in_the_same_order_and_only_wires_connect_at_once(
    rank: int, device: str, backend: str, bound: str | None
) -> None:
    made: list[tuple[int, ...]] = []
    connected: list[tuple[tuple[int, ...], str]] = []

    def new_group(ranks: list[int], *, backend: str, timeout: timedelta, device_id: Any = None) -> object:
        made.append(tuple(ranks))
        if device_id is not None:
            connected.append((tuple(ranks), str(device_id)))
        return mock.Mock(spec=dist.ProcessGroup) if rank in ranks else object()

    with (
        mock.patch.object(dist, "get_rank", return_value=rank),
        mock.patch.object(dist, "new_group", new_group),
        mock.patch("lightning_dgl.distributed.topology.DeviceMesh"),
    ):
        groups = Groups.make(4, 2, torch.device(device), backend, timedelta(seconds=1))
    assert made == [(0, 1, 2, 3), (0, 2), (1, 3), (0, 1), (2, 3), (0, 1), (2, 3)]
    assert list(groups.wires) == [(0, 1) if rank < 2 else (2, 3)]
    assert connected == ([] if bound is None else [((0, 1), bound), ((2, 3), bound)])


@pytest.mark.parametrize("rank", [0, 27, 63])
def test_a_rank_belongs_to_few_of_many_groups(rank: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=64)
    try:
        groups = Groups.make(64, 8, torch.device("cpu"), "fake", timedelta(seconds=1))
        sizes = [group.size() for group in (groups.everyone, groups.data, groups.block, *groups.wires.values())]
        assert sizes == [64, 8, 8] + [2] * (1 if rank in (0, 63) else 2)
        # Else every rank would have to join whenever some ranks make a group.
        assert dist.distributed_c10d._get_default_group().bound_device_id is None
    finally:
        dist.destroy_process_group()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.data())
def test_no_other_assignment_has_a_cheaper_most_expensive_stage(costs: list[int], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    stages = assign_blocks(costs, num_stages)
    assert [j for stage in stages for j in stage] == list(range(len(costs)))
    assert len(stages) == num_stages and all(stages)

    def least(start: int, left: int) -> int:
        if left == 1:
            return sum(costs[start:])
        ends = range(start + 1, len(costs) - left + 2)
        return min(max(sum(costs[start:end]), least(end, left - 1)) for end in ends)

    assert max(sum(costs[j] for j in stage) for stage in stages) == least(0, num_stages)


def test_blocks_in_words() -> None:
    assert [blocks_in_words(blocks) for blocks in (range(2, 3), range(2, 5))] == ["block 2", "blocks 2 to 4"]
