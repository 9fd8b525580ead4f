"""Where networks can be cut, and what these places are called."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lightning_dgl import SplitError, SplitPoint, find_split_points, split
from tests.runs import small_cnn


def torchvision_model(name: str) -> nn.Module:
    arguments = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network = torchvision.models.get_model(name, weights=None, **arguments)
    assert isinstance(network, nn.Module)
    return network


def points_of(network: nn.Module, *shape: int) -> dict[str, SplitPoint]:
    return {point.name: point for point in find_split_points(network, torch.zeros(shape))}


def usable(points: dict[str, SplitPoint]) -> list[str]:
    return [name for name, point in points.items() if not point.in_place_hazard]


class Residual(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.conv(self.relu(self.conv(x))))


class Root(nn.Module):
    """A stem, and what ``middle`` says."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(*middle), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(F.relu(self.stem(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *(("alexnet", 14), ("vgg11_bn", 27), ("resnet18", 13), ("resnet50", 21), ("googlenet", 12)),
        *(("mobilenet_v2", 57), ("vit_b_16", 32), ("swin_t", 40)),
    ],
)
def test_number_of_usable_cuts(name: str, number: int) -> None:
    assert len(usable(points_of(torchvision_model(name), 2, 3, 224, 224))) == number


def test_resnet_is_cut_at_the_ends_of_residual_blocks() -> None:
    points = points_of(torchvision_model("resnet18"), 2, 3, 224, 224)
    ends = {name: point.aliases for name, point in points.items() if point.rank == 0}
    assert ends == {
        f"layer{i}{end}": (f"layer{i}.{j}", f"layer{i}.{j}.relu@2")[1 - j :]
        for i in range(1, 5)
        for j, end in enumerate((".0", ""))
    }
    assert points["layer2"].shape == (2, 128, 28, 28)
    assert not any(name.startswith("layer1.0.conv") for name in points), "the skip connection crosses there, too"


def test_resnet50_in_four_blocks() -> None:
    blocks = split(torchvision_model("resnet50"), 4, example_input=torch.zeros(2, 3, 224, 224))
    assert [block.extra_repr().split(" to ")[1] for block in blocks] == ["layer2.0", "layer3.0", "layer3.4", "fc"]


def test_vgg_is_cut_after_activations_and_the_pool_opens_the_next_block() -> None:
    network = torchvision_model("vgg11_bn")
    blocks = split(network, 4, example_input=torch.zeros(2, 3, 64, 64))
    for block in blocks[:-1]:
        last = block.extra_repr().split(" to ")[1]
        assert isinstance(network.get_submodule(last), nn.ReLU)


def test_shapes_channels_and_costs() -> None:
    points = points_of(small_cnn(), 2, 3, 8, 8)
    assert list(points) == [str(i) for i in range(16)]
    assert (points["6"].shape, points["6"].channels, points["6"].spatial_size) == ((2, 8, 8, 8), 8, 8)
    assert (points["15"].shape, points["15"].channels, points["15"].spatial_size) == ((2, 16), 16, 1)
    costs = [point.cost for point in points.values()]
    assert costs == sorted(costs)
    assert points["2"].cost == 2 * 3 * 8 * 9 * 8 * 8  # a multiply and an add for each weight and pixel; one sample


@pytest.mark.parametrize(
    ("layers", "shape", "point", "channels", "spatial_size"),
    [
        ([nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)], (2, 3, 8, 9), "1", 6, (6, 7)),
        ([nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 3)], (2, 3, 8), "1", 6, (6, 1)),
        ([nn.Conv3d(3, 6, 1), nn.ReLU(), nn.Conv3d(6, 2, 1)], (2, 3, 4, 5, 6), "1", 6, (20, 6)),
        ([nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 2)], (2, 5, 3), "1", 6, (5, 1)),  # tokens
        ([nn.Linear(3, 6), nn.GELU(), nn.LayerNorm(6)], (2, 7, 5, 3), "1", 6, (7, 5)),  # NHWC
        ([nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 2)], (2, 3), "1", 6, 1),
    ],
)
def test_channels_are_found_in_every_layout(
    layers: list[nn.Module], shape: tuple[int, ...], point: str, channels: int, spatial_size: int | tuple[int, int]
) -> None:
    found = points_of(nn.Sequential(*layers), *shape)[point]
    assert (found.channels, found.spatial_size) == (channels, spatial_size)
    images = found.as_images(torch.zeros(found.shape))
    assert images.shape[:2] == (2, channels)
    assert images.ndim == 4
    height, width = spatial_size if isinstance(spatial_size, tuple) else (spatial_size, spatial_size)
    assert images.shape[2:] == (height, width)


def test_swin_and_vit_channels_are_last() -> None:
    swin = points_of(torchvision_model("swin_t"), 2, 3, 64, 64)["features.3"]
    assert (swin.shape, swin.channels, swin.spatial_size) == ((2, 8, 8, 192), 192, 8)
    vit = points_of(torchvision.models.vit_b_16(image_size=32), 2, 3, 32, 32)["encoder.layers.encoder_layer_3"]
    assert (vit.shape, vit.channels, vit.spatial_size) == ((2, 5, 768), 768, (5, 1))


