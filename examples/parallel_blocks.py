"""Train the blocks of a CNN on several processes or devices at once.

Two stages on one machine (CPU cores or GPUs):

    pip install "lightning-dgl[examples]"
    python examples/parallel_blocks.py --devices 2

Two replicas of two stages, each replica on its half of every batch:

    python examples/parallel_blocks.py --devices 4 --data-parallel-size 2

Two nodes with one device each; on node 0 (reachable as HOST), and with --node-rank 1 on node 1:

    torchrun --nnodes 2 --nproc-per-node 1 --node-rank 0 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/parallel_blocks.py --nodes 2 --devices 1

A cluster that runs SLURM, two nodes with four devices each:

    srun --nodes 2 --ntasks-per-node 4 python examples/parallel_blocks.py --nodes 2 --devices 4 --blocks 8

With --devices 1 the same script trains in one process and, on CPU, ends with the same weights bit for bit. Copy this
file and put in your own network and data.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import time
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_dgl import DGLModule, DGLStrategy


def make_network() -> nn.Sequential:
    """Return six convolutions and a linear classifier: (N, 1, 16, 16) -> class scores (N, 10)."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((1, 32, 32, 64, 64, 64, 64)):
        convolution = nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False)
        layers.append(nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU()))
    layers.insert(2, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


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


class Clock(L.Callback):
    """Prints the training samples per second of all epochs but the first, which warms up."""

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            self.began = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch > 1:
            samples = (trainer.current_epoch - 1) * len(trainer.train_dataloader) * ARGS.batch_size
            seconds = time.perf_counter() - self.began
            print(f"rank {trainer.global_rank}: {samples / seconds:.0f} samples/s")


def main() -> None:
    L.seed_everything(0, verbose=False)
    train_data, val_data = digits()
    # Each replica draws its share of a batch; the gradients of replicas are averaged.
    batch_size = ARGS.batch_size // ARGS.data_parallel_size
    module = DGLModule(
        make_network(),
        num_blocks=ARGS.blocks,
        example_input=(2, 1, 16, 16),
        optimizer=lambda params: SGD(params, lr=0.02, momentum=0.9, weight_decay=5e-4),
    )
    trainer = L.Trainer(
        strategy=DGLStrategy(data_parallel_size=ARGS.data_parallel_size, timeout=600),  # seconds; compiling counts
        accelerator=ARGS.accelerator,
        devices=ARGS.devices,
        num_nodes=ARGS.nodes,
        max_epochs=ARGS.epochs,
        callbacks=[Clock()],
        logger=False,
    )
    trainer.fit(
        module,
        DataLoader(train_data, batch_size=batch_size, shuffle=True, drop_last=True),
        DataLoader(val_data, batch_size=120),
    )
    # Every rank has the whole trained network, and every value that was logged.
    if trainer.is_global_zero:
        for j, layers in enumerate(module.block_names):
            print(f"block {j} ({layers}): {trainer.callback_metrics[f'val/acc_block{j}']:.1%}")
        print(f"ensemble: {trainer.callback_metrics['val/acc_ensemble']:.1%}")
        weights = b"".join(tensor.numpy().tobytes() for tensor in module.state_dict().values())
        print(f"weights: {hashlib.sha1(weights).hexdigest()[:12]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="processes on each node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument(
        "--data-parallel-size", type=int, default=1, help="replicas; stages = devices × nodes / replicas"
    )
    parser.add_argument(
        "--blocks", type=int, default=4, help="blocks to cut the network into; at least one for each stage"
    )
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu or auto")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="images in a training batch, over all replicas")
    ARGS = parser.parse_args()
    main()
