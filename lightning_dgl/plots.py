"""Plots of what each block has learned, from the log that Lightning's CSVLogger leaves."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_blocks(log_dir: str | Path, metric: str = "val/acc") -> Figure:
    """Draw a metric of every block over the epochs, and against depth after the first, the best and the last epoch.

    Args:
        log_dir: a folder with the ``metrics.csv`` of Lightning's CSVLogger, such as ``logger.log_dir``.
        metric: its name without ``_block{j}``; that of the ensemble is drawn beside it, if there is one.

    Returns:
        A figure of matplotlib, which draws without a display: ``plot_blocks(log_dir).savefig("blocks.png")``.

    Raises:
        FileNotFoundError: if there is no ``metrics.csv``.
        ValueError: if it has no such metric.
        ImportError: without matplotlib.
    """
    file = Path(log_dir) / "metrics.csv"
    if not file.exists():
        raise FileNotFoundError(f"There is no {file}. Train with Trainer(logger=CSVLogger(...)) and pass its log_dir.")
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        names, rows = list(reader.fieldnames or ()), list(reader)
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if value and row.get("epoch") and re.fullmatch(rf"{re.escape(metric)}_(block\d+|ensemble)", name):
                curves.setdefault(name.removeprefix(f"{metric}_"), {})[int(row["epoch"])] = float(value)
    blocks = {int(name[5:]): curve for name, curve in curves.items() if name != "ensemble"}
    if not blocks:
        found = ", ".join(sorted({match[1] for name in names if (match := re.match(r"(.*)_block\d+$", name))}))
        raise ValueError(f"{file} has no {metric}_block0, ... It has those of {found or 'no metric of blocks'}.")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("plot_blocks draws with matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    over_epochs, over_depth = figure.subplots(1, 2)
    for j, curve in sorted(blocks.items()):
        over_epochs.plot([epoch + 1 for epoch in curve], list(curve.values()), marker=".", label=f"block {j}")
    if "ensemble" in curves and len(blocks) > 1:
        ensemble = curves["ensemble"]
        over_epochs.plot([epoch + 1 for epoch in ensemble], list(ensemble.values()), "k--", label="ensemble")
    over_epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_epochs.set(xlabel="epoch", ylabel=metric, title="Over the epochs")
    for label, epoch in _epochs_to_show(blocks[max(blocks)]).items():
        at_epoch = {j: curve[epoch] for j, curve in sorted(blocks.items()) if epoch in curve}
        over_depth.plot(list(at_epoch), list(at_epoch.values()), marker="o", label=f"{label}, epoch {epoch + 1}")
    over_depth.set(xlabel="block", ylabel=metric, title="Against depth", xticks=sorted(blocks))
    for axes in (over_epochs, over_depth):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _epochs_to_show(last_block: Mapping[int, float]) -> dict[str, int]:
    chosen = {"first": min(last_block), "best": max(last_block, key=last_block.__getitem__), "last": max(last_block)}
    return {label: epoch for label, epoch in chosen.items() if label == "last" or epoch != chosen["last"]}
