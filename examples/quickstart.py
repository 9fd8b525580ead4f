"""Train a small CNN on handwritten digits in greedily trained blocks, and by backpropagation to compare.

    pip install "lightning-dgl[examples]"
    python examples/quickstart.py

Nothing is downloaded: the digits come with scikit-learn. Copy this file and put in your own network and data.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_dgl import BlockSummary, DGLModule, DGLStrategy

try:
    import matplotlib
    from sklearn.datasets import load_digits

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
except ImportError as error:
    sys.exit(f'{error}: the quickstart needs scikit-learn and matplotlib, pip install "lightning-dgl[examples]"')


# The network: an ordinary CNN that knows nothing of blocks


class Conv(nn.Module):
    """3×3 convolution, BatchNorm, ReLU: (N, in_channels, H, W) -> (N, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class DigitNet(nn.Module):
    """Six convolutions and a linear classifier: (N, 1, 16, 16) -> class scores (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Conv(1, 32)
        self.conv2 = Conv(32, 32)
        self.conv3 = Conv(32, 64)
        self.conv4 = Conv(64, 64)
        self.conv5 = Conv(64, 64)
        self.conv6 = Conv(64, 64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        x = F.max_pool2d(x, 2)
        x = self.conv4(self.conv3(x))
        x = self.conv6(self.conv5(x))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.classifier(x)


# The data: 1797 real 8×8 images, 1437 to train on and 360 to validate


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and validation images (N, 1, 16, 16) and labels (N,), in a split that is always the same."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    x = F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
    y = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, val = order[:1437], order[1437:]
    x = (x - x[train].mean()) / x[train].std()
    return TensorDataset(x[train], y[train]), TensorDataset(x[val], y[val])


# Training


class Curves(L.Callback):
    """Keeps the validation accuracies of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def train(module: DGLModule, args: argparse.Namespace) -> list[dict[str, float]]:
    """Train ``module`` and return what it logged after each epoch."""
    L.seed_everything(args.seed, verbose=False)  # both networks see the same batches
    train_data, val_data = digits()
    curves = Curves()
    trainer = L.Trainer(
        strategy=DGLStrategy(),
        accelerator="cpu",
        devices=1,
        max_epochs=args.epochs,
        callbacks=[BlockSummary(), curves],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        num_sanity_val_steps=0,
    )
    trainer.fit(
        module,
        DataLoader(train_data, batch_size=args.batch_size, shuffle=True, drop_last=True),
        DataLoader(val_data, batch_size=len(val_data)),
    )
    return curves.epochs


# What the user asks for and gets


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # without the usage: one line


def number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return parse


def parse_args() -> tuple[Parser, argparse.Namespace]:
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=number(1, 10_000), default=10, help="passes through the data")
    parser.add_argument("--blocks", type=number(1, 1000), default=4, help="blocks to cut the network into")
    parser.add_argument(
        "--head", choices=["linear", "mlp", "mlp_sr", "cnn"], default="mlp_sr", help="auxiliary head of each block"
    )
    parser.add_argument("--batch-size", type=number(2, 1437), default=64, help="images in a training batch")
    parser.add_argument("--seed", type=number(0, 2**32 - 1), default=0, help="of the weights and the order of batches")
    parser.add_argument("--plot", type=Path, default="quickstart_accuracy.png", help="file to save the curves to")
    return parser, parser.parse_args()


def main() -> None:
    parser, args = parse_args()

    def sgd(params):
        return SGD(params, lr=args.lr)


if __name__ == "__main__":
    main()
