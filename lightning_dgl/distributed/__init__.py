"""Blocks on several ranks. Knows nothing of networks, and of Lightning's Trainer only in ``signals``.

topology says which rank holds which blocks, groups connects them, link carries activations from one to the next,
watchdog makes one rank's failure everyone's, and stage puts these together for one rank.
"""

from lightning_dgl.distributed.failures import RankFailedError
from lightning_dgl.distributed.groups import Groups
from lightning_dgl.distributed.link import Address, Replay, StageBatch, StageLoader, StatefulStageLoader
from lightning_dgl.distributed.stage import AGREED, DistributedStage, Report, Stage
from lightning_dgl.distributed.topology import assign_blocks, blocks_in_words
from lightning_dgl.distributed.watchdog import Watchdog, this_process

__all__ = [
    "AGREED",
    "Address",
    "DistributedStage",
    "Groups",
    "RankFailedError",
    "Replay",
    "Report",
    "Stage",
    "StageBatch",
    "StageLoader",
    "StatefulStageLoader",
    "Watchdog",
    "assign_blocks",
    "blocks_in_words",
    "this_process",
]
