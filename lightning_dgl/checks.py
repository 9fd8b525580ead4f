"""Checks of arguments, of batches, and of what a Trainer is asked to do.

Errors name the argument, its value and what to do. Whatever is known at the start is checked there.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Sized
from contextlib import nullcontext
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
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, default_collate

from lightning_dgl._version import __version__
from lightning_dgl.augmented import FEW_PARAMETERS, num_parameters
from lightning_dgl.lightning_internals import (
    saves_every_n_train_steps,
    synchronises_batchnorm,
    validates_by_the_clock,
)
from lightning_dgl.optim import BlockOptimizer, BlockParameters
from lightning_dgl.schedules import Schedule
from lightning_dgl.splitting import SplitPoint, in_mode, output_shape, preserved_state

# Arguments


def number_of_classes(network: nn.Module, example_input: Tensor) -> int:
    """Return how many classes ``network`` scores.

    Raises:
        ValueError: if it does not return class scores (N, classes), in train and in eval mode.
    """
    for training in (False, True):
        shape = output_shape(network, example_input, training)
        if shape is None or len(shape) != 2 or shape[0] != len(example_input) or shape[1] < 2:
            raise ValueError(
                f"network must return class scores (N, classes), but {type(network).__name__} returns "
                f"{'something other than one tensor' if shape is None else f'shape {shape}'} in "
                f"{'train' if training else 'eval'} mode for N={len(example_input)}. Give it a classifier, or switch "
                "off further outputs (torchvision's googlenet and inception_v3: aux_logits=False)."
            )
        num_classes = shape[1]
    return num_classes


def check_head(block: int, head: nn.Module, point: SplitPoint, features: Tensor, num_classes: int) -> None:
    """Run ``head`` on ``features`` of its block's output shape.

    Raises:
        TypeError: if it is not a module.
        ValueError: if it does not take them, does not return (N, classes), or overwrites them.
    """
    if not isinstance(head, nn.Module):
        raise TypeError(f"head must make an nn.Module, block {block} got {type(head).__name__}.")
    images = point.as_images(features)
    made_from = (
        "Head callables get (channels, spatial_size, num_classes) = "
        f"({point.channels}, {point.spatial_size}, {num_classes})."
    )
    for training in (True, False):
        with preserved_state(head), in_mode(head, training), torch.no_grad():
            try:
                shape = tuple(head(images).shape)
            except Exception as error:
                raise ValueError(
                    f"The head of block {block} does not take its block's output, (N, C, H, W) = {tuple(images.shape)} "
                    f"({type(error).__name__}: {error}). {made_from}"
                ) from error
    if images._version > 0:
        raise ValueError(
            f"The head of block {block} overwrites its input in place, which the next block reads too. Pass "
            "inplace=False to its first layer."
        )
    if shape != (len(features), num_classes):
        raise ValueError(
            f"The head of block {block} must return class scores ({len(features)}, {num_classes}), but returns "
            f"{shape}. {made_from}"
        )


def check_optimizer(block: int, name: str, optimizer: Any, parameters: Sequence[BlockParameters]) -> None:
    """Check what an optimizer factory made for ``block``, called ``name``, of J blocks with these ``parameters``.

    Raises:
        TypeError: if it is not an optimizer.
        ValueError: unless it trains what of the block's parameters is not frozen, and nothing else.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, block {block} got {type(optimizer).__name__}.")
    given = {id(p): name for name, p in parameters[block].named()}
    others = {id(p): f"{name!r} of block {j}" for j, own in enumerate(parameters) for name, p in own.named()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    remedy = (
        "Let it train exactly the parameters that it is called with; to group them by name, iterate over "
        "params.named(), which gives (name, parameter) pairs of this block."
    )
    foreign = [others.get(id(p), "one of no block") for p in trained if id(p) not in given]
    if foreign:
        raise ValueError(
            f"The optimizer of block {block} ({name}) trains parameters that are not the block's: {foreign[0]}"
            f"{f' and {len(foreign) - 1} more' if len(foreign) > 1 else ''}. {remedy}"
        )
    left_out = given.keys() - {id(p) for p in trained}
    frozen = {id(p) for p in parameters[block] if not p.requires_grad}
    forgotten = [given[key] for key in given if key in left_out - frozen]
    if forgotten:
        raise ValueError(
            f"The optimizer of block {block} ({name}) leaves out {forgotten[0]!r}"
            f"{f' and {len(forgotten) - 1} more' if len(forgotten) > 1 else ''}, which would not train. {remedy} To "
            "keep a parameter as it is, call requires_grad_(False) on it."
        )


def check_loss(loss: Any, num_classes: int, device: torch.device) -> None:
    """Try ``loss`` on class scores (2, classes).

    Raises:
        TypeError: if it cannot be called.
        ValueError: if it has parameters, or returns something other than a scalar.
    """
    if isinstance(loss, type) or not callable(loss):
        name = loss.__name__ if isinstance(loss, type) else type(loss).__name__
        raise TypeError(f"loss must be a callable (scores, targets) -> scalar, got {name}. Pass one, such as {name}().")
    if isinstance(loss, nn.Module) and next(loss.parameters(), None) is not None:
        raise ValueError(
            f"loss ({type(loss).__name__}) has parameters, which no block trains. Put them into the heads."
        )
    scores = torch.zeros(2, num_classes, device=device)
    devices = [] if device.type == "cpu" else [device]
    kept = preserved_state(loss) if isinstance(loss, nn.Module) else nullcontext()
    with kept, torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        for targets in (torch.zeros(2, dtype=torch.long, device=device), scores.softmax(dim=1)):
            try:
                value = loss(scores, targets)
            except Exception:  # it may want targets of another kind
                continue
            if not isinstance(value, Tensor) or value.ndim > 0:
                raise ValueError(f"loss must return a scalar, got {_no_scalar(value)}")


def check_scalar(loss: Any, block: int) -> Tensor:
    """Return the local loss of ``block``; raise ValueError unless it is a scalar."""
    if isinstance(loss, Tensor) and loss.ndim == 0:
        return loss
    raise ValueError(f"The local loss of block {block} must be a scalar, got {_no_scalar(loss)}")


def _no_scalar(loss: Any) -> str:
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    return f"{found}. Average over the samples (losses of PyTorch: reduction='mean')."


def warn_of_large_heads(network: nn.Module, heads: nn.ModuleList) -> None:
    """Warn if auxiliary heads have more parameters than the network, and more than a few."""
    of_heads, of_network = num_parameters(heads), num_parameters(network)
    if of_heads > max(of_network, FEW_PARAMETERS * len(heads)):
        warnings.warn(
            f"The auxiliary heads together have {of_heads:,} parameters, {of_heads / of_network:.1f} times the "
            f"network's {of_network:,}. head='augmented' makes heads that keep to about half; or make fewer blocks.",
            stacklevel=3,
        )


# Batches


def check_batch(batch: Any, batch_idx: int, num_classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return ``batch`` as (inputs, targets).

    Raises:
        TypeError: if it is not a pair of tensors.
        ValueError: if the targets have another shape than (N,) or (N, classes), or are not classes of the network.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
        raise TypeError(
            f"A batch must be a pair of tensors (inputs, targets), got {_describe(batch)}. Let the data set or its "
            "collate_fn return such pairs."
        )
    inputs, targets = batch
    expected = (len(inputs), num_classes) if targets.is_floating_point() else (len(inputs),)
    if tuple(targets.shape) != expected:
        raise ValueError(
            f"Targets must be class indices of shape ({len(inputs)},) or class probabilities of shape "
            f"({len(inputs)}, {num_classes}), got targets of shape {tuple(targets.shape)} and dtype {targets.dtype}."
        )
    # On an accelerator looking at the values waits for them, so only the first batch of each epoch is looked at.
    if not targets.is_floating_point() and (targets.device.type == "cpu" or batch_idx == 0):
        wrong = (targets < 0) | (targets >= num_classes)
        if ignore_index is not None:
            wrong &= targets != ignore_index
        if wrong.any():
            raise ValueError(
                f"Targets must be from 0 to {num_classes - 1}, the network has {num_classes} classes, got "
                f"{targets[wrong][0].item()}. Fix the labels or the network's number of classes."
            )
    return inputs, targets


def check_sample_size(inputs: Sized, heads: nn.Module) -> None:
    """Raise ValueError if BatchNorm in a head would have to train on a single sample."""
    if len(inputs) == 1 and any(isinstance(module, nn.BatchNorm1d) for module in heads.modules()):
        raise ValueError(
            "A training batch has one sample, on which the BatchNorm of the auxiliary heads cannot train. Pass "
            "drop_last=True to the DataLoader, or another batch size."
        )


def check_batch_sizes(trainer: Trainer, heads: nn.Module) -> None:
    """Raise ValueError if the training data loader is going to yield a single sample that BatchNorm cannot train on."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or loader.collate_fn is not default_collate or loader.batch_size is None:
        return
    sampler: Any = loader.sampler
    left = 0 if loader.drop_last or not hasattr(sampler, "__len__") else len(sampler) % loader.batch_size
    if loader.batch_size == 1 or (left == 1 and trainer.num_training_batches == len(loader)):
        check_sample_size([None], heads)


def _describe(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch)}"
    return type(batch).__name__


# What a Trainer is asked to do


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
                    "Start every rank with the same script, arguments and versions (and where blocks are balanced by "
                    "measured time, pass the outcome as split_at)."
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
        if (monitored or "").startswith("train/") and (steps := saves_every_n_train_steps(callback)):
            raise ValueError(
                f"ModelCheckpoint monitors {monitored!r} every {steps} steps, but ranks know each other's training "
                "values at the end of an epoch. Monitor a val/ metric, or pass save_on_train_epoch_end=True instead "
                "of every_n_train_steps."
            )
