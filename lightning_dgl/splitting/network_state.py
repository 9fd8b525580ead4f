"""Running a network and leaving it as it was: its modes, its buffers, the random generators."""

from __future__ import annotations

import random
import sys
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
    with preserved_random(network):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)


@contextmanager
def preserved_random(network: nn.Module | None = None) -> Iterator[None]:
    """Restore the random generators of Python, NumPy and PyTorch, those of the network's accelerators included."""
    devices = set() if network is None else _accelerators(network)
    generators = [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
            for device, state in generators:
                torch.get_device_module(device).set_rng_state(state, device)


def seed_generators(network: nn.Module, seed: int) -> None:
    """Seed the generators that :func:`preserved_random` restores; those of other accelerators keep the user's seed."""
    torch.default_generator.manual_seed(seed)
    for device in _accelerators(network):
        seed_accelerator(device, seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def seed_accelerator(device: torch.device, seed: int) -> None:
    """Seed the default generator of one accelerator, as ``torch.manual_seed`` does that of every one."""
    state = torch.Generator(device).manual_seed(seed).get_state()
    torch.get_device_module(device).set_rng_state(state, device)


def _accelerators(network: nn.Module) -> set[torch.device]:
    devices = {tensor.device for tensor in (*network.parameters(), *network.buffers())}
    return {device for device in devices if device.type not in ("cpu", "meta")}
