"""A stage: the consecutive blocks that one rank trains, and what the rank exchanges with the others."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from lightning_dgl.distributed import exits
from lightning_dgl.distributed.topology import Groups
from lightning_dgl.distributed.watchdog import Watchdog

T = TypeVar("T")


class AGREED:
    """Stands in for a process group where a logged value is the same on every rank already and needs no reduction."""


class Report(NamedTuple):
    """Training values that a later stage has measured, for the loggers of rank 0."""

    step: int
    values: dict[str, float]


class Stage:
    """A stage with no other ranks to talk to: all blocks in one process, or in each of Lightning's DDP processes.

    Whatever ranks do together returns here what one rank alone would get.

    Attributes:
        blocks: the blocks of this rank.
        is_first: whether it reads the data.
        is_last: whether it holds the last block.
        is_split: whether other ranks train other blocks, so that this one's copy of those is out of date.
        is_open: whether other ranks can still be reached.
    """

    is_first = is_last = True
    is_split = False
    is_open = False

    def __init__(self, blocks: range) -> None:
        self.blocks = blocks

    @property
    def is_replicated(self) -> bool:
        """Whether other ranks train the same blocks and average their gradients."""
        return dist.is_available() and dist.is_initialized()

    @property
    def assignment(self) -> Sequence[range]:
        """The blocks of each stage."""
        return [self.blocks]

    def ranks_of_blocks(self) -> list[list[int]]:
        """Return the ranks that train each block; an empty list where one rank, or every rank, trains all."""
        return []

    # Collectives: all ranks must call them, in the same order

    def collective(self, what: str) -> AbstractContextManager[None]:
        """Enter a context in which ranks meet ``what`` for; a failure to meet raises the failure behind it."""
        return nullcontext()

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, on every rank."""
        return [value]

    def merge(self, values: Mapping[T, Any]) -> dict[T, Any]:
        """Return the entries of all stages, on every rank."""
        return dict(values)

    def merge_on_rank_0(self, values: Mapping[T, Any]) -> dict[T, Any]:
        """Like :meth:`merge` on rank 0; return ``values`` elsewhere."""
        return dict(values)

    def agree(self, value: T, src: int = 0) -> T:
        """Return the value of rank ``src``, on every rank."""
        return value

    def from_last_stage(self, value: T) -> T:
        """Return the value of this replica's last stage, on every stage of the replica."""
        return value

    def meet(self, what: str) -> None:
        """Wait until all ranks are here; ``what`` they meet for."""

    def wait_for_device(self, device: torch.device, what: str) -> None:
        """Wait for what ``device`` does in common with those of other ranks, ``what`` they meet for."""

    def broadcast(self, tensors: Iterable[Tensor], src: int) -> None:
        """Overwrite ``tensors``, on every rank, with those of rank ``src``."""

    # Training values and metrics

    def report(self, report: Report) -> None:
        """Send training values to rank 0, without waiting."""

    def reports(self, before: float = float("inf")) -> Iterator[Report]:
        """Yield, on rank 0, the reports of steps ``before`` this one that have arrived and were not yielded yet."""
        return iter(())

    def synchronise(self, metrics: nn.Module) -> None:
        """Let each metric in ``metrics`` count what the ranks that hold the same blocks have seen, and no others."""

    @property
    def log_options(self) -> dict[str, Any]:
        """Arguments of ``log`` for values at the end of an epoch."""
        # Metrics have agreed across ranks already; sync_dist only tells Lightning so.
        return {"sync_dist": dist.is_available() and dist.is_initialized()}

    def log_options_of_step(self, reduces: bool) -> dict[str, Any]:
        """Arguments of ``log`` for values of this rank's blocks, which replicas may reduce."""
        return {"sync_dist": reduces}

    # The end

    def close(self) -> None:
        """Wait for all ranks and end the watch over them. Collectives still work afterwards."""

    def fail(self, error: BaseException) -> BaseException | None:
        """Tell the other ranks that this one fails; return the failure that ended the run, if ranks know of one."""
        return None

    def abandon(self) -> None:
        """Leave the other ranks after a failure; a rank that has nothing to say about it ends here."""


