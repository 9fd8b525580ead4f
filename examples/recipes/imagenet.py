"""Train VGG, ResNet or another network of torchvision on ImageNet, or any folder of images, in greedily trained blocks.

    pip install "lightning-dgl[examples]"
    python examples/recipes/imagenet.py --data /data/imagenet --network vgg13_bn --blocks 4
    python examples/recipes/imagenet.py --data /data/imagenet --network vgg19_bn --blocks 2 --devices 2
    python examples/recipes/imagenet.py --data /data/imagenet --network resnet152 --blocks 2 --codec half --devices 2
    python examples/recipes/imagenet.py --synthetic 50 --network resnet152 --blocks 2 --channels-last  # speed, memory

The folder holds train/<class>/* and val/<class>/*. The protocol is the paper's: SGD with learning rate 0.1, momentum
0.9 and weight decay 1e-4, a tenth of the learning rate every 10 epochs, 50 epochs, batch 256, 16-bit mixed precision on
a GPU, MLP-SR heads. ``--method backprop`` trains the same network end to end.
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
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_dgl import DGLModule, DGLStrategy

try:
    import torchvision
    from recipe import add_arguments, add_codec, be_quiet, finish, make_callbacks, make_codec, make_loggers
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2
except ImportError as error:
    sys.exit(f'{error}. This example needs torchvision: pip install "lightning-dgl[examples]"')

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's training images, 0 to 255


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help="folder with train/ and val/, which hold a folder for each class")
    data.add_argument("--synthetic", type=int, metavar="STEPS", help="random tensors instead, to measure throughput")
    parser.add_argument("--network", default="vgg13_bn", help="a classification model of torchvision")
    parser.add_argument("--method", default="dgl", choices=("dgl", "async", "backprop"))
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument(
        "--balance",
        choices=("flops", "memory", "time"),
        help="what blocks share equally; default: measured time for several CPU processes, else flops",
    )
    parser.add_argument("--head", default="mlp_sr", choices=("linear", "mlp", "mlp_sr", "cnn", "augmented"))
    add_codec(parser)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--drops", type=int, nargs="*", default=[10, 20, 30, 40], help="after which the rate drops")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--limit-batches", type=int, help="of each epoch; default: all")
    parser.add_argument("--workers", type=int, default=8, help="processes that read images")
    parser.add_argument("--devices", type=int, default=1, help="processes on each node; each trains some of the blocks")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", help="as of Lightning's Trainer; default: 16-mixed on a GPU, else 32-true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    add_arguments(parser)
    args = parser.parse_args(arguments)
    known = torchvision.models.list_models(torchvision.models)
    if args.network not in known:
        parser.error(f"argument --network: must be one of {', '.join(known)}, got {args.network!r}")
    if args.balance is None:
        args.balance = "time" if args.devices * args.nodes > 1 and not uses_gpu(args) else "flops"
    return args


def uses_gpu(args: argparse.Namespace) -> bool:
    return args.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


class OneBatch(Dataset[tuple[Tensor, Tensor]]):
    """The same random batch, over and over."""

    def __init__(self, steps: int, batch_size: int, image_size: int, num_classes: int) -> None:
        self._steps = steps
        images = torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8)
        self._batch = images, torch.randint(num_classes, (batch_size,))

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._batch


def make_loaders(args: argparse.Namespace) -> tuple[DataLoader[Any], DataLoader[Any] | None, int]:
    """Return training and validation batches of uint8 images, and the number of classes."""
    if args.synthetic is not None:
        batches = OneBatch(args.synthetic, args.batch_size, args.image_size, 1000)
        return DataLoader(batches, batch_size=None, pin_memory=torch.cuda.is_available()), None, 1000
    for part in ("train", "val"):
        if not (args.data / part).is_dir():
            raise FileNotFoundError(f"There is no folder {args.data / part}. --data is a folder with train/ and val/.")
    size = args.image_size
    augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    centre = v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), v2.PILToTensor()])
    train, val = ImageFolder(args.data / "train", augmented), ImageFolder(args.data / "val", centre)
    if train.classes != val.classes:
        raise ValueError(
            f"{args.data}/train has {len(train.classes)} classes, val has {len(val.classes)}, or of other names. Sort "
            "the validation images into the same folders as the training images."
        )
    options: dict[str, Any] = {
        "batch_size": args.batch_size,
        "num_workers": args.workers,
        "persistent_workers": args.workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
    return (
        DataLoader(train, shuffle=True, drop_last=True, **options),
        DataLoader(val, **options),
        len(train.classes),
    )


class Module(DGLModule):
    """A DGLModule that gets uint8 images."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
        return (images.float() - mean) / std, labels


