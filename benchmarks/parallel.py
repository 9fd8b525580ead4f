"""Measure samples per second with the blocks of a CNN on two ranks, against one rank, DDP, and pipeline schedules.

    python -m benchmarks.parallel --output parallel.md

Two blocks of equal cost, block 0's auxiliary head counted in, on images of 32×32 in memory. All methods train the same
network with the same optimizer and one update for every ``--batch-size`` images. A method is named
``KIND-RANKSxTHREADS``, threads being the intra-op threads of each rank, with ``-mM`` where a batch is dealt out in M
micro-batches:

- ``dgl``: Trainer with DGLStrategy, on 1 rank (both blocks) or 2 (a block each). Micro-batches are
  ``accumulate_grad_batches=M`` on batches of ``--batch-size`` / M.
- ``backprop``: end-to-end backpropagation, no heads, under Trainer; on 2 ranks Lightning's DDP, each rank on half of
  the batch.
- ``apart``: two processes of ``dgl-1x1`` at the same time that know nothing of each other, their samples per second
  added: what the machine gives two busy processes, and so the most that two ranks can reach.
- ``gpipe``, ``1f1b``: ``torch.distributed.pipelining`` in a bare loop; a stage is a block, without a head.

Each run has fresh processes, and repeats are interleaved: every method once, then every method again. A rank's time is
taken from the end of its last warm-up step to the end of its last step, and the slowest rank's counts. So N steps are N
complete steps of every rank in the steady state: the first batch's way through the stages falls into the warm-up, and
batches that had piled up before a stage do not make it look faster than the stage that sends them. Ratios are taken
pair by pair within a repeat. "Cores busy" is the processes' CPU time over the time taken: if it falls short of ranks ×
threads in a method that waits for nothing, something else was running on the machine.

The processes keep freed memory for the next step, as PyTorch does on GPUs. The C library's default returns it to the
system, which slows down all methods, those with large batches most; to measure with that, put ``MALLOC_MMAP_MAX_=65536
MALLOC_TRIM_THRESHOLD_=131072 MALLOC_ARENA_MAX=16`` in front of the command.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import Backpropagation, in_processes, markdown_table, publish, quiet_trainer, sgd, spread
from lightning_dgl import DGLModule, DGLStrategy

CONVOLUTIONS = 3
PIPELINES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


@dataclass(frozen=True)
class Setup:
    """A network, its data, and how long to train it."""

    kind: str
    ranks: int
    threads: int
    channels: int
    batch_size: int
    steps: int
    warm_up: int
    micro_batches: int = 1
    blocks: int = 2

    @classmethod
    def parse(cls, name: str, **how: int) -> Setup:
        match = re.fullmatch(r"(dgl|apart|backprop|gpipe|1f1b)-([12])x(\d+)(?:-m(\d+))?", name)
        if match is None:
            raise SystemExit(f"A method is KIND-RANKSxTHREADS or KIND-RANKSxTHREADS-mM, see --help; got {name!r}.")
        kind, ranks, threads, micro_batches = match[1], int(match[2]), int(match[3]), int(match[4] or 1)
        if how["batch_size"] % (ranks * micro_batches):
            raise SystemExit(f"{name} cannot deal out batches of {how['batch_size']} evenly.")
        if kind in PIPELINES and (ranks != 2 or micro_batches < 2):
            raise SystemExit(f"{name}: a pipeline has 2 ranks here, and 2 micro-batches or more.")
        if kind == "backprop" and micro_batches > 1:
            raise SystemExit(f"{name}: backpropagation takes a batch at once here.")
        return cls(kind, ranks, threads, micro_batches=micro_batches, **how)

    def images(self, batches_a_step: int = 1) -> DataLoader[tuple[Tensor, ...]]:
        """Return noise in memory, for all steps."""
        num_samples = self.batch_size * (self.warm_up + self.steps)
        data = TensorDataset(torch.randn(num_samples, 3, 32, 32), torch.randint(0, 10, (num_samples,)))
        return DataLoader(data, self.batch_size // batches_a_step)


def network(num_blocks: int, channels: int) -> nn.Sequential:
    """Return blocks of a cheap and three 3×3 convolutions, with BatchNorm and ReLU; the last ends in a classifier.

    The cheap one is the first block's 3×3 on three channels, and 1×1 in the others. As neither passes a gradient on to
    its input, all blocks do about the same work.
    """

    def convolution(inputs: int, kernel_size: int) -> nn.Sequential:
        own = nn.Conv2d(inputs, channels, kernel_size, padding=kernel_size // 2, bias=False)
        return nn.Sequential(own, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

    blocks = []
    for j in range(num_blocks):
        cheap = convolution(channels, 1) if j else convolution(3, 3)
        blocks.append(nn.Sequential(cheap, *(convolution(channels, 3) for _ in range(CONVOLUTIONS))))
    blocks[-1].extend([nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10)])
    return nn.Sequential(*blocks)


def dgl_module(setup: Setup) -> DGLModule:
    split_at = [str(j) for j in range(setup.blocks - 1)]
    return DGLModule(
        network(setup.blocks, setup.channels), split_at=split_at, example_input=[2, 3, 32, 32], optimizer=sgd
    )


# What runs in the ranks' processes


@dataclass
class Reading:
    """The resources one rank used; all but the bytes since the end of the warm-up."""

    seconds: float
    cpu_seconds: float
    waited_for_inbox: float = 0.0
    waited_for_outbox: float = 0.0
    bytes_a_step: float = 0.0

    def __sub__(self, other: Reading) -> Reading:
        return Reading(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Stopwatch:
    """Reads the clocks at the end of the warm-up and of the last step."""

    def __init__(self, setup: Setup, batches_a_step: int = 1) -> None:
        self._when = (setup.warm_up * batches_a_step, (setup.warm_up + setup.steps) * batches_a_step)
        self._num_batches = 0
        self._readings: list[Reading] = []

    def batch_done(self, waited_for_inbox: float = 0.0, waited_for_outbox: float = 0.0) -> None:
        self._num_batches += 1
        if self._num_batches in self._when:
            clocks = (time.perf_counter(), time.process_time())
            self._readings.append(Reading(*clocks, waited_for_inbox, waited_for_outbox))

    def total(self) -> Reading:
        before, after = self._readings
        return after - before


class Clock(L.Callback):
    """A stopwatch under the Trainer; also reads how long a stage waits for its links, and the bytes it sends."""

    def __init__(self, setup: Setup) -> None:
        self._watch = Stopwatch(setup, setup.micro_batches)
        self._num_steps = setup.warm_up + setup.steps
        self._bytes_sent = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._watch.batch_done(*(getattr(link, "seconds_waited", 0.0) for link in self._links(trainer)))

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:  # the other stages have taken everything by now
        _, outbox = self._links(trainer)
        self._bytes_sent = getattr(outbox, "bytes_sent", 0)

    def total(self) -> Reading:
        total = self._watch.total()
        total.bytes_a_step = self._bytes_sent / self._num_steps
        return total

    @staticmethod
    def _links(trainer: L.Trainer) -> tuple[Any, Any]:
        stage = getattr(trainer.strategy, "stage", None)
        return getattr(stage, "inbox", None), getattr(stage, "outbox", None)


def train(rank: int, setup: Setup, codec: Any = None, num_nodes: int = 1) -> Reading:
    """Run one method on this rank; ``codec`` is DGLStrategy's, and ranks are on ``num_nodes`` nodes."""
    if setup.kind in PIPELINES:
        return train_pipeline(rank, setup)
    module: L.LightningModule
    strategy: str | DGLStrategy
    devices = setup.ranks
    if setup.kind in ("dgl", "apart"):
        module, strategy, batches_a_step = dgl_module(setup), DGLStrategy(codec=codec, timeout=300), setup.micro_batches
        devices = 1 if setup.kind == "apart" else devices
    else:
        module = Backpropagation(network(setup.blocks, setup.channels))
        strategy, batches_a_step = ("ddp", setup.ranks) if setup.ranks > 1 else ("auto", 1)
    clock = Clock(setup)
    trainer = quiet_trainer(
        devices=devices // num_nodes,
        num_nodes=num_nodes,
        strategy=strategy,
        accelerator="cpu",
        accumulate_grad_batches=setup.micro_batches,
        callbacks=[clock],
    )
    trainer.fit(module, setup.images(batches_a_step))
    return clock.total()


