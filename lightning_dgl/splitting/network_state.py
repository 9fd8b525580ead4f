"""Running a network and leaving it as it was: its modes, its buffers, the random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Put ``network`` in train or eval mode, and every submodule back in the mode it had."""
    before = {module: module.training for module in network.modules()}
    network.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def preserved_state(network: nn.Module) -> Iterator[None]:
    """Undo what running the network does to its buffers (BatchNorm statistics) and to the random generators."""
    saved = [(buffer, buffer.clone()) for buffer in network.buffers()]
    devices = {tensor.device for tensor in (*network.parameters(), *network.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)
