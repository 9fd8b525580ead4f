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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_dgl import BlockSummary, DGLModule, DGLStrategy

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f'{error}. The quickstart needs scikit-learn and matplotlib: pip install "lightning-dgl[examples]"')

# Lightning's hints about loggers, GPUs and data loader workers are of no use here.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|GPU available but not used|LeafSpec).*")


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
    """Return training and validation images (N, 1, 16, 16) and labels (N,), always split in the same way."""
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
    """Keeps the validation accuracies of every epoch, in percent."""

    def __init__(self) -> None:
        self.accuracy: dict[str, list[float]] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/acc"):
                self.accuracy.setdefault(name, []).append(100 * value.item())


def make_module(network: nn.Module, num_blocks: int, args: argparse.Namespace) -> DGLModule:
    def sgd(params: Iterable[nn.Parameter]) -> Optimizer:
        return SGD(params, lr=0.02, momentum=0.9, weight_decay=5e-4)

    def cosine(optimizer: Optimizer) -> LRScheduler:
        return CosineAnnealingLR(optimizer, T_max=args.epochs)

    return DGLModule(
        network, num_blocks, example_input=(2, 1, 16, 16), head=args.head, optimizer=sgd, lr_scheduler=cosine
    )


def train(module: DGLModule, callbacks: list[L.Callback], args: argparse.Namespace) -> dict[str, list[float]]:
    """Train ``module`` and return its validation accuracies in percent: name -> one for each epoch."""
    L.seed_everything(args.seed, verbose=False)  # the same batches in the same order, whatever is trained
    train_data, val_data = digits()
    curves = Curves()
    trainer = L.Trainer(
        strategy=DGLStrategy(),
        accelerator="cpu",
        devices=1,
        max_epochs=args.epochs,
        callbacks=[*callbacks, curves],
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
    return curves.accuracy


# The results


def show(module: DGLModule, dgl: dict[str, list[float]], backprop: dict[str, list[float]]) -> None:
    """Print the validation accuracies after the last epoch."""
    table = Table(title=f"Validation accuracy after epoch {len(backprop['val/acc'])}", title_justify="left")
    table.add_column("Trained by")
    table.add_column("Scores of")
    table.add_column("Accuracy", justify="right")
    for j, layers in enumerate(module.block_names):
        table.add_row("DGL", f"block {j} ({layers})", f"{dgl[f'val/acc_block{j}'][-1]:.1f} %")
    table.add_row("DGL", "ensemble of all blocks", f"{dgl['val/acc_ensemble'][-1]:.1f} %", end_section=True)
    table.add_row("backpropagation", "the same network, end to end", f"{backprop['val/acc'][-1]:.1f} %")
    Console().print(table)


def plot(dgl: dict[str, list[float]], backprop: dict[str, list[float]], num_blocks: int, file: Path) -> None:
    """Save the validation accuracies after each epoch as a picture."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(backprop["val/acc"]) + 1)
    for j in range(num_blocks):
        axes.plot(epochs, dgl[f"val/acc_block{j}"], marker=".", label=f"DGL, block {j}")
    axes.plot(epochs, dgl["val/acc_ensemble"], "--", marker=".", label="DGL, ensemble")
    axes.plot(epochs, backprop["val/acc"], "k", marker=".", label="backpropagation")
    axes.set(xlabel="Epoch", ylabel="Validation accuracy (%)", title="Handwritten digits")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


# The command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return parse


def main() -> None:
    parser = Parser(
        description="Train a small CNN on handwritten digits in greedily trained blocks, and by backpropagation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=whole_number(1, 10_000), default=10, help="passes through the data")
    parser.add_argument("--blocks", type=whole_number(1, 1000), default=4, help="blocks to cut the network into")
    parser.add_argument("--head", default="augmented", help="auxiliary heads: augmented, linear, mlp, mlp_sr or cnn")
    parser.add_argument("--batch-size", type=whole_number(2, 1437), default=32, help="images in a training batch")
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0, help="for weights and batches")
    parser.add_argument("--plot", type=Path, default="quickstart_accuracy.png", help="file for the accuracy curves")
    args = parser.parse_args()
    if not args.plot.suffix:
        parser.error(f"argument --plot: must be a file name that ends in .png, .pdf or .svg, got '{args.plot}'")

    torch.set_num_threads(1)  # more would not help so small a network; take this out for a larger one
    L.seed_everything(args.seed, verbose=False)
    network = DigitNet()
    try:
        # Both start from the same weights; one block is plain end-to-end backpropagation.
        backprop_module = make_module(copy.deepcopy(network), 1, args)
        dgl_module = make_module(network, args.blocks, args)
    except ValueError as error:
        parser.error(str(error))
    try:
        Figure().savefig(args.plot)  # rather than to find out after the training that it cannot be saved there
    except (ValueError, OSError) as error:
        parser.error(f"argument --plot: {error}")

    dgl = train(dgl_module, [BlockSummary()], args)
    backprop = train(backprop_module, [], args)
    show(dgl_module, dgl, backprop)
    plot(dgl, backprop, args.blocks, args.plot)
    print(f"Curves saved to {args.plot}")


if __name__ == "__main__":
    main()
