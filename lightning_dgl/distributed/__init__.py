"""Blocks on several ranks. Knows nothing of networks.

topology says where a rank stands, connect joins the ranks, wire carries activations from one to the next, loaders stand
in for the data of later stages, replica lets ranks train the same blocks, failures and watchdog make one rank's failure
everyone's, hidden keeps weights that another rank changes from being read, stage is what one rank has of all this, and
exits is what it leaves to do at the end.
"""

from lightning_dgl.distributed.connect import exchange, init_ranks, open_wires
from lightning_dgl.distributed.failures import RankFailedError
from lightning_dgl.distributed.hidden import hide, show
from lightning_dgl.distributed.loaders import StageLoader, StatefulStageLoader, Token
from lightning_dgl.distributed.replica import Replica
from lightning_dgl.distributed.stage import AGREED, DistributedStage, Report, Stage
from lightning_dgl.distributed.topology import Groups, Topology, blocks_in_words
from lightning_dgl.distributed.watchdog import Process, Watchdog, this_process
from lightning_dgl.distributed.wire import Inbox, Outbox, ReplayInbox

__all__ = [
    "AGREED",
    "DistributedStage",
    "Groups",
    "Inbox",
    "Outbox",
    "Process",
    "RankFailedError",
    "ReplayInbox",
    "Replica",
    "Report",
    "Stage",
    "StageLoader",
    "StatefulStageLoader",
    "Token",
    "Topology",
    "Watchdog",
    "blocks_in_words",
    "exchange",
    "hide",
    "init_ranks",
    "open_wires",
    "show",
    "this_process",
]
