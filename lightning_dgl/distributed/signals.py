"""The places where Lightning's own way of ending ranks does not fit ranks that are not in lock-step.

All are private to Lightning; ``tests/test_parallel_failures.py`` notices if one is renamed.
"""

from __future__ import annotations

import threading
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn


def take_over(trainer: Trainer) -> None:
    """Replace them on ``trainer``; the watchdog does what they are for."""
    # Before every batch, Lightning broadcasts whether rank 0 was told to terminate: no rank could be ahead of another.
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    _replace(epoch_loop, "_broadcast_sigterm_tensor", lambda: None)

    # Its SIGTERM handler broadcasts, too, and waits for ever for ranks that have ended.
    connector: Any = trainer._signal_connector

    def on_sigterm(signum: int, _: FrameType | None) -> None:
        if not connector.received_sigterm and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)  # type: ignore[arg-type]
        connector.received_sigterm = True

    _replace(connector, "_sigterm_notifier_fn", on_sigterm)

    # On a signal from SLURM, it saves a checkpoint wherever each rank happens to be: blocks of different steps.
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        _replace(connector, "_slurm_sigusr_handler_fn", _on_requeue)
        rank_zero_warn(
            "Several ranks cannot save a checkpoint between steps, so SLURM's requeue signal is not acted upon. Save "
            "with ModelCheckpoint(save_last=True) and resume with trainer.fit(..., ckpt_path='last')."
        )

    # Within five seconds of a child's end, it kills this process before it can say what has happened.
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            _replace(thread, "_child_processes", [])


def _on_requeue(signum: int, _: FrameType | None) -> None:
    rank_zero_warn("SLURM's requeue signal is not acted upon: resume from the last checkpoint that was saved.")


def _replace(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        raise RuntimeError(
            f"This version of Lightning has no {type(owner).__name__}.{name}, which DGLStrategy replaces. Install a "
            "version that lightning-dgl supports."
        )
    setattr(owner, name, value)
