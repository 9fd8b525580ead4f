"""The plugin's own work in Lightning's hooks.

It lives in a callback that DGLModule adds to its Trainer, not in the module's hooks: users override those, and nothing
may go wrong if they do not call ``super()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import wraps
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_dgl.address import END_OF_EPOCH, START_OF_VALIDATION, Address, current_address
from lightning_dgl.distributed.rank_strategy import RankStrategy
from lightning_dgl.logs import log_epoch, log_reports
from lightning_dgl.optim import BlockGradScaler
from lightning_dgl.run import Run
from lightning_dgl.shared_values import note_step, report_step, share
from lightning_dgl.trainer_checks import (
    check_batch_sizes,
    check_block_names,
    check_fit,
    check_has_length,
    check_not_empty,
    check_validates_each_epoch,
)
from lightning_dgl.training import Progress, get_random_state, set_random_state

KEY = "lightning_dgl"
"""Where a checkpoint keeps what the plugin adds."""


def _for_dgl_modules(hook: Callable[..., None]) -> Callable[..., None]:
    """Let ``hook`` do nothing for other LightningModules: a Trainer may go on to train one."""

    @wraps(hook)
    def guarded(self: Bookkeeping, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if hasattr(pl_module, "start_run_if_none"):
            hook(self, trainer, pl_module, *args, **kwargs)

    return guarded


class Bookkeeping(Callback):
    """Starts runs, logs every block's metrics at the end of epochs, and saves and restores training state."""

    @override
    @_for_dgl_modules
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.start_run_if_none()
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is not None:
            pl_module.leave_to(datamodule)

    @override
    @_for_dgl_modules
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        run: Run = pl_module.run
        check_fit(trainer, run.schedule)
        trainer.fit_loop.max_epochs = run.schedule.num_epochs(trainer.max_epochs, pl_module.num_blocks)
        if trainer.global_step == 0 and run.random_state is None:  # not resumed
            pl_module.progress = [Progress() for _ in range(pl_module.num_blocks)]
        plugin = trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
            plugin.scaler = BlockGradScaler(pl_module.num_blocks, like=plugin.scaler)  # type: ignore[assignment]
        if pl_module.streams.seed is None:
            pl_module.streams.seed = run.stage.agree(torch.initial_seed())
        if run.random_state is not None:
            # A run that was saved between epochs now draws the seed of the data loader.
            set_random_state(run.random_state, pl_module.device)

    @override
    @_for_dgl_modules
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        run: Run = pl_module.run
        if run.random_state is not None and trainer.fit_loop.restarted_mid_epoch:
            # A run that was saved within an epoch had drawn that seed before.
            set_random_state(run.random_state, pl_module.device)
        run.random_state = None
        check_batch_sizes(trainer, pl_module.needs_two_samples)
        if run.schedule.counts_own_epochs:
            check_has_length(trainer)
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            check_validates_each_epoch(trainer)

    @override
    @_for_dgl_modules
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_not_empty(trainer)

    @override
    @_for_dgl_modules
    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Let callbacks and hooks of the validation read the weights of all blocks."""
        report_step(trainer, pl_module.run)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            pl_module.run.copy_other_blocks(_mark(trainer, START_OF_VALIDATION))

    @override
    @_for_dgl_modules
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        report_step(trainer, pl_module.run)

    @override
    @_for_dgl_modules
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        note_step(trainer, pl_module.run, batch_idx)

    # Metrics, which count anew: finders of learning rates and batch sizes take steps while no callback looks on

    @override
    @_for_dgl_modules
    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.run.metrics.pop("train")

    @override
    @_for_dgl_modules
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.run.metrics.pop("val")

    @override
    @_for_dgl_modules
    def on_test_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.run.metrics.pop("test")

    @override
    @_for_dgl_modules
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let all ranks know all training values, so that callbacks that monitor one decide alike."""
        run: Run = pl_module.run  # type: ignore[assignment]
        run.copy_other_blocks(_mark(trainer, END_OF_EPOCH))
        run.metrics.pop("train")
        report_step(trainer, run)
        share(trainer, pl_module, run, training=True)
        if run.stage.is_split:
            values = run.stage.merge({name: value.cpu() for name, value in run.latest.items()})
            log_epoch(pl_module, run, "train", values, on_step=False, on_epoch=True, logger=False)
            log_reports(trainer, run)

    @override
    @_for_dgl_modules
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        share(trainer, pl_module, pl_module.run, training=False)  # type: ignore[arg-type]
        _log_metrics(pl_module, "val", trainer.num_val_batches)
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau:  # the number of loaders is known only now
                config.monitor = "val/loss" if len(trainer.num_val_batches) == 1 else "val/loss/dataloader_idx_0"

    @override
    @_for_dgl_modules
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        share(trainer, pl_module, pl_module.run, training=False)  # type: ignore[arg-type]
        _log_metrics(pl_module, "test", trainer.num_test_batches)

    # Checkpoints

    @override
    @_for_dgl_modules
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let no callback fail to save a checkpoint, which would hide the failure that it is told of."""
        if isinstance(trainer.strategy, RankStrategy):
            trainer.strategy.forgo_checkpoints(trainer)

    @override
    @_for_dgl_modules
    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save which blocks there are, and all that lets a resumed run continue as if it had not been interrupted."""
        run: Run | None = pl_module.run
        if run is None:  # the process that has forked ranks; how far they have come ended with them
            for name in ("optimizer_states", "lr_schedulers", "callbacks", "loops"):
                checkpoint.pop(name, None)
            rank_zero_warn(
                "Only weights are saved: optimizers were in the processes that trained, which have ended. To resume "
                "from a checkpoint, let ModelCheckpoint save it while training."
            )
            return
        num_blocks, streams = pl_module.num_blocks, pl_module.streams
        random_state: dict[str, Any] = get_random_state(pl_module.device)
        scalers: dict[str, Any] = checkpoint.get(type(trainer.precision_plugin).__qualname__, {})
        # Only the ranks that hold a block know its state.
        mine = {
            j: (
                streams[j],
                scalers["blocks"][j] if scalers else None,
                asdict(pl_module.progress[j]),
                _codec_state(run, j),
            )
            for j in run.stage.blocks
        }
        everyones = run.stage.merge(mine)
        of_blocks = [everyones[j] for j in range(num_blocks)]
        random_state["blocks"] = [stream for stream, _, _, _ in of_blocks]
        if scalers:
            scalers["blocks"] = [scaler for _, scaler, _, _ in of_blocks]
        checkpoint[KEY] = {
            "block_names": pl_module.block_names,
            "unsaved_arguments": pl_module.unsaved_arguments,
            "random_state": random_state,
            "progress": [progress for _, _, progress, _ in of_blocks],
            "codecs": [codec for _, _, _, codec in of_blocks],
            "schedule": run.schedule.state_dict(),
        }

    @override
    @_for_dgl_modules
    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(KEY)
        if saved is None:
            return
        check_block_names(saved["block_names"], pl_module.block_names)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        run: Run = pl_module.run
        run.random_state = saved["random_state"]
        pl_module.streams.load(saved["random_state"].get("blocks", []))
        pl_module.progress = [Progress(**progress) for progress in saved.get("progress", [])] or pl_module.progress
        run.schedule.load_state_dict(saved.get("schedule", {}))
        for link, state in zip(run.links[1:], saved.get("codecs", []), strict=False):
            if link.codec is not None and state is not None:
                link.codec.load_state_dict(state)


def _mark(trainer: Trainer, phase: str) -> Address:
    return current_address(trainer, trainer.fit_loop.batch_idx)._replace(phase=phase)


def _log_metrics(module: Any, phase: str, num_batches: Sequence[float]) -> None:
    run: Run = module.run
    for i, metrics in run.metrics.pop(phase).items():
        suffix = f"/dataloader_idx_{i}" if len(num_batches) > 1 else ""
        values = {f"{name}{suffix}": value for name, value in run.stage.merge(metrics.compute()).items()}
        log_epoch(module, run, phase, values)


def _codec_state(run: Run, block: int) -> dict[str, Any] | None:
    """Return the state of the codec that follows ``block``, in the host's memory; None without one."""
    codec = run.links[block + 1].codec
    return None if codec is None else {name: value.cpu() for name, value in codec.state_dict().items()}