def train_pipeline(rank: int, setup: Setup) -> Reading:
    dist.init_process_group("gloo", rank=rank, world_size=setup.ranks)
    block = network(setup.blocks, setup.channels)[rank]
    schedule = PIPELINES[setup.kind](
        PipelineStage(block, rank, setup.ranks, torch.device("cpu")),
        setup.micro_batches,
        loss_fn=nn.functional.cross_entropy,
    )
    optimizer, watch = sgd(block.parameters()), Stopwatch(setup)
    for inputs, targets in setup.images():
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(inputs, return_outputs=False)
        else:
            schedule.step(target=targets, return_outputs=False)
        optimizer.step()
        watch.batch_done()
    dist.destroy_process_group()
    return watch.total()


def time_blocks(rank: int, setup: Setup) -> tuple[list[list[float]], list[list[float]]]:
    """Return the seconds of each block's local steps, head and optimizer included, and of each head's part of them."""
    module = dgl_module(setup)
    heads = [*module.heads, nn.Identity()]
    module.blocks.train()
    optimizers = [sgd(module.block_parameters(j)) for j in range(setup.blocks)]
    of_blocks: list[list[float]] = [[] for _ in optimizers]
    of_heads: list[list[float]] = [[] for _ in module.heads]
    for x, targets in setup.images():
        for j, (block, head, optimizer) in enumerate(zip(module.blocks, heads, optimizers, strict=True)):
            began = time.perf_counter()
            optimizer.zero_grad()
            output = block(x)
            nn.functional.cross_entropy(head(output), targets).backward()
            optimizer.step()
            of_blocks[j].append(time.perf_counter() - began)
            x = output.detach()
            del output
            if j < len(of_heads):
                features = x.clone().requires_grad_()
                began = time.perf_counter()
                nn.functional.cross_entropy(head(features), targets).backward()
                of_heads[j].append(time.perf_counter() - began)
    return [seconds[setup.warm_up :] for seconds in of_blocks], [seconds[setup.warm_up :] for seconds in of_heads]


