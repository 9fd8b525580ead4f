"""Train a CNN on CIFAR-10, or on another folder of small images, by any method of lightning-dgl.

    pip install "lightning-dgl[examples]"
    python examples/cifar10.py                                           # the paper's six layers, in six blocks
    python examples/cifar10.py --network resnet18 --blocks 4 --head mlp_sr
    python examples/cifar10.py --method backprop                         # the same network, end to end
    python examples/cifar10.py --method async --slowdown 1.5 --codec 256x8
    python examples/cifar10.py --data digits --epochs 5                  # a minute on a laptop, no download

The default protocol is the paper's: SGD with learning rate 0.1, momentum 0.9 and weight decay 5e-4, a fifth of the
learning rate every 15 epochs, 50 epochs, batch 128, random crops and flips. There is no validation split, as in the
paper: the accuracies are those on the test set, at the end of training.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.optim.swa_utils import update_bn

from lightning_dgl import Asynchronous, DGLModule, DGLStrategy, VectorQuantizer

try:
    from image_data import Images, Preprocessing, batches, load
    from networks import make_network
except ImportError as error:
    sys.exit(f'{error}. This example needs torchvision and scikit-learn: pip install "lightning-dgl[examples]"')

METHODS = ("dgl", "async", "backprop")


def codec(text: str) -> str | tuple[int, int] | None:
    """What ``--codec`` says: raw (None), "half", or a number of codes and their dimension, such as 256x8."""
    if text in ("raw", "half"):
        return None if text == "raw" else "half"
    num_codes, _, code_dim = text.partition("x")
    if not (num_codes.isdecimal() and code_dim.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be raw, half, or codes x dimension such as 256x8, got {text!r}")
    return int(num_codes), int(code_dim)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="cifar10, digits, or a folder with train/ and test/")
    parser.add_argument("--cache", type=Path, default=Path("data"), help="folder for what is downloaded and decoded")
    parser.add_argument("--images", type=int, help="train on the first so many images of a random order; default: all")
    parser.add_argument(
        "--network", default="six_layers", help="of networks.py, or a classification model of torchvision"
    )
    parser.add_argument("--channels", type=int, help="of the first layer, in the networks of networks.py")
    parser.add_argument("--method", default="dgl", choices=METHODS)
    parser.add_argument("--blocks", type=int, help="how many; default: each layer a block, four for torchvision's")
    parser.add_argument("--head", default="mlp_sr", choices=("linear", "mlp", "mlp_sr", "cnn"))
    parser.add_argument("--codec", type=codec, help="between blocks: raw, half, or codes x dimension such as 256x8")
    parser.add_argument("--buffer-size", type=int, default=8, help="of async, in batches")
    parser.add_argument("--slow-block", type=int, default=2, help="of async, which block is slowed down, from 0")
    parser.add_argument("--slowdown", type=float, default=1.0, help="of async, how many times slower it is")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--step-epochs", type=int, default=15, help="epochs between drops of the learning rate, to 1/5")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--update-bn", action="store_true", help="compute BatchNorm's statistics anew after training")
    parser.add_argument("--compile", action="store_true", help="by torch.compile; needs a C++ compiler")
    args = parser.parse_args(arguments)
    if isinstance(args.codec, tuple):
        # The trainings here are shorter than those that the default decay of 0.99 is for.
        args.codec = VectorQuantizer(*args.codec, decay=0.9, compile=args.compile)
    try:
        make_network(args.network, 3, 10, args.channels)
    except ValueError as error:
        parser.error(str(error))
    return args


def load_images(args: argparse.Namespace) -> tuple[Images, Images]:
    """Training and test images that the arguments ask for."""
    train, test = load(args.data, args.cache)
    if args.images:
        order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))[: args.images]
        train = train[0][order], train[1][order]
    return train, test


class Module(DGLModule):
    """A DGLModule that gets uint8 images."""

    preprocessing: Preprocessing

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return self.preprocessing(images, self.trainer.training), labels


def make_module(images: Images, args: argparse.Namespace) -> Module:
    in_channels, *size = images[0].shape[1:]
    network, split_at = make_network(args.network, in_channels, int(images[1].max()) + 1, args.channels)
    if args.method == "backprop":
        cuts: dict[str, Any] = {"num_blocks": 1}
    elif args.blocks is None and split_at:
        cuts = {"split_at": split_at}
    else:
        cuts = {"num_blocks": args.blocks or 4}

    def sgd(params: Iterable[nn.Parameter]) -> Optimizer:
        return SGD(params, lr=args.lr, momentum=0.9, weight_decay=5e-4)

    def steps(optimizer: Optimizer) -> LRScheduler:
        return StepLR(optimizer, args.step_epochs, 0.2)

    shape = (2, in_channels, *size)
    module = Module(network, **cuts, example_input=shape, head=args.head, optimizer=sgd, lr_scheduler=steps)
    module.preprocessing = Preprocessing(images[0], augment=args.data != "digits")
    return module


class UntilAllHaveFinished(L.Callback):
    """Ends training when the slowest block has taken its last step; shows how far that is."""

    def __init__(self, epochs: int, progress: Progress) -> None:
        self._epochs, self._progress = epochs, progress
        self._task = progress.add_task("epochs", total=epochs)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        updates = min(block.updates for block in pl_module.progress)
        total = self._epochs * trainer.num_training_batches
        self._progress.update(self._task, completed=int(self._epochs * updates / total))
        trainer.should_stop = updates >= total

    def on_train_end(self, *_: Any) -> None:
        self._progress.remove_task(self._task)


class AllScores(nn.Module):
    """Computes the class scores of every block, for what runs a module on batches of images."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.module.block_scores(images)


