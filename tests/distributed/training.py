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
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_dgl import DGLModule, DGLStrategy, RankFailedError
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

    def before_loss(self) -> None: ...

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        self.before_loss()
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


def _run_out_of(error: type[Exception]) -> Callable[[L.Trainer], None]:
    def run_out(trainer: L.Trainer) -> None:
        raise error("the culprit")

    return run_out


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
    "interrupt": lambda _: os.kill(os.getpid(), signal.SIGINT),
    "device memory": _run_out_of(torch.OutOfMemoryError),
    "host memory": _run_out_of(MemoryError),
    "terminate": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "stop training": _stop_training,
    "break data": _break_data,
    "break loss": _break_loss,
    "crash once": _crash_once,
    "announce": lambda _: Path("training").touch(),
}


PHASES: dict[str, tuple[str, int | None, int | None]] = {
    "set-up": ("setup", None, None),
    "sanity check": ("on_validation_batch_start", 0, 0),
    "training": ("on_train_batch_start", 1, 3),
    "end of epoch": ("on_train_epoch_end", 1, None),
    "validation": ("on_validation_batch_start", 1, 0),
    "checkpoint": ("on_save_checkpoint", 1, None),
    "end of training": ("on_train_end", None, None),
    "end of fit": ("on_fit_end", None, None),
    "tear-down": ("teardown", None, None),
}
"""When a fault may strike: the hook, the epoch and the batch."""


class Fault(L.Callback):
    """Lets one rank do one thing wrong, once, in one phase; notes when."""

    def __init__(self, what: str, rank: int, phase: str) -> None:
        self._what, self._rank = what, rank
        hook, self._epoch, self._batch_idx = PHASES[phase]
        setattr(self, hook, self._strike_in_forward if "memory" in what and "batch" in hook else self._strike)

    def _strike(self, trainer: L.Trainer, pl_module: Any, *arguments: Any, **_: Any) -> None:
        is_time = self._epoch in (None, trainer.current_epoch) and self._batch_idx in (None, *arguments[1:2])
        if trainer.global_rank == self._rank and is_time:
            if self._what != "crash once":
                Path("struck").write_text(str(time.time()))
            _FAULTS[self._what](trainer)

    def _strike_in_forward(self, trainer: L.Trainer, pl_module: Any, *arguments: Any) -> None:
        pl_module.before_loss = lambda: self._strike(trainer, pl_module, *arguments)


def weights_of(module: nn.Module) -> str:
    """A digest of everything in the state dict, bit for bit."""
    digest = hashlib.sha1()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def train(
    fault: str | None = None,
    on: int = 0,
    phase: str = "training",
    *,
    devices: int = 2,
    num_nodes: int = 1,
    data_parallel_size: int = 1,
    max_epochs: int = 2,
    start_method: Any = "popen",
    timeout: float = 60,
    schedule: str = "sync",
    resume: bool = False,
    save_on_exception: bool = False,
    goes_on: bool = False,
    **arguments: Any,
) -> None:
    """Train for two epochs of eight batches, saving each, while rank ``on`` has ``fault``; print the weights' digest.

    With ``goes_on``, a rank that survives a failure tries to read the weights, then loads those of the last checkpoint.
    Further arguments are the module's.
    """
    L.seed_everything(3, verbose=False)
    trainer = quiet_trainer(
        strategy=DGLStrategy(
            schedule, data_parallel_size=data_parallel_size, start_method=start_method, timeout=timeout
        ),
        devices=devices,
        num_nodes=num_nodes,
        max_epochs=max_epochs,
        callbacks=[
            *([] if fault is None else [Fault(fault, on, phase)]),
            *([OnExceptionCheckpoint(os.getcwd())] if save_on_exception else []),
            ModelCheckpoint(
                "checkpoints", "{epoch}", save_top_k=-1, save_last=True, save_on_exception=save_on_exception
            ),
        ],
        enable_checkpointing=True,
    )
    module = make_module(kind=Module, dropout=0.2, **arguments)
    data = DataLoader(Samples(64), batch_size=8, shuffle=True)
    try:
        trainer.fit(module, data, loader(16), ckpt_path="last" if resume else None)
    except RankFailedError:
        if not goes_on:
            raise
        for read in (module.state_dict, lambda: module(small_data(4).tensors[0])):
            try:
                read()
            except RuntimeError as error:
                print(f"Rank {trainer.global_rank} reads: {error}")
        module.load_state_dict(torch.load("checkpoints/last.ckpt", weights_only=True)["state_dict"])
        module(small_data(4).tensors[0])
    print(f"Rank {trainer.global_rank} ends with the weights {weights_of(module)}", flush=True)


if __name__ == "__main__":
    train(**json.loads(sys.argv[1]))
