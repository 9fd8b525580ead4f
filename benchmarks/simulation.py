"""Simulate ranks, links and pauses, for machines that are not at hand.

    python -m benchmarks.simulation                       # up to 1,000 ranks on home connections, a table
    python -m benchmarks.simulation --figure ranks.svg    # and a figure
    python -m benchmarks.simulation --check               # beside measurements on 2, 3 and 4 ranks of this machine

Time passes in events: a rank computes, a message crosses a link, ranks average gradients. What is simulated:

- ``synchronous``, ``asynchronous``: DGL in J stages. A stage sends ahead as far as its queues allow (one message waits,
  one is on its way, ``prefetch`` wait at the receiver); an asynchronous stage goes on with what its replay buffer
  holds, up to ``max_lead`` batches ahead of the newest one, and drops what the next stage is too slow to take.
- ``1F1B``: the same stages as a pipeline with ``micro_batches``, activations one way and their gradients the other.
- ``DDP``: the whole network on every rank, gradients averaged over a ring. With as many ranks it takes J times as many
  images a step as the others; ``DDP, same batch`` takes as many as they do.

With R replicas of every stage, the ranks of a stage average the gradients of its parameters over a ring, in each step.
A ring of R ranks takes 2 (R - 1) messages of 1 / R of the bytes, one after another.

Ranks differ: the time of a step is multiplied by the rank's ``slowness`` and by noise, and they pause now and then.
"""

from __future__ import annotations

import argparse
import heapq
import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.common import in_processes, markdown_table, publish, spread, with_share
from benchmarks.parallel import Setup, mean_times, train
from benchmarks.scaling import CHECKED, Link
from benchmarks.workloads import Workload

METHODS = ("synchronous", "asynchronous", "1F1B", "DDP", "DDP, same batch")


@dataclass(frozen=True)
class Cluster:
    """What is simulated.

    Attributes:
        block_seconds: of a local step of each stage, heads included, on a rank of slowness 1.
        head_seconds: of these, what the auxiliary heads take; a pipeline and DDP have none.
        message_bytes: of what one stage sends to the next for a batch; a pipeline sends ``raw_bytes`` each way.
        raw_bytes: of an activation.
        gradient_bytes: of the gradients of each stage.
        link: between ranks; it carries one message at a time in each direction.
        replicas: R.
        batch_size: of one replica.
        noise: standard deviation of the logarithm of a step's duration.
        slowness: standard deviation of the logarithm of a rank's slowness.
        paused: the share of the time for which a rank is paused.
        pause_seconds: mean length of a pause.
        prefetch: how many batches may wait at a stage.
        max_lead: how many batches an asynchronous stage may be ahead of the newest in its buffer.
        micro_batches: of 1F1B.
    """

    block_seconds: tuple[float, ...]
    head_seconds: tuple[float, ...] = ()
    message_bytes: float = 0.0
    raw_bytes: float = 0.0
    gradient_bytes: tuple[float, ...] = ()
    link: Link = field(default_factory=Link)
    replicas: int = 1
    batch_size: float = 128
    noise: float = 0.0
    slowness: float = 0.0
    paused: float = 0.0
    pause_seconds: float = 30.0
    prefetch: int = 2
    max_lead: int = 8
    micro_batches: int = 8

    @property
    def num_stages(self) -> int:
        return len(self.block_seconds)

    @property
    def num_ranks(self) -> int:
        return self.num_stages * self.replicas

    def without_heads(self) -> tuple[float, ...]:
        heads = self.head_seconds or (0.0,) * self.num_stages
        return tuple(block - head for block, head in zip(self.block_seconds, heads, strict=True))


