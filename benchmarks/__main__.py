"""Run the benchmarks that this machine can run, one after another, and write one report.

    python -m benchmarks                          # one to two hours on two cores
    python -m benchmarks overhead --repeats 1     # some of them, and only once
    python -m benchmarks --gpu                    # on one GPU, too

Each also runs alone, with more options: ``python -m benchmarks.NAME --help``. The limited link needs
root.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import publish

TITLES = {
    "single_device": "One device: throughput and memory",
    "overhead": "What the Trainer costs",
    "parallel": "Blocks on two ranks, against pipelines and DDP",
    "scaling": "How it scales with the number of stages",
    "straggler": "A straggler",
    "quantizer": "What codecs save and cost",
    "slow_link": "A limited link",
    "simulation": "More ranks than there are here, simulated",
}

# What else runs on a GPU. The small network is bound by launching kernels, the others by computing.
ON_GPU = ("--device", "cuda", "--precision", "bf16-mixed", "--largest", "--steps", "30", "--warm-up", "10")
GPU_RUNS = {
    "six_layers_128": ("--networks", "six_layers", "--batch-size", "128"),
    "six_layers_512": ("--networks", "six_layers", "--batch-size", "512"),
    "imagenet_64": ("--networks", "resnet50", "vgg19_bn", "--batch-size", "64"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(TITLES)}; by default all")
    parser.add_argument("--gpu", action="store_true", help="run single_device on a GPU, too")
    parser.add_argument("--repeats", type=int, help="of each; by default what each has")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"), help="folder for report and figures")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in TITLES]
    if unknown:
        parser.error(f"argument name: must be of {', '.join(TITLES)}, got {unknown[0]!r}")
    args.output.mkdir(parents=True, exist_ok=True)
    repeats = [] if args.repeats is None else ["--repeats", str(args.repeats)]

    # Title, benchmark, its options, and what its files are called.
    runs: list[tuple[str, str, tuple[str, ...], str]] = [
        (TITLES[name], name, (), name) for name in args.names or TITLES
    ]
    if args.gpu:
        runs += [(f"On a GPU: {n}", "single_device", (*ON_GPU, *options), n) for n, options in GPU_RUNS.items()]

    parts, has_failed = ["# Benchmarks"], False
    for title, benchmark, options, name in runs:
        parts.append(f"## {title}")
        if benchmark == "slow_link" and os.geteuid() != 0:
            parts.append("Left out: this one needs root.")
            continue
        table, figure = args.output / f"{name}.md", args.output / f"{name}.png"
        drawing = ["--figure", str(figure)] if benchmark == "single_device" else []
        command = ["-m", f"benchmarks.{benchmark}", *options, *repeats, *drawing]
        began = time.monotonic()
        status = subprocess.run(
            [sys.executable, *command, "--output", str(table)], stdout=subprocess.DEVNULL
        ).returncode
        parts.append(f"`python {' '.join(command)}`, {(time.monotonic() - began) / 60:.0f} minutes")
        if status != 0:
            parts.append(f"**Failed** with exit status {status}.")
            has_failed = True
            continue
        parts.append(table.read_text())
        if drawing:
            parts.append(f"![{title}]({figure.name})")
    publish("\n\n".join(parts), args.output / "report.md")
    if has_failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
