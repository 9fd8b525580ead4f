"""Callbacks that show what the blocks are and do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from typing_extensions import override

from lightning_dgl.augmented import AugmentedHead
from lightning_dgl.codecs import VectorQuantizer
from lightning_dgl.distributed import Report
from lightning_dgl.links import Traffic
from lightning_dgl.logs import loggers_are_due, updates_after
from lightning_dgl.run import Run
from lightning_dgl.splitting import num_parameters


class BlockSummary(Callback):
    """Prints a table of the blocks when training starts.

    For each block: its first and last layer, output shape, parameters, share of the network's forward FLOPs, its
    auxiliary head with the head's FLOPs relative to the block's, and the device, or the ranks that train it. A
    DGLModule adds this callback wherever Lightning shows its ModelSummary (``Trainer(enable_model_summary=...)``).
    Loggers that keep tables (WandbLogger) get it as ``blocks``.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            Console().print(block_table(pl_module))
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    columns, rows = _blocks(pl_module)
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
    - ``monitor/compression``: how many times smaller a codec makes what it sends, targets and headers included;
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
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        run: Run = pl_module.run
        elapsed = time.monotonic() - self._began
        rows = run.stage.merge({j: _row(pl_module, run, j, elapsed) for j in run.stage.blocks})
        if trainer.is_global_zero:
            Console().print(_table(_COLUMNS, [[str(j), *row] for j, row in sorted(rows.items())]))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer, pl_module)

    def _restart(self, trainer: Trainer, module: Any) -> None:
        run: Run = module.run
        self._time, self._step = time.monotonic(), trainer.global_step
        self._samples = [progress.samples for progress in module.progress]
        self._traffic = [replace(link.traffic) for link in run.links]
        self._bytes = run.outgoing.bytes_sent or 0

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not loggers_are_due(trainer, trainer.global_step) or not updates_after(trainer, batch_idx):
            return
        values = self._measure(trainer, pl_module)
        self._restart(trainer, pl_module)
        stage = pl_module.run.stage
        if stage.is_first:
            for name, value in values.items():
                pl_module.log(name, value, prog_bar=name == "monitor/age", batch_size=1)
        else:
            stage.report(Report(trainer.global_step - 1, values | {"epoch": trainer.current_epoch}))

    def _measure(self, trainer: Trainer, module: Any) -> dict[str, float]:
        run: Run = module.run
        values: dict[str, float] = {}
        elapsed = max(time.monotonic() - self._time, 1e-9)
        for j in run.stage.blocks:
            progress = module.progress[j]
            values[f"updates_block{j}"] = progress.updates
            values[f"samples_per_second_block{j}"] = (progress.samples - self._samples[j]) / elapsed
            values |= {f"{name}_block{j}": value for name, value in self._coding(run, j, elapsed).items()}
            buffer = run.links[j].buffer
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
        if run.outgoing.bytes_sent is not None:
            last, num_steps = run.stage.blocks[-1], max(trainer.global_step - self._step, 1)
            values[f"drops_block{last}"] = run.outgoing.num_dropped
            values[f"bytes_per_step_block{last}"] = (run.outgoing.bytes_sent - self._bytes) / num_steps
        return {f"monitor/{name}": float(value) for name, value in values.items()}

    def _coding(self, run: Run, block: int, elapsed: float) -> dict[str, float]:
        values: dict[str, float] = {}
        decode_seconds = run.links[block].traffic.decode_seconds - self._traffic[block].decode_seconds
        if decode_seconds > 0:
            values["decode_share"] = decode_seconds / elapsed
        link, before = run.links[block + 1], self._traffic[block + 1]
        if link.traffic.batches > before.batches:
            raw, encoded = link.traffic.raw_bytes - before.raw_bytes, link.traffic.encoded_bytes - before.encoded_bytes
            values["encode_share"] = (link.traffic.encode_seconds - before.encode_seconds) / elapsed
            values["compression"] = raw / encoded
            if isinstance(link.codec, VectorQuantizer):
                values |= {"codebook_perplexity": link.codec.perplexity, "quantization_error": link.codec.error}
        return values


# Tables: as wide as 80 columns allow, without columns that say nothing

_COLUMNS = (
    *("Block", "Updates", "Samples\nper s", "Output\nMB", "Encoded\nMB", "Ratio", "Encode\ntime", "Decode\ntime"),
    *("Sent\nMB", "Dropped"),
)


def _row(module: Any, run: Run, block: int, elapsed: float) -> list[str]:
    """Return what a block has done in training that took ``elapsed`` seconds."""
    progress, link = module.progress[block], run.links[block + 1]
    traffic, decode_seconds = link.traffic, run.links[block].traffic.decode_seconds
    is_coded, is_sent = traffic.batches > 0, link.bytes_sent is not None
    return [
        str(progress.updates),
        f"{progress.samples / elapsed:.0f}",
        f"{traffic.raw_bytes / traffic.batches / 1e6:.3f}" if is_coded else "-",
        f"{traffic.encoded_bytes / traffic.batches / 1e6:.3f}" if is_coded else "-",
        f"{traffic.raw_bytes / traffic.encoded_bytes:.1f}" if is_coded else "-",
        _percent(traffic.encode_seconds, elapsed) if is_coded else "-",
        _percent(decode_seconds, elapsed) if decode_seconds else "-",
        f"{(link.bytes_sent or 0) / 1e6:.1f}" if is_sent else "-",
        str(link.num_dropped) if is_sent else "-",
    ]


def block_table(module: Any) -> Table:
    """Return the table that :class:`BlockSummary` prints."""
    table = _table(*_blocks(module), text=("Layers", "Output", "Head", "Ranks", "Device"))
    if len(module.heads):
        parameters = _percent(num_parameters(module.heads), num_parameters(module.network))
        flops = _percent(sum(module.head_flops), sum(module.block_flops))
        table.caption = f"Heads together: {parameters} of the network's parameters, {flops} of its FLOPs"
        table.caption_justify = "left"
    return table


def _blocks(module: Any) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the table of blocks."""
    ranks = [] if module.run is None else module.run.stage.ranks_of_blocks()
    columns = ["Block", "Layers", "Output", "Params", "FLOPs", "Head", "Head\nparams", "Head\nFLOPs"]
    total = sum(module.block_flops)
    rows = []
    for j, block in enumerate(module.blocks):
        if j < len(module.heads):
            output = "×".join(str(size) for size in module.split_points[j].shape[1:])
            share = _percent(module.head_flops[j], module.block_flops[j])
            head = [_name(module.heads[j]), _count(module.heads[j]), share]
        else:
            output, head = str(module.num_classes), ["-"] * 3
        device = next((str(p.device) for p in block.parameters()), "-")
        where = ", ".join(map(str, ranks[j])) if ranks else device
        flops = _percent(module.block_flops[j], total)
        rows.append([str(j), module.block_names[j], output, _count(block), flops, *head, where])
    return [*columns, "Ranks" if ranks else "Device"], rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[str] = ()) -> Table:
    """Return a table of the columns that are not empty; those named in ``text`` may wrap, the others are numbers."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold magenta")
    shown = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]
    for i in shown:
        style: Any = {"overflow": "fold"} if columns[i] in text else {"justify": "right", "no_wrap": True}
        table.add_column("" if i == 0 else columns[i], style="dim" if i == 0 else None, **style)
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    return table


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _name(head: nn.Module) -> str:
    if isinstance(head, AugmentedHead):
        return f"{len(head.units)} copied unit{'s' * (len(head.units) != 1)}"
    return type(head).__name__


def _count(module: nn.Module) -> str:
    return get_human_readable_count(num_parameters(module))
