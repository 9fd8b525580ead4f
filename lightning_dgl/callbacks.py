"""Callbacks that show what the blocks are and do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from typing_extensions import override

if TYPE_CHECKING:
    from lightning_dgl.module import DGLModule


class BlockSummary(Callback):
    """Prints a table of the blocks when training starts.

    For each block: its first and last layer, output shape, parameters, share of the network's forward FLOPs, its
    auxiliary head with the head's FLOPs relative to the block's, and the device, or the ranks that train it. A
    DGLModule adds it by itself wherever Lightning shows its own ModelSummary (``Trainer(enable_model_summary=...)``).
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            Console().print(block_table(pl_module))  # type: ignore[arg-type]


def block_table(module: DGLModule) -> Table:
    """The table that :class:`BlockSummary` prints."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold magenta")
    table.add_column("", style="dim")
    table.add_column("Layers", overflow="fold")
    table.add_column("Output", no_wrap=True)
    table.add_column("Params", justify="right", no_wrap=True)
    table.add_column("FLOPs", justify="right", no_wrap=True)
    table.add_column("Head", no_wrap=True)
    table.add_column("Head\nparams", justify="right", no_wrap=True)
    table.add_column("Head\nFLOPs", justify="right", no_wrap=True)
    ranks = module.ranks_of_blocks()
    table.add_column("Ranks" if ranks else "Device", no_wrap=True)
    total = sum(module.block_flops)
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
        table.add_row(str(j), module.block_names[j], output, _count(block), flops, *head, where)
    return table


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _count(module: nn.Module) -> str:
    return get_human_readable_count(sum(p.numel() for p in module.parameters()))
