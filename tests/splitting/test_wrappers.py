"""A network inside another module is cut as if it were alone; splits that make no sense are warned of or refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dgl import SplitError, find_split_points, split
from tests.splitting.networks import Branch, ModeInRoot, Network, assert_equivalent


class Normalised(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.norm, self.network = nn.InstanceNorm2d(3), network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.norm(x))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_network_that_reads_its_mode_is_opened_inside_others(depth: int) -> None:
    x = torch.randn(3, 3, 8, 8)
    alone = [point.name for point in find_split_points(ModeInRoot(), x)]
    network: nn.Module = ModeInRoot()
    for _ in range(depth):
        network = Normalised(network)
    path = "network." * depth
    inside = {name for point in find_split_points(network, x) for name in (point.name, *point.aliases)}
    assert {path + name for name in alone} <= inside
    blocks = split(network, split_at=[f"{path}relu", f"{path}middle"], example_input=x)
    for training in (True, False):
        network.train(training)
        assert_equivalent(network, blocks, x)


def test_blocks_follow_a_part_that_is_in_another_mode() -> None:
    network, x = Normalised(ModeInRoot()), torch.randn(3, 3, 8, 8)
    blocks = split(network, split_at=["network.relu", "network.middle"], example_input=x)
    network.train()
    network.network.eval()
    assert_equivalent(network, blocks, x)
    network.eval()
    network.network.train()
    assert_equivalent(network, blocks, x)


class Scale(nn.Module):
    """Has no forward: its owner asks it for a number, which depends on the mode."""

    in_training = 0.5

    def get(self) -> float:
        return self.in_training if self.training else 1.0


class Asking(Network):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale.get())


@pytest.mark.parametrize("wrap", [nn.Identity(), Normalised], ids=["alone", "inside"])
def test_a_network_may_read_the_mode_and_settings_of_a_part(wrap: Any) -> None:
    network, x = wrap(Asking()), torch.randn(3, 3, 8, 8)
    path = "" if wrap is not Normalised else "network."
    blocks = split(network, split_at=[f"{path}stem", f"{path}middle"], example_input=x)
    for training in (True, False):
        network.train(training)
        assert_equivalent(network, blocks, x)
    scale = network.get_submodule(f"{path}scale").train()  # the others are in eval mode
    assert_equivalent(network, blocks, x)
    scale.in_training = 0.25  # type: ignore[assignment]
    assert_equivalent(network, blocks, x)


class Features(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.middle(torch.relu(self.stem(x))))
        return F.dropout(x.mean((2, 3)), 0.2, self.training)


class Classifier(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.first, self.last = backbone, nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(self.backbone((x - 0.5) / 0.25))))


def test_every_block_has_something_to_train() -> None:
    blocks = split(Classifier(Features()), 5, example_input=torch.zeros(2, 3, 8, 8))
    assert all(any(True for _ in block.parameters()) for block in blocks)


def test_blocks_without_parameters_are_refused() -> None:
    network = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(SplitError, match="block 0 would have no parameters, so nothing to train"):
        split(network, 2, example_input=torch.zeros(2, 3, 8, 8))


class Closed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(self.stem(x) if x.sum() > -1e9 else self.stem(-x)).mean((2, 3))


def test_a_lopsided_split_warns_with_the_shares_and_the_reason() -> None:
    x = torch.zeros(2, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"Block 0 of Classifier.*9\d%.*'backbone' is kept whole \(it branches on the"):
        split(Classifier(Closed()), 2, example_input=x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split(Classifier(Features()), 3, example_input=x)