class Rank:
    """A processor that works on one thing at a time, at a pace of its own, with pauses."""

    def __init__(self, cluster: Cluster, draws: random.Random) -> None:
        self.free = 0.0
        self.busy = 0.0
        self._cluster, self._draws = cluster, draws
        self._slowness = math.exp(draws.gauss(0, cluster.slowness))
        self._pause = self._next_pause(0.0)

    def _next_pause(self, after: float) -> tuple[float, float]:
        paused, mean = self._cluster.paused, self._cluster.pause_seconds
        if paused == 0:
            return math.inf, math.inf
        begins = after + self._draws.expovariate(paused / (1 - paused) / mean)
        return begins, begins + self._draws.expovariate(1 / mean)

    def work(self, ready: float, seconds: float) -> float:
        """Return when work that can begin at ``ready`` is done."""
        seconds *= self._slowness * math.exp(self._draws.gauss(0, self._cluster.noise))
        now = max(self.free, ready)
        self.busy += seconds
        while True:
            begins, ends = self._pause
            if now + seconds <= begins:
                break
            if ends > now:
                seconds -= max(0.0, begins - now)
                now = ends
            self._pause = self._next_pause(ends)
        self.free = now + seconds
        return self.free


class Wire:
    """Carries messages in order; with ``drops``, a message that waits gives way to the next one."""

    def __init__(self, link: Link, prefetch: int) -> None:
        self._link, self._prefetch = link, prefetch
        self._free = 0.0
        self._taken: list[float] = []  # when the sending thread took each message
        self.delivered: list[float] = []  # when each message was in the receiver's queue
        self.got: list[float] = []  # when the receiver took each message

    def put(self, done: float, num_bytes: float) -> float:
        """Send a message that is ready at ``done``; return when the sender can go on."""
        n = len(self._taken)
        handed_over = max(done, self._taken[n - 1]) if n else done
        taken = max(handed_over, self._free)
        self._taken.append(taken)
        self._free = taken + num_bytes / self._link.bandwidth
        room = self.got[n - self._prefetch] if n >= self._prefetch else 0.0
        self.delivered.append(max(self._free + self._link.latency, room))
        # While the receiver's queue is full, nothing more is taken off the wire.
        self._free = max(self._free, self.delivered[-1] - self._link.latency)
        return handed_over


@dataclass(frozen=True)
class Outcome:
    """Samples a second of all replicas together, and the share of the time that ranks compute."""

    samples_per_second: float
    utilisation: float


def simulate(method: str, cluster: Cluster, num_steps: int = 200, seed: int = 0) -> Outcome:
    """Return how fast ``method`` trains; the first tenth of the steps is not counted."""
    draws = random.Random(seed)
    if method.startswith("DDP"):
        parts = cluster.num_stages if method == "DDP, same batch" else 1
        cluster = replace(
            cluster,
            batch_size=cluster.batch_size / parts,
            block_seconds=(sum(cluster.without_heads()) / parts,),
            head_seconds=(),
            gradient_bytes=(sum(cluster.gradient_bytes),),
            replicas=cluster.num_ranks,
        )
    ranks = [[Rank(cluster, draws) for _ in range(cluster.num_stages)] for _ in range(cluster.replicas)]
    run: Callable[..., list[float]] = {
        "synchronous": _synchronous,
        "asynchronous": _asynchronous,
        "1F1B": _pipeline,
        "DDP": _synchronous,
        "DDP, same batch": _synchronous,
    }[method]
    ends = run(cluster, ranks, num_steps)  # of each step, on the last rank that takes it
    counted_from = num_steps // 10
    seconds = ends[-1] - ends[counted_from - 1]
    samples = (num_steps - counted_from) * cluster.batch_size * cluster.replicas
    everyone = [rank for row in ranks for rank in row]
    return Outcome(samples / seconds, statistics.fmean(rank.busy for rank in everyone) / ends[-1])


def _average(cluster: Cluster, stage: int, done: Sequence[float]) -> float:
    """Return when the ranks of a stage, ready at ``done``, have averaged their gradients."""
    num_ranks = len(done)
    if num_ranks == 1:
        return done[0]
    num_bytes = cluster.gradient_bytes[stage] / num_ranks
    return max(done) + 2 * (num_ranks - 1) * cluster.link.transfer(num_bytes)


