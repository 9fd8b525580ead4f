"""Decoupled Greedy Learning of CNNs for PyTorch Lightning."""

from lightning_dgl._version import __version__
from lightning_dgl.augmented import Augmented
from lightning_dgl.callbacks import BlockMonitor, BlockSummary
from lightning_dgl.codecs import Message, VectorQuantizer
from lightning_dgl.distributed import RankFailedError
from lightning_dgl.heads import CNNHead, LinearHead, MLPHead, MLPSRHead
from lightning_dgl.module import DGLModule
from lightning_dgl.plots import plot_blocks
from lightning_dgl.replay import ReplayBuffer
from lightning_dgl.schedules import Asynchronous, Schedule, Sequential, Synchronous
from lightning_dgl.splitting import SplitError, SplitPoint, find_split_points, split
from lightning_dgl.strategy import DGLStrategy
from lightning_dgl.training import NonFiniteLossError

__all__ = [
    "Asynchronous",
    "Augmented",
    "BlockMonitor",
    "BlockSummary",
    "CNNHead",
    "DGLModule",
    "DGLStrategy",
    "LinearHead",
    "MLPHead",
    "MLPSRHead",
    "Message",
    "NonFiniteLossError",
    "RankFailedError",
    "ReplayBuffer",
    "Schedule",
    "Sequential",
    "SplitError",
    "SplitPoint",
    "Synchronous",
    "VectorQuantizer",
    "__version__",
    "find_split_points",
    "plot_blocks",
    "split",
]
