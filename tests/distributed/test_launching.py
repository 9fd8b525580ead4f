"""However ranks are started, they come to the weights of one process."""

from __future__ import annotations

import pytest

from tests.distributed.jobs import Job, Outcome, by_hand, by_slurm, free_port
from tests.distributed.training import train


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights that the same training comes to in one process."""
    with Job(tmp_path_factory.mktemp("one_process")) as job:
        job.start(train, devices=1)
        (weights,) = job.wait().weights
    return weights


def assert_same_weights(outcome: Outcome, expected: list[str]) -> None:
    assert set(outcome.codes) == {0}, str(outcome)
    assert outcome.left == [], str(outcome)
    assert outcome.weights == expected, str(outcome)


@pytest.mark.slow  # test_a_script_with_one_trainer_after_another starts ranks so, too
def test_ranks_started_by_running_the_script_again(job: Job, in_one_process: str) -> None:
    job.start_script(start_method="popen")
    assert_same_weights(job.wait(), [in_one_process] * 2)


@pytest.mark.parametrize(
    "start_method",  # "fork" is what most tests of several ranks use
    ["spawn", pytest.param("fork", marks=pytest.mark.slow), pytest.param("forkserver", marks=pytest.mark.slow)],
)
def test_ranks_started_by_multiprocessing(start_method: str, job: Job, in_one_process: str) -> None:
    job.start(train, start_method=start_method)
    # The process that has called the Trainer, which is none of the ranks, ends with what they have learnt.
    assert_same_weights(job.wait(), [in_one_process])


def test_ranks_started_by_torchrun(job: Job, in_one_process: str) -> None:
    job.start_script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert_same_weights(job.wait(), [in_one_process] * 2)


@pytest.mark.slow
def test_ranks_started_by_torchrun_on_two_nodes(job: Job, in_one_process: str) -> None:
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "job"]
    for _ in range(2):
        job.start_script(
            *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting),
            devices=1,
            num_nodes=2,
        )
    assert_same_weights(job.wait(), [in_one_process] * 2)


def test_ranks_started_by_slurm(job: Job, in_one_process: str) -> None:
    job.start_ranks(train, by_slurm(2))
    assert_same_weights(job.wait(), [in_one_process] * 2)


@pytest.mark.parametrize(
    ("devices", "num_nodes"),
    [(2, 2), pytest.param(3, 1, marks=pytest.mark.slow), pytest.param(1, 3, marks=pytest.mark.slow)],
)
def test_ranks_started_by_hand(devices: int, num_nodes: int, job: Job, in_one_process: str) -> None:
    num_ranks = devices * num_nodes
    job.start_ranks(train, by_hand(num_ranks, num_nodes), devices=devices, num_nodes=num_nodes)
    assert_same_weights(job.wait(), [in_one_process] * num_ranks)
