"""Measure what a slow block costs the one before it: two ranks, the second slowed down, synchronous and asynchronous.

    python -m benchmarks.straggler --output straggler.md

Two blocks of equal cost, one on each rank, one thread a rank, images of 32×32 in memory. The second rank is slowed down
by resting after each step, for as long as makes the step ``--slowdown`` times as long. Every run has fresh processes,
and repeats are interleaved. The first rank's samples per second are taken from its own steps: from the end of the last
warm-up step to the end of its last. It waits for the other rank at the end of the epoch in any case, which is not
counted: over whole epochs the slowest rank sets the pace, and what asynchrony takes off are stalls within an epoch.
"""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from benchmarks.common import in_processes, markdown_table, publish, quiet_trainer, spread
from benchmarks.parallel import Clock, Setup, how_long, options, workload_of
from lightning_dgl import Asynchronous, DGLStrategy, Synchronous

METHODS = {
    "synchronous, not slowed": (Synchronous, False),
    "synchronous": (Synchronous, True),
    "asynchronous, not slowed": (Asynchronous, False),
    "asynchronous": (Asynchronous, True),
}


class Rests(L.Callback):
    """Makes the steps of one rank last longer, without using its processor."""

    def __init__(self, rank: int, slowdown: float) -> None:
        self._rank, self._slowdown = rank, slowdown
        self._began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == self._rank:
            time.sleep((self._slowdown - 1) * (time.perf_counter() - self._began))


def train(rank: int, setup: Setup, method: str, slowdown: float) -> tuple[float, int, int]:
    """Return samples per second of this rank, its number of steps, and how many of its outputs were dropped."""
    schedule, is_slowed = METHODS[method]
    clock, drops = Clock(setup), Drops()
    trainer = quiet_trainer(
        devices=2,
        strategy=DGLStrategy(schedule(), timeout=300),
        accelerator="cpu",
        callbacks=[clock, drops, Rests(1, slowdown if is_slowed else 1.0)],
    )
    trainer.fit(setup.workload.make_module(), setup.workload.images(setup.num_steps))
    return setup.steps * setup.workload.batch_size / clock.total().seconds, trainer.global_step, drops.count


class Drops(L.Callback):
    count = 0

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.count = trainer.strategy.run.outgoing.num_dropped  # type: ignore[attr-defined]


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(batch_size=32, steps=24, warm_up=8, repeats=5)
    parser.add_argument("--slowdown", type=float, default=4.0, help="of the second rank")
    args = parser.parse_args()
    setup = Setup("dgl", 2, 1, workload_of(args), **how_long(args))
    speeds: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    drops: dict[str, list[int]] = {method: [] for method in METHODS}
    for repeat in range(args.repeats):
        for method in METHODS:
            ranks = in_processes(2, 1, train, setup, method, args.slowdown)
            assert all(steps == args.warm_up + args.steps for _, steps, _ in ranks)
            speeds[method].append([speed for speed, _, _ in ranks])
            drops[method].append(ranks[0][2])
            print(f"repeat {repeat + 1} of {args.repeats}, {method}: {speeds[method][-1][0]:.1f} samples/s", flush=True)
    reference = [first for first, _ in speeds["synchronous, not slowed"]]
    rows = [
        [
            method,
            spread([first for first, _ in runs], 1),
            spread([first / other for (first, _), other in zip(runs, reference, strict=True)], 2),
            spread([second for _, second in runs], 1),
            spread([float(count) for count in drops[method]], 0),
        ]
        for method, runs in speeds.items()
    ]
    columns = ["schedule", "first rank, samples/s", "over not slowed", "second rank, samples/s", "drops"]
    conditions = (
        f"Two ranks, {setup.workload}, the second slowed down "
        f"{args.slowdown:g}-fold; {args.steps} steps after {args.warm_up}, {args.repeats} interleaved repeats: median "
        "(min–max)."
    )
    publish(f"{conditions}\n\n{markdown_table(columns, rows)}", args.output)


if __name__ == "__main__":
    main()