class DistributedStage(Stage):
    """A stage with other ranks to talk to.

    Args:
        assignment: the blocks of each stage.
        groups: the ranks, and how they talk to each other.
        store: a connection to the process group's store that nobody else uses.
        watchdog: through which to wait for other ranks.
    """

    is_open = True
    assignment: Sequence[range] = ()

    def __init__(self, assignment: Sequence[range], groups: Groups, store: Store, watchdog: Watchdog) -> None:
        topology = groups.topology
        super().__init__(assignment[topology.stage])
        self.assignment = assignment
        self.groups = groups
        self.topology = topology
        self.is_first, self.is_last = topology.previous is None, topology.next is None
        self.is_split = topology.num_stages > 1
        self.watchdog = watchdog
        self._store = store
        self._num_sent = 0
        self._num_received = [0] * topology.num_stages

    @property
    @override
    def is_replicated(self) -> bool:
        return self.topology.num_replicas > 1

    @override
    def ranks_of_blocks(self) -> list[list[int]]:
        columns = self.groups.mesh.mesh.T.tolist()
        return [columns[stage] for stage, blocks in enumerate(self.assignment) for _ in blocks]

    # Collectives

    @override
    def collective(self, what: str) -> AbstractContextManager[None]:
        return self.watchdog.collective(what)

    @override
    def gather(self, value: T) -> list[T]:
        everyone: list[Any] = [None] * self.topology.num_ranks
        with self.collective("to exchange values"):
            dist.all_gather_object(everyone, _on_host(value), self.groups.everyone)
        return everyone

    @override
    def merge(self, values: Mapping[T, Any]) -> dict[T, Any]:
        return _merged(self.gather(values)[: self.topology.num_stages])

    @override
    def merge_on_rank_0(self, values: Mapping[T, Any]) -> dict[T, Any]:
        everyone: list[Any] | None = [None] * self.topology.num_ranks if self.topology.rank == 0 else None
        with self.collective("to gather values on rank 0"):
            dist.gather_object(_on_host(values), everyone, group=self.groups.everyone)
        return dict(values) if everyone is None else _merged(everyone[: self.topology.num_stages])

    @override
    def agree(self, value: T, src: int = 0) -> T:
        values = [_on_host(value)]
        with self.collective(f"to learn what rank {src} has"):
            dist.broadcast_object_list(values, src, self.groups.everyone)
        return values[0]

    @override
    def from_last_stage(self, value: T) -> T:
        values = [_on_host(value)]
        with self.collective("to learn what the last stage has"):
            dist.broadcast_object_list(values, group=self.groups.block, group_src=self.topology.num_stages - 1)
        return values[0]

    @override
    def meet(self, what: str) -> None:
        with self.collective(what):
            # not barrier(), which may wait for NCCL
            dist.all_reduce(torch.zeros(1, device="cpu"), group=self.groups.everyone)

    @override
    def wait_for_device(self, device: torch.device, what: str) -> None:
        self.watchdog.wait_for_device(device, what)

    @override
    def broadcast(self, tensors: Iterable[Tensor], src: int) -> None:
        tensors = [tensor.detach() for tensor in tensors]
        is_source = self.topology.rank == src
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        with self.collective(f"to copy weights from rank {src}"), torch.no_grad():
            # Bytes, in the host's memory: whatever the dtypes and devices, and however little the device can hold.
            if is_source:
                flat = torch.cat([tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])
            else:
                flat = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
            dist.broadcast(flat, src, self.groups.everyone)
            if not is_source:
                for tensor, part in zip(tensors, torch.split(flat, sizes), strict=True):
                    tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))

    # Training values and metrics

    @override
    def report(self, report: Report) -> None:
        if self.topology.replica == 0:
            self._store.set(self._report_key(self.topology.stage, self._num_sent), json.dumps(report))
            self._num_sent += 1

    @override
    def reports(self, before: float = float("inf")) -> Iterator[Report]:
        if self.topology.rank == 0:
            for stage in range(1, self.topology.num_stages):
                while self._store.check([key := self._report_key(stage, self._num_received[stage])]):
                    report = Report(*json.loads(self._store.get(key)))
                    if report.step >= before:
                        break
                    yield report
                    self._store.delete_key(key)
                    self._num_received[stage] += 1

    @staticmethod
    def _report_key(stage: int, number: int) -> str:
        return f"lightning_dgl/report/{stage}/{number}"

    @override
    def synchronise(self, metrics: nn.Module) -> None:
        for metric in metrics.modules():
            if isinstance(metric, Metric):
                if self.topology.num_replicas > 1:
                    metric.process_group = self.groups.data
                    metric.dist_sync_fn = self._gather_metric
                else:
                    metric.distributed_available_fn = _not_distributed

    def _gather_metric(self, value: Tensor, group: Any) -> list[Tensor]:
        with self.collective("to put metrics together"):
            return gather_all_tensors(value, group)

    @property
    @override
    def log_options(self) -> dict[str, Any]:
        return {"sync_dist": True, "sync_dist_group": AGREED}

    @override
    def log_options_of_step(self, reduces: bool) -> dict[str, Any]:
        return {"sync_dist": reduces, "sync_dist_group": self.groups.data} if self.is_replicated else self.log_options

    # The end

    @override
    def close(self) -> None:
        if not self.is_open:
            return
        self.meet("to finish")
        self.watchdog.stop()
        exits.after_success()
        self.is_split = self.is_open = False

    @override
    def fail(self, error: BaseException) -> BaseException | None:
        self.watchdog.report(error)
        return self.watchdog.failure

    @override
    def abandon(self) -> None:
        self.watchdog.await_others()
        if self.watchdog.is_silent:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        self.watchdog.stop()
        exits.after_failure()
        self.is_split = self.is_open = False


def _on_host(value: Any) -> Any:
    """Return ``value`` with all tensors on the CPU: from elsewhere they would arrive on the sender's device."""
    return apply_to_collection(value, Tensor, Tensor.cpu)


def _merged(parts: Iterable[Mapping[T, Any]]) -> dict[T, Any]:
    return {key: value for part in parts for key, value in part.items()}


def _not_distributed() -> bool:
    return False
