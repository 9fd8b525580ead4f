"""A network, a split or a head that does not fit raises, and says which argument is wrong and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_dgl import DGLModule, SplitError
from tests.checks.unchanged import Unchanged
from tests.runs import make_module, small_cnn

EXAMPLE = (2, 3, 8, 8)


class NotScores(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.features = small_cnn()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.features(x))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda scores: scores[:, :, None], r"shape \(2, 4, 1\)"),
        (lambda scores: scores.mean(dim=1), r"shape \(2,\)"),
        (lambda scores: scores[:, :1], r"shape \(2, 1\)"),
        (lambda scores: torch.cat([scores, scores]), r"shape \(4, 4\)"),
        (lambda scores: (scores, scores), "something other than one tensor"),
        (lambda scores: {"scores": scores}, "something other than one tensor"),
    ],
)
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_network_output_that_is_not_class_scores(change: Callable[[Tensor], Any], found: str, num_blocks: int) -> None:
    network = NotScores(change)
    with (
        Unchanged(network),
        pytest.raises(
            ValueError, match=rf"network must return class scores \(N, classes\), but NotScores returns {found}"
        ),
    ):
        DGLModule(network, num_blocks=num_blocks, example_input=EXAMPLE)


def test_network_with_auxiliary_outputs() -> None:
    network = torchvision.models.googlenet(aux_logits=True, init_weights=False)
    with pytest.raises(ValueError, match=r"something other than one tensor in train mode.*aux_logits=False"):
        DGLModule(network, num_blocks=2, example_input=(2, 3, 96, 96))


def test_network_that_is_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"network must be an nn\.Module, got function"):
        DGLModule(lambda x: x, num_blocks=2, example_input=EXAMPLE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of num_blocks and split_at, got num_blocks=None and split_at=None"),
        ({"num_blocks": 2, "split_at": ["6"]}, r"exactly one of num_blocks and split_at, got num_blocks=2"),
        ({"num_blocks": 0}, "num_blocks must be a whole number of at least 1, got 0"),
        ({"num_blocks": 2.5}, r"num_blocks must be a whole number of at least 1, got 2\.5"),
        ({"num_blocks": 200}, "200"),
        ({"split_at": "6"}, r"split_at must be a list of names, got the string '6'. Write \['6'\]"),
        ({"split_at": ["nowhere"]}, "split_at names 'nowhere', which is not a split point of Sequential"),
        ({"split_at": ["6", "6"]}, "split_at names the same place twice: '6'"),
        ({"split_at": ["10", "6"]}, "split_at is out of order: '6' comes before '10'"),
    ],
)
def test_splitting_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SplitError, match=message):
        DGLModule(small_cnn(), example_input=EXAMPLE, **arguments)


@pytest.mark.parametrize(
    ("example_input", "message"),
    [
        (torch.zeros(3), r"example_input must be a batch.*got shape \(3,\)"),
        (torch.zeros(2, 5, 8, 8), r"example_input of shape \(2, 5, 8, 8\).*does not pass through Sequential"),
        ((2, 5, 8, 8), r"example_input of shape \(2, 5, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), "example_input must be a batch"),
        (None, "example_input must be a batch.*got None"),
        ("cifar", "example_input must be a batch.*got 'cifar'"),
        ((), "example_input must be a batch"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), "example_input of shape .*float64"),
        (torch.zeros(2, 3, 8, 8, device="meta"), r"example_input is on meta, but the network is on cpu"),
    ],
)
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_example_input(example_input: Any, message: str, num_blocks: int) -> None:
    with pytest.raises(SplitError, match=message):
        DGLModule(small_cnn(), num_blocks=num_blocks, example_input=example_input)


def test_messages_are_one_line() -> None:
    with pytest.raises(SplitError) as caught:
        make_module(2, split_at=["nowhere"])
    assert not re.search(r"\n", str(caught.value))


# Heads


class Pooled(nn.Sequential):
    def __init__(self, channels: int, num_classes: int, *first: nn.Module) -> None:
        super().__init__(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


@pytest.mark.parametrize("num_classes", [5, 1])
def test_head_with_another_number_of_classes(num_classes: int) -> None:
    with pytest.raises(
        ValueError, match=rf"The head of block 0 must return class scores \(2, 4\), but returns \(2, {num_classes}\)"
    ):
        make_module(2, head=lambda channels, spatial_size, _: Pooled(channels, num_classes))


def test_head_without_pooling() -> None:
    with pytest.raises(ValueError, match=r"must return class scores .*\(channels, spatial_size, num_classes\) = \(8, "):
        make_module(2, head=lambda channels, spatial_size, num_classes: nn.Conv2d(channels, num_classes, 1))


def test_head_that_does_not_take_the_block_s_output() -> None:
    with pytest.raises((ValueError, TypeError), match="head of block 0"):
        make_module(2, head=lambda channels, spatial_size, num_classes: nn.Linear(17, num_classes))


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Dropout(inplace=True), nn.Hardswish(inplace=True)])
def test_head_that_works_in_place_on_its_input(first: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"head of block 0 overwrites its input in place.*inplace=False"):
        make_module(2, head=lambda channels, spatial_size, num_classes: Pooled(channels, num_classes, first))