def test_ranks_prefer_what_users_recognise() -> None:
    points = points_of(Root(Residual(), Residual(), nn.BatchNorm2d(4)), 2, 3, 8, 8)
    ranks = {name: point.rank for name, point in points.items()}
    assert ranks["stem"] == 3
    assert ranks["relu"] == 1
    assert ranks["middle.0"] == ranks["middle.1"] == 0
    assert ranks["middle"] == 2  # ends with BatchNorm
    assert ranks["mean"] == 2
    assert ranks["middle.0.add"] == 3  # 2, and one more inside a class that occurs twice


def test_a_module_called_several_times_is_numbered() -> None:
    shared = nn.ReLU()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 3), shared, nn.Flatten())
    assert list(points_of(network, 2, 3, 8, 8)) == ["0", "1@1", "2", "1@2"]


@pytest.mark.parametrize(
    ("operation", "hazard"),
    [
        (nn.ReLU(), False),
        (nn.ReLU(inplace=True), True),
        (nn.Dropout(0.5), False),
        (nn.Dropout(0.5, inplace=True), True),  # in train mode only
        (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 64)), nn.ReLU(inplace=True)), True),  # through a view
        (nn.Sequential(nn.MaxPool2d(1), nn.ReLU(inplace=True)), False),  # works on a tensor of its own
    ],
)
def test_no_cut_before_an_operation_that_works_in_place(operation: nn.Module, hazard: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), operation, nn.Flatten(), nn.Linear(256, 2))
    assert points_of(network, 2, 3, 8, 8)["0"].in_place_hazard is hazard


def test_in_place_in_the_next_module_but_one_counts() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(144, 2))
    points = points_of(network, 2, 3, 8, 8)
    assert usable(points) == [name for name in points if name == "3"]


def test_augmented_assignment_counts() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return x

    points = points_of(Root(nn.Conv2d(4, 4, 1), Adds()), 2, 3, 8, 8)
    assert points["middle.0"].in_place_hazard
    assert not points["middle"].in_place_hazard


def test_no_cut_where_two_tensors_cross() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = self.second(x)
            return torch.cat([x, y], 1).flatten(1)

    assert list(points_of(Dense(), 2, 3, 8, 8)) == ["first", "cat"]


def test_modules_that_cannot_be_traced_are_kept_whole() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)) if x.sum() > 0 else self.conv(x)

    names = list(points_of(Root(nn.Sequential(Branch(), nn.ReLU()), nn.Tanh()), 2, 3, 8, 8))
    assert "middle.0.0" in names
    assert not any("conv" in name for name in names)


def test_only_cuts_that_exist_in_both_modes_count() -> None:
    class TwoPaths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.extra, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten()

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            if self.training:
                x = torch.tanh(self.extra(x))
            return self.head(x)

    assert list(points_of(TwoPaths(), 2, 3, 8, 8)) == ["stem", "relu"]


def test_finding_split_points_changes_nothing() -> None:
    network, x = small_cnn(dropout=0.5), torch.randn(2, 3, 8, 8)
    network[1].eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    find_split_points(network, x)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert [module.training for module in network] == [i != 1 for i in range(17)]
    assert torch.equal(torch.get_rng_state(), random)


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(SplitError, match=r"shape \(2, 1, 8, 8\).*does not pass through Root in train mode"):
        find_split_points(Root(nn.ReLU()), torch.zeros(2, 1, 8, 8))


def test_a_network_that_cannot_be_traced() -> None:
    class Untraceable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(SplitError, match=r"Untraceable\.forward cannot be traced.*branches on the values"):
        find_split_points(Untraceable(), torch.zeros(2, 3, 8, 8))


def test_shapes_are_those_of_the_example_batch_even_for_one_sample() -> None:
    points = find_split_points(small_cnn(), torch.zeros(1, 3, 8, 8))
    assert {point.shape[0] for point in points} == {1}


class Lengths(nn.Module):
    def __init__(self, of_a_tensor: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 5)
        self.of_a_tensor = of_a_tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.of_a_tensor:
            return self.last(self.first(x).view(len(x), 8))
        parts = self.first(x).chunk(4, dim=1)
        return self.last(torch.cat([parts[-i - 1] for i in range(len(parts))], dim=1))


def test_lengths_are_known_for_lists_but_not_for_the_batch() -> None:
    x = torch.randn(2, 8)
    network = Lengths(False)
    blocks = split(network, split_at=["first"], example_input=x)
    assert torch.equal(blocks[1](x), network.last(torch.cat(x.chunk(4, dim=1)[::-1], dim=1)))
    with pytest.raises(SplitError, match=r"Lengths.*write x.shape\[0\] instead"):
        find_split_points(Lengths(True), x)
