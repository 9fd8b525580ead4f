"""The strategy: places the blocks on ranks and does what Lightning asks of a Strategy, in Lightning's order."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.distributed import _init_dist_connection, _sync_ddp_if_available
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dgl.boundaries import Boundaries, make_codecs
from lightning_dgl.checks import check_at_least, check_choice
from lightning_dgl.distributed import (
    AGREED,
    DistributedStage,
    Groups,
    Replay,
    Stage,
    StageBatch,
    StageLoader,
    StatefulStageLoader,
    Watchdog,
    assign_blocks,
    blocks_in_words,
    this_process,
)
from lightning_dgl.distributed.launcher import RankLauncher
from lightning_dgl.distributed.signals import take_over
from lightning_dgl.module import DGLModule
from lightning_dgl.preconditions import check_same, check_trainer, fingerprint
from lightning_dgl.schedules import Asynchronous, Schedule, Sequential, make_schedule


class DGLStrategy(ParallelStrategy):
    """Trains a :class:`~lightning_dgl.DGLModule` by decoupled greedy learning, on one or several devices.

    With ``Trainer(devices=S)`` each rank holds a stage, one or more consecutive blocks, balanced. It trains them on
    what the rank before it sends, while that one is at work on later batches; nothing flows back. With
    ``data_parallel_size=R`` there are R such rows of stages, each on its share of the data, and the ranks that hold the
    same blocks average their gradients.

    Args:
        schedule: "sync", "async", "sequential", or a schedule such as :class:`~lightning_dgl.Asynchronous`: which block
            steps when.
        codec: None, "half", a :class:`~lightning_dgl.VectorQuantizer`, or a list with one of these for each boundary:
            what makes the output of a block smaller that the next one trains on, wherever that is.
        data_parallel_size: R, how many replicas of every stage there are; ranks = R × stages.
        prefetch: how many batches a stage may receive ahead of the one it works on.
        timeout: how long a rank may keep others waiting before the run is ended; a timedelta, or seconds.
        start_method: how Lightning starts the processes: "popen" runs the script once for each rank; "spawn", "fork"
            and "forkserver" need no script (notebooks: "fork"). Under torchrun or SLURM they are started already.
        process_group_backend: by default gloo on CPU; NCCL for CUDA tensors, gloo for everything else.
        accelerator: set by the Trainer.
        parallel_devices: set by the Trainer.
        cluster_environment: set by the Trainer.
        checkpoint_io: plugin that reads and writes checkpoints.
        precision_plugin: set by the Trainer.

    Attributes:
        stage: which blocks this rank holds, while a Trainer runs; None otherwise.
        boundaries: the codecs between blocks, and what they have made; those that follow this rank's blocks are in use.

    Raises:
        ValueError: for an argument that does not fit; the message names it, its value and the remedy.
        TypeError: if the Trainer is given a LightningModule that is not a DGLModule.
        RankFailedError: while training, if another rank fails, is killed, or hangs for longer than ``timeout``.
    """

    strategy_name = "dgl"

    def __init__(
        self,
        schedule: str | Schedule = "sync",
        *,
        codec: Any = None,
        data_parallel_size: int = 1,
        prefetch: int = 2,
        timeout: timedelta | float = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        process_group_backend: str | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.schedule = make_schedule(schedule)
        self.boundaries: Boundaries | None = None
        self._codec = codec
        make_codecs(codec, len(codec) if isinstance(codec, list) else 1)  # to refuse what it cannot be now
        for name, value in (("data_parallel_size", data_parallel_size), ("prefetch", prefetch)):
            check_at_least(name, value, 1)
        check_choice("start_method", start_method, ("popen", "spawn", "fork", "forkserver"))
        self._timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        if self._timeout <= timedelta(0):
            raise ValueError(f"timeout must be positive, got {timeout!r}.")
        self.data_parallel_size = data_parallel_size
        self.num_nodes = 1  # set by the Trainer
        self.stage: Stage | None = None
        self._prefetch = prefetch
        self._start_method = start_method
        self._process_group_backend = process_group_backend
        self._groups: Groups | None = None
        self._predictions: list[tuple[int, Any]] = []

    # Ranks

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """How many ranks there are on each node."""
        return len(self.parallel_devices or [])

    @property
    def _num_ranks(self) -> int:
        return self.num_processes * self.num_nodes

    @property
    def _num_stages(self) -> int:
        return self._num_ranks // self.data_parallel_size

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning is to deal the data to replicas."""
        return self.data_parallel_size > 1

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_parallel_size, "rank": self.global_rank // self._num_stages}

    @override
    def _configure_launcher(self) -> None:
        if self._num_ranks % self.data_parallel_size:
            raise ValueError(
                f"devices × num_nodes ({self.num_processes} × {self.num_nodes}) must be a multiple of "
                f"data_parallel_size={self.data_parallel_size}: every replica has the same number of stages."
            )
        if self._num_ranks == 1:
            return
        if isinstance(self.schedule, Sequential):
            raise ValueError(
                f"Sequential trains one block at a time, so of {self._num_ranks} ranks all but one would idle. Pass "
                "devices=1, or schedule='sync', which trains all blocks at once."
            )
        assert self.cluster_environment is not None
        if self._start_method == "popen":
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = RankLauncher(self, self._start_method, self.fail, self._name_of_process)

    @override
    def connect(self, model: LightningModule) -> None:
        if not isinstance(model, DGLModule):
            raise TypeError(
                f"DGLStrategy trains a DGLModule, got {type(model).__name__}. Wrap the network: "
                "DGLModule(network, num_blocks=4, example_input=...)."
            )
        super().connect(model)

    @property
    def _module(self) -> DGLModule:
        assert isinstance(self.lightning_module, DGLModule)
        return self.lightning_module

    @property
    def _distributed_stage(self) -> DistributedStage | None:
        return self.stage if isinstance(self.stage, DistributedStage) else None

    # The start

    @override
    def setup_environment(self) -> None:
        if self._num_ranks == 1:
            super().setup_environment()
            self.stage = Stage(range(self._module.num_blocks))
            self._prepare_blocks(self.stage.blocks)
            return
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self._num_ranks)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]
        super().setup_environment()
        self._connect_ranks()

    def _prepare_blocks(self, blocks: range) -> None:
        self.boundaries = Boundaries(self._codec, self._module.block_names)
        self.schedule.start(blocks, self._module.num_blocks, torch.initial_seed())
        if self.schedule.draws_blocks and self.data_parallel_size > 1:
            raise ValueError(
                f"The asynchronous schedule simulates slow blocks in one process, without replicas, but "
                f"data_parallel_size={self.data_parallel_size}. Pass more devices, so that there are several stages, "
                "or data_parallel_size=1."
            )

    def _check_stages(self) -> None:
        if self._num_stages > self._module.num_blocks:
            raise ValueError(
                f"There are more stages than blocks: {self._num_ranks} ranks / data_parallel_size="
                f"{self.data_parallel_size} make {self._num_stages} stages, the module has {self._module.num_blocks} "
                f"block(s). Pass num_blocks={self._num_stages} or more to DGLModule, or fewer devices."
            )

    def _assignment(self) -> list[range]:
        """The blocks of each stage, auxiliary heads counted in."""
        module = self._module
        costs = [flops + head for flops, head in zip(module.block_flops, [*module.head_flops, 0], strict=True)]
        return assign_blocks(costs, self._num_stages)

    def _rank_names(self) -> list[str]:
        """How messages speak of each rank."""
        if self._num_stages > self._module.num_blocks:
            return [f"Rank {rank}" for rank in range(self._num_ranks)]
        stages = self._assignment() * self.data_parallel_size
        return [f"Rank {rank} ({blocks_in_words(blocks)})" for rank, blocks in enumerate(stages)]

    def _name_of_process(self, local_rank: int) -> str:
        return self._rank_names()[self.node_rank * self.num_processes + local_rank]

    def _connect_ranks(self) -> None:
        device, module = self.root_device, self._module
        backend = self._process_group_backend or ("gloo" if device.type == "cpu" else "nccl")
        if backend != "gloo" and ":" not in backend:  # what ranks tell each other is in the host's memory
            backend = f"cpu:gloo,{device.type}:{backend}"
        options: dict[str, Any] = {} if device.type == "cpu" else {"device_id": device}
        # A rank may take longer to start than it may keep others waiting afterwards.
        options["timeout"] = max(self._timeout, default_pg_timeout)
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            # torchrun restarts ranks with the same store, where those of the last attempt have left their addresses.
            store, _, _ = next(rendezvous("env://", self.global_rank, self._num_ranks, timeout=options["timeout"]))
            options["store"] = PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        assert self.cluster_environment is not None
        _init_dist_connection(self.cluster_environment, backend, **options)
        names = self._rank_names()
        mine = (fingerprint(module, self.schedule, self._codec, self.data_parallel_size), this_process())
        everyones: list[Any] = [None] * self._num_ranks
        dist.all_gather_object(everyones, mine)  # before ranks that differ make groups that differ, and hang
        check_same([fingerprint for fingerprint, _ in everyones], names)
        self._check_stages()
        assignment = self._assignment()
        schedule, blocks = self.schedule, assignment[self.global_rank % self._num_stages]
        self._prepare_blocks(blocks)
        if self._groups is None:
            self._groups = Groups.make(self._num_ranks, self.data_parallel_size, device.type, backend, self._timeout)
        store = dist.distributed_c10d._get_default_store()
        watchdog = Watchdog(
            store.clone(),
            self.global_rank,
            names,
            self._timeout.total_seconds(),
            # Only the first process of a node shows an error, unless Lightning passes on that of each.
            is_loud=self.local_rank == 0 or isinstance(self._launcher, RankLauncher),
            received_sigterm=lambda: module.trainer.received_sigterm,
            children=getattr(self._launcher, "procs", []) if self._start_method == "popen" else [],
        )
        self.stage = stage = DistributedStage(
            assignment,
            self._groups,
            device,
            self._prefetch,
            Replay(schedule.buffers.get(blocks[0]), schedule.max_lead) if isinstance(schedule, Asynchronous) else None,
            store.clone(),
            watchdog,
        )
        take_over(module.trainer)
        # Lightning takes values that are not reduced for ones that differ between ranks; ours are the same on all.
        warnings.filterwarnings("ignore", r"It is recommended to use `self\.log\('(train|val|test)/.*sync_dist=True")
        watchdog.processes = [process for _, process in everyones]
        check_trainer(module.trainer, stage.is_split, stage.is_replicated)

    @override
    def setup(self, trainer: Trainer) -> None:
        stage = self._distributed_stage
        if stage is not None:  # ranks that were not seeded, or did not all load the same weights, start from rank 0's
            parts = (self._module.network, self._module.heads)
            stage.broadcast((t for part in parts for t in (*part.parameters(), *part.buffers())), src=0)
        super().setup(trainer)

    @override
    def model_to_device(self) -> None:
        module, stage = self._module, self.stage
        if self.boundaries is not None:
            self.boundaries.to(self.root_device)
        if stage is None or not stage.is_split:
            module.to(self.root_device)
            return
        # The other blocks wait in the host's memory, as they were built.
        for child in module.children():
            if child is not module.network and child is not module.heads:
                child.to(self.root_device)
        for j in stage.blocks:
            module.blocks[j].to(self.root_device)
            if j < len(module.heads):
                module.heads[j].to(self.root_device)

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self.data_parallel_size == 1 or self._module.trainer.state.fn != TrainerFn.FITTING:
            return model
        assert self._distributed_stage is not None
        replica = _Replica(self._module, self._distributed_stage)
        if not any(p.requires_grad for p in replica.parameters()):
            return model
        device_ids = None if self.root_device.type == "cpu" else [self.root_device.index]
        assert self._groups is not None
        return DistributedDataParallel(replica, device_ids=device_ids, process_group=self._groups.data)

    # Batches

    @override
    def process_dataloader(self, dataloader: object) -> object:
        stage = self._distributed_stage
        if stage is None:
            return dataloader
        length = sized_len(dataloader)
        lengths = stage.gather(length)
        if length is None or None in lengths:
            raise ValueError(
                f"A data loader ({type(dataloader).__name__}) has no length, so the ranks cannot agree on a number of "
                "batches. Use a map-style data set, or define __len__ on the iterable one."
            )
        if len(set(lengths)) > 1:
            raise ValueError(
                f"The data loaders have different lengths, by rank: {lengths} batches. Every rank must have the same "
                "number; let Lightning deal the data to replicas (use_distributed_sampler=True)."
            )
        if stage.inbox is None:
            return dataloader
        stateful = hasattr(dataloader, "state_dict") and hasattr(dataloader, "load_state_dict")
        return (StatefulStageLoader if stateful else StageLoader)(self._next_batch, length)

    def _next_batch(self) -> StageBatch:
        stage, loop = self._distributed_stage, self._module.trainer.fit_loop
        assert stage is not None
        if not self._module.trainer.training:
            return stage.next_batch(None)
        return stage.next_batch(self._module.address(loop.epoch_loop.batch_progress.current.ready))

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, StageBatch):  # it is there
            return batch
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        if not isinstance(self.model, DistributedDataParallel):
            return super().training_step(*args, **kwargs)
        assert self._distributed_stage is not None
        collective = self._distributed_stage.watchdog.collective("to start a step with equal buffers")
        with self.precision_plugin.train_step_context(), collective:
            return self.model(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        stage = self._distributed_stage
        if stage is None or not stage.is_replicated:
            return super().backward(closure_loss, *args, **kwargs)
        with stage.watchdog.collective("to average gradients"):
            return super().backward(closure_loss, *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self.precision_plugin.val_step_context():  # not through DistributedDataParallel
            return self._module.validation_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().predict_step(*args, **kwargs)
        stage = self._distributed_stage
        loop = self._module.trainer.predict_loop
        callbacks: list[Any] = self._module.trainer.callbacks  # type: ignore[attr-defined]
        writes = any(isinstance(callback, BasePredictionWriter) for callback in callbacks)
        if stage is None or not stage.is_split or not (loop.return_predictions or writes):
            return output
        if stage.is_last:
            dataloader_idx = kwargs.get("dataloader_idx", args[2] if len(args) > 2 else 0)
            self._predictions.append((dataloader_idx, move_data_to_device(output, "cpu")))
        if not loop.batch_progress.is_last_batch:  # type: ignore[attr-defined]
            return output
        predictions, self._predictions = stage.from_last_stage(self._predictions), []
        for seen in loop._predictions:
            seen.clear()
        for dataloader_idx, scores in predictions[:-1]:
            loop._predictions[dataloader_idx].append(scores)
        return predictions[-1][1]

    # Checkpoints

    def sync_blocks(self) -> None:
        """Bring the weights of every block from the rank that trains it to all ranks; all ranks must call it."""
        stage, module = self._distributed_stage, self._module
        if stage is None or not stage.is_split:
            return
        if module.trainer.state.status == TrainerStatus.INTERRUPTED:
            raise RuntimeError(
                "No checkpoint can be saved after a failure: the blocks of other ranks are out of reach. Resume from "
                "the last one saved."
            )
        for rank, blocks in enumerate(stage.assignment):
            stage.broadcast((tensor for j in blocks for tensor in module.block_tensors(j)), src=rank)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.sync_blocks()
        return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = super().optimizer_state(optimizer)
        stage = self._distributed_stage
        if stage is not None:
            blocks: list[Any] = list(state["blocks"])
            merged = stage.merge_on_rank_0({j: move_data_to_device(blocks[j], "cpu") for j in stage.blocks})
            return {"blocks": [merged.get(j, other) for j, other in enumerate(blocks)]}  # type: ignore[dict-item]
        return state

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        stage = self.stage
        if stage is not None and stage.is_split:  # the other blocks' states are for the ranks that hold those blocks
            states = [_without_states(state, keep=stage.blocks) for state in checkpoint["optimizer_states"]]
            checkpoint = {**checkpoint, "optimizer_states": states}
        super().load_optimizer_state_dict(checkpoint)

    @override
    def on_train_end(self) -> None:
        self.sync_blocks()

    # What Lightning asks of ranks in common

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        stage = self._distributed_stage
        if stage is None or group is AGREED or not isinstance(tensor, Tensor):
            return tensor
        with stage.watchdog.collective("to reduce a value"):
            return _sync_ddp_if_available(tensor, group or stage.groups.everyone, reduce_op=reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        stage = self._distributed_stage
        if stage is None:
            return tensor
        with stage.watchdog.collective("to gather a value"):
            return super().all_gather(tensor, group or stage.groups.everyone, sync_grads)

    @override
    def barrier(self, name: str | None = None) -> None:
        stage = self._distributed_stage
        if stage is not None:
            stage.meet(f"at the barrier {name!r}")

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        stage = self._distributed_stage
        if stage is None:
            return obj
        return stage.agree(obj, src)

    # The end

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.fail(exception)
        if self._launcher is not None:
            self._launcher.kill(signal.SIGKILL)

    def fail(self, exception: BaseException) -> BaseException | None:
        """Tell the other ranks of ``exception`` and leave them; returns the failure, as messages speak of it.

        None if this process was told to end, or there are no other ranks.
        """
        stage, self.stage = self._distributed_stage, None
        if stage is None:
            return None
        stage.watchdog.report(exception)
        stage.abandon()
        return None if isinstance(exception, SIGTERMException) else stage.watchdog.failure

    @override
    def teardown(self) -> None:
        if self.stage is not None:
            self.stage.close()
        self.model = self._lightning_module
        super().teardown()


class _Replica(nn.Module):
    """A stage as DistributedDataParallel wants it: a module with this stage's parameters and buffers only."""

    def __init__(self, module: DGLModule, stage: DistributedStage) -> None:
        super().__init__()
        self.__dict__["_training_step"] = module.training_step  # not registered: it has the other blocks, too
        self._at_work = stage.watchdog.at_work
        self._blocks = nn.ModuleList(module.blocks[j] for j in stage.blocks)
        self._heads = nn.ModuleList(module.heads[j] for j in stage.blocks if j < len(module.heads))

    def forward(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self._at_work():
            return self.__dict__["_training_step"](*args, **kwargs)


def _without_states(state: dict[str, Any], keep: range) -> dict[str, Any]:
    blocks = state.get("blocks", [])
    return {**state, "blocks": [own if j in keep else {**own, "state": {}} for j, own in enumerate(blocks)]}


StrategyRegistry.register("dgl", DGLStrategy, description="Decoupled greedy learning, synchronous schedule")
StrategyRegistry.register(
    "dgl_async", DGLStrategy, description="Decoupled greedy learning, asynchronous schedule", schedule="async"
)
