"""Connect ranks: the process group of all of them, and the wires of one to its neighbours."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from lightning_dgl.distributed.stage import DistributedStage
from lightning_dgl.distributed.wire import Inbox, Outbox, ReplayInbox
from lightning_dgl.lightning_internals import init_process_group
from lightning_dgl.replay import ReplayBuffer


def init_ranks(environment: ClusterEnvironment, device: torch.device, backend: str | None, timeout: timedelta) -> str:
    """Make the process group of all ranks; return the backend.

    Args:
        environment: tells which rank this is, and where rank 0 listens.
        device: of this rank.
        backend: of torch.distributed; by default gloo on a CPU, and NCCL with gloo for the host's memory on CUDA.
        timeout: how long a rank may keep the others waiting; when they start, at least torch's default.

    Raises:
        ValueError: if ranks cannot be on such a device.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"Several ranks train on CPUs or CUDA devices, but Trainer(accelerator={device.type!r}). Pass "
            "accelerator='cpu', or devices=1 and num_nodes=1."
        )
    if device.type == "cuda":
        # When a peer dies, NCCL's own watch would end this process before it can tell the user which rank has died.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        # It warns that sends are serialized within a group, but nothing else goes through the group of a wire.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    backend = backend or ("gloo" if device.type == "cpu" else "nccl")
    if backend != "gloo" and ":" not in backend:  # ranks also exchange what is in the host's memory
        backend = f"cpu:gloo,{device.type}:{backend}"
    # A rank may take longer to start than it may keep others waiting afterwards.
    options: dict[str, Any] = {"timeout": max(timeout, default_pg_timeout)}
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        # torchrun restarts ranks with the same store, where those of the last attempt have left their addresses.
        rank, num_ranks = environment.global_rank(), environment.world_size()
        store, _, _ = next(rendezvous("env://", rank, num_ranks, timeout=options["timeout"]))
        options["store"] = PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    init_process_group(environment, backend, **options)
    return backend


def exchange(value: Any) -> list[Any]:
    """Return every rank's value, on every rank, before there is a watchdog."""
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, value)
    return everyones


class Ends(TypedDict):
    """The ends of wires that a rank has."""

    inbox: Inbox | None
    outbox: Outbox | None


def open_wires(
    stage: DistributedStage,
    device: torch.device,
    prefetch: int,
    buffer: ReplayBuffer | None,
    may_read: Callable[[int, bool], bool],
) -> Ends:
    """Open the wires to the ranks of the previous and the next stage.

    Args:
        stage: of this rank.
        device: of this rank.
        prefetch: how many batches to receive ahead.
        buffer: where training batches go; None: to the stage, one after another.
        may_read: the pace at which a stage reads from the buffer, see :meth:`lightning_dgl.Schedule.may_read`.
    """
    topology, groups = stage.topology, stage.groups
    ends: Ends = {"inbox": None, "outbox": None}
    if topology.previous is not None:
        wire = (groups.wires[topology.previous, topology.rank], topology.previous, device, prefetch, stage.watchdog)
        if buffer is None:
            ends["inbox"] = Inbox(*wire)
        else:
            may_skip = not stage.is_replicated
            ends["inbox"] = ReplayInbox(*wire, buffer=buffer, may_read=may_read, may_skip=may_skip)
    if topology.next is not None:
        ends["outbox"] = Outbox(groups.wires[topology.rank, topology.next], topology.next, device, 1, stage.watchdog)
    return ends
