"""The paper's networks for small images, and torchvision's in a form for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F


def layered(
    widths: Sequence[int], pool_before: Collection[int], hidden_layers: int, in_channels: int, num_classes: int
) -> nn.Sequential:
    """Return 3×3 convolution, BatchNorm, ReLU for each of ``widths``, pools (2×2, max) where asked, and a classifier.

    The classifier pools to 2×2 and has ``hidden_layers`` of 4C units with BatchNorm, as in the authors' code.
    """
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip([in_channels, *widths], widths, strict=False)):
        pool: list[nn.Module] = [nn.MaxPool2d(2)] if i in pool_before else []
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers.append(nn.Sequential(*pool, convolution, nn.BatchNorm2d(after), nn.ReLU()))
    units = 4 * widths[-1]
    hidden = [nn.Sequential(nn.Linear(units, units), nn.BatchNorm1d(units), nn.ReLU()) for _ in range(hidden_layers)]
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), *hidden, nn.Linear(units, num_classes))
    return nn.Sequential(*layers, classifier)


def six_layers(in_channels: int, num_classes: int, channels: int = 128) -> nn.Sequential:
    """Return the network of the study of heads: pools before the second and fourth convolution, where width doubles."""
    return layered([channels * f for f in (1, 2, 2, 4, 4, 4)], (1, 3), 2, in_channels, num_classes)


def six_layers_late_pools(in_channels: int, num_classes: int, channels: int = 128) -> nn.Sequential:
    """Return the asynchronous experiments' network: pools before the third and fifth convolution, where it widens."""
    return layered([channels * f for f in (1, 1, 2, 2, 4, 4)], (2, 4), 3, in_channels, num_classes)


def four_layers(in_channels: int, num_classes: int, channels: int = 64) -> nn.Sequential:
    """Return the network compared with sequential greedy training."""
    return layered([channels * f for f in (1, 2, 2, 4)], (1, 3), 2, in_channels, num_classes)


def dni_network(in_channels: int, num_classes: int, channels: int = 128) -> nn.Sequential:
    """Return the network compared with synthetic gradients: three 5×5 convolutions, each followed by a 3×3 pool."""
    pools = (nn.MaxPool2d, nn.AvgPool2d, nn.AvgPool2d)
    blocks: list[nn.Module] = []
    for before, pool in zip((in_channels, channels, channels), pools, strict=True):
        convolution = nn.Conv2d(before, channels, 5, padding=2)
        blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(), pool(3)))
    return nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(channels, num_classes)))


LAYERED: dict[str, Callable[..., nn.Sequential]] = {
    "six_layers": six_layers,
    "six_layers_late_pools": six_layers_late_pools,
    "four_layers": four_layers,
    "dni_network": dni_network,
}
"""Networks of layer after layer and a classifier. Unless another number of blocks is asked for, each layer is a block;
the classifier belongs to the last."""


class ResidualUnit(nn.Module):
    """Two 3×3 convolutions with BatchNorm beside a shortcut, padded with channels of zeros where their number grows."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.added = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return F.relu(residual + shortcut)


def cifar_resnet(depth: int, in_channels: int, num_classes: int) -> nn.Sequential:
    """Return a ResNet for CIFAR of ``depth`` = 6n + 2 layers: three times n units, of 16, 32 and 64 channels."""
    units: list[nn.Module] = []
    before = 16
    for after, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range((depth - 2) // 6):
            units.append(ResidualUnit(before, after, stride if i == 0 else 1))
            before = after
    stem = nn.Sequential(nn.Conv2d(in_channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
    network = nn.Sequential(stem, *units, classifier)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.weight[0, 0].numel() * module.out_channels)))
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return network


def make_network(name: str, in_channels: int, num_classes: int, channels: int | None) -> tuple[nn.Module, list[str]]:
    """Return a network for images of about 32×32, and the layers to cut after (none: let balance choose).

    Args:
        name: one of :data:`LAYERED`; resnet20, 32, 44, 56 or 110, those of the paper on CIFAR; or a classification
            model of torchvision, where ResNets get a 3×3 first convolution and no first pool, VGGs a linear classifier.
        in_channels: of the images.
        num_classes: of the classifier.
        channels: of a layered network's first convolution; None: as many as in the paper.

    Raises:
        ValueError: for another name, or for channels that the network cannot have.
    """
    if name in LAYERED:
        network = LAYERED[name](in_channels, num_classes, **({} if channels is None else {"channels": channels}))
        return network, [str(i) for i in range(len(network) - 2)]
    if channels is not None:
        raise ValueError(f"--channels is of {', '.join(LAYERED)} only, {name} has its own.")
    of_cifar = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
    if name in of_cifar:
        return cifar_resnet(of_cifar[name], in_channels, num_classes), []
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        raise ValueError(
            f"There is no network {name!r}. There are {', '.join([*LAYERED, *of_cifar])}, and those of torchvision: "
            f"{', '.join(known)}."
        )
    if in_channels != 3:
        raise ValueError(f"{name} takes images of three channels, these have {in_channels}.")
    model = torchvision.models.get_model(name, num_classes=num_classes)
    if isinstance(model, torchvision.models.ResNet):
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        torch.nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif isinstance(model, torchvision.models.VGG):
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, num_classes)
    return model, []
