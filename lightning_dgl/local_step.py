"""A local step: its gradients are computed right after the block's forward, and delivered in Lightning's backward.

Computing them at once frees the block's activations before the next block runs, so that one block's activations are
all that a step holds. Delivering them through autograd, as the gradient of the loss that ``training_step`` returns,
leaves the rest of Lightning's step as it is: when gradients are zeroed, which hooks run, how they accumulate, and how
DistributedDataParallel averages them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Gradients = list[Tensor | None]


@dataclass
class LocalStep:
    """What one block's step on one batch came to.

    Attributes:
        loss: the local loss, a detached scalar.
        scores: detached class scores (N, classes).
        targets: what they were scored against.
        parameters: what the block trains.
        gradients: their gradients, accumulation and loss scaling included; None where there is none.
        buffers: buffers with their values from before the step, for :meth:`undo`.
    """

    loss: Tensor
    scores: Tensor
    targets: Tensor
    parameters: Sequence[nn.Parameter]
    gradients: Gradients
    buffers: list[tuple[Tensor, Tensor]]

    def undo(self) -> None:
        """Drop the gradients and put the buffers back, as if the block had not seen the batch."""
        self.gradients = [None] * len(self.gradients)
        for buffer, before in self.buffers:
            buffer.copy_(before)


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


def deliver(steps: Iterable[LocalStep], dense: bool = False) -> Tensor:
    """The sum of the local losses, whose backward adds each step's gradients to the ``.grad`` of its parameters.

    The value that backward starts from does not scale them: accumulation and loss scaling are in them already.

    Args:
        steps: one for each block, in order.
        dense: deliver zeros where there is no gradient; replicas that average theirs wait for every one.
    """
    steps = list(steps)
    if not steps:
        return torch.zeros((), requires_grad=True)
    total = torch.stack([step.loss.float() for step in steps]).sum()
    gradients = [gradient for step in steps for gradient in step.gradients]
    parameters = [parameter for step in steps for parameter in step.parameters]
    if dense:
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    if not parameters:
        total.requires_grad_()
    return _Deliver.apply(total, gradients, *parameters)  # type: ignore[no-untyped-call]
