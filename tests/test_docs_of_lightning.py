"""The tables of docs/lightning.md name every flag and callback of the installed Lightning, and tests that exist."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch import callbacks

REPOSITORY = Path(__file__).parents[1]
TEXT = (REPOSITORY / "docs" / "lightning.md").read_text()
SECTION = TEXT.split("## Flags and callbacks of Lightning\n")[1].split("\n## ")[0]


def table(first: str) -> dict[str, list[str]]:
    """The rows of a table by the name in their first cell, with the other cells."""
    _, text = SECTION.split(f"| {first} | one rank |")
    lines = text.split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): cells for name, *cells in rows}


FLAGS, CALLBACKS = table("flag"), table("callback")


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_flag_and_callback_is_in_a_table() -> None:
    assert FLAGS.keys() == inspect.signature(L.Trainer.__init__).parameters.keys() - {"self"}
    assert CALLBACKS.keys() == set(callbacks.__all__)


@pytest.mark.parametrize("rows", [FLAGS, CALLBACKS], ids=["flags", "callbacks"])
def test_every_cell_says_what_happens(rows: dict[str, list[str]]) -> None:
    for name, cells in rows.items():
        assert len(cells) == 4, name
        for cell in cells[:3]:
            assert re.search(r"\bworks\b|\brefused: |\bsaves nothing\b", cell), f"{name}: {cell}"


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`([\w/]+\.py)::(\w+)`", SECTION))
    missing = [f"{path}::{name}" for path, name in named if name not in functions_of(REPOSITORY / "tests" / path)]
    assert missing == []
    for name, cells in (FLAGS | CALLBACKS).items():
        assert re.search(r"\.py::test_", cells[3]), name
