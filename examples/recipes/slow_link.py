"""Show for each codec how many bytes a block sends, how long that takes on a slow link, and the accuracy reached.

    pip install "lightning-dgl[examples]"
    python examples/recipes/slow_link.py                    # one process: codecs work between blocks all the same
    python examples/recipes/slow_link.py --devices 2        # two stages on one machine
    python examples/recipes/slow_link.py --link 1000        # a link of 1 Gbit/s instead of 100 Mbit/s

Start it by torchrun or SLURM on several nodes, as examples/parallel_blocks.py shows. Nothing slows the link down here:
the time on it is the bytes of a message divided by the speed of the link. A step cannot be faster than that. A codec
pays where this time exceeds a block's local step and the codec's own time together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_dgl import DGLModule, DGLStrategy, VectorQuantizer

try:
    from image_data import Preprocessing, load
    from networks import layered
    from recipe import be_quiet
except ImportError as error:
    sys.exit(f'{error}. This example needs torchvision and scikit-learn: pip install "lightning-dgl[examples]"')

CODECS = {
    "raw": None,
    "half": "half",
    "256 codes of 4": VectorQuantizer(256, code_dim=4),
    "256 codes of 8": VectorQuantizer(256, code_dim=8),
    "256 codes of 16": VectorQuantizer(256, code_dim=16),
}


def train(name: str, args: argparse.Namespace) -> tuple[float, float, float, float] | None:
    """Return MB a step, times smaller and ms to encode, all of the widest link, and accuracy; on rank 0 only."""
    L.seed_everything(args.seed, verbose=False)
    train_images, test_images = load("digits", Path())
    preprocessing = Preprocessing(train_images[0], augment=False)
    train_data, test_data = (TensorDataset(preprocessing(x, train=False), y) for x, y in (train_images, test_images))
    module = DGLModule(
        layered((32, 32, 64, 64, 64, 64), pool_before=(2,), hidden_layers=0, in_channels=1, num_classes=10),
        num_blocks=args.blocks,
        example_input=(2, 1, 16, 16),
        optimizer=lambda params: SGD(params, lr=0.02, momentum=0.9, weight_decay=5e-4),
    )
    strategy = DGLStrategy(codec=CODECS[name], timeout=600)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.nodes,
        max_epochs=args.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module,
        DataLoader(train_data, batch_size=args.batch_size, shuffle=True, drop_last=True),
        DataLoader(test_data, batch_size=120),
    )
    if not trainer.is_global_zero:
        return None
    width = 4 * args.batch_size * max(torch.Size(point.shape[1:]).numel() for point in module.split_points) / 1e6
    assert module.run is not None
    traffic = max((link.traffic for link in module.run.links), key=lambda traffic: traffic.raw_bytes)
    accuracy = 100 * trainer.callback_metrics["val/acc"].item()
    if not traffic.batches:
        return width, 1.0, 0.0, accuracy
    sent, encoding = traffic.encoded_bytes / traffic.batches / 1e6, 1e3 * traffic.encode_seconds / traffic.batches
    return sent, traffic.raw_bytes / traffic.encoded_bytes, encoding, accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=float, default=100, help="speed of the link in Mbit/s")
    parser.add_argument("--devices", type=int, default=1, help="processes on each node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=4, help="blocks to cut the network into")
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu or auto")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="images in a training batch")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    be_quiet()
    torch.set_num_threads(1)  # more would not help so small a network
    table = Table(title="On the widest link", title_justify="left")
    for column in ("Codec", "MB a step", "Times smaller", f"ms at {args.link:g} Mbit/s", "ms to encode", "Accuracy"):
        table.add_column(column, justify="left" if column == "Codec" else "right", no_wrap=column == "Codec")
    is_first = False
    for name in CODECS:
        outcome = train(name, args)
        if outcome is not None:
            is_first = True
            megabytes, smaller, encoding, accuracy = outcome
            on_the_link = f"{8e3 * megabytes / args.link:.1f}"
            row = (f"{megabytes:.3f}", f"{smaller:.1f}", on_the_link, f"{encoding:.1f}", f"{accuracy:.1f} %")
            table.add_row(name, *row)
    if is_first:
        Console().print(table)


if __name__ == "__main__":
    main()
