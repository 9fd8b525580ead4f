"""Measure samples per second with the blocks of a CNN on two ranks, against one rank, DDP, and pipeline schedules.

    python -m benchmarks.parallel --output parallel.md
    python -m benchmarks.parallel --network resnet18 --precision bf16-mixed
    python -m benchmarks.parallel --network resnet50 --image-size 64 --precision bf16-mixed

Two blocks: of equal cost, or those of a network of torchvision, cut where their measured times are balanced, block 0's
auxiliary head counted in. Images are in memory. All methods train the same network with the same optimizer and one
update for every ``--batch-size`` images. In bf16-mixed all are in channels_last, and activations are sent in bfloat16.
A method is named ``KIND-RANKSxTHREADS``, threads being the intra-op threads of each rank, with ``-mM`` where a batch is
dealt out in M micro-batches:

- ``dgl``: Trainer with DGLStrategy, on 1 rank (both blocks) or 2 (a block each). Micro-batches are
  ``accumulate_grad_batches=M`` on batches of ``--batch-size`` / M.
- ``backprop``: end-to-end backpropagation, no heads, under Trainer; on 2 ranks Lightning's DDP, each rank on half of
  the batch; with ``+bf16`` or ``+powersgd`` gradients are compressed by torch's hooks (PowerSGD of rank 1).
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
MALLOC_TRIM_THRESHOLD_=131072 MALLOC_ARENA_MAX=16 GLIBC_TUNABLES=`` in front of the command.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from benchmarks.common import (
    Backpropagation,
    in_processes,
    markdown_table,
    publish,
    quiet_trainer,
    sgd,
    spread,
    with_share,
)
from benchmarks.workloads import PRECISIONS, Workload
from lightning_dgl import DGLStrategy
from lightning_dgl.splitting import num_parameters

PIPELINES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


@dataclass(frozen=True)
class Setup:
    """A method, what it trains, and how long."""

    kind: str
    ranks: int
    threads: int
    workload: Workload
    steps: int
    warm_up: int
    micro_batches: int = 1
    hook: str | None = None

    @classmethod
    def parse(cls, name: str, workload: Workload, steps: int, warm_up: int) -> Setup:
        match = re.fullmatch(r"(dgl|apart|backprop|gpipe|1f1b)-([12])x(\d+)(?:-m(\d+))?(?:\+(bf16|powersgd))?", name)
        if match is None:
            raise SystemExit(f"A method is KIND-RANKSxTHREADS or KIND-RANKSxTHREADS-mM, see --help; got {name!r}.")
        kind, ranks, threads, micro_batches = match[1], int(match[2]), int(match[3]), int(match[4] or 1)
        if workload.batch_size % (ranks * micro_batches):
            raise SystemExit(f"{name} cannot deal out batches of {workload.batch_size} evenly.")
        if kind in PIPELINES and (ranks != 2 or micro_batches < 2):
            raise SystemExit(f"{name}: a pipeline has 2 ranks here, and 2 micro-batches or more.")
        if kind == "backprop" and micro_batches > 1:
            raise SystemExit(f"{name}: backpropagation takes a batch at once here.")
        if match[5] and (kind != "backprop" or ranks == 1):
            raise SystemExit(f"{name}: only backpropagation on 2 ranks sends gradients that a hook could compress.")
        if match[5] == "powersgd" and warm_up < 2:
            raise SystemExit(f"{name} compresses from the third step on: pass --warm-up 2 or more.")
        return cls(kind, ranks, threads, workload, steps, warm_up, micro_batches, match[5])

    @property
    def num_steps(self) -> int:
        return self.warm_up + self.steps


# What runs in the ranks' processes


@dataclass
class Reading:
    """The resources one rank used since the end of the warm-up."""

    seconds: float
    cpu_seconds: float
    waited_for_inbox: float = 0.0
    waited_for_outbox: float = 0.0
    bytes_sent: float = 0.0

    def __sub__(self, other: Reading) -> Reading:
        return Reading(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Stopwatch:
    """Reads the clocks at the end of the warm-up and of the last step."""

    def __init__(self, setup: Setup, batches_a_step: int = 1) -> None:
        self._when = (setup.warm_up * batches_a_step, setup.num_steps * batches_a_step)
        self._num_batches = 0
        self._readings: list[Reading] = []

    def batch_done(self, waited_for_inbox: float = 0.0, waited_for_outbox: float = 0.0, bytes_sent: float = 0) -> None:
        self._num_batches += 1
        if self._num_batches in self._when:
            bytes_sent = bytes_of_interface() or bytes_sent
            self._readings.append(
                Reading(time.perf_counter(), time.process_time(), waited_for_inbox, waited_for_outbox, bytes_sent)
            )

    def total(self) -> Reading:
        before, after = self._readings
        return after - before


class Clock(L.Callback):
    """A stopwatch under the Trainer; also reads how long a stage waits for its links, and the bytes it sends."""

    def __init__(self, setup: Setup) -> None:
        self._watch = Stopwatch(setup, setup.micro_batches)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if isinstance(trainer.strategy, DGLStrategy):
            incoming, outgoing = trainer.strategy.run.incoming, trainer.strategy.run.outgoing
            self._watch.batch_done(incoming.seconds_waited, outgoing.seconds_waited, outgoing.bytes_sent or 0)
        else:
            self._watch.batch_done()

    def total(self) -> Reading:
        return self._watch.total()


def bytes_of_interface() -> int:
    """Return the bytes that the network interface of ranks has sent, headers included; 0 if none is chosen for them."""
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    lines = Path("/proc/net/dev").read_text().splitlines() if name else []
    return sum(int(line.split()[9]) for line in lines if line.split()[0] == f"{name}:")


def train(rank: int, setup: Setup, codec: Any = None, num_nodes: int = 1) -> Reading:
    """Run one method on this rank; ``codec`` is DGLStrategy's, and ranks are on ``num_nodes`` nodes."""
    if setup.kind in PIPELINES:
        return train_pipeline(rank, setup)
    module: L.LightningModule
    strategy: str | DGLStrategy | DDPStrategy
    devices = setup.ranks
    if setup.kind in ("dgl", "apart"):
        module, strategy = setup.workload.make_module(), DGLStrategy(codec=codec, timeout=600)
        batches_a_step = setup.micro_batches
        devices = 1 if setup.kind == "apart" else devices
    else:
        module = Backpropagation(setup.workload.make_network())
        strategy, batches_a_step = (ddp(setup.hook), setup.ranks) if setup.ranks > 1 else ("auto", 1)
    clock = Clock(setup)
    trainer = quiet_trainer(
        devices=devices // num_nodes,
        num_nodes=num_nodes,
        strategy=strategy,
        accelerator="cpu",
        precision=setup.workload.precision,
        accumulate_grad_batches=setup.micro_batches,
        callbacks=[clock, *([Compression(setup.hook)] if setup.hook else [])],
    )
    trainer.fit(module, setup.workload.images(setup.num_steps, batches_a_step))
    return clock.total()


