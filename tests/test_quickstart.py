"""examples/quickstart.py as its user runs it: what it prints and saves, and what it says to bad arguments."""

from __future__ import annotations

import logging
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Result = subprocess.CompletedProcess[str]


def run(folder: Path, *arguments: str) -> Result:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Result]]:
    """Two runs with the same arguments, each in its own folder."""
    folders = [tmp_path_factory.mktemp("quickstart") for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        return list(zip(folders, pool.map(lambda folder: run(folder, "--epochs", "1"), folders), strict=True))


def test_prints_the_blocks_and_every_accuracy(runs: list[tuple[Path, Result]]) -> None:
    _, result = runs[0]
    assert result.returncode == 0, result.stderr
    summary, accuracies = result.stdout.split("Validation accuracy", maxsplit=1)
    assert summary.count("MLPSRHead") == 3
    lines = [line for line in accuracies.splitlines() if "%" in line]
    scored = ["block 0", "block 1", "block 2", "block 3", "ensemble", "backpropagation"]
    assert len(lines) == len(scored)
    assert all(name in line for name, line in zip(scored, lines, strict=True))


def test_saves_the_plot_and_names_it(runs: list[tuple[Path, Result]]) -> None:
    folder, result = runs[0]
    assert result.stdout.splitlines()[-1] == "Curves saved to quickstart_accuracy.png"
    assert [file.name for file in folder.iterdir()] == ["quickstart_accuracy.png"]
    assert (folder / "quickstart_accuracy.png").read_bytes().startswith(PNG_SIGNATURE)


def test_is_quiet(runs: list[tuple[Path, Result]]) -> None:
    assert runs[0][1].stderr == ""


def test_same_seed_same_output(runs: list[tuple[Path, Result]]) -> None:
    assert runs[0][1].stdout == runs[1][1].stdout


Failing = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Failing]:
    """The script in this process, where it ends early: what it exits with, and what it prints to stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    yield run
    logger.setLevel(level)


def test_help(run_here: Failing) -> None:
    status, printed, complaint = run_here("--help")
    assert (status, complaint) == (0, "")
    for option in ("--epochs", "--blocks", "--head", "--batch-size", "--seed", "--plot"):
        assert option in printed
    assert "(default: 10)" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "0"), "argument --epochs: must be a whole number from 1"),
        (("--head", "huge"), "head must be one of 'linear', 'mlp', 'mlp_sr', 'cnn'"),
        (("--blocks", "100"), "num_blocks=100 is more than DigitNet allows"),
        (("--plot", "missing/curves.png"), "argument --plot: "),
    ],
)
def test_bad_arguments_end_in_one_line(
    arguments: tuple[str, str], message: str, run_here: Failing, tmp_path: Path
) -> None:
    status, printed, complaint = run_here(*arguments)
    assert (status, printed) == (2, "")
    assert complaint.count("\n") == 1, complaint
    assert f"error: {message}" in complaint
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_says_what_to_install(run_here: Failing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message, printed, _ = run_here()
    assert printed == ""
    assert message.count("\n") == 0
    assert 'pip install "lightning-dgl[examples]"' in message
