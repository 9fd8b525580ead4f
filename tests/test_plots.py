"""The plot of what each block has learned."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_dgl import plot_blocks

LOG = """epoch,step,val/acc_block0,val/acc_block1,val/acc_ensemble,train/loss_block0
0,4,0.2,0.3,0.31,
0,3,,,,1.5
1,9,0.4,0.6,0.61,
2,14,0.5,0.55,0.62,
"""


def test_curves_over_epochs_and_depth(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(LOG)
    figure = plot_blocks(tmp_path)
    over_epochs, over_depth = (
        {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for axes in figure.axes
    )
    assert over_epochs == {
        "block 0": ([1, 2, 3], [0.2, 0.4, 0.5]),
        "block 1": ([1, 2, 3], [0.3, 0.6, 0.55]),
        "ensemble": ([1, 2, 3], [0.31, 0.61, 0.62]),
    }
    assert over_depth == {
        "first, epoch 1": ([0, 1], [0.2, 0.3]),
        "best, epoch 2": ([0, 1], [0.4, 0.6]),
        "last, epoch 3": ([0, 1], [0.5, 0.55]),
    }
    figure.savefig(tmp_path / "blocks.png")
    assert (tmp_path / "blocks.png").stat().st_size > 1000


def test_another_metric(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(LOG)
    (line,) = plot_blocks(tmp_path, "train/loss").axes[0].lines
    assert list(line.get_ydata()) == [1.5]


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no .*metrics.csv. Train with Trainer\(logger=CSVLogger"):
        plot_blocks(tmp_path)


@pytest.mark.parametrize(("log", "found"), [(LOG, "train/loss, val/acc"), ("epoch,step\n0,1\n", "no metric of blocks")])
def test_no_such_metric(log: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(log)
    with pytest.raises(ValueError, match=f"has no val/f1_block0, ... It has those of {found}."):
        plot_blocks(tmp_path, "val/f1")


def test_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("")
    with pytest.raises(ValueError, match="It has those of no metric of blocks"):
        plot_blocks(tmp_path)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.csv").write_text(LOG)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_blocks(tmp_path)