# The report


@dataclass
class Results:
    """The measurements of each method: in each repeat, the readings of its ranks."""

    setups: dict[str, Setup]
    readings: dict[str, list[list[Reading]]]

    def seconds(self, name: str) -> list[float]:
        """Return the time of the timed steps of the slowest rank, by repeat."""
        return [max(rank.seconds for rank in ranks) for ranks in self.readings[name]]

    def samples_per_second(self, name: str) -> list[float]:
        setup = self.setups[name]
        samples = setup.steps * setup.batch_size * (setup.ranks if setup.kind == "apart" else 1)
        return [samples / seconds for seconds in self.seconds(name)]

    def ratios(self, name: str, others: list[str]) -> list[float]:
        """Return samples per second over those of the fastest of ``others``, repeat by repeat."""
        fastest = [max(speeds) for speeds in zip(*map(self.samples_per_second, others), strict=True)]
        return [a / b for a, b in zip(self.samples_per_second(name), fastest, strict=True)]


def table_of_methods(results: Results) -> str:
    reference = "dgl-1x1" if "dgl-1x1" in results.setups else next(iter(results.setups))
    rows = []
    for name, setup in results.setups.items():
        images = setup.batch_size // (setup.ranks if setup.kind == "backprop" else setup.micro_batches)
        runs = zip(results.readings[name], results.seconds(name), strict=True)
        busy = [sum(rank.cpu_seconds for rank in ranks) / seconds for ranks, seconds in runs]
        ratio, speed = results.ratios(name, [reference]), results.samples_per_second(name)
        rows.append([name, str(images), spread(speed, 1), spread(ratio, 2), f"{statistics.median(busy):.2f}"])
    return markdown_table(["method", "images at once", "samples/s", f"over {reference}", "cores busy"], rows)


def table_of_comparisons(results: Results) -> str:
    names = list(results.setups)
    pipelines = [name for name in names if results.setups[name].kind in PIPELINES]
    ours = [name for name in names if name.startswith("dgl-2x")]
    comparisons: list[tuple[str, str, list[str], str]] = [
        ("dgl-2x1", "dgl-1x1", ["dgl-1x1"], "1.90"),
        ("dgl-2x1", "apart-2x1", ["apart-2x1"], ""),
        ("dgl-2x1", "dgl-1x2", ["dgl-1x2"], "1.05"),
        ("dgl-2x1", "backprop-1x2", ["backprop-1x2"], ""),
        ("dgl-2x1", "backprop-2x1 (DDP)", ["backprop-2x1"], ""),
    ]
    for m in sorted({results.setups[name].micro_batches for name in pipelines}):
        same = [name for name in pipelines if results.setups[name].micro_batches == m]
        comparisons.append((f"dgl-2x1-m{m}", " and ".join(same), same, "1.30"))
    if ours and pipelines:
        fastest = max(ours, key=lambda name: statistics.median(results.samples_per_second(name)))
        comparisons.append((fastest, "all pipelines", pipelines, ""))
    rows = [
        [name, label, spread(results.ratios(name, others), 2), aim]
        for name, label, others, aim in comparisons
        if {name, *others} <= set(names)
    ]
    return markdown_table(["method", "over the faster of", "samples/s, ratio", "aim"], rows)


