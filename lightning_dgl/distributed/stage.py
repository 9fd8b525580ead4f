"""A stage: the consecutive blocks that one rank trains, and what it exchanges with the other ranks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torchmetrics import Metric
from typing_extensions import override

from lightning_dgl.codecs import Message
from lightning_dgl.distributed.groups import Groups
from lightning_dgl.distributed.link import Address, Inbox, Outbox, Replay, ReplayInbox, StageBatch
from lightning_dgl.distributed.watchdog import Watchdog

T = TypeVar("T")


class AGREED:
    """In place of a process group: what is logged is the same on every rank already, and needs no reduction."""


class Report(NamedTuple):
    """Training values that a later stage has measured, for the loggers of rank 0."""

    step: int
    values: dict[str, float]


class Stage:
    """All blocks in one process, or in each of Lightning's data-parallel ones: there is nothing to exchange."""

    is_first = is_last = True
    outbox: Outbox | None = None
    is_split = False
    """Whether other ranks train other blocks, so that this one's copy of the whole network is out of date."""

    def __init__(self, blocks: range) -> None:
        self.blocks = blocks

    @property
    def is_replicated(self) -> bool:
        """Whether other ranks train the same blocks, and average their gradients."""
        return dist.is_available() and dist.is_initialized()

    def ranks_of_blocks(self) -> list[list[int]]:
        """The ranks that train each block; an empty list where that is the only one, or every one."""
        return []

    def hand_on(self, address: Address, tensors: Sequence[Tensor | Message]) -> None:
        """Send what this stage makes of a batch to the next stage."""

    def merge(self, values: Mapping[T, Any]) -> dict[T, Any]:
        """The entries of all stages, on every rank; all ranks must call it."""
        return dict(values)

    def agree(self, value: T, src: int = 0) -> T:
        """The value of rank ``src``, on every rank; all ranks must call it."""
        return value

    def report(self, report: Report) -> None:
        """Send training values to rank 0, without waiting."""

    def reports(self) -> Iterator[Report]:
        """On rank 0: the reports that have arrived since the last call."""
        return iter(())

    def synchronise(self, metrics: nn.Module) -> None:
        """Let each metric in ``metrics`` count what the ranks that hold the same blocks have seen, and no others."""

    @property
    def log_options(self) -> dict[str, Any]:
        """How Lightning is to log values at the end of an epoch."""
        # Metrics have agreed across ranks already; sync_dist only tells Lightning so.
        return {"sync_dist": dist.is_available() and dist.is_initialized()}

    def close(self) -> None:
        """Take leave of the other ranks."""