def ddp(hook: str | None) -> DDPStrategy:
    # PowerSGD's callbacks send several times a bucket, which gloo confuses if there are several buckets.
    return DDPStrategy(bucket_cap_mb=4096) if hook == "powersgd" else DDPStrategy()


class Compression(L.Callback):
    """Lets DDP compress gradients; Lightning's own argument for that is for CUDA only."""

    def __init__(self, hook: str) -> None:
        self._hook = hook

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        model: Any = trainer.strategy.model
        if self._hook == "bf16":
            model.register_comm_hook(None, default_hooks.bf16_compress_hook)
        else:
            # It begins to compress within the warm-up; by default it does after 1000 steps.
            state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
            model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


class PipelineBlock(nn.Module):
    """A block in its precision; what crosses to the next stage is in bfloat16 then, with channels last.

    Pipelines send tensors that are contiguous, so that what is sent in channels_last looks like (N, H, W, C) to them.
    """

    def __init__(self, workload: Workload, rank: int) -> None:
        super().__init__()
        self.block = workload.make_module().blocks[rank]
        self._workload, self._is_first, self._is_last = workload, rank == 0, rank == workload.blocks - 1

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._workload.is_bfloat16):
            output = self.block(x if self._is_first else x.permute(0, 3, 1, 2))
        if self._is_last:
            return output.float()
        output = output.permute(0, 2, 3, 1).contiguous()
        return output.bfloat16() if self._workload.is_bfloat16 else output


