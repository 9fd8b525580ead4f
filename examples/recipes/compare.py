"""Run one comparison: a grid of runs of cifar10.py, a table and a figure.

    pip install "lightning-dgl[examples]"
    python examples/recipes/compare.py resnet20                       # half an hour a run on one CPU core
    python examples/recipes/compare.py resnet20 --data digits --epochs 1 --seeds 0 --results look.csv     # a look at it

Every run becomes a row of a CSV file, with the arguments of cifar10.py that repeat it. A run that is there already is
not run again, and one that was interrupted goes on after its last epoch (an asynchronous one begins anew). To go on
after an interruption, to add seeds, or to print the tables of docs/results.md from the rows that belong to this
repository, give the command again. Several processes may fill one file at once, with other seeds each.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

try:
    import cifar10
    from changes import CHANGES
    from matplotlib.figure import Figure
    from recipe import be_quiet
except ImportError as error:
    sys.exit(f'{error}. This example needs matplotlib: pip install "lightning-dgl[examples]"')


RESULTS = Path(__file__).with_name("results.csv")


@dataclass(frozen=True)
class Experiment:
    """A grid of runs: a line in the figure for each of ``lines``, a point on it for each of ``points``.

    Attributes:
        title: what is compared.
        common: arguments of all runs.
        lines: arguments of each line, by its name.
        points: arguments of each point, by its name; without any, a line shows all blocks.
        axis: what the points differ in.
        skip: (line, point) that make no sense.
    """

    title: str
    common: str
    lines: dict[str, str]
    points: dict[str, str] = field(default_factory=dict)
    axis: str = "block"
    skip: tuple[tuple[str, str], ...] = ()

    def runs(self) -> dict[tuple[str, str], str]:
        """Return the arguments of each run, without the common ones, by line and point."""
        return {
            (line, point): f"{of_point} {of_line}"
            for line, of_line in self.lines.items()
            for point, of_point in (self.points or {"": ""}).items()
            if (line, point) not in self.skip
        }


FAST = "--precision bf16-mixed --channels-last"
WITH_CODES = "--compile-codec --update-bn"  # the same codes faster, and BatchNorm as docs/codecs.md advises
HEADS = {
    "backpropagation": "--method backprop",
    "MLP-SR": "--blocks 4 --head mlp_sr",
    "augmented": "--blocks 4 --head augmented",
}

EXPERIMENTS = {
    "resnet20": Experiment(
        "ResNet-20 in four blocks",
        common="--recipe modern --network resnet20",
        lines=HEADS,
    ),
    "resnet20_heads": Experiment(
        "ResNet-20 in four blocks, a short training",
        common="--recipe modern --network resnet20 --epochs 8",
        lines=HEADS | {name: f"--blocks 4 --head {name.lower()}" for name in ("MLP", "CNN", "linear")},
    ),
    "changes": Experiment(
        "Small changes of the recipe, a short training",
        common="--recipe modern --network resnet20 --epochs 8",
        lines={
            "augmented": HEADS["augmented"],
            **{change.replace("-", " "): f"{HEADS['augmented']} --change {change}" for change in CHANGES},
        },
    ),
    "resnet20_blocks": Experiment(
        "ResNet-20: into how many blocks?",
        common="--recipe modern --network resnet20",
        lines={
            "backpropagation": "--method backprop",
            **{name: f"--head {head}" for name, head in (("MLP-SR", "mlp_sr"), ("augmented", "augmented"))},
        },
        points={"1": "", **{str(number): f"--blocks {number}" for number in (2, 4, 9)}},
        axis="number of blocks (9: every residual unit)",
        skip=(
            *(("backpropagation", number) for number in ("2", "4", "9")),
            *((line, "1") for line in ("MLP-SR", "augmented")),
        ),
    ),
    "vgg11": Experiment("VGG-11 in four blocks", common="--recipe modern --network vgg11_bn", lines=HEADS),
    "four_layers": Experiment(
        "All blocks at once, or one after another?",
        common=f"--network four_layers {FAST}",
        lines={
            "at once": "",
            "one after another": "--method sequential",
            "backpropagation": "--method backprop",
            "at once, augmented": "--head augmented",
        },
    ),
    "four_layers_async": Experiment(
        "Slow blocks and codecs",
        common="--recipe modern --network four_layers --epochs 20",
        lines={
            "synchronous": "",
            **{f"S = {slowdown}": f"--method async --slowdown {slowdown}" for slowdown in ("1.0", "1.2", "1.5")},
            **{
                f"{schedule}, 256 codes of {dimension}": f"{arguments}--codec 256x{dimension} {WITH_CODES}"
                for schedule, arguments in (("synchronous", ""), ("S = 1.0", "--method async --slowdown 1.0 "))
                for dimension in (4, 8)
            },
        },
    ),
    "heads": Experiment(
        "Which auxiliary head?",
        common="--network six_layers --method dgl",
        lines={head: f"--head {head}" for head in ("linear", "mlp", "mlp_sr", "cnn")},
    ),
    "blocks": Experiment(
        "Into how many blocks?",
        common="--network resnet110 --head mlp_sr --epochs 300 --lr 0.01 --drops 150 225 --drop-to 0.1",
        lines={"DGL": "--method dgl"},
        points={str(number): f"--blocks {number}" for number in (1, 2, 4, 8)},
        axis="number of blocks (1: backpropagation)",
    ),
    "dni": Experiment(
        "Local losses, or synthetic gradients?",
        common="--network dni_network --optimizer adam --lr 3e-5 --drops --batch-size 256 --epochs 1500",
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

COLUMNS = (
    *("data", "arguments", "blocks", "ensemble", "compression"),
    *("head_flops", "head_parameters", "cpu_seconds"),
)


def read(results: Path, data: str) -> dict[str, dict[str, str]]:
    """Return the row of each run on ``data`` that is finished, by its arguments."""
    if not results.exists():
        return {}
    rows = csv.DictReader(results.read_text().splitlines())
    return {row["arguments"]: row for row in rows if row["data"] == data}


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


Outcomes = dict[str, dict[str, list[float]]]
"""Accuracies of all seeds in percent, by line, and by point (then of the last block) or block."""


def accuracies(experiment: Experiment, of_run: dict[tuple[str, str], list[dict[str, str]]]) -> Outcomes:
    values: Outcomes = {line: {} for line in experiment.lines if any(line == run[0] for run in of_run)}
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


def make_row(arguments: str, data: str, cache: Path) -> list[str]:
    """Train as ``arguments`` say, from where an earlier call was interrupted; return the row of this run."""
    name = hashlib.sha256(f"{data} {arguments}".encode()).hexdigest()[:12]
    checkpoint = cache / "unfinished" / f"{name}.ckpt"
    args = cifar10.parse(["--data", data, "--cache", str(cache), *shlex.split(arguments)])
    # Replay buffers are not saved, so an asynchronous run would not go on as if it had not been interrupted.
    outcome = cifar10.train(args, checkpoint=None if args.method == "async" else checkpoint)
    checkpoint.unlink(missing_ok=True)
    return [
        Path(data).name,
        arguments,
        " ".join(f"{accuracy:.2f}" for accuracy in outcome["accuracies"]),
        f"{outcome['ensemble']:.2f}",
        f"{outcome['compression']:.2f}",
        f"{outcome['head_flops']:.4f}",
        f"{outcome['head_parameters']:.4f}",
        f"{outcome['cpu_seconds']:.0f}",
    ]


def further_columns(of_run: dict[tuple[str, str], list[dict[str, str]]]) -> dict[str, dict[str, str]]:
    """Return, by title and line, what else is told of lines without points."""
    first = {line: rows[0] for (line, _), rows in of_run.items()}
    seconds = {line: statistics.fmean(float(row["cpu_seconds"]) for row in rows) for (line, _), rows in of_run.items()}
    columns = {
        "FLOPs of heads": {line: f"{float(row['head_flops']):.1%}" for line, row in first.items()},
        "their parameters": {line: f"{float(row['head_parameters']):.1%}" for line, row in first.items()},
    }
    if "backpropagation" in seconds:
        times = {line: f"{own / seconds['backpropagation']:.2f}" for line, own in seconds.items()}
        columns["CPU time over backpropagation"] = times
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--lines", nargs="+", help="only these lines of the table; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="cifar10", help="cifar10, digits, or a folder with train/ and test/")
    parser.add_argument("--cache", type=Path, default=Path("data"), help="folder for what is downloaded and decoded")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV file; a figure lies beside it")
    parser.add_argument("--show", action="store_true", help="run nothing, show what is finished")
    parser.epilog = "Further arguments, such as --accelerator gpu, go to cifar10.py in all runs."
    args, further = parser.parse_known_args()
    experiment = EXPERIMENTS[args.experiment]
    if unknown := set(args.lines or ()) - set(experiment.lines):
        parser.error(
            f"argument --lines: no {', '.join(map(repr, unknown))} in {', '.join(map(repr, experiment.lines))}"
        )
    be_quiet()

    common = [*shlex.split(experiment.common), *further]
    runs = {
        (*names, seed): shlex.join([*common, *shlex.split(own), "--seed", str(seed)])
        for seed in args.seeds
        for names, own in experiment.runs().items()
        if not args.lines or names[0] in args.lines
    }
    data = Path(args.data).name
    if not args.results.exists():
        args.results.write_text(",".join(COLUMNS) + "\n")
    done = read(args.results, data)
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*shown, disable=args.show) as progress:
        task = progress.add_task("runs", total=len(runs), completed=sum(run in done for run in runs.values()))
        for names, arguments in () if args.show else runs.items():
            if arguments in done:
                continue
            progress.update(task, description=", ".join(map(str, filter(None, names))))
            try:
                row = make_row(arguments, args.data, args.cache)
            except (FileNotFoundError, ValueError) as error:
                sys.exit(str(error))
            with args.results.open("a", newline="") as file:
                csv.writer(file).writerow(row)
            progress.advance(task)
    done = read(args.results, data)
    of_run: dict[tuple[str, str], list[dict[str, str]]] = {}
    for (line, point, _), arguments in runs.items():
        if arguments in done:
            of_run.setdefault((line, point), []).append(done[arguments])
    if not of_run:
        sys.exit(f"{args.results} has none of these runs on {data}: give the command without --show.")
    values = accuracies(experiment, of_run)
    drawn = args.results.with_name(f"{args.experiment}.png")
    figure(experiment, values).savefig(drawn, dpi=150)
    print(table(values, {} if experiment.points else further_columns(of_run)))
    print(f"Results: {args.results}, figure: {drawn}")


if __name__ == "__main__":
    main()
