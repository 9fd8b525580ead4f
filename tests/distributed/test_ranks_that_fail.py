"""Whatever becomes of one rank becomes of the whole job: it ends, with one message that names the rank and its blocks.

No process is left, and the checkpoints that were saved before are whole.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.jobs import Job, Outcome, by_hand
from tests.distributed.training import Module, train, weights_of
from tests.runs import make_module


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Job, Outcome]]:
    """The same training in one process, where nothing fails."""
    with Job(tmp_path_factory.mktemp("undisturbed")) as job:
        job.start(train, devices=1)
        yield job, job.wait()


def start(job: Job, how: str, devices: int, **arguments: Any) -> None:
    """Start ranks as a script does, by forking the process that has called the Trainer, or without such a process."""
    if how == "popen":
        job.start_script(devices=devices, **arguments)
    elif how == "fork":
        job.start(train, devices=devices, start_method="fork", **arguments)
    else:
        job.start_ranks(train, by_hand(devices), devices=devices, **arguments)


BLOCKS = {2: ["blocks 0 to 1", "blocks 2 to 3"], 3: ["blocks 0 to 1", "block 2", "block 3"]}


def name(rank: int, num_stages: int) -> str:
    """How messages speak of a rank."""
    return f"Rank {rank} ({BLOCKS[num_stages][rank % num_stages]})"


def assert_all_ended(outcome: Outcome) -> None:
    assert 0 not in outcome.codes, str(outcome)
    assert outcome.left == [], str(outcome)
    assert outcome.weights == [], str(outcome)


def messages(outcome: Outcome) -> list[str]:
    """The first line of each message that the watchdog has brought to the user."""
    return re.findall(r"^(?:\[rank\d+\]: )?(?:\S*RankFailedError|Watchdog): (.*)", outcome.output, re.MULTILINE)


def assert_checkpoint_is_whole(job: Job, undisturbed: tuple[Job, Outcome]) -> None:
    """The first epoch's checkpoint holds every block's weights and optimizer state, as that of one process does."""

    def content(folder: Path, file: str) -> list[Any]:
        checkpoint = torch.load(folder / "checkpoints" / file, weights_only=False)
        states = [block["state"] for block in checkpoint["optimizer_states"][0]["blocks"]]
        assert len(states) == 4
        assert all(states)
        return [checkpoint["state_dict"], states]

    expected = content(undisturbed[0].folder, "epoch=0.ckpt")
    for file in ("epoch=0.ckpt", "last.ckpt"):
        torch.testing.assert_close(content(job.folder, file), expected, rtol=0, atol=0)


# One rank fails


@pytest.mark.parametrize(("how", "rank"), [pytest.param("popen", 1, marks=pytest.mark.slow), ("hand", 2)])
def test_error_on_a_later_rank_is_shown_by_rank_0(
    how: str, rank: int, job: Job, undisturbed: tuple[Job, Outcome]
) -> None:
    start(job, how, 3, fault="raise", on=rank)
    outcome = job.wait()
    assert_all_ended(outcome)
    assert messages(outcome) == [f"{name(rank, 3)} failed; the run was stopped:"]
    # Rank 0's traceback, and within its message that of the rank that has failed, down to the line.
    assert outcome.output.count("Traceback") == 2
    assert outcome.output.count('raise ZeroDivisionError("the culprit")\n') == 1
    assert outcome.output.count("ZeroDivisionError: the culprit\n") == 1
    assert_checkpoint_is_whole(job, undisturbed)


def test_error_on_rank_0_is_its_own(job: Job, undisturbed: tuple[Job, Outcome]) -> None:
    start(job, "hand", 2, fault="raise", on=0)
    outcome = job.wait()
    assert_all_ended(outcome)
    assert messages(outcome) == []
    assert outcome.output.count("Traceback") == 1
    note = r"\n(\[rank0\]: )?Raised on Rank 0 \(blocks 0 to 1\)\." if sys.version_info >= (3, 11) else ""
    assert re.search(f"ZeroDivisionError: the culprit{note}", outcome.output)
    assert_checkpoint_is_whole(job, undisturbed)


def test_a_rank_that_goes_on_reads_no_old_weights(job: Job, undisturbed: tuple[Job, Outcome]) -> None:
    start(job, "hand", 2, fault="raise", on=1, goes_on=True)
    outcome = job.wait()
    assert sorted(outcome.codes) == [0, 1], str(outcome)
    assert outcome.output.count("reads: Block 2 was trained on rank 1, and its weights are lost") == 2, str(outcome)
    saved = torch.load(job.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    module = make_module(kind=Module, dropout=0.2)
    module.load_state_dict(saved)
    assert outcome.weights == [weights_of(module)]


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_error_on_a_rank_is_raised_by_fit_in_the_process_that_has_started_it(
    start_method: str, job: Job, undisturbed: tuple[Job, Outcome]
) -> None:
    job.start(train_and_catch, start_method=start_method, fault="raise", on=1)
    outcome = job.wait()
    assert outcome.codes == [0], str(outcome)  # the error was caught
    assert outcome.left == [], str(outcome)
    caught = (job.folder / "caught").read_text()
    assert name(1, 2) in caught
    assert 'raise ZeroDivisionError("the culprit")\n' in caught
    assert "ZeroDivisionError: the culprit\n" in caught
    assert_checkpoint_is_whole(job, undisturbed)


def train_and_catch(**arguments: Any) -> None:
    try:
        train(**arguments)
    except Exception as error:
        Path("caught").write_text("".join(traceback.format_exception_only(type(error), error)))


@pytest.mark.parametrize(
    ("how", "devices", "fault", "what"),
    [
        pytest.param("popen", 2, "kill", "signal SIGKILL", marks=pytest.mark.slow),
        ("fork", 2, "exit", "exit code 3|crashed"),  # the process that has started it knows more, if it is the first
        ("hand", 3, "kill", "crashed"),
    ],
    ids=["popen", "fork", "hand"],
)
def test_rank_that_ends_without_a_word(
    how: str, devices: int, fault: str, what: str, job: Job, undisturbed: tuple[Job, Outcome]
) -> None:
    start(job, how, devices, fault=fault, on=1)
    outcome = job.wait()
    assert_all_ended(outcome)
    (message,) = messages(outcome)
    assert message.startswith(f"{name(1, devices)} exited without an error message; the run was stopped: ")
    assert re.search(what, message)
    assert_checkpoint_is_whole(job, undisturbed)


def test_rank_that_is_killed_while_all_others_wait_for_it_in_common(job: Job) -> None:
    # No link breaks: rank 1 has nothing to send to rank 2, so that its end is noticed only where all ranks meet.
    start(job, "hand", 3, fault="kill", on=2, phase="end of epoch")
    outcome = job.wait()
    assert_all_ended(outcome)
    (message,) = messages(outcome)
    assert message.startswith(f"{name(2, 3)} exited without an error message; the run was stopped: ")


def test_rank_0_that_is_killed(job: Job, undisturbed: tuple[Job, Outcome]) -> None:
    # It shows the others' failures otherwise, and with it goes the store through which they learn of one.
    start(job, "hand", 3, fault="kill", on=0)
    outcome = job.wait()
    assert_all_ended(outcome)
    (message,) = messages(outcome)
    assert message.startswith(f"{name(0, 3)} exited without an error message; the run was stopped: ")
    assert_checkpoint_is_whole(job, undisturbed)


@pytest.mark.parametrize(
    ("how", "devices", "rank"),
    [
        ("hand", 2, 0),
        pytest.param("hand", 3, 1, marks=pytest.mark.slow),
        pytest.param("fork", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_rank_that_hangs_is_found_and_shown_with_what_it_does(
    how: str, devices: int, rank: int, job: Job, undisturbed: tuple[Job, Outcome]
) -> None:
    start(job, how, devices, fault="hang", on=rank, timeout=5)
    outcome = job.wait()
    assert_all_ended(outcome)
    (message,) = messages(outcome)
    assert message.startswith(f"{name(rank, devices)} hangs; the run was stopped: ")
    assert message.endswith("It is here:")
    assert outcome.output.count("time.sleep(10_000)  # this line is to be found in the message") == 1
    assert_checkpoint_is_whole(job, undisturbed)


def test_frozen_rank_is_found(job: Job, undisturbed: tuple[Job, Outcome]) -> None:
    start(job, "hand", 2, fault="freeze", on=1, timeout=5)
    outcome = job.wait()
    assert_all_ended(outcome)
    assert outcome.codes[1] == -signal.SIGKILL
    (message,) = messages(outcome)
    assert message.startswith(f"{name(1, 2)} hangs; the run was stopped: ")
    assert_checkpoint_is_whole(job, undisturbed)


def test_data_set_that_fails(job: Job, undisturbed: tuple[Job, Outcome]) -> None:
    start(job, "hand", 2, fault="break data", on=0)
    outcome = job.wait()
    assert_all_ended(outcome)
    assert messages(outcome) == []
    assert outcome.outputs[0].count("OSError: this sample cannot be read") == 1
    assert "Traceback" not in outcome.outputs[1]
    assert_checkpoint_is_whole(job, undisturbed)


def test_loss_that_is_not_finite_on_a_later_rank(job: Job) -> None:
    start(job, "hand", 2, fault="break loss", on=1, split_at=["6"])
    outcome = job.wait()
    assert_all_ended(outcome)
    assert messages(outcome) == ["Rank 1 (block 1) failed; the run was stopped:"]
    # The fourth batch of the second epoch.
    assert re.search(r"NonFiniteLossError: The local loss of block 1 \(.*\) is nan at step 11\.", outcome.outputs[0])
    assert "Traceback" not in outcome.outputs[1]


# With replicas: rank 2 holds the same blocks as rank 0, which waits for it to average gradients


def test_error_in_another_replica(job: Job) -> None:
    start(job, "hand", 4, fault="raise", on=2, data_parallel_size=2)
    outcome = job.wait()
    assert_all_ended(outcome)
    assert messages(outcome) == [f"{name(2, 2)} failed; the run was stopped:"]
    assert outcome.outputs[0].count("ZeroDivisionError: the culprit\n") == 1


@pytest.mark.slow
def test_rank_of_another_replica_that_is_killed(job: Job) -> None:
    start(job, "hand", 4, fault="kill", on=2, data_parallel_size=2)
    outcome = job.wait()
    assert_all_ended(outcome)
    (message,) = messages(outcome)
    assert message.startswith(f"{name(2, 2)} exited without an error message; the run was stopped: ")


def test_rank_of_another_replica_that_hangs(job: Job) -> None:
    start(job, "hand", 4, fault="hang", on=2, data_parallel_size=2, timeout=5)
    outcome = job.wait()
    assert_all_ended(outcome)
    assert outcome.codes[2] == -signal.SIGKILL
    (message,) = messages(outcome)
    assert message.startswith(f"{name(2, 2)} hangs; the run was stopped: ")


# The user, or the cluster, ends the job


@pytest.mark.parametrize(
    "kill", [pytest.param(os.kill, id="process", marks=pytest.mark.slow), pytest.param(os.killpg, id="group")]
)
def test_interrupt_ends_every_rank(kill: Callable[[int, int], None], job: Job) -> None:
    # A terminal's Ctrl-C goes to the group, a notebook's interrupt to the one process that it knows.
    start(job, "popen", 2, fault="announce", on=1, max_epochs=10_000)
    job.wait_for_file("training")
    kill(job.pids[0], signal.SIGINT)
    outcome = job.wait()
    assert_all_ended(outcome)
    assert "Detected KeyboardInterrupt" in outcome.output


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_rank_that_is_told_to_terminate_ends_every_rank(rank: int, job: Job) -> None:
    # As if on two nodes, as each node's first rank says what has happened.
    job.start_ranks(train, by_hand(2, num_nodes=2), devices=1, num_nodes=2, fault="terminate", on=rank)
    outcome = job.wait()
    # The other rank has done as it was told, and ends as Lightning lets it end.
    assert outcome.codes[1 - rank] == 1, str(outcome)
    assert outcome.left == [], str(outcome)
    assert outcome.weights == [], str(outcome)
    assert messages(outcome) == [f"{name(rank, 2)} failed; the run was stopped:"]
    assert "SIGTERMException" in outcome.outputs[1 - rank]


# Ranks that do not do the same


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_training_stopped_on_one_rank_only_is_an_error(rank: int, job: Job, undisturbed: tuple[Job, Outcome]) -> None:
    start(job, "hand", 2, fault="stop training", on=rank)
    outcome = job.wait()
    assert_all_ended(outcome)
    assert "The ranks have come apart" in outcome.outputs[0]
    assert "must do so on every rank" in outcome.outputs[0]
    assert_checkpoint_is_whole(job, undisturbed)


# After a failure


@pytest.mark.slow
def test_torchrun_restarts_a_crashed_job_which_goes_on_from_its_last_checkpoint(
    job: Job, undisturbed: tuple[Job, Outcome]
) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    job.start_script(*torchrun, fault="crash once", on=1, resume=True)
    outcome = job.wait()
    assert outcome.codes == [0], str(outcome)
    assert outcome.left == [], str(outcome)
    assert (job.folder / "crashed").exists()
    assert outcome.weights == undisturbed[1].weights * 2, str(outcome)


@pytest.mark.parametrize(("how", "rank"), [pytest.param("fork", 0, marks=pytest.mark.slow), ("hand", 1)])
def test_saving_a_checkpoint_on_a_failure_does_not_hide_it(
    how: str, rank: int, job: Job, undisturbed: tuple[Job, Outcome]
) -> None:
    start(job, how, 2, fault="raise", on=rank, save_on_exception=True)
    outcome = job.wait()
    assert_all_ended(outcome)
    assert "ZeroDivisionError: the culprit\n" in outcome.output
    assert "No checkpoint is saved after a failure" in outcome.output
    assert "During handling of the above exception" not in outcome.output
    assert not (job.folder / "on_exception.ckpt").exists()
    assert_checkpoint_is_whole(job, undisturbed)
