"""How slow may a block be? The accuracy of asynchronous DGL against the slow-down of one block and the buffer's size.

    pip install "lightning-dgl[examples]"
    python examples/async_delays.py                                     # digits, some minutes
    python examples/async_delays.py --data cifar10 --channels 128 --epochs 50 --step-epochs 15 --seeds 0 1 2

The second command is the paper's protocol: six convolutions, six blocks with MLP heads, the third block slowed down;
for every buffer size a line of the last block's test accuracy against the slow-down, and synchronous DGL beside them.
Every block trains for ``--epochs`` epochs of its own; the others pass on their output until the slow one has finished.

Results go to a CSV file as they come. A run that is there already is not repeated: to go on after an interruption, or
to add slow-downs, buffer sizes or seeds, give the command again.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR

from lightning_dgl import Asynchronous, DGLModule, DGLStrategy

try:
    from image_data import Images, Preprocessing, batches, load
    from matplotlib.figure import Figure
except ImportError as error:
    sys.exit(f'{error}. This example needs scikit-learn and matplotlib: pip install "lightning-dgl[examples]"')

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|GPU available but not used|LeafSpec).*")

SYNCHRONOUS = "sync"


def six_layers(in_channels: int, channels: int, num_classes: int) -> nn.Sequential:
    """The paper's network: six 3×3 convolutions with ``channels`` × 1, 1, 2, 2, 4, 4, max-pools before two of them."""
    widths = [channels * factor for factor in (1, 1, 2, 2, 4, 4)]
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip([in_channels, *widths], widths, strict=False)):
        pool: list[nn.Module] = [nn.MaxPool2d(2)] if i in (2, 4) else []
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers.append(nn.Sequential(*pool, convolution, nn.BatchNorm2d(after), nn.ReLU()))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], num_classes))


class Module(DGLModule):
    """A DGLModule that gets uint8 images."""

    preprocessing: Preprocessing

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return self.preprocessing(images, self.trainer.training), labels


def make_module(in_channels: int, num_classes: int, size: int, args: argparse.Namespace) -> Module:
    def sgd(params: Iterable[nn.Parameter]) -> Optimizer:
        return SGD(params, lr=args.lr, momentum=0.9, weight_decay=5e-4)

    def steps(optimizer: Optimizer) -> LRScheduler:
        return StepLR(optimizer, args.step_epochs, 0.2)

    return Module(
        six_layers(in_channels, args.channels, num_classes),
        split_at=[str(i) for i in range(5)],
        example_input=(2, in_channels, size, size),
        head="mlp",
        optimizer=sgd,
        lr_scheduler=steps,
    )


class UntilAllHaveFinished(L.Callback):
    """Ends training when the slowest block has taken its last step; shows how far that is."""

    def __init__(self, epochs: int, progress: Progress) -> None:
        self._epochs, self._progress = epochs, progress
        self._task = progress.add_task("", total=epochs)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        updates = min(block.updates for block in pl_module.progress)
        total = self._epochs * trainer.num_training_batches
        self._progress.update(self._task, completed=int(self._epochs * updates / total))
        trainer.should_stop = updates >= total

    def on_train_end(self, *_: Any) -> None:
        self._progress.remove_task(self._task)


