"""The strategy: places the blocks on ranks and does what Lightning asks of a Strategy, in Lightning's order."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import Store
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dgl._arguments import check_at_least, plain_list
from lightning_dgl.distributed import (
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
from lightning_dgl.distributed.rank_strategy import RankStrategy, StartMethod
from lightning_dgl.lightning_internals import SubprocessScriptLauncher, take_over
from lightning_dgl.links import make_codecs
from lightning_dgl.module import DGLModule
from lightning_dgl.other_blocks import OtherBlocks
from lightning_dgl.run import Run
from lightning_dgl.schedules import Schedule, Sequential, make_schedule
from lightning_dgl.shared_values import forget
from lightning_dgl.splitting import assign_blocks
from lightning_dgl.trainer_checks import check_lengths, check_ranks, check_same, fingerprint


class DGLStrategy(RankStrategy):
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
        timeout: how long a rank may keep others waiting before the run ends; a timedelta, or seconds. The first steps
            of a module with ``compile=True`` may take minutes.
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
        start_method: StartMethod = "popen",
        process_group_backend: str | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            data_parallel_size,
            timeout,
            start_method,
            process_group_backend,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        check_at_least("prefetch", prefetch, 1)
        self.schedule = make_schedule(schedule)
        self.run: Run | None = None
        self._codec = codec = plain_list(codec)
        make_codecs(codec, len(codec) if isinstance(codec, list) else 1)  # raises for what cannot be a codec
        self._prefetch = prefetch
        self._groups: Groups | None = None
        self._others_of_failed_run: OtherBlocks | None = None

    # Ranks

    @property
    @override
    def stage(self) -> Stage:
        return Stage(range(0)) if self.run is None else self.run.stage

    def _assignment(self) -> list[range]:
        """Return the blocks of each stage; auxiliary heads count."""
        module = self._module
        costs = [flops + head for flops, head in zip(module.block_flops, [*module.head_flops, 0], strict=True)]
        return assign_blocks(costs, self.num_stages)

    @override
    def rank_names(self) -> list[str]:
        if self.num_stages > self._module.num_blocks:
            return super().rank_names()
        stages = self._assignment() * self.data_parallel_size
        return [f"{name} ({blocks_in_words(stages[rank])})" for rank, name in enumerate(super().rank_names())]

    @override
    def _configure_launcher(self) -> None:
        if self.num_ranks > 1 and isinstance(self.schedule, Sequential):
            raise ValueError(
                f"Sequential trains one block at a time, so of {self.num_ranks} ranks all but one would idle. Pass "
                "devices=1, or schedule='sync', which trains all blocks at once."
            )
        super()._configure_launcher()

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

    # The start

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.stage.close()  # of a run that a tuner has broken off
        if self.num_ranks == 1:
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

    def _connect_ranks(self) -> None:
        assert self.cluster_environment is not None
        device, schedule = self.root_device, self.schedule
        backend = init_ranks(self.cluster_environment, device, self._process_group_backend, self._timeout)
        processes = self._check_alike()
        if self._groups is None:
            self._groups = Groups.make(self.num_ranks, self.data_parallel_size, device, backend, self._timeout)
        store = dist.distributed_c10d._get_default_store()
        stage = DistributedStage(self._assignment(), self._groups, store.clone(), self._watchdog(store, processes))
        ends = open_wires(stage, device, self._prefetch, schedule.new_buffer(), schedule.may_read)
        self._start_run(stage, may_drop=schedule.may_drop, **ends)
        take_over(self._module.trainer, self.cluster_environment)
        check_ranks(self._module.trainer, stage.is_split, stage.is_replicated)
        name = type(self._module).__name__
        fits = self._module.trainer.state.fn == TrainerFn.FITTING
        if fits and stage.is_split and type(self._module).training_step is not DGLModule.training_step:
            raise ValueError(
                f"{name} overrides training_step, but only the first stage gets data there: on the other ranks a batch "
                "is what the stage before sends. Prepare batches in on_after_batch_transfer, change losses in "
                "local_loss, or train on one device."
            )

    def _check_alike(self) -> list[Process]:
        """Check that ranks were started alike, before any that differ wait for each other; return where they run.

        Where blocks are balanced by measured times, all ranks cut as rank 0 does.
        """
        cuts = exchange(self._module.measured_cuts)
        if cuts[0] is not None and self._module.measured_cuts not in (None, cuts[0]):
            self._module.cut_at(cuts[0])
        mine = fingerprint(self._module, self._module.block_names, self.schedule, self._codec, self.data_parallel_size)
        everyones = exchange((mine, this_process()))
        check_same([settings for settings, _ in everyones], self.rank_names())
        if self.num_stages > self._module.num_blocks:
            raise ValueError(
                f"There are more stages than blocks: {self.num_ranks} ranks / data_parallel_size="
                f"{self.data_parallel_size} make {self.num_stages} stages, the module has {self._module.num_blocks} "
                f"block(s). Pass num_blocks={self.num_stages} or more to DGLModule, or fewer devices."
            )
        return [process for _, process in everyones]

    def _watchdog(self, store: Store, processes: list[Process]) -> Watchdog:
        launcher, trainer = self._launcher, self._module.trainer
        watchdog = Watchdog(
            store.clone(),
            self.global_rank,
            self.rank_names(),
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
        self.stage.broadcast((t for part in parts for t in (*part.parameters(), *part.buffers())), src=0)
        super().setup(trainer)

    @override
    def model_to_device(self) -> None:
        module, stage = self._module, self.stage
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
        assert isinstance(self.stage, DistributedStage)
        module, blocks = self._module, self.stage.blocks
        parts = [*(module.blocks[j] for j in blocks), *(module.heads[j] for j in blocks if j < len(module.heads))]
        wait = partial(self.stage.wait_for_device, self.root_device, "to start a step with equal buffers")
        replica = Replica(module.training_step, parts, self.stage.watchdog.at_work, wait)
        if not any(p.requires_grad for p in replica.parameters()):
            return model
        device_ids = None if self.root_device.type == "cpu" else [self.root_device.index]
        assert self._groups is not None
        with self.stage.collective("to start with equal weights"):
            return DistributedDataParallel(replica, device_ids=device_ids, process_group=self._groups.data)

    # Batches

    @override
    def process_dataloader(self, dataloader: object) -> object:
        stage = self.stage
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
        batch = super().batch_to_device(batch, device, dataloader_idx)
        if batch is None and self.stage.is_split:
            raise ValueError(
                "A batch is None, which Lightning skips on the rank that reads the data only; later stages wait for "
                "it. Leave such samples out in the data set or the sampler, or train on one device."
            )
        return batch

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        assert self.run is not None
        self.run.others.hide()
        forget(self._module.trainer, self.run)
        if not isinstance(self.model, DistributedDataParallel):
            return super().training_step(*args, **kwargs)
        collective = self.stage.collective("to start a step with equal buffers")
        with self.precision_plugin.train_step_context(), collective:
            return self.model(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.stage.is_replicated:
            return super().backward(closure_loss, *args, **kwargs)
        with self.stage.collective("to average gradients"):
            loss = super().backward(closure_loss, *args, **kwargs)
            self.stage.wait_for_device(self.root_device, "to average gradients")
            return loss

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self.precision_plugin.val_step_context():  # not through DistributedDataParallel
            return self._module.validation_step(*args, **kwargs)

    # Checkpoints

    def sync_blocks(self) -> None:
        """Copy the weights of every block from the rank that trains it to all ranks; all ranks must call it."""
        stage, module = self.stage, self._module
        # The process that has forked ranks has no run, and its weights are those from before training.
        is_incomplete = stage.is_split or (self.run is None and self.num_ranks > 1)
        if is_incomplete and module.trainer.state.status == TrainerStatus.INTERRUPTED:
            raise RuntimeError(
                "No checkpoint can be saved after a failure: the blocks of other ranks are out of reach. Resume from "
                "the last one saved."
            )
        if self.run is not None:
            self.run.others.copy()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.sync_blocks()
        return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = super().optimizer_state(optimizer)
        stage = self.stage
        if len(stage.assignment) == 1:
            return state
        blocks: list[Any] = list(state["blocks"])
        merged = stage.merge_on_rank_0({j: move_data_to_device(blocks[j], "cpu") for j in stage.blocks})
        return {"blocks": [merged.get(j, other) for j, other in enumerate(blocks)]}  # type: ignore[dict-item]

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        stage = self.stage
        if stage.is_split:  # the states of other blocks are for the ranks that hold those blocks
            states = [_without_states(state, keep=stage.blocks) for state in checkpoint["optimizer_states"]]
            checkpoint = {**checkpoint, "optimizer_states": states}
        super().load_optimizer_state_dict(checkpoint)

    @override
    def on_train_end(self) -> None:
        self.sync_blocks()

    # The end

    @override
    def fail(self, exception: BaseException) -> BaseException | None:
        """Tell the other ranks of ``exception`` and leave them.

        Returns:
            The failure that ends the run, as messages tell it; None if this process was told to end, or is alone.
        """
        run, self.run = self.run, None
        if run is None:
            return None
        run.others.show()  # to Lightning, which takes the module from its device
        self._others_of_failed_run = run.others
        if not run.stage.is_open:
            return None
        failure = run.stage.fail(exception)
        run.abandon()
        return None if isinstance(exception, SIGTERMException) else failure

    @override
    def teardown(self) -> None:
        if self.run is not None and self.run.stage.is_open:
            self.run.drain()
        self.model = self.lightning_module
        super().teardown()
        if self._others_of_failed_run is not None:
            self._others_of_failed_run.lose()
            self._others_of_failed_run = None


def _without_states(state: dict[str, Any], keep: range) -> dict[str, Any]:
    blocks = state.get("blocks", [])
    return {**state, "blocks": [own if j in keep else {**own, "state": {}} for j, own in enumerate(blocks)]}


StrategyRegistry.register("dgl", DGLStrategy, description="Decoupled greedy learning, synchronous schedule")
StrategyRegistry.register(
    "dgl_async", DGLStrategy, description="Decoupled greedy learning, asynchronous schedule", schedule="async"
)
