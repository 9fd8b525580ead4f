"""Measure how DGL scales with the number of stages: predict from block times, check, and extrapolate to 64 stages.

    python -m benchmarks.scaling --output scaling.md

The law: stages work on different batches at the same time, and nothing flows back, so that a step takes as long as its
slowest part,

    seconds a step = max( max over stages s_j,  transfer,  Σ s_j / C )
    s_j = block j's local step + its head's part + what sending and receiving cost its processor
    transfer = latency + bytes of the activations / bandwidth

where Σ s_j / C counts if J stages share C < J cores. Block times are measured in one process with one thread, and again
in C processes at once: cores that share memory and caches slow each other down, which devices of their own do not. The
prediction is checked by training J = 2, 3, 4 blocks, one on each rank (beyond C: oversubscribed).

The table on paper is for J equal blocks on J devices, each as fast as one core here, with the given ``--bandwidth`` and
``--latency``, or the measured ones. Its speed-ups are over end-to-end backpropagation of the J blocks on one device.
Beside them GPipe and 1F1B, whose bubble leaves J M / (M + J - 1) with M micro-batches, before communication and before
what smaller batches cost.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from benchmarks.common import in_processes, markdown_table, publish, spread
from benchmarks.parallel import Setup, conditions, how_long, mean_times, options, train, workload_of

CHECKED = (2, 3, 4)
ON_PAPER = (2, 4, 8, 16, 32, 64)
MICRO_BATCHES = (4, 8, 32)


@dataclass(frozen=True)
class Blocks:
    """Seconds of a local step, head included, of a first, an inner and a last block, and of the inner one's head."""

    first: float
    inner: float
    last: float
    head: float

    @classmethod
    def measure(cls, setup: Setup, num_processes: int) -> Blocks:
        """Measure them with ``num_processes`` busy at once."""
        blocks, heads = mean_times(setup, num_processes)
        return cls(*blocks, heads[1])

    def stages(self, num_stages: int) -> list[float]:
        return [self.first, *[self.inner] * (num_stages - 2), self.last]


@dataclass(frozen=True)
class Link:
    """Latency in seconds, bandwidth in bytes a second, and the CPU seconds that a message costs at each end."""

    latency: float = 0.0
    bandwidth: float = math.inf
    cpu_sending: float = 0.0
    cpu_receiving: float = 0.0

    @classmethod
    def measure(cls, num_bytes: int) -> Link:
        (latency, transfer, sending), (_, _, receiving) = in_processes(2, 1, time_messages, num_bytes)
        return cls(latency, num_bytes / max(transfer - latency, 1e-9), sending, receiving)

    def transfer(self, num_bytes: int) -> float:
        return self.latency + num_bytes / self.bandwidth

    def with_overhead(self, stages: list[float]) -> list[float]:
        last = len(stages) - 1
        return [
            seconds + (self.cpu_receiving if j > 0 else 0.0) + (self.cpu_sending if j < last else 0.0)
            for j, seconds in enumerate(stages)
        ]


