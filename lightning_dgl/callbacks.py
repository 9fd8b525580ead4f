"""Callbacks that show what the blocks are and do."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from typing_extensions import override

from lightning_dgl.boundaries import Traffic
from lightning_dgl.codecs import VectorQuantizer
from lightning_dgl.distributed import Report, Stage

if TYPE_CHECKING:
    from lightning_dgl.module import DGLModule


class BlockSummary(Callback):
    """Prints a table of the blocks when training starts.

    For each block: its first and last layer, output shape, parameters, share of the network's forward FLOPs, its
    auxiliary head with the head's FLOPs relative to the block's, and the device, or the ranks that train it. A
    DGLModule adds it by itself wherever Lightning shows its own ModelSummary (``Trainer(enable_model_summary=...)``).
    Loggers that keep tables (WandbLogger) are given it as ``blocks``.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            Console().print(block_table(pl_module))  # type: ignore[arg-type]
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    columns, rows = _blocks(pl_module)  # type: ignore[arg-type]
                    logger.log_table("blocks", [column.replace("\n", " ") for column in columns], rows)


class BlockMonitor(Callback):
    """Logs what each block does, every ``Trainer(log_every_n_steps)`` steps, on several ranks through rank 0.

    For every block j, with ``_block{j}`` appended:

    - ``monitor/updates``: local steps that it has taken;
    - ``monitor/samples_per_second``: its speed since the step that was logged before;
    - ``monitor/age_mean`` and ``monitor/age_max``: how stale was what it trained on since then, in steps that its
      predecessor had taken after making it; ``monitor/reuse``: how often it had trained on it before, on average;
    - ``monitor/buffer_batches`` and ``monitor/buffer_bytes``: what its replay buffer holds;
    - ``monitor/drops``: outputs that its successor was too slow to take, and ``monitor/bytes_per_step``: what it sent,
      where its successor is on another rank;
    - ``monitor/compression``: how much smaller a codec makes what it hands on, targets and headers counted in;
      ``monitor/encode_share`` and ``monitor/decode_share``: the share of the time that coding takes (on an accelerator,
      of the host's); ``monitor/codebook_perplexity`` and ``monitor/quantization_error``, see
      :class:`~lightning_dgl.VectorQuantizer`.

    The progress bar shows ``monitor/age``, the last block's mean age, with an asynchronous schedule. When training
    ends, a table of the whole of it is printed.
    """

    def __init__(self) -> None:
        self._began = 0.0
        # At the step that was logged before:
        self._time = 0.0
        self._step = 0
        self._samples: list[int] = []
        self._bytes = 0
        self._traffic: list[Traffic] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stage: Stage = pl_module.stage  # type: ignore[assignment]
        elapsed = time.monotonic() - self._began
        rows = stage.merge({j: _row(pl_module, stage, j, elapsed) for j in stage.blocks})  # type: ignore[arg-type]
        if trainer.is_global_zero:
            Console().print(_traffic_table(rows))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer, pl_module)  # type: ignore[arg-type]

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer, pl_module)  # type: ignore[arg-type]

    def _restart(self, trainer: Trainer, module: DGLModule) -> None:
        outbox = module.stage.outbox
        self._time, self._step = time.monotonic(), trainer.global_step
        self._samples = [progress.samples for progress in module.progress]
        self._traffic = [replace(traffic) for traffic in module.boundaries.traffic]
        self._bytes = 0 if outbox is None else outbox.bytes_sent

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer._logger_connector.should_update_logs or trainer.fit_loop._should_accumulate():
            return
        values = self._measure(trainer, pl_module)  # type: ignore[arg-type]
        self._restart(trainer, pl_module)  # type: ignore[arg-type]
        stage: Stage = pl_module.stage  # type: ignore[assignment]
        if stage.is_first:
            for name, value in values.items():
                pl_module.log(name, value, prog_bar=name == "monitor/age", batch_size=1)
        else:
            stage.report(Report(trainer.global_step - 1, values | {"epoch": trainer.current_epoch}))

    def _measure(self, trainer: Trainer, module: DGLModule) -> dict[str, float]:
        stage = module.stage
        values: dict[str, float] = {}
        elapsed = max(time.monotonic() - self._time, 1e-9)
        for j in stage.blocks:
            progress = module.progress[j]
            values[f"updates_block{j}"] = progress.updates
            values[f"samples_per_second_block{j}"] = (progress.samples - self._samples[j]) / elapsed
            values |= {f"{name}_block{j}": value for name, value in self._coding(module, j, elapsed).items()}
            buffer = module.schedule.buffers.get(j)
            if buffer is None:
                continue
            reads = buffer.take_reads()
            if reads.count:
                values[f"age_mean_block{j}"] = reads.total_age / reads.count
                values[f"age_max_block{j}"] = reads.max_age
                values[f"reuse_block{j}"] = reads.total_uses / reads.count
                if j == module.num_blocks - 1:
                    values["age"] = reads.total_age / reads.count
            values[f"buffer_batches_block{j}"] = len(buffer)
            values[f"buffer_bytes_block{j}"] = buffer.nbytes
        if stage.outbox is not None:
            last, num_steps = stage.blocks[-1], max(trainer.global_step - self._step, 1)
            values[f"drops_block{last}"] = stage.outbox.num_dropped
            values[f"bytes_per_step_block{last}"] = (stage.outbox.bytes_sent - self._bytes) / num_steps
        return {f"monitor/{name}": float(value) for name, value in values.items()}

    def _coding(self, module: DGLModule, block: int, elapsed: float) -> dict[str, float]:
        now, before = module.boundaries.traffic[block], self._traffic[block]
        values: dict[str, float] = {}
        if now.decode_seconds > before.decode_seconds:
            values["decode_share"] = (now.decode_seconds - before.decode_seconds) / elapsed
        if now.batches > before.batches:
            values["encode_share"] = (now.encode_seconds - before.encode_seconds) / elapsed
            values["compression"] = (now.raw_bytes - before.raw_bytes) / (now.encoded_bytes - before.encoded_bytes)
            codec = module.boundaries.codecs[block]
            if isinstance(codec, VectorQuantizer):
                values |= {"codebook_perplexity": codec.perplexity, "quantization_error": codec.error}
        return values


