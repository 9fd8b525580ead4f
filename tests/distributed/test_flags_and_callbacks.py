"""Flags and callbacks of Lightning that only look on do so on several ranks; those that need a whole network do not."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    EMAWeightAveraging,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_dgl import BlockSummary, DGLStrategy
from lightning_dgl.trainer_checks import check_ranks
from tests.distributed.ranks import Launch, Run, dropout_module, fit
from tests.runs import MakeTrainer, differences, loader, step_lr


@pytest.fixture(autouse=True)
def _switches() -> Iterator[None]:
    """Put back what flags switch for the whole process."""
    with mock.patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def train(num_ranks: int, launch: Launch, **arguments: Any) -> Run:
    def act(trainer: L.Trainer) -> None:
        fit(trainer, dropout_module(), (loader(38, shuffle=True), loader(20)))

    return launch(num_ranks, act, **arguments)


def assert_same_notes(several: Run, one: Run) -> None:
    (expected,) = one.ranks
    assert len(several.ranks) == 2
    for note in several.ranks:
        for what in ("weights", "metrics", "progress", "seen"):
            assert differences(note[what], expected[what]) == []


class StopsAtOnce(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = True


class Witness(L.Callback):
    """Sees what holds while training."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen["deterministic"] = torch.are_deterministic_algorithms_enabled()
        self.seen["benchmark"] = torch.backends.cudnn.benchmark
        self.seen["anomaly"] = torch.is_anomaly_enabled()

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen["inference"] = torch.is_inference_mode_enabled()

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        profiled: Any = trainer.profiler
        self.seen["profiled"] = len(profiled.recorded_durations["run_training_batch"])
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self.seen["table"] = any(isinstance(callback, BlockSummary) for callback in callbacks)
        self.seen["bar"] = trainer.progress_bar_callback is not None


def test_flags_that_change_no_weights(launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        return train(
            num_ranks,
            launch,
            callbacks=[Witness()],
            max_time={"hours": 1},
            deterministic=True,
            benchmark=True,
            inference_mode=False,
            use_distributed_sampler=False,
            profiler="simple",
            detect_anomaly=True,
            plugins=[TorchCheckpointIO()],
            sync_batchnorm=True,
            enable_progress_bar=True,
            enable_model_summary=True,
            enable_checkpointing=True,
            enable_autolog_hparams=False,
            model_registry="team/model",
        )

    one, several = run(1), run(2)
    assert_same_notes(several, one)
    assert several.ranks[1]["seen"][0] == {
        **dict.fromkeys(("deterministic", "benchmark", "anomaly", "table", "bar"), True),
        "inference": False,
        "profiled": 10,
    }
    assert len(several.checkpoints) == 1
    assert not list(several.folder.rglob("hparams.yaml"))


def test_training_goes_on_for_min_epochs_and_min_steps(launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        return train(num_ranks, launch, callbacks=[StopsAtOnce()], max_epochs=4, min_epochs=1, min_steps=7)

    one, several = run(1), run(2)
    assert_same_notes(several, one)
    assert one.ranks[0]["progress"][0] == 7


def test_barebones(launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        return train(num_ranks, launch, barebones=True, logger=False, log_every_n_steps=None)

    assert_same_notes(run(2), run(1))


class CountsEnds(LambdaCallback):
    def __init__(self) -> None:
        self.seen = 0
        super().__init__(on_train_batch_end=self._count)

    def _count(self, *_: Any) -> None:
        self.seen += 1


def test_callbacks_that_change_no_weights(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    def run(num_ranks: int) -> Run:
        callbacks = [
            CountsEnds(),
            DeviceStatsMonitor(cpu_stats=True),
            LearningRateMonitor(),
            ModelCheckpoint(monitor="val/acc", mode="max", train_time_interval=None, save_last=True),
            OnExceptionCheckpoint("unused"),
            RichModelSummary(),
            RichProgressBar(),
            SpikeDetection(rtol=1e6),
            ThroughputMonitor(lambda batch: len(batch[0]), window_size=3),
            Timer(duration={"hours": 1}),
        ]
        with mock.patch.object(CPUAccelerator, "get_device_stats", lambda *_: {"used": 1.0}):
            flags = dict.fromkeys(("enable_checkpointing", "enable_model_summary", "enable_progress_bar"), True)
            return train(num_ranks, launch, callbacks=callbacks, **flags)

    one, several = run(1), run(2)
    assert_same_notes(several, one)
    assert several.ranks[1]["seen"] == [10]
    assert several.checkpoints.keys() == one.checkpoints.keys()
    (log,) = several.folder.rglob("metrics.csv")
    names = set(log.read_text().splitlines()[0].split(","))
    assert {"train/device/samples_per_sec", "DeviceStatsMonitor.on_train_batch_end/used", "train/loss_block3"} <= names
    assert capfd.readouterr().out.count("MLPSRHead") == 6


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_learning_rates_of_other_ranks_change_without_a_warning(schedule: str, launch: Launch) -> None:
    def act(trainer: L.Trainer) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Detected call of `lr_scheduler.step")
            fit(trainer, dropout_module(lr_scheduler=step_lr), (loader(38), loader(20)))

    launch(2, act, strategy=DGLStrategy(schedule, timeout=60, start_method="fork"))


@pytest.mark.parametrize(
    "make",
    [
        BatchSizeFinder,
        EMAWeightAveraging,
        LearningRateFinder,
        lambda: ModelPruning("l1_unstructured"),
        lambda: StochasticWeightAveraging(0.01),
        WeightAveraging,
    ],
)
def test_callbacks_that_need_the_whole_network_are_refused(make: Any, make_trainer: MakeTrainer) -> None:
    callback = make()
    trainer = make_trainer(callbacks=[callback])
    check_ranks(trainer, is_split=False, is_replicated=False)
    with pytest.raises(ValueError, match=rf"^{type(callback).__name__} .* whole network.* one device"):
        check_ranks(trainer, is_split=True, is_replicated=False)


def test_validation_by_the_clock_is_refused(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(val_check_interval="00:00:01:00", strategy=DGLStrategy())
    with pytest.raises(ValueError, match="val_check_interval is a time, which passes on each rank at another batch"):
        check_ranks(trainer, is_split=True, is_replicated=False)
