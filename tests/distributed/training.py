"""A training that a job runs, in which one rank may do one thing wrong.

As a script, trains with the arguments of :func:`train`, given as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_dgl import DGLModule, DGLStrategy
from tests.runs import loader, make_module, quiet_trainer, small_data


class Samples(Dataset[Any]):
    """Random images, until told to be broken."""

    is_broken = False

    def __init__(self, num_samples: int) -> None:
        self._data = small_data(num_samples)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        if self.is_broken:
            raise OSError("this sample cannot be read")
        return self._data[index]


class Module(DGLModule):
    """A DGLModule whose losses may be made to go wrong."""

    factor = 1.0

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        return self.factor * super().local_loss(block, scores, targets)


def _raise(trainer: L.Trainer) -> None:
    raise ZeroDivisionError("the culprit")


def _hang(trainer: L.Trainer) -> None:
    time.sleep(10_000)  # this line is to be found in the message


def _stop_training(trainer: L.Trainer) -> None:
    trainer.should_stop = True


def _break_data(trainer: L.Trainer) -> None:
    trainer.train_dataloader.dataset.is_broken = True  # type: ignore[union-attr]


def _break_loss(trainer: L.Trainer) -> None:
    trainer.lightning_module.factor = float("nan")  # type: ignore[assignment]


def _crash_once(trainer: L.Trainer) -> None:
    with contextlib.suppress(FileExistsError):
        Path("crashed").touch(exist_ok=False)
        os._exit(3)


_FAULTS: dict[str, Callable[[L.Trainer], object]] = {
    "raise": _raise,
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda _: os._exit(3),
    "hang": _hang,
    "freeze": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "terminate": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "stop training": _stop_training,
    "break data": _break_data,
    "break loss": _break_loss,
    "crash once": _crash_once,
    "announce": lambda _: Path("training").touch(),
}


class Fault(L.Callback):
    """Lets one rank do one thing wrong in the second epoch: in ``hook``, and there where the fourth batch is met."""

    def __init__(self, what: str, rank: int, hook: str) -> None:
        self._what, self._rank, self._hook = what, rank, hook
        setattr(self, hook, self._strike)

    def _strike(self, trainer: L.Trainer, pl_module: Any, *arguments: Any) -> None:
        batch_idx = arguments[1] if self._hook == "on_train_batch_start" else 3
        if (trainer.global_rank, trainer.current_epoch, batch_idx) == (self._rank, 1, 3):
            _FAULTS[self._what](trainer)


def weights_of(module: nn.Module) -> str:
    """A digest of everything in the state dict, bit for bit."""
    digest = hashlib.sha1()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def train(
    fault: str | None = None,
    on: int = 0,
    hook: str = "on_train_batch_start",
    *,
    devices: int = 2,
    num_nodes: int = 1,
    data_parallel_size: int = 1,
    max_epochs: int = 2,
    start_method: Any = "popen",
    timeout: float = 60,
    resume: bool = False,
    save_on_exception: bool = False,
    **arguments: Any,
) -> None:
    """Train for two epochs of eight batches, saving each, while rank ``on`` has ``fault``; print the weights' digest.

    Further arguments are the module's.
    """
    L.seed_everything(3, verbose=False)
    trainer = quiet_trainer(
        strategy=DGLStrategy(data_parallel_size=data_parallel_size, start_method=start_method, timeout=timeout),
        devices=devices,
        num_nodes=num_nodes,
        max_epochs=max_epochs,
        callbacks=[
            *([] if fault is None else [Fault(fault, on, hook)]),
            *([OnExceptionCheckpoint(os.getcwd())] if save_on_exception else []),
            ModelCheckpoint(
                "checkpoints", "{epoch}", save_top_k=-1, save_last=True, save_on_exception=save_on_exception
            ),
        ],
        enable_checkpointing=True,
    )
    module = make_module(kind=Module, dropout=0.2, **arguments)
    data = DataLoader(Samples(64), batch_size=8, shuffle=True)
    trainer.fit(module, data, loader(16), ckpt_path="last" if resume else None)
    print(f"Rank {trainer.global_rank} ends with the weights {weights_of(module)}", flush=True)


if __name__ == "__main__":
    train(**json.loads(sys.argv[1]))
