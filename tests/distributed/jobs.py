"""Jobs of several processes: how a test starts them, and what becomes of them."""

from __future__ import annotations

import contextlib
import functools
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

REPOSITORY = Path(__file__).parents[2]
TRAINING = Path(__file__).parent / "training.py"


PATIENCE = 150.0


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
        """Let a new Python run training.py; with ``launcher``, options of Python that let another program start it."""
        with open(self._next_output(), "wb") as output:
            process = subprocess.Popen(
                [sys.executable, *launcher, str(TRAINING), json.dumps(arguments)],
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
    context.set_forkserver_preload(["tests.distributed.training", "pytest"])
    with mock.patch.dict(os.environ, _environment(), clear=True):
        forkserver.ensure_running()
    return context


def _call(
    function: Callable[..., None], arguments: dict[str, Any], folder: Path, output: Path, environment: dict[str, str]
) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the process that forks this one may ignore
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(file, descriptor)
    os.environ.update(environment)
    function(**arguments)