def table_of_links(results: Results) -> str:
    rows = []
    for name, setup in results.setups.items():
        if setup.kind == "dgl" and setup.ranks > 1:
            for rank in range(setup.ranks):
                readings = [ranks[rank] for ranks in results.readings[name]]
                received = spread([100 * reading.waited_for_inbox / reading.seconds for reading in readings], 1)
                sent = spread([100 * reading.waited_for_outbox / reading.seconds for reading in readings], 1)
                megabytes = f"{statistics.median(reading.bytes_a_step for reading in readings) / 1e6:.2f}"
                rows.append([f"{name}, stage {rank}", *([received, "", ""] if rank else ["", sent, megabytes])])
    return markdown_table(["", "% of the time waiting to receive", "% waiting to send", "MB sent a step"], rows)


def traffic_of_others(setup: Setup) -> str:
    own = network(setup.blocks, setup.channels)
    num_parameters = sum(p.numel() for p in own.parameters())
    activations = 4 * setup.batch_size * setup.channels * 32 * 32
    return (
        "For comparison, by formula, in MB each rank sends a step: DDP with a ring all-reduce, 4 bytes × parameters × "
        f"2 (R - 1) / R for R = 2 ranks: {4 * num_parameters / 1e6:.2f}; a pipeline, activations one way and their "
        f"gradients the other: {activations / 1e6:.2f}."
    )


def table_of_blocks(setup: Setup) -> str:
    ((of_blocks, of_heads),) = in_processes(1, 1, time_blocks, setup)
    rows = []
    for j, seconds in enumerate(of_blocks):
        head = spread([1e3 * s for s in of_heads[j]], 0) if j < len(of_heads) else ""
        rows.append([str(j), spread([1e3 * s for s in seconds], 0), head])
    return markdown_table(["block, alone in one process, one thread", "ms a step", "of these the head"], rows)


# The command line


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each run")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before these, at least 1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file to write the tables to, besides printing them")
    return parser


def training_options(args: argparse.Namespace) -> dict[str, int]:
    if args.warm_up < 1:
        raise SystemExit("--warm-up must be at least 1.")
    return {name: getattr(args, name) for name in ("channels", "batch_size", "steps", "warm_up")}


def conditions(args: argparse.Namespace) -> str:
    return (
        f"Blocks with {args.channels} channels at 32×32, batch {args.batch_size}; {args.steps} steps after "
        f"{args.warm_up}, {args.repeats} interleaved repeats: median (min–max). torch {torch.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores."
    )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--methods", nargs="+", help="names as above; by default a choice of every kind")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8], help="M, for the default methods")
    args = parser.parse_args()
    how = training_options(args)
    names = args.methods or [
        *("backprop-1x1", "backprop-1x2", "backprop-2x1", "dgl-1x1", "apart-2x1", "dgl-1x2", "dgl-2x1"),
        *(f"{kind}-2x1-m{m}" for m in args.micro_batches if m > 1 for kind in ("gpipe", "1f1b", "dgl")),
    ]
    results = Results({name: Setup.parse(name, **how) for name in names}, {name: [] for name in names})
    blocks = table_of_blocks(Setup("dgl", 1, 1, **how))
    for repeat in range(args.repeats):
        for name, setup in results.setups.items():
            together = setup.kind != "apart"
            results.readings[name].append(in_processes(setup.ranks, setup.threads, train, setup, together=together))
            speed = results.samples_per_second(name)[-1]
            print(f"repeat {repeat + 1} of {args.repeats}, {name}: {speed:.1f} samples/s", file=sys.stderr, flush=True)

    comparisons, links = table_of_comparisons(results), table_of_links(results)
    parts = [conditions(args), blocks, table_of_methods(results), comparisons, links]
    parts.append(traffic_of_others(Setup("dgl", 1, 1, **how)))
    publish("\n\n".join(part for part in parts if part), args.output)


if __name__ == "__main__":
    main()
