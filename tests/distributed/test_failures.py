"""Every row of the table "who failed, who notices, who prints", and when a rank suspects, blames and leaves."""

from __future__ import annotations

import pytest

from lightning_dgl.distributed.failures import (
    GRACE,
    Failure,
    FailureState,
    Pulse,
    RankFailedError,
    find_suspects,
)

NAMES = [f"Rank {rank} (block {rank})" for rank in range(5)]
LOUD = {0, 3}  # the first ranks of two nodes
TIMEOUT = 30.0
NOW = 1000.0
LONG = 10.0  # seconds, longer than any suspicion


def make_state(rank: int, is_loud: bool | None = None, is_launcher: bool = False) -> FailureState:
    return FailureState(rank, NAMES, TIMEOUT, rank in LOUD if is_loud is None else is_loud, is_launcher)


def raised_on(rank: int) -> Failure:
    try:
        raise ZeroDivisionError("the culprit")
    except ZeroDivisionError as error:
        return make_state(rank).raised(error)


def lost_by(finder: int, peer: int) -> Failure:
    state = make_state(finder)
    state.lose(peer, "connection reset", NOW)
    failure = state.unexplained(NOW + LONG)
    assert failure is not None
    return failure


def exited_child_of(finder: int, peer: int, code: int = 3) -> Failure:
    state = make_state(finder, is_launcher=True)
    state.child_exited(peer, code, NOW)
    failure = state.unexplained(NOW + LONG)
    assert failure is not None
    return failure


def overdue_on(finder: int, culprit: int | None) -> Failure:
    return make_state(finder).overdue(culprit, 2, "to send the next batch")


# The table: the failure, whether rank 0 confirms that it knows, and the ranks that print
TABLE: dict[str, tuple[Failure, bool, set[int]]] = {
    "a rank raised": (raised_on(2), True, {0, 3}),
    "a rank raised, rank 0 is silent": (raised_on(2), False, {0, 3, 2}),
    "a loud rank raised": (raised_on(3), True, {0, 3}),
    "rank 0 raised": (raised_on(0), True, {0, 3}),
    "a rank exited, noticed by a neighbour": (lost_by(1, peer=2), True, {0, 3}),
    "a rank exited, noticed by the rank that launched it": (exited_child_of(0, peer=2), True, {0, 3}),
    "a rank exited, noticed in a collective": (make_state(4).gone(2, "connection reset"), True, {0, 3}),
    "a rank hangs": (overdue_on(1, culprit=2), True, {0, 3}),
    "a rank hangs, rank 0 is silent": (overdue_on(1, culprit=2), False, {0, 3, 1}),
    "rank 0 hangs": (overdue_on(1, culprit=0), True, {0, 3, 1}),
    "rank 0 hangs, noticed by another node": (overdue_on(4, culprit=0), True, {0, 3, 4}),
    "rank 0 hangs, noticed by a loud rank": (overdue_on(3, culprit=0), True, {0, 3}),
    "rank 0 exited, the store lives on, noticed by a neighbour": (lost_by(1, peer=0), True, {0, 3, 1}),
    "rank 0 exited, the store lives on, noticed in a collective": (make_state(4).gone(0, "reset"), True, {0, 3, 4}),
    "all wait for each other": (overdue_on(1, culprit=None), True, {0, 3}),
    "all wait, rank 0 is silent": (overdue_on(1, culprit=None), False, {0, 3, 1}),
}


@pytest.mark.parametrize("row", TABLE)
def test_who_prints(row: str) -> None:
    failure, rank_0_knows, expected = TABLE[row]
    states = [make_state(rank) for rank in range(5)]
    for rank, state in enumerate(states):
        state.learn(failure, NOW, rank_0_knows if rank == failure.finder else True)
    assert {rank for rank, state in enumerate(states) if state.prints} == expected
    for rank, state in enumerate(states):
        error = state.error()
        if rank in expected:
            assert isinstance(error, RankFailedError)
            assert str(error) == failure.text
        else:
            assert isinstance(error, SystemExit)
            assert error.code == 1


def test_rank_1_prints_if_rank_0_exited_and_the_store_with_it() -> None:
    states = [make_state(rank) for rank in range(1, 5)]
    for state in states:
        state.store_lost("connection reset", NOW)
        assert state.failure is not None
        assert state.failure.text.startswith(f"{NAMES[0]} exited without an error message")
    assert [state.prints for state in states] == [True, False, True, False]


@pytest.mark.parametrize("failure", [raised_on(2), overdue_on(1, culprit=0), lost_by(1, peer=2)])
def test_every_rank_prints_if_the_launcher_passes_on_one_error(failure: Failure) -> None:
    states = [make_state(rank, is_loud=True) for rank in range(5)]
    for state in states:
        state.learn(failure, NOW)
    assert all(state.prints for state in states)


# Knowing a failure


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_knows_of_no_failure_prints_its_own_errors_and_stays(rank: int) -> None:
    state = make_state(rank)
    assert state.prints
    assert state.rank_to_kill is None
    assert not state.must_leave(NOW)


def test_only_the_first_failure_counts() -> None:
    state = make_state(1)
    state.learn(raised_on(2), NOW)
    state.learn(overdue_on(1, culprit=0), NOW, rank_0_knows=False)
    state.store_lost("connection reset", NOW)
    assert state.failure == raised_on(2)
    assert not state.prints
    assert state.rank_to_kill is None


