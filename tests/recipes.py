"""What tests of the recipes share; the fixture that runs one is in conftest.py."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
TINY = ("--epochs", "1", "--images", "256", "--channels", "8", "--accelerator", "cpu")


def rows(results: Path) -> list[dict[str, Any]]:
    return list(csv.DictReader(results.read_text().splitlines()))


Main = Callable[..., None]
"""Runs a script: ``main("cifar10", "--data", "digits")``."""
