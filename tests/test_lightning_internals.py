"""Guard every private name of Lightning: a new version that changed one fails here, by name."""

from __future__ import annotations

import inspect
import os
import re
import signal
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector as AcceleratorConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch import Tensor

from lightning_dgl import DGLModule, DGLStrategy, lightning_internals
from lightning_dgl.lightning_internals import OVERRIDDEN, take_over
from tests.distributed.jobs import PATIENCE
from tests.runs import MakeTrainer, loader, make_module


def test_lightning_still_uses_what_is_replaced() -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False)
    observer = subprocess_script._ChildProcessObserver(os.getpid(), [])
    for owner, name, user in (
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", _TrainingEpochLoop.advance),
        (trainer._signal_connector, "_sigterm_notifier_fn", _SignalConnector.register_signal_handlers),
        (trainer._signal_connector, "_slurm_sigusr_handler_fn", _SignalConnector.register_signal_handlers),
        (observer, "_child_processes", subprocess_script._ChildProcessObserver._run),
    ):
        assert hasattr(owner, name)
        assert f"self.{name}" in inspect.getsource(user)
    assert "_ChildProcessObserver(" in inspect.getsource(subprocess_script._launch_process_observer)
    assert "_launch_process_observer(" in inspect.getsource(_SubprocessScriptLauncher.launch)
    # Handlers are installed after they were replaced.
    run = inspect.getsource(L.Trainer._run)
    assert run.index("strategy.setup_environment()") < run.index("register_signal_handlers()")


def test_what_is_replaced_no_longer_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(subprocess_script._ChildProcessObserver, "_terminate_all", lambda _: ended.append("all"))
    monkeypatch.setattr(dist, "broadcast", lambda *_, **__: ended.append("broadcast"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    failed = SimpleNamespace(poll=lambda: 1, returncode=1, pid=0)
    observer = subprocess_script._ChildProcessObserver(os.getpid(), [failed], sleep_period=1)  # type: ignore[list-item]
    observer.start()
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False)
    take_over(trainer, None)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    trainer._signal_connector._sigterm_notifier_fn(signal.SIGTERM, None)  # type: ignore[arg-type]
    observer.join(timeout=PATIENCE)
    assert not observer.is_alive()
    assert ended == []
    assert trainer.received_sigterm


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (_TrainingEpochLoop, "_broadcast_sigterm_tensor"),
        (_SignalConnector, "_sigterm_notifier_fn"),
        (_SignalConnector, "_slurm_sigusr_handler_fn"),
    ],
)
def test_lightning_without_what_is_replaced(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False)
    monkeypatch.delattr(owner, name)
    message = (
        rf"This version of Lightning has no {owner.__name__}\.{name}, which DGLStrategy replaces\. Install a version"
    )
    with pytest.raises(RuntimeError, match=message):
        take_over(trainer, SLURMEnvironment())


# What the package reads, calls and overrides

VERSION = f"changed in lightning {L.__version__}: see lightning_dgl/lightning_internals.py"


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in OVERRIDDEN.items() for name in names])
def test_overridden_methods_are_still_called(owner: type, name: str) -> None:
    assert hasattr(owner, name), f"{owner.__name__}.{name} {VERSION}"
    callers = {"_on_before_batch_transfer": _TrainingEpochLoop, "_wrapping_function": owner}
    caller = callers.get(name, owner)
    sources = [inspect.getsource(cls) for cls in (caller, *caller.__mro__[1:-1], AcceleratorConnector, DDPStrategy)]
    assert any(f".{name}(" in source or f".{name}," in source for source in sources), f"{name} {VERSION}"


def test_everything_imported_exists() -> None:
    missing = [name for name in lightning_internals.__all__ if not hasattr(lightning_internals, name)]
    assert missing == [], f"{missing} {VERSION}"


