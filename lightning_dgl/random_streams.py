"""A random stream for each block, so that dropout draws the same masks on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

RandomState = dict[str, torch.Tensor]
"""States of the default generators, by device type ("cpu", and that of an accelerator where there is one)."""


def get_random_state(device: torch.device) -> RandomState:
    """State of the CPU's default generator, and of ``device``'s."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Restore what :func:`get_random_state` returned; a device type that ``state`` lacks is left as it is."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type].cpu())


class RandomStreams:
    """The random streams of J blocks.

    Block 0 draws from the default generators, as data loading does, which is on the same rank. Each further block has a
    stream of its own, which is seeded with ``seed + block`` and goes on from one local step to the next.
    """

    def __init__(self, num_blocks: int, seed: int) -> None:
        self._seed = seed
        self._states: list[RandomState | None] = [None] * num_blocks

    @contextmanager
    def of(self, block: int, device: torch.device) -> Iterator[None]:
        """Within this context, the default generators draw from the stream of ``block``."""
        if block == 0:
            yield
            return
        outside = get_random_state(device)
        state = self._states[block]
        if state is None:
            torch.manual_seed((self._seed + block) % 2**63)
        else:
            set_random_state(state, device)
        try:
            yield
        finally:
            self._states[block] = get_random_state(device)
            set_random_state(outside, device)

    def __getitem__(self, block: int) -> RandomState | None:
        """State of the stream of ``block``; None before its first use, and for block 0."""
        return self._states[block]

    def load(self, states: Sequence[Any]) -> None:
        """Go on from these states, one for each block."""
        self._states = list(states)
