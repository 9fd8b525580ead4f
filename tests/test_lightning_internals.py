"""What the package replaces in Lightning is still there, and no longer acts."""

from __future__ import annotations

import inspect
import os
import signal
from types import SimpleNamespace

import lightning as L
import pytest
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from lightning_dgl.lightning_internals import take_over
from tests.distributed.jobs import PATIENCE, by_slurm


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
    take_over(trainer)
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
    for variable, value in by_slurm(1)[0].items():
        monkeypatch.setenv(variable, value)
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, plugins=[SLURMEnvironment()])
    monkeypatch.delattr(owner, name)
    message = (
        rf"This version of Lightning has no {owner.__name__}\.{name}, which DGLStrategy replaces\. Install a version"
    )
    with pytest.raises(RuntimeError, match=message):
        take_over(trainer)
