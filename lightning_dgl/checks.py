"""What a DGLModule asks of its arguments and of each batch; errors name the argument, its value and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dgl.splitting import SplitPoint, in_mode, output_shape, preserved_state

# Arguments


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def check_length(name: str, values: Sequence[Any], expected: int, why: str) -> None:
    """Raise ValueError unless ``values`` has ``expected`` entries."""
    if len(values) != expected:
        raise ValueError(f"{name} is a list of {len(values)}, but must have {expected}: {why}.")


def one_per_block(name: str, factory: Any, num_blocks: int) -> list[Any]:
    """``factory``, a callable or a list of callables, as a list with one for each block."""
    if isinstance(factory, (list, tuple)):
        check_length(name, factory, num_blocks, "one for each block")
    factories = list(factory) if isinstance(factory, (list, tuple)) else [factory] * num_blocks
    for make in factories:
        if not callable(make):
            raise TypeError(f"{name} must be a callable (or a list of callables), got {type(make).__name__}.")
    return factories


def number_of_classes(network: nn.Module, example_input: Tensor) -> int:
    """How many classes ``network`` scores.

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


# Batches


def check_batch(batch: Any, batch_idx: int, num_classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """``batch`` as (inputs, targets).

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


def class_indices(targets: Tensor) -> Tensor:
    """Targets as metrics take them: class probabilities, as of mixup, count as their most probable class."""
    return targets.argmax(dim=1) if targets.is_floating_point() else targets


def _describe(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch)}"
    return type(batch).__name__
