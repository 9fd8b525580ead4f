"""Measure samples per second of Trainer + DGLStrategy over a bare PyTorch loop of the same algorithm.

    python -m benchmarks.overhead --repeats 7

Both train the same blocks and heads on the same batches; repeats are interleaved, and the ratio is taken pair by pair.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import Clock, markdown_table, publish, quiet_trainer, sgd, spread
from lightning_dgl import DGLModule, DGLStrategy

CHANNELS = (128, 256, 256, 512)


def network() -> nn.Sequential:
    """Return four 3×3 convolutions with BatchNorm and ReLU for 32×32 images; pools before the second and fourth."""
    layers: list[nn.Module] = []
    channels = 3
    for i, width in enumerate(CHANNELS):
        pool = [nn.MaxPool2d(2)] if i % 2 else []
        layers.append(nn.Sequential(*pool, nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10))


def with_trainer(module: DGLModule, data: DataLoader[tuple[Tensor, ...]]) -> float:
    clock = Clock(warm_up=1)
    quiet_trainer(strategy=DGLStrategy(), accelerator="cpu", callbacks=[clock]).fit(module, data)
    return clock.seconds


def bare_loop(blocks: nn.ModuleList, heads: list[nn.Module], data: DataLoader[tuple[Tensor, ...]]) -> float:
    optimizers = [sgd([*block.parameters(), *head.parameters()]) for block, head in zip(blocks, heads, strict=True)]
    began = 0.0
    for i, (x, targets) in enumerate(data):
        if i == 1:
            began = time.perf_counter()
        for block, head, optimizer in zip(blocks, heads, optimizers, strict=True):
            output = block(x)
            loss = nn.functional.cross_entropy(head(output), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            x = output.detach()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each run")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="file to write the table to, besides printing it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    num_samples = args.batch_size * (args.steps + 1)
    data = DataLoader(
        TensorDataset(torch.randn(num_samples, 3, 32, 32), torch.randint(0, 10, (num_samples,))), args.batch_size
    )
    module = DGLModule(network(), split_at=["0", "1", "2"], example_input=[2, 3, 32, 32], optimizer=sgd)
    blocks, heads = copy.deepcopy((module.blocks, [*module.heads, nn.Identity()]))
    blocks.train()
    ours, bare = [], []
    for _ in range(args.repeats):
        ours.append(with_trainer(module, data) / args.steps)
        bare.append(bare_loop(blocks, heads, data) / args.steps)
    ratios = [b / a for a, b in zip(ours, bare, strict=True)]

    rows = [
        ["Trainer + DGLStrategy, ms a step", spread([1e3 * s for s in ours], 1)],
        ["bare loop, ms a step", spread([1e3 * s for s in bare], 1)],
        ["samples/s, Trainer over bare loop", spread(ratios, 2)],
    ]
    conditions = (
        f"Four blocks, batch {args.batch_size}, {args.threads} threads, torch {torch.__version__}, "
        f"{platform.machine()}; {args.steps} steps, {args.repeats} interleaved repeats: median (min–max)."
    )
    publish(f"{conditions}\n\n{markdown_table(['', ''], rows)}", args.output)


if __name__ == "__main__":
    main()
