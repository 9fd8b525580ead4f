"""Checks of arguments and of batches.

Errors name the argument, its value and what to do. Whatever is known at the start is checked there.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Sized
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_dgl.optim import BlockParameters
from lightning_dgl.splitting import (
    SplitError,
    SplitPoint,
    in_mode,
    num_parameters,
    output_shape,
    preserved_state,
)

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
    """Warn if auxiliary heads have more parameters than the network, and so many that it matters."""
    of_heads, of_network = num_parameters(heads), num_parameters(network)
    if of_heads > max(of_network, 1_000_000):
        warnings.warn(
            f"The auxiliary heads together have {of_heads:,} parameters, {of_heads / of_network:.1f} times the "
            f"network's {of_network:,}. head='augmented' makes heads that keep to about half; or make fewer blocks.",
            stacklevel=5,
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


def part_that_needs_two_samples(
    network: nn.Module, example_input: Tensor, heads: nn.ModuleList, points: Sequence[SplitPoint]
) -> str | None:
    """Return the name of what cannot train on a single sample, because of BatchNorm; None if everything can."""
    parts = [("the network", network, example_input)]
    for j, (head, point) in enumerate(zip(heads, points, strict=True)):
        features = torch.empty(point.shape, dtype=example_input.dtype, device=example_input.device)
        parts.append((f"the auxiliary head of block {j}", head, point.as_images(features)))
    for name, module, example in parts:
        if any(isinstance(child, _BatchNorm) for child in module.modules()):
            try:
                output_shape(module, example[:1], training=True)
            except SplitError as error:
                if "more than 1 value per channel" in str(error):
                    return name
    return None


def check_sample_size(inputs: Sized, needs_two_samples: str | None) -> None:
    """Raise ValueError if BatchNorm would have to train on a single value; see `part_that_needs_two_samples`."""
    if len(inputs) == 1 and needs_two_samples is not None:
        raise ValueError(
            f"A training batch has one sample, on which the BatchNorm of {needs_two_samples} cannot train. Pass "
            "drop_last=True to the DataLoader, or another batch size."
        )


def _describe(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch)}"
    return type(batch).__name__