def test_forward_only_epochs_are_known(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    assert lightning_internals.skips_backward(trainer) is False
    # StochasticWeightAveraging sets it on the fit loop, and automatic optimization reads it.
    assert "_skip_backward = True" in inspect.getsource(StochasticWeightAveraging), VERSION
    trainer.fit_loop._skip_backward = True
    assert lightning_internals.skips_backward(trainer) is True


def test_batch_size_weights_logged_values(make_trainer: MakeTrainer) -> None:
    class Logs(DGLModule):
        def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
            lightning_internals.set_batch_size(self.trainer, [1, 3][self.trainer.fit_loop.batch_idx])
            self.log("weighted", float(self.trainer.fit_loop.batch_idx), on_epoch=True, on_step=False)
            return super().local_loss(block, scores, targets)

    trainer = make_trainer(limit_train_batches=2)
    trainer.fit(make_module(1, kind=Logs), loader())
    assert trainer.callback_metrics["weighted"].item() == pytest.approx(0.75), f"the batch size {VERSION}"


def test_predictions_can_be_replaced(make_trainer: MakeTrainer) -> None:
    class Replaces(L.Callback):
        def on_predict_end(self, trainer: L.Trainer, *_: object) -> None:
            lightning_internals.set_predictions(trainer, [(0, "first"), (0, "second")])

    trainer = make_trainer(callbacks=[Replaces()])
    assert trainer.predict(make_module(), loader()) == ["first", "second"], f"predictions {VERSION}"


def test_saving_within_epochs_is_seen() -> None:
    saves = lightning_internals.saves_within_epochs
    assert saves(ModelCheckpoint(every_n_train_steps=7)) == "every_n_train_steps=7", f"ModelCheckpoint {VERSION}"
    minute = ModelCheckpoint(train_time_interval=timedelta(minutes=1))
    assert str(saves(minute)).startswith("train_time_interval="), f"ModelCheckpoint {VERSION}"
    assert saves(ModelCheckpoint(every_n_epochs=1)) is None, f"ModelCheckpoint {VERSION}"


def test_hyperparameters_are_kept_from_loggers() -> None:
    module = make_module(2)
    assert "head" in module.hparams_initial
    lightning_internals.do_not_log_hparams(module, ["head", "unknown"])
    assert "head" not in module.hparams_initial, f"hparams_initial {VERSION}"
    assert "head" in module.hparams


def test_validation_by_the_clock_is_seen(make_trainer: MakeTrainer) -> None:
    for interval, by_the_clock in (("00:01:00:00", True), (2, False)):
        trainer = make_trainer(val_check_interval=interval)
        assert lightning_internals.validates_by_the_clock(trainer) is by_the_clock, f"val_check_interval {VERSION}"


def test_synchronised_batchnorm_is_seen(make_trainer: MakeTrainer) -> None:
    for flag in (True, False):
        trainer = make_trainer(strategy=DGLStrategy(), devices=2, sync_batchnorm=flag)
        assert lightning_internals.synchronises_batchnorm(trainer) is flag, f"sync_batchnorm {VERSION}"


def test_no_other_file_uses_private_names_of_lightning() -> None:
    package = Path(lightning_internals.__file__).parent
    private = re.compile(
        r"from lightning(_utilities)?(\.\w+)* import [^\n]*\b_\w+"
        r"|\b(trainer|loop|\w+_loop|strategy|callback|launcher|plugin)\._\w+"
    )
    found = [
        f"{path.name}: {match[0]}"
        for path in package.rglob("*.py")
        if path.name != "lightning_internals.py"
        for match in private.finditer(path.read_text())
    ]
    assert found == []


def test_what_was_logged_can_be_read_and_replaced(make_trainer: MakeTrainer) -> None:
    class Logging(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            pl_module.log("mine", float(trainer.global_step), on_step=True, on_epoch=True, batch_size=1)

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            steps = lightning_internals.logged_in_steps(trainer, on_step=True)
            epoch = lightning_internals.logged_values(trainer)
            assert (steps["mine_step"].value, steps["mine_step"].for_loggers) == (5.0, True)
            assert (epoch["mine_epoch"].value, epoch["mine"].for_loggers) == (3.0, False)
            lightning_internals.replace_logged(trainer, {"mine_epoch": Tensor([7.0])})

    trainer = make_trainer(callbacks=[Logging()])
    trainer.fit(make_module(), loader())
    assert trainer.callback_metrics["mine_epoch"] == 7.0