def train(
    data: tuple[Images, Images], slowdown: str, buffer_size: int, seed: int, args: argparse.Namespace, bar: Progress
) -> list[float]:
    """Test accuracy of every block, in percent, after training."""
    train_images, test_images = data
    L.seed_everything(seed, verbose=False)
    channels, size = train_images[0].shape[1:3]
    module = make_module(channels, int(train_images[1].max()) + 1, size, args)
    module.preprocessing = Preprocessing(train_images[0], augment=args.data != "digits")
    schedule: Any = SYNCHRONOUS
    if slowdown != SYNCHRONOUS:
        slow = {args.slow_block: float(slowdown)}
        schedule = Asynchronous(buffer_size, slowdown=slow, epochs_per_block=args.epochs)
    trainer = L.Trainer(
        strategy=DGLStrategy(schedule),
        accelerator=args.accelerator,
        devices=1,
        max_epochs=args.epochs if slowdown == SYNCHRONOUS else -1,
        callbacks=[UntilAllHaveFinished(args.epochs, bar)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, batches(train_images, args.batch_size, train=True))
    trainer.test(module, batches(test_images, 500, train=False), verbose=False)
    return [100 * trainer.callback_metrics[f"test/acc_block{j}"].item() for j in range(module.num_blocks)]


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def plot(rows: list[dict[str, str]], slow_block: int, file: Path) -> None:
    """Draw the last block's accuracy against the slow-down, a line for each buffer size."""

    def points(buffer_size: str) -> list[tuple[float, list[float]]]:
        own = [row for row in rows if row["buffer_size"] == buffer_size]
        slowdowns = sorted({float(row["slowdown"]) for row in own})
        return [(s, [float(row["last_block"]) for row in own if float(row["slowdown"]) == s]) for s in slowdowns]

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for size in sorted({row["buffer_size"] for row in rows if row["slowdown"] != SYNCHRONOUS}, key=int):
        line = points(size)
        means = [statistics.fmean(values) for _, values in line]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in line]
        axes.errorbar([s for s, _ in line], means, spread, marker="o", capsize=3, label=f"M = {size}")
    synchronous = [float(row["last_block"]) for row in rows if row["slowdown"] == SYNCHRONOUS]
    if synchronous:
        axes.axhline(statistics.fmean(synchronous), color="k", linestyle="--", label="synchronous")
    axes.set(xlabel=f"Slow-down S of block {slow_block}", ylabel="Test accuracy of the last block (%)")
    axes.grid(alpha=0.3)
    axes.legend(title="Replay buffer")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="digits, cifar10, or a folder with train/ and test/")
    parser.add_argument("--images", type=int, help="train on the first so many images of a random order; default: all")
    parser.add_argument("--slowdowns", nargs="+", default=[SYNCHRONOUS, "1.0", "1.2", "1.5", "2.0"], help="S, or sync")
    parser.add_argument("--buffer-sizes", type=int, nargs="+", default=[1, 5, 30], help="M, in batches")
    parser.add_argument("--slow-block", type=int, default=2, help="which block is slowed down, counting from 0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each block")
    parser.add_argument("--step-epochs", type=int, default=4, help="epochs between drops of the learning rate, to 1/5")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=16, help="of the first two convolutions; 128 in the paper")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--output", type=Path, default=Path("async_delays"), help="folder for results.csv and the plot")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    try:
        data = load(args.data, args.output / "data")
    except FileNotFoundError as error:
        parser.error(str(error))
    if args.images:
        order = torch.randperm(len(data[0][0]), generator=torch.Generator().manual_seed(0))[: args.images]
        data = (data[0][0][order], data[0][1][order]), data[1]
    setting = " ".join(
        f"{name}={getattr(args, name)}"
        for name in ("data", "images", "slow_block", "epochs", "step_epochs", "lr", "batch_size", "channels")
    )
    runs = [
        (setting, slowdown, "-" if slowdown == SYNCHRONOUS else str(size), str(seed))
        for seed in args.seeds
        for slowdown in args.slowdowns
        for size in (args.buffer_sizes[:1] if slowdown == SYNCHRONOUS else args.buffer_sizes)
    ]
    results = args.output / "results.csv"
    columns = ["setting", "slowdown", "buffer_size", "seed", "last_block", "blocks", "seconds"]
    if not results.exists():
        results.write_text(",".join(columns) + "\n")
    done = {tuple(row[name] for name in columns[:4]) for row in read(results)}
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*shown) as bar:
        task = bar.add_task("runs", total=len(runs), completed=sum(run in done for run in runs))
        for run in (run for run in runs if run not in done):
            _, slowdown, size, seed = run
            bar.update(task, description=f"slow-down {slowdown}, M = {size}, seed {seed}")
            began = time.monotonic()
            blocks = train(data, slowdown, int(size) if size.isdecimal() else 1, int(seed), args, bar)
            in_words = " ".join(f"{accuracy:.2f}" for accuracy in blocks)
            with results.open("a", newline="") as file:
                csv.writer(file).writerow([*run, f"{blocks[-1]:.2f}", in_words, f"{time.monotonic() - began:.0f}"])
            bar.advance(task)
            bar.console.print(f"slow-down {slowdown}, M = {size}, seed {seed}: last block {blocks[-1]:.2f} %")
    wanted = set(runs)
    rows = [row for row in read(results) if tuple(row[name] for name in columns[:4]) in wanted]
    plot(rows, args.slow_block, args.output / "async_delays.png")
    print(f"Results: {results}, plot: {args.output / 'async_delays.png'}")


if __name__ == "__main__":
    main()
