"""Sizes cross cuts, branches on sizes are checked, and the batch must be the first dimension of what crosses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dgl import SplitError, find_split_points, split
from tests.splitting.networks import Network, assert_equivalent, compose, split_everywhere


class SizesReadEarly(Network):
    """Reads a batch size, an image size, a device and a dtype early and uses them late."""

    def forward(self, x: Tensor) -> Tensor:
        n, size, like = x.size(0), x.shape[2:], (x.device, x.dtype)
        x = self.norm(torch.relu(self.middle(torch.relu(self.stem(F.max_pool2d(x, 2))))))
        x = F.interpolate(x, size).to(*like).view(2 * n, 2, *size).reshape(n, 4, -1)
        return self.classifier(x.mean(2).view(n, -1))


def test_sizes_read_early_and_used_late_cost_no_cut() -> None:
    network, x = SizesReadEarly(), torch.randn(2, 3, 8, 8)
    assert len(find_split_points(network, x)) >= 8
    blocks = split_everywhere(network, x)
    for batch in (1, 2, 5):
        assert_equivalent(network.eval(), blocks, torch.randn(batch, 3, 8, 8))
    assert_equivalent(network.train(), blocks, x)


def test_a_size_that_cannot_be_made_again_is_refused_when_it_comes() -> None:
    network = SizesReadEarly()
    blocks = split(network, split_at=["middle"], example_input=torch.randn(2, 3, 8, 8))
    with pytest.raises(SplitError, match=r"size .*read before a cut"):
        compose(blocks, torch.randn(2, 3, 12, 12))


def test_values_that_are_no_sizes_do_cross() -> None:
    class Item(Network):
        def forward(self, x: Tensor) -> Tensor:
            scale = x.mean().item()
            return self.head(torch.relu(self.middle(torch.relu(self.stem(x)))) * scale)

    assert {point.name for point in find_split_points(Item(), torch.randn(2, 3, 8, 8))} <= {
        "mul",
        "adaptive_avg_pool2d",
        "flatten",
    }


class BranchOnSize(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if x.shape[-1] > 8:
            x = F.max_pool2d(x, 2)
        for _ in range(x.shape[-1] // 4):
            x = self.middle(x)
        return self.head(self.norm(x))


def test_a_branch_on_a_size_goes_as_for_the_example_or_raises() -> None:
    network, x = BranchOnSize(), torch.randn(2, 3, 8, 8)
    blocks = split(network, split_at=["relu", "norm"], example_input=x)
    assert_equivalent(network, blocks, torch.randn(4, 3, 8, 8))
    for size in (4, 16):
        with pytest.raises(SplitError, match="size of its input"):
            compose(blocks, torch.randn(2, 3, size, size))
    blocks = split(network, split_at=["relu", "norm"], example_input=torch.randn(2, 3, 16, 16))
    assert_equivalent(network, blocks, torch.randn(2, 3, 16, 16))


class BranchOnBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if len(x.shape) == 4 and x.shape[0] == 1 else x


class BatchBranchInside(Network):
    def __init__(self) -> None:
        super().__init__()
        self.part = BranchOnBatch()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(torch.relu(self.stem(x))))


def test_a_branch_on_the_batch_size_in_a_submodule_is_followed() -> None:
    network = BatchBranchInside().eval()
    blocks = split(network, split_at=["relu"], example_input=torch.randn(2, 3, 8, 8))
    for n in (1, 2):
        assert_equivalent(network, blocks, torch.randn(n, 3, 8, 8))


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x).flatten(2).permute(2, 0, 1)).mean(0))


class FoldedFrames(Network):
    def forward(self, x: Tensor) -> Tensor:
        n, frames = x.shape[:2]
        x = self.norm(torch.relu(self.middle(torch.relu(self.stem(x.flatten(0, 1))))))
        return self.classifier(x.mean((2, 3)).view(n, frames, 4).mean(1))


@pytest.mark.parametrize(
    ("network", "shape", "inside"),
    [(SequenceFirst(), (4, 3, 8, 8), "layers.1"), (FoldedFrames(), (2, 3, 3, 8, 8), "middle")],
)
def test_no_cut_where_the_batch_is_not_the_first_dimension(
    network: nn.Module, shape: tuple[int, ...], inside: str
) -> None:
    x = torch.randn(shape)
    points = find_split_points(network, x)
    assert inside not in {name for point in points for name in (point.name, *point.aliases)}
    assert all(point.shape[0] == len(x) for point in points)
    with pytest.raises(SplitError, match="does not have the batch as its first dimension"):
        split(network, split_at=[inside], example_input=x)
    with pytest.raises(SplitError, match="does not have the batch as its first dimension"):
        split(network, 4, example_input=x)


def test_whether_a_proxy_is_a_tensor_or_a_size() -> None:
    class Asks(Network):
        def forward(self, x: Any) -> Tensor:
            x = self.stem(x) if isinstance(x, Tensor) else x[0]
            h = x.shape[-1] if isinstance(x.shape, tuple) and isinstance(x.shape[-1], int) else 0
            return self.head(self.norm(torch.relu(x) * h))

    network, x = Asks(), torch.randn(2, 3, 8, 8)
    assert_equivalent(network, split(network, split_at=["relu"], example_input=x), x)
