"""Decide what a rank does when a rank fails: itself or another one.

:class:`FailureState` has no threads, sockets, store or clock. The watchdog tells it what happened and when, and acts on
its decisions. Each rank has one:

    HEALTHY ── a connection broke, or a launched process exited ──> SUSPECTS
       │                                                                │
       │ another rank posted a failure,                                 │ no rank posted a reason in time:
       │ this rank posted one of its own,                               │ post that the peer is gone
       │ or the store does not answer                                   v
       └────────────────────────────────────────────────────────────> KNOWS
                                                                        │ waiting raises an error, which ends the rank;
                                                                        │ this takes more than GRACE seconds: the main
                                                                        │ thread is busy or stuck
                                                                        v
                                                                      LEAVES with os._exit

The first failure that is posted is the failure of the run. Ranks print it so that the user reads it once. *Loud* ranks
always print: the first process of each node (rank 0 is one), or every rank if the launcher passes on a single error. A
rank that is not loud relies on rank 0, and prints only in its place:

    who failed                           who notices it                            who prints, besides loud ranks
    ───────────────────────────────────  ────────────────────────────────────────  ──────────────────────────────
    a rank raised an error               the rank itself                           nobody
    a rank raised, rank 0 is silent      the rank itself                           the rank that raised
    a rank > 0 exited                    a neighbour, the process that launched    nobody
                                         it, or a rank in a broken collective
    a rank > 0 hangs                     the first rank that waited too long       nobody
    a rank > 0 hangs, rank 0 is silent   the first rank that waited too long       the rank that waited
    rank 0 hangs                         the first rank that waited too long       the rank that waited
    rank 0 exited, the store with it     every rank: the store does not answer     rank 1
    rank 0 exited, the store lives on    a neighbour, or a rank in a collective    the rank that noticed first
    no rank: all wait for each other     the first rank that waited too long       nobody
    no rank: all wait, rank 0 is silent  the first rank that waited too long       the rank that waited

"Rank 0 is silent" means that it did not confirm within PATIENCE seconds that it knows the failure. A loud rank that
raised prints its own error, the other loud ranks print a :class:`RankFailedError` that contains it.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Sequence
from typing import NamedTuple

PATIENCE = 3.0
"""Seconds that a rank waits for others to explain or to confirm a failure."""
GRACE = 15.0
"""Seconds in which the main thread of a rank must end after a failure."""
# The process that launched a rank knows its exit code, so it speaks before the neighbours.
_SUSPICION, _SUSPICION_OF_LAUNCHER = 1.6, 0.6


class RankFailedError(RuntimeError):
    """Raised when another rank failed; the message names that rank and its blocks, and contains its traceback."""


class Failure(NamedTuple):
    """The failure of a run, as ranks post it in the store.

    Attributes:
        rank: the rank that failed; if the ranks came apart, the one that noticed.
        text: the message for the user.
        finder: the rank that noticed, and prints if rank 0 cannot.
        hangs: whether ``rank`` hangs, and its process must be killed.
    """

    rank: int
    text: str
    finder: int
    hangs: bool = False


class Pulse(NamedTuple):
    """A sign of life of a rank: how often its heart has beaten, and whether it waits for other ranks."""

    beats: int
    is_waiting: bool


class FailureState:
    """What one rank knows about failures, and what it does about them.

    Args:
        rank: this rank.
        names: the name of each rank in messages.
        timeout: how many seconds a rank may keep the others waiting.
        is_loud: whether this rank always prints; rank 0 must.
        is_launcher: whether this rank launched processes of other ranks.
    """

    def __init__(self, rank: int, names: Sequence[str], timeout: float, is_loud: bool, is_launcher: bool) -> None:
        self.failure: Failure | None = None
        self._rank = rank
        self._names = names
        self._timeout = timeout
        self._is_loud = is_loud
        self._suspicion_lasts = _SUSPICION_OF_LAUNCHER if is_launcher else _SUSPICION
        self._suspicion: tuple[int, str, float] | None = None
        self._exits: dict[int, str] = {}
        self._known_since = 0.0
        self._rank_0_knows = True

    # Events

    def learn(self, failure: Failure, now: float, rank_0_knows: bool = True) -> None:
        """Accept ``failure`` as the failure of the run, unless one is known."""
        if self.failure is None:
            self._known_since, self._rank_0_knows = now, rank_0_knows
            self.failure = failure  # last, because other threads decide as soon as they see it

    def lose(self, peer: int, how: str, now: float) -> None:
        """Suspect that ``peer`` is gone: the connection to it broke."""
        if self._suspicion is None:
            self._suspicion = (peer, how, now)

    def child_exited(self, peer: int, code: int, now: float) -> None:
        """Suspect that ``peer`` is gone: this rank launched its process, which exited with ``code``."""
        self._exits[peer] = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.lose(peer, self._exits[peer], now)

    def store_lost(self, how: str, now: float) -> None:
        """Conclude that rank 0, which holds the store, is gone; rank 1 prints in its place."""
        self.learn(self.gone(0, how)._replace(finder=1), now)

    # Failures to post

    def raised(self, error: BaseException) -> Failure:
        """Return the failure if this rank raised ``error``."""
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        text = f"{self._names[self._rank]} failed; the run was stopped:\n\n{trace}"
        return Failure(self._rank, text, self._rank)

    def gone(self, peer: int, how: str) -> Failure:
        """Return the failure if ``peer`` exited without posting one; its exit code, if known, replaces ``how``."""
        text = (
            f"{self._names[peer]} exited without an error message; the run was stopped: it was killed, ran out of "
            f"memory, or crashed ({self._exits.get(peer, how)})."
        )
        return Failure(peer, text, self._rank)

    def overdue(self, culprit: int | None, peer: int | None, what: str, stack: str | None = None) -> Failure:
        """Return the failure if this rank waited too long.

        Args:
            culprit: the rank that hangs; None: all ranks wait.
            peer: the rank that this one waited for; None: all others.
            what: what this rank waited for.
            stack: the lines that the culprit is at; None if it does not tell.
        """
        whom = "the other ranks," if peer is None else self._names[peer]
        wait = f"{self._names[self._rank]} has waited {self._timeout:g} s for {whom} {what}"
        if culprit is None:
            text = (
                f"The ranks have come apart: {wait}, and all other ranks wait, too. A callback or hook that "
                "communicates, stops or skips must do so on every rank."
            )
            return Failure(self._rank, text, self._rank)
        text = (
            f"{self._names[culprit]} hangs; the run was stopped: {wait}. If a step may take longer, raise "
            "DGLStrategy(timeout=...)." + (f" It is here:\n\n{stack}" if stack else "")
        )
        return Failure(culprit, text, self._rank, hangs=True)

    def unexplained(self, now: float) -> Failure | None:
        """Return the failure to post if nobody explained in time why a peer is lost."""
        if self._suspicion is None or now - self._suspicion[2] <= self._suspicion_lasts:
            return None
        return self.gone(*self._suspicion[:2])

    # Decisions

    @property
    def prints(self) -> bool:
        """Whether this rank prints its error: the only place that decides it (see the table above)."""
        if self._is_loud or self.failure is None:
            return True
        rank_0_prints = self.failure.rank != 0 and self._rank_0_knows
        return self.failure.finder == self._rank and not rank_0_prints

    def error(self) -> BaseException:
        """Return what the main thread raises about a known failure: the message, or a silent exit."""
        assert self.failure is not None
        return RankFailedError(self.failure.text) if self.prints else SystemExit(1)

    @property
    def rank_to_kill(self) -> int | None:
        """The rank whose process a rank that waited too long kills; None if no rank hangs."""
        return self.failure.rank if self.failure is not None and self.failure.hangs else None

    def must_leave(self, now: float) -> bool:
        """Return whether the main thread has had its time, so that the process must end at once."""
        return self.failure is not None and now - self._known_since > GRACE


def find_suspects(rank: int, before: Sequence[Pulse], after: Sequence[Pulse]) -> tuple[list[int], list[int]]:
    """Compare two readings of all pulses; return the ranks other than ``rank`` that are to blame for a wait.

    Those whose heart stopped come first, then those whose heart beats but that do not wait for others themselves.
    """
    others = [(other, *pulses) for other, pulses in enumerate(zip(before, after, strict=True)) if other != rank]
    stopped = [other for other, then, now in others if then.beats == now.beats]
    busy = [other for other, then, now in others if other not in stopped and not (then.is_waiting or now.is_waiting)]
    return stopped, busy
