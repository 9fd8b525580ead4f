"""The example that sweeps slow-downs and buffer sizes, run as users run it."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

EXAMPLE = Path(__file__).parent.parent / "examples" / "async_delays.py"
TINY = ["--epochs", "1", "--images", "256", "--channels", "4", "--buffer-sizes", "2", "--accelerator", "cpu"]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *TINY, "--output", str(folder / "out"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def rows(folder: Path) -> list[dict[str, Any]]:
    return list(csv.DictReader((folder / "out" / "results.csv").read_text().splitlines()))


def test_sweep_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    first = run(tmp_path, "--slowdowns", "sync", "1.5")
    assert first.returncode == 0, first.stderr
    assert [(row["slowdown"], row["buffer_size"]) for row in rows(tmp_path)] == [("sync", "-"), ("1.5", "2")]
    assert all(0 <= float(row["last_block"]) <= 100 and len(row["blocks"].split()) == 6 for row in rows(tmp_path))
    assert (tmp_path / "out" / "async_delays.png").stat().st_size > 1000
    before = rows(tmp_path)
    again = run(tmp_path, "--slowdowns", "sync", "1.5", "1.0")
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path)[:2] == before  # seconds included: not run again
    assert [(row["slowdown"], row["buffer_size"]) for row in rows(tmp_path)[2:]] == [("1.0", "2")]


def test_any_folder_of_images(tmp_path: Path) -> None:
    for part, number in (("train", 160), ("test", 8)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / part / name
            folder.mkdir(parents=True)
            for i in range(number):
                to_pil_image(torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8)).save(folder / f"{i}.png")
    done = run(tmp_path, "--data", str(tmp_path / "pets"), "--slowdowns", "1.0")
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("arguments", [["--data", "nowhere"]])
def test_data_that_is_not_there(arguments: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert "There is no folder nowhere/train. Data is 'digits', 'cifar10', or a folder" in done.stderr
    assert "Traceback" not in done.stderr
