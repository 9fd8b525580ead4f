"""The gradients of a local step: computed right after a block's forward, delivered when Lightning calls backward.

Computing them at once frees the block's activations before the next block runs, so that one block's activations are
all that a step holds. Delivering them through autograd, as the gradient of the loss that ``training_step`` returns,
leaves the rest of Lightning's step as it is: when gradients are zeroed, which hooks run, how they accumulate, and how
DistributedDataParallel averages them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Gradients = list[Tensor | None]


def local_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Gradients:
    """Gradients of a local ``loss`` in the block's ``parameters`` (None where unused); frees its activations."""
    if not parameters or not loss.requires_grad:  # nothing to train, or the block is frozen
        return [None] * len(parameters)
    # As outside of Lightning's forward context: autocast would change the dtype of what backward computes.
    with torch.autocast(loss.device.type, enabled=False), _hooks_put_aside(parameters):
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))


@contextmanager
def _hooks_put_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep hooks on parameters (``parameter.register_hook``) for the delivery; else they would run twice."""
    hooks = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    try:
        for parameter, _ in hooks:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, own in hooks:
            parameter._backward_hooks = own


class _Deliver(torch.autograd.Function):
    """Passes the loss on; its backward hands each parameter the gradient that was computed before."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Gradients, *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Given away rather than kept, so that each can become the parameter's .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        return (None, None, *gradients)


def deliver(loss: Tensor, parameters: Sequence[nn.Parameter], gradients: Gradients) -> Tensor:
    """A loss of the same value whose backward adds ``gradients`` to the ``.grad`` of ``parameters``.

    The value that backward starts from does not scale them: accumulation and loss scaling are in them already.
    """
    return _Deliver.apply(loss, gradients, *parameters)  # type: ignore[no-untyped-call]
