"""Blocks on several ranks come to what one process comes to: the same weights, values and files, bit for bit.

Ranks are forked from the tests' own process, as starting Python with PyTorch takes seconds.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_dgl import DGLModule, DGLStrategy, VectorQuantizer
from lightning_dgl.optim import BlockOptimizer
from tests.conftest import loader, sgd, small_cnn, small_data
from tests.test_checkpoints import ResumableLoader
from tests.test_precision import Shifted, half

MakeTrainer = Callable[..., L.Trainer]
Notes = dict[str, Any]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("a process that has seen a GPU cannot be forked: run these tests with CUDA_VISIBLE_DEVICES=''")
    # One thread each: sums in the same order everywhere, and no thread pool, which would not survive the fork.
    # Lightning sets the number of threads by itself, unless the environment does.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        yield
    torch.set_num_threads(threads)


# One run, and what every rank knows at its end


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


@pytest.fixture
def launch(make_trainer: MakeTrainer, tmp_path: Path) -> Launch:
    """Let a Trainer ``act`` on some ranks; one rank is the test's own process. Keywords are the Trainer's."""
    numbers = itertools.count()

    def launch(
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
        folder = tmp_path / f"run{next(numbers)}"
        folder.mkdir()
        strategy = DGLStrategy(
            codec=codec,
            data_parallel_size=data_parallel_size,
            prefetch=prefetch,
            timeout=60,
            start_method=start_method,
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
            os.environ.pop("MASTER_PORT", None)
            L.seed_everything(3, verbose=False)
            trainer = make_trainer(callbacks=[*callbacks, Note(folder)], **{**defaults, **kwargs})
            return Run(trainer, act(trainer), folder)

    return launch


def make_module(kind: type[DGLModule] = DGLModule, **kwargs: Any) -> DGLModule:
    """Four blocks, with dropout in each."""
    network = small_cnn(dropout=0.2)
    for i in (2, 7, 13):
        network[i] = nn.Sequential(network[i], nn.Dropout(0.2))
    defaults: dict[str, Any] = {"optimizer": sgd, "example_input": (2, 3, 8, 8), "split_at": ["2", "6", "10"]}
    return kind(network, **{**defaults, **kwargs})


def step_lr(optimizer: Optimizer) -> LRScheduler:
    return StepLR(optimizer, step_size=1, gamma=0.5)


def adam(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def differences(a: Any, b: Any, tolerance: float = 0.0, name: str = "") -> list[str]:
    """Where two values differ, through dicts and lists: bit for bit, or by more than ``tolerance`` in a tensor."""
    if isinstance(a, dict) and isinstance(b, dict):
        parts: list[Any] = [(key, a[key], b[key]) for key in a.keys() & b.keys()]
        found = [f"{name}.{key} is in one only" for key in a.keys() ^ b.keys()]
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        parts, found = list(zip(range(len(a)), a, b, strict=True)), []
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=tolerance)
        return [] if same else [f"{name}: {a} and {b}"]
    else:
        return [] if type(a) is type(b) and a == b else [f"{name}: {a!r} and {b!r}"]
    return found + [other for key, x, y in parts for other in differences(x, y, tolerance, f"{name}.{key}")]


def assert_same_outcome(several: Run, one: Run) -> None:
    """Every rank knows at the end what one process knows, and the logger was given the same."""
    (expected,) = one.ranks
    for note in several.ranks:
        for what in ("weights", "metrics", "progress"):
            assert differences(note[what], expected[what]) == []
    assert differences(several.rows, one.rows) == []


# Settings of the Trainer and of the module, each on three ranks and in one process


class Flattening(nn.Module):
    """Images become tokens (N, T, C) half-way, of which the classifier reads the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Conv2d(3, 16, 4, stride=2)
        self.norm = nn.LayerNorm(16)
        self.mix = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.images(x).flatten(2).transpose(1, 2))
        return self.classifier((x + torch.relu(self.mix(x))).mean(dim=1))


def frozen_module() -> DGLModule:
    """Its first three blocks train nothing, neither in the network nor in their heads."""
    module = make_module()
    for j in range(3):
        for p in module.block_parameters(j):
            p.requires_grad_(False)
    return module


class Spoilt(DGLModule):
    """The loss of block 1 is not a number in step 2, that of the last block in step 3."""

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        loss = super().local_loss(block, scores, targets)
        spoilt = self.trainer.training and (block, self.trainer.global_step) in ((1, 2), (3, 3))
        return loss * float("nan") if spoilt else loss


class OneCycle(DGLModule):
    """Its learning-rate schedulers are told how many steps there will be."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, lr_scheduler=self._make_scheduler, **kwargs)

    def _make_scheduler(self, optimizer: Optimizer) -> LRScheduler:
        return OneCycleLR(optimizer, max_lr=0.1, total_steps=int(self.trainer.estimated_stepping_batches))


class LogsBatchNumbers(L.Callback):
    """Leaves it to Lightning to find out the size of a batch."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("number", float(batch_idx), on_step=True, on_epoch=True)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        pl_module.log("val/number", float(batch_idx))


