"""Run one of the paper's comparisons: a grid of runs of cifar10.py, a table and a figure.

    pip install "lightning-dgl[examples]"
    python examples/recipes/compare.py codecs                         # the protocol of the paper: hours on a GPU
    python examples/recipes/compare.py codecs --protocol reduced      # a smaller one, for a CPU: a minute or two a run
    python examples/recipes/compare.py codecs --protocol reduced --data digits --seeds 0     # a look at it, in minutes

Results go to a CSV file as they come, each with the arguments of cifar10.py that repeat it. A run that is there already
is not run again: to go on after an interruption, or to add seeds, give the command again. Several processes may fill
one file at once, with other seeds each.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

try:
    import cifar10
    from matplotlib.figure import Figure
    from recipe import be_quiet
except ImportError as error:
    sys.exit(f'{error}. This example needs matplotlib: pip install "lightning-dgl[examples]"')


@dataclass(frozen=True)
class Experiment:
    """A grid of runs: a line in the figure for each of ``lines``, a point on it for each of ``points``.

    Attributes:
        title: what is compared.
        common: arguments of all runs.
        reduced: further arguments with ``--protocol reduced``.
        lines: arguments of each line, by its name.
        points: arguments of each point, by its name; without any, a line shows all blocks.
        axis: what the points differ in.
        skip: (line, point) that make no sense.
    """

    title: str
    common: str
    reduced: str
    lines: dict[str, str]
    points: dict[str, str] = field(default_factory=dict)
    axis: str = "block"
    skip: tuple[tuple[str, str], ...] = ()

    def runs(self) -> dict[tuple[str, str], str]:
        """Return the arguments of each run, without the common ones, by line and point."""
        return {
            (line, point): f"{of_line} {of_point}"
            for line, of_line in self.lines.items()
            for point, of_point in (self.points or {"": ""}).items()
            if (line, point) not in self.skip
        }


LESS_DATA = "--images 10000 --epochs 8 --drops 3 6"

EXPERIMENTS = {
    "heads": Experiment(
        "Which auxiliary head?",
        common="--network six_layers --method dgl",
        reduced=f"{LESS_DATA} --channels 16",
        lines={head: f"--head {head}" for head in ("linear", "mlp", "mlp_sr", "cnn")},
    ),
    "sequential": Experiment(
        "All blocks at once, or one after another?",
        common="--network four_layers --head mlp_sr",
        reduced=f"{LESS_DATA} --channels 16",
        lines={
            "decoupled": "--method dgl",
            "sequential": "--method sequential",
            "backpropagation": "--method backprop",
        },
    ),
    "blocks": Experiment(
        "Into how many blocks?",
        common="--network resnet110 --head mlp_sr --epochs 300 --lr 0.01 --drops 150 225 --drop-to 0.1",
        reduced="--network resnet20 --images 5000 --epochs 8 --lr 0.1 --drops 4 6",
        lines={"DGL": "--method dgl"},
        points={str(number): f"--blocks {number}" for number in (1, 2, 4, 8)},
        axis="number of blocks (1: backpropagation)",
    ),
    "dni": Experiment(
        "Local losses, or synthetic gradients?",
        common="--network dni_network --optimizer adam --lr 3e-5 --drops --batch-size 256 --epochs 1500",
        reduced="--images 10000 --channels 16 --epochs 15 --lr 1e-3",
        lines={
            "backpropagation": "--method backprop",
            "DGL": "--method dgl --head cnn",
            "cDNI": "--method cdni",
            "DNI": "--method dni",
        },
    ),
    "delays": Experiment(
        "How slow may a block be?",
        common="--network six_layers_late_pools --head mlp",
        reduced=f"{LESS_DATA} --channels 8",
        lines={
            "synchronous": "--method dgl",
            **{f"M = {size}": f"--method async --buffer-size {size}" for size in (1, 5, 30)},
        },
        points={slowdown: f"--slowdown {slowdown}" for slowdown in ("1.0", "1.2", "1.5", "2.0")},
        axis="slow-down S of block 2",
        skip=tuple(("synchronous", slowdown) for slowdown in ("1.2", "1.5", "2.0")),
    ),
    "codecs": Experiment(
        "What does compression cost?",
        common="--network six_layers_late_pools --head mlp --update-bn",
        reduced="--images 5000 --epochs 8 --drops 3 6 --channels 16",
        lines={"synchronous": "--method dgl", "asynchronous": "--method async"},
        points={
            "raw": "--codec raw",
            "half": "--codec half",
            "256×4": "--codec 256x4",
            "2×256×8": "--codec 256x8x2",
            "256×8": "--codec 256x8",
            "256×16": "--codec 256x16",
        },
        axis="codec (codebooks × codes × dimension)",
        skip=(("asynchronous", "half"),),
    ),
}

COLUMNS = ("arguments", "blocks", "ensemble", "compression", "head_share", "seconds")


def read(results: Path) -> dict[str, dict[str, str]]:
    """Return the row of each run that is finished, by its arguments."""
    if not results.exists():
        return {}
    return {row["arguments"]: row for row in csv.DictReader(results.read_text().splitlines())}


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


Outcomes = dict[str, dict[str, list[float]]]
"""Accuracies of all seeds in percent, by line, and by point (then of the last block) or block."""


def accuracies(experiment: Experiment, of_run: dict[tuple[str, str], list[dict[str, str]]]) -> Outcomes:
    values: Outcomes = {line: {} for line in experiment.lines}
    of_blocks = {names: [[float(a) for a in row["blocks"].split()] for row in rows] for names, rows in of_run.items()}
    depth = max(len(blocks) for seeds in of_blocks.values() for blocks in seeds)
    for (line, point), seeds in of_blocks.items():
        for blocks in seeds:
            first = depth - len(blocks)  # what is trained as one block stands beside the others' last one
            by_block = {str(first + j): accuracy for j, accuracy in enumerate(blocks)}
            for name, accuracy in ({point: blocks[-1]} if point else by_block).items():
                values[line].setdefault(name, []).append(accuracy)
    return values


def columns(values: Outcomes) -> list[str]:
    names = list(dict.fromkeys(name for own in values.values() for name in own))
    return sorted(names, key=float) if are_numbers(names) else names


def are_numbers(names: list[str]) -> bool:
    return all(name.replace(".", "").isdecimal() for name in names)


def table(values: Outcomes, further: dict[str, dict[str, str]]) -> str:
    """Return a Markdown table: mean ± standard deviation over the seeds, and ``further`` columns, by title and line."""
    names = columns(values)
    rows = [["", *names, *further], ["---"] * (len(names) + len(further) + 1)]
    for line, own in values.items():
        cells = [mean_and_spread(own[name]) if name in own else "" for name in names]
        rows.append([line, *cells, *(of_line[line] for of_line in further.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def figure(experiment: Experiment, values: Outcomes) -> Figure:
    drawing = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = drawing.subplots()
    names = columns(values)
    places = {name: float(name) if are_numbers(names) else i for i, name in enumerate(names)}
    for line, own in values.items():
        means = [statistics.fmean(accuracy) for accuracy in own.values()]
        spread = [statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0 for accuracy in own.values()]
        if len(own) == 1 and len(names) > 1:
            axes.axhline(means[0], color="k", linestyle="--", label=line)
        else:
            axes.errorbar([places[name] for name in own], means, spread, marker="o", capsize=3, label=line)
    axes.set(title=experiment.title, xlabel=experiment.axis, ylabel="test accuracy (%)")
    axes.set_xticks(list(places.values()), names)
    axes.grid(alpha=0.3)
    axes.legend()
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--protocol", choices=("full", "reduced"), default="full", help="the paper's, or a smaller one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="cifar10", help="cifar10, digits, or a folder with train/ and test/")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the CSV file and the figure")
    parser.epilog = "Further arguments, such as --accelerator gpu, go to cifar10.py in all runs."
    args, further = parser.parse_known_args()
    be_quiet()

    experiment = EXPERIMENTS[args.experiment]
    reduced = experiment.reduced if args.protocol == "reduced" else ""
    common = shlex.split(f"{experiment.common} {reduced}") + further
    runs = {
        (*names, seed): shlex.join(["--data", args.data, *common, *shlex.split(own), "--seed", str(seed)])
        for seed in args.seeds
        for names, own in experiment.runs().items()
    }
    args.output.mkdir(parents=True, exist_ok=True)
    results = args.output / f"{args.experiment}.csv"
    if not results.exists():
        results.write_text(",".join(COLUMNS) + "\n")
    done = read(results)
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*shown) as progress:
        task = progress.add_task("runs", total=len(runs), completed=sum(run in done for run in runs.values()))
        for names, arguments in runs.items():
            if arguments in done:
                continue
            own = cifar10.parse([*shlex.split(arguments), "--cache", str(args.output / "data")])
            progress.update(task, description=", ".join(map(str, filter(None, names))))
            began = time.monotonic()
            try:
                outcome = cifar10.train(own)
            except (FileNotFoundError, ValueError) as error:
                sys.exit(str(error))
            row = [
                arguments,
                " ".join(f"{accuracy:.2f}" for accuracy in outcome["accuracies"]),
                f"{outcome['ensemble']:.2f}",
                f"{outcome['compression']:.2f}",
                f"{outcome['head_share']:.4f}",
                f"{time.monotonic() - began:.0f}",
            ]
            with results.open("a", newline="") as file:
                csv.writer(file).writerow(row)
            progress.advance(task)
    done = read(results)
    of_run: dict[tuple[str, str], list[dict[str, str]]] = {}
    for (line, point, _), arguments in runs.items():
        of_run.setdefault((line, point), []).append(done[arguments])
    values = accuracies(experiment, of_run)
    figure(experiment, values).savefig(results.with_suffix(".png"), dpi=150)
    heads = {}
    if not experiment.points:
        shares = {line: max(float(row["head_share"]) for row in of_run[line, ""]) for line in experiment.lines}
        heads["FLOPs of heads"] = {line: f"{share:.1%}" for line, share in shares.items()}
    print(table(values, heads))
    print(f"Results: {results}, figure: {results.with_suffix('.png')}")


if __name__ == "__main__":
    main()
