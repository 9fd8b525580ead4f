"""The strategy: places the blocks on devices and does what Lightning asks of a Strategy, in Lightning's order."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
from typing_extensions import override

from lightning_dgl.module import DGLModule
from lightning_dgl.schedules import Schedule, make_schedule


class DGLStrategy(ParallelStrategy):
    """Trains a :class:`~lightning_dgl.DGLModule` by decoupled greedy learning, on one device (CPU, CUDA, MPS).

    Args:
        schedule: "sync", or a schedule such as :class:`~lightning_dgl.Synchronous`: which block steps when.
        accelerator: set by the Trainer.
        parallel_devices: set by the Trainer.
        cluster_environment: set by the Trainer.
        checkpoint_io: plugin that reads and writes checkpoints.
        precision_plugin: set by the Trainer.

    Raises:
        ValueError: for an unknown schedule, and for more than one device or node.
        TypeError: if the Trainer is given a LightningModule that is not a DGLModule.
    """

    strategy_name = "dgl"

    def __init__(
        self,
        schedule: str | Schedule = "sync",
        *,
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
        self.num_nodes = 1  # set by the Trainer

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[0]

    @override
    def connect(self, model: LightningModule) -> None:
        if not isinstance(model, DGLModule):
            raise TypeError(
                f"DGLStrategy trains a DGLModule, got {type(model).__name__}. Wrap the network: "
                "DGLModule(network, num_blocks=4, example_input=...)."
            )
        super().connect(model)

    @override
    def setup_environment(self) -> None:
        num_devices = len(self.parallel_devices or [])
        if num_devices * self.num_nodes != 1:
            raise ValueError(
                f"DGLStrategy runs all blocks on one device so far, got devices={num_devices} and "
                f"num_nodes={self.num_nodes}. Pass Trainer(devices=1, num_nodes=1)."
            )
        super().setup_environment()

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    # One process: nothing to gather, reduce or wait for.

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor

    @override
    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        return tensor

    @override
    def barrier(self, name: str | None = None) -> None:
        pass

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj


StrategyRegistry.register("dgl", DGLStrategy, description="Decoupled greedy learning, synchronous schedule")