class DistributedStage(Stage):
    """One rank's blocks, where there are several ranks.

    Args:
        assignment: the blocks of each stage.
        groups: the ranks, and how they talk to each other.
        device: this rank's device.
        prefetch: how many batches to receive ahead.
        replay: how to train asynchronously; None: every stage trains on every batch, as it comes.
        store: a connection to the process group's store, used by nobody else.
        watchdog: through which to wait for other ranks.
    """

    def __init__(
        self,
        assignment: Sequence[range],
        groups: Groups,
        device: torch.device,
        prefetch: int,
        replay: Replay | None,
        store: Store,
        watchdog: Watchdog,
    ) -> None:
        topology = groups.topology
        super().__init__(assignment[topology.stage])
        self.assignment = assignment
        self.groups = groups
        self.topology = topology
        self.is_first, self.is_last = topology.previous is None, topology.next is None
        self.is_split = topology.num_stages > 1
        self.watchdog = watchdog
        self.inbox: Inbox | None = None
        self._is_asynchronous = replay is not None
        self._store = store
        self._num_sent = 0
        self._num_received = [0] * topology.num_stages
        if topology.previous is not None:
            group = groups.links[topology.previous, topology.rank]
            link = (group, topology.previous, device, prefetch, watchdog)
            if replay is None or replay.buffer is None:
                self.inbox = Inbox(*link)
            else:
                self.inbox = ReplayInbox(*link, buffer=replay.buffer, max_lead=replay.max_lead)
        if topology.next is not None:
            self.outbox = Outbox(groups.links[topology.rank, topology.next], topology.next, device, 1, watchdog)

    @property
    @override
    def is_replicated(self) -> bool:
        return self.topology.num_replicas > 1

    @override
    def ranks_of_blocks(self) -> list[list[int]]:
        columns = self.groups.mesh.mesh.T.tolist()
        return [columns[stage] for stage, blocks in enumerate(self.assignment) for _ in blocks]

    @override
    def hand_on(self, address: Address, tensors: Sequence[Tensor | Message]) -> None:
        if self.outbox is not None:
            if self._is_asynchronous and address.phase == RunningStage.TRAINING.value:
                self.outbox.offer(address, tensors)
            else:
                self.outbox.put(address, tensors)

    def next_batch(self, address: Address | None) -> StageBatch:
        """What the previous stage sends next; or, with the address of a training batch, what to train on there."""
        assert self.inbox is not None
        if isinstance(self.inbox, ReplayInbox) and address is not None:
            return self.inbox.replay(address)
        return self.inbox.get()

    # Objects

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        everyone: list[Any] = [None] * self.topology.num_ranks
        with self.watchdog.collective("to exchange values"):
            dist.all_gather_object(everyone, value, self.groups.everyone)
        return everyone

    def gather_on_rank_0(self, value: T) -> list[T] | None:
        """Every rank's value, on rank 0; None on the others."""
        everyone: list[Any] | None = [None] * self.topology.num_ranks if self.topology.rank == 0 else None
        with self.watchdog.collective("to gather values on rank 0"):
            dist.gather_object(value, everyone, group=self.groups.everyone)
        return everyone

    @override
    def merge(self, values: Mapping[T, Any]) -> dict[T, Any]:
        return _merged(self.gather(values)[: self.topology.num_stages])

    def merge_on_rank_0(self, values: Mapping[T, Any]) -> dict[T, Any]:
        """As :meth:`merge`, on rank 0; elsewhere ``values``."""
        everyone = self.gather_on_rank_0(values)
        return dict(values) if everyone is None else _merged(everyone[: self.topology.num_stages])

    @override
    def agree(self, value: T, src: int = 0) -> T:
        values = [value]
        with self.watchdog.collective(f"to learn what rank {src} has"):
            dist.broadcast_object_list(values, src, self.groups.everyone)
        return values[0]

    def from_last_stage(self, value: T) -> T:
        """The value of this replica's last stage, on every stage of the replica."""
        values = [value]
        with self.watchdog.collective("to learn what the last stage has"):
            dist.broadcast_object_list(values, group=self.groups.block, group_src=self.topology.num_stages - 1)
        return values[0]

    def meet(self, what: str) -> None:
        """Wait until all ranks are here; ``what`` they meet for."""
        with self.watchdog.collective(what):
            dist.all_reduce(torch.zeros(1), group=self.groups.everyone)  # not barrier(), which waits for NCCL, too

    # Weights

    def broadcast(self, tensors: Iterable[Tensor], src: int) -> None:
        """Overwrite ``tensors``, on every rank, with those of rank ``src``."""
        tensors = [tensor.detach() for tensor in tensors]
        is_source = self.topology.rank == src
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        with self.watchdog.collective(f"to copy weights from rank {src}"), torch.no_grad():
            # Bytes, in the host's memory: whatever the dtypes and devices, and however little the device can hold.
            if is_source:
                flat = torch.cat([tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])
            else:
                flat = torch.empty(sum(sizes), dtype=torch.uint8)
            dist.broadcast(flat, src, self.groups.everyone)
            if not is_source:
                for tensor, part in zip(tensors, torch.split(flat, sizes), strict=True):
                    tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))

    # Training values

    @override
    def report(self, report: Report) -> None:
        if self.topology.replica == 0:
            self._store.set(self._report_key(self.topology.stage, self._num_sent), json.dumps(report))
            self._num_sent += 1

    @override
    def reports(self) -> Iterator[Report]:
        if self.topology.rank == 0:
            for stage in range(1, self.topology.num_stages):
                while self._store.check([key := self._report_key(stage, self._num_received[stage])]):
                    yield Report(*json.loads(self._store.get(key)))
                    self._store.delete_key(key)
                    self._num_received[stage] += 1

    @staticmethod
    def _report_key(stage: int, number: int) -> str:
        return f"lightning_dgl/report/{stage}/{number}"

    # Metrics

    @override
    def synchronise(self, metrics: nn.Module) -> None:
        for metric in metrics.modules():
            if isinstance(metric, Metric):
                if self.topology.num_replicas > 1:
                    metric.process_group = self.groups.data
                else:
                    metric.distributed_available_fn = _not_distributed

    @property
    @override
    def log_options(self) -> dict[str, Any]:
        return {"sync_dist": True, "sync_dist_group": AGREED}

    # The end

    @override
    def close(self) -> None:
        """Let the links run dry, and meet the other ranks; exchanging objects works still."""
        if self.watchdog.is_stopped:
            return
        if self.outbox is not None:
            self.outbox.close()
        if self.inbox is not None:
            self.inbox.close()
        self.meet("to finish")
        self.watchdog.stop()
        self.is_split = False

    def abandon(self) -> None:
        """Leave the other ranks after a failure; a rank that has nothing to say about it ends here."""
        self.watchdog.await_others()
        if self.watchdog.is_silent:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        self.watchdog.stop()
        for end in (self.inbox, self.outbox):
            if end is not None:
                end.abandon()


def _merged(parts: Iterable[Mapping[T, Any]]) -> dict[T, Any]:
    return {key: value for part in parts for key, value in part.items()}


def _not_distributed() -> bool:
    return False
