"""Comparisons of recipes: a grid of runs, of which each can be repeated, and goes on after an interruption."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from tests.recipes import RECIPES, TINY, Main, rows


def test_a_comparison_goes_on_where_it_was_interrupted_and_its_runs_can_be_repeated(
    script: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = importlib.import_module("compare")
    grid = dataclasses.replace(compare.EXPERIMENTS["codecs"], points={"half": "--codec half", "8": "--codec 256x8"})
    monkeypatch.setitem(compare.EXPERIMENTS, "codecs", grid)
    results = tmp_path / "results.csv"
    arguments = ("codecs", "--data", "digits", *TINY, "--seeds", "3", "--results", str(results))
    script("compare", *arguments)
    printed = capsys.readouterr().out
    before = rows(results)
    assert len(before) == 3  # two codecs, synchronously and, but for one, asynchronously
    assert "| asynchronous | " in printed and "±" not in printed
    assert (tmp_path / "codecs.png").stat().st_size > 1000
    script("compare", *arguments, "--show")
    assert capsys.readouterr().out in printed and rows(results) == before

    results.write_text("\n".join(results.read_text().splitlines()[:-1]) + "\n")
    script("compare", *arguments)
    assert rows(results)[:-1] == before[:-1]  # seconds included: not run again
    assert rows(results)[-1]["blocks"] == before[-1]["blocks"]

    row = next(row for row in before if "256x8" in row["arguments"])
    assert 12 < float(row["compression"]) < 32
    capsys.readouterr()
    script("cifar10", "--data", row["data"], *row["arguments"].split())
    alone = capsys.readouterr().out
    for j, accuracy in enumerate(row["blocks"].split()):
        assert f"block {j}: {accuracy} %" in alone
    assert f"{float(row['compression']):.1f} times smaller than raw" in alone


@pytest.mark.slow
def test_a_whole_comparison_in_a_process_of_its_own(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    arguments = ("codecs", "--data", "digits", *TINY, "--channels", "16", "--seeds", "3", "--results", str(results))
    command = [sys.executable, str(RECIPES / "compare.py"), *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert len(rows(results)) == 11  # six codecs, one of them synchronously only


def test_comparisons_ask_for_what_there_is(script: Main) -> None:
    compare, cifar10 = importlib.import_module("compare"), importlib.import_module("cifar10")
    for grid in compare.EXPERIMENTS.values():
        for own in grid.runs().values():
            assert cifar10.parse(f"{grid.common} {own}".split()).method in cifar10.METHODS


def test_results_that_belong_to_the_repository_are_of_comparisons(script: Main) -> None:
    compare = importlib.import_module("compare")
    known = [f"{grid.common} {own}".split() for grid in compare.EXPERIMENTS.values() for own in grid.runs().values()]
    found = [row["arguments"].split() for row in rows(RECIPES / "results.csv")]
    assert found and all(arguments[:-2] in known for arguments in found)


@pytest.mark.parametrize("method", ["dgl", "sequential", "backprop"])
def test_an_interrupted_run_goes_on_after_its_last_epoch(
    method: str, script: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar10 = importlib.import_module("cifar10")
    few = ("--epochs", "3", "--images", "256", "--channels", "8", "--accelerator", "cpu", "--method", method)
    args = cifar10.parse(["--data", "digits", *few])
    undisturbed = cifar10.train(args)

    def interrupt(self: Any, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("the power is off")

    checkpoint = tmp_path / "unfinished" / "run.ckpt"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the power is off"):
        patch.setattr(cifar10.CPUTime, "on_train_epoch_start", interrupt, raising=False)
        cifar10.train(args, checkpoint=checkpoint)
    assert checkpoint.exists()
    resumed = cifar10.train(args, checkpoint=checkpoint)
    assert resumed["accuracies"] == undisturbed["accuracies"]
    assert resumed["ensemble"] == undisturbed["ensemble"]
