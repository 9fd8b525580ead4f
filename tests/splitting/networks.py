"""What the tests of splitting share: networks with all sorts of forwards, and the comparison of blocks with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_dgl import find_split_points, split
from tests.runs import small_cnn

# Blocks compared with their network


def compose(blocks: nn.ModuleList, x: Tensor) -> Any:
    """Run the blocks one after another, and check that none overwrites what an earlier one returned."""
    crossing: list[tuple[Tensor, int]] = []
    for block in blocks:
        x = block(x)
        crossing.append((x, x._version if isinstance(x, Tensor) else 0))
    for j, (tensor, version) in enumerate(crossing[:-1]):
        assert tensor._version == version, f"the output of block {j} was overwritten"
    return x


def assert_same(names: Sequence[str], actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Bit for bit, and None where None is expected."""
    for name, a, b in zip(names, actual, expected, strict=True):
        same = a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b)
        assert same, f"{name} differs"


def assert_equivalent(
    network: nn.Module, blocks: nn.ModuleList, x: Tensor, *, gradients: bool = True, enter: Callable[[], Any] = int
) -> set[str]:
    """Assert that the blocks return what the network returns, and leave the same gradients and buffers behind.

    Args:
        enter: called between the two runs; a chance to set the mode of the blocks by other means than the network's.

    Returns:
        The names of the parameters that had a gradient.
    """
    parameter_names = [name for name, _ in network.named_parameters()]
    buffer_names = [name for name, _ in network.named_buffers()]
    buffers = [buffer.clone() for buffer in network.buffers()]

    def run(forward: Callable[[Tensor], Any]) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        torch.manual_seed(0)
        with torch.set_grad_enabled(gradients):
            outputs = [output for output in tree_leaves(forward(x.clone())) if output is not None]
            if gradients:
                torch.stack([output.square().mean() for output in outputs]).sum().backward()
        left = [buffer.clone() for buffer in network.buffers()]
        found = [parameter.grad for parameter in network.parameters()]
        network.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(network.buffers(), buffers, strict=True):
                buffer.copy_(value)
        return [output.detach() for output in outputs], found, left

    expected = run(network)
    enter()
    actual = run(lambda x: compose(blocks, x))
    assert_same([f"output {i}" for i in range(len(expected[0]))], actual[0], expected[0])
    if gradients:
        assert any(grad is not None and grad.any() for grad in expected[1]), "there is nothing to compare"
    assert_same(parameter_names, actual[1], expected[1])
    assert_same(buffer_names, actual[2], expected[2])
    return {name for name, grad in zip(parameter_names, expected[1], strict=True) if grad is not None}


def split_everywhere(network: nn.Module, x: Tensor) -> nn.ModuleList:
    names = [point.name for point in find_split_points(network, x) if not point.in_place_hazard]
    assert len(names) >= 3
    return split(network, split_at=names, example_input=x)


# Networks


class Network(nn.Module):
    """Layers to write different forwards with; takes (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.classifier = nn.Linear(4, 5)

    def head(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.middle(self.stem(x))))


class Around(Network):
    """A network with one submodule of interest in the middle."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.middle(self.part(torch.tanh(self.stem(x))))))


class Functional(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(x + self.norm(self.middle(x)))
        return self.head(x)


class ShapeChecks(Network):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError("not an RGB image")
        assert x.dim() == 4
        torch._assert(x.shape[2] >= 8, "too small")
        x = torch.relu(self.stem(x))
        n, c, h, w = x.size()
        x = self.middle(x.view(n, c, h * w).reshape(n, c, h, w))
        return self.head(self.norm(x))


class ModeInRoot(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.middle(x) * 0.5 if self.training else self.middle(x)
        return self.head(F.dropout(self.norm(x), 0.5, self.training))


class ComparedModeInRoot(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if self.training == True:  # noqa: E712 - found in the wild, and must not be frozen
            x = x * 0.5
        return self.head(self.norm(self.middle(x)))


class TupleInTraining(Network):
    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.stem(x))
        x = self.norm(self.middle(x))
        return (self.head(x), None, {"features": x}) if self.training else self.head(x)


class StateInRoot(Network):
    """Its own forward reads buffers and a parameter, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((1, 4, 1, 1), 2.0))
        self.register_buffer("count", torch.tensor(0))
        self.gain = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x) * self.scale)
        self.count.add_(1)
        x = self.norm(self.middle(x)) * self.gain
        return self.head(x / self.scale)


class InPlace(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += 1
        x = F.relu_(self.middle(x))
        x = self.norm(x)
        x[:, 0] = 0
        x = x * 2
        F.relu_(x.view(-1))
        return self.head(x)


class CalledTwice(Network):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.drop(self.stem(x)))
        return self.head(self.act(self.drop(self.norm(self.middle(x)))))


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
        return (x + y) * scale


class Halves(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = torch.chunk(x, 2, dim=1)
        return first * 2, {"second": second}


class ManyTensors(Network):
    def __init__(self) -> None:
        super().__init__()
        self.add, self.halves = Add(), Halves()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.add(x, self.middle(x), scale=0.5)
        first, rest = self.halves(x)
        x = self.norm(torch.cat([first, rest["second"]], 1))
        return self.head(sum(part.repeat(1, 2, 1, 1) for part in torch.chunk(x, 2, dim=1)))


class Ignores(nn.Module):
    def forward(self, x: Tensor, skip: Tensor, shape: torch.Size | None = None) -> Tensor:
        return x + 1


class IgnoredArguments(Network):
    """A tensor that crosses a cut only to be ignored need not cross it."""

    def __init__(self) -> None:
        super().__init__()
        self.ignores = Ignores()

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.relu(self.stem(x))
        x = self.ignores(self.middle(skip), skip * 2)
        return self.head(self.norm(self.ignores(x, x, shape=x.shape)))


class Loop(Network):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            x = x + torch.relu(layer(x)) * (i + 1)
        return self.head(self.norm(x))


class Composite(nn.Module):
    """Can be cut inside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.register_buffer("shift", torch.ones(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shift) + self.shift


class ReadsMode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3 if self.training else x


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(1)


class Branch(nn.Module):
    """What it does depends on the values it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


class Remembers(nn.Module):
    last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        return x * 2


def nested_sequential() -> nn.Module:
    def part(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)), nn.Dropout(0.5), nn.ReLU(True)
        )

    return nn.Sequential(nn.Sequential(part(3), part(4)), nn.Flatten(), nn.Linear(4 * 4 * 4, 5))


NETWORKS: dict[str, Any] = {
    **{"sequential": lambda: small_cnn(dropout=0.5), "nested_sequential": nested_sequential},
    **{kind.__name__: kind for kind in (Network, Functional, ShapeChecks, ModeInRoot, ComparedModeInRoot)},
    **{kind.__name__: kind for kind in (TupleInTraining, StateInRoot, InPlace, CalledTwice, ManyTensors, Loop)},
    "IgnoredArguments": IgnoredArguments,
    **{f"with_{kind.__name__}": lambda kind=kind: Around(kind()) for kind in (Composite, ReadsMode, NoGrad, Noise)},
    **{f"with_{kind.__name__}": lambda kind=kind: Around(kind()) for kind in (Branch, Remembers)},
    "with_spectral_norm": lambda: Around(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))),
}