def pipeline_steps(rank: int, setup: Setup) -> Iterator[tuple[PipelineBlock, torch.optim.Optimizer]]:
    """Train this rank's stage of a pipeline; yield its block and optimizer after each step."""
    dist.init_process_group("gloo", rank=rank, world_size=setup.ranks)
    block = PipelineBlock(setup.workload, rank)
    schedule = PIPELINES[setup.kind](
        PipelineStage(block, rank, setup.ranks, torch.device("cpu")),
        setup.micro_batches,
        loss_fn=nn.functional.cross_entropy,
    )
    optimizer = sgd(block.parameters())
    for inputs, targets in setup.workload.images(setup.num_steps):
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(inputs, return_outputs=False)
        else:
            schedule.step(target=targets, return_outputs=False)
        optimizer.step()
        yield block, optimizer
    dist.destroy_process_group()


def train_pipeline(rank: int, setup: Setup) -> Reading:
    watch = Stopwatch(setup)
    for _ in pipeline_steps(rank, setup):
        watch.batch_done()
    return watch.total()


def time_blocks(rank: int, setup: Setup) -> tuple[list[list[float]], list[list[float]]]:
    """Return the seconds of each block's local steps, head and optimizer included, and of each head's part of them."""
    workload = setup.workload
    module = workload.make_module()
    heads = [*module.heads, nn.Identity()]
    module.blocks.train()
    optimizers = [sgd(module.block_parameters(j)) for j in range(workload.blocks)]
    of_blocks: list[list[float]] = [[] for _ in optimizers]
    of_heads: list[list[float]] = [[] for _ in module.heads]
    for x, targets in workload.images(setup.num_steps):
        for j, (block, head, optimizer) in enumerate(zip(module.blocks, heads, optimizers, strict=True)):
            began = time.perf_counter()
            optimizer.zero_grad()
            with workload.autocast():
                output = block(x)
                loss = nn.functional.cross_entropy(head(output), targets)
            loss.backward()
            optimizer.step()
            of_blocks[j].append(time.perf_counter() - began)
            x = output.detach()
            del output
            if j < len(of_heads):
                features = x.clone().requires_grad_()
                began = time.perf_counter()
                with workload.autocast():
                    loss = nn.functional.cross_entropy(head(features), targets)
                loss.backward()
                of_heads[j].append(time.perf_counter() - began)
    return [seconds[setup.warm_up :] for seconds in of_blocks], [seconds[setup.warm_up :] for seconds in of_heads]


def mean_times(setup: Setup, num_processes: int, share: float = 1.0) -> tuple[list[float], list[float]]:
    """Return the seconds of each block's step and of each head's part, as many processes being busy with them.

    A process gets ``share`` of a core. Times are means over processes of the medians of each.
    """
    times = in_processes(num_processes, 1, with_share, share, time_blocks, setup, together=False)

    def mean(of_processes: Iterable[list[list[float]]]) -> list[float]:
        medians = ([statistics.median(seconds) for seconds in own] for own in of_processes)
        return [statistics.fmean(own) for own in zip(*medians, strict=True)]

    return mean(blocks for blocks, _ in times), mean(heads for _, heads in times)


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
        samples = setup.steps * setup.workload.batch_size * (setup.ranks if setup.kind == "apart" else 1)
        return [samples / seconds for seconds in self.seconds(name)]

    def ratios(self, name: str, others: list[str]) -> list[float]:
        """Return samples per second over those of the fastest of ``others``, repeat by repeat."""
        fastest = [max(speeds) for speeds in zip(*map(self.samples_per_second, others), strict=True)]
        return [a / b for a, b in zip(self.samples_per_second(name), fastest, strict=True)]


