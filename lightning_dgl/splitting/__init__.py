"""Splitting a network into blocks. Knows nothing of Lightning and of training.

A network passes through the modules in this order; ``splitter`` puts them together:

    example_batch -> tracer -> cut_points -> costs -> balance -> blocks -> checking
                     trace     judging                           pieces
                     sizes                                       (graph_function, compiled_call)

Copies to look at are in copying and meta_twin; what must be noticed or undone in stand_ins, watching and surroundings.
"""

from lightning_dgl.splitting.balance import assign_blocks, balanced_cuts
from lightning_dgl.splitting.blocks import Block, extent
from lightning_dgl.splitting.compiled_call import CompiledCall
from lightning_dgl.splitting.costs import count_flops, num_parameters
from lightning_dgl.splitting.cut_points import SplitPoint, TracedNetwork, find_split_points
from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.example_batch import example_batch
from lightning_dgl.splitting.meta_twin import output_shape
from lightning_dgl.splitting.network_state import in_mode, preserved_state, seed_accelerator
from lightning_dgl.splitting.splitter import SplitNetwork, split, split_network
from lightning_dgl.splitting.units import Unit, units_after

__all__ = [
    "Block",
    "CompiledCall",
    "SplitError",
    "SplitNetwork",
    "SplitPoint",
    "TracedNetwork",
    "Unit",
    "assign_blocks",
    "balanced_cuts",
    "count_flops",
    "example_batch",
    "extent",
    "find_split_points",
    "in_mode",
    "num_parameters",
    "output_shape",
    "preserved_state",
    "seed_accelerator",
    "split",
    "split_network",
    "units_after",
]
