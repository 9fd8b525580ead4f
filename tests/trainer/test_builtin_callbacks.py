"""Every callback that Lightning brings has its effect on one rank, with either schedule, or is refused at the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import lightning.pytorch.callbacks as builtin
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_dgl import DGLModule
from tests.runs import MakeTrainer, differences, loader, make_module, weights

NUM_STEPS = 6


class Outcome:
    """A training with a callback, and what is to be seen of it."""

    def __init__(self, trainer: L.Trainer, callback: Any, folder: Path, module: DGLModule) -> None:
        self.trainer, self.callback, self.folder, self.module = trainer, callback, folder, module
        self.before = weights(module)
        self.error: Exception | None = None
        try:
            trainer.fit(module, loader(12, 4), loader(12, 4))
        except ZeroDivisionError as error:
            self.error = error

    @property
    def finished(self) -> bool:
        return self.trainer.global_step == NUM_STEPS

    @property
    def checkpoints(self) -> list[Path]:
        return list(self.folder.rglob("*.ckpt"))

    def changed(self, name: str) -> bool:
        return not torch.equal(self.before[name], weights(self.module)[name])

    def logged(self, name: str) -> bool:
        """Whether the logger has values under a name that begins like this."""
        (path,) = self.folder.rglob("metrics.csv")
        return any(column.startswith(name) for column in path.read_text().splitlines()[0].split(","))


class WithBackbone(DGLModule):
    @property
    def backbone(self) -> nn.Module:
        return self.blocks[0]


class Counts(builtin.Callback):
    seen = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen += 1


class Writes(builtin.BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.seen: list[str] = []

    def write_on_batch_end(self, *_: Any) -> None:
        self.seen.append("batch")

    def write_on_epoch_end(self, *_: Any) -> None:
        self.seen.append("epoch")


class Fails(builtin.OnExceptionCheckpoint):
    """Saves a checkpoint, because it fails itself."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise ZeroDivisionError


class Bar(builtin.ProgressBar):
    seen = 0
    enabled = True

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen += "train/acc" in self.get_metrics(trainer, trainer.lightning_module)


def shows(text: str) -> Callable[[Outcome, str], bool]:
    return lambda outcome, printed: outcome.finished and text in printed


Case = tuple[Callable[[Path], builtin.Callback], Callable[[Outcome, str], Any]]