def _row(module: DGLModule, stage: Stage, block: int, elapsed: float) -> list[str]:
    """What a block has done in training that took ``elapsed`` seconds."""
    progress, traffic = module.progress[block], module.boundaries.traffic[block]
    is_sent = stage.outbox is not None and block == stage.blocks[-1]
    coded = (traffic.raw_bytes / traffic.batches, traffic.encoded_bytes / traffic.batches) if traffic.batches else None
    return [
        str(progress.updates),
        f"{progress.samples / elapsed:.0f}",
        "-" if coded is None else f"{coded[0] / 1e6:.3f}",
        "-" if coded is None else f"{coded[1] / 1e6:.3f}",
        "-" if coded is None else f"{coded[0] / coded[1]:.1f}",
        _percent(traffic.encode_seconds, elapsed) if coded else "-",
        _percent(traffic.decode_seconds, elapsed) if traffic.decode_seconds else "-",
        f"{stage.outbox.bytes_sent / 1e6:.1f}" if is_sent and stage.outbox is not None else "-",
        str(stage.outbox.num_dropped) if is_sent and stage.outbox is not None else "-",
    ]


def _empty_table() -> Table:
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold magenta")


def _traffic_table(rows: dict[int, list[str]]) -> Table:
    table = _empty_table()
    table.add_column("Block", style="dim")
    for column in (
        *("Updates", "Samples/s", "Output\nMB", "Encoded\nMB", "Times\nsmaller", "Encoding\ntime", "Decoding\ntime"),
        *("Sent\nMB in all", "Dropped"),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for j, row in sorted(rows.items()):
        table.add_row(str(j), *row)
    return table


def block_table(module: DGLModule) -> Table:
    """The table that :class:`BlockSummary` prints."""
    columns, rows = _blocks(module)
    table = _empty_table()
    table.add_column("", style="dim")
    for column in columns[1:]:
        is_number = column in ("Params", "FLOPs", "Head\nparams", "Head\nFLOPs")
        overflow: Any = {"overflow": "fold"} if column == "Layers" else {"no_wrap": True}
        table.add_column(column, justify="right" if is_number else "left", **overflow)
    for row in rows:
        table.add_row(*row)
    return table


def _blocks(module: DGLModule) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of blocks."""
    ranks = module.ranks_of_blocks()
    columns = ["Block", "Layers", "Output", "Params", "FLOPs", "Head", "Head\nparams", "Head\nFLOPs"]
    total = sum(module.block_flops)
    rows = []
    for j, block in enumerate(module.blocks):
        if j < len(module.heads):
            output = "×".join(str(size) for size in module.split_points[j].shape[1:])
            share = _percent(module.head_flops[j], module.block_flops[j])
            head = [type(module.heads[j]).__name__, _count(module.heads[j]), share]
        else:
            output, head = str(module.num_classes), ["-"] * 3
        device = next((str(p.device) for p in block.parameters()), "-")
        where = ", ".join(map(str, ranks[j])) if ranks else device
        flops = _percent(module.block_flops[j], total)
        rows.append([str(j), module.block_names[j], output, _count(block), flops, *head, where])
    return [*columns, "Ranks" if ranks else "Device"], rows


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _count(module: nn.Module) -> str:
    return get_human_readable_count(sum(p.numel() for p in module.parameters()))