def train(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Train as the arguments say.

    Returns:
        ``accuracies``, on the test set, of every block in percent; that of their ``ensemble``; ``compression``, how
        many times smaller than the blocks' outputs was what the next ones were given, targets and codebooks included.
    """
    train_images, test_images = load_images(args)
    L.seed_everything(args.seed, verbose=False)
    module = make_module(train_images, args)
    schedule: Any = "sync"
    if args.method == "async":
        slowdown = {args.slow_block: args.slowdown}
        schedule = Asynchronous(args.buffer_size, slowdown=slowdown, epochs_per_block=args.epochs)
    trainer = L.Trainer(
        strategy=DGLStrategy(schedule, codec=args.codec),
        accelerator=args.accelerator,
        devices=1,
        max_epochs=-1 if args.method == "async" else args.epochs,
        callbacks=[UntilAllHaveFinished(args.epochs, progress)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, batches(train_images, args.batch_size, train=True))
    if args.update_bn:
        # With a codec, BatchNorm has seen decoded activations, but what is kept and tested is the network without it.
        images = (batch.to(module.device) for batch, _ in batches(train_images, args.batch_size, train=True))
        update_bn((module.preprocessing(batch, train=True) for batch in images), AllScores(module))
    traffic = [own for own in module.boundaries.traffic if own.batches]
    encoded = sum(own.encoded_bytes for own in traffic)
    trainer.test(module, batches(test_images, 500, train=False), verbose=False)
    values = {name: 100 * value.item() for name, value in trainer.callback_metrics.items()}
    return {
        "accuracies": [values[f"test/acc_block{j}"] for j in range(module.num_blocks)],
        "ensemble": values["test/acc_ensemble"],
        "compression": sum(own.raw_bytes for own in traffic) / encoded if encoded else 1.0,
    }


def be_quiet() -> None:
    """Leave out what Lightning says of every run and nobody needs here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    expected = ("does not have many workers", "GPU available but not used", "LeafSpec", "have no `val_dataloader`")
    warnings.filterwarnings("ignore", f".*({'|'.join(expected)}).*")


def main() -> None:
    be_quiet()
    args = parse()
    with Progress() as progress:
        try:
            outcome = train(args, progress)
        except (FileNotFoundError, ValueError) as error:
            sys.exit(str(error))
    for j, accuracy in enumerate(outcome["accuracies"]):
        print(f"block {j}: {accuracy:.2f} %")
    print(f"ensemble: {outcome['ensemble']:.2f} %")
    if outcome["compression"] > 1:
        print(f"What crossed the boundaries was {outcome['compression']:.1f} times smaller than raw.")


if __name__ == "__main__":
    main()
