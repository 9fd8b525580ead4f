"""What the benchmarks of several ranks train: a network, its images, and the precision and layout it is trained in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import in_processes, sgd
from examples.recipes.networks import make_network
from lightning_dgl import DGLModule

CONVOLUTIONS = 3
PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class Workload:
    """A network, and what it is trained on.

    Attributes:
        network: "equal" for blocks of equal cost, see :func:`equal_blocks`; or a model of torchvision, below 64×64
            pixels in its form for CIFAR, where ResNets begin with a 3×3 convolution and VGGs end in a linear layer.
        channels: of equal blocks.
        image_size: height and width.
        precision: "32-true", or "bf16-mixed", then in channels_last.
        batch_size: images a step.
        blocks: how many.
        split_at: where to cut; see :meth:`balanced`.
    """

    network: str = "equal"
    channels: int = 64
    image_size: int = 32
    precision: str = "32-true"
    batch_size: int = 128
    blocks: int = 2
    split_at: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.network != "equal" and self.network not in torchvision.models.list_models(torchvision.models):
            raise SystemExit(
                f"--network: must be 'equal' or a classification model of torchvision, got {self.network!r}."
            )
        if self.precision not in PRECISIONS:
            raise SystemExit(f"--precision: must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
        if self.is_bfloat16 and not torch.cpu.get_capabilities().get("avx512_bf16", False):
            raise SystemExit("--precision bf16-mixed: this CPU has no instructions for bfloat16. Pass 32-true.")

    @property
    def is_bfloat16(self) -> bool:
        return self.precision == "bf16-mixed"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.is_bfloat16 else torch.contiguous_format

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.is_bfloat16)

    def make_network(self) -> nn.Module:
        if self.network == "equal":
            network: nn.Module = equal_blocks(self.blocks, self.channels)
        elif self.image_size < 64:
            network, _ = make_network(self.network, 3, 10, None)
        else:
            network = torchvision.models.get_model(self.network, num_classes=10)
        return network.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def make_module(self, balance: str = "flops") -> DGLModule:
        cuts = {"split_at": list(self.split_at)} if self.split_at else {"num_blocks": self.blocks}
        size = self.image_size
        # Times are those of the batches that are trained on: small ones would count the weights for too much.
        example = torch.randn(self.batch_size if balance == "time" else 2, 3, size, size)
        with self.autocast():
            module = DGLModule(self.make_network(), **cuts, example_input=example, optimizer=sgd, balance=balance)  # type: ignore[arg-type]
        return module.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def balanced(self, balance: str = "time") -> Workload:
        """Return the workload with cuts that balance the blocks: by what is measured in its precision and layout."""
        if self.network == "equal":
            return replace(self, split_at=tuple(str(j) for j in range(self.blocks - 1)))
        (cuts,) = in_processes(1, 1, _cuts, self, balance)
        return replace(self, split_at=cuts)

    def images(self, num_steps: int, batches_a_step: int = 1) -> DataLoader[tuple[Tensor, ...]]:
        """Return noise in memory, for all steps."""
        # The same batch in every step, of which there is one copy.
        size = self.image_size
        data = TensorDataset(torch.randn(self.batch_size, 3, size, size), torch.randint(0, 10, (self.batch_size,)))
        indices = [i for _ in range(num_steps) for i in range(self.batch_size)]
        return DataLoader(torch.utils.data.Subset(data, indices), self.batch_size // batches_a_step)

    def __str__(self) -> str:
        name = f"equal blocks with {self.channels} channels" if self.network == "equal" else self.network
        cuts = f", cut after {', '.join(self.split_at)}" if self.split_at and self.network != "equal" else ""
        layout = ", channels_last" if self.is_bfloat16 else ""
        return f"{name}{cuts}, {self.image_size}×{self.image_size}, {self.precision}{layout}, batch {self.batch_size}"


def _cuts(_: int, workload: Workload, balance: str) -> tuple[str, ...]:
    return tuple(point.name for point in workload.make_module(balance).split_points)


def equal_blocks(num_blocks: int, channels: int) -> nn.Sequential:
    """Return blocks of a cheap and three 3×3 convolutions, with BatchNorm and ReLU; the last ends in a classifier.

    The cheap one is the first block's 3×3 on three channels, and 1×1 in the others. As neither passes a gradient on to
    its input, all blocks do about the same work.
    """

    def convolution(inputs: int, kernel_size: int) -> nn.Sequential:
        own = nn.Conv2d(inputs, channels, kernel_size, padding=kernel_size // 2, bias=False)
        return nn.Sequential(own, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

    blocks = []
    for j in range(num_blocks):
        cheap = convolution(channels, 1) if j else convolution(3, 3)
        blocks.append(nn.Sequential(cheap, *(convolution(channels, 3) for _ in range(CONVOLUTIONS))))
    blocks[-1].extend([nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10)])
    return nn.Sequential(*blocks)
