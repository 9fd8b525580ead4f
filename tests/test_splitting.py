"""split: blocks that together are the network, whatever its forward looks like, or an error that says why not."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dgl import SplitError, find_split_points, split
from tests.conftest import small_cnn
from tests.networks import assert_equivalent, assert_same, compose


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


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 8, 8)


def split_everywhere(network: nn.Module, x: Tensor) -> nn.ModuleList:
    names = [point.name for point in find_split_points(network, x) if not point.in_place_hazard]
    assert len(names) >= 3
    return split(network, split_at=names, example_input=x)


# What blocks promise


@pytest.mark.parametrize("kind", NETWORKS)
def test_blocks_are_the_network(kind: str, x: Tensor) -> None:
    network = NETWORKS[kind]()
    blocks = split_everywhere(network, x)
    for training in (True, False):
        network.train(training)
        assert_equivalent(network, blocks, x)
        assert_equivalent(network, blocks, torch.randn(5, 3, 8, 8))
        network.train(not training)
        blocks.train(training)
        assert network.training is training
        assert_equivalent(network, blocks, x)


@pytest.mark.parametrize("kind", NETWORKS)
def test_blocks_follow_when_the_network_is_cast_and_the_network_when_blocks_are(kind: str, x: Tensor) -> None:
    network = NETWORKS[kind]()
    blocks = split_everywhere(network, x)
    network.double()
    assert_equivalent(network, blocks, x.double())
    blocks.float()
    assert_equivalent(network, blocks, x)


@pytest.mark.parametrize("kind", NETWORKS)
def test_splitting_leaves_everything_as_it_was(kind: str, x: Tensor) -> None:
    network = NETWORKS[kind]()
    next(module for module in network.modules() if next(module.children(), None) is None).eval()  # like frozen layers
    state = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    given, generators = x.clone(), (torch.get_rng_state(), random.getstate())

    split_everywhere(network, x)

    assert list(network.state_dict()) == list(state)
    assert_same(list(state), list(network.state_dict().values()), list(state.values()))
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]


def test_parameters_are_the_networks_own_and_each_is_in_one_block(x: Tensor) -> None:
    network = Around(Composite())
    blocks = split_everywhere(network, x)
    named = dict(network.named_parameters())
    owned = [name for block in blocks for name, _ in block.named_parameters()]
    assert sorted(owned) == sorted(named)
    assert all(named[name] is parameter for block in blocks for name, parameter in block.named_parameters())


@pytest.mark.parametrize("kind", ["sequential", "Functional", "ModeInRoot", "StateInRoot", "InPlace", "ManyTensors"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copied_blocks_belong_to_the_copied_network(kind: str, how: str, x: Tensor) -> None:
    network = NETWORKS[kind]()
    pair = (network, split_everywhere(network, x))
    new_network, new_blocks = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()  # the copies must not notice
    assert any(parameter.any() for parameter in new_blocks.parameters())
    for training in (True, False):
        new_network.train(training)
        assert_equivalent(new_network, new_blocks, x)


@pytest.mark.parametrize("kind", ["sequential", "nested_sequential", "Functional", "StateInRoot", "with_Composite"])
def test_blocks_compile_without_graph_breaks(kind: str, x: Tensor) -> None:
    torch._dynamo.reset()
    network = NETWORKS[kind]()
    blocks = split(network, 3, example_input=x)
    compiled = nn.ModuleList(torch.compile(block, fullgraph=True, backend="eager") for block in blocks)
    for training in (True, False):
        network.train(training)
        assert_equivalent(network, compiled, x)


def test_hooks_on_layers_fire_in_the_blocks(x: Tensor) -> None:
    network = Around(Composite())
    blocks = split_everywhere(network, x)
    calls: list[str] = []
    for name, module in network.named_modules():
        if next(module.children(), None) is None:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    compose(blocks, x)
    assert calls == ["stem", "part.body.0", "part.body.1", "part.body.2", "middle", "norm", "classifier"]


def test_a_module_that_no_cut_passes_through_is_called_as_a_whole(x: Tensor) -> None:
    network = Around(Composite())
    blocks = split(network, split_at=["tanh", "middle"], example_input=x)
    calls: list[str] = []
    network.part.register_forward_hook(lambda *_: calls.append("part"))
    compose(blocks, x)
    assert calls == ["part"]


def test_a_module_may_keep_state_of_its_own(x: Tensor) -> None:
    network = Around(Remembers())
    blocks = split(network, split_at=["tanh", "middle"], example_input=x)
    compose(blocks, x)
    assert torch.equal(network.part.last, blocks[0](x))


def test_no_grad_inside_a_module_stays(x: Tensor) -> None:
    network = Around(NoGrad())
    compose(split(network, split_at=["part"], example_input=x), x).sum().backward()
    assert network.middle.weight.grad is not None
    assert network.part.conv.weight.grad is None
    assert network.stem.weight.grad is None


def test_random_numbers_inside_a_module_are_drawn_anew(x: Tensor) -> None:
    network = Around(Noise()).eval()
    blocks = split(network, split_at=["part"], example_input=x)
    assert not torch.equal(blocks[0](x), blocks[0](x))


def test_one_block_is_the_network_itself(x: Tensor) -> None:
    network = Functional()
    for blocks in (split(network, 1, example_input=x), split(network, split_at=[], example_input=x)):
        assert len(blocks) == 1
        assert_equivalent(network, blocks, x)


def test_an_example_of_one_sample_will_do(x: Tensor) -> None:
    network = small_cnn()
    assert_equivalent(network, split(network, 4, example_input=x[:1]), x)


def test_blocks_say_where_they_begin_and_end(x: Tensor) -> None:
    blocks = split(small_cnn(), split_at=["2", "6"], example_input=x)
    assert [block.extra_repr() for block in blocks] == ["0 to 2", "3 to 6", "7 to 16"]


def test_an_alias_names_the_same_cut(x: Tensor) -> None:
    network = nested_sequential()
    for name in ("0.0", "0.0.2"):
        blocks = split(network, split_at=[name], example_input=x)
        assert len(blocks[0].state_dict()) == len(network[0][0].state_dict())


# What cannot be split says so


class RandomRoot(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x) + torch.randn(1)))


class ConstantRoot(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x) * torch.tensor(2.0)))


class NoGradRoot(Network):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
        return self.head(self.middle(x))


class AutocastRoot(Network):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.stem(x)
        return self.head(self.middle(x.float()))


class AssigningRoot(Network):
    def forward(self, x: Tensor) -> Tensor:
        self.features = self.stem(x)
        return self.head(self.middle(self.features))


class BranchRoot(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.middle(x) if x.sum() > 0 else x)


class LoopRoot(Network):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(self.stem(sample[None])) for sample in x])


class ItemRoot(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)) * float(x.mean()))


class BatchSizeRoot(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.stem(x))
        return self.head(x * 2 if x.shape[0] == 3 else x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (RandomRoot, "draws random numbers|makes a tensor that does not depend on its input"),
        (ConstantRoot, "makes a tensor that does not depend on its input.*register_buffer"),
        (NoGradRoot, "switches gradients or autocast"),
        (AutocastRoot, "switches gradients or autocast"),
        (AssigningRoot, "assigns `self.features`"),
        (BranchRoot, "branches on the values of a tensor"),
        (LoopRoot, "loops over a tensor"),
        (ItemRoot, "TypeError"),
        (BatchSizeRoot, "do not reproduce .*batch size"),
    ],
)
def test_a_forward_that_cannot_be_split(kind: type[Network], reason: str, x: Tensor) -> None:
    network = kind()
    modes = [module.training for module in network.modules()]
    with pytest.raises(SplitError, match=reason) as error:
        split(network, 2, example_input=x)
    assert kind.__name__ in str(error.value)
    assert "submodule" in str(error.value)
    assert [module.training for module in network.modules()] == modes
    assert "features" not in network.__dict__
    assert torch.is_grad_enabled()


class TiedWeights(Network):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.last.weight = self.middle.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.middle(self.stem(x))))


class SharedNorm(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.middle(self.norm(self.stem(x)))))


@pytest.mark.parametrize(
    ("network", "cut", "name"),
    [
        (TiedWeights(), "middle", r"'(middle|last)\.weight' .*'(middle|last)\.weight'"),
        (SharedNorm(), "norm@1", "'norm.weight'"),
    ],
)
def test_weights_cannot_be_tied_across_a_cut(network: nn.Module, cut: str, name: str, x: Tensor) -> None:
    with pytest.raises(SplitError, match=f"{name}.*Cut elsewhere"):
        split(network, split_at=[cut], example_input=x)
    # Automatic cuts keep clear of such places.
    assert_equivalent(network, split(network, 2, example_input=x), x)
    # Within a block they may be.
    assert_equivalent(network, split(network, split_at=["stem"], example_input=x), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of num_blocks and split_at, got num_blocks=None"),
        ({"num_blocks": 2, "split_at": ["2"]}, r"exactly one of num_blocks and split_at, got num_blocks=2.*\['2'\]"),
        ({"num_blocks": 0}, "num_blocks must be a whole number of at least 1, got 0"),
        ({"num_blocks": 2.5}, "num_blocks must be a whole number of at least 1, got 2.5"),
        ({"num_blocks": 99}, "num_blocks=99 is more than Sequential allows.*at most 17 blocks"),
        ({"num_blocks": 2, "balance": "speed"}, "balance must be .*got 'speed'"),
        ({"split_at": ["conv3"]}, "'conv3', which is not a split point of Sequential.*Names near it"),
        ({"split_at": ["16"]}, "'16'.*the module exists"),
        ({"split_at": ["2", "2"]}, "same place twice: '2'"),
        ({"split_at": ["6", "2"]}, "out of order: '2' comes before '6'"),
        ({"split_at": "2"}, r"must be a list of names, got the string '2'. Write \['2'\]"),
        ({"split_at": [2]}, "names 2, which is not a split point"),
        ({"split_at": ["2"], "example_input": torch.zeros(3)}, r"must be a batch of inputs.*got shape \(3,\)"),
        ({"split_at": ["2"], "example_input": torch.zeros(0, 3, 8, 8)}, r"must be a batch of inputs.*\(0, 3, 8, 8\)"),
        ({"split_at": ["2"], "example_input": "image.png"}, "must be a batch of inputs.*got 'image.png'"),
        ({"split_at": ["2"], "example_input": torch.zeros(2, 1, 8, 8)}, r"shape \(2, 1, 8, 8\).*does not pass"),
        ({"split_at": ["2"], "example_input": torch.zeros(2, 3, 8, 8).int()}, "dtype torch.int32 does not pass"),
        ({"split_at": ["2"], "example_input": torch.zeros(2, 3, 8, 8, device="meta")}, "on meta.*network is on cpu"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SplitError, match=message):
        split(small_cnn(), **{"example_input": torch.zeros(2, 3, 8, 8), **arguments})


def test_no_cut_before_an_operation_that_works_in_place(x: Tensor) -> None:
    relu = nn.ReLU(inplace=True)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(SplitError, match=r"'0'.*in place.*inplace=False"):
        split(network, split_at=["0"], example_input=x)
    with pytest.raises(SplitError, match=r"3 usable split points.*1 more, such as '0'.*in-place"):
        split(network, 5, example_input=x)
    relu.inplace = False
    assert_equivalent(network, split(network, split_at=["0"], example_input=x), x)


def test_a_module_called_twice_must_be_named_with_the_call(x: Tensor) -> None:
    with pytest.raises(SplitError, match=r"called more than once.*act@1, act@2"):
        split(CalledTwice(), split_at=["act"], example_input=x)


def test_too_many_blocks_names_the_module_that_is_kept_whole(x: Tensor) -> None:
    with pytest.raises(SplitError, match=r"'part' is kept whole \(it branches on the values of a tensor\)"):
        split(Around(Branch()), 50, example_input=x)


def test_errors_are_value_errors() -> None:
    assert issubclass(SplitError, ValueError)


def test_a_module_with_hooks_is_not_cut_inside() -> None:
    stage = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    network = nn.Sequential(stage, nn.Flatten(), nn.Linear(64, 5))
    calls: list[torch.Size] = []
    stage.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    x = torch.randn(2, 3, 8, 8)
    assert [point.name for point in find_split_points(network, x)] == ["0", "1"]
    blocks = split(network, split_at=["0"], example_input=x)
    calls.clear()
    blocks[1](blocks[0](x))
    assert calls == [(2, 4, 4, 4)]


def test_hooks_on_the_network_itself_are_refused() -> None:
    network = small_cnn()
    network.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(SplitError, match=r"Sequential.*has hooks"):
        split(network, 2, example_input=torch.zeros(2, 3, 8, 8))