def _synchronous(cluster: Cluster, ranks: list[list[Rank]], num_steps: int) -> list[float]:
    stages = range(cluster.num_stages)
    wires = [[Wire(cluster.link, cluster.prefetch) for _ in stages] for _ in ranks]  # wires[r][j] leads to stage j
    ends = []
    for n in range(num_steps):
        for j in stages:
            done = []
            for r, row in enumerate(ranks):
                ready = max(wires[r][j].delivered[n], row[j].free) if j else row[j].free
                wires[r][j].got.append(ready)
                done.append(row[j].work(ready, cluster.block_seconds[j]))
            finished = _average(cluster, j, done)
            for r, row in enumerate(ranks):
                row[j].free = finished
                if j + 1 in stages:  # the activation is sent before the backward pass, but is not needed sooner
                    row[j].free = max(finished, wires[r][j + 1].put(done[r], cluster.message_bytes))
        ends.append(finished)
    return ends


def _asynchronous(cluster: Cluster, ranks: list[list[Rank]], num_steps: int) -> list[float]:
    arrivals: list[list[tuple[float, int]]] = [[] for _ in ranks]  # at the present stage: when, and which batch
    ends: list[float] = []
    for j in range(cluster.num_stages):
        outputs: list[list[float]] = [[] for _ in ranks]
        newest = [0] * len(ranks)  # how many arrivals each rank has looked at
        ends = []
        for n in range(num_steps):
            done = []
            for r, row in enumerate(ranks):
                ready = row[j].free
                if j:
                    needed = max(0, n - cluster.max_lead)
                    while newest[r] < len(arrivals[r]) - 1 and arrivals[r][newest[r]][1] < needed:
                        newest[r] += 1
                    ready = max(ready, arrivals[r][newest[r]][0])
                done.append(row[j].work(ready, cluster.block_seconds[j]))
                outputs[r].append(done[-1])
            finished = _average(cluster, j, done)
            for row in ranks:
                row[j].free = finished
            ends.append(finished)
        arrivals = [_dropping(cluster.link, times, cluster.message_bytes) for times in outputs]
    return ends


def _dropping(link: Link, times: Sequence[float], num_bytes: float) -> list[tuple[float, int]]:
    """Return when which message arrives, if the newest one that waits is sent as soon as the link is free."""
    arrivals, free, n = [], 0.0, 0
    while n < len(times):
        while n + 1 < len(times) and times[n + 1] <= free:
            n += 1
        free = max(free, times[n]) + num_bytes / link.bandwidth
        arrivals.append((free + link.latency, n))
        n += 1
    return arrivals


def _pipeline(cluster: Cluster, ranks: list[list[Rank]], num_steps: int) -> list[float]:
    num_stages, num_parts = cluster.num_stages, cluster.micro_batches
    seconds = [own / num_parts for own in cluster.without_heads()]
    crossing = cluster.raw_bytes / num_parts / cluster.link.bandwidth
    orders = [_order(j, num_stages, num_parts) for j in range(num_stages)]
    # When the wires after stage j, activations one way and gradients the other, are free.
    free = {(r, j, way): 0.0 for r in range(len(ranks)) for j in range(num_stages) for way in "FB"}
    ends = []
    for _ in range(num_steps):
        done: list[list[float]] = [[] for _ in ranks]
        for r, row in enumerate(ranks):
            arrived = {("F", 0, m): 0.0 for m in range(num_parts)}
            arrived |= {("B", num_stages - 1, m): 0.0 for m in range(num_parts)}
            at = [0] * num_stages
            waiting = [(0.0, j) for j in range(num_stages)]
            while waiting:
                _, j = heapq.heappop(waiting)
                while at[j] < len(orders[j]) and (orders[j][at[j]][0], j, orders[j][at[j]][1]) in arrived:
                    way, m = orders[j][at[j]]
                    at[j] += 1
                    end = row[j].work(arrived[way, j, m], seconds[j] / 3 * (1 if way == "F" else 2))
                    to = j + 1 if way == "F" else j - 1
                    if 0 <= to < num_stages:
                        key = (r, min(j, to), way)
                        free[key] = max(free[key], end) + crossing
                        arrived[way, to, m] = free[key] + cluster.link.latency
                        heapq.heappush(waiting, (arrived[way, to, m], to))
            done[r] = [rank.free for rank in row]
        for j in range(num_stages):
            finished = _average(cluster, j, [own[j] for own in done])
            for row in ranks:
                row[j].free = finished
        ends.append(max(rank.free for row in ranks for rank in row))
    return ends


