"""Checks of what a Trainer is asked to do, on one rank and on several.

Errors name the argument, its value and what to do. Whatever is known at the start is checked there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader, default_collate

from lightning_dgl._version import __version__
from lightning_dgl.checks import check_sample_size
from lightning_dgl.lightning_internals import (
    saves_within_epochs,
    synchronises_batchnorm,
    validates_by_the_clock,
)
from lightning_dgl.optim import BlockOptimizer
from lightning_dgl.schedules import Schedule

# One rank


def check_strategy(trainer: Trainer) -> None:
    """Raise TypeError unless a strategy other than DGLStrategy leaves every block whole on its device."""
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise TypeError(
            "DGLModule trains under DGLStrategy, a single-device strategy or DDP, got "
            f"{type(trainer.strategy).__name__}, which does not leave every block's parameters whole on its device. "
            "Pass Trainer(strategy='dgl')."
        )


def check_fit(trainer: Trainer, schedule: Schedule) -> None:
    """Raise TypeError or ValueError for what a Trainer cannot do with blocks that train under ``schedule``."""
    if not trainer.lightning_module.automatic_optimization:
        raise ValueError(
            "automatic_optimization=False is not supported: a DGLModule takes the steps of its blocks through "
            "Lightning's automatic optimization. Leave it True; local_loss, optimizer= and lr_scheduler= are what can "
            "be changed."
        )
    optimizers = trainer.optimizers
    if not all(isinstance(optimizer, BlockOptimizer) for optimizer in optimizers):
        raise TypeError(
            f"DGLModule needs one optimizer for each block, but configure_optimizers returned "
            f"{type(optimizers[0]).__name__}. Pass optimizer=... to DGLModule instead of overriding it (with "
            "LightningCLI: --model.optimizer, not --optimizer)."
        )
    on_plateau = any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs)
    if on_plateau and not trainer.enable_validation:
        raise ValueError(
            "lr_scheduler is ReduceLROnPlateau, which watches the validation loss, but there is no validation. "
            "Pass a validation data loader, or another scheduler."
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks if schedule.counts_own_epochs else ():
        name, schedule_name = type(callback).__name__, type(schedule).__name__
        if isinstance(callback, (LearningRateFinder, BatchSizeFinder)):
            raise ValueError(
                f"{name} measures steps in which all blocks train, but with the {schedule_name} schedule in one "
                "process not all of them do in every step. Let it find the value with DGLStrategy('sync'), and pass "
                "that value."
            )
        if isinstance(callback, StochasticWeightAveraging):
            raise ValueError(
                f"{name} goes by the Trainer's epochs, but with the {schedule_name} schedule in one process each block "
                "counts its own. Train with DGLStrategy('sync'), or without it."
            )
        if isinstance(callback, SpikeDetection) and schedule.draws_blocks:
            raise ValueError(
                f"{name} compares the losses of steps, but with the {schedule_name} schedule in one process a step has "
                "those of the blocks that are drawn. Use on_nonfinite of DGLModule, or train without it."
            )
    accumulates = trainer.accumulate_grad_batches > 1 or any(
        isinstance(callback, GradientAccumulationScheduler) for callback in callbacks
    )
    if schedule.draws_blocks and accumulates:
        raise ValueError(
            "accumulate_grad_batches counts batches of data, but with the asynchronous schedule in one process a "
            "block is updated whenever it is drawn. Pass accumulate_grad_batches=1, or train on several ranks."
        )


def check_validates_each_epoch(trainer: Trainer) -> None:
    """Raise ValueError if epochs end without the validation that ReduceLROnPlateau waits for."""
    every = trainer.val_check_batch
    by_the_clock = validates_by_the_clock(trainer)
    if by_the_clock or (trainer.check_val_every_n_epoch is None and every > trainer.num_training_batches):  # type: ignore[operator]
        raise ValueError(
            "lr_scheduler is ReduceLROnPlateau, which watches the validation loss at the end of epochs, but with "
            f"val_check_interval={'a time' if by_the_clock else every} an epoch of {trainer.num_training_batches} "
            "batches may end without a validation. Validate at the end of epochs (val_check_interval=1.0, "
            "check_val_every_n_epoch=1), or pass another scheduler."
        )


def check_has_length(trainer: Trainer) -> None:
    """Raise ValueError if the training data loader has no length."""
    if trainer.num_training_batches == float("inf"):
        raise ValueError(
            "The training data loader has no length, by which blocks count their epochs. Use a map-style data set, "
            "or pass limit_train_batches=<number>."
        )


def check_not_empty(trainer: Trainer) -> None:
    """Raise ValueError if the training data loader had no batch."""
    if trainer.num_training_batches == 0 and trainer.limit_train_batches != 0:
        raise ValueError(
            "The training data loader is empty: it has no batch. Check the data set's length, and that drop_last "
            "leaves at least one batch."
        )


def check_block_names(saved: list[str], own: list[str]) -> None:
    """Raise ValueError unless the blocks of a checkpoint are those of a module."""
    if saved != own:
        raise ValueError(
            f"The checkpoint's blocks are {saved}, this module's are {own}. Make the module with split_at so that it "
            "has the checkpoint's blocks."
        )


def check_batch_sizes(trainer: Trainer, needs_two_samples: str | None) -> None:
    """Raise ValueError if the training data loader is going to yield a single sample that BatchNorm cannot train on."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or loader.collate_fn is not default_collate or loader.batch_size is None:
        return
    sampler: Any = loader.sampler
    left = 0 if loader.drop_last or not hasattr(sampler, "__len__") else len(sampler) % loader.batch_size
    if loader.batch_size == 1 or (left == 1 and trainer.num_training_batches == len(loader)):
        check_sample_size([None], needs_two_samples)


