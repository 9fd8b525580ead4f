"""Choosing cuts: the largest block is as small as can be, at places as natural as can be."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor, nn

from lightning_dgl import split
from lightning_dgl.splitting.balance import balanced_cuts
from lightning_dgl.splitting.costs import memory
from lightning_dgl.splitting.cut_points import analyse
from tests.runs import small_cnn
from tests.splitting.networks import assert_equivalent


def brute_force(
    ranks: list[int], costs: list[float], head_costs: list[float], input_costs: list[float], num_blocks: int
) -> tuple[int, float, float]:
    """Total rank, largest block and sum of squares of the best choice, by looking at every one."""

    def block_costs(cuts: tuple[int, ...]) -> list[float]:
        starts = [0.0, *(costs[i] - input_costs[i] for i in cuts)]
        ends = [*(costs[i] + head_costs[i] for i in cuts), costs[-1]]
        return [end - start for start, end in zip(starts, ends, strict=True)]

    every = {cuts: block_costs(cuts) for cuts in itertools.combinations(range(len(ranks)), num_blocks - 1)}
    smallest = min(max(blocks) for blocks in every.values())
    # Higher ranks only where they save at least 10 %.
    for highest in sorted(set(ranks)):
        natural = {cuts: blocks for cuts, blocks in every.items() if all(ranks[i] <= highest for i in cuts)}
        bound = min((max(blocks) for blocks in natural.values()), default=float("inf"))
        if bound <= 1.1 * smallest:
            break
    choices = [
        (sum(ranks[i] for i in cuts), bound, sum(cost**2 for cost in blocks))
        for cuts, blocks in natural.items()
        if max(blocks) <= bound
    ]
    return min(choices)


@pytest.mark.parametrize("with_heads", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_balanced_cuts_is_the_best_of_all_choices(seed: int, with_heads: bool) -> None:
    draw = random.Random(seed)
    number = draw.randint(3, 9)
    ranks = [draw.randint(0, 3) for _ in range(number)]
    # Whole numbers, so that sums are exact; zeros, so that there are ties.
    costs = [float(total) for total in itertools.accumulate(draw.choice([0, 1, 2, 5, 20]) for _ in range(number + 1))]
    head_costs = [float(draw.randint(0, 6)) if with_heads else 0.0 for _ in range(number)]
    input_costs = [float(draw.randint(0, 3)) if with_heads else 0.0 for _ in range(number)]
    num_blocks = draw.randint(2, min(5, number + 1))

    cuts = balanced_cuts(ranks, costs, head_costs, num_blocks, input_costs)

    assert len(cuts) == num_blocks - 1
    assert cuts == sorted(set(cuts))
    starts = [0.0, *(costs[i] - input_costs[i] for i in cuts)]
    ends = [*(costs[i] + head_costs[i] for i in cuts), costs[-1]]
    blocks = [end - start for start, end in zip(starts, ends, strict=True)]
    found = (sum(ranks[i] for i in cuts), max(blocks), sum(cost**2 for cost in blocks))
    best = brute_force(ranks, costs, head_costs, input_costs, num_blocks)
    assert found[1] <= best[1]
    assert found[::2] == best[::2]


def test_a_natural_place_is_worth_ten_percent() -> None:
    costs = [49.0, 54.0, 100.0]  # cut at 49: largest 51, at 54: largest 54
    assert balanced_cuts([2, 0], costs, [0, 0], num_blocks=2) == [1]
    assert balanced_cuts([2, 0], [49.0, 60.0, 100.0], [0, 0], num_blocks=2) == [0]


def test_heads_count() -> None:
    costs = [40.0, 60.0, 100.0]
    assert balanced_cuts([0, 0], costs, [0.0, 0.0], num_blocks=2) in ([0], [1])
    assert balanced_cuts([0, 0], costs, [5.0, 30.0], num_blocks=2) == [0]
    assert balanced_cuts([0, 0], costs, [30.0, 0.0], num_blocks=2) == [1]


def test_as_many_blocks_as_there_are_places() -> None:
    assert balanced_cuts([3, 0, 1], [1.0, 2.0, 3.0, 4.0], [0.0] * 3, num_blocks=4) == [0, 1, 2]


@pytest.mark.parametrize("balance", ["flops", "memory", "time"])
def test_every_balance_gives_valid_blocks(balance: str) -> None:
    network, x = small_cnn(dropout=0.5), torch.randn(4, 3, 8, 8)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    blocks = split(network, 4, example_input=x, balance=balance)
    assert len(blocks) == 4
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert_equivalent(network, blocks, x)


def test_memory_is_what_autograd_saves() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    costs = memory(analyse(network, torch.randn(3, 4)), None)
    # Bytes for each sample: the first layer's input, 4 numbers; the second's, 8, which the activation saves, too.
    assert costs.upto == [16, 48, 48]
    assert costs.input == [0, 32]  # a block that begins after the activation holds its output once more


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_attention_is_counted_but_its_matrix_is_not_held() -> None:
    heads, length, channels = 2, 64, 4
    x = torch.randn(2, heads, length, channels)
    network = nn.Sequential(nn.Linear(channels, channels), Attention(), nn.Flatten(), nn.Linear(512, 2))
    traced = analyse(network, x)
    flops = [point.cost for point in traced.usable]
    assert flops[1] - flops[0] == 2 * 2 * heads * length * length * channels
    assert memory(traced, None).upto[-1] < heads * length * length * 4


class Scaled(nn.Module):
    """Reads a buffer and its mode, has dropout in place: what measuring time must get right."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(inplace=True), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.layers(x) * self.scale
        y = self.head(x.mean((2, 3)))
        return (y, y) if self.training else y


def test_time_can_be_measured_whatever_the_forward_does() -> None:
    network, x = Scaled(), torch.randn(2, 3, 8, 8)
    assert_equivalent(network, split(network, 3, example_input=x, balance="time"), x)
    frozen = small_cnn().requires_grad_(False)
    frozen[-1].requires_grad_(True)
    assert_equivalent(frozen, split(frozen, 3, example_input=x, balance="time"), x)
