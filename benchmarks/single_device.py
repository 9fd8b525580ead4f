"""Measure one device: greedy learning against backpropagation and activation checkpointing, all under Lightning.

    python -m benchmarks.single_device --output single_device.md --figure single_device.png

A method is named KIND-K, with ``+compile`` and ``+channels_last`` where it has these:

- backprop: end-to-end backpropagation.
- checkpoint-K: the same, keeping of K segments (equal in memory) only their inputs, and computing the rest again.
- dgl-K: K blocks, balanced by memory, trained by DGLStrategy; with ``+mlp_sr`` they have the paper's heads.

All train the same network with the same optimizer on the same batch, which is on the device already. Peak memory is
what torch has allocated at most, weights, gradients, momentum and the auxiliary heads' included: on a GPU its
allocator's figure, on a CPU counted by its profiler in a separate run. The largest batch that fits is tried out on a
GPU; on a CPU it is reckoned from the peaks at two batch sizes, and ``--budget`` is what it must fit in.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from benchmarks.common import Backpropagation, Clock, in_processes, markdown_table, publish, quiet_trainer, sgd, spread
from examples.recipes.networks import six_layers
from lightning_dgl import DGLModule, DGLStrategy, split

KINDS = ("backprop", "checkpoint", "dgl")
METHODS = (
    *("backprop", "checkpoint-4", "dgl-2", "dgl-4", "dgl-8"),
    *("backprop+channels_last", "checkpoint-4+channels_last", "dgl-4+channels_last"),
    *("backprop+channels_last+compile", "dgl-4+channels_last+compile"),
)
MiB, GiB = 2**20, 2**30


@dataclass(frozen=True)
class Network:
    """A network, and what to train it on if nothing else is said.

    Attributes:
        batch_size: for steps that take a few seconds on a CPU.
        large_batch_size: for counting bytes: so large that activations decide how much memory is needed.
    """

    make: Callable[[], nn.Module]
    num_classes: int
    image_size: int
    batch_size: int
    large_batch_size: int


def _of_torchvision(name: str, batch_size: int, large_batch_size: int) -> Network:
    return Network(partial(torchvision.models.get_model, name, weights=None), 1000, 224, batch_size, large_batch_size)


NETWORKS = {
    "six_layers": Network(partial(six_layers, 3, 10), 10, 32, 64, 256),
    "resnet50": _of_torchvision("resnet50", 8, 32),
    "vgg19_bn": _of_torchvision("vgg19_bn", 4, 16),
    "resnet152": _of_torchvision("resnet152", 4, 16),
}


@dataclass(frozen=True)
class Setup:
    """One method, and what it trains on."""

    network: str
    method: str
    batch_size: int
    image_size: int
    device: str
    precision: Any
    steps: int
    warm_up: int

    @property
    def kind(self) -> str:
        return self.method.partition("+")[0].partition("-")[0]

    @property
    def number(self) -> int:
        """Return K, the number of blocks or of segments."""
        return int(self.method.partition("+")[0].partition("-")[2] or 1)

    @property
    def options(self) -> list[str]:
        return sorted(self.method.split("+")[1:])

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if "channels_last" in self.options else torch.contiguous_format

    def check(self) -> None:
        known = {"compile", "channels_last", *({"mlp_sr"} if self.kind == "dgl" else ())}
        if self.kind not in KINDS or not set(self.options) <= known or (self.kind != "backprop" and self.number < 2):
            raise SystemExit(
                f"--methods: must be KIND-K[+compile][+channels_last][+mlp_sr], see --help, got {self.method!r}."
            )


class Checkpointing(Backpropagation):
    """Backpropagation that keeps only what crosses from one segment of the network to the next."""

    def __init__(self, network: nn.Module, num_segments: int, example_input: list[int]) -> None:
        super().__init__(network)
        self.segments = split(network, num_segments, example_input=torch.zeros(example_input), balance="memory")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, targets = batch
        *before, last = self.segments
        for segment in before:
            x = checkpoint(segment, x, use_reentrant=False)
        return nn.functional.cross_entropy(last(x), targets)


def make_module(setup: Setup) -> L.LightningModule:
    network = NETWORKS[setup.network].make().to(memory_format=setup.memory_format)  # type: ignore[call-overload]
    example, compiled = [2, 3, setup.image_size, setup.image_size], "compile" in setup.options
    if setup.kind == "dgl":
        head = "mlp_sr" if "mlp_sr" in setup.options else "augmented"
        return DGLModule(
            network, setup.number, example_input=example, head=head, balance="memory", optimizer=sgd, compile=compiled
        )
    if setup.kind == "checkpoint":
        module = Checkpointing(network, setup.number, example)
        for segment in module.segments if compiled else ():
            segment.compile()
        return module
    if compiled:
        network.compile()
    return Backpropagation(network)


# What runs in processes


def noise(setup: Setup, batch_size: int) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(batch_size, 3, setup.image_size, setup.image_size)
    targets = torch.randint(0, NETWORKS[setup.network].num_classes, (batch_size,))
    return inputs.to(setup.device, memory_format=setup.memory_format), targets.to(setup.device)


@dataclass
class Reading:
    """The measurements of one run.

    Attributes:
        seconds: of a step.
        head_share: FLOPs of the auxiliary heads over those of the network.
        peak: bytes allocated on a GPU at most.
    """

    seconds: float
    head_share: float
    peak: int


def train(setup: Setup, warm_up_batch_size: int | None = None) -> Reading:
    batch = noise(setup, setup.batch_size)
    before = batch if warm_up_batch_size is None else noise(setup, warm_up_batch_size)
    clock = Clock(setup.warm_up)
    trainer = quiet_trainer(
        strategy=DGLStrategy() if setup.kind == "dgl" else "auto",
        accelerator=setup.device,
        precision=setup.precision,
        callbacks=[clock],
    )
    batches: Any = [before] * setup.warm_up + [batch] * setup.steps
    module = make_module(setup)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    share = sum(module.head_flops) / sum(module.block_flops) if isinstance(module, DGLModule) else 0.0
    peak = torch.cuda.max_memory_allocated() if setup.device == "cuda" else 0
    return Reading(clock.seconds / setup.steps, share, peak)


def time_steps(rank: int, setup: Setup) -> Reading:
    return train(setup)


def count_bytes(rank: int, setup: Setup) -> int:
    """Return the most bytes allocated on the CPU in a step, one on two samples before it, and all that precedes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(replace(setup, warm_up=1, steps=1), warm_up_batch_size=2)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def largest_batch(rank: int, setup: Setup) -> int:
    """Find the largest batch that a GPU can train on, by trying."""

    def fits(batch_size: int) -> bool:
        try:
            train(replace(setup, batch_size=batch_size, warm_up=1, steps=1))
        except torch.OutOfMemoryError:
            return False
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return True

    return largest(fits)


