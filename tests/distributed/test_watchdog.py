"""Several watchdogs in one process, which share a store: a failure of one rank ends the waits of all."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dgl.distributed import failures, watchdog
from lightning_dgl.distributed.failures import RankFailedError
from lightning_dgl.distributed.watchdog import Process, Watchdog, this_process
from tests.distributed.conftest import Watchdogs


def wait_in_vain(dog: Watchdog, peer: int = 0) -> None:
    """Wait for what never happens."""

    def never() -> bool:
        time.sleep(dog.interval)
        return False

    dog.wait_until(never, peer, "to do something")


def in_thread(function: Callable[..., object], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def message_of(dog: Watchdog) -> str:
    """The failure that ``dog`` learns, sooner or later."""
    deadline = time.monotonic() + 20
    while dog.failure is None:
        assert time.monotonic() < deadline
        time.sleep(dog.interval)
    return str(dog.failure)


# A rank raises


def test_an_error_on_one_rank_ends_the_waits_of_all_and_rank_0_shows_it(watch: Watchdogs) -> None:
    dogs = watch(0, 1, 2)
    error = ZeroDivisionError("the culprit")
    dogs[2].report(error)
    with pytest.raises(RankFailedError, match=r"(?s)^Rank 2 failed; .*ZeroDivisionError: the culprit"):
        wait_in_vain(dogs[0], peer=1)
    with pytest.raises(SystemExit):
        wait_in_vain(dogs[1])
    assert [dog.is_silent for dog in dogs] == [False, True, True]
    if sys.version_info >= (3, 11):
        assert error.__notes__ == ["Raised on Rank 2."]


def test_a_rank_shows_its_own_error_if_rank_0_does_not_answer(watch: Watchdogs) -> None:
    (dog,) = watch(1, num_ranks=2)
    dog.report(ZeroDivisionError("the culprit"))
    assert not dog.is_silent
    assert "ZeroDivisionError: the culprit" in message_of(dog)


def test_of_two_failures_all_ranks_tell_the_first(watch: Watchdogs) -> None:
    dogs = watch(0, 1, 2)
    reports = [in_thread(dog.report, ValueError(f"error {rank}")) for rank, dog in enumerate(dogs)]
    for report in reports:
        report.join()
    assert len({message_of(dog) for dog in dogs}) == 1


def test_the_failure_of_another_rank_is_not_reported_as_one_of_this_rank(watch: Watchdogs) -> None:
    (dog,) = watch(0)
    dog.report(RankFailedError("Rank 1 failed"))
    assert dog.failure is None
    assert not dog.is_silent


def test_rank_0_waits_until_the_others_know_the_failure(watch: Watchdogs) -> None:
    store = dist.HashStore()
    dogs = watch(0, num_ranks=2, store=store)
    dogs[0].report(ZeroDivisionError("the culprit"))
    wait = in_thread(dogs[0].await_others)
    wait.join(0.1)
    assert wait.is_alive()
    (*_, other) = watch(1, num_ranks=2, store=store)
    wait.join()
    assert other.failure is not None


# A rank exits


def test_a_lost_rank_is_named_if_it_posts_nothing(watch: Watchdogs) -> None:
    dogs = watch(0, 1, num_ranks=3)
    dogs[1].lost(2, RuntimeError("connection reset by peer"))
    for dog in dogs:
        assert re.match(r"Rank 2 exited without an error message; .*\(connection reset by peer\)\.", message_of(dog))
    assert dogs[1].is_silent


def test_a_lost_rank_that_posts_its_error_in_time_explains_itself(
    watch: Watchdogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "_SUSPICION", 1.0)
    dogs = watch(0, 1, 2)
    dogs[1].lost(2, RuntimeError("connection reset by peer"))
    dogs[2].report(ZeroDivisionError("the culprit"))
    assert message_of(dogs[1]).startswith("Rank 2 failed; ")


def test_an_exited_child_is_named_with_its_exit_code(watch: Watchdogs) -> None:
    running = SimpleNamespace(poll=lambda: None)
    finished = SimpleNamespace(poll=lambda: 0)
    exited = SimpleNamespace(poll=lambda: 3, returncode=3)
    (dog,) = watch(0, num_ranks=4, children=[running, finished, exited])
    assert re.match(r"Rank 3 exited without an error message; .*\(exit code 3\)\.", message_of(dog))


def test_rank_1_speaks_for_rank_0_if_the_store_ends_with_it(watch: Watchdogs) -> None:
    hosts = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    for rank in (1, 2):
        dogs = watch(rank, num_ranks=3, store=dist.TCPStore("127.0.0.1", hosts[0].port, is_master=False))
    hosts.clear()
    for dog in dogs:
        assert message_of(dog).startswith("Rank 0 exited without an error message; ")
    assert [dog.is_silent for dog in dogs] == [False, True]


# A rank hangs


def test_a_busy_rank_is_blamed_with_the_lines_it_is_at(watch: Watchdogs) -> None:
    dogs = watch(0, 1, timeout=0.1)
    with pytest.raises(RankFailedError) as raised:  # rank 0 hangs, so rank 1 shows it
        wait_in_vain(dogs[1], peer=0)
    assert str(raised.value).startswith("Rank 0 hangs; the run was stopped: Rank 1 has waited 0.1 s for Rank 0 to do")
    # In this test the main thread is that of all ranks.
    assert re.search(r"It is here:\n.*wait_in_vain\(dogs\[1\], peer=0\)", str(raised.value), re.DOTALL)
    assert message_of(dogs[0]) == str(raised.value)


def test_a_rank_that_works_inside_a_collective_is_busy(watch: Watchdogs) -> None:
    dogs = watch(0, 1, timeout=0.1)
    expectation = pytest.raises(RankFailedError, match="Rank 1 hangs")
    with dogs[1].collective("to average gradients"), dogs[1].at_work(), expectation:
        wait_in_vain(dogs[0], peer=1)


@pytest.mark.parametrize("is_here", [True, False])
def test_a_rank_without_a_pulse_is_blamed_and_killed_if_it_is_on_this_host(is_here: bool, watch: Watchdogs) -> None:
    (dog,) = watch(0, num_ranks=2, timeout=0.1)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        host = socket.gethostname() if is_here else "another host"
        dog.processes = [this_process(), Process(host, process.pid)]
        with pytest.raises(RankFailedError, match="Rank 1 hangs; ") as raised:
            wait_in_vain(dog, peer=1)
        assert "It is here" not in str(raised.value)
        if not is_here:
            assert process.poll() is None
            process.terminate()
        assert process.wait() == -(signal.SIGKILL if is_here else signal.SIGTERM)


def test_rank_0_is_blamed_if_the_store_does_not_answer(watch: Watchdogs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PATIENCE", 0.1)
    answer = threading.Event()
    monkeypatch.setattr(watchdog._Heart, "_look", lambda heart: answer.wait(20))
    first, second = watch(1, 2, num_ranks=3, timeout=0.1)
    with pytest.raises(RankFailedError, match=r"Rank 0 hangs; .* Rank 1 has waited 0\.1 s for Rank 0 to do something"):
        wait_in_vain(first)
    second.report(ZeroDivisionError("the culprit"))
    assert not second.is_silent
    assert "ZeroDivisionError: the culprit" in message_of(second)
    answer.set()


def test_of_ranks_that_wait_for_a_store_that_does_not_answer_rank_1_speaks(
    watch: Watchdogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_killed = threading.Event()

    def look(heart: Any) -> None:
        if is_killed.wait(20):
            raise RuntimeError("connection reset by peer")

    monkeypatch.setattr(watchdog._Heart, "_look", look)
    monkeypatch.setattr(os, "kill", lambda *_: is_killed.set())
    first, second = watch(1, 2, num_ranks=3, timeout=0.1)
    first.processes = second.processes = [this_process()] * 3
    ends: queue.Queue[BaseException] = queue.Queue()

    def wait() -> None:
        try:
            wait_in_vain(second)
        except BaseException as error:
            ends.put(error)

    in_thread(wait)
    with pytest.raises(RankFailedError, match="Rank 0 hangs; "):
        wait_in_vain(first)
    assert isinstance(ends.get(timeout=20), SystemExit)
    assert [first.is_silent, second.is_silent] == [False, True]


def test_all_ranks_that_wait_have_come_apart(watch: Watchdogs) -> None:
    dogs = watch(0, 1, timeout=0.3)

    def wait() -> None:
        with pytest.raises(SystemExit):
            wait_in_vain(dogs[1], peer=0)

    other = in_thread(wait)
    with pytest.raises(RankFailedError, match=r"The ranks have come apart: Rank \d has waited"):
        wait_in_vain(dogs[0], peer=1)
    other.join()


# Collectives


def test_a_broken_collective_raises_the_failure_behind_it(watch: Watchdogs) -> None:
    dogs = watch(0, 1)
    with pytest.raises(RankFailedError, match="Rank 1 failed; ") as raised, dogs[0].collective("to average gradients"):
        dogs[1].report(ZeroDivisionError("the culprit"))
        raise RuntimeError("connection closed by peer")
    assert raised.value.__suppress_context__  # the user does not see torch's error


def test_a_broken_collective_names_the_rank_whose_heart_stopped(watch: Watchdogs) -> None:
    dogs = watch(0, 1, num_ranks=3)
    message = r"Rank 2 exited without an error message; .*\(closed by peer\)"
    with pytest.raises(RankFailedError, match=message), dogs[0].collective("to average gradients"):
        raise RuntimeError("closed by peer")
    assert message_of(dogs[1]).startswith("Rank 2 exited")


def test_a_collective_that_takes_too_long_blames_the_rank_that_does_not_come(watch: Watchdogs) -> None:
    dogs = watch(0, 1, timeout=0.1)
    message = "Rank 1 hangs; .* Rank 0 has waited 0.1 s for the other ranks, to average gradients"
    with pytest.raises(RankFailedError, match=message), dogs[0].collective("to average gradients"):
        time.sleep(0.2)
        raise RuntimeError("timed out")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("not for torch")], ids=repr)
def test_an_error_that_no_failure_explains_is_raised_unchanged(error: Exception, watch: Watchdogs) -> None:
    dogs = watch(0, 1)
    with pytest.raises(type(error)) as raised, dogs[0].collective("to average gradients"):
        raise error
    assert raised.value is error
    assert dogs[0].failure is None


def test_an_error_at_work_inside_a_collective_is_of_this_rank(watch: Watchdogs) -> None:
    (dog,) = watch(0, num_ranks=2)  # rank 1 has no pulse, and would be blamed
    error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError) as raised, dog.collective("to average gradients"), dog.at_work():
        raise error
    assert raised.value is error
    assert dog.failure is None


# Queues


def test_an_item_is_taken_when_it_arrives(watch: Watchdogs) -> None:
    (dog,) = watch(0)
    source: queue.Queue[str | None] = queue.Queue()
    in_thread(lambda: (time.sleep(0.1), source.put("first"), source.put(None)))
    assert dog.take(source, 1, "to send the next batch")[0] == "first"
    assert dog.take(source, 1, "to finish")[0] is None


def test_an_item_is_put_when_there_is_room(watch: Watchdogs) -> None:
    (dog,) = watch(0)
    target: queue.Queue[int] = queue.Queue(maxsize=1)
    taken: list[int] = []
    consumer = in_thread(lambda: (time.sleep(0.1), taken.append(target.get()), taken.append(target.get())))
    for item in (1, 2):
        dog.put(target, item, 1, "to take the next batch")
    consumer.join()
    assert taken == [1, 2]


def test_a_failure_ends_waits_for_a_queue(watch: Watchdogs) -> None:
    dogs = watch(0, 1)
    dogs[1].report(ZeroDivisionError("the culprit"))
    full: queue.Queue[int] = queue.Queue(maxsize=1)
    full.put(1)
    with pytest.raises(RankFailedError, match="the culprit"):
        dogs[0].put(full, 2, 1, "to take the next batch")
    with pytest.raises(RankFailedError, match="the culprit"):
        dogs[0].take(queue.Queue(), 1, "to send the next batch")


# The end


def test_a_process_that_is_asked_to_terminate_stops_waiting(watch: Watchdogs) -> None:
    (dog,) = watch(0, received_sigterm=lambda: True)
    with pytest.raises(SIGTERMException):
        dog.check()
    with pytest.raises(SIGTERMException):
        wait_in_vain(dog)


def test_a_rank_whose_main_thread_does_not_notice_a_failure_is_ended(
    watch: Watchdogs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failures, "GRACE", 0.1)
    ends: queue.Queue[int | str] = queue.Queue()

    def leave(code: int) -> None:
        ends.put(code)
        heart: Any = threading.current_thread()
        heart.stopped.set()

    monkeypatch.setattr(os, "_exit", leave)
    child = SimpleNamespace(poll=lambda: None, kill=lambda: ends.put("child"))
    dogs = watch(0, 1, num_ranks=3, children=[child])
    dogs[1].lost(2, RuntimeError("connection reset by peer"))
    assert [ends.get(timeout=20) for _ in range(4)].count(1) == 2
    assert capsys.readouterr().err.count("Watchdog: Rank 2 exited without an error message; ") == 1  # by rank 0


def test_nothing_is_left_of_a_watchdog_that_was_stopped(watch: Watchdogs) -> None:
    dogs = watch(0, 1)
    assert not dogs[0].is_stopped
    before = threading.active_count()
    dogs[0].stop()
    assert dogs[0].is_stopped
    assert threading.active_count() == before - 1
    assert not dogs[1].is_stopped
    assert dogs[1].failure is None
