"""What a trace cannot reproduce is kept in a module that stays whole, followed, or refused."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_dgl import SplitError, find_split_points, split
from tests.splitting.networks import Around, Network, assert_equivalent, compose

SEEN: list[Tensor] = []


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def with_checkpoint(module: Any, x: Tensor, reentrant: bool = False) -> Tensor:
    return checkpoint(module.middle, x, use_reentrant=reentrant)


def without_autocast(module: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return module.middle(x.float())


def append_outside(module: Any, x: Tensor) -> Tensor:
    SEEN.append(x)
    return module.middle(x)


def append_to_attribute(module: Any, x: Tensor) -> Tensor:
    module.seen.append(x)
    return module.middle(x)


def drop(module: Any, x: Tensor) -> Tensor:
    return module.middle(x) * (0 if np.random.rand() < 0.5 else 1)


UNSEEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "checkpoint": (with_checkpoint, "checkpoints activations"),
    "reentrant checkpoint": (lambda module, x: with_checkpoint(module, x, True), "checkpoints activations"),
    "autocast": (without_autocast, "switches gradients or autocast"),
    "autograd function": (lambda module, x: Reversed.apply(module.middle(x)), "autograd function Reversed"),
    "append": (append_to_attribute, "assigns `self.seen`"),
    "append outside": (append_outside, "keeps an activation in a place outside"),
    "numpy": (drop, "draws random numbers"),
}


class InRoot(Network):
    def __init__(self, act: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.act, self.seen = act, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.act(self, torch.relu(self.stem(x)))))


class Part(nn.Module):
    def __init__(self, act: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.act, self.seen = act, list[Tensor]()
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x)


@pytest.mark.parametrize("kind", UNSEEN)
def test_in_the_root_it_is_refused(kind: str) -> None:
    act, reason = UNSEEN[kind]
    with pytest.raises(SplitError, match=f"InRoot.*{reason}.*submodule"):
        find_split_points(InRoot(act), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("kind", [kind for kind in UNSEEN if kind != "append outside"])
def test_in_a_submodule_it_is_kept(kind: str) -> None:
    network, x = Around(Part(UNSEEN[kind][0])).eval(), torch.randn(2, 3, 8, 8)
    assert not any(point.name.startswith("part.") for point in find_split_points(network, x))
    blocks = split(network, split_at=["tanh", "part"], example_input=x)
    calls: list[int] = []
    network.part.register_forward_pre_hook(lambda *_: calls.append(len(calls)))
    SEEN.clear()
    compose(blocks, x)
    assert calls == [0]
    if kind != "numpy":
        assert_equivalent(network, blocks, x)


def test_activations_kept_outside_of_the_network_are_refused_anywhere() -> None:
    with pytest.raises(SplitError, match="keeps an activation in a place outside of the network"):
        find_split_points(Around(Part(append_outside)), torch.randn(2, 3, 8, 8))


class Settings(Network):
    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.double = 1.0, False
        self.config = types.SimpleNamespace(scale=1.0)
        self.act = torch.relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x)) * self.config.scale
        x = self.norm(self.middle(x))
        return self.head(x * 2 if self.double else x) / self.temperature


@pytest.mark.parametrize("compiled", [False, True])
def test_attributes_that_forward_reads_are_followed(compiled: bool) -> None:
    network, x = Settings(), torch.randn(2, 3, 8, 8)
    blocks = split(network, split_at=["stem", "middle"], example_input=x)
    if compiled:
        torch._dynamo.reset()
        blocks[2]._compiled = {mode: lambda function, *args: function(*args) for mode in (True, False)}
    for name, value in (("temperature", 10.0), ("double", True), ("act", torch.tanh), ("temperature", 1.0)):
        setattr(network, name, value)
        assert_equivalent(network, blocks, x)
    network.config.scale = 3.0
    assert_equivalent(network, blocks, x)


def test_a_setting_that_brings_other_parameters_is_refused() -> None:
    class Optional(Network):
        use = False

        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.middle(torch.relu(self.stem(x)))
            return self.head(self.norm(self.extra(x) if self.use else x))

    network, x = Optional(), torch.randn(2, 3, 8, 8)
    blocks = split(network, split_at=["relu"], example_input=x)
    network.use = True
    with pytest.raises(SplitError, match=r"`use` was changed.*'extra.bias'.*Split again"):
        compose(blocks, x)


@pytest.mark.parametrize("path", ["", "part", "part.body"])
def test_hooks_set_after_the_split_run_or_are_refused(path: str) -> None:
    from tests.splitting.networks import Composite

    network, x = Around(Composite()).eval(), torch.randn(2, 3, 8, 8)
    blocks = split(network, split_at=["part.body.0"], example_input=x)
    handle = network.get_submodule(path).register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(SplitError, match=f"{path or 'the network'} got hooks"):
        compose(blocks, x)
    with torch.no_grad(), pytest.warns(UserWarning, match="got hooks; they do not run"):
        compose(blocks, x)
    handle.remove()
    assert_equivalent(network, blocks, x)


class KindOfInput(nn.Module):
    """Does something else with a proxy than with a tensor, and nothing shows it but the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.tanh(x * 2) if type(x) is Tensor else torch.tanh(x)


def test_a_module_whose_trace_differs_is_kept_whole() -> None:
    network, x = Around(KindOfInput()), torch.randn(2, 3, 8, 8)
    assert_equivalent(network, split(network, 4, example_input=x), x)
    with pytest.raises(SplitError, match=r"'part' is kept whole \(blocks that cut it did not compute"):
        split(network, split_at=["part.conv"], example_input=x)