def make_module(num_classes: int, args: argparse.Namespace) -> Module:
    def sgd(params: Iterable[nn.Parameter]) -> Optimizer:
        return SGD(params, args.lr, momentum=0.9, weight_decay=1e-4)

    def drops(optimizer: Optimizer) -> LRScheduler:
        return MultiStepLR(optimizer, args.drops, 0.1)

    top = {"acc": 1, "acc5": min(5, num_classes)}
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    network = torchvision.models.get_model(args.network, num_classes=num_classes).to(memory_format=layout)
    cuts: dict[str, Any] = {"num_blocks": 1 if args.method == "backprop" else args.blocks}
    measured = args.resume and torch.load(args.resume, weights_only=True)["hyper_parameters"].get("split_at")
    if measured:  # the blocks of the checkpoint; other times might be measured now
        cuts = {"split_at": measured}
    # Times are measured as it trains: with these images a batch, in this precision and layout.
    images = args.batch_size if args.balance == "time" else 2
    with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16-mixed"):
        module = Module(
            network,
            **cuts,
            example_input=(images, 3, args.image_size, args.image_size),
            head=args.head,
            balance=args.balance,
            optimizer=sgd,
            lr_scheduler=drops,
            compile=args.compile,
            metrics=MetricCollection({k: MulticlassAccuracy(num_classes, n, "micro") for k, n in top.items()}),
        )
    return module.to(memory_format=layout)  # heads, too; images follow at the first convolution


class Throughput(L.Callback):
    """Prints images per second and peak memory, the first steps left out."""

    warm_up = 3

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.warm_up:
            self._wait(pl_module)
            self._began = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        steps = trainer.global_step - self.warm_up
        if steps <= 0 or not trainer.is_global_zero:
            return
        self._wait(pl_module)
        images = steps * trainer.train_dataloader.dataset[0][1].numel()  # type: ignore[union-attr]
        print(f"{images / (time.monotonic() - self._began):.0f} images/s in training, over {steps} steps")
        if pl_module.device.type == "cuda":
            print(f"{torch.cuda.max_memory_allocated(pl_module.device) / 2**30:.2f} GiB of memory at most")

    def _wait(self, module: L.LightningModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)


def main() -> None:
    be_quiet()
    args = parse()
    L.seed_everything(args.seed, verbose=False)
    try:
        train, val, num_classes = make_loaders(args)
        module = make_module(num_classes, args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    is_synthetic = args.synthetic is not None
    name = f"{args.network}-{args.method}-{args.blocks}"
    loggers = [] if is_synthetic else make_loggers(args, name, [args.network, args.method])
    trainer = L.Trainer(
        strategy=DGLStrategy("async" if args.method == "async" else "sync", codec=make_codec(args)),
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.nodes,
        precision=args.precision or ("16-mixed" if uses_gpu(args) else "32-true"),
        max_epochs=1 if is_synthetic else args.epochs,
        limit_train_batches=args.limit_batches,
        limit_val_batches=args.limit_batches,
        logger=loggers,
        callbacks=[Throughput()] if is_synthetic else make_callbacks(loggers, module),
        enable_checkpointing=not is_synthetic,
        num_sanity_val_steps=0,
        benchmark=True,
    )
    trainer.fit(module, train, val, ckpt_path=args.resume)
    if not is_synthetic and trainer.is_global_zero:
        finish(trainer, module)


if __name__ == "__main__":
    main()
