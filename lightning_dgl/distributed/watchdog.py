"""One rank's failure becomes every rank's, with one message: who failed, which blocks it held, and its traceback.

Every rank has a thread that beats in the process group's key-value store and looks there for a failure. Waiting, for
a neighbour or in a collective, goes through the watchdog, so that it ends when another rank fails, and so that a rank
that keeps the others waiting for too long is found: it does not wait itself, or its heart has stopped.
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
from typing import NamedTuple, TypeVar

from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_FAILURE, _SEEN = "lightning_dgl/failure", "lightning_dgl/seen"
# How long the others get to say why a connection broke, and a rank to leave by itself after a failure; seconds.
_PATIENCE, _GRACE = 3.0, 15.0


class RankFailedError(RuntimeError):
    """Another rank has failed, and with it the run; the message names it and its blocks, and gives its traceback."""


class Process(NamedTuple):
    """Where a rank runs."""

    host: str
    pid: int


class Watchdog:
    """Watches over the ranks of a run from one of them.

    Args:
        store: a connection to the process group's store, used by nobody else.
        rank: this rank.
        names: how messages speak of each rank.
        timeout: how long a rank may keep the others waiting; seconds.
        is_loud: whether this rank's own error is what the user sees: the first process on a node; the other ones leave
            silently when somebody else fails.
        received_sigterm: whether this process was asked to terminate.
        children: processes that this one has launched, of the ranks after its own.
    """

    interval = 0.2

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
        self.failure: RankFailedError | None = None
        self._store = store
        self._rank = rank
        self._names = names
        self._timeout = timeout
        self._is_loud = is_loud
        self._received_sigterm = received_sigterm
        self._children = children
        self._lost: tuple[int, BaseException, float] | None = None
        self._failed_rank = rank
        self._own: BaseException | None = None
        self._failed_at = 0.0
        self._waiting = 0
        self._beats = 0
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._main_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._run, daemon=True, name="lightning_dgl watchdog")
        self._thread.start()
        atexit.register(self.stop)  # a thread that is in torch when Python shuts down would crash the process

    # For the main thread

    def check(self) -> None:
        """Raise if another rank has failed, or this process was asked to terminate."""
        if self.failure is not None:
            raise self._own_error(self.failure)
        if self._received_sigterm():
            raise SIGTERMException

    def wait_until(self, ready: Callable[[], bool], peer: int, what: str) -> None:
        """Call ``ready``, which waits a little, until it returns True; it is rank ``peer`` that is to do ``what``."""
        deadline = time.monotonic() + self._timeout
        self.check()
        self._waiting += 1
        try:
            while not ready():
                self.check()
                if time.monotonic() > deadline:
                    raise self._hanging(f"{self._names[self._rank]} waits for {self._names[peer]} {what}")
        finally:
            self._waiting -= 1

    @contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """Within this context ranks meet, for ``what``; a failure to do so becomes the failure behind it."""
        self.check()
        self._waiting += 1
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RankFailedError) or error is self._own:
                raise
            if time.monotonic() - began >= self._timeout:
                raise self._hanging(f"{self._names[self._rank]} waits for the others, {what}") from None
            self._ask(partial(self._find_gone, error), 2 * _PATIENCE)
            if self.failure is None:
                raise
            raise self._own_error(self.failure) from None
        finally:
            self._waiting -= 1

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within this context, inside that of a collective, this rank does not meet the others but works by itself."""
        self._waiting -= 1
        try:
            yield
        except BaseException as error:
            self._own = error
            raise
        finally:
            self._waiting += 1

    def report(self, error: BaseException) -> None:
        """Tell the other ranks that this one fails, unless one has failed before; wait until rank 0 knows."""
        if self.failure is not None or isinstance(error, RankFailedError):
            return
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        text = f"{self._names[self._rank]} failed, and with it the run:\n\n{trace}"
        _, is_seen = self._post(self._rank, text)
        self._is_loud |= not is_seen
        self._fail(self._rank, text)
        if hasattr(error, "add_note"):
            error.add_note(f"Raised on {self._names[self._rank]}.")

    def await_others(self) -> None:
        """After a failure: rank 0, with which the store may go, waits until the others know which failure it is."""
        if self.failure is None or self._rank != 0:
            return

        others = [rank for rank in range(1, len(self._names)) if rank != self._failed_rank]
        self._ask(partial(self._await_seen, others), 2 * _PATIENCE)

    @property
    def is_silent(self) -> bool:
        """Whether another rank has failed, and it is for yet another one to show that to the user."""
        return self.failure is not None and not self._is_loud

    @property
    def is_stopped(self) -> bool:
        """Whether the watch has ended."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """End the watch."""
        atexit.unregister(self.stop)
        self._stopped.set()
        self._thread.join(timeout=1.0)

    # For the threads of the links

    def lost(self, peer: int, error: BaseException) -> None:
        """The connection to ``peer`` is broken."""
        if self._lost is None:
            self._lost = (peer, error, time.monotonic())

    # Failures

    def _own_error(self, failure: RankFailedError) -> BaseException:
        """What to raise here when another rank fails: the one message, or nothing that is shown."""
        return RankFailedError(*failure.args) if self._is_loud else SystemExit(1)

    def _post(self, rank: int, text: str) -> tuple[bool, bool]:
        """Make the failure of ``rank`` known, if it is the first; wait until rank 0 knows it, which shows it.

        Returns whether it is the first, as far as the store answers, and whether rank 0 knows it.
        """
        message = json.dumps({"rank": rank, "text": text})

        def post() -> tuple[bool, bool]:
            is_first = self._store.compare_set(_FAILURE, "", message).decode() == message
            return is_first, self._rank == 0 or self._await_seen([0])

        return self._ask(post, 2 * _PATIENCE) or (True, False)

    def _await_seen(self, ranks: Sequence[int]) -> bool:
        """Wait for a while until ``ranks`` know of the failure; whether they do."""
        keys = [f"{_SEEN}/{rank}" for rank in ranks]
        deadline = time.monotonic() + _PATIENCE
        while keys and not self._store.check(keys) and time.monotonic() < deadline:
            self._beat()
        return not keys or self._store.check(keys)

    def _hanging(self, what: str) -> BaseException:
        """The error of a wait that took too long; stops the rank that is to blame, if it runs on this host."""
        found = self._ask(self._find_hanging, 2 * _PATIENCE)
        culprit, stack = (0, "") if found is None else found  # without an answer: rank 0 holds the store
        if self.failure is not None:
            return self._own_error(self.failure)
        if culprit is None:
            text = (
                f"{what}, for {self._timeout:g} s so far, and so do all others: the ranks have come apart. A callback "
                "or hook that communicates, stops or skips must do so on every rank."
            )
        else:
            text = (
                f"{self._names[culprit]} hangs, and with it the run: {what}, for {self._timeout:g} s so far. If a step "
                f"may take longer, raise DGLStrategy(timeout=...).{stack}"
            )
        to_blame = self._rank if culprit is None else culprit
        is_first, is_seen = self._post(to_blame, text)
        self._is_loud |= is_first and (culprit == 0 or not is_seen)  # then rank 0 cannot show it
        if culprit is not None and self.processes:
            host, pid = self.processes[culprit]
            if host == socket.gethostname():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._fail(to_blame, text)
        return self._own_error(RankFailedError(text))

    def _find_gone(self, error: BaseException) -> None:
        """A collective has broken down: wait for the one who left to say why; if nobody does, find who is silent."""
        before = self._pulses()
        deadline = time.monotonic() + _PATIENCE
        while self.failure is None and time.monotonic() < deadline:
            self._beat()
            self._look_for_failure()
        if self.failure is None and (stopped := self._stopped_between(before, self._pulses())):
            self._post_gone(stopped[0], error)
            self._look_for_failure()

    def _find_hanging(self) -> tuple[int | None, str]:
        before = self._pulses()
        self._beat(times=4)
        after = self._pulses()
        ranks = [rank for rank in range(len(self._names)) if rank != self._rank]
        stopped = self._stopped_between(before, after)
        busy = [rank for rank in ranks if all(pulse[rank].endswith(" 0") for pulse in (before, after))]
        culprit = next(iter(stopped + busy), None)
        if culprit is None or culprit in stopped:
            return culprit, ""
        self._store.set(f"lightning_dgl/suspect/{culprit}", "")
        self._beat(times=4)
        key = f"lightning_dgl/stack/{culprit}"
        stack = self._store.get(key).decode() if self._store.check([key]) else ""
        return culprit, f" It is here:\n\n{stack}"

    def _stopped_between(self, before: list[str], after: list[str]) -> list[int]:
        """The ranks whose hearts have not beaten."""
        return [
            rank
            for rank, (then, now) in enumerate(zip(before, after, strict=True))
            if rank != self._rank and then.split()[0] == now.split()[0]
        ]

    def _pulses(self) -> list[str]:
        keys = [f"lightning_dgl/pulse/{rank}" for rank in range(len(self._names))]
        return [self._store.get(key).decode() if self._store.check([key]) else "0 0" for key in keys]

    def _ask(self, task: Callable[[], T], patience: float) -> T | None:
        """Let the thread do ``task``, as talking to the store may block; None if it is not done in time."""
        answer: list[T] = []
        done = threading.Event()

        def run() -> None:
            try:
                answer.append(task())
            finally:
                done.set()

        self._tasks.put(run)
        done.wait(patience)
        return answer[0] if answer else None

    # The thread

    def _beat(self, times: int = 1) -> None:
        """Show that this rank is alive, and whether it waits, and rest for an interval; several times."""
        for _ in range(times):
            self._beats += 1
            self._store.set(f"lightning_dgl/pulse/{self._rank}", f"{self._beats} {int(self._waiting > 0)}")
            self._stopped.wait(self.interval)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._look_for_failure()
                self._beat()
                self._tasks.get_nowait()()
            except queue.Empty:
                pass
            except RuntimeError as error:  # the store's host does not answer
                if self.failure is None and not self._stopped.is_set():
                    self._is_loud |= self._rank == 1  # in rank 0's place
                    self._fail(0, self._gone(0, error))
                time.sleep(self.interval)
            if self.failure is not None and time.monotonic() - self._failed_at > _GRACE:
                self._leave()

    def _look_for_failure(self) -> None:
        if self.failure is not None:
            return
        suspect = f"lightning_dgl/suspect/{self._rank}"
        if self._store.check([suspect]):
            frame = sys._current_frames().get(self._main_thread)
            self._store.delete_key(suspect)
            self._store.set(f"lightning_dgl/stack/{self._rank}", "".join(traceback.format_stack(frame)))
        if self._store.check([_FAILURE]):
            failure = json.loads(self._store.get(_FAILURE))
            self._store.set(f"{_SEEN}/{self._rank}", "")
            self._fail(failure["rank"], failure["text"])
        elif self._lost is not None and time.monotonic() - self._lost[2] > self.interval * (3 if self._children else 8):
            # The one that has launched the lost rank knows more, and speaks first.
            self._post_gone(*self._lost[:2])
        else:
            for i, child in enumerate(self._children):
                if child.poll():  # neither running nor finished well
                    self.lost(self._rank + 1 + i, RuntimeError(_exit_in_words(child.returncode)))

    def _post_gone(self, peer: int, error: BaseException) -> None:
        self._store.compare_set(_FAILURE, "", json.dumps({"rank": peer, "text": self._gone(peer, error)}))

    def _gone(self, peer: int, error: BaseException) -> str:
        how = str(error)
        for i, child in enumerate(self._children):
            if peer == self._rank + 1 + i and child.poll():
                how = _exit_in_words(child.returncode)
        return (
            f"{self._names[peer]} has gone without a word, and with it the run: it was killed, ran out of memory, or "
            f"crashed ({how})."
        )

    def _fail(self, rank: int, text: str) -> None:
        if self.failure is None:
            self._failed_rank = rank
            self._failed_at = time.monotonic()
            self.failure = RankFailedError(text)

    def _leave(self) -> None:
        """The main thread has not noticed: it is busy, or stuck in a collective that no longer has all its ranks."""
        if self._is_loud:
            print(f"{type(self).__name__}: {self.failure}", file=sys.stderr, flush=True)
        for child in self._children:
            child.kill()
        os._exit(1)


def _exit_in_words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def this_process() -> Process:
    """Where this rank runs."""
    return Process(socket.gethostname(), os.getpid())
