"""Every argument of the Trainer has its effect on one rank, with the synchronous and the asynchronous schedule."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import RandomSampler

from lightning_dgl import BlockSummary, DGLStrategy
from tests.runs import MakeTrainer, half, loader, make_module

BATCHES = 3


class Data(L.LightningDataModule):
    """Three batches for each phase."""

    num_requests = 0

    def train_dataloader(self) -> Any:
        self.num_requests += 1
        return loader(12, 4, shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(12, 4)

    test_dataloader = predict_dataloader = val_dataloader


class Witness(L.Callback):
    """Counts what happens, and sees what holds in the meantime; may ask to stop after the first batch."""

    def __init__(self, stops: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self.stops = stops
        self.saw: dict[str, bool] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.saw["anomaly"] = torch.is_anomaly_enabled()
        self.saw["deterministic"] = torch.are_deterministic_algorithms_enabled()
        self.saw["benchmark"] = torch.backends.cudnn.benchmark

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.counts["batches"] += 1
        trainer.should_stop |= self.stops

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.counts["sanity" if trainer.sanity_checking else "validated"] += 1
        self.saw["inference"] = torch.is_inference_mode_enabled()

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.counts["validations"] += not trainer.sanity_checking

    def on_test_batch_end(self, *_: Any) -> None:
        self.counts["tested"] += 1


class Outcome:
    """A training, and what is to be seen of it."""

    def __init__(self, trainer: L.Trainer, witness: Witness, folder: Path, printed: Callable[[], str]) -> None:
        self.trainer, self.witness, self.folder = trainer, witness, folder
        self.counts, self.saw, self._printed = witness.counts, witness.saw, printed
        self.module, self.data = make_module(2, optimizer=lambda params: torch.optim.SGD(params, lr=0.1)), Data()
        self.before = [p.detach().clone() for p in self.module.parameters()]
        trainer.fit(self.module, datamodule=self.data)

    @property
    def printed(self) -> str:
        return self._printed()

    @property
    def steps(self) -> int:
        return self.trainer.global_step

    @property
    def change(self) -> float:
        """By how much a parameter has changed at most."""
        pairs = zip(self.before, self.module.parameters(), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)

    def files(self, pattern: str) -> list[Path]:
        return list(self.folder.rglob(pattern))

    def rows(self) -> list[str]:
        """The steps for which the logger has training losses of block 0."""
        lines = [line.split(",") for line in self.files("metrics.csv")[0].read_text().splitlines()]
        column = lines[0].index("train/loss_block0")
        return [line[lines[0].index("step")] for line in lines[1:] if line[column]]


Flag = tuple[Callable[[Path], dict[str, Any]], Callable[[Outcome], bool]]


def flag(proof: Callable[[Outcome], Any], **arguments: Any) -> Flag:
    return lambda folder: arguments, lambda outcome: bool(proof(outcome))


def logged(proof: Callable[[Outcome], Any], **arguments: Any) -> Flag:
    return lambda folder: {"logger": CSVLogger(folder), "log_every_n_steps": 1, **arguments}, proof


# Each with arguments of the Trainer, and what proves their effect. The Trainer's default is two epochs.
FLAGS: dict[str, Flag] = {
    "accelerator": flag(lambda o: isinstance(o.trainer.accelerator, CPUAccelerator), accelerator="cpu"),
    "strategy": flag(lambda o: isinstance(o.trainer.strategy, DGLStrategy)),
    "devices": flag(lambda o: o.trainer.num_devices == 1, devices=1),
    "num_nodes": flag(lambda o: o.trainer.num_nodes == 1, num_nodes=1),
    "precision": flag(lambda o: o.trainer.precision == "bf16-mixed" and o.change > 0, precision="bf16-mixed"),
    "logger": logged(lambda o: o.rows() == ["0", "1", "2", "3", "4", "5"]),
    "callbacks": flag(lambda o: o.counts["batches"] == 2 * BATCHES),
    "fast_dev_run": flag(lambda o: o.steps == 1, fast_dev_run=True),
    "max_epochs": flag(lambda o: o.trainer.current_epoch == 3, max_epochs=3),
    "min_epochs": flag(lambda o: o.trainer.current_epoch == 2, min_epochs=2, max_epochs=4, stops=True),
    "max_steps": flag(lambda o: o.steps == 4, max_epochs=-1, max_steps=4),
    "min_steps": flag(lambda o: o.steps == 5, min_steps=5, max_epochs=4, stops=True),
    "max_time": flag(lambda o: o.steps < 2 * BATCHES, max_time={"seconds": 0}),
    "limit_train_batches": flag(lambda o: o.steps == 4, limit_train_batches=2),
    "limit_val_batches": flag(lambda o: o.counts["validated"] == 2, limit_val_batches=1),
    "limit_test_batches": flag(
        lambda o: [o.trainer.test(o.module, datamodule=o.data, verbose=False)] and o.counts["tested"] == 1,
        limit_test_batches=1,
    ),
    "limit_predict_batches": flag(
        lambda o: len(o.trainer.predict(o.module, datamodule=o.data) or ()) == 1, limit_predict_batches=1
    ),
    "overfit_batches": flag(lambda o: o.steps == 2, overfit_batches=1),
    "val_check_interval": flag(lambda o: o.counts["validations"] == 2 * BATCHES, val_check_interval=1),
    "check_val_every_n_epoch": flag(lambda o: o.counts["validations"] == 2, check_val_every_n_epoch=2, max_epochs=4),
    "num_sanity_val_steps": flag(lambda o: o.counts["sanity"] == 1, num_sanity_val_steps=1),
    "log_every_n_steps": logged(lambda o: o.rows() == ["1", "3", "5"], log_every_n_steps=2),
    "enable_checkpointing": flag(lambda o: len(o.files("*.ckpt")) == 1, enable_checkpointing=True),
    "enable_progress_bar": flag(lambda o: "train/acc" in o.printed, enable_progress_bar=True),
    "enable_model_summary": flag(
        lambda o: any(isinstance(one, BlockSummary) for one in o.trainer.callbacks) and "MLPSRHead" in o.printed,
        enable_model_summary=True,
    ),
    "accumulate_grad_batches": flag(lambda o: o.steps == 4, accumulate_grad_batches=2),
    "gradient_clip_val": flag(lambda o: 0 < o.change < 1e-6, gradient_clip_val=1e-8),
    "gradient_clip_algorithm": flag(
        lambda o: 0 < o.change < 1e-6, gradient_clip_val=1e-8, gradient_clip_algorithm="value"
    ),
    "deterministic": flag(lambda o: o.saw["deterministic"], deterministic=True),
    "benchmark": flag(lambda o: o.saw["benchmark"], benchmark=True),
    "inference_mode": flag(
        lambda o: o.trainer.validate(o.module, datamodule=o.data, verbose=False) and not o.saw["inference"],
        inference_mode=False,
    ),
    "use_distributed_sampler": flag(
        lambda o: isinstance(o.trainer.train_dataloader.sampler, RandomSampler), use_distributed_sampler=True
    ),
    "profiler": flag(
        lambda o: len(o.trainer.profiler.recorded_durations["run_training_batch"]) == 2 * BATCHES, profiler="simple"
    ),
    "detect_anomaly": flag(lambda o: o.saw["anomaly"], detect_anomaly=True),
    "barebones": flag(lambda o: o.trainer.barebones and o.steps == 2 * BATCHES, barebones=True),
    "plugins": (
        lambda folder: {"plugins": [half()]},
        lambda o: isinstance(o.trainer.precision_plugin, MixedPrecision) and o.change > 0,
    ),
    "sync_batchnorm": flag(lambda o: o.steps == 2 * BATCHES, sync_batchnorm=True),
    "reload_dataloaders_every_n_epochs": flag(lambda o: o.data.num_requests == 2, reload_dataloaders_every_n_epochs=1),
    "default_root_dir": (
        lambda folder: {"default_root_dir": folder / "here", "enable_checkpointing": True},
        lambda o: len(o.files("here/**/*.ckpt")) == 1,
    ),
    "enable_autolog_hparams": logged(lambda o: o.rows() and not o.files("hparams.yaml"), enable_autolog_hparams=False),
    "model_registry": flag(lambda o: o.steps == 2 * BATCHES, model_registry="team/model"),
}
REFUSED = {("accumulate_grad_batches", "dgl_async"): "accumulate_grad_batches counts batches of data"}


@pytest.fixture
def _switches() -> Iterator[None]:
    """Put back what flags switch for the whole process."""
    benchmark = torch.backends.cudnn.benchmark
    with mock.patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def test_every_argument_of_the_trainer_is_tried() -> None:
    assert FLAGS.keys() == inspect.signature(L.Trainer.__init__).parameters.keys() - {"self"}


@pytest.mark.usefixtures("_switches")
@pytest.mark.parametrize("strategy", ["dgl", "dgl_async"])
@pytest.mark.parametrize("name", FLAGS)
def test_flag(
    name: str, strategy: str, tmp_path: Path, make_trainer: MakeTrainer, capfd: pytest.CaptureFixture[str]
) -> None:
    make_arguments, proof = FLAGS[name]
    arguments = {"max_epochs": 2, "strategy": strategy} | make_arguments(tmp_path)
    witness = Witness(arguments.pop("stops", False))
    if name == "barebones":  # it refuses flags that are off already
        trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[witness], **arguments)
    else:
        trainer = make_trainer(callbacks=[witness], **arguments)
    if (name, strategy) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, strategy]):
            Outcome(trainer, witness, tmp_path, lambda: "")
        assert trainer.global_step == 0
    else:
        assert proof(Outcome(trainer, witness, tmp_path, lambda: "".join(capfd.readouterr())))
