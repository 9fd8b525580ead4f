"""The strategy: places the blocks on ranks and does what Lightning asks of a Strategy, in Lightning's order."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import Store
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dgl._arguments import check_at_least, check_choice
from lightning_dgl.checks import check_lengths, check_ranks, check_same, fingerprint
from lightning_dgl.distributed import (
    AGREED,
    DistributedStage,
    Groups,
    Process,
    Replica,
    Stage,
    StageLoader,
    StatefulStageLoader,
    Token,
    Watchdog,
    blocks_in_words,
    exchange,
    init_ranks,
    open_wires,
    this_process,
)
from lightning_dgl.distributed.launcher import RankLauncher
from lightning_dgl.lightning_internals import (
    SubprocessScriptLauncher,
    reduce_tensor,
    set_predictions,
    take_over,
)
from lightning_dgl.links import make_codecs
from lightning_dgl.module import DGLModule
from lightning_dgl.run import Run
from lightning_dgl.schedules import Schedule, Sequential, make_schedule
from lightning_dgl.splitting import assign_blocks


class DGLStrategy(ParallelStrategy):
    """Trains a :class:`~lightning_dgl.DGLModule` by decoupled greedy learning, on one or several devices.

    With ``Trainer(devices=S)`` each rank holds a stage, one or more consecutive blocks, balanced. It trains them on
    what the rank before it sends, while that one is at work on later batches; nothing flows back. With
    ``data_parallel_size=R`` there are R such rows of stages, each on its share of the data, and the ranks that hold the
    same blocks average their gradients.

    Args:
        schedule: "sync", "async", "sequential", or a schedule such as :class:`~lightning_dgl.Asynchronous`: which block
            steps when.
        codec: None, "half", a :class:`~lightning_dgl.VectorQuantizer`, or a list with one of these for each link: makes
            smaller what a block sends to the next one in training, wherever that is.
        data_parallel_size: R, how many replicas of every stage there are; ranks = R × stages.
        prefetch: how many batches a stage may receive ahead of the one it works on.
        timeout: how long a rank may keep others waiting before the run ends; a timedelta, or seconds.
        start_method: how Lightning starts the processes: "popen" runs the script once for each rank; "spawn", "fork"
            and "forkserver" need no script (notebooks: "fork"). Under torchrun or SLURM they are started already.
        process_group_backend: by default gloo on CPU; NCCL for CUDA tensors, gloo for everything else.
        accelerator: set by the Trainer.
        parallel_devices: set by the Trainer.
        cluster_environment: set by the Trainer.
        checkpoint_io: plugin that reads and writes checkpoints.
        precision_plugin: set by the Trainer.

    Attributes:
        run: while a Trainer runs, the blocks of this rank, their links with codecs, traffic and buffers, and the
            schedule; the module has it, too.

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
        self.run: Run | None = None
        self._codec = codec
        make_codecs(codec, len(codec) if isinstance(codec, list) else 1)  # raises for what cannot be a codec
        for name, value in (("data_parallel_size", data_parallel_size), ("prefetch", prefetch)):
            check_at_least(name, value, 1)
        check_choice("start_method", start_method, ("popen", "spawn", "fork", "forkserver"))
        self._timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        if self._timeout <= timedelta(0):
            raise ValueError(f"timeout must be positive, got {timeout!r}.")
        self.data_parallel_size = data_parallel_size
        self.num_nodes = 1  # set by the Trainer
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
        """Whether Lightning deals the data to replicas."""
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
            self._launcher = SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
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
    def _stage(self) -> Stage:
        """Return the stage of this rank; outside of a run, one without other ranks."""
        return Stage(range(0)) if self.run is None else self.run.stage

    # The start

    @override
    def setup_environment(self) -> None:
        if self._num_ranks > 1:
            assert self.cluster_environment is not None
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self._num_ranks)
            rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]
        super().setup_environment()
        if self._num_ranks == 1:
            self._start_run(Stage(range(self._module.num_blocks)))
        else:
            self._connect_ranks()

    def _start_run(self, stage: Stage, **ends: Any) -> None:
        self.run = self._module.start_run(stage, self.schedule, self._codec, **ends)
        if self.schedule.draws_blocks and self.data_parallel_size > 1:
            raise ValueError(
                f"The asynchronous schedule simulates slow blocks in one process, without replicas, but "
                f"data_parallel_size={self.data_parallel_size}. Pass more devices, so that there are several stages, "
                "or data_parallel_size=1."
            )

    def _assignment(self) -> list[range]:
        """Return the blocks of each stage; auxiliary heads count."""
        module = self._module
        costs = [flops + head for flops, head in zip(module.block_flops, [*module.head_flops, 0], strict=True)]
        return assign_blocks(costs, self._num_stages)

    def _rank_names(self) -> list[str]:
        """Return the name of each rank in messages."""
        if self._num_stages > self._module.num_blocks:
            return [f"Rank {rank}" for rank in range(self._num_ranks)]
        stages = self._assignment() * self.data_parallel_size
        return [f"Rank {rank} ({blocks_in_words(blocks)})" for rank, blocks in enumerate(stages)]

    def _name_of_process(self, local_rank: int) -> str:
        return self._rank_names()[self.node_rank * self.num_processes + local_rank]

    def _connect_ranks(self) -> None:
        assert self.cluster_environment is not None
        device, schedule = self.root_device, self.schedule
        backend = init_ranks(self.cluster_environment, device, self._process_group_backend, self._timeout)
        processes = self._check_alike()
        if self._groups is None:
            self._groups = Groups.make(self._num_ranks, self.data_parallel_size, device.type, backend, self._timeout)
        store = dist.distributed_c10d._get_default_store()
        stage = DistributedStage(self._assignment(), self._groups, store.clone(), self._watchdog(store, processes))
        ends = open_wires(stage, device, self._prefetch, schedule.new_buffer(), schedule.may_read)
        self._start_run(stage, may_drop=schedule.may_drop, **ends)
        take_over(self._module.trainer, self.cluster_environment)
        check_ranks(self._module.trainer, stage.is_split, stage.is_replicated)

    def _check_alike(self) -> list[Process]:
        """Check that ranks were started alike, before any that differ wait for each other; return where they run."""
        mine = fingerprint(self._module, self._module.block_names, self.schedule, self._codec, self.data_parallel_size)
        everyones = exchange((mine, this_process()))
        check_same([settings for settings, _ in everyones], self._rank_names())
        if self._num_stages > self._module.num_blocks:
            raise ValueError(
                f"There are more stages than blocks: {self._num_ranks} ranks / data_parallel_size="
                f"{self.data_parallel_size} make {self._num_stages} stages, the module has {self._module.num_blocks} "
                f"block(s). Pass num_blocks={self._num_stages} or more to DGLModule, or fewer devices."
            )
        return [process for _, process in everyones]

    def _watchdog(self, store: Store, processes: list[Process]) -> Watchdog:
        launcher, trainer = self._launcher, self._module.trainer
        watchdog = Watchdog(
            store.clone(),
            self.global_rank,
            self._rank_names(),
            self._timeout.total_seconds(),
            # Only the first process of a node shows an error, unless Lightning passes on that of each.
            is_loud=self.local_rank == 0 or isinstance(launcher, RankLauncher),
            received_sigterm=lambda: trainer.received_sigterm,
            children=launcher.procs if isinstance(launcher, SubprocessScriptLauncher) else [],
        )
        watchdog.processes = processes
        return watchdog

    @override
    def setup(self, trainer: Trainer) -> None:
        # Ranks that were not seeded, or did not all load the same weights, start from rank 0's.
        parts = (self._module.network, self._module.heads)
        self._stage.broadcast((t for part in parts for t in (*part.parameters(), *part.buffers())), src=0)
        super().setup(trainer)

    @override
    def model_to_device(self) -> None:
        module, stage = self._module, self._stage
        for link in [] if self.run is None else self.run.links:
            if link.codec is not None:
                link.codec.to(self.root_device)
        if not stage.is_split:
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
        assert isinstance(self._stage, DistributedStage)
        module, blocks = self._module, self._stage.blocks
        parts = [*(module.blocks[j] for j in blocks), *(module.heads[j] for j in blocks if j < len(module.heads))]
        replica = Replica(module.training_step, parts, self._stage.watchdog.at_work)
        if not any(p.requires_grad for p in replica.parameters()):
            return model
        device_ids = None if self.root_device.type == "cpu" else [self.root_device.index]
        assert self._groups is not None
        return DistributedDataParallel(replica, device_ids=device_ids, process_group=self._groups.data)

    # Batches

    @override
    def process_dataloader(self, dataloader: object) -> object:
        stage = self._stage
        if not stage.is_open:
            return dataloader
        length = check_lengths(dataloader, stage.gather(sized_len(dataloader)))
        if stage.is_first:
            return dataloader
        stateful = hasattr(dataloader, "state_dict") and hasattr(dataloader, "load_state_dict")
        return (StatefulStageLoader if stateful else StageLoader)(length)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, Token):
            return batch
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        if not isinstance(self.model, DistributedDataParallel):
            return super().training_step(*args, **kwargs)
        collective = self._stage.collective("to start a step with equal buffers")
        with self.precision_plugin.train_step_context(), collective:
            return self.model(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._stage.is_replicated:
            return super().backward(closure_loss, *args, **kwargs)
        with self._stage.collective("to average gradients"):
            return super().backward(closure_loss, *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self.precision_plugin.val_step_context():  # not through DistributedDataParallel
            return self._module.validation_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().predict_step(*args, **kwargs)
        stage, trainer = self._stage, self._module.trainer
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        writes = any(isinstance(callback, BasePredictionWriter) for callback in callbacks)
        if not stage.is_split or not (trainer.predict_loop.return_predictions or writes):
            return output
        if stage.is_last:
            dataloader_idx = kwargs.get("dataloader_idx", args[2] if len(args) > 2 else 0)
            self._predictions.append((dataloader_idx, move_data_to_device(output, "cpu")))
        if not trainer.predict_loop.batch_progress.is_last_batch:  # type: ignore[attr-defined]
            return output
        predictions, self._predictions = stage.from_last_stage(self._predictions), []
        set_predictions(trainer, predictions[:-1])
        return predictions[-1][1]

    # Checkpoints

    def sync_blocks(self) -> None:
        """Copy the weights of every block from the rank that trains it to all ranks; all ranks must call it."""
        stage, module = self._stage, self._module
        # The process that has forked ranks has no run, and its weights are those from before training.
        is_incomplete = stage.is_split or (self.run is None and self._num_ranks > 1)
        if is_incomplete and module.trainer.state.status == TrainerStatus.INTERRUPTED:
            raise RuntimeError(
                "No checkpoint can be saved after a failure: the blocks of other ranks are out of reach. Resume from "
                "the last one saved."
            )
        for rank, blocks in enumerate(stage.assignment if stage.is_split else ()):
            stage.broadcast((tensor for j in blocks for tensor in module.block_tensors(j)), src=rank)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.sync_blocks()
        return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = super().optimizer_state(optimizer)
        stage = self._stage
        if len(stage.assignment) == 1:
            return state
        blocks: list[Any] = list(state["blocks"])
        merged = stage.merge_on_rank_0({j: move_data_to_device(blocks[j], "cpu") for j in stage.blocks})
        return {"blocks": [merged.get(j, other) for j, other in enumerate(blocks)]}  # type: ignore[dict-item]

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        stage = self._stage
        if stage.is_split:  # the states of other blocks are for the ranks that hold those blocks
            states = [_without_states(state, keep=stage.blocks) for state in checkpoint["optimizer_states"]]
            checkpoint = {**checkpoint, "optimizer_states": states}
        super().load_optimizer_state_dict(checkpoint)

    @override
    def on_train_end(self) -> None:
        self.sync_blocks()

    # What Lightning asks of ranks in common

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        stage = self._stage
        if not isinstance(stage, DistributedStage) or group is AGREED or not isinstance(tensor, Tensor):
            return tensor
        with stage.collective("to reduce a value"):
            return reduce_tensor(tensor, group or stage.groups.everyone, reduce_op=reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        stage = self._stage
        if not isinstance(stage, DistributedStage):
            return tensor
        with stage.collective("to gather a value"):
            return super().all_gather(tensor, group or stage.groups.everyone, sync_grads)

    @override
    def barrier(self, name: str | None = None) -> None:
        self._stage.meet(f"at the barrier {name!r}")

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self._stage.agree(obj, src)

    # The end

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.fail(exception)
        if self._launcher is not None:
            self._launcher.kill(signal.SIGKILL)

    def fail(self, exception: BaseException) -> BaseException | None:
        """Tell the other ranks of ``exception`` and leave them.

        Returns:
            The failure that ends the run, as messages tell it; None if this process was told to end, or is alone.
        """
        run, self.run = self.run, None
        if run is None or not run.stage.is_open:
            return None
        failure = run.stage.fail(exception)
        run.abandon()
        return None if isinstance(exception, SIGTERMException) else failure

    @override
    def teardown(self) -> None:
        if self.run is not None:
            self.run.close()
        self.model = self.lightning_module
        super().teardown()


def _without_states(state: dict[str, Any], keep: range) -> dict[str, Any]:
    blocks = state.get("blocks", [])
    return {**state, "blocks": [own if j in keep else {**own, "state": {}} for j, own in enumerate(blocks)]}


StrategyRegistry.register("dgl", DGLStrategy, description="Decoupled greedy learning, synchronous schedule")
StrategyRegistry.register(
    "dgl_async", DGLStrategy, description="Decoupled greedy learning, asynchronous schedule", schedule="async"
)
