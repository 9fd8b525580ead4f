"""Splitting a network into blocks. Knows nothing of Lightning and of training.

trace -> cut_points -> costs -> balance -> blocks, in the order in which a network passes through them; splitter puts
them together.
"""

from lightning_dgl.splitting.balance import assign_blocks, balanced_cuts
from lightning_dgl.splitting.blocks import Block, extent
from lightning_dgl.splitting.code import Code
from lightning_dgl.splitting.costs import count_flops
from lightning_dgl.splitting.cut_points import SplitPoint, find_split_points
from lightning_dgl.splitting.dry_run import example_batch, in_mode, output_shape, preserved_state
from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.splitter import SplitNetwork, split, split_network

__all__ = [
    "Block",
    "Code",
    "SplitError",
    "SplitNetwork",
    "SplitPoint",
    "assign_blocks",
    "balanced_cuts",
    "count_flops",
    "example_batch",
    "extent",
    "find_split_points",
    "in_mode",
    "output_shape",
    "preserved_state",
    "split",
    "split_network",
]