def table_of_methods(results: Results) -> str:
    reference = "dgl-1x1" if "dgl-1x1" in results.setups else next(iter(results.setups))
    rows = []
    for name, setup in results.setups.items():
        images = setup.workload.batch_size // (setup.ranks if setup.kind == "backprop" else setup.micro_batches)
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
                megabytes = f"{statistics.median(r.bytes_sent for r in readings) / setup.steps / 1e6:.2f}"
                rows.append([f"{name}, stage {rank}", *([received, "", ""] if rank else ["", sent, megabytes])])
    return markdown_table(["", "% of the time waiting to receive", "% waiting to send", "MB sent a step"], rows)


def traffic_of_others(workload: Workload) -> str:
    module = workload.make_module()
    parameters = num_parameters(module.network)
    activations = workload.batch_size * math.prod(module.split_points[0].shape[1:]) * (2 if workload.is_bfloat16 else 4)
    return (
        "For comparison, by formula, in MB each rank sends a step: DDP with a ring all-reduce, 4 bytes × parameters × "
        f"2 (R - 1) / R for R = 2 ranks: {4 * parameters / 1e6:.2f}; a pipeline, activations one way and their "
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
    parser.add_argument("--network", default="equal", help="equal (blocks), or a classification model of torchvision")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--precision", default="32-true", choices=PRECISIONS)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=64, help="of equal blocks")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each run")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before these, at least 1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file to write the tables to, besides printing them")
    return parser


def how_long(args: argparse.Namespace) -> dict[str, int]:
    if args.warm_up < 1:
        raise SystemExit("--warm-up must be at least 1.")
    return {"steps": args.steps, "warm_up": args.warm_up}


def workload_of(args: argparse.Namespace, blocks: int = 2) -> Workload:
    """Return what the arguments ask for, in balanced blocks."""
    return Workload(
        args.network, args.channels, args.image_size, args.precision, args.batch_size, blocks=blocks
    ).balanced()


def conditions(args: argparse.Namespace, workload: Workload) -> str:
    return (
        f"{workload}; {args.steps} steps after {args.warm_up}, {args.repeats} interleaved repeats: median (min–max). "
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores."
    )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--methods", nargs="+", help="names as above; by default a choice of every kind")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8], help="M, for the default methods")
    args = parser.parse_args()
    workload, how = workload_of(args), how_long(args)
    names = args.methods or [
        *("backprop-1x1", "backprop-1x2", "backprop-2x1", "dgl-1x1", "apart-2x1", "dgl-1x2", "dgl-2x1"),
        *(f"{kind}-2x1-m{m}" for m in args.micro_batches if m > 1 for kind in ("gpipe", "1f1b", "dgl")),
    ]
    results = Results({name: Setup.parse(name, workload, **how) for name in names}, {name: [] for name in names})
    blocks = table_of_blocks(Setup("dgl", 1, 1, workload, **how))
    for repeat in range(args.repeats):
        for name, setup in results.setups.items():
            together = setup.kind != "apart"
            results.readings[name].append(in_processes(setup.ranks, setup.threads, train, setup, together=together))
            speed = results.samples_per_second(name)[-1]
            print(f"repeat {repeat + 1} of {args.repeats}, {name}: {speed:.1f} samples/s", file=sys.stderr, flush=True)

    comparisons, links = table_of_comparisons(results), table_of_links(results)
    parts = [conditions(args, workload), blocks, table_of_methods(results), comparisons, links]
    parts.append(traffic_of_others(workload))
    publish("\n\n".join(part for part in parts if part), args.output)


if __name__ == "__main__":
    main()
