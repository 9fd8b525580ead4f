"""The table of blocks, and what BlockMonitor sees."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
from rich.console import Console
from torchvision.models import resnet50

from lightning_dgl import (
    BlockMonitor,
    BlockSummary,
    DGLModule,
    DGLStrategy,
    VectorQuantizer,
)
from lightning_dgl.callbacks import _COLUMNS, _table, block_table
from tests.internals import InOrder, buffers, links_of, updates
from tests.runs import MakeTrainer, loader, make_module, small_cnn
from tests.schedules.plain import BATCHES, data


def rendered(module: DGLModule) -> list[list[str]]:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(block_table(module))
    lines = capture.get().splitlines()
    rows = lines[next(i for i, line in enumerate(lines) if set(line.strip()) == {"─"}) + 1 :]
    return [re.split(r"\s{2,}", row.strip()) for row in rows if row.strip() and "together" not in row]


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
    make_trainer: MakeTrainer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = DGLModule(small_cnn(), 2, example_input=[2, 3, 8, 8], head="mlp_sr")
    trainer = make_trainer(callbacks=callbacks, enable_model_summary=enabled, limit_train_batches=1)
    trainer.fit(module, loader())
    assert capsys.readouterr().out.count("MLPSRHead") == shown
    trainer.validate(module, loader(), verbose=False)
    assert "MLPSRHead" not in capsys.readouterr().out


# BlockMonitor


class Monitored(L.Callback):
    """Keeps what BlockMonitor logs, step by step, and what the progress bar shows."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.bar: set[str] = set()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        names = [name for name in trainer.callback_metrics if name.startswith("monitor/")]
        self.steps.append({name: trainer.callback_metrics[name].item() for name in names})
        self.bar |= set(trainer.progress_bar_metrics)


def test_monitor_logs_updates_ages_and_reuse_of_every_block(make_trainer: MakeTrainer) -> None:
    # Block 1 reads what block 0 has just made, then the same again.
    schedule = InOrder([2, 1, 1, 0], buffer_size=1)
    module = make_module(split_at=["2", "6"])
    seen = Monitored()
    trainer = make_trainer(
        strategy=DGLStrategy(schedule), callbacks=[BlockMonitor(), seen], log_every_n_steps=1, max_epochs=2
    )
    trainer.fit(module, data())
    last, before = seen.steps[-1], seen.steps[-2]
    assert [last[f"monitor/updates_block{j}"] for j in range(3)] == updates(module)
    assert last["monitor/updates_block1"] - before["monitor/updates_block1"] == 2
    assert last["monitor/reuse_block1"] == 0.5
    assert last["monitor/age_mean_block1"] == last["monitor/age_max_block1"] == 0
    assert [last[f"monitor/buffer_batches_block{j}"] for j in (1, 2)] == [1, 1]
    assert last["monitor/buffer_bytes_block1"] == buffers(links_of(module))[1].nbytes
    assert all(last[f"monitor/samples_per_second_block{j}"] > 0 for j in range(3))
    assert "monitor/age_mean_block0" not in last
    assert {name for name in seen.bar if name.startswith("monitor/")} == {"monitor/age"}


def test_monitor_measures_the_age_in_steps_of_the_predecessor(make_trainer: MakeTrainer) -> None:
    # With each batch used once at most, block 1 goes back from the newest batch to older ones.
    seen = Monitored()
    trainer = make_trainer(
        strategy=DGLStrategy(InOrder([0, 0, 1, 1, 1, 0], buffer_size=8, max_reuse=1)),
        callbacks=[BlockMonitor(), seen],
        log_every_n_steps=1,
        max_epochs=1,
    )
    trainer.fit(make_module(num_blocks=2), data())
    # Batches 0 and 1 were used in the warm-up; then three turns on 4, 3 and 2.
    assert (seen.steps[-1]["monitor/age_mean_block1"], seen.steps[-1]["monitor/age_max_block1"]) == (1, 2)


def test_monitor_works_with_the_synchronous_schedule(make_trainer: MakeTrainer) -> None:
    for strategy in ("dgl", "auto"):
        seen = Monitored()
        trainer = make_trainer(strategy=strategy, callbacks=[BlockMonitor(), seen], log_every_n_steps=1)
        trainer.fit(make_module(), data(), data())
        assert {name.split("_block")[0] for name in seen.steps[-1]} == {"monitor/updates", "monitor/samples_per_second"}
        assert seen.steps[-1]["monitor/updates_block3"] == BATCHES


def test_monitor_logs_compression_and_codebooks(make_trainer: MakeTrainer) -> None:
    seen = Monitored()
    trainer = make_trainer(
        strategy=DGLStrategy(codec=[None, "half", VectorQuantizer(8, 2)]),
        callbacks=[BlockMonitor(), seen],
        log_every_n_steps=1,
    )
    trainer.fit(make_module(), loader())
    last = seen.steps[-1]
    assert last["monitor/compression_block1"] == pytest.approx(8 * 8 * 64 * 4 / (8 * 8 * 64 * 2 + 8 * 8 + 512))
    assert 0 < last["monitor/encode_share_block2"] < 1
    assert 0 < last["monitor/decode_share_block3"] < 1
    assert 1 <= last["monitor/codebook_perplexity_block2"] <= 8
    assert last["monitor/quantization_error_block2"] > 0
    assert not {
        name for name in last if name.startswith(("monitor/compression_block0", "monitor/codebook_perplexity_block1"))
    }


def test_monitor_prints_what_training_came_to(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    strategy = DGLStrategy(codec=[None, "half", VectorQuantizer(8, 2)])
    make_trainer(strategy=strategy, callbacks=[BlockMonitor()], max_epochs=2).fit(make_module(), loader())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line and line[0] in "0123" and len(line) == 8}
    assert sorted(rows) == ["0", "1", "2", "3"]
    assert {row[0] for row in rows.values()} == {"10"}  # updates
    assert [rows[j][4] for j in "0123"] == ["-", "1.9", f"{8 * 16 * 16 * 4 / (8 * 8 * 16 + 64 + 64 + 512):.1f}", "-"]


def test_tables_fit_80_columns_without_headings_cut_off() -> None:
    console = Console(width=80)
    large = ["0", "1234567", "123456", "99.999", "12.345", "128.0", "12.3%", "12.3%", "123456.7", "1234567"]
    with console.capture() as capture:
        console.print(_table(_COLUMNS, [large]))
        for head in ("mlp_sr", "augmented"):
            module = DGLModule(resnet50(num_classes=1000), 4, example_input=(2, 3, 64, 64), head=head)
            console.print(block_table(module))
    text = capture.get()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    words = set(text.split())
    assert set(large) | {"Updates", "Samples", "Encoded", "Ratio", "Dropped"} <= words
    assert {"Layers", "Output", "Params", "FLOPs", "Head", "params", "MLPSRHead", "1024×4×4", "Device"} <= words


def test_columns_that_are_empty_are_left_out() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(_table(("Block", "Updates", "Dropped"), [["0", "5", "-"], ["1", "4", "-"]]))
    assert [word for word in capture.get().split() if "─" not in word] == ["Updates", "0", "5", "1", "4"]