def _order(stage: int, num_stages: int, num_parts: int) -> list[tuple[str, int]]:
    """Return the forward and backward passes of a stage under 1F1B, by micro-batch."""
    ahead = min(num_parts, num_stages - 1 - stage)
    order = [("F", m) for m in range(ahead)]
    for m in range(num_parts - ahead):
        order += [("F", ahead + m), ("B", m)]
    return order + [("B", m) for m in range(num_parts - ahead, num_parts)]


# Beside measurements


def block_times(setup: Setup, share: float) -> tuple[list[float], list[float]]:
    """Return the seconds of each block's step and of its head, as many processes as ranks being busy.

    They are measured as the method takes them: DGL's with what the Trainer adds, a pipeline's on micro-batches.
    """
    workload, parts = setup.workload, setup.micro_batches
    alone = replace(
        setup,
        kind="apart",
        ranks=1,
        micro_batches=1,
        workload=replace(workload, batch_size=workload.batch_size // parts),
    )
    blocks, heads = mean_times(alone, setup.ranks, share)
    factor: float = parts
    if setup.kind == "dgl":
        readings = in_processes(setup.ranks, 1, with_share, share, train, alone, together=False)
        factor = statistics.fmean(own.seconds for own in readings) / setup.steps / sum(blocks)
    return [factor * own for own in blocks], [factor * own for own in heads]


def check(args: argparse.Namespace) -> str:
    """Measure blocks, links and training on this machine, and simulate the same."""
    if args.cores < max(CHECKED) and os.geteuid() != 0:
        raise SystemExit(
            f"Up to {max(CHECKED)} ranks on {args.cores} cores are limited by control groups: run it with sudo."
        )
    rows = []
    for num_stages in CHECKED:
        workload = Workload(channels=args.channels, batch_size=64, blocks=num_stages).balanced()
        setups = {
            "synchronous": Setup("dgl", num_stages, 1, workload, args.steps, 3),
            "1F1B": Setup("1f1b", num_stages, 1, workload, args.steps, 3, micro_batches=4),
        }
        # With a tenth of a core to spare, a rank gets its share whatever the others on this core do.
        share = 1.0 if num_stages <= args.cores else 0.9 / math.ceil(num_stages / args.cores)
        num_bytes = 4 * workload.batch_size * args.channels * 32 * 32
        for _ in range(args.repeats):
            link = Link.measure(num_bytes)
            # Under a control group the processor takes longer for a message, too.
            cost = replace(link, cpu_sending=link.cpu_sending / share, cpu_receiving=link.cpu_receiving / share)
            for method, setup in setups.items():
                blocks, heads = block_times(setup, share)
                blocks = cost.with_overhead(blocks)
                if method == "1F1B":  # gradients go the other way
                    blocks = cost.with_overhead(blocks[::-1])[::-1]
                cluster = Cluster(
                    tuple(blocks),
                    (*heads, 0.0),
                    message_bytes=num_bytes,
                    raw_bytes=num_bytes,
                    link=link,
                    batch_size=workload.batch_size,
                    micro_batches=setup.micro_batches,
                )
                ranks = in_processes(num_stages, 1, with_share, share, train, setup)
                speed = setup.steps * workload.batch_size / max(rank.seconds for rank in ranks)
                predicted = simulate(method, cluster).samples_per_second
                rows.append((method, num_stages, speed, predicted))
                about = f"{method}, {num_stages} ranks: {speed:.1f} samples/s measured, {predicted:.1f} simulated"
                print(about, file=sys.stderr, flush=True)
    lines = []
    for method, num_stages in dict.fromkeys((row[0], row[1]) for row in rows):
        own = [(speed, predicted) for m, j, speed, predicted in rows if (m, j) == (method, num_stages)]
        columns = [
            spread([a for a, _ in own], 1),
            spread([b for _, b in own], 1),
            spread([b / a for a, b in own], 2),
        ]
        lines.append([f"{method}, {num_stages} ranks", *columns])
    return markdown_table(["", "samples/s measured", "simulated", "simulated over measured"], lines)


# Beyond this machine


def home_connections(args: argparse.Namespace) -> tuple[str, dict[str, dict[int, Outcome]]]:
    """Return a table, and outcomes by method and number of ranks."""
    rows, outcomes = [], {method: dict[int, Outcome]() for method in METHODS}
    blocks = tuple(args.seconds / args.stages for _ in range(args.stages))
    most = args.ranks // args.stages
    for replicas in (*(4**n for n in range(5) if 4**n < most), most):
        cluster = Cluster(
            blocks,
            tuple(args.head_share * seconds for seconds in blocks),
            message_bytes=args.raw_megabytes * 1e6 / args.compression,
            raw_bytes=args.raw_megabytes * 1e6,
            gradient_bytes=tuple(args.gradient_megabytes * 1e6 / args.stages for _ in blocks),
            link=Link(args.delay, args.mbit * 1e6 / 8),
            replicas=replicas,
            noise=0.1,
            slowness=0.2,
            paused=args.paused,
        )
        row = [f"{args.stages} × {replicas}"]
        for method in METHODS:
            outcome = simulate(method, cluster)
            outcomes[method][cluster.num_ranks] = outcome
            row.append(f"{outcome.samples_per_second:.1f} ({outcome.utilisation:.0%})")
        rows.append(row)
    return markdown_table(["stages × replicas", *METHODS], rows), outcomes


def draw(outcomes: dict[str, dict[int, Outcome]], path: Path) -> None:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = drawing.subplots()
    for method, own in outcomes.items():
        axes.loglog(list(own), [outcome.samples_per_second for outcome in own.values()], marker="o", label=method)
    axes.set(xlabel="ranks", ylabel="samples/s, simulated")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.legend()
    drawing.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=8, help="J")
    parser.add_argument("--ranks", type=int, default=1000, help="J × R at most")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a step of the whole network on one rank")
    parser.add_argument("--head-share", type=float, default=0.1, help="of a block's step that its head takes")
    parser.add_argument("--raw-megabytes", type=float, default=4.2, help="of an activation")
    parser.add_argument("--compression", type=float, default=16, help="how many times smaller the codec makes it")
    parser.add_argument("--gradient-megabytes", type=float, default=37, help="of the whole network")
    parser.add_argument("--mbit", type=float, default=20, help="rate of a link, Mbit/s")
    parser.add_argument("--delay", type=float, default=0.05, help="of a link, seconds")
    parser.add_argument("--paused", type=float, default=0.01, help="share of the time for which a rank is paused")
    parser.add_argument("--check", action="store_true", help="simulate this machine, and measure it")
    parser.add_argument("--channels", type=int, default=64, help="of --check")
    parser.add_argument("--steps", type=int, default=10, help="of --check")
    parser.add_argument("--repeats", type=int, default=3, help="of --check")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="of this machine, for --check")
    parser.add_argument("--figure", type=Path, help="file for the figure")
    parser.add_argument("--output", type=Path, help="file to write the table to, besides printing it")
    args = parser.parse_args()
    if args.check:
        publish(check(args), args.output)
        return
    table, outcomes = home_connections(args)
    text = (
        "Samples/s of all ranks, and the share of the time that they compute. "
        f"{args.stages} stages, {args.seconds:g} s a step of the whole network, {args.raw_megabytes:g} MB of "
        f"activations, {args.compression:g} times smaller in DGL, {args.gradient_megabytes:g} MB of gradients; links "
        f"of {args.mbit:g} Mbit/s and {1e3 * args.delay:g} ms; ranks pause {args.paused:.0%} of the time, 30 s each."
    )
    publish(f"{text}\n\n{table}", args.output)
    if args.figure:
        draw(outcomes, args.figure)


if __name__ == "__main__":
    main()
