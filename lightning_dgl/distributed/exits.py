"""What a rank leaves to do for the moment when Python shuts down."""

from __future__ import annotations

import atexit
import signal

import torch.distributed as dist

from lightning_dgl.distributed.failures import GRACE

_outcomes: set[str] = set()


def after_success() -> None:
    """Let the exit destroy the process groups, without which NCCL complains."""
    _outcomes.add("success")


def after_failure() -> None:
    """Let the system end this process if the exit takes too long.

    Process groups are not destroyed then: they may wait without end for ranks that are gone, and so may what Python
    itself destroys, while no other thread can run.
    """
    _outcomes.add("failure")


@atexit.register  # when this module is imported: it runs after what is registered later, such as the ends of loggers
def _exit() -> None:
    if "failure" in _outcomes:
        if hasattr(signal, "alarm"):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(GRACE))
    elif "success" in _outcomes and dist.is_initialized():
        dist.destroy_process_group()
