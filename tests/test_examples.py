"""The examples that train on small images, run as users run them."""

from __future__ import annotations

import csv
import importlib
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ("--epochs", "1", "--images", "256", "--channels", "8", "--accelerator", "cpu")


def run(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def rows(folder: Path, experiment: str) -> list[dict[str, Any]]:
    return list(csv.DictReader((folder / "results" / f"{experiment}.csv").read_text().splitlines()))


def image_folder(folder: Path) -> Path:
    for part, number in (("train", 160), ("test", 8)):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for i in range(number):
                image = to_pil_image(torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8))
                image.save(folder / part / name / f"{i}.png")
    return folder


Main = Callable[..., None]


@pytest.fixture
def cifar10(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Main]:
    """What the script does, in this process."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("lightning.pytorch").level

    def main(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["cifar10.py", *arguments])
        importlib.import_module("cifar10").main()

    yield main
    logging.getLogger("lightning.pytorch").setLevel(level)


def test_a_comparison_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    arguments = ("delays", "--data", "digits", "--protocol", "reduced", *TINY)
    first = run("compare.py", tmp_path, *arguments, "--seeds", "0")
    assert first.returncode == 0, first.stderr
    before = rows(tmp_path, "delays")
    assert len(before) == 13  # synchronous once, and three buffer sizes with four slow-downs
    assert all(0 <= float(accuracy) <= 100 for row in before for accuracy in row["blocks"].split())
    assert (tmp_path / "results" / "delays.png").stat().st_size > 1000
    assert "| M = 5 | " in first.stdout and "±" not in first.stdout
    (tmp_path / "results" / "delays.csv").write_text(
        "\n".join((tmp_path / "results" / "delays.csv").read_text().splitlines()[:-1]) + "\n"
    )
    again = run("compare.py", tmp_path, *arguments, "--seeds", "0")
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path, "delays")[:-1] == before[:-1]  # seconds included: not run again
    assert rows(tmp_path, "delays")[-1]["arguments"] == before[-1]["arguments"]


def test_a_run_of_a_comparison_is_repeated_by_its_arguments(
    cifar10: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run("compare.py", tmp_path, "codecs", "--data", "digits", *TINY, "--channels", "16", "--seeds", "3")
    assert done.returncode == 0, done.stderr
    row = next(row for row in rows(tmp_path, "codecs") if "256x8" in row["arguments"])
    assert 20 < float(row["compression"]) < 32
    cifar10(*row["arguments"].split())
    alone = capsys.readouterr().out
    for j, accuracy in enumerate(row["blocks"].split()):
        assert f"block {j}: {accuracy} %" in alone
    assert f"{float(row['compression']):.1f} times smaller than raw" in alone


@pytest.mark.parametrize(
    "arguments",
    [
        ("--network", "resnet20", "--blocks", "3", "--head", "linear"),
        ("--network", "vgg11_bn", "--method", "backprop"),
        ("--network", "dni_network", "--method", "async", "--slowdown", "2", "--channels", "8"),
    ],
)
def test_any_network_on_any_folder_of_images(
    arguments: tuple[str, ...], cifar10: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cifar10("--data", str(image_folder(tmp_path / "pets")), "--epochs", "1", "--accelerator", "cpu", *arguments)
    assert "ensemble: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "There is no folder nowhere/train. Data is 'digits', 'cifar10', or a folder"),
        (("--network", "vgg12"), "There is no network 'vgg12'. There are six_layers"),
        (("--codec", "8"), "must be raw, half, or codes x dimension such as 256x8, got '8'"),
        (("--method", "magic"), "invalid choice: 'magic'"),
        (("--network", "resnet18", "--channels", "8"), "--channels is of six_layers"),
        (("--network", "resnet18", "--data", "digits"), "resnet18 takes images of three channels, these have 1"),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: tuple[str, ...], message: str, cifar10: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cifar10(*arguments)
    assert message in " ".join(f"{ended.value} {capsys.readouterr().err}".split())


def test_slow_link_shows_what_each_codec_sends(tmp_path: Path) -> None:
    done = run("slow_link.py", tmp_path, "--epochs", "1", "--blocks", "2", "--accelerator", "cpu")
    assert done.returncode == 0, done.stderr
    smaller = {line.split("│")[1].strip(): line.split("│")[3] for line in done.stdout.splitlines() if "│" in line}
    assert (float(smaller["raw"]), float(smaller["half"])) == (1, 2)
    assert 2 < float(smaller["256 codes of 4"]) < float(smaller["256 codes of 8"])
