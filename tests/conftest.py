"""Fixtures for all tests."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.recipes import RECIPES, Main
from tests.runs import MakeTrainer, loader, quiet_trainer, small_cnn  # noqa: F401

# torch's autograd starts its threads at a process's first backward pass, for as many devices as there seem to be. After
# that a process cannot fork. Fake tensors, which torch.compile uses too, make it seem that there is a CUDA device.
torch.ones(1, requires_grad=True).sum().backward()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-models", action="store_true", help="test every torchvision classification model")


@pytest.fixture(autouse=True)
def _doctest_namespace(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, nn=nn)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    """Make a quiet one-device CPU Trainer under DGLStrategy that writes below ``tmp_path``; arguments override."""
    return partial(quiet_trainer, default_root_dir=tmp_path)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Main]:
    """Run a script in this process: ``script("cifar10", "--data", "digits")``."""
    monkeypatch.syspath_prepend(RECIPES)
    monkeypatch.chdir(tmp_path)
    level, threads = logging.getLogger("lightning.pytorch").level, torch.get_num_threads()

    def main(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        importlib.import_module(name).main()

    yield main
    logging.getLogger("lightning.pytorch").setLevel(level)
    torch.set_num_threads(threads)
