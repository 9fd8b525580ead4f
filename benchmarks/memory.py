"""Memory held for backward: decoupled greedy learning against end-to-end backpropagation, both under Lightning.

    python -m benchmarks.memory --models vgg19_bn resnet50 --blocks 4 --balance memory

Counts the bytes of all tensors that autograd keeps for a backward pass (saved-tensor hooks; parameters left out) and
takes the largest value within a training step. On a GPU it also prints the allocator's peak. The theoretical bound is
what the largest block holds by itself, its head and its input included: DGL cannot need less at this split.
"""

from __future__ import annotations

import argparse
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import Backpropagation, quiet_trainer
from lightning_dgl import DGLModule, DGLStrategy


class HeldBytes:
    """Bytes of distinct storages that autograd holds, now and at most."""

    def __init__(self, module: nn.Module) -> None:
        self.peak = self.now = 0
        self._users: dict[int, int] = {}
        self._module = module

    @contextmanager
    def counting(self) -> Iterator[None]:
        ours = {p.untyped_storage()._cdata for p in (*self._module.parameters(), *self._module.buffers())}
        counter = self

        class Saved:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor
                storage = tensor.untyped_storage()
                self.key, self.size = storage._cdata, 0 if storage._cdata in ours else storage.nbytes()
                counter._users[self.key] = counter._users.get(self.key, 0) + 1
                if counter._users[self.key] == 1:
                    counter.now += self.size
                    counter.peak = max(counter.peak, counter.now)

            def __del__(self) -> None:
                counter._users[self.key] -= 1
                if not counter._users[self.key]:
                    counter.now -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            yield


def peak_of_training(module: L.LightningModule, batch: tuple[Tensor, Tensor], **trainer: Any) -> tuple[int, int]:
    """(Bytes held for backward, CUDA allocator's peak) over two training steps."""
    held = HeldBytes(module)
    data = DataLoader(TensorDataset(*(torch.cat([t, t]) for t in batch)), batch_size=len(batch[0]))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with held.counting():
        quiet_trainer(**trainer).fit(module, data)
    return held.peak, torch.cuda.max_memory_allocated() if cuda else 0


def bytes_of_each_block(module: DGLModule, batch: tuple[Tensor, Tensor]) -> list[int]:
    """What each block, its head and its loss hold when it runs alone."""
    x, sizes = batch[0], []
    for j, block in enumerate(module.blocks):
        held = HeldBytes(module)
        with held.counting():
            output = block(x)
            loss = module.local_loss(j, module._score(j, output), batch[1])
        sizes.append(held.peak)
        x = output.detach()
        del output, loss
        gc.collect()
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vgg19_bn", "resnet50"], help="torchvision models")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--balance", default="memory", choices=["flops", "time", "memory"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    args = parser.parse_args()

    size = (args.batch_size, 3, args.image_size, args.image_size)
    batch = (torch.randn(size), torch.randint(0, 1000, (args.batch_size,)))
    table = Table(
        title=f"Memory held for backward, batch {args.batch_size} at {args.image_size}×{args.image_size}, K = "
        f"{args.blocks}, balance={args.balance}, torch {torch.__version__}, {platform.machine()}"
    )
    columns = ["network", "backprop MiB", "DGL MiB", "DGL / backprop", "bound / backprop"]
    if torch.cuda.is_available():
        columns += ["backprop CUDA peak MiB", "DGL CUDA peak MiB", "ratio"]
    for column in columns:
        table.add_column(column, justify="right")
    for name in args.models:
        make = partial(torchvision.models.get_model, name, weights=None)
        baseline, baseline_cuda = peak_of_training(Backpropagation(make()), batch)
        gc.collect()
        module = DGLModule(make(), args.blocks, example_input=batch[0][:2], balance=args.balance)
        ours, ours_cuda = peak_of_training(module, batch, strategy=DGLStrategy())
        bound = max(bytes_of_each_block(module.cpu().train(), batch))
        row = [
            name,
            f"{baseline / 2**20:.0f}",
            f"{ours / 2**20:.0f}",
            f"{ours / baseline:.3f}",
            f"{bound / baseline:.3f}",
        ]
        if torch.cuda.is_available():
            row += [f"{baseline_cuda / 2**20:.0f}", f"{ours_cuda / 2**20:.0f}", f"{ours_cuda / baseline_cuda:.3f}"]
        table.add_row(*row)
        print(f"{name}: blocks {module.block_names}", flush=True)
        del module
        gc.collect()
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
