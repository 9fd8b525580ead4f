"""Asynchronous DGL on several ranks, real processes: who waits for whom, what is dropped, and where all meet."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_dgl import Asynchronous, BlockMonitor, DGLStrategy
from tests.distributed.jobs import PATIENCE, Job, Outcome, by_hand
from tests.distributed.training import Module, weights_of
from tests.internals import blocks_here, buffers, links_of, num_dropped, slow_link, updates
from tests.runs import loader, make_module, quiet_trainer

BATCHES = 60  # of each epoch


BLOCKS = {2: [range(0, 2), range(2, 4)], 3: [range(0, 2), range(2, 3), range(3, 4)]}


class Steps(L.Callback):
    """Writes down how many steps this rank has taken, after each; may take its time, and wait for a file at one."""

    def __init__(self, seconds: float, hold: tuple[int, int] | None) -> None:
        self._seconds, self._hold = seconds, hold

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        path = Path(f"steps{trainer.global_rank}")
        path.with_suffix(".new").write_text(str(trainer.global_step))
        path.with_suffix(".new").rename(path)
        time.sleep(self._seconds)
        while self._hold == (trainer.global_rank, trainer.global_step) and not Path("go").exists():
            time.sleep(0.01)


class Ending(L.Callback):
    """Writes down what this rank's link and buffer have seen when training ends."""

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        buffer = next(iter(buffers(links_of(pl_module)).values()), None)
        taken = updates(pl_module)
        end = {
            "updates": [taken[j] for j in blocks_here(trainer)],
            "drops": num_dropped(trainer),
            "reads": None if buffer is None else buffer.take_reads().__dict__,
        }
        Path(f"end{trainer.global_rank}").write_text(json.dumps(end))


def train(
    schedule: Asynchronous,
    *,
    devices: int = 2,
    link_seconds: float = 0.0,
    seconds: float = 0.0,
    hold: tuple[int, int] | None = None,
    callbacks: list[Any] | None = None,
    resume: str | None = None,
    timeout: float = 60,
    max_epochs: int = 1,
    validate: bool = True,
    **kwargs: Any,
) -> None:
    """Train; each message of training takes ``link_seconds`` more."""
    L.seed_everything(3, verbose=False)
    trainer = quiet_trainer(
        strategy=DGLStrategy(schedule, timeout=timeout, data_parallel_size=kwargs.pop("data_parallel_size", 1)),
        devices=devices,
        max_epochs=max_epochs,
        callbacks=[Steps(seconds, hold), Ending(), *(callbacks or [])],
        **kwargs,
    )
    module = make_module(kind=Module, dropout=0.2)
    with slow_link(trainer, link_seconds):
        trainer.fit(module, loader(8 * BATCHES), loader(16) if validate else None, ckpt_path=resume, weights_only=False)
    print(f"Rank {trainer.global_rank} ends with the weights {weights_of(module)}", flush=True)
    values = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    print(f"metrics {json.dumps(values, sort_keys=True)}", flush=True)


def start(job: Job, devices: int, schedule: Asynchronous, **arguments: Any) -> None:
    job.start_ranks(train, by_hand(devices), devices=devices, schedule=schedule, **arguments)


def assert_all_agree(outcome: Outcome) -> None:
    assert set(outcome.codes) == {0}, str(outcome)
    assert len(outcome.weights) == len(outcome.codes)
    assert len(set(outcome.weights)) == 1, str(outcome)
    metrics = [line for line in outcome.output.splitlines() if line.startswith("metrics ")]
    assert len(metrics) == len(outcome.codes)
    assert len(set(metrics)) == 1, metrics


def ends(job: Job) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted(job.folder.glob("end*"))]


def steps(job: Job, rank: int) -> int:
    path = job.folder / f"steps{rank}"
    return int(path.read_text()) if path.exists() else 0


def wait_until(job: Job, condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} does not happen: {[steps(job, r) for r in range(3)]}, {job.wait()}"
        time.sleep(0.01)


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_every_rank_takes_as_many_steps_and_ends_with_the_same_network(devices: int, job: Job) -> None:
    start(job, devices, Asynchronous(), max_epochs=2)
    assert_all_agree(job.wait())
    assert [end["updates"] for end in ends(job)] == [[2 * BATCHES] * len(blocks) for blocks in BLOCKS[devices]]