def time_messages(rank: int, num_bytes: int, repeats: int = 10) -> tuple[float, float, float]:
    """Return seconds of half a round trip, and of a message of ``num_bytes``: wall time, and this end's CPU time."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    signal, message = torch.zeros(1), torch.ones(num_bytes // 4)

    def pass_on(count: int, sends: bool, like: torch.Tensor) -> None:
        for _ in range(count):
            if sends:
                dist.send(like, 1 - rank)
            else:
                dist.recv(torch.empty_like(like), 1 - rank)

    pass_on(2, rank == 0, message)
    pass_on(1, rank == 1, signal)
    began = time.perf_counter()
    for _ in range(100):
        pass_on(1, rank == 0, signal)
        pass_on(1, rank == 1, signal)
    latency = (time.perf_counter() - began) / 200
    began, cpu_began = time.perf_counter(), time.process_time()
    pass_on(repeats, rank == 0, message)
    pass_on(1, rank == 1, signal)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    dist.destroy_process_group()
    return latency, (seconds - latency) / repeats, cpu_seconds / repeats


def seconds_a_step(stages: list[float], transfer: float, num_cores: int) -> float:
    """Return the seconds per step that the law predicts."""
    return max(*stages, transfer, sum(stages) / num_cores)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--bandwidth", type=float, help="of the links in the table on paper, bytes a second")
    parser.add_argument("--latency", type=float, help="of the links in the table on paper, seconds")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="C, how many cores this machine has")
    args = parser.parse_args()
    how = how_long(args)
    workloads = {number: workload_of(args, number) for number in CHECKED}
    num_bytes = 4 * args.batch_size * args.channels * 32 * 32
    alone: list[Blocks] = []
    together: list[Blocks] = []
    links: list[Link] = []
    measured: dict[int, list[float]] = {num_stages: [] for num_stages in CHECKED}
    for repeat in range(args.repeats):
        alone.append(Blocks.measure(Setup("dgl", 1, 1, workloads[3], **how), 1))
        together.append(Blocks.measure(Setup("dgl", 1, 1, workloads[3], **how), args.cores))
        links.append(Link.measure(num_bytes))
        for num_stages, speeds in measured.items():
            ranks = in_processes(num_stages, 1, train, Setup("dgl", num_stages, 1, workloads[num_stages], **how))
            speeds.append(args.steps * args.batch_size / max(rank.seconds for rank in ranks))
        print(f"repeat {repeat + 1} of {args.repeats} done", file=sys.stderr, flush=True)

    parts = [
        conditions(args, workloads[3]),
        table_of_costs(alone, together, links, args.cores),
        table_of_checks(alone, together, links, measured, num_bytes, args.batch_size, args.cores),
        table_on_paper(alone, links, num_bytes, args),
    ]
    publish("\n\n".join(parts), args.output)


def table_of_costs(alone: list[Blocks], together: list[Blocks], links: list[Link], num_cores: int) -> str:
    def milliseconds(seconds: list[float]) -> str:
        return spread([1e3 * s for s in seconds], 1)

    labels = {
        "first": "first block with head, ms",
        "inner": "inner block with head, ms",
        "last": "last block, ms",
        "head": "of the inner block the head, ms",
    }
    rows = [
        [label, milliseconds([getattr(b, name) for b in alone]), milliseconds([getattr(b, name) for b in together])]
        for name, label in labels.items()
    ]
    rows += [
        ["link: latency, ms", spread([1e3 * link.latency for link in links], 3), ""],
        ["link: bandwidth, MB/s", spread([link.bandwidth / 1e6 for link in links], 0), ""],
        ["link: CPU time of sending, ms", milliseconds([link.cpu_sending for link in links]), ""],
        ["link: CPU time of receiving, ms", milliseconds([link.cpu_receiving for link in links]), ""],
    ]
    return markdown_table(["measured", "one process", f"{num_cores} processes at once"], rows)


def table_of_checks(
    alone: list[Blocks],
    together: list[Blocks],
    links: list[Link],
    measured: dict[int, list[float]],
    num_bytes: int,
    batch_size: int,
    num_cores: int,
) -> str:
    def predicted(blocks: list[Blocks], num_stages: int) -> list[float]:
        return [
            batch_size / seconds_a_step(link.with_overhead(own.stages(num_stages)), link.transfer(num_bytes), num_cores)
            for own, link in zip(blocks, links, strict=True)
        ]

    rows = []
    for num_stages, speeds in measured.items():
        row = [str(num_stages), spread(speeds, 1)]
        for blocks in (alone, together):
            law = predicted(blocks, num_stages)
            row += [spread(law, 1), spread([m / p for m, p in zip(speeds, law, strict=True)], 2)]
        rows.append(row)
    columns = ["J", "samples/s measured", "predicted, blocks alone", "measured over it"]
    return markdown_table([*columns, f"predicted, {num_cores} processes at once", "measured over it"], rows)


def table_on_paper(alone: list[Blocks], links: list[Link], num_bytes: int, args: argparse.Namespace) -> str:
    inner, head = (statistics.median(getattr(blocks, name) for blocks in alone) for name in ("inner", "head"))
    middle = Link(*(statistics.median(getattr(link, name) for link in links) for name in Link.__dataclass_fields__))
    link = Link(
        middle.latency if args.latency is None else args.latency,
        middle.bandwidth if args.bandwidth is None else args.bandwidth,
        middle.cpu_sending,
        middle.cpu_receiving,
    )
    block, transfer = inner - head, link.transfer(num_bytes)
    rows = []
    for num_stages in ON_PAPER:
        stages = link.with_overhead([inner] * num_stages)
        compute_bound, step = max(stages), seconds_a_step(stages, transfer, num_stages)
        row = [num_stages * block / compute_bound, num_stages * block / step]
        row += [num_stages * m / (m + num_stages - 1) for m in MICRO_BATCHES]
        speeds = [f"{args.batch_size / (num_stages * block):.1f}", f"{args.batch_size / step:.1f}"]
        rows.append([str(num_stages), *speeds, *(f"{speed_up:.2f}" for speed_up in row)])
    columns = ["J", "samples/s, one device", "samples/s, DGL", "speed-up of DGL, free links", "with these links"]
    columns += [f"GPipe and 1F1B, M = {m}" for m in MICRO_BATCHES]
    bound = "the links" if transfer > max(link.with_overhead([inner] * 3)) else "the blocks"
    text = (
        f"On paper: equal blocks of {1e3 * block:.0f} ms, heads {head / block:.1%} of that; {num_bytes / 1e6:.1f} MB a "
        f"step over each link at {link.bandwidth / 1e6:.0f} MB/s and {1e3 * link.latency:.3g} ms latency, "
        f"{1e3 * transfer:.0f} ms: bound by {bound}."
    )
    return f"{text}\n\n{markdown_table(columns, rows)}"


if __name__ == "__main__":
    main()
