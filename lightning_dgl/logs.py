"""Logging: which values are logged when, and how those of later stages reach the loggers of rank 0."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_dgl.distributed import Report
from lightning_dgl.lightning_internals import logged_in_steps
from lightning_dgl.metrics import is_headline
from lightning_dgl.run import Run
from lightning_dgl.training import LocalStep


def log_step(module: LightningModule, run: Run, batch_idx: int, steps: Mapping[int, LocalStep]) -> None:
    """Log the values of one training batch.

    Taking every block's values costs time, so it is done only where something reads them: a logger, or a callback that
    may act on them after any step. The last block's loss is logged in every step.
    """
    trainer, last_block = module.trainer, len(run.links) - 2
    shown: dict[str, Tensor] = {}
    if takes_all := _takes_all_values(trainer):
        shown = run.metrics.of("train").batch_values({j: (s.loss, s.scores, s.targets) for j, s in steps.items()})
        shown |= {f"skipped_block{j}": torch.tensor(float(n)) for j, n in run.num_skipped.items() if j in steps}
    elif last_block in steps:
        shown["loss"] = steps[last_block].loss
    if run.stage.is_split:
        run.latest |= shown
        is_due = updates_after(trainer, batch_idx) and loggers_are_due(trainer, trainer.global_step + 1)
        if takes_all and not run.stage.is_first and is_due:
            numbers = {f"train/{name}": float(value) for name, value in shown.items()}
            run.stage.report(Report(trainer.global_step, numbers | {"epoch": trainer.current_epoch}))
    if shown:
        batch_size = len(next(iter(steps.values())).targets)
        log_values(module, "train", shown, on_step=True, on_epoch=False, batch_size=batch_size)
    for name, value in log_reports(trainer, run, before=trainer.global_step).items():
        if name != "epoch":
            module.log(name, value, prog_bar=is_headline(name), logger=False, on_step=True, on_epoch=False)


def log_values(module: LightningModule, phase: str, values: Mapping[str, Tensor], **how: Any) -> None:
    """Log values under the name of their phase; those of the last block go to the progress bar."""
    for name, value in values.items():
        # Where there are several data loaders, the number of one is in the name already.
        module.log(f"{phase}/{name}", value, prog_bar=is_headline(name), add_dataloader_idx=False, **how)


def log_epoch(module: LightningModule, run: Run, phase: str, values: Mapping[str, Tensor], **how: Any) -> None:
    """Log the values of an epoch, which all ranks have agreed on."""
    with warnings.catch_warnings():
        # Lightning cannot know of the agreement where it does not deal out the data, and advises to reduce each value.
        for name in values if run.stage.is_open else ():
            text = re.escape(f"It is recommended to use `self.log('{phase}/{name}', ..., sync_dist=True)`")
            warnings.filterwarnings("ignore", text)
        # An epoch that ends within a batch leaves one, whose size Lightning would look for.
        log_values(module, phase, values, batch_size=1, **run.stage.log_options, **how)
        module.trainer.callback_metrics  # noqa: B018 (computes the values, while the advice is suppressed)


def log_reports(trainer: Trainer, run: Run, before: float = float("inf")) -> dict[str, float]:
    """Log what later stages have reported, under the step at which they measured it; return the latest of it.

    Args:
        trainer: that runs.
        run: of this rank.
        before: leave reports of this step and later ones: what rank 0 logs in these steps itself is not known yet.
    """
    latest: dict[str, float] = {}
    for report in run.stage.reports(before):
        # What rank 0 logs itself under the same name counts.
        own = {name for name, item in logged_in_steps(trainer, on_step=True).items() if item.for_loggers}
        values = {name: value for name, value in report.values.items() if name == "epoch" or name not in own}
        trainer.logged_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, report.step)
            logger.save()
        latest |= values
    run.from_reports |= latest.keys()
    return latest


def updates_after(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether optimizers step after a batch, or gradients of further batches are added first."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def loggers_are_due(trainer: Trainer, num_steps: int) -> bool:
    """Return whether Lightning gives loggers what is logged in the last of ``num_steps`` steps."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (num_steps % every == 0 or trainer.should_stop)


def _takes_all_values(trainer: Trainer) -> bool:
    is_last = trainer.is_last_batch or trainer.global_step + 1 == trainer.max_steps
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    monitored = [getattr(callback, "monitor", None) for callback in callbacks]
    return (
        loggers_are_due(trainer, trainer.global_step + 1)
        or is_last
        or trainer.global_step == 0
        or any(isinstance(name, str) and name.startswith("train/") and name != "train/loss" for name in monitored)
    )
