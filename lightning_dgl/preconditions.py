"""What must hold before blocks train on several ranks: all are started alike, and can do what the Trainer is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lightning_dgl._version import __version__
from lightning_dgl.module import DGLModule
from lightning_dgl.schedules import Schedule

# Where they differ, ranks would wait for each other for ever, or train something else.
_TRAINER_FLAGS = (
    *("max_epochs", "max_steps", "accumulate_grad_batches", "precision", "num_sanity_val_steps"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "log_every_n_steps", "gradient_clip_val"),
)


def fingerprint(module: DGLModule, schedule: Schedule, codec: Any, num_replicas: int) -> dict[str, Any]:
    """What must be the same on every rank, by how messages call it."""
    return {
        "lightning-dgl": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "the list of blocks": module.block_names,
        "the network": {name: f"{tuple(p.shape)}, {p.dtype}" for name, p in module.named_parameters()},
        "schedule": type(schedule).__name__,
        "codec": repr(codec),
        "data_parallel_size": num_replicas,
    } | {f"Trainer({flag})": getattr(module.trainer, flag) for flag in _TRAINER_FLAGS}


def check_same(fingerprints: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Raise ValueError unless all ranks, called ``names``, have the same fingerprint; on each of them alike."""
    first = fingerprints[0]
    for name, other in zip(names, fingerprints, strict=True):
        for what, value in other.items():
            if value != first[what]:
                theirs, ours = _first_difference(value, first[what])
                raise ValueError(
                    f"The ranks were started differently: {what} is {theirs} on {name}, and {ours} on {names[0]}. "
                    "Start every rank with the same script, arguments and versions (and where blocks are balanced by "
                    "measured time, pass the outcome as split_at)."
                )


def _first_difference(value: Any, other: Any) -> tuple[Any, Any]:
    """What to show of two values that differ: of dicts, the first entry that does."""
    if isinstance(value, dict) and isinstance(other, dict):
        key = next(key for key in [*value, *other] if value.get(key) != other.get(key))
        return tuple(f"{key}: {values[key]}" if key in values else f"without {key}" for values in (value, other))  # type: ignore[return-value]
    return value, other


def check_trainer(trainer: Trainer, is_split: bool, is_replicated: bool) -> None:
    """Raise ValueError for what the Trainer is asked to do but cannot, with several stages or replicas."""
    if is_replicated and trainer.strategy._layer_sync is not None:  # type: ignore[attr-defined]
        raise ValueError(
            "sync_batchnorm=True is not supported with data_parallel_size > 1: BatchNorm counts what its own replica "
            "sees. Pass sync_batchnorm=False."
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks if is_split else ():
        name = type(callback).__name__
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise ValueError(
                f"{name} averages the weights of the whole network, of which each rank trains some blocks only. Train "
                "on one device, or without it."
            )
        if isinstance(callback, BasePredictionWriter) and callback.interval.on_batch:
            raise ValueError(
                f"{name} writes predictions batch by batch, but rank 0 has them at the end. Pass "
                "write_interval='epoch'."
            )
        if isinstance(callback, ModelCheckpoint) and (callback.monitor or "").startswith("train/"):
            steps = callback._every_n_train_steps
            if steps:
                raise ValueError(
                    f"ModelCheckpoint monitors {callback.monitor!r} every {steps} steps, but ranks know each other's "
                    "training values at the end of an epoch. Monitor a val/ metric, or pass "
                    "save_on_train_epoch_end=True instead of every_n_train_steps."
                )
