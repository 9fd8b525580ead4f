"""What users log on several ranks: the loggers of rank 0 get it, and callbacks on all ranks read the same values.

Each rank logs for its own blocks: ``self.log`` in ``local_loss`` is called for block 1 on the rank that trains block 1.
Nothing is exchanged within training steps, because ranks are at different batches. What a later stage has logged in a
step goes to rank 0 as a report. At the end of a validation or an epoch, all ranks exchange what they know; with the
next training step they forget what others had logged in training, as it is old then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_dgl.distributed import Report
from lightning_dgl.lightning_internals import Logged, logged_in_steps, logged_values, replace_logged
from lightning_dgl.logs import loggers_are_due, updates_after
from lightning_dgl.run import Run

_REDUCTIONS: dict[str, Any] = {
    "mean": torch.mean,
    "avg": torch.mean,
    "sum": torch.sum,
    "min": torch.min,
    "max": torch.max,
}


def log_arguments(run: Run, name: str, value: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for ``LightningModule.log``, with which it does not wait for other stages."""
    if not run.stage.is_split or arguments.get("sync_dist_group") is not None:
        return dict(arguments)
    if isinstance(value, Metric):
        run.stage.synchronise(nn.ModuleList([value]))
    reduces = bool(arguments.get("sync_dist"))
    if reduces:
        reduction = arguments.get("reduce_fx", "mean")
        run.reductions[name] = str(getattr(reduction, "__name__", reduction)).lower()
    return {**arguments, **run.stage.log_options_of_step(reduces)}


def note_step(trainer: Trainer, run: Run, batch_idx: int) -> None:
    """Note that loggers are due after this batch; what callbacks and hooks log at its end is not known yet."""
    is_due = loggers_are_due(trainer, trainer.global_step) and updates_after(trainer, batch_idx)
    if is_due and run.stage.is_split and not trainer.is_global_zero:
        run.unreported = trainer.global_step - 1


def report_step(trainer: Trainer, run: Run) -> None:
    """Send to rank 0 what users have logged in the step that was noted last."""
    if run.unreported is None:
        return
    step, run.unreported = run.unreported, None
    own = {f"train/{name}" for name in run.latest}
    logged = logged_in_steps(trainer, on_step=True)
    values = {name: float(item.value) for name, item in logged.items() if item.for_loggers and name not in own}
    if values:
        run.stage.report(Report(step, values | {"epoch": trainer.current_epoch}))


class _Known(NamedTuple):
    """What a rank knows, and tells the others.

    Attributes:
        logged: what users have logged there.
        latest: the newest training values of its blocks.
        reductions: how values that users log are reduced over ranks.
        of_steps: the names of those values that are of a single training step.
    """

    logged: dict[str, Logged]
    latest: dict[str, Tensor]
    reductions: dict[str, str]
    of_steps: set[str]


def _known_here(trainer: Trainer, run: Run, training: bool) -> _Known:
    steps = {name: item._replace(for_loggers=False) for name, item in logged_in_steps(trainer, on_step=True).items()}
    logged = steps | (logged_in_steps(trainer, on_step=False) if training else logged_values(trainer))
    logged = {name: item for name, item in logged.items() if name not in run.from_reports}
    latest = {f"train/{name}": value.cpu() for name, value in run.latest.items()}
    of_steps = latest.keys() | (steps.keys() & logged.keys() if training else set())
    return _Known(logged, latest, run.reductions, of_steps)


def forget(trainer: Trainer, run: Run) -> None:
    """Let callbacks no longer read the training values that other ranks had logged when they were shared.

    Only the values of single steps: they are old after the next one. A callback that goes by one of them misses it
    then.
    """
    for name in run.from_others:
        trainer.callback_metrics.pop(name, None)
    run.from_others.clear()


def share(trainer: Trainer, module: LightningModule, run: Run, *, training: bool) -> None:
    """Let callbacks on all ranks read what any rank has logged; all ranks must call it.

    Where several ranks have logged a value, that of the first counts, as in one process; with ``sync_dist=True`` they
    are reduced.

    Args:
        trainer: that runs.
        module: that is trained.
        run: of this rank.
        training: whether an epoch of training ends, rather than of an evaluation.
    """
    if not run.stage.is_split or trainer.barebones:  # which logs nothing
        return
    mine = _known_here(trainer, run, training)
    parts = run.stage.gather(mine)[: len(run.stage.assignment)]
    merged: dict[str, Logged] = {}
    for part in reversed(parts):
        merged |= part.logged
    reductions = {name: how for part in parts for name, how in part.reductions.items()}
    values = {name: item.value for name, item in merged.items()}
    for name, how in reductions.items():
        found = [part.logged[name].value.float() for part in parts if name in part.logged]
        if found:
            values[name] = _REDUCTIONS[how](torch.stack(found))
    for part in parts:
        values |= part.latest
        run.from_others |= part.of_steps - mine.of_steps
    values = {name: value.to(module.device) for name, value in values.items()}
    trainer.callback_metrics.update(values)
    replace_logged(trainer, values)
    if trainer.is_global_zero and not trainer.sanity_checking:
        of_others = [name for name, item in merged.items() if item.for_loggers and name not in mine.logged]
        step = trainer.global_step - (1 if trainer.state.fn == "fit" else 0)
        for logger in trainer.loggers if of_others else ():
            numbers = {name: float(values[name]) for name in of_others}
            logger.log_metrics(numbers | {"epoch": trainer.current_epoch}, step)
            logger.save()
