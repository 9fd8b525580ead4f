"""How a test lets a Trainer act on several ranks, and what is left of such a run.

Ranks are forked from the tests' own process, as starting Python with PyTorch takes seconds.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import CSVLogger

from lightning_dgl import DGLModule, DGLStrategy
from tests.distributed.jobs import free_port
from tests.runs import differences, half, make_module, quiet_trainer

Notes = dict[str, Any]


class Note(L.Callback):
    """Writes down on every rank what it knows at the end, with the ``seen`` of every callback that has one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        note = {
            "weights": dict(pl_module.state_dict()),
            "metrics": dict(trainer.callback_metrics),
            "progress": (trainer.global_step, trainer.current_epoch),
            "seen": [callback.seen for callback in callbacks if hasattr(callback, "seen")],
        }
        torch.save(note, self.folder / f"rank{trainer.global_rank}.pt")


@dataclass
class Run:
    """What is left of a run.

    Attributes:
        trainer: as it is in the process that started the ranks.
        result: what the Trainer returned there.
        folder: where everything was written.
    """

    trainer: L.Trainer
    result: Any
    folder: Path

    @property
    def ranks(self) -> list[Notes]:
        """What each rank has written down."""
        return [
            torch.load(self.folder / f"rank{rank}.pt", weights_only=False)
            for rank in range(len(list(self.folder.glob("rank*.pt"))))
        ]

    @property
    def rows(self) -> dict[int, dict[str, str]]:
        """What the CSVLogger has written, by step: later stages' values come in rows of their own."""
        rows: dict[int, dict[str, str]] = {}
        path = self.folder / "csv" / "version_0" / "metrics.csv"
        for row in csv.DictReader(path.read_text().splitlines() if path.exists() else []):
            step = rows.setdefault(int(row.pop("step")), {})
            for name, value in row.items():
                if value:
                    assert step.get(name, value) == value, f"{name} has two values"
                    step[name] = value
        return rows

    @property
    def names(self) -> set[str]:
        """Of all values that callbacks can read."""
        return set(self.trainer.callback_metrics)

    @property
    def checkpoints(self) -> dict[str, Path]:
        """The checkpoints that were written, by name."""
        return {path.name: path for path in self.folder.rglob("*.ckpt")}


Launch = Callable[..., Run]

dropout_module = partial(make_module, dropout=0.2)
"""Makes a module every block of which draws random numbers."""


def scaled() -> dict[str, Any]:
    """Make the Trainer's arguments for float16, with scales that change within a short training."""
    return {"plugins": [half(2.0**16, growth_interval=3)], "gradient_clip_val": 0.5}


def launch(
    folder: Path,
    num_ranks: int,
    act: Callable[[L.Trainer], Any],
    *,
    data_parallel_size: int = 1,
    prefetch: int = 2,
    codec: Any = None,
    start_method: Literal["fork", "spawn"] = "fork",
    callbacks: Iterable[L.Callback] = (),
    **kwargs: Any,
) -> Run:
    """Let a Trainer ``act`` on some ranks; one rank is the test's own process. Further keywords are the Trainer's."""
    folder.mkdir()
    strategy = DGLStrategy(
        codec=codec, data_parallel_size=data_parallel_size, prefetch=prefetch, timeout=60, start_method=start_method
    )
    defaults: dict[str, Any] = {
        "strategy": strategy if num_ranks > 1 else DGLStrategy(codec=codec),
        "devices": num_ranks,
        "max_epochs": 2,
        "logger": CSVLogger(folder, name="csv", version=0),
        "log_every_n_steps": 2,
        "default_root_dir": folder,
    }
    # Lightning keeps the seed, and the port where ranks meet, in the environment: a new port for each run.
    with mock.patch.dict(os.environ):
        os.environ["MASTER_PORT"] = str(free_port())
        L.seed_everything(3, verbose=False)
        trainer = quiet_trainer(callbacks=[*callbacks, Note(folder)], **{**defaults, **kwargs})
        return Run(trainer, act(trainer), folder)


def assert_same_outcome(several: Run, one: Run) -> None:
    """Every rank knows at the end what one process knows, and the logger was given the same."""
    (expected,) = one.ranks
    for note in several.ranks:
        for what in ("weights", "metrics", "progress"):
            assert differences(note[what], expected[what]) == []
    assert differences(several.rows, one.rows) == []


def comparable(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, but for where files are."""
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint.get("callbacks", {}).values():
        for name in list(state):
            if "path" in name or name in ("dirpath", "best_k_models"):
                del state[name]
    return checkpoint


def fit(trainer: L.Trainer, module: DGLModule, data: tuple[Any, ...], **kwargs: Any) -> DGLModule:
    if isinstance(data[0], L.LightningDataModule):
        trainer.fit(module, datamodule=data[0], **kwargs)
    else:
        trainer.fit(module, *data, **kwargs)
    return module


class Keep(BasePredictionWriter):
    """Keeps what a writer of predictions is given."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")
        self.seen: Any = None

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        self.seen = predictions
