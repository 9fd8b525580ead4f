"""The auxiliary heads: their architecture, their cost, and every shape they must take."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_dgl import CNNHead, DGLModule, LinearHead, MLPHead, MLPSRHead
from lightning_dgl.heads import HEADS, HeadFactory, _average_parts
from tests.runs import Operations, small_cnn


@pytest.mark.parametrize("head", HEADS.values())
@pytest.mark.parametrize("channels", [1, 3, 16])
@pytest.mark.parametrize("spatial_size", [1, 2, 3, 5, 8, 17, (4, 9), (197, 1)])
def test_every_shape_gives_class_scores_and_gradients(
    head: HeadFactory, channels: int, spatial_size: int | tuple[int, int]
) -> None:
    size = spatial_size if isinstance(spatial_size, tuple) else (spatial_size, spatial_size)
    module = head(channels, spatial_size, 7)
    x = torch.randn(4, channels, *size, requires_grad=True)
    scores = module(x)
    assert scores.shape == (4, 7)
    scores.square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (3, 3), (7, 5), (4, 9), (56, 2), (197, 1)])
@pytest.mark.parametrize("parts", [(2, 2), (4, 4), (14, 14), (50, 1)])
def test_pooling_for_accelerators_equals_adaptive_pooling(size: tuple[int, int], parts: tuple[int, int]) -> None:
    given = torch.randn(3, 4, *size, dtype=torch.float64)
    outcomes = []
    for pool in (nn.AdaptiveAvgPool2d(parts), lambda x: _average_parts(x, parts)):
        x = given.clone().requires_grad_()
        pooled = pool(x)
        (pooled * torch.linspace(-1, 1, pooled.numel()).view_as(pooled)).sum().backward()
        outcomes.append((pooled.detach(), x.grad))
    torch.testing.assert_close(outcomes[1], outcomes[0])


def test_pooling_for_accelerators_keeps_the_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.full((2, 3, 7, 7), 60000.0, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            pooled = _average_parts(x, (2, 2))
        assert pooled.dtype == dtype
        torch.testing.assert_close(pooled, x[..., :2, :2])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_head_pools_adaptively_on_cuda_where_that_is_not_deterministic(head: str, device: str) -> None:
    with FakeTensorMode(), Operations() as operations, torch.device(device):
        HEADS[head](16, 7, 10)(torch.randn(4, 16, 7, 7))
    assert ("aten::_adaptive_avg_pool2d" in operations.names) is (device == "cpu")


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_number_of_parameters_is_that_of_the_paper_s_layers() -> None:
    c, classes = 8, 10
    classifier = 4 * c * classes + classes
    hidden = 3 * ((4 * c) ** 2 + 4 * c + 2 * 4 * c)  # linear with bias, BatchNorm
    assert parameters(LinearHead(c, 16, classes)) == classifier
    assert parameters(MLPHead(c, 16, classes)) == hidden + classifier
    assert parameters(MLPSRHead(c, 16, classes)) == 3 * (c * c + 2 * c) + hidden + classifier
    assert parameters(CNNHead(c, 16, classes)) == 2 * (9 * c * c + 2 * c) + 2 * c + classifier


def test_mlp_sr_convolves_at_a_quarter_of_the_resolution() -> None:
    head = MLPSRHead(4, 18, 10)
    shapes = []
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape[2:])))
    head(torch.randn(2, 4, 18, 18))
    assert shapes == [(5, 5)] * 3


def six_layer_network() -> nn.Sequential:
    """The network of the paper's study of auxiliary heads: 128 to 512 channels, pooling before layers 2 and 4."""
    layers: list[nn.Module] = []
    channels = [3, 128, 256, 256, 512, 512, 512]
    for i, (c_in, c_out) in enumerate(pairwise(channels)):
        pool = [nn.MaxPool2d(2)] if i in (1, 3) else []
        layers.append(nn.Sequential(*pool, nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 512, 10))


def cost_share(head: str) -> float:
    module = DGLModule(six_layer_network(), split_at=["0", "1", "2", "3", "4"], example_input=[2, 3, 32, 32], head=head)
    return 100 * sum(module.head_flops) / sum(module.block_flops)


def test_cost_on_the_six_layer_network_is_the_paper_s() -> None:
    # The paper: CNN-aux 250 % of the backbone's multiply-adds; MLP-SR-aux 2.6 points above MLP-aux.
    assert cost_share("cnn") == pytest.approx(250, rel=0.01)
    assert cost_share("mlp_sr") - cost_share("mlp") == pytest.approx(2.6, rel=0.01)
    # Three layers of (4C)² multiply-adds each, at every boundary, and a classifier.
    multiply_adds = sum(3 * (4 * c) ** 2 + 4 * c * 10 for c in (128, 256, 256, 512, 512))
    backbone = 3 * 128 * 9 * 32**2 + 3 * 128 * 256 * 9 * 16**2 + 5 * 256 * 512 * 9 * 8**2 + 4 * 512 * 10
    assert cost_share("mlp") == pytest.approx(100 * multiply_adds / backbone, rel=1e-6)


def test_heads_differ_by_block_and_may_be_the_user_s_own() -> None:
    given: list[tuple[object, ...]] = []

    def own(channels: int, spatial_size: int | tuple[int, int], num_classes: int) -> nn.Module:
        given.append((channels, spatial_size, num_classes))
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

    module = DGLModule(small_cnn(), split_at=["2", "6", "10"], example_input=[2, 3, 8, 8], head=["linear", own, "cnn"])
    assert isinstance(module.heads[0], LinearHead) and isinstance(module.heads[2], CNNHead)
    assert given == [(8, 8, 4)]
    assert module(torch.randn(5, 3, 8, 8), block=1).shape == (5, 4)


class Tokens(nn.Module):
    """(N, 3, 8, 8) images to (N, 64, 12) tokens, as vision transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 1)
        self.first = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12))
        self.second = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12))
        self.classify = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.classify(self.second(self.first(x)).mean(dim=1))


@pytest.mark.parametrize("head", HEADS)
def test_heads_read_token_sequences_by_channel(head: str) -> None:
    module = DGLModule(Tokens(), split_at=["first"], example_input=[2, 3, 8, 8], head=head)
    point = module.split_points[0]
    assert (point.channels, point.spatial_size) == (12, (64, 1))
    assert module(torch.randn(2, 3, 8, 8), block=0).shape == (2, 5)


def test_heads_read_vectors_as_one_pixel() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 5))
    module = DGLModule(network, split_at=["2"], example_input=[2, 3, 8, 8], head="mlp")
    assert (module.split_points[0].channels, module.split_points[0].spatial_size) == (6, 1)
    assert module(torch.randn(2, 3, 8, 8), block=0).shape == (2, 5)
