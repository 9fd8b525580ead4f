"""Measure what a rank holds in memory while it trains: a stage of DGL, a replica of DDP, a stage of 1F1B.

    python -m benchmarks.memory --output memory.md                           # vgg19_bn and resnet50, 224×224
    python -m benchmarks.memory --networks resnet50 --ranks 2 --batch-size 8

- ``DGL``: a stage of ``--blocks`` / J blocks on each rank (at least one), balanced by memory, with the default heads.
- ``DDP``: end-to-end backpropagation, gradients in DDP's buckets only; on one rank plain backpropagation. On J ranks
  it is measured twice: with as many images a rank as DGL, and with as many in all.
- ``1F1B``: torch.distributed.pipelining, 2 J micro-batches, a block of the same cuts on each rank.

Peak memory is what the process had resident at most, in the steps after the second one, less what it had resident
after a training step of a tiny network: so libraries are not counted, and everything else is, buffers of messages and
of convolutions too. Freed memory goes back to the system at once. Weights, gradients and the optimizer's state are
counted from their tensors, activations are the rest. The rank with the highest peak is shown.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from benchmarks.common import Backpropagation, in_processes, markdown_table, publish, quiet_trainer
from benchmarks.parallel import Setup, pipeline_steps
from benchmarks.workloads import PRECISIONS, Workload
from lightning_dgl import DGLModule, DGLStrategy

MiB = 2**20
STEPS, WARM_UP = 3, 2
# Large tensors are pages of their own, which go back to the system when they are freed.
RETURN_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "GLIBC_TUNABLES": "",
}


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds at most; those of weights, gradients and the optimizer's state are parts of it."""

    peak: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def rest(self) -> int:
        return self.peak - self.weights - self.gradients - self.optimizer


# What runs in the ranks' processes


def resident(what: str = "VmRSS") -> int:
    """Return the bytes that this process has resident, or had at most ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of these tensors' storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Meter:
    """Reads how much memory a rank holds, in steps after the warm-up."""

    def __init__(self) -> None:
        tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
        tiny(torch.randn(4, 3, 8, 8)).sum().backward()
        self._before, self._num_steps = resident(), 0

    def step_done(self, held: list[Tensor], optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._num_steps += 1
        if self._num_steps == WARM_UP:
            Path("/proc/self/clear_refs").write_text("5")  # begins a new VmHWM
        if self._num_steps == STEPS:
            states = [state for optimizer in optimizers for state in optimizer.state.values()]
            self.memory = Memory(
                resident("VmHWM") - self._before,
                bytes_of(held),
                bytes_of(tensor for tensor in held if isinstance(tensor, nn.Parameter)),
                bytes_of(value for state in states for value in state.values() if isinstance(value, Tensor)),
            )


class MeterCallback(L.Callback):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if isinstance(pl_module, DGLModule):
            held = [t for j in pl_module.run.stage.blocks for t in pl_module.block_tensors(j)]
        else:
            held = [*pl_module.parameters(), *pl_module.buffers()]
        self._meter.step_done(held, trainer.optimizers)


def train(rank: int, method: str, ranks: int, workload: Workload) -> Memory:
    """Train a few steps on this rank."""
    meter = Meter()
    if method == "1F1B":
        setup = Setup("1f1b", ranks, 1, workload, STEPS - WARM_UP, WARM_UP, micro_batches=2 * ranks)
        for block, optimizer in pipeline_steps(rank, setup):
            meter.step_done([*block.parameters(), *block.buffers()], [optimizer])
        return meter.memory
    module: L.LightningModule
    strategy: Any
    if method == "DGL":
        module, strategy = workload.make_module(), DGLStrategy(timeout=600)
    else:
        module = Backpropagation(workload.make_network())
        strategy = DDPStrategy(gradient_as_bucket_view=True) if ranks > 1 else "auto"
    trainer = quiet_trainer(
        devices=ranks,
        strategy=strategy,
        accelerator="cpu",
        precision=workload.precision,
        callbacks=[MeterCallback(meter)],
    )
    trainer.fit(module, workload.images(STEPS * (1 if method == "DGL" else ranks)))
    return meter.memory


# The report


def table(network: str, args: argparse.Namespace) -> str:
    """Measure all methods on one network."""
    whole = Workload(network, image_size=args.image_size, precision=args.precision, batch_size=args.batch_size)
    rows, of_ddp = [], {}
    for ranks in args.ranks:
        staged = replace(whole, blocks=ranks).balanced("memory") if ranks > 1 else whole
        methods = [("DDP", whole)]
        if ranks > 1:
            methods += [("DDP", replace(whole, batch_size=args.batch_size // ranks)), ("1F1B", staged)]
        methods += [("DGL", replace(whole, blocks=max(ranks, args.blocks)).balanced("memory"))]
        if ranks < args.blocks and ranks > 1:
            methods += [("DGL", staged)]
        for method, workload in methods:
            measured = in_processes(ranks, 1, train, method, ranks, workload)
            memory = max(measured, key=lambda own: own.peak)
            of_ddp.setdefault(ranks, memory.peak)
            parts = (memory.weights, memory.gradients, memory.optimizer, memory.rest, memory.peak)
            blocks = str(workload.blocks) if method == "DGL" else ""
            rows.append(
                [
                    *(str(ranks), method, blocks, str(workload.batch_size)),
                    *(f"{own / MiB:.0f}" for own in parts),
                    f"{memory.peak / of_ddp[ranks]:.2f}",
                ]
            )
            print(f"{network}: {' '.join(rows[-1])}", file=sys.stderr, flush=True)
    columns = ["ranks", "method", "blocks", "images a rank", "weights", "gradients", "momentum"]
    return f"{whole}; MiB of the fullest rank.\n\n" + markdown_table(
        [*columns, "activations and the rest", "peak", "over DDP"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "vgg19_bn"], help="of torchvision")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--precision", default="32-true", choices=PRECISIONS)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="J")
    parser.add_argument("--blocks", type=int, default=4, help="of DGL, on J ranks or fewer")
    parser.add_argument("--output", type=Path, help="file to write the tables to, besides printing them")
    args = parser.parse_args()
    os.environ |= RETURN_MEMORY
    about = f"torch {torch.__version__}, {platform.machine()}, one thread a rank."
    publish("\n\n".join([about, *(table(network, args) for network in args.networks)]), args.output)


if __name__ == "__main__":
    main()
