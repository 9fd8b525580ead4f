"""Auxiliary heads: small networks that score a block's output, so that the block has a local loss to train on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SpatialSize = int | tuple[int, int]


def _conv(channels: int, kernel_size: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]


def _fully_connected(features: int, num_layers: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(num_layers):
        layers += [nn.Linear(features, features), nn.BatchNorm1d(features), nn.ReLU(inplace=True)]
    return layers


def _quarter(spatial_size: SpatialSize) -> tuple[int, int]:
    height, width = spatial_size if isinstance(spatial_size, tuple) else (spatial_size, spatial_size)
    return math.ceil(height / 4), math.ceil(width / 4)


class _AveragePool(nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` whose gradients on an accelerator are the same in every run.

    There the original adds gradients up in any order, and refuses to if ``Trainer(deterministic=True)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type in ("cpu", "meta"):
            return super().forward(x)
        size = self.output_size if isinstance(self.output_size, tuple) else (self.output_size, self.output_size)
        return _average_parts(x, size)  # type: ignore[arg-type]  # no None here


def _average_parts(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average (N, C, H, W) over the parts of a grid of ``size``; equals adaptive pooling up to rounding."""
    (height, width), (rows, columns) = x.shape[2:], size
    if height % rows == 0 and width % columns == 0:
        return F.avg_pool2d(x, (height // rows, width // columns))
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (_shares(rows, height, wide) @ (wide @ _shares(columns, width, wide).T)).to(x.dtype)


def _shares(parts: int, length: int, like: Tensor) -> Tensor:
    """Return the share (parts, length) that each of ``length`` values has in the mean of each part."""
    place = torch.arange(length, device=like.device)
    part = torch.arange(parts, device=like.device)[:, None]
    inside = (place >= part * length // parts) & (place * parts < (part + 1) * length)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)


class _Head(nn.Module):
    """Applies layers in order; subclasses choose them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LinearHead(_Head):
    """Average-pool to 2×2, then one linear layer.

    Args:
        channels: C, channels of the block's output.
        spatial_size: s, its height and width (one number or a pair); any size works, 1 included.
        num_classes: number of class scores.

    Shape:
        (N, C, H, W) -> (N, num_classes)

    Example::

        >>> import torch
        >>> LinearHead(channels=16, spatial_size=8, num_classes=10)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int, spatial_size: SpatialSize, num_classes: int) -> None:
        super().__init__(_AveragePool(2), nn.Flatten(), nn.Linear(4 * channels, num_classes))


class MLPHead(_Head):
    """MLP-aux: average-pool to ⌈s/4⌉ × ⌈s/4⌉ and on to 2×2, then three hidden layers of 4C units with BatchNorm.

    Args:
        channels: C, channels of the block's output.
        spatial_size: s, its height and width (one number or a pair); any size works, 1 included.
        num_classes: number of class scores.

    Shape:
        (N, C, H, W) -> (N, num_classes)

    Example::

        >>> import torch
        >>> MLPHead(channels=16, spatial_size=8, num_classes=10)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int, spatial_size: SpatialSize, num_classes: int) -> None:
        super().__init__(
            _AveragePool(_quarter(spatial_size)),
            _AveragePool(2),
            nn.Flatten(),
            *_fully_connected(4 * channels, 3),
            nn.Linear(4 * channels, num_classes),
        )


class MLPSRHead(_Head):
    """MLP-SR-aux, "spatially reducing": average-pool to ⌈s/4⌉ × ⌈s/4⌉, three 1×1 convolutions, then as MLP-aux.

    Args:
        channels: C, channels of the block's output.
        spatial_size: s, its height and width (one number or a pair); any size works, 1 included.
        num_classes: number of class scores.

    Shape:
        (N, C, H, W) -> (N, num_classes)

    Example::

        >>> import torch
        >>> MLPSRHead(channels=16, spatial_size=8, num_classes=10)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int, spatial_size: SpatialSize, num_classes: int) -> None:
        super().__init__(
            _AveragePool(_quarter(spatial_size)),
            *(layer for _ in range(3) for layer in _conv(channels, kernel_size=1)),
            _AveragePool(2),
            nn.Flatten(),
            *_fully_connected(4 * channels, 3),
            nn.Linear(4 * channels, num_classes),
        )


class CNNHead(_Head):
    """CNN-aux: two 3×3 convolutions at full resolution, average-pool to 2×2, BatchNorm, linear layer.

    Args:
        channels: C, channels of the block's output.
        spatial_size: s, its height and width (one number or a pair); any size works, 1 included.
        num_classes: number of class scores.

    Shape:
        (N, C, H, W) -> (N, num_classes)

    Example::

        >>> import torch
        >>> CNNHead(channels=16, spatial_size=8, num_classes=10)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int, spatial_size: SpatialSize, num_classes: int) -> None:
        super().__init__(
            *(layer for _ in range(2) for layer in _conv(channels, kernel_size=3)),
            _AveragePool(2),
            nn.BatchNorm2d(channels),
            nn.Flatten(),
            nn.Linear(4 * channels, num_classes),
        )


HeadFactory = Callable[[int, SpatialSize, int], nn.Module]
"""``(channels, spatial_size, num_classes) -> head``; the head reads (N, C, H, W) and returns (N, num_classes)."""

HEADS: dict[str, HeadFactory] = {"linear": LinearHead, "mlp": MLPHead, "mlp_sr": MLPSRHead, "cnn": CNNHead}
