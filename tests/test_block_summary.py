"""The table of blocks."""

from __future__ import annotations

import re
from collections.abc import Callable

import lightning as L
import pytest
from rich.console import Console

from lightning_dgl import BlockSummary, DGLModule
from lightning_dgl.callbacks import block_table
from tests.conftest import loader, small_cnn


def rendered(module: DGLModule) -> list[list[str]]:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(block_table(module))
    lines = capture.get().splitlines()
    rows = lines[next(i for i, line in enumerate(lines) if set(line.strip()) == {"─"}) + 1 :]
    return [re.split(r"\s{2,}", row.strip()) for row in rows if row.strip()]


def test_rows_hold_what_is_known_of_each_block() -> None:
    module = DGLModule(small_cnn(), split_at=["2", "6", "10"], example_input=[2, 3, 8, 8], head="linear")
    rows = rendered(module)
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [row[1] for row in rows] == ["0 to 2", "3 to 6", "7 to 10", "11 to 16"]
    assert [row[2] for row in rows] == ["8×8×8", "8×8×8", "16×4×4", "4"]
    first_block_parameters = 3 * 8 * 9 + 8 + 2 * 8
    assert rows[0][3] == str(first_block_parameters)
    # Multiply-adds of the convolutions and the classifier, by hand.
    flops = [3 * 8 * 9 * 64, 8 * 8 * 9 * 64, 8 * 16 * 9 * 16, 16 * 16 * 9 * 16 + 16 * 4]
    assert [row[4] for row in rows] == [f"{f / sum(flops):.1%}" for f in flops]
    assert [row[5] for row in rows] == ["LinearHead"] * 3 + ["-"]
    heads = [4 * 8 * 4, 4 * 8 * 4, 4 * 16 * 4]
    assert [row[6] for row in rows] == [str(h + 4) for h in heads] + ["-"]  # weights and four biases
    assert [row[7] for row in rows] == [f"{h / f:.1%}" for h, f in zip(heads, flops, strict=False)] + ["-"]
    assert {row[8] for row in rows} == {"cpu"}


@pytest.mark.parametrize(
    ("callbacks", "enabled", "shown"),
    [([], False, 0), ([], True, 1), ([BlockSummary()], False, 1), ([BlockSummary()], True, 1)],
)
def test_printed_once_at_fit_start_when_summaries_are_on(
    callbacks: list[L.Callback],
    enabled: bool,
    shown: int,
    make_trainer: Callable[..., L.Trainer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = DGLModule(small_cnn(), 2, example_input=[2, 3, 8, 8])
    trainer = make_trainer(callbacks=callbacks, enable_model_summary=enabled, limit_train_batches=1)
    trainer.fit(module, loader())
    assert capsys.readouterr().out.count("MLPSRHead") == shown
    trainer.validate(module, loader(), verbose=False)
    assert "MLPSRHead" not in capsys.readouterr().out