def largest(fits: Callable[[int], bool]) -> int:
    """Find the largest number that fits, to within a sixteenth."""
    if not fits(1):
        return 0
    too_large = 2
    while fits(too_large):
        too_large *= 2
    found = too_large // 2
    while too_large - found > max(1, found // 16):
        middle = (found + too_large) // 2
        found, too_large = (middle, too_large) if fits(middle) else (found, middle)
    return found


# The report


@dataclass
class Result:
    """The measurements of one method.

    Attributes:
        seconds: of a step, by repeat.
        head_share: FLOPs of the auxiliary heads over those of the network.
        peak: bytes allocated at most, with ``peak_batch_size`` samples.
        largest: batch that fits.
    """

    setup: Setup
    seconds: list[float]
    head_share: float
    peak: int
    peak_batch_size: int
    largest: int | None

    @property
    def samples_per_second(self) -> list[float]:
        return [self.setup.batch_size / seconds for seconds in self.seconds]

    def speed_over(self, other: Result) -> list[float]:
        """Return samples per second over another method's, repeat by repeat."""
        return [a / b for a, b in zip(self.samples_per_second, other.samples_per_second, strict=True)]


def measure(setups: list[Setup], args: argparse.Namespace) -> list[Result]:
    """Measure all methods on one network, in interleaved repeats."""
    readings: dict[Setup, list[Reading]] = {setup: [] for setup in setups}
    for repeat in range(args.repeats):
        for setup in setups:
            readings[setup] += in_processes(1, args.threads, time_steps, setup)
            speed = setup.batch_size / readings[setup][-1].seconds
            progress = f"{setup.network}, {setup.method}, repeat {repeat + 1} of {args.repeats}"
            print(f"{progress}: {speed:.1f} samples/s", file=sys.stderr, flush=True)
    results = []
    for setup in setups:
        peak, of_batch, fits = max(reading.peak for reading in readings[setup]), setup.batch_size, None
        if setup.device == "cpu":
            of_batch = args.large_batch_size or NETWORKS[setup.network].large_batch_size
            half, peak = (
                in_processes(1, args.threads, count_bytes, replace(setup, batch_size=size))[0]
                for size in (of_batch // 2, of_batch)
            )
            fits = of_batch + int((args.budget * GiB - peak) / ((peak - half) / (of_batch - of_batch // 2)))
        elif args.largest:
            (fits,) = in_processes(1, args.threads, largest_batch, setup)
        seconds, share = [reading.seconds for reading in readings[setup]], readings[setup][0].head_share
        results.append(Result(setup, seconds, share, peak, of_batch, fits))
        print(f"{setup.network}, {setup.method}: {peak / MiB:.0f} MiB", file=sys.stderr, flush=True)
    return results


def table(results: list[Result]) -> str:
    """Return a table with a row for each method; ratios are over the first, repeat by repeat."""
    first, rows = results[0], []
    for result in results:
        speeds = result.samples_per_second
        ratios = result.speed_over(first)
        fits, most = result.largest, first.largest
        rows.append(
            [
                result.setup.method,
                f"{100 * result.head_share:.1f} %" if result.setup.kind == "dgl" else "",
                spread(speeds, 1),
                spread(ratios, 2),
                f"{0.95 / (1 + result.head_share):.2f}" if result.setup.kind == "dgl" else "",
                f"{result.peak / MiB:.0f}",
                f"{result.peak / first.peak:.2f}",
                "" if fits is None else f"{fits}",
                "" if fits is None or not most else f"{fits / most:.2f}",
            ]
        )
    over = f"over {first.setup.method}"
    columns = ["method", "heads' FLOPs", "samples/s", over, "aim", "peak MiB", over, "largest batch", over]
    return markdown_table(columns, rows)


def draw(results: dict[str, list[Result]], path: Path) -> None:
    """Draw throughput against memory: a panel for each network, a point for each method."""
    seen = dict.fromkeys("+".join(result.setup.options) for own in results.values() for result in own)
    markers = dict(zip(seen, "osv^D*PX", strict=False))
    names = list(dict.fromkeys(result.setup.method for own in results.values() for result in own))
    colours = {base: f"C{i}" for i, base in enumerate(dict.fromkeys(name.partition("+")[0] for name in names))}
    figure = Figure(figsize=(3.6 * len(results) + 2.4, 3.8), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    points = {}
    for axes, (network, own) in zip(panels, results.items(), strict=True):
        for result in own:
            base, options = result.setup.method.partition("+")[0], "+".join(result.setup.options)
            at = (result.peak / own[0].peak, statistics.median(result.speed_over(own[0])))
            (points[result.setup.method],) = axes.plot(*at, markers[options], color=colours[base], ms=8, alpha=0.8)
        axes.set_title(f"{network}, {own[0].setup.image_size}×{own[0].setup.image_size}")
        axes.set_xlabel(f"peak memory, batch {own[0].peak_batch_size}")
        axes.set_ylabel(f"samples/s, batch {own[0].setup.batch_size}")
        axes.margins(0.1)
        axes.grid(alpha=0.3)
    figure.supxlabel(f"both over {names[0]}'s", fontsize="medium")
    figure.legend([points[name] for name in names], names, loc="outside right center")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)[:3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="the others are compared to the first")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="32-true", help="Trainer's")
    parser.add_argument("--batch-size", type=int, help="by default one that suits a CPU")
    parser.add_argument(
        "--large-batch-size", type=int, help="for memory on a CPU; must be so large that activations count"
    )
    parser.add_argument("--image-size", type=int, help="by default 224 for ImageNet's networks, and 32 for CIFAR-10's")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each run")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before these")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=float, default=16.0, help="GiB, for the largest batch on a CPU")
    parser.add_argument("--largest", action="store_true", help="try out the largest batch on a GPU")
    parser.add_argument("--output", type=Path, help="file to write the tables to, besides printing them")
    parser.add_argument("--figure", type=Path, help="file to draw throughput against memory to")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here.")

    results = {}
    for name in args.networks:
        network = NETWORKS[name]
        setups = [
            Setup(
                name,
                method,
                args.batch_size or network.batch_size,
                args.image_size or network.image_size,
                args.device,
                args.precision,
                args.steps,
                args.warm_up,
            )
            for method in args.methods
        ]
        for setup in setups:
            setup.check()
        results[name] = measure(setups, args)
        report(results, args)  # after each network: the next may take long


def report(results: dict[str, list[Result]], args: argparse.Namespace) -> None:
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    parts = [
        f"{where}, {args.precision}, torch {torch.__version__}, torchvision {torchvision.__version__}; {args.steps} "
        f"steps after {args.warm_up}, {args.repeats} interleaved repeats: median (min–max)."
    ]
    for name, own in results.items():
        setup = own[0].setup
        memory = (
            f", memory at batch {own[0].peak_batch_size} and for {args.budget:g} GiB" if args.device == "cpu" else ""
        )
        parts += [f"{name}, {setup.image_size}×{setup.image_size}, batch {setup.batch_size}{memory}:", table(own)]
    publish("\n\n".join(parts), args.output)
    if args.figure is not None:
        draw(results, args.figure)


if __name__ == "__main__":
    main()