def test_a_rank_leaves_if_its_main_thread_has_not_ended_in_time() -> None:
    state = make_state(1)
    state.learn(raised_on(2), NOW)
    assert not state.must_leave(NOW + GRACE)
    state.learn(raised_on(3), NOW + GRACE)
    assert state.must_leave(NOW + GRACE + 0.1)


@pytest.mark.parametrize(
    ("failure", "victim"),
    [(overdue_on(1, 2), 2), (overdue_on(1, 0), 0), (overdue_on(1, None), None), (lost_by(1, 2), None)],
    ids=["a rank hangs", "rank 0 hangs", "all wait", "a rank exited"],
)
def test_only_a_rank_that_hangs_is_killed(failure: Failure, victim: int | None) -> None:
    state = make_state(1)
    state.learn(failure, NOW)
    assert state.rank_to_kill == victim


# Suspecting a rank


def test_a_lost_peer_has_time_to_explain_itself_and_the_process_that_launched_it_speaks_first() -> None:
    neighbour, launcher = make_state(2), make_state(0, is_launcher=True)
    assert neighbour.unexplained(NOW) is None
    neighbour.lose(1, "connection reset", NOW)
    launcher.child_exited(1, -9, NOW)
    assert neighbour.unexplained(NOW) is None
    assert launcher.unexplained(NOW) is None
    assert neighbour.unexplained(NOW + 1.0) is None
    assert launcher.unexplained(NOW + 1.0) == launcher.gone(1, "")
    assert neighbour.unexplained(NOW + 2.0) == neighbour.gone(1, "connection reset")


def test_later_signs_do_not_prolong_a_suspicion_or_change_its_rank() -> None:
    state = make_state(2)
    state.lose(1, "connection reset", NOW)
    state.lose(3, "connection reset", NOW + LONG)
    failure = state.unexplained(NOW + LONG)
    assert failure is not None
    assert failure.rank == 1


def test_the_exit_code_says_more_than_the_broken_connection() -> None:
    state = make_state(0, is_launcher=True)
    state.lose(1, "connection reset", NOW)
    state.child_exited(1, 3, NOW + 0.1)
    failure = state.unexplained(NOW + LONG)
    assert failure is not None
    assert "exit code 3" in failure.text
    assert "connection reset" not in failure.text


# Blaming a rank for a wait


@pytest.mark.parametrize(
    ("before", "after", "stopped", "busy"),
    [
        ([(1, True), (4, True), (7, True)], [(2, True), (5, True), (8, True)], [], []),
        ([(1, True), (4, True), (7, False)], [(2, True), (5, True), (8, False)], [], [2]),
        ([(1, True), (4, True), (7, False)], [(2, True), (5, True), (8, True)], [], []),
        ([(1, True), (4, True), (7, False)], [(2, True), (5, True), (7, False)], [2], []),
        ([(1, True), (4, True), (7, True)], [(2, True), (5, False), (7, True)], [2], []),
        ([(1, False), (4, True), (7, True)], [(2, False), (4, True), (8, True)], [1], [0]),
    ],
    ids=["all wait", "busy", "busy a moment ago", "stopped", "stopped while it waited", "both"],
)
def test_suspects_are_ranks_whose_heart_stopped_and_ranks_that_do_not_wait(
    before: list[tuple[int, bool]], after: list[tuple[int, bool]], stopped: list[int], busy: list[int]
) -> None:
    # Rank 3, which asks, is never among them.
    pulses = [[Pulse(*pulse) for pulse in [*reading, (1, False)]] for reading in (before, after)]
    assert find_suspects(3, *pulses) == (stopped, busy)


# Messages


def test_the_message_of_a_rank_that_raised_contains_its_traceback() -> None:
    failure = raised_on(2)
    assert failure[::2] == (2, 2)
    assert failure.text.startswith(f"{NAMES[2]} failed; the run was stopped:\n\nTraceback")
    assert 'raise ZeroDivisionError("the culprit")\n' in failure.text
    assert failure.text.endswith("ZeroDivisionError: the culprit\n")


@pytest.mark.parametrize(("code", "how"), [(3, "exit code 3"), (-9, "signal SIGKILL")])
def test_the_message_of_a_rank_that_exited_says_how(code: int, how: str) -> None:
    assert exited_child_of(0, 2, code).text == (
        f"{NAMES[2]} exited without an error message; the run was stopped: it was killed, ran out of memory, or "
        f"crashed ({how})."
    )


def test_the_message_of_a_rank_that_hangs_says_who_waits_for_what_and_where_it_hangs() -> None:
    state = make_state(1)
    failure = state.overdue(2, 2, "to send the next batch", "  File x, line 3\n")
    assert failure.text == (
        f"{NAMES[2]} hangs; the run was stopped: {NAMES[1]} has waited 30 s for {NAMES[2]} to send the next batch. "
        "If a step may take longer, raise DGLStrategy(timeout=...). It is here:\n\n  File x, line 3\n"
    )
    assert "It is here" not in state.overdue(2, None, "to save").text
    assert "has waited 30 s for the other ranks, to save. " in state.overdue(2, None, "to save").text


def test_the_message_of_ranks_that_all_wait_names_the_remedy() -> None:
    text = overdue_on(1, culprit=None).text
    assert text.startswith(f"The ranks have come apart: {NAMES[1]} has waited 30 s for {NAMES[2]} to send")
    assert text.endswith("A callback or hook that communicates, stops or skips must do so on every rank.")
