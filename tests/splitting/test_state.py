"""Looking at a network never changes it, whatever its forward stores."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_dgl import find_split_points, split
from lightning_dgl.splitting import count_flops, output_shape
from tests.splitting.networks import Around, compose

GRIDS: dict[int, Tensor] = {}


@functools.lru_cache
def cached_grid(size: int) -> Tensor:
    return torch.linspace(-1, 1, size)


class Grid(nn.Module):
    grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.linspace(-1, 1, x.shape[-1])
        return x * self.grid


class GridInAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grids: dict[str, list[Tensor]] = {"all": []}

    def forward(self, x: Tensor) -> Tensor:
        if not self.grids["all"]:
            self.grids["all"].append(torch.linspace(-1, 1, x.shape[-1]))
        return x * self.grids["all"][0]


class GridOfTheClass(nn.Module):
    grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if GridOfTheClass.grid is None:
            GridOfTheClass.grid = torch.linspace(-1, 1, x.shape[-1])
        return x * GridOfTheClass.grid


class GlobalGrid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        if size not in GRIDS:
            GRIDS[size] = torch.linspace(-1, 1, size)
        return x * GRIDS[size] * cached_grid(x.shape[-2])


class FirstCall(nn.Module):
    """Sets its weight from the first batch, as ActNorm does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.done, self.calls = nn.Parameter(torch.ones(1)), False, {"forward": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.calls["forward"] += 1
        if not self.done:
            self.weight.data.fill_(float(x.std()))
            self.done = True
        return x / self.weight


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numpy, self.python, self.torch = np.random.default_rng(0), random.Random(0), torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.numpy.random() + self.python.random() + torch.rand(1, generator=self.torch)
        return x + np.random.rand() + random.random()


def state_of(module: nn.Module) -> Any:
    """Everything that the parts above may change, in comparable form."""
    if isinstance(module, FirstCall):
        return module.done, module.calls["forward"], float(module.weight.detach())
    if isinstance(module, Draws):
        own = (str(module.numpy.bit_generator.state), module.python.getstate(), module.torch.get_state().tolist())
        return own, np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()
    if isinstance(module, GridInAList):
        return len(module.grids["all"])
    return getattr(module, "grid", None), list(GRIDS)


LOOKS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "find_split_points": find_split_points,
    "split": lambda network, x: split(network, 2, example_input=x),
    "memory": lambda network, x: split(network, 2, example_input=x, balance="memory"),
    "output_shape": lambda network, x: output_shape(network, x, training=True),
    "count_flops": count_flops,
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("part", [Grid, GridInAList, GridOfTheClass, GlobalGrid, FirstCall, Draws])
def test_a_look_leaves_what_a_forward_stores(part: type[nn.Module], look: str) -> None:
    network, x = Around(part()), torch.randn(2, 3, 8, 8)
    GRIDS.clear()
    cached_grid.cache_clear()
    GridOfTheClass.grid = None
    before = state_of(network.part)
    LOOKS[look](network, x)
    assert state_of(network.part) == before
    y = network(x)
    assert type(y) is Tensor
    assert y.device.type == "cpu"


def test_scripted_parts_keep_their_weights() -> None:
    network, x = Around(torch.jit.script(nn.Conv2d(4, 4, 3, padding=1))), torch.randn(2, 3, 8, 8)
    network.eval()
    before = network(x)
    blocks = split(network, 2, example_input=x)
    assert type(network.part.weight) is nn.Parameter
    assert torch.equal(network(x), before)
    assert torch.equal(compose(blocks, x), before)


def test_hooks_that_write_to_what_they_enclose_do_not_write_while_looking() -> None:
    network, seen = Around(nn.Conv2d(4, 4, 1)), list[Tensor]()
    network.part.register_forward_hook(lambda module, args, output: seen.append(output))
    blocks = split(network, 2, example_input=torch.zeros(2, 3, 8, 8))
    assert seen == []
    compose(blocks, torch.zeros(2, 3, 8, 8))
    assert len(seen) == 1
