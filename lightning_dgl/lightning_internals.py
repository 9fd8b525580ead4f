"""Every private name of Lightning that the package uses, in one place.

``tests/test_lightning_internals.py`` tries each of them and says which one a new version of Lightning has changed. The
private methods that classes of this package override are in ``OVERRIDDEN``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver as ChildProcessObserver
from lightning.fabric.utilities.distributed import _init_dist_connection as init_process_group
from lightning.fabric.utilities.distributed import _sync_ddp_if_available as reduce_tensor
from lightning.fabric.utilities.seed import _collect_rng_states as collect_random_states
from lightning.fabric.utilities.seed import _set_rng_states as set_random_states
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as MultiProcessingLauncher
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as SubprocessScriptLauncher
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

__all__ = [
    "OVERRIDDEN",
    "Logged",
    "MultiProcessingLauncher",
    "SubprocessScriptLauncher",
    "collect_random_states",
    "do_not_log_hparams",
    "init_process_group",
    "logged_in_steps",
    "logged_values",
    "reduce_tensor",
    "replace_logged",
    "saves_within_epochs",
    "set_batch_size",
    "set_predictions",
    "set_random_states",
    "skips_backward",
    "synchronises_batchnorm",
    "take_over",
    "validates_by_the_clock",
]

OVERRIDDEN: dict[type, Sequence[str]] = {
    LightningModule: ("_on_before_batch_transfer",),
    Strategy: ("_setup_model",),
    ParallelStrategy: ("_configure_launcher",),
    MultiProcessingLauncher: ("_wrapping_function",),
}
"""Private methods that this package overrides, by Lightning's class."""


def skips_backward(trainer: Trainer) -> bool:
    """Return whether Lightning runs forward passes only, as StochasticWeightAveraging does for BatchNorm."""
    return trainer.fit_loop._skip_backward


def set_batch_size(trainer: Trainer, batch_size: int) -> None:
    """Tell Lightning the size of a batch, by which it weights logged values, where it cannot see the data."""
    results = trainer._results
    if results is not None:
        results.batch_size = batch_size


class Logged(NamedTuple):
    """A value that was logged, and whether loggers get it."""

    value: Tensor
    for_loggers: bool


def logged_in_steps(trainer: Trainer, on_step: bool) -> dict[str, Logged]:
    """Return what was logged in training steps since the epoch began: the last step's values, or the epoch's."""
    return _logged(trainer.fit_loop.epoch_loop._results, on_step)


def logged_values(trainer: Trainer) -> dict[str, Logged]:
    """Return what was logged for this epoch of training or evaluation, over its data loaders."""
    return {} if trainer._results is None else _logged(trainer._results, on_step=False)


def _logged(results: Any, on_step: bool) -> dict[str, Logged]:
    found = {}
    for item in results.values():
        value = None if item.has_reset else results._get_cache(item, on_step)
        if isinstance(value, Tensor):
            name, forked_name = results._forked_name(item, on_step)
            found[name] = Logged(value.detach().cpu(), for_loggers=False)
            found[forked_name] = Logged(value.detach().cpu(), for_loggers=item.meta.logger)
    return found


def replace_logged(trainer: Trainer, values: Mapping[str, Tensor]) -> None:
    """Let Lightning take these values at the end of an epoch, instead of what was logged in this process."""
    results: Any = trainer._results
    for item in [] if results is None else results.values():
        name = results._forked_name(item, False)[1]
        if not item.has_reset and item.is_tensor and item.meta.on_epoch and name in values:
            item._computed = values[name]


def set_predictions(trainer: Trainer, predictions: Sequence[tuple[int, Any]]) -> None:
    """Put ``predictions``, by data loader, in place of those that Lightning has collected."""
    collected = trainer.predict_loop._predictions
    for seen in collected:
        seen.clear()
    for dataloader_idx, scores in predictions:
        collected[dataloader_idx].append(scores)


def saves_within_epochs(callback: ModelCheckpoint) -> str | None:
    """Return the argument by which a ModelCheckpoint saves after training steps; None if it goes by epochs."""
    if steps := callback._every_n_train_steps:
        return f"every_n_train_steps={steps}"
    return None if callback._train_time_interval is None else f"train_time_interval={callback._train_time_interval!r}"


def do_not_log_hparams(module: LightningModule, names: Iterable[str]) -> None:
    """Keep hyperparameters of ``module`` out of what loggers are given; checkpoints hold them all the same."""
    initial: Any = getattr(module, "_hparams_initial", {})
    for name in names:
        initial.pop(name, None)


def validates_by_the_clock(trainer: Trainer) -> bool:
    """Return whether ``Trainer(val_check_interval=...)`` is a time."""
    interval: float | None = trainer._val_check_time_interval  # type: ignore[attr-defined]
    return interval is not None


def synchronises_batchnorm(trainer: Trainer) -> bool:
    """Return whether ``Trainer(sync_batchnorm=True)`` was passed."""
    strategy: Any = trainer.strategy
    return strategy._layer_sync is not None


def take_over(trainer: Trainer, environment: ClusterEnvironment | None) -> None:
    """Replace Lightning's way of ending ranks where it does not fit ranks that are not in lock-step.

    The watchdog does what the replaced parts are for.
    """
    # Before every batch, Lightning broadcasts whether rank 0 was told to terminate: no rank could be ahead of another.
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    _replace(epoch_loop, "_broadcast_sigterm_tensor", lambda: None)

    # Its SIGTERM handler broadcasts, too, and waits without end for ranks that have ended.
    connector: Any = trainer._signal_connector

    def on_sigterm(signum: int, _: FrameType | None) -> None:
        if not connector.received_sigterm and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)  # type: ignore[arg-type]
        connector.received_sigterm = True

    _replace(connector, "_sigterm_notifier_fn", on_sigterm)

    # On a signal from SLURM, it saves a checkpoint wherever each rank happens to be: blocks of different steps.
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        _replace(connector, "_slurm_sigusr_handler_fn", _on_requeue)
        rank_zero_warn(
            "Several ranks cannot save a checkpoint between steps, so SLURM's requeue signal is not acted upon. Save "
            "with ModelCheckpoint(save_last=True) and resume with trainer.fit(..., ckpt_path='last')."
        )

    # Within five seconds of a child's end, it kills this process before it can say what has happened.
    for thread in threading.enumerate():
        if isinstance(thread, ChildProcessObserver):
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
