"""Jobs of several processes: the training that they run, how a test starts them, and what becomes of them.

As a script, trains with the arguments of :func:`train`, given as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_dgl import DGLModule, DGLStrategy
from tests.conftest import loader, sgd, small_cnn, small_data

REPOSITORY = Path(__file__).parent.parent
PATIENCE = 150.0
"""Seconds after which a job counts as hanging: many times what it needs on a busy machine."""


# What jobs do


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


def make_module(**kwargs: Any) -> Module:
    """Four blocks, with dropout, so that every block draws random numbers."""
    defaults: dict[str, Any] = {"split_at": ["2", "6", "10"], "example_input": (2, 3, 8, 8), "optimizer": sgd}
    return Module(**{"network": small_cnn(dropout=0.2), **defaults, **kwargs})


def make_trainer(strategy: DGLStrategy, **kwargs: Any) -> L.Trainer:
    """Make a quiet CPU Trainer that writes to the job's folder."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 2,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": os.getcwd(),
    }
    return L.Trainer(strategy=strategy, **{**defaults, **kwargs})


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
    trainer = make_trainer(
        DGLStrategy(data_parallel_size=data_parallel_size, start_method=start_method, timeout=timeout),
        devices=devices,
        num_nodes=num_nodes,
        max_epochs=max_epochs,
        callbacks=[
            *([] if fault is None else [Fault(fault, on, hook)]),
            *([OnExceptionCheckpoint(os.getcwd())] if save_on_exception else []),
            ModelCheckpoint("checkpoints", "{epoch}", save_top_k=-1, save_last=True),
        ],
        enable_checkpointing=True,
    )
    module = make_module(**arguments)
    data = DataLoader(Samples(64), batch_size=8, shuffle=True)
    trainer.fit(module, data, loader(16), ckpt_path="last" if resume else None)
    print(f"Rank {trainer.global_rank} ends with the weights {weights_of(module)}", flush=True)


# How a test starts them


def by_hand(num_ranks: int, num_nodes: int = 1) -> list[dict[str, str]]:
    """The environment of each of several ranks that Lightning finds started; as if on several nodes if so asked."""
    per_node = num_ranks // num_nodes
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    return [
        {**together, "NODE_RANK": str(rank // per_node), "LOCAL_RANK": str(rank % per_node)}
        for rank in range(num_ranks)
    ]


def by_slurm(num_ranks: int) -> list[dict[str, str]]:
    """The environment of each of several ranks on one node that SLURM has started."""
    together = {
        "SLURM_JOB_NAME": "training",
        "SLURM_JOB_ID": "123456",
        "SLURM_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": str(num_ranks),
        "SLURM_NTASKS_PER_NODE": str(num_ranks),
        "MASTER_PORT": str(free_port()),  # else from the job's number, which may be taken
    }
    return [{**together, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(num_ranks)]


def free_port() -> int:
    """A port below those that systems hand out by themselves, one of which would be taken before it is used."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


@dataclass
class Outcome:
    """What became of the processes that a test has started.

    Attributes:
        codes: their exit codes; negative, the signal that has ended it.
        outputs: what they and their descendants have written.
        left: descendants that run on.
    """

    codes: list[int]
    outputs: list[str]
    left: list[str]

    @property
    def output(self) -> str:
        """What all have written."""
        return "".join(self.outputs)

    @property
    def weights(self) -> list[str]:
        """The digests of the weights that ranks have ended with."""
        return re.findall(r"ends with the weights (\w+)", self.output)

    def __str__(self) -> str:  # what pytest shows
        return f"exit codes {self.codes}, left {self.left}, output:\n{self.output}"


class Job:
    """Processes in a working directory of their own, by which their descendants are known.

    Args:
        folder: a temporary one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "job"
        self.folder.mkdir()
        self._outputs: list[Path] = []
        self._waits: list[Callable[[float], int | None]] = []
        self.pids: list[int] = []

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_script(self, *launcher: str, **arguments: Any) -> None:
        """Let a new Python :func:`train`; with ``launcher``, options of Python that let another program start it."""
        with open(self._next_output(), "wb") as output:
            process = subprocess.Popen(
                [sys.executable, *launcher, __file__, json.dumps(arguments)],
                cwd=self.folder,
                env=_environment() | {"MASTER_PORT": str(free_port())},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell lets what it starts in the background ignore interrupts, and that is inherited.
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )

        def wait(seconds: float) -> int | None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            return process.returncode

        self._waits.append(wait)
        self.pids.append(process.pid)

    def start(self, function: Callable[..., None], environment: dict[str, str] | None = None, **arguments: Any) -> None:
        """Call ``function`` in a process that has imported everything already, which takes seconds."""
        process = _context().Process(
            target=_call,
            args=(
                function,
                arguments,
                self.folder,
                self._next_output(),
                environment or {"MASTER_PORT": str(free_port())},
            ),
        )
        process.start()

        def wait(seconds: float) -> int | None:
            process.join(seconds)
            return process.exitcode

        self._waits.append(wait)
        assert process.pid is not None
        self.pids.append(process.pid)

    def start_ranks(self, function: Callable[..., None], environments: list[dict[str, str]], **arguments: Any) -> None:
        """Call ``function`` in one such process for each rank."""
        for environment in environments:
            self.start(function, environment, **arguments)

    def wait(self) -> Outcome:
        """Wait for the end of what was started, and then of all descendants; end them if they take too long."""
        deadline = time.monotonic() + PATIENCE
        codes = [wait(max(0.0, deadline - time.monotonic())) for wait in self._waits]
        is_hanging = None in codes
        patience = time.monotonic() + (0 if is_hanging else 20)
        while self._running() and time.monotonic() < patience:
            time.sleep(0.1)
        left = [f"{pid}: {_command_of(pid)}" for pid in self._running()]
        self.__exit__()
        outcome = Outcome(
            [code for code in codes if code is not None], [path.read_text() for path in self._outputs], left
        )
        assert not is_hanging, f"The job hangs: {outcome}"
        return outcome

    def wait_for_file(self, name: str) -> None:
        """Wait until a process has made the file ``name``."""
        deadline = time.monotonic() + PATIENCE
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"The job does not start: {self.wait()}"
            time.sleep(0.05)

    def _next_output(self) -> Path:
        self._outputs.append(self.folder.parent / f"output{len(self._outputs)}.txt")
        return self._outputs[-1]

    def _running(self) -> list[int]:
        """The processes in the folder; one that has ended but was not waited for is in none."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "cwd") == str(self.folder):
                    found.append(int(process.name))
        return found


def _command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return "?"


def _environment() -> dict[str, str]:
    """The tests' own, without what earlier tests have set for ranks; one thread sums in the same order everywhere."""
    ranks = re.compile(r"(MASTER|SLURM|PL|TORCHELASTIC)_\w+|(\w+_)?RANK|(\w+_)?WORLD_SIZE")
    own = {name: value for name, value in os.environ.items() if not ranks.fullmatch(name)}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, _environment(), clear=True):
        forkserver.ensure_running()
    return context


def _call(
    function: Callable[..., None], arguments: dict[str, Any], folder: Path, output: Path, environment: dict[str, str]
) -> None:
    os.setsid()
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(file, descriptor)
    os.environ.update(environment)
    function(**arguments)


if __name__ == "__main__":
    train(**json.loads(sys.argv[1]))
