"""The half of DGLStrategy that concerns ranks, whatever they train: their number, launch and collectives."""

from __future__ import annotations

import signal
import sys
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.strategies import ParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from lightning_dgl._arguments import check_at_least, check_choice
from lightning_dgl.distributed.launcher import RankLauncher, ScriptLauncher
from lightning_dgl.distributed.stage import AGREED, DistributedStage, Stage
from lightning_dgl.lightning_internals import reduce_tensor, set_predictions

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


class RankStrategy(ParallelStrategy):
    """A strategy of replicas × stages ranks, which meet and exchange values through their :class:`Stage`.

    Args:
        data_parallel_size: how many replicas of every stage there are.
        timeout: how long a rank may keep others waiting; a timedelta, or seconds.
        start_method: how Lightning starts the processes.
        process_group_backend: of torch.distributed; None for the device's default.
        for_lightning: what a Lightning strategy takes.
    """

    def __init__(
        self,
        data_parallel_size: int = 1,
        timeout: timedelta | float = default_pg_timeout,
        start_method: StartMethod = "popen",
        process_group_backend: str | None = None,
        **for_lightning: Any,
    ) -> None:
        super().__init__(**for_lightning)
        check_at_least("data_parallel_size", data_parallel_size, 1)
        check_choice("start_method", start_method, ("popen", "spawn", "fork", "forkserver"))
        self._timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        if self._timeout <= timedelta(0):
            raise ValueError(f"timeout must be positive, got {timeout!r}.")
        self.data_parallel_size = data_parallel_size
        self.num_nodes = 1  # set by the Trainer
        self._start_method = start_method
        self._process_group_backend = process_group_backend
        self._predictions: list[tuple[int, Any]] = []
        self._forgone: tuple[Trainer, list[ModelCheckpoint]] | None = None

    @property
    def stage(self) -> Stage:
        """The stage of this rank; outside of a run, one without other ranks."""
        raise NotImplementedError

    def part(self) -> None:
        """Leave the other ranks when all have come to the end of a run."""
        self.stage.close()

    def fail(self, exception: BaseException) -> BaseException | None:
        """Tell the other ranks of ``exception`` and leave them; return the failure that ends the run, if any."""
        raise NotImplementedError

    def rank_names(self) -> list[str]:
        """Return the name of each rank in messages."""
        return [f"Rank {rank}" for rank in range(self.num_ranks)]

    # How many ranks there are

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
    def num_ranks(self) -> int:
        """How many ranks there are on all nodes."""
        return self.num_processes * self.num_nodes

    @property
    def num_stages(self) -> int:
        """How many stages the blocks are dealt to."""
        return self.num_ranks // self.data_parallel_size

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning deals the data to replicas."""
        return self.data_parallel_size > 1

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_parallel_size, "rank": self.global_rank // self.num_stages}

    # Their launch

    @override
    def _configure_launcher(self) -> None:
        if self.num_ranks % self.data_parallel_size:
            raise ValueError(
                f"devices × num_nodes ({self.num_processes} × {self.num_nodes}) must be a multiple of "
                f"data_parallel_size={self.data_parallel_size}: every replica has the same number of stages."
            )
        if self.num_ranks == 1:
            return
        assert self.cluster_environment is not None
        if self._start_method == "popen":
            if hasattr(sys, "ps1") and not self.cluster_environment.creates_processes_externally:
                raise ValueError(
                    f"start_method='popen' runs a script once for each of {self.num_ranks} ranks, but this is a "
                    "notebook or an interactive session. Pass DGLStrategy(start_method='fork')."
                )
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes, self.part)
        else:
            self._launcher = RankLauncher(self, self._start_method, self.part, self.fail, self._name_of_process)

    def _name_of_process(self, local_rank: int) -> str:
        return self.rank_names()[self.node_rank * self.num_processes + local_rank]

    @override
    def setup_environment(self) -> None:
        if self.num_ranks > 1:
            assert self.cluster_environment is not None
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_ranks)
            rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]
        super().setup_environment()

    def forgo_checkpoints(self, trainer: Trainer) -> None:
        """Let callbacks save nothing while they are told of a failure: what other ranks hold is out of reach then.

        They would fail, and hide the failure that they are told of.
        """
        if self.num_ranks == 1:
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        saving = [one for one in callbacks if isinstance(one, ModelCheckpoint) and one.save_on_exception]
        self._forgone = trainer, saving
        for callback in saving:  # one would remove its last checkpoint for the one that is not saved
            callback.save_on_exception = False
            _warn_that_nothing_is_saved()
        trainer.save_checkpoint = _warn_that_nothing_is_saved  # type: ignore[method-assign]

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._forgone is not None:
            trainer, saving = self._forgone
            del trainer.save_checkpoint
            for callback in saving:
                callback.save_on_exception = True
            self._forgone = None
        self.fail(exception)
        if self._launcher is not None:
            self._launcher.kill(signal.SIGKILL)

    # What they do together

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        stage = self.stage
        if not isinstance(stage, DistributedStage) or group is AGREED or not isinstance(tensor, Tensor):
            return tensor
        with stage.collective("to reduce a value"):
            return reduce_tensor(tensor, group or stage.groups.everyone, reduce_op=reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        stage = self.stage
        if not isinstance(stage, DistributedStage):
            return tensor
        with stage.collective("to gather a value"):
            return super().all_gather(tensor, group or stage.groups.everyone, sync_grads)

    @override
    def barrier(self, name: str | None = None) -> None:
        self.stage.meet(f"at the barrier {name!r}")

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self.stage.agree(obj, src)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predict; the last stage's outputs replace those of all stages when the last batch is through."""
        output = super().predict_step(*args, **kwargs)
        assert self.lightning_module is not None
        stage, trainer = self.stage, self.lightning_module.trainer
        if not stage.is_split or not (trainer.predict_loop.return_predictions or _writes_predictions(trainer)):
            return output
        if stage.is_last:
            dataloader_idx = kwargs.get("dataloader_idx", args[2] if len(args) > 2 else 0)
            self._predictions.append((dataloader_idx, move_data_to_device(output, "cpu")))
        if not trainer.predict_loop.batch_progress.is_last_batch:  # type: ignore[attr-defined]
            return output
        predictions, self._predictions = stage.from_last_stage(self._predictions), []
        set_predictions(trainer, predictions[:-1])
        return predictions[-1][1]


def _warn_that_nothing_is_saved(*_: Any, **__: Any) -> None:
    rank_zero_warn(
        "No checkpoint is saved after a failure on several ranks: the blocks of other ranks are out of reach. Resume "
        "from the last one saved."
    )


def _writes_predictions(trainer: Trainer) -> bool:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, BasePredictionWriter) for callback in callbacks)
