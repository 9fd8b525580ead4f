"""examples/quickstart.py as its user runs it: what it prints and saves, and what it says to bad arguments."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Result = subprocess.CompletedProcess[str]


def run(folder: Path, *arguments: str, python: tuple[str, ...] = (str(SCRIPT),)) -> Result:
    command = [sys.executable, *python, *arguments]
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


def test_help(tmp_path: Path) -> None:
    result = run(tmp_path, "--help")
    assert result.returncode == 0
    assert result.stderr == ""
    for option in ("--epochs", "--blocks", "--head", "--batch-size", "--seed", "--plot"):
        assert option in result.stdout
    assert "(default: 10)" in result.stdout


def test_bad_arguments_end_in_one_line(tmp_path: Path) -> None:
    cases = {
        ("--epochs", "0"): "argument --epochs: must be a whole number from 1",
        ("--head", "huge"): "head must be one of 'linear', 'mlp', 'mlp_sr', 'cnn'",
        ("--blocks", "100"): "num_blocks=100 is more than DigitNet allows",
        ("--plot", "missing/curves.png"): "argument --plot: ",
    }
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda arguments: run(tmp_path, *arguments), cases)
    for message, result in zip(cases.values(), results, strict=True):
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert f"error: {message}" in result.stderr
        assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_says_what_to_install(tmp_path: Path) -> None:
    code = f"import runpy, sys; sys.modules['sklearn'] = None; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    result = run(tmp_path, python=("-c", code))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert 'pip install "lightning-dgl[examples]"' in result.stderr