# Several ranks


def check_lengths(dataloader: object, lengths: Sequence[int | None]) -> int:
    """Return the length of the data loaders of all ranks; raise ValueError unless all have the same."""
    if None in lengths:
        raise ValueError(
            f"A data loader ({type(dataloader).__name__}) has no length, so the ranks cannot agree on a number of "
            "batches. Use a map-style data set, or define __len__ on the iterable one."
        )
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The data loaders have different lengths, by rank: {lengths} batches. Every rank must have the same "
            "number; let Lightning deal the data to replicas (use_distributed_sampler=True)."
        )
    assert lengths[0] is not None
    return lengths[0]


# Ranks that differ in these would wait for each other without end, or train something else.
_TRAINER_FLAGS = (
    *("max_epochs", "max_steps", "accumulate_grad_batches", "precision", "num_sanity_val_steps"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "log_every_n_steps", "gradient_clip_val"),
)


def fingerprint(
    module: LightningModule, block_names: list[str], schedule: Schedule, codec: Any, num_replicas: int
) -> dict[str, Any]:
    """Map each setting that all ranks must share to its value; keys are the names used in error messages."""
    return {
        "lightning-dgl": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "the list of blocks": block_names,
        "the network": {name: f"{tuple(p.shape)}, {p.dtype}" for name, p in module.named_parameters()},
        "schedule": type(schedule).__name__,
        "codec": repr(codec),
        "data_parallel_size": num_replicas,
    } | {f"Trainer({flag})": getattr(module.trainer, flag, None) for flag in _TRAINER_FLAGS}


def check_same(fingerprints: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Raise ValueError unless all ranks, called ``names``, have the same fingerprint; on each of them alike."""
    first = fingerprints[0]
    for name, other in zip(names, fingerprints, strict=True):
        for what, value in other.items():
            if value != first[what]:
                theirs, ours = _first_difference(value, first[what])
                raise ValueError(
                    f"The ranks were started differently: {what} is {theirs} on {name}, and {ours} on {names[0]}. "
                    "Start every rank with the same script, arguments and versions."
                )


def _first_difference(value: Any, other: Any) -> tuple[Any, Any]:
    """Return what to show of two values that differ: of dicts, the first entry that does."""
    if isinstance(value, dict) and isinstance(other, dict):
        key = next(key for key in [*value, *other] if value.get(key) != other.get(key))
        return tuple(f"{key}: {values[key]}" if key in values else f"without {key}" for values in (value, other))  # type: ignore[return-value]
    return value, other


def check_ranks(trainer: Trainer, is_split: bool, is_replicated: bool) -> None:
    """Raise ValueError for what the Trainer is asked to do but cannot, with several stages or replicas."""
    if validates_by_the_clock(trainer):
        raise ValueError(
            "val_check_interval is a time, which passes on each rank at another batch, but all ranks must validate at "
            "the same. Pass a number of batches, or a part of an epoch."
        )
    if is_replicated and synchronises_batchnorm(trainer):
        raise ValueError(
            "sync_batchnorm=True is not supported with data_parallel_size > 1: BatchNorm counts what its own replica "
            "sees. Pass sync_batchnorm=False."
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if is_replicated and isinstance(callback, BaseFinetuning):
            raise ValueError(
                f"{type(callback).__name__} unfreezes parameters in training, but replicas average the gradients of "
                "those that are not frozen at the start. Pass data_parallel_size=1."
            )
    for callback in callbacks if is_split else ():
        name = type(callback).__name__
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging, ModelPruning)):
            raise ValueError(
                f"{name} needs the weights of the whole network, of which each rank trains some blocks only. Train on "
                "one device, or without it."
            )
        if isinstance(callback, (LearningRateFinder, BatchSizeFinder)):
            raise ValueError(
                f"{name} measures steps in which one process trains the whole network. Let it find the value on one "
                "device, and pass that value."
            )
        if isinstance(callback, BasePredictionWriter) and callback.interval.on_batch:
            raise ValueError(
                f"{name} writes predictions batch by batch, but rank 0 has them at the end. Pass "
                "write_interval='epoch'."
            )
        monitored = callback.monitor if isinstance(callback, ModelCheckpoint) else None
        if (monitored or "").startswith("train/") and (when := saves_within_epochs(callback)):
            raise ValueError(
                f"ModelCheckpoint monitors {monitored!r} with {when}, but ranks know each other's training values at "
                "the end of an epoch. Monitor a val/ metric, or pass save_on_train_epoch_end=True instead."
            )
