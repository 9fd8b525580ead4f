"""The batch on which a network is looked at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_dgl.splitting.errors import SplitError


def example_batch(network: nn.Module, example_input: Tensor | Sequence[int]) -> Tensor:
    """Return ``example_input``, or zeros of that shape, as a batch of at least two samples.

    One sample is doubled, because BatchNorm cannot train on one.

    Raises:
        SplitError: if it is not a batch, or not on the network's device.
    """
    device = next((p.device for p in network.parameters()), None)
    if isinstance(example_input, Sequence) and example_input and all(isinstance(n, int) for n in example_input):
        example_input = torch.zeros(*example_input, device=device)
    if not isinstance(example_input, Tensor) or example_input.ndim < 2 or len(example_input) < 1:
        given = f"shape {tuple(example_input.shape)}" if isinstance(example_input, Tensor) else repr(example_input)
        raise SplitError(
            "example_input must be a batch of inputs such as torch.zeros(2, 3, 32, 32), batch dimension first, got "
            f"{given}."
        )
    if device is not None and device != example_input.device:
        raise SplitError(
            f"example_input is on {example_input.device}, but the network is on {device}. Move one of them, e.g. "
            f"example_input.to({str(device)!r})."
        )
    return torch.cat([example_input, example_input]) if len(example_input) == 1 else example_input