# Each with a proof of its effect, which also gets what was printed. There are two epochs of three batches.
CALLBACKS: dict[str, Case] = {
    "BackboneFinetuning": (
        lambda folder: builtin.BackboneFinetuning(unfreeze_backbone_at_epoch=9, train_bn=False),
        lambda o, printed: o.finished and not o.changed("network.0.weight") and o.changed("network.16.weight"),
    ),
    "BasePredictionWriter": (
        lambda folder: Writes(),
        lambda o, printed: o.trainer.predict(o.module, loader(12, 4)) and o.callback.seen == ["batch"] * 3 + ["epoch"],
    ),
    "Callback": (lambda folder: Counts(), lambda o, printed: o.callback.seen == NUM_STEPS),
    "Checkpoint": (lambda folder: builtin.ModelCheckpoint(folder), lambda o, printed: len(o.checkpoints) == 1),
    "DeviceStatsMonitor": (
        lambda folder: builtin.DeviceStatsMonitor(cpu_stats=True),
        lambda o, printed: o.finished and o.logged("DeviceStatsMonitor.on_train_batch_start"),
    ),
    "EMAWeightAveraging": (
        lambda folder: builtin.EMAWeightAveraging(decay=0.5),
        lambda o, printed: o.finished and differences(weights(o.module), o.before),
    ),
    "EarlyStopping": (
        lambda folder: builtin.EarlyStopping("val/loss", min_delta=100.0, patience=1),
        lambda o, printed: o.trainer.current_epoch == 2 and o.callback.stopped_epoch == 1,
    ),
    "GradientAccumulationScheduler": (
        lambda folder: builtin.GradientAccumulationScheduler({0: 3, 1: 1}),
        lambda o, printed: o.trainer.global_step == 4,
    ),
    "LambdaCallback": (
        lambda folder: builtin.LambdaCallback(on_train_end=lambda *_: print("the end")),
        shows("the end"),
    ),
    "LearningRateMonitor": (
        lambda folder: builtin.LearningRateMonitor("step"),
        lambda o, printed: o.finished and o.logged("lr"),
    ),
    "ModelCheckpoint": (
        lambda folder: builtin.ModelCheckpoint(folder, monitor="val/acc", mode="max", save_top_k=2),
        lambda o, printed: len(o.checkpoints) == 2,
    ),
    "ModelPruning": (
        lambda folder: builtin.ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False),
        lambda o, printed: o.finished and 0.4 < sparsity(o.module.network) < 0.9,
    ),
    "ModelSummary": (lambda folder: builtin.ModelSummary(), shows("MLPSRHead")),
    "OnExceptionCheckpoint": (
        lambda folder: Fails(folder),
        lambda o, printed: o.error is not None and len(o.checkpoints) == 1,
    ),
    "ProgressBar": (lambda folder: Bar(), lambda o, printed: o.callback.seen == NUM_STEPS),
    "RichModelSummary": (lambda folder: builtin.RichModelSummary(), shows("MLPSRHead")),
    "RichProgressBar": (lambda folder: builtin.RichProgressBar(refresh_rate=1), lambda o, printed: o.finished),
    "SpikeDetection": (
        lambda folder: builtin.SpikeDetection(exclude_batches_path=folder),
        lambda o, printed: o.finished and float(o.callback.running_mean.compute()) > 0,
    ),
    "StochasticWeightAveraging": (
        lambda folder: builtin.StochasticWeightAveraging(0.01, swa_epoch_start=1),
        lambda o, printed: int(o.callback.n_averaged) == 2,
    ),
    "TQDMProgressBar": (lambda folder: builtin.TQDMProgressBar(refresh_rate=1), shows("train/acc")),
    "ThroughputMonitor": (
        lambda folder: builtin.ThroughputMonitor(lambda batch: len(batch[0]), window_size=2),
        lambda o, printed: o.finished and o.logged("train/device/samples_per_sec"),
    ),
    "Timer": (
        lambda folder: builtin.Timer(duration={"seconds": 0}),
        lambda o, printed: o.trainer.global_step < NUM_STEPS,
    ),
    "WeightAveraging": (
        lambda folder: builtin.WeightAveraging(),
        lambda o, printed: o.finished and differences(weights(o.module), o.before),
    ),
}
ELSEWHERE = {"BaseFinetuning", "BatchSizeFinder", "LearningRateFinder"}
REFUSED = {
    ("GradientAccumulationScheduler", "dgl_async"): "accumulate_grad_batches counts batches of data",
    ("SpikeDetection", "dgl_async"): "SpikeDetection compares the losses of steps",
    ("StochasticWeightAveraging", "dgl_async"): "StochasticWeightAveraging goes by the Trainer's epochs",
}


def sparsity(network: nn.Module) -> float:
    """The share of zeros in the weights of a network's convolutions."""
    weights = torch.cat([part.weight.flatten() for part in network.modules() if isinstance(part, nn.Conv2d)])
    return float((weights == 0).float().mean())


def test_every_callback_of_lightning_is_tried() -> None:
    assert CALLBACKS.keys() | ELSEWHERE == set(builtin.__all__)


@pytest.mark.parametrize("strategy", ["dgl", "dgl_async"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_callback(
    name: str, strategy: str, tmp_path: Path, make_trainer: MakeTrainer, capfd: pytest.CaptureFixture[str]
) -> None:
    make_callback, proof = CALLBACKS[name]
    callback = make_callback(tmp_path)
    trainer = make_trainer(
        strategy=strategy,
        max_epochs=2,
        callbacks=[callback],
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_checkpointing=isinstance(callback, builtin.Checkpoint),
        enable_progress_bar=isinstance(callback, builtin.ProgressBar),
        enable_model_summary=isinstance(callback, builtin.ModelSummary),
    )
    if (name, strategy) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, strategy]):
            trainer.fit(make_module(2), loader(12, 4), loader(12, 4))
        assert trainer.global_step == 0
    else:
        # Statistics of a CPU need a package of their own.
        with mock.patch.object(CPUAccelerator, "get_device_stats", lambda *_: {"used": 1.0}):
            outcome = Outcome(trainer, callback, tmp_path, make_module(2, kind=WithBackbone))
        assert proof(outcome, "".join(capfd.readouterr()))
