"""Train a CNN on CIFAR-10, or on another folder of small images, by any method of lightning-dgl.

    pip install "lightning-dgl[examples]"
    python examples/recipes/cifar10.py                                           # the paper's six layers, in six blocks
    python examples/recipes/cifar10.py --recipe modern --network resnet18 --blocks 4
    python examples/recipes/cifar10.py --method backprop                         # the same network, end to end
    python examples/recipes/cifar10.py --method sequential                       # one block after another
    python examples/recipes/cifar10.py --method async --slowdown 1.5 --codec 256x8
    python examples/recipes/cifar10.py --data digits --epochs 5                  # a minute on a laptop, no download
    python examples/recipes/cifar10.py --wandb online                            # with Weights & Biases

The default protocol is the paper's: SGD with learning rate 0.1, momentum 0.9 and weight decay 5e-4, a fifth of the
learning rate every 15 epochs, 50 epochs, batch 128, random crops and flips. ``--recipe modern`` trains 30 epochs with
Nesterov momentum and one cycle of the learning rate, up to 0.2 and down to 0, with augmented heads, in bfloat16 and
channels_last where the hardware is fast in them. There is no validation split, as in the paper: val/acc is the accuracy
on the test set.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR
from torch.optim.swa_utils import update_bn

from lightning_dgl import Asynchronous, DGLModule, DGLStrategy, Sequential
from lightning_dgl.splitting import num_parameters

try:
    from changes import AFTERWARDS, CHANGES
    from dni import DNIModule
    from image_data import Images, Preprocessing, batches, load
    from networks import make_network
    from recipe import add_arguments, add_codec, be_quiet, finish, keep, make_callbacks, make_codec, make_loggers
except ImportError as error:
    sys.exit(f'{error}. This example needs torchvision and scikit-learn: pip install "lightning-dgl[examples]"')

METHODS = ("dgl", "async", "sequential", "backprop", "dni", "cdni")


def modern() -> dict[str, Any]:
    """Return what ``--recipe modern`` changes of the arguments' defaults."""
    if torch.cuda.is_available():
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    fast = {"precision": "bf16-mixed", "channels_last": True} if has_bfloat16 else {}
    return {"epochs": 30, "lr": 0.2, "one_cycle": True, "head": "augmented", **fast}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="paper", choices=("paper", "modern"), help="sets defaults, see above")
    parser.add_argument("--data", default="cifar10", help="cifar10, digits, or a folder with train/ and test/")
    parser.add_argument("--cache", type=Path, default=Path("data"), help="folder for what is downloaded and decoded")
    parser.add_argument("--images", type=int, help="train on the first so many images of a random order; default: all")
    parser.add_argument(
        "--network", default="six_layers", help="of networks.py, or a classification model of torchvision"
    )
    parser.add_argument("--channels", type=int, help="of the first layer, in the networks of networks.py")
    parser.add_argument("--method", default="dgl", choices=METHODS)
    parser.add_argument("--blocks", type=int, help="how many; default: each layer a block, four for torchvision's")
    parser.add_argument("--head", default="mlp_sr", choices=("linear", "mlp", "mlp_sr", "cnn", "augmented"))
    add_codec(parser)
    parser.add_argument("--buffer-size", type=int, default=8, help="of async, in batches")
    parser.add_argument("--slow-block", type=int, default=2, help="of async, which block is slowed down, from 0")
    parser.add_argument("--slowdown", type=float, default=1.0, help="of async, how many times slower it is")
    parser.add_argument("--epochs", type=int, default=50, help="of each block")
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "adam"))
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="of sgd")
    parser.add_argument("--drops", type=int, nargs="*", default=[15, 30, 45], help="after which epochs the rate drops")
    parser.add_argument("--drop-to", type=float, default=0.2, help="which part of the learning rate is left then")
    parser.add_argument(
        "--one-cycle", action="store_true", help="instead of --drops; with Nesterov momentum in --optimizer sgd"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--update-bn", action="store_true", help="compute BatchNorm's statistics again after training")
    parser.add_argument("--change", choices=CHANGES, help="of changes.py: what is tried to gain accuracy")
    parser.add_argument("--precision", default="32-true", help="as of Lightning's Trainer")
    add_arguments(parser)
    if parser.parse_args(arguments).recipe == "modern":
        parser.set_defaults(**modern())
    args = parser.parse_args(arguments)
    try:
        with torch.device("meta"):  # only to refuse what there is not
            make_network(args.network, 3, 10, args.channels)
    except ValueError as error:
        parser.error(str(error))
    for option in ("compile", "change"):
        if getattr(args, option) and args.method in ("dni", "cdni"):
            parser.error(f"argument --{option}: is of blocks and heads, not of --method {args.method}")
    return args


def load_images(args: argparse.Namespace) -> tuple[Images, Images]:
    """Return the training and test images that the arguments ask for."""
    train, test = load(args.data, args.cache)
    if args.images:
        order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))[: args.images]
        train = train[0][order], train[1][order]
    return train, test