@pytest.mark.parametrize(
    "stopped",
    [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)],  # 1 has both neighbours
)
def test_while_one_rank_is_stopped_the_others_go_on(stopped: int, job: Job) -> None:
    start(job, 3, Asynchronous(buffer_size=4, max_lead=25), seconds=0.005)
    wait_until(job, lambda: steps(job, stopped) >= 10, f"step 10 of rank {stopped}")
    os.kill(job.pids[stopped], signal.SIGSTOP)
    try:
        at = steps(job, stopped)
        for other in {0, 1, 2} - {stopped}:
            # Those before it go on to the end of the epoch; those after it are ahead by as much as they may be.
            expected = BATCHES if other < stopped else at + 20
            wait_until(job, lambda other=other, n=expected: steps(job, other) >= n, f"step {expected} of rank {other}")
        assert steps(job, stopped) <= at + 1
    finally:
        os.kill(job.pids[stopped], signal.SIGCONT)
    assert_all_agree(job.wait())
    assert [set(end["updates"]) for end in ends(job)] == [{BATCHES}] * 3


def test_a_stage_is_ahead_of_the_one_before_it_by_max_lead_at_most(job: Job) -> None:
    start(job, 2, Asynchronous(max_lead=7), hold=(0, 20))
    wait_until(job, lambda: steps(job, 1) >= 27, "step 27 of rank 1")
    time.sleep(1)  # in which it could take many more
    assert (steps(job, 0), steps(job, 1)) == (20, 27)
    (job.folder / "go").touch()
    assert_all_agree(job.wait())


def test_over_a_slow_link_the_freshest_outputs_win_and_nobody_waits(job: Job) -> None:
    # The link takes 200 ms a message, a step some milliseconds.
    start(job, 2, Asynchronous(buffer_size=3), link_seconds=0.2)
    assert_all_agree(job.wait())
    sender, receiver = ends(job)
    assert sender["drops"] > BATCHES / 2
    assert receiver["reads"]["count"] == BATCHES
    assert receiver["reads"]["total_uses"] > BATCHES / 2  # it trains on what it has, again and again


def test_a_slow_successor_does_not_hold_up_the_one_before_it(job: Job) -> None:
    start(job, 2, Asynchronous(), hold=(1, 5))
    wait_until(job, lambda: steps(job, 0) == BATCHES, "the last step of rank 0")
    assert steps(job, 1) == 5
    (job.folder / "go").touch()
    assert_all_agree(job.wait())
    assert [end["updates"] for end in ends(job)] == [[BATCHES] * 2] * 2


def test_a_stage_whose_batches_are_used_up_waits_for_another(job: Job) -> None:
    start(job, 2, Asynchronous(buffer_size=4, max_reuse=2), hold=(0, 10))
    # Of the batches 0 to 9 each is used twice at most.
    wait_until(job, lambda: steps(job, 0) == 10, "step 10 of rank 0")
    time.sleep(1)
    assert steps(job, 1) <= 20
    (job.folder / "go").touch()
    assert_all_agree(job.wait())


