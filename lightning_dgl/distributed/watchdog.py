"""Turn the failure of one rank into the failure of all ranks.

Each rank has a thread, the *heart*, that writes a pulse to the process group's store and looks there for failures. The
main thread waits for other ranks only through the watchdog, so that a wait ends when a rank fails or takes too long.
:mod:`~lightning_dgl.distributed.failures` decides what follows from a failure.

The keys in the store, below "lightning_dgl/"; values are JSON:

    pulse/RANK      how often the heart of RANK has beaten, and whether RANK waits for other ranks
    failure         the failure of the run: the first that was posted
    known/RANK      there once RANK knows the failure
    suspect/RANK    there while another rank asks which lines RANK is at
    stack/RANK      the answer
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.distributed_c10d import PrefixStore, Store

from lightning_dgl.distributed.failures import (
    PATIENCE,
    Failure,
    FailureState,
    Pulse,
    RankFailedError,
    find_suspects,
)

T = TypeVar("T")

_FEW_BEATS = 0.8
"""Seconds in which a healthy heart beats several times."""
_FEW_KERNELS = 0.0002
"""Seconds between two looks at a device."""


class Process(NamedTuple):
    """The host and process id of a rank."""

    host: str
    pid: int


def this_process() -> Process:
    """Return the host and process id of this rank."""
    return Process(socket.gethostname(), os.getpid())


class Watchdog:
    """Watches over all ranks of a run, on behalf of one.

    Args:
        store: a connection to the process group's store that nobody else uses.
        rank: this rank.
        names: the name of each rank in messages.
        timeout: how many seconds a rank may keep the others waiting.
        is_loud: whether this rank prints every failure: the first process of a node, or every rank if the launcher
            passes on one error. Other ranks leave the printing to rank 0 and exit silently.
        received_sigterm: returns whether this process was asked to terminate.
        children: the processes that this rank launched, for the ranks that follow it.

    Attributes:
        processes: the process of each rank, by which a rank that hangs is killed; set once they are known.
    """

    interval = 0.2
    """Seconds between two beats; also how long ``ready`` in :meth:`wait_until` may wait."""

    def __init__(
        self,
        store: Store,
        rank: int,
        names: Sequence[str],
        timeout: float,
        is_loud: bool,
        received_sigterm: Callable[[], bool],
        children: Sequence[subprocess.Popen[bytes]],
    ) -> None:
        self.processes: list[Process] = []
        self._names = names
        self._rank = rank
        self._timeout = timeout
        self._received_sigterm = received_sigterm
        self._own_error: BaseException | None = None
        self._raised_at_work: BaseException | None = None
        self._state = FailureState(rank, names, timeout, is_loud, is_launcher=bool(children))
        self._heart = _Heart(store, rank, len(names), self._state, children)
        self._heart.start()
        atexit.register(self.stop)  # a thread that is inside torch when Python shuts down would crash the process

    # Waiting

    def check(self) -> None:
        """Raise if a rank failed, or if this process was asked to terminate."""
        failure = self._state.failure
        if failure is not None:
            is_own = failure.rank == self._rank and self._own_error is not None
            raise self._own_error if is_own else self._state.error()  # type: ignore[misc]
        if self._received_sigterm():
            raise SIGTERMException

    def wait_until(self, ready: Callable[[], bool], peer: int | None, what: str) -> float:
        """Call ``ready`` until it returns True; return the seconds waited.

        Args:
            ready: returns whether the wait is over; waits for :attr:`interval` seconds at most.
            peer: the rank that this one waits for; None: all others.
            what: what ``peer`` must do, as messages put it: "to ...".

        Raises:
            RankFailedError: if a rank failed, or the wait took longer than the timeout.
            SystemExit: instead, if another rank prints the failure.
            BaseException: what another thread of this rank has reported.
            SIGTERMException: if this process was asked to terminate.
        """
        began = time.monotonic()
        self.check()
        with self._waiting(1):
            while not ready():
                self.check()
                if time.monotonic() - began > self._timeout:
                    raise self._end_wait(peer, what)
        return time.monotonic() - began

    def wait_for_device(self, device: torch.device, what: str) -> None:
        """Wait until ``device`` has done all that it was given, in which all ranks meet ``what`` for. See wait_until.

        NCCL's collectives return before they have met anybody; whoever reads a value of the device next would wait
        where the watchdog does not see it.
        """
        if device.type == "cpu":
            return
        event = torch.get_device_module(device).Event()
        event.record()

        def is_done() -> bool:
            if not (done := event.query()):
                time.sleep(_FEW_KERNELS)
            return done

        self.wait_until(is_done, None, what)

    def take(self, source: queue.Queue[T], peer: int, what: str) -> tuple[T, float]:
        """Take an item from ``source``, which ``peer`` fills; return it and the seconds waited. See wait_until."""
        items: list[T] = []

        def has_arrived() -> bool:
            with suppress(queue.Empty):
                items.append(source.get(timeout=self.interval))
            return bool(items)

        seconds = self.wait_until(has_arrived, peer, what)
        return items[0], seconds

    def put(self, target: queue.Queue[T], item: T, peer: int, what: str) -> float:
        """Put ``item`` into ``target``, which ``peer`` empties; return the seconds waited. See wait_until."""

        def has_room() -> bool:
            try:
                target.put(item, timeout=self.interval)
            except queue.Full:
                return False
            return True

        return self.wait_until(has_room, peer, what)

    @contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """Meet the other ranks within this context, for ``what``; replace torch's error by the failure behind it."""
        self.check()
        began = time.monotonic()
        with self._waiting(1):
            try:
                yield
            except RuntimeError as error:
                if isinstance(error, RankFailedError) or error is self._raised_at_work:
                    raise
                if time.monotonic() - began >= self._timeout:
                    raise self._end_wait(None, what) from None
                self._heart.ask(partial(self._heart.explain, str(error)))
                if self._state.failure is None:
                    raise
                raise self._state.error() from None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Do work of this rank alone within this context, inside that of a collective."""
        with self._waiting(-1):
            try:
                yield
            except BaseException as error:
                self._raised_at_work = error  # no other rank is behind it
                raise

    @contextmanager
    def _waiting(self, change: int) -> Iterator[None]:
        self._heart.num_waits += change
        try:
            yield
        finally:
            self._heart.num_waits -= change

    def _end_wait(self, peer: int | None, what: str) -> BaseException:
        """Find the rank to blame for a wait that took too long and kill it if it runs here; return what to raise."""
        self._heart.ask(partial(self._heart.blame, peer, what))
        # If the store did not answer, rank 0 is to blame, which holds it. Rank 1 kills it and speaks; another rank does
        # so only if rank 1 does not: else the store breaks meanwhile, from which the heart learns as much.
        deadline = time.monotonic() + (PATIENCE if self._rank > 1 else 0)
        while self._state.failure is None and time.monotonic() < deadline:
            time.sleep(self.interval)
        self._state.learn(self._state.overdue(0, peer, what), time.monotonic(), rank_0_knows=False)
        culprit = self._state.rank_to_kill
        if culprit is not None and self.processes and self.processes[culprit].host == socket.gethostname():
            with suppress(ProcessLookupError):
                os.kill(self.processes[culprit].pid, signal.SIGKILL)
        return self._state.error()

    # Failing

    @property
    def failure(self) -> RankFailedError | None:
        """The failure of the run, as an error; None while all is well."""
        return None if self._state.failure is None else RankFailedError(self._state.failure.text)

    @property
    def is_silent(self) -> bool:
        """Whether a rank failed, and another rank prints it."""
        return not self._state.prints

    def report(self, error: BaseException) -> None:
        """Post that this rank raised ``error``, unless a failure is known; wait until rank 0 knows it.

        Any thread may call it; if it is not the main thread, that raises ``error`` when it next waits.
        """
        if self._state.failure is not None or isinstance(error, RankFailedError):
            return
        failure = self._state.raised(error)
        if hasattr(error, "add_note"):  # since Python 3.11
            error.add_note(f"Raised on {self._names[self._rank]}.")
        self._own_error = error
        self._heart.ask(partial(self._heart.post, failure))
        self._state.learn(failure, time.monotonic(), rank_0_knows=False)  # if the store did not answer

    def await_others(self) -> None:
        """On rank 0, wait after a failure until the other ranks know it: the store may end with rank 0."""
        failure = self._state.failure
        if failure is not None and self._rank == 0:
            others = [rank for rank in range(1, len(self._names)) if rank != failure.rank]
            self._heart.ask(partial(self._heart.await_known, others))

    def lost(self, peer: int, error: BaseException) -> None:
        """Tell that the connection to ``peer`` broke with ``error``; any thread may call it."""
        self._state.lose(peer, str(error), time.monotonic())

    # The end

    @property
    def is_stopped(self) -> bool:
        """Whether the watch has ended."""
        return self._heart.stopped.is_set()

    def stop(self) -> None:
        """End the watch."""
        atexit.unregister(self.stop)
        self._heart.stopped.set()
        self._heart.join(timeout=1.0)


class _Heart(threading.Thread):
    """The thread of a watchdog. It alone talks to the store, because a store that lost its host may never answer.

    Args:
        store: a connection to the process group's store.
        rank: this rank.
        num_ranks: how many ranks there are.
        state: what this rank knows about failures.
        children: the processes that this rank launched, for the ranks that follow it.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        num_ranks: int,
        state: FailureState,
        children: Sequence[subprocess.Popen[bytes]],
    ) -> None:
        super().__init__(daemon=True, name="lightning_dgl watchdog")
        self.stopped = threading.Event()
        self.num_waits = 0  # above 0 while this rank waits for others, and so is not to blame
        self._store = PrefixStore("lightning_dgl", store)
        self._rank = rank
        self._num_ranks = num_ranks
        self._state = state
        self._children = children
        self._beats = 0
        self._latest_beat = time.monotonic()
        self._main_thread = threading.get_ident()
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def run(self) -> None:
        """Look for failures, beat, and do what the main thread asks for, until stopped."""
        while not self.stopped.is_set():
            self._try(self._look)
            self._try(self._beat)
            with suppress(queue.Empty):
                self._tasks.get_nowait()()
            if self._state.must_leave(time.monotonic()):
                self._leave()

    def ask(self, task: Callable[[], object]) -> None:
        """Let this thread do ``task``; wait for it, but give up if the store does not answer."""
        done = threading.Event()

        def run() -> None:
            self._try(task)
            done.set()

        self._tasks.put(run)
        while not done.wait(Watchdog.interval) and time.monotonic() - self._latest_beat < 2 * PATIENCE:
            pass

    def _try(self, task: Callable[[], object]) -> None:
        try:
            task()
        except RuntimeError as error:  # of the store
            if not self.stopped.is_set():
                self._state.store_lost(str(error), time.monotonic())

    def _beat(self) -> None:
        self.stopped.wait(Watchdog.interval)  # first, so that a broken store is not asked without a pause
        self._beats += 1
        self._latest_beat = time.monotonic()
        self._write(f"pulse/{self._rank}", [self._beats, self.num_waits > 0])

    def _beat_until(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Beat until ``ready`` returns True, for some seconds at most; return whether it did."""
        deadline = time.monotonic() + seconds
        while not (is_ready := ready()) and time.monotonic() < deadline:
            self._beat()
        return is_ready

    def _look(self) -> bool:
        """Look for failures: posted ones, exited children, and a suspicion that nobody explained.

        Return whether a failure is known.
        """
        if self._state.failure is not None:
            return True
        now = time.monotonic()
        for peer, child in enumerate(self._children, self._rank + 1):
            if child.poll():  # it has ended, and not well
                self._state.child_exited(peer, child.returncode, now)
        if self._store.check([suspect := f"suspect/{self._rank}"]):
            self._store.delete_key(suspect)
            frame = sys._current_frames().get(self._main_thread)
            self._write(f"stack/{self._rank}", "".join(traceback.format_stack(frame)))
        if (posted := self._read("failure")) is not None:
            self._learn(Failure(*posted))
        elif (failure := self._state.unexplained(now)) is not None:
            self.post(failure)
        return self._state.failure is not None

    # What the main thread asks for

    def post(self, failure: Failure) -> None:
        """Post ``failure`` and learn the failure of the run: this one, or one that was posted before."""
        first = Failure(*json.loads(self._store.compare_set("failure", "", json.dumps(failure))))
        # Whether rank 0 prints must be clear before the main thread sees the failure.
        self._learn(first, 0 in (self._rank, first.rank) or self.await_known([0]))

    def await_known(self, ranks: Sequence[int]) -> bool:
        """Wait until ``ranks`` know the failure, for PATIENCE seconds at most; return whether they do."""
        keys = [f"known/{rank}" for rank in ranks]
        return self._beat_until(lambda: not keys or self._store.check(keys), PATIENCE)

    def explain(self, how: str) -> None:
        """Wait for a rank to post why a collective broke; if none does, post that one is gone whose heart stopped."""
        stopped, _ = self._suspects(PATIENCE)
        if stopped and self._state.failure is None:
            self.post(self._state.gone(stopped[0], how))

    def blame(self, peer: int | None, what: str) -> None:
        """Find and post which rank makes this one wait too long, for ``peer`` to do ``what``."""
        stopped, busy = self._suspects(_FEW_BEATS)
        if self._state.failure is not None:
            return
        culprit, stack = next(iter(stopped + busy), None), None
        if culprit in busy:
            self._write(f"suspect/{culprit}", "")
            self._beat_until(lambda: self._store.check([f"stack/{culprit}"]), _FEW_BEATS)
            stack = self._read(f"stack/{culprit}")
        self.post(self._state.overdue(culprit, peer, what, stack))

    def _suspects(self, seconds: float) -> tuple[list[int], list[int]]:
        """Return the ranks whose hearts stopped, and the busy ones, after some seconds or as soon as a rank fails."""
        before = self._pulses()
        self._beat_until(self._look, seconds)
        return find_suspects(self._rank, before, self._pulses())

    def _pulses(self) -> list[Pulse]:
        return [Pulse(*(self._read(f"pulse/{rank}") or (0, False))) for rank in range(self._num_ranks)]

    def _learn(self, failure: Failure, rank_0_knows: bool = True) -> None:
        self._write(f"known/{self._rank}", "")
        self._state.learn(failure, time.monotonic(), rank_0_knows)

    def _read(self, key: str) -> Any:
        """Return the value of ``key``; None if it is not there."""
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _write(self, key: str, value: object) -> None:
        self._store.set(key, json.dumps(value))

    def _leave(self) -> None:
        """End the process: the main thread is busy, or stuck in a collective that no longer has all its ranks."""
        if self._state.prints and self._state.failure is not None:
            print(f"Watchdog: {self._state.failure.text}", file=sys.stderr, flush=True)
        for child in self._children:
            child.kill()
        os._exit(1)