class Preprocessed(L.LightningModule):
    """Makes a batch of uint8 images into what a network takes, on the device."""

    preprocessing: Preprocessing

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return self.preprocessing(images, self.trainer.training), labels


class PreprocessedDGL(Preprocessed, DGLModule):
    pass


class PreprocessedDNI(Preprocessed, DNIModule):
    pass


def make_module(images: Images, args: argparse.Namespace) -> PreprocessedDGL | PreprocessedDNI:
    in_channels, *size = images[0].shape[1:]
    num_classes = int(images[1].max()) + 1
    network, split_at = make_network(args.network, in_channels, num_classes, args.channels)
    module: PreprocessedDGL | PreprocessedDNI
    if args.method in ("dni", "cdni"):
        if not split_at:
            raise ValueError(f"--method {args.method} is for networks of networks.py, got {args.network}.")
        if args.network == "dni_network":  # a synthesiser before its classifier, too, as in the authors' code
            split_at = [*split_at, str(len(network) - 2)]
        example = torch.zeros(2, in_channels, *size)
        module = PreprocessedDNI(network, split_at, example, num_classes, args.method == "cdni", args.lr)
    else:
        if args.method == "backprop":
            cuts: dict[str, Any] = {"num_blocks": 1}
        elif args.blocks is None and split_at:
            cuts = {"split_at": split_at}
        else:
            cuts = {"num_blocks": args.blocks or 4}

        def optimizer(params: Iterable[nn.Parameter]) -> Optimizer:
            if args.optimizer == "adam":
                return Adam(params, args.lr)
            return SGD(params, args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=args.one_cycle)

        num_steps = args.epochs * (len(images[0]) // args.batch_size)

        def rate(optimizer: Optimizer) -> LRScheduler:
            if not args.one_cycle:
                return MultiStepLR(optimizer, args.drops, args.drop_to)
            # Up for a quarter of the steps, then down; at 0 for a block that takes more steps than the others.
            return LambdaLR(
                optimizer, lambda step: max(0.0, min(4 * (step + 1), 4 / 3 * (num_steps - step)) / num_steps)
            )

        options = {
            "head": args.head,
            "optimizer": optimizer,
            "lr_scheduler": rate,
            "lr_interval": "step" if args.one_cycle else "epoch",
            "compile": args.compile,
            **CHANGES.get(args.change, {}),
        }
        module = PreprocessedDGL(network, **cuts, example_input=(2, in_channels, *size), **options)
        if args.change in AFTERWARDS:
            AFTERWARDS[args.change](module)
    module.preprocessing = Preprocessing(images[0], augment=args.data != "digits")
    if args.channels_last:
        module.to(memory_format=torch.channels_last)  # images follow at the first convolution
    return module


def make_strategy(args: argparse.Namespace) -> Any:
    if args.method in ("dni", "cdni"):
        return "auto"
    schedule: Any = "sync"
    if args.method == "sequential":
        schedule = Sequential(args.epochs)
    elif args.method == "async":
        slowdown = {args.slow_block: args.slowdown}
        schedule = Asynchronous(args.buffer_size, slowdown=slowdown, epochs_per_block=args.epochs)
    return DGLStrategy(schedule, codec=make_codec(args))


class StopWhenAllHaveFinished(L.Callback):
    """Ends asynchronous training when the slowest block has taken its last step."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        updates = min(block.updates for block in pl_module.progress)
        trainer.should_stop = updates >= self._epochs * trainer.num_training_batches


class CPUTime(L.Callback):
    """Counts the CPU seconds of a training, those before an interruption included."""

    def __init__(self) -> None:
        self._since, self._before = time.process_time(), 0.0

    @property
    def seconds(self) -> float:
        return self._before + time.process_time() - self._since

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._since, self._before = time.process_time(), state_dict["seconds"]


class AllScores(nn.Module):
    """Computes the class scores of every block, for what runs a module on batches of images."""

    def __init__(self, module: DGLModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.module.block_scores(images)


def train(args: argparse.Namespace, loggers: Sequence[Logger] = (), checkpoint: Path | None = None) -> dict[str, Any]:
    """Train as the arguments say; with loggers, also show progress and evaluate after every epoch.

    Args:
        args: of :func:`parse`.
        loggers: for what is measured while it trains.
        checkpoint: file for the state after each epoch, from which the training goes on if the file is there.

    Returns:
        ``accuracies``, on the test set, of every block in percent; that of their ``ensemble``; ``compression``, how
        many times smaller than the blocks' outputs was what the next ones were given, targets and codebooks included;
        ``head_flops`` and ``head_parameters``, of the auxiliary heads over those of the network; ``cpu_seconds``.
    """
    cpu_time = CPUTime()
    train_images, test_images = load_images(args)
    L.seed_everything(args.seed, verbose=False)
    module = make_module(train_images, args)
    trainer = L.Trainer(
        strategy=make_strategy(args),
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        max_epochs=-1 if args.method in ("async", "sequential") else args.epochs,
        logger=loggers,
        callbacks=[
            cpu_time,
            *([] if checkpoint is None else [keep(checkpoint)]),
            *([StopWhenAllHaveFinished(args.epochs)] if args.method == "async" else []),
            *(make_callbacks(loggers, module) if loggers else []),
        ],
        enable_checkpointing=bool(loggers) or checkpoint is not None,
        enable_model_summary=bool(loggers),
        enable_progress_bar=bool(loggers),
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    train_batches, test_batches = batches(train_images, args.batch_size, train=True), batches(test_images, 500)
    resumed = checkpoint if checkpoint is not None and checkpoint.exists() else None
    trainer.fit(module, train_batches, test_batches if loggers else None, ckpt_path=resumed)
    if args.update_bn:
        # With a codec, BatchNorm has seen decoded activations, but what is kept and tested is the network without it.
        images = (batch.to(module.device) for batch, _ in train_batches)
        update_bn((module.preprocessing(batch, train=True) for batch in images), AllScores(module))
    # Before the test, which resets the counts.
    links = module.run.links if isinstance(module, DGLModule) and module.run is not None else []
    traffic = [link.traffic for link in links if link.traffic.batches]
    encoded = sum(own.encoded_bytes for own in traffic)
    trainer.test(module, test_batches, verbose=False)
    if loggers:
        finish(trainer, module)
    values = {name: 100 * value.item() for name, value in trainer.callback_metrics.items()}
    if not isinstance(module, DGLModule):
        accuracy = values["test/acc"]
        return {
            **{"accuracies": [accuracy], "ensemble": accuracy, "compression": 1.0},
            **{"head_flops": 0.0, "head_parameters": 0.0, "cpu_seconds": cpu_time.seconds},
        }
    return {
        "accuracies": [values[f"test/acc_block{j}"] for j in range(module.num_blocks)],
        "ensemble": values["test/acc_ensemble"],
        "compression": sum(own.raw_bytes for own in traffic) / encoded if encoded else 1.0,
        "head_flops": sum(module.head_flops) / sum(module.block_flops),
        "head_parameters": num_parameters(module.heads) / num_parameters(module.network),
        "cpu_seconds": cpu_time.seconds,
    }


def main() -> None:
    be_quiet()
    args = parse()
    try:
        outcome = train(args, make_loggers(args, f"{args.network}-{args.method}", [args.network, args.method]))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    for j, accuracy in enumerate(outcome["accuracies"]):
        print(f"block {j}: {accuracy:.2f} %")
    print(f"ensemble: {outcome['ensemble']:.2f} %")
    if outcome["compression"] > 1:
        print(f"What blocks sent each other was {outcome['compression']:.1f} times smaller than raw.")


if __name__ == "__main__":
    main()