class LogInEveryStep(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        pl_module.log("step", float(trainer.global_step), on_step=False, on_epoch=True, rank_zero_only=True)


@pytest.mark.parametrize("val_check_interval", [1.0, 0.5])
def test_a_late_stage_skips_steps_rather_than_use_a_batch_too_often(val_check_interval: float, job: Job) -> None:
    # When rank 1 goes on, rank 0 has sent its last batch, and waits for it; rank 2 still waits for the next one.
    schedule, meets_at = Asynchronous(buffer_size=3, max_reuse=1), int(val_check_interval * BATCHES)
    options: dict[str, Any] = {"val_check_interval": val_check_interval, "callbacks": [LogInEveryStep()]}
    start(job, 3, schedule, hold=(1, 5), max_epochs=2, **options)
    wait_until(job, lambda: steps(job, 0) == meets_at, "the step of rank 0 before the validation")
    (job.folder / "go").touch()
    assert_all_agree(job.wait())
    first, second, third = ends(job)
    assert first["updates"] == [2 * BATCHES] * 2
    # 6 at most before it is held, one on its way, 3 in the buffer, and all that follow
    assert 5 < second["updates"][0] <= 10 + 2 * BATCHES - meets_at
    assert 0 < third["updates"][0] <= second["updates"][0]
    for end in (second, third):
        assert end["reads"]["count"] == end["updates"][0]
        assert end["reads"]["total_uses"] == 0  # each batch was used once


def test_late_replicas_take_used_up_batches(job: Job) -> None:
    # They average gradients in every step, so they take each step together.
    start(job, 4, Asynchronous(buffer_size=2, max_reuse=1), data_parallel_size=2, hold=(3, 5))
    wait_until(job, lambda: steps(job, 0) == BATCHES // 2, "the last step of rank 0")
    (job.folder / "go").touch()
    assert_all_agree(job.wait())
    assert [end["updates"] for end in ends(job)] == [[BATCHES // 2] * 2] * 4


def test_replicas_of_asynchronous_stages(job: Job) -> None:
    start(job, 4, Asynchronous(), data_parallel_size=2)
    assert_all_agree(job.wait())
    assert [end["updates"] for end in ends(job)] == [[BATCHES // 2] * 2] * 4


def test_accumulation_counts_each_ranks_own_batches(job: Job) -> None:
    start(job, 2, Asynchronous(), accumulate_grad_batches=4)
    assert_all_agree(job.wait())
    assert (steps(job, 0), steps(job, 1)) == (BATCHES // 4, BATCHES // 4)


def test_monitor_logs_every_block_through_rank_0(job: Job) -> None:
    start(job, 3, Asynchronous(), callbacks=[BlockMonitor()], logger=CSVLogger("csv", name=""), log_every_n_steps=5)
    assert_all_agree(job.wait())
    (path,) = job.folder.glob("csv/**/metrics.csv")
    header = path.read_text().splitlines()[0].split(",")
    of_every_block = {f"monitor/{name}_block{j}" for name in ("updates", "samples_per_second") for j in range(4)}
    of_buffers = {
        f"monitor/{name}_block{j}"
        for name in ("age_mean", "age_max", "reuse", "buffer_batches", "buffer_bytes")
        for j in (2, 3)
    }
    of_links = {f"monitor/{name}_block{j}" for name in ("drops", "bytes_per_step") for j in (1, 2)}
    assert of_every_block | of_buffers | of_links | {"monitor/age"} == {n for n in header if n.startswith("monitor/")}


def test_a_checkpoint_resumes_on_other_numbers_of_ranks(job: Job, tmp_path: Path) -> None:
    saving = ModelCheckpoint(job.folder / "checkpoints", save_last=True)
    start(job, 3, Asynchronous(), callbacks=[saving], enable_checkpointing=True)
    assert_all_agree(job.wait())
    last = str(job.folder / "checkpoints" / "last.ckpt")
    for devices in (1, 2):
        (tmp_path / str(devices)).mkdir()
        with Job(tmp_path / str(devices)) as other:
            other.start_ranks(
                train, by_hand(devices), devices=devices, schedule=Asynchronous(), resume=last, max_epochs=2
            )
            assert_all_agree(other.wait())
            updates = [count for end in ends(other) for count in end["updates"]]
            assert len(updates) == 4
            assert updates[0] == 2 * BATCHES
            if devices == 2:  # in one process turns are drawn
                assert updates == [2 * BATCHES] * 4


def test_a_rank_that_is_killed_ends_all(job: Job) -> None:
    start(job, 3, Asynchronous(), seconds=0.005)
    wait_until(job, lambda: steps(job, 1) >= 10, "step 10 of rank 1")
    os.kill(job.pids[1], signal.SIGKILL)
    outcome = job.wait()
    assert outcome.codes[1] == -signal.SIGKILL
    assert 0 not in outcome.codes
    assert "Rank 1 (block 2) exited without an error message; the run was stopped" in outcome.output, str(outcome)
    assert outcome.left == []


def test_a_rank_that_hangs_ends_all(job: Job) -> None:
    start(job, 2, Asynchronous(max_lead=3), hold=(0, 10), timeout=5)
    outcome = job.wait()
    assert 0 not in outcome.codes
    assert "Rank 0 (blocks 0 to 1) hangs; the run was stopped" in outcome.output, str(outcome)
    assert outcome.left == []