def soft(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, targets = (torch.stack(parts) for parts in zip(*batch, strict=True))
    return inputs, 0.9 * nn.functional.one_hot(targets, 4) + 0.025


class GrowingData(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return loader(24 + 8 * self.trainer.current_epoch, shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(20)


# Made anew for each run: "module" and "data" make these, "proof" tells from the run whether the setting had an effect;
# the rest is for the Trainer.
SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "no validation": lambda: {"data": lambda: (loader(),)},
    "limits": lambda: {
        "limit_train_batches": 3,
        "limit_val_batches": 0.5,
        "proof": lambda run: run.trainer.global_step == 6,
    },
    "fast_dev_run": lambda: {"fast_dev_run": 2},
    "max_steps within an epoch": lambda: {
        "max_epochs": -1,
        "max_steps": 7,
        "proof": lambda run: run.trainer.global_step == 7,
    },
    "max_steps with accumulation": lambda: {
        "max_epochs": -1,
        "max_steps": 4,
        "accumulate_grad_batches": 2,
        "proof": lambda run: run.trainer.global_step == 4,
    },
    "val_check_interval": lambda: {"val_check_interval": 0.4, "proof": lambda run: "val/loss" in run.rows[3]},
    "check_val_every_n_epoch": lambda: {
        "check_val_every_n_epoch": 2,
        "max_epochs": 3,
        "proof": lambda run: [step for step, row in run.rows.items() if "val/loss" in row] == [9],
    },
    "full sanity check": lambda: {"num_sanity_val_steps": -1},
    "no sanity check": lambda: {"num_sanity_val_steps": 0},
    "several validation loaders": lambda: {
        "data": lambda: (loader(shuffle=True), [loader(20), loader(12, 4)]),
        "proof": lambda run: {f"val/acc_ensemble/dataloader_idx_{i}" for i in range(2)} <= run.names,
    },
    "overfit_batches": lambda: {"overfit_batches": 2, "data": lambda: (loader(38), loader(20))},
    "loaders made anew": lambda: {"reload_dataloaders_every_n_epochs": 1, "data": lambda: (GrowingData(),)},
    "loader with workers": lambda: {"data": lambda: (loader(38, shuffle=True, num_workers=1), loader(20))},
    "scheduled accumulation": lambda: {
        "callbacks": [GradientAccumulationScheduler({0: 2, 1: 1})],
        "proof": lambda run: run.trainer.global_step == 8,
    },
    "clipping by value": lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "early stopping": lambda: {
        "callbacks": [EarlyStopping("val/loss", min_delta=0.05, patience=1)],
        "max_epochs": 8,
        "proof": lambda run: 1 < run.trainer.current_epoch < 8,
    },
    "early stopping within an epoch": lambda: {
        "callbacks": [EarlyStopping("val/loss", min_delta=0.05, patience=1)],
        "val_check_interval": 0.4,
        "max_epochs": 8,
        "proof": lambda run: run.trainer.global_step % 5 > 0,
    },
    "early stopping on a training value": lambda: {
        "callbacks": [EarlyStopping("train/loss_block0", min_delta=0.1, patience=0, check_on_train_epoch_end=True)],
        "max_epochs": 8,
        "proof": lambda run: 1 < run.trainer.current_epoch < 8,
    },
    "timer": lambda: {"callbacks": [Timer(duration={"hours": 1})]},  # all ranks meet after each batch
    "a callback that logs": lambda: {
        "callbacks": [LogsBatchNumbers()],
        "proof": lambda run: {"number", "val/number"} <= run.names,
    },
    "plateau": lambda: {
        "module": lambda: make_module(lr_scheduler=lambda own: ReduceLROnPlateau(own, patience=0, threshold=0.03)),
        "callbacks": [LearningRateMonitor()],
        "max_epochs": 4,
        "proof": lambda run: len({tuple(rates(row)) for row in run.rows.values() if len(set(rates(row))) > 1}) > 0,
    },
    "learning rates by step": lambda: {
        "module": lambda: make_module(lr_scheduler=step_lr, lr_interval="step"),
        "callbacks": [LearningRateMonitor("step")],
        "log_every_n_steps": 1,
        "proof": lambda run: rates(run.rows[3]) == ["0.00625"] * 4,
    },
    "learning rates over all steps": lambda: {
        "module": lambda: make_module(OneCycle, lr_interval="step"),
        "callbacks": [LearningRateMonitor("step")],
        "proof": lambda run: float(rates(run.rows[9])[0]) < 1e-4,
    },
    "optimizers of different kinds": lambda: {"module": lambda: make_module(optimizer=[sgd, adam, sgd, adam])},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed": lambda: {"plugins": [half(2.0**16, growth_interval=3)], "gradient_clip_val": 0.5},
    "64-true": lambda: {"precision": "64-true"},
    "channels last": lambda: {"module": lambda: make_module().to(memory_format=torch.channels_last)},
    "soft targets": lambda: {"data": lambda: (loader(collate_fn=soft), loader(collate_fn=soft))},
    "own metrics": lambda: {
        "module": lambda: make_module(
            metrics=MetricCollection({"f1": MulticlassF1Score(4), "top2": MulticlassAccuracy(4, top_k=2)})
        ),
        "proof": lambda run: {"train/f1_block0", "val/top2_ensemble"} <= run.names,
    },
    "tokens": lambda: {
        "module": lambda: DGLModule(
            Flattening(), split_at=["images", "norm"], example_input=(2, 3, 8, 8), head="linear", optimizer=adam
        ),
    },
    "parameters and buffers of the root": lambda: {
        "module": lambda: DGLModule(
            Shifted(), split_at=["first"], example_input=(2, 3, 8, 8), head="linear", optimizer=sgd
        ),
        "num_ranks": 2,
    },
    "frozen blocks": lambda: {"module": frozen_module},
    "skipped blocks": lambda: {
        "module": lambda: make_module(Spoilt, on_nonfinite="skip"),
        "proof": lambda run: (
            [run.trainer.callback_metrics[f"train/skipped_block{j}"] for j in range(4)] == [0, 1, 0, 1]
        ),
    },
}


def rates(row: dict[str, str]) -> list[str]:
    return [value for name, value in sorted(row.items()) if name.startswith("lr/block")]


@pytest.mark.parametrize("settings", SETTINGS)
def test_three_ranks_come_to_what_one_process_comes_to(settings: str, launch: Launch) -> None:
    def run(num_ranks: int) -> tuple[Run, Callable[[Run], bool]]:
        kwargs = SETTINGS[settings]()
        num_ranks = min(num_ranks, kwargs.pop("num_ranks", num_ranks))
        module = kwargs.pop("module", make_module)
        data = kwargs.pop("data", lambda: (loader(38, shuffle=True), loader(20)))
        proof = kwargs.pop("proof", lambda run: run.trainer.global_step > 0)
        return launch(num_ranks, lambda trainer: fit(trainer, module(), data()), **kwargs), proof

    (one, proof), (several, _) = run(1), run(3)
    assert proof(one)
    assert_same_outcome(several, one)


def fit(trainer: L.Trainer, module: DGLModule, data: tuple[Any, ...], **kwargs: Any) -> DGLModule:
    if isinstance(data[0], L.LightningDataModule):
        trainer.fit(module, datamodule=data[0], **kwargs)
    else:
        trainer.fit(module, *data, **kwargs)
    return module


# Any number of ranks


NAMES = {
    f"{phase}/{what}{suffix}"
    for phase in ("train", "val")
    for what in ("loss", "acc")
    for suffix in ("", "_block0", "_block1", "_block2", "_block3")
} | {"val/acc_ensemble"}


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_weights_and_metrics_do_not_depend_on_the_number_of_ranks(num_ranks: int, launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        return launch(
            num_ranks,
            lambda trainer: fit(trainer, make_module(lr_scheduler=step_lr), (loader(38, shuffle=True), loader(20))),
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
        )

    one, several = run(1), run(num_ranks)
    assert_same_outcome(several, one)
    assert len(several.ranks) == num_ranks
    for note in several.ranks:
        assert set(note["metrics"]) == NAMES
    # What the process that started the ranks is left with.
    assert differences(dict(several.result.state_dict()), one.ranks[0]["weights"]) == []
    assert differences(dict(several.trainer.callback_metrics), one.ranks[0]["metrics"]) == []
    # An untrained module has other weights: training has reached every block.
    L.seed_everything(3, verbose=False)
    fresh = make_module().state_dict()
    changed = {name for name, value in several.result.state_dict().items() if not torch.equal(value, fresh[name])}
    assert changed == set(fresh)
    # All blocks' values of a step have arrived at the logger, whichever rank measured them.
    logged = [row for row in several.rows.values() if "train/loss" in row]
    assert len(logged) > 2
    for row in logged:
        assert {name for name in NAMES if name.startswith("train/")} <= row.keys()


def test_ranks_are_spawned(launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        data = (loader(16, shuffle=True), loader(8))
        return launch(num_ranks, lambda trainer: fit(trainer, make_module(), data), start_method="spawn", max_epochs=1)

    assert_same_outcome(run(2), run(1))


class Unlike(L.Callback):
    """Gives every rank but the first other weights, and another random state."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.global_rank > 0:
            torch.manual_seed(100 + trainer.global_rank)
            for p in pl_module.parameters():
                nn.init.normal_(p)


def test_ranks_that_start_unlike_take_after_rank_0(launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        return launch(
            num_ranks, lambda trainer: fit(trainer, make_module(), (loader(), loader(20))), callbacks=[Unlike()]
        )

    assert_same_outcome(run(3), run(1))


# Evaluation


@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_evaluation_returns_what_one_process_returns(verb: str, num_ranks: int, launch: Launch) -> None:
    phase = "val" if verb == "validate" else "test"

    def run(num_ranks: int, data: Any) -> Run:
        return launch(
            num_ranks,
            lambda trainer: getattr(trainer, verb)(make_module(), data, verbose=False),
            limit_val_batches=3,
            limit_test_batches=3,
        )

    for data in (loader(30), [loader(30, 4), loader(20), loader(4)]):
        one, several = run(1, data), run(num_ranks, data)
        assert len(one.result) == (len(data) if isinstance(data, list) else 1)
        assert all(
            f"{phase}/acc_ensemble{'/dataloader_idx_2' * (len(one.result) > 1)}" in names for names in one.result
        )
        assert differences(several.result, one.result) == []
        assert_same_outcome(several, one)


class Keep(BasePredictionWriter):
    """Keeps what a writer of predictions is given."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")
        self.seen: Any = None

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        self.seen = predictions


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_rank_has_all_predictions(num_ranks: int, launch: Launch) -> None:
    def run(num_ranks: int, data: Any) -> list[Notes]:
        def act(trainer: L.Trainer) -> None:
            trainer.predict(make_module(), data, return_predictions=False)

        return launch(num_ranks, act, callbacks=[Keep()], limit_predict_batches=4).ranks

    for data in (loader(30), [loader(30), loader(12, 4)]):
        (one,), several = run(1, data), run(num_ranks, data)
        shapes = [[8, 8, 8, 6], [4, 4, 4]] if isinstance(data, list) else [8, 8, 8, 6]
        assert tree_map(len, one["seen"][0]) == shapes
        assert len(several) == num_ranks
        for note in several:
            assert differences(note["seen"], one["seen"]) == []


def everything(num_ranks: int, folder: Path) -> None:
    """A script that uses one Trainer after another, for all that a Trainer can do."""
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    module = make_module(optimizer=adam)
    data = (loader(38, shuffle=True), loader(20))
    several = [loader(20), loader(12, 4)]

    def make_trainer(max_epochs: int) -> L.Trainer:
        return L.Trainer(
            accelerator="cpu",
            devices=num_ranks,
            strategy=DGLStrategy(timeout=120),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            max_epochs=max_epochs,
            callbacks=[ModelCheckpoint(folder, filename="best", monitor="val/loss", enable_version_counter=False)],
        )

    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, *data)
    trainer.save_checkpoint(folder / "after_fit.ckpt")
    notes: Notes = {"weights": _copied(module), "metrics": _values(trainer)}
    notes["scores"] = module.eval().block_scores(small_data(8).tensors[0])
    module.train()
    notes["validate"] = trainer.validate(module, loader(20), verbose=False)
    notes["test"] = trainer.test(module, several, ckpt_path="best", weights_only=True, verbose=False)
    notes["best weights"] = _copied(module)
    notes["predict"] = trainer.predict(module, loader(20))
    notes["predict several"] = trainer.predict(module, several)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, *data)
    notes["fitted on"] = _copied(module), _values(trainer)

    other, resumed = make_trainer(max_epochs=3), make_module(optimizer=adam)
    other.predict(module, loader(8))
    other.fit(resumed, *data, ckpt_path=folder / "after_fit.ckpt", weights_only=True)
    notes["resumed"] = _copied(resumed), _values(other)
    torch.save(notes, folder / f"rank{trainer.global_rank}.pt")


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _values(trainer: L.Trainer) -> dict[str, Any]:
    return dict(trainer.callback_metrics)


def test_a_script_with_one_trainer_after_another(tmp_path: Path) -> None:
    script = "import sys, pathlib; from tests.test_parallel import everything\n"
    script += "if __name__ == '__main__': everything(int(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for num_ranks in (1, 2):
        (tmp_path / str(num_ranks)).mkdir()
    with mock.patch.dict(os.environ):
        everything(1, tmp_path / "1")
    command = [sys.executable, str(tmp_path / "script.py"), "2", str(tmp_path / "2")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    one = torch.load(tmp_path / "1" / "rank0.pt", weights_only=False)
    assert [len(scores) for scores in one["predict"]] == [8, 8, 4]
    assert [[len(scores) for scores in part] for part in one["predict several"]] == [[8, 8, 4], [4, 4, 4]]
    assert len(one["test"]) == 2
    for rank in range(2):
        note = torch.load(tmp_path / "2" / f"rank{rank}.pt", weights_only=False)
        assert differences(note, one) == []
    for name in ("best.ckpt", "after_fit.ckpt"):
        assert differences(comparable(tmp_path / "2" / name), comparable(tmp_path / "1" / name)) == []


# Checkpoints


def comparable(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, but for where files are."""
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint.get("callbacks", {}).values():
        for name in list(state):
            if "path" in name or name in ("dirpath", "best_k_models"):
                del state[name]
    return checkpoint


class Held(L.Callback):
    """Checks while training that a rank holds the optimizer states of its own blocks only."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, ...]] = set()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._look(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > 0:  # resumed
            self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        optimizer: Any = trainer.optimizers[0]
        assert isinstance(optimizer, BlockOptimizer)
        held = tuple(j for j, own in enumerate(optimizer.optimizers) if len(own.state) > 0)
        self.seen.add(held)
        assert isinstance(trainer.strategy, DGLStrategy)
        assert trainer.strategy.stage is not None
        assert set(held) <= set(trainer.strategy.stage.blocks)


class Best(L.Callback):
    """Remembers which checkpoint is the best."""

    def __init__(self) -> None:
        self.seen: Any = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        keep: Any = trainer.checkpoint_callback
        self.seen = Path(keep.best_model_path).name, keep.best_model_score


# Codecs


CODECS = {
    "half": "half",
    "quantizer": VectorQuantizer(16, 4),
    "one for each boundary": [None, "half", VectorQuantizer(8, 2, num_codebooks=2)],
}


class BytesSent(L.Callback):
    """What this rank has sent when training ends."""

    seen = 0

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        outbox = trainer.strategy.stage.outbox  # type: ignore[attr-defined]
        self.seen = 0 if outbox is None else outbox.bytes_sent


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_codecs_do_the_same_on_any_number_of_ranks(codec: str, num_ranks: int, launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        keep = ModelCheckpoint(save_last=True)

        def act(trainer: L.Trainer) -> None:
            fit(trainer, make_module(), (loader(38, shuffle=True), loader(20)))

        return launch(num_ranks, act, codec=CODECS[codec], callbacks=[keep], enable_checkpointing=True)

    one, several = run(1), run(num_ranks)
    assert_same_outcome(several, one)
    last, expected = (comparable(run.checkpoints["last.ckpt"]) for run in (several, one))
    assert differences(last["lightning_dgl"], expected["lightning_dgl"]) == []


def test_links_carry_what_codecs_make(launch: Launch) -> None:
    def bytes_sent(codec: Any) -> int:
        run = launch(
            2, lambda trainer: fit(trainer, make_module(), (loader(40),)), codec=codec, callbacks=[BytesSent()]
        )
        return int(run.ranks[0]["seen"][0])

    activation, labels, header = 8 * 8 * 64 * 4, 8 * 8, 512
    steps = 2 * 5
    assert bytes_sent(None) == steps * (header + activation + labels)
    assert bytes_sent("half") == steps * (header + activation // 2 + labels)
    assert bytes_sent(VectorQuantizer(16, 4)) == steps * (header + activation // 16 + 16 * 4 * 4 + labels)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("settings", ["32-true", "16-mixed"])
def test_checkpoints_hold_what_one_process_saves(num_ranks: int, settings: str, launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        keep = ModelCheckpoint(monitor="val/acc", mode="max", save_top_k=1, save_last=True)
        kwargs = SETTINGS["16-mixed"]() if settings == "16-mixed" else {}

        def act(trainer: L.Trainer) -> None:
            module = make_module(lr_scheduler=step_lr, optimizer=adam)
            fit(trainer, module, (loader(38, shuffle=True), loader(20)))

        callbacks = [keep, Best(), EarlyStopping("val/loss", patience=10)]
        return launch(num_ranks, act, callbacks=callbacks, max_epochs=4, enable_checkpointing=True, **kwargs)

    one, several = run(1), run(num_ranks)
    assert len(one.checkpoints) == 2
    assert several.checkpoints.keys() == one.checkpoints.keys()
    for name, path in one.checkpoints.items():
        assert differences(comparable(several.checkpoints[name]), comparable(path)) == []
    for note in several.ranks:
        assert differences(note["seen"], one.ranks[0]["seen"]) == []
    # Every block's moments, random stream (block 0 draws from the default one), and scale.
    checkpoint = comparable(several.checkpoints["last.ckpt"])
    for state in checkpoint["optimizer_states"][0]["blocks"]:
        assert len(state["state"]) == len(state["param_groups"][0]["params"])
    assert [state is None for state in checkpoint["lightning_dgl"]["random_state"]["blocks"]] == [True] + [False] * 3
    if settings == "16-mixed":
        assert len({scaler["scale"] for scaler in checkpoint["MixedPrecision"]["blocks"]}) > 1


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("saved_on", "resumed_on", "settings"),
    [(1, 3, "32-true"), (3, 1, "32-true"), (2, 3, "32-true"), (1, 3, "16-mixed"), (4, 2, "16-mixed")],
)
def test_a_run_saved_on_some_ranks_is_resumed_on_others(
    saved_on: int, resumed_on: int, settings: str, launch: Launch
) -> None:
    def run(num_ranks: int, max_epochs: int, ckpt_path: Path | None = None) -> Run:
        keep = ModelCheckpoint(filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        kwargs = SETTINGS["16-mixed"]() if settings == "16-mixed" else {}

        def act(trainer: L.Trainer) -> None:
            torch.manual_seed(3 if ckpt_path is None else 77)  # a resumed run finds everything in the checkpoint
            module = make_module(optimizer=adam, lr_scheduler=step_lr)
            fit(trainer, module, (loader(38, shuffle=True), loader(20)), ckpt_path=ckpt_path, weights_only=True)

        callbacks = [keep, Held()]
        return launch(num_ranks, act, callbacks=callbacks, max_epochs=max_epochs, enable_checkpointing=True, **kwargs)

    whole = run(1, max_epochs=3)
    first = run(saved_on, max_epochs=1)
    resumed = run(resumed_on, max_epochs=3, ckpt_path=first.checkpoints["epoch=0.ckpt"])
    for note in resumed.ranks:
        assert differences(note["weights"], whole.ranks[0]["weights"]) == []
        assert differences(note["metrics"], whole.ranks[0]["metrics"]) == []
    last, expected = (comparable(run.checkpoints["epoch=2.ckpt"]) for run in (resumed, whole))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "lightning_dgl"):
        assert differences(last[part], expected[part]) == []
    assert last.get("MixedPrecision") == expected.get("MixedPrecision")
    # Before and after, each rank has held the optimizer states of its own blocks.
    for run_of_ranks in (first, resumed):
        held = [set().union(*note["seen"][0]) for note in run_of_ranks.ranks]
        assert sorted(block for own in held for block in own) == [0, 1, 2, 3]


@pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:You're resuming from a checkpoint that ended before"
)
@pytest.mark.parametrize("make_loader", [ResumableLoader, lambda: loader(40)], ids=["resumable loader", "plain loader"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_resuming_within_an_epoch(num_ranks: int, make_loader: Callable[[], Any], launch: Launch) -> None:
    def run(num_ranks: int, ckpt_path: Path | None = None) -> Run:
        keep = ModelCheckpoint(filename="{step}", every_n_train_steps=1, save_top_k=-1)

        def act(trainer: L.Trainer) -> None:
            torch.manual_seed(3 if ckpt_path is None else 77)
            fit(trainer, make_module(), (make_loader(),), ckpt_path=ckpt_path, weights_only=True)

        return launch(num_ranks, act, callbacks=[keep], max_epochs=2, enable_checkpointing=True)

    one, several = run(1), run(num_ranks)
    name = "step=7.ckpt"  # of five batches in each epoch
    for name in one.checkpoints:
        assert differences(comparable(several.checkpoints[name]), comparable(one.checkpoints[name])) == []
    continued, expected = run(num_ranks, several.checkpoints[name]), run(1, one.checkpoints[name])
    for note in continued.ranks:
        for what in ("weights", "metrics", "progress"):
            assert differences(note[what], expected.ranks[0][what]) == []
    if make_loader is ResumableLoader:
        assert differences(expected.ranks[0]["weights"], one.ranks[0]["weights"]) == []


# While training


class StopAt(L.Callback):
    """Stops training in the middle of an epoch, on every rank."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


def test_a_callback_may_stop_within_an_epoch(launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        def act(trainer: L.Trainer) -> None:
            fit(trainer, make_module(), (loader(38, shuffle=True), loader(20)))

        return launch(num_ranks, act, callbacks=[StopAt(7)])

    one, several = run(1), run(3)
    assert one.trainer.global_step == 7
    # The log is not compared: Lightning adds a row when training stops, in which most values are of the step before.
    for note in several.ranks:
        for what in ("weights", "metrics", "progress"):
            assert differences(note[what], one.ranks[0][what]) == []


class Caller(L.Callback):
    """Calls the module in the middle of a run, and after it."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._call("train", pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._call("val", pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen["after"] = pl_module.eval()(small_data(4).tensors[0])

    def _call(self, when: str, module: Any) -> None:
        for call in (module, module.block_scores, module.ensemble, lambda x: module(x, block=0)):
            with pytest.raises(RuntimeError) as caught:
                call(small_data(4).tensors[0])
            self.seen.setdefault(when, set()).add(str(caught.value))


def test_the_module_cannot_be_called_while_other_ranks_train_parts_of_it(launch: Launch) -> None:
    run = launch(3, lambda trainer: fit(trainer, make_module(), (loader(16), loader(8))), callbacks=[Caller()])
    module = run.result.eval()
    scores = module(small_data(4).tensors[0])
    blocks = []
    for note in run.ranks:
        (seen,) = note["seen"]
        (message,) = seen["train"]
        assert seen["val"] == {message}
        found = re.fullmatch(
            r"This rank holds only blocks (\[.*\]) of 4 while the Trainer runs, so the module cannot be called. Use "
            r"trainer.validate, test or predict, or call it after fit.",
            message,
        )
        assert found is not None
        blocks += json.loads(found[1])
        assert torch.equal(seen["after"], scores)
    assert blocks == [0, 1, 2, 3]


class Pace(L.Callback):
    """On the last rank, lets the first one run as far ahead as it can, and then sees how far that is."""

    def __init__(self, num_ranks: int, at_least: int) -> None:
        self.started = torch.zeros(num_ranks, dtype=torch.int64).share_memory_()  # batches, by rank
        self.at_least = at_least
        self.seen: list[int] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        rank = trainer.global_rank
        self.started[rank] = batch_idx + 1
        if rank == len(self.started) - 1 and batch_idx in (2, 5):
            deadline = time.monotonic() + 40
            while self.started[0] - self.started[rank] < self.at_least and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.3)  # it may not go on
            self.seen.append(int(self.started[0] - self.started[rank]))


@pytest.mark.parametrize("prefetch", [1, 4])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_stage_runs_ahead_of_the_next_by_a_bounded_number_of_batches(
    num_ranks: int, prefetch: int, launch: Launch
) -> None:
    links = num_ranks - 1
    pace = Pace(num_ranks, at_least=links * (prefetch + 1))

    def act(trainer: L.Trainer) -> None:
        fit(trainer, make_module(), (loader(200),))

    run = launch(num_ranks, act, prefetch=prefetch, max_epochs=1, callbacks=[pace])
    (ahead,) = run.ranks[-1]["seen"]
    # On each link, batches wait in the receiver's queue; one each waits in the sender's queue and in either thread, and
    # one is being worked on.
    assert len(ahead) == 2
    for batches in ahead:
        assert links * (prefetch + 1) <= batches <= links * (prefetch + 4)


# Hooks on batches


class Doubling:
    """Hooks on batches, of a module or of a data module."""

    calls: list[str]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("before")
        return [batch[0] + 1, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("after")
        return [2 * batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]]


class DoublingModule(Doubling, DGLModule):
    pass


class DoublingData(Doubling, L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(38, shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(20)


class Calls(L.Callback):
    """Notes how often hooks on batches were called on this rank."""

    def __init__(self) -> None:
        self.seen: Any = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        hooked = pl_module if isinstance(pl_module, Doubling) else trainer.datamodule  # type: ignore[attr-defined]
        self.seen = {name: hooked.calls.count(name) for name in ("before", "after")}


@pytest.mark.parametrize("owner", ["module", "data module"])
def test_hooks_on_batches_run_once_for_each_batch(owner: str, launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        def act(trainer: L.Trainer) -> None:
            module, data = make_module(DoublingModule if owner == "module" else DGLModule), DoublingData()
            for hooked in (module, data):
                hooked.calls = []
            fit(trainer, module, (data,) if owner == "data module" else (loader(38, shuffle=True), loader(20)))

        return launch(num_ranks, act, callbacks=[Calls()], num_sanity_val_steps=0)

    one, several = run(1), run(3)
    assert_same_outcome(several, one)
    times = 2 * (5 + 3)
    assert [note["seen"] for note in several.ranks] == [
        [{"before": times, "after": times}],
        *2 * [[{"before": 0, "after": 0}]],
    ]
    plain = launch(1, lambda trainer: fit(trainer, make_module(), (loader(38, shuffle=True), loader(20))))
    assert differences(plain.ranks[0]["weights"], one.ranks[0]["weights"]) != []


# Data parallelism


def plain_cnn() -> nn.Sequential:
    """Three convolutions without BatchNorm, so that a batch may be dealt to replicas; cut after "1" and "4"."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


def flat_head(channels: int, spatial_size: Any, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * spatial_size**2, num_classes))


def make_plain_module(kind: type[DGLModule] = DGLModule, **kwargs: Any) -> DGLModule:
    defaults: dict[str, Any] = {"optimizer": sgd, "lr_scheduler": step_lr, "head": ["linear", flat_head]}
    return kind(plain_cnn(), split_at=["1", "4"], example_input=(2, 3, 8, 8), **{**defaults, **kwargs})


class OwnBlocks(L.Callback):
    """Remembers this rank's own blocks as they are before ranks exchange them."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Tensor]] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert isinstance(trainer.strategy, DGLStrategy)
        assert trainer.strategy.stage is not None
        self.seen = {j: [t.detach().clone() for t in pl_module.block_tensors(j)] for j in trainer.strategy.stage.blocks}


def assert_replicas_are_equal(run: Run, num_replicas: int) -> None:
    blocks = [note["seen"][0] for note in run.ranks]
    num_stages = len(blocks) // num_replicas
    assert sorted(j for own in blocks[:num_stages] for j in own) == [0, 1, 2]
    for rank in range(num_stages, len(blocks)):
        assert differences(blocks[rank], blocks[rank % num_stages]) == []


class DealtData(L.LightningDataModule):
    """Deals sample i to replica i % R in order, so that R batches hold the same samples as a joint one.

    Left to itself, Lightning shuffles what it deals out for training.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        data = small_data(48)
        sampler = DistributedSampler(data, shuffle=False, **self.trainer.distributed_sampler_kwargs)
        return DataLoader(data, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> Any:
        return loader(32, self.batch_size)


@pytest.mark.parametrize("num_ranks", [2, 4, 6])
def test_replicas_equal_one_process_with_the_joint_batch(num_ranks: int, launch: Launch) -> None:
    def run(num_ranks: int, batch_size: int) -> Run:
        def act(trainer: L.Trainer) -> DGLModule:
            return fit(trainer, make_plain_module(), (DealtData(batch_size),))

        keep = ModelCheckpoint(filename="last")
        return launch(
            num_ranks,
            act,
            data_parallel_size=min(num_ranks, 2),
            callbacks=[keep, OwnBlocks()],
            enable_checkpointing=True,
            accumulate_grad_batches=2,
            gradient_clip_val=0.3,
        )

    one, several = run(1, batch_size=8), run(num_ranks, batch_size=4)
    (expected,) = one.ranks
    assert len(several.ranks) == num_ranks
    for note in several.ranks:
        assert note["progress"] == expected["progress"] == (6, 2)
        assert differences(note["weights"], expected["weights"], tolerance=1e-6) == []
        assert differences(note["weights"], several.ranks[0]["weights"]) == []
        assert note["metrics"].keys() == expected["metrics"].keys()
        for name in (name for name in expected["metrics"] if name.startswith("val/")):
            assert differences(note["metrics"][name], expected["metrics"][name], tolerance=1e-6) == []
            assert differences(note["metrics"][name], several.ranks[0]["metrics"][name]) == []
    assert_replicas_are_equal(several, num_replicas=2)
    saved, expected_file = (comparable(run.checkpoints["last.ckpt"]) for run in (several, one))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert differences(saved[part], expected_file[part], tolerance=1e-6) == []


class Samples(L.Callback):
    """Remembers which samples this rank reads, by epoch; on later stages, nothing."""

    def __init__(self) -> None:
        self.known = {round(float(x.sum()), 3): i for i, x in enumerate(small_data(24).tensors[0])}
        self.seen: dict[int, list[int]] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, (list, tuple)):
            samples = [self.known[round(float(x.sum()), 3)] for x in batch[0]]
            self.seen.setdefault(trainer.current_epoch, []).extend(samples)


def test_replicas_share_the_data_anew_in_each_epoch(launch: Launch) -> None:
    run = launch(
        4,
        lambda trainer: fit(trainer, make_plain_module(), (loader(24, 4, shuffle=True),)),
        data_parallel_size=2,
        callbacks=[Samples()],
    )
    first, later, second, later_too = (note["seen"][0] for note in run.ranks)
    assert later == later_too == {}
    for epoch in range(2):
        assert sorted(first[epoch] + second[epoch]) == list(range(24))
    assert first[0] != first[1]
    assert sorted(first[0]) != sorted(first[1])


def test_replicas_predict_their_shares(launch: Launch) -> None:
    def run(num_ranks: int) -> list[Notes]:
        def act(trainer: L.Trainer) -> None:
            trainer.predict(make_plain_module(), loader(24, 4), return_predictions=False)

        return launch(num_ranks, act, data_parallel_size=min(num_ranks, 2), callbacks=[Keep()]).ranks

    (one,), several = run(1), run(4)
    scores = torch.cat(one["seen"][0])
    for rank, note in enumerate(several):
        torch.testing.assert_close(torch.cat(note["seen"][0]), scores[rank // 2 :: 2])


class SpoiltOnOneReplica(DGLModule):
    """On the second replica, the loss of block 0 is not a number in step 1, that of the last block in step 2."""

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        loss = super().local_loss(block, scores, targets)
        is_second = self.trainer.global_rank >= self.trainer.world_size // 2
        spoilt = self.trainer.training and (block, self.trainer.global_step) in ((0, 1), (2, 2))
        return loss * float("nan") if is_second and spoilt else loss


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_replica_may_skip_what_the_others_do_not(num_ranks: int, launch: Launch) -> None:
    def act(trainer: L.Trainer) -> DGLModule:
        return fit(trainer, make_plain_module(SpoiltOnOneReplica, on_nonfinite="skip"), (loader(48, 4), loader(16, 4)))

    run = launch(num_ranks, act, data_parallel_size=2, callbacks=[OwnBlocks()])
    assert run.ranks[0]["progress"] == (12, 2)
    assert all(value.isfinite().all() for value in run.result.state_dict().values())
    assert_replicas_are_equal(run, num_replicas=2)
    undisturbed = launch(
        num_ranks, lambda trainer: fit(trainer, make_plain_module(), (loader(48, 4),)), data_parallel_size=2
    )
    assert differences(undisturbed.ranks[0]["weights"], run.ranks[0]["weights"]) != []
