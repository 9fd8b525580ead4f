"""examples/quickstart.py prints and saves what it should, and answers bad arguments in one line."""

from __future__ import annotations

import logging
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Run for one epoch in a fresh process and an empty folder."""
    folder = tmp_path_factory.mktemp("quickstart")
    command, environment = [sys.executable, str(SCRIPT), "--epochs", "1"], {**os.environ, "COLUMNS": "80"}
    return folder, subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300
    )


def test_prints_the_blocks_and_every_accuracy(ran: tuple[Path, Result]) -> None:
    _, result = ran
    assert result.returncode == 0, result.stderr
    summary, accuracies = result.stdout.split("Validation accuracy", maxsplit=1)
    assert summary.count("copied") == 3
    lines = [line for line in accuracies.splitlines() if "%" in line]
    scored = ["block 0", "block 1", "block 2", "block 3", "ensemble", "backpropagation"]
    assert len(lines) == len(scored)
    assert all(name in line for name, line in zip(scored, lines, strict=True))


def test_saves_the_plot_and_names_it(ran: tuple[Path, Result]) -> None:
    folder, result = ran
    assert result.stdout.splitlines()[-1] == "Curves saved to quickstart_accuracy.png"
    assert [file.name for file in folder.iterdir()] == ["quickstart_accuracy.png"]
    assert (folder / "quickstart_accuracy.png").read_bytes().startswith(PNG_SIGNATURE)


def test_is_quiet(ran: tuple[Path, Result]) -> None:
    assert ran[1].stderr == ""


Here = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Here]:
    """Run the script in this process; return its exit status (None at its end), and what it wrote: stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    level, threads = logging.getLogger("lightning.pytorch").level, torch.get_num_threads()

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        status: Any = None
        with warnings.catch_warnings():
            try:
                runpy.run_path(str(SCRIPT), run_name="__main__")
            except SystemExit as end:
                status = end.code
        return status, *capsys.readouterr()

    yield run
    logging.getLogger("lightning.pytorch").setLevel(level)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_same_seed_same_output(ran: tuple[Path, Result], run_here: Here) -> None:
    status, printed, _ = run_here("--epochs", "1")
    assert (status, printed) == (None, ran[1].stdout)


def test_help(run_here: Here) -> None:
    status, printed, complaint = run_here("--help")
    assert (status, complaint) == (0, "")
    for option in ("--epochs", "--blocks", "--head", "--batch-size", "--seed", "--plot"):
        assert option in printed
    assert "(default: 10)" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "0"), "argument --epochs: must be a whole number from 1"),
        (("--head", "huge"), "head must be 'linear', 'mlp', 'mlp_sr', 'cnn', 'augmented'"),
        (("--blocks", "100"), "num_blocks=100 is more than DigitNet allows"),
        (("--plot", "missing/curves.png"), "argument --plot: "),
    ],
)
def test_bad_arguments_end_in_one_line(
    arguments: tuple[str, str], message: str, run_here: Here, tmp_path: Path
) -> None:
    status, printed, complaint = run_here(*arguments)
    assert (status, printed) == (2, "")
    assert complaint.count("\n") == 1, complaint
    assert f"error: {message}" in complaint
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_says_what_to_install(run_here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message, printed, _ = run_here()
    assert printed == ""
    assert message.count("\n") == 0
    assert 'pip install "lightning-dgl[examples]"' in message
