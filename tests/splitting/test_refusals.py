"""What cannot be split says so: the error names the reason and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dgl import SplitError, find_split_points, split
from tests.runs import small_cnn
from tests.splitting.networks import Around, Branch, CalledTwice, Network, assert_equivalent


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 8, 8)


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
        (ItemRoot, "reads the values of a tensor as numbers"),
        (BatchSizeRoot, "branches on the batch size"),
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
