"""Styles of forward and names of modules that must split like any other."""

from __future__ import annotations

import copy
import pickle
import random
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dgl import SplitError, find_split_points, split
from tests.splitting.networks import Around, Network, assert_equivalent, split_everywhere


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 8, 8)


class DirectForward(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm.forward(self.middle.forward(self.stem(x))))


class ModuleMadeInForward(Network):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Softmax(1)(self.head(nn.Sequential(self.stem, self.norm, self.middle)[1:](self.stem(x))))


class Merge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, skip: Any = None) -> Tensor:
        return self.conv(torch.cat([x, skip], 1) if isinstance(skip, Tensor) else x)


class Merges(Network):
    def __init__(self) -> None:
        super().__init__()
        self.merge = Merge()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(self.norm(self.merge(x, self.middle(x))))


@pytest.mark.parametrize("kind", [DirectForward, ModuleMadeInForward, Merges])
def test_styles_of_forward(kind: type[Network], x: Tensor) -> None:
    network = kind()
    blocks = split(network, 2, example_input=x)
    for training in (True, False):
        network.train(training)
        assert_equivalent(network, blocks, x)


def test_a_forward_set_on_the_instance(x: Tensor) -> None:
    network = Network()
    network.forward = types.MethodType(lambda self, x: self.head(torch.relu(self.stem(x))) * 2, network)
    assert_equivalent(network, split(network, split_at=["relu"], example_input=x), x)
    other = Network()
    other.forward = lambda x: other.head(torch.tanh(other.stem(x)))  # encloses the network
    assert_equivalent(other, split(other, split_at=["tanh"], example_input=x), x)


class PythonDrop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0 if self.training and random.random() < 0.5 else x


class Checked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.min() >= 0
        return x - 0.5


def test_the_check_seeds_python_and_uses_the_examples_values(x: Tensor) -> None:
    for _ in range(10):
        split(Around(PythonDrop()), 2, example_input=x)
    split(nn.Sequential(Checked(), Network()), 2, example_input=x)
    split(nn.Sequential(Checked(), Network()), 2, example_input=torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("name", ["global", "None", "a'b", 'a"b', "a b", "tensors", "_network", "x", "self"])
def test_any_name_of_a_module_will_do(name: str, x: Tensor) -> None:
    inner = nn.Sequential()
    inner.add_module(name, nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()))
    network = nn.Sequential()
    network.add_module(name, inner)
    network.add_module("flat", nn.Flatten())
    network.add_module("last", nn.Linear(256, 5))
    blocks = split_everywhere(network, x)
    assert_equivalent(network, blocks, x)
    assert_equivalent(*pickle.loads(pickle.dumps((network, blocks))), x)
    assert_equivalent(*copy.deepcopy((network, blocks)), x)
    assert {key for block in blocks for key in block.state_dict()} == set(network.state_dict())


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(4, 4, 1), nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + self.shortcut(x))


def test_the_end_of_a_unit_bears_the_units_name(x: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), Unit(), Unit(), nn.Flatten(), nn.Linear(256, 5))
    points = {point.name: point for point in find_split_points(network, x)}
    assert [name for name, point in points.items() if point.rank == 0] == ["1", "2"]
    assert points["1"].aliases == ("2.shortcut",)  # returns its input; still a name of the place
    assert points["0"].aliases == ("1.shortcut",)


class TwoInputs(Network):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(5))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (TwoInputs(), r"takes more than one input\). Wrap it in a module whose forward takes one tensor"),
        (torch.compile(Network()), r"compiled with torch.compile\). Pass the network itself \(network._orig_mod\)"),
        (lazy(), "lazy layers without shapes.*Run the network once on a batch"),
        (torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1))), r"TorchScript\). Pass the network that"),
    ],
)
def test_the_remedy_fits(network: nn.Module, message: str, x: Tensor) -> None:
    with pytest.raises(SplitError, match=message):
        find_split_points(network, x)


def test_the_remedy_for_lazy_layers_works(x: Tensor) -> None:
    network = lazy()
    network(x)
    assert_equivalent(network, split(network, 2, example_input=x), x)
