"""What cannot work on several ranks is refused on all of them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint, StochasticWeightAveraging
from torch.utils.data import DataLoader, IterableDataset

from lightning_dgl import Asynchronous, DGLStrategy, Synchronous
from tests.distributed.jobs import Job, by_hand
from tests.internals import another_version
from tests.runs import Backpropagation, loader, make_module, quiet_trainer, small_cnn, small_data


def fit(
    strategy: DGLStrategy | None = None, module: L.LightningModule | None = None, data: Any = None, **kwargs: Any
) -> None:
    trainer = quiet_trainer(strategy=strategy or DGLStrategy(timeout=60), num_nodes=2, **{"max_epochs": 2} | kwargs)
    trainer.fit(module or make_module(), loader() if data is None else data)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(small_data())


class Writer(BasePredictionWriter):
    pass


def predict() -> None:
    strategy = DGLStrategy(timeout=60)
    quiet_trainer(strategy=strategy, num_nodes=2, callbacks=[Writer("batch")]).predict(make_module(), loader())


def fit_with_another_version(rank: int) -> None:
    with another_version(f"1.{rank}"):
        fit()


class OtherSchedule(Synchronous):
    pass


def replicas(count: int = 2) -> DGLStrategy:
    return DGLStrategy(data_parallel_size=count, timeout=60)


DIFFERENTLY = "The ranks were started differently: "


def different(what: str, theirs: str, ours: str) -> str:
    return rf"{DIFFERENTLY}{what} is {theirs} on Rank 1 \(.*\), and {ours} on Rank 0 \(.*\)\. Start every rank with"


REFUSED: dict[str, tuple[Callable[[int], None], str]] = {
    "more stages than blocks": (
        lambda rank: fit(module=make_module(split_at=[])),
        "more stages than blocks: 2 ranks / data_parallel_size=1 make 2 stages, the module has 1 block",
    ),
    "another network": (
        lambda rank: fit(module=make_module(network=small_cnn(num_classes=4 + rank))),
        different("the network", r"network\.16\.weight: \(5, 16\), .*", r"network\.16\.weight: \(4, 16\), .*"),
    ),
    "another split": (
        lambda rank: fit(module=make_module(split_at=["2", "10"] if rank else ["2", "6"])),
        different("the list of blocks", r"\['0 to 2', '3 to 10', .*\]", r"\['0 to 2', '3 to 6', .*\]"),
    ),
    "another number of blocks": (
        lambda rank: fit(module=make_module(split_at=["2", "6"] if rank else ["6"])),
        rf"{DIFFERENTLY}the list of blocks is ",
    ),
    "too few blocks on one rank": (
        lambda rank: fit(module=make_module(split_at=[] if rank else ["2", "6"])),
        rf"{DIFFERENTLY}the list of blocks is \['0 to 16'\] on Rank 1",
    ),
    "another version": (fit_with_another_version, different("lightning-dgl", r"1\.1", r"1\.0")),
    "another flag": (lambda rank: fit(max_epochs=2 + rank), different(r"Trainer\(max_epochs\)", "3", "2")),
    "another schedule": (
        lambda rank: fit(DGLStrategy(OtherSchedule() if rank else "sync", timeout=60)),
        different("schedule", "OtherSchedule", "Synchronous"),
    ),
    "another data_parallel_size": (
        lambda rank: fit(replicas(1 + rank)),
        rf"{DIFFERENTLY}data_parallel_size is 2 on Rank 1 \(.*\), and 1 on Rank 0",
    ),
    "batches that are no pairs": (
        lambda rank: fit(data=DataLoader(small_data().tensors[0], batch_size=8)),  # type: ignore[arg-type]
        r"A batch must be a pair of tensors \(inputs, targets\), got Tensor",
    ),
    "a loader without length": (
        lambda rank: fit(data=DataLoader(Stream(), batch_size=8)),
        r"A data loader \(DataLoader\) has no length",
    ),
    "a loader of another length": (
        lambda rank: fit(data=loader(40 + 8 * rank)),
        r"The data loaders have different lengths, by rank: \[5, 6\] batches\. Every rank must have the same number",
    ),
    "a loader of another length, replicas": (
        lambda rank: fit(replicas(), data=loader(40 + 8 * rank), use_distributed_sampler=False),
        r"The data loaders have different lengths, by rank: \[5, 6\] batches\. .*use_distributed_sampler=True",
    ),
    "no DGLModule": (
        lambda rank: fit(module=Backpropagation(small_cnn())),
        r"DGLStrategy trains a DGLModule, got Backpropagation.*DGLModule\(",
    ),
    "saving by a training value at every step": (
        lambda rank: fit(
            callbacks=[ModelCheckpoint(monitor="train/loss", every_n_train_steps=1)], enable_checkpointing=True
        ),
        "ModelCheckpoint monitors 'train/loss' with every_n_train_steps=1, but .*save_on_train_epoch_end=True",
    ),
    "saving by a training value now and then": (
        lambda rank: fit(
            callbacks=[ModelCheckpoint(monitor="train/loss", train_time_interval=timedelta(minutes=1))],
            enable_checkpointing=True,
        ),
        r"ModelCheckpoint monitors 'train/loss' with train_time_interval=datetime.timedelta\(seconds=60\), but",
    ),
    "averaged weights": (
        lambda rank: fit(callbacks=[StochasticWeightAveraging(1e-2)]),
        "StochasticWeightAveraging needs the weights of the whole network",
    ),
    "writing predictions batch by batch": (
        lambda rank: predict(),
        r"Writer writes predictions batch by batch, .*write_interval='epoch'",
    ),
    "synchronised BatchNorm": (
        lambda rank: fit(replicas(), sync_batchnorm=True),
        r"sync_batchnorm=True is not supported with data_parallel_size > 1: .*sync_batchnorm=False",
    ),
    "simulated slow blocks": (
        lambda rank: fit(DGLStrategy(Asynchronous(slowdown={1: 2.0}), timeout=60)),
        r"slowdown=\{1: 2.0\} simulates slow blocks in one process; on several ranks their real speeds decide",
    ),
    "simulated asynchrony in replicas": (
        lambda rank: fit(DGLStrategy("async", data_parallel_size=2, timeout=60)),
        "asynchronous schedule simulates slow blocks in one process, without replicas, but data_parallel_size=2",
    ),
    "replayed batches of another shape": (
        lambda rank: fit(
            DGLStrategy("async", timeout=60),
            data=DataLoader([*loader(), (torch.randn(8, 3, 10, 10), torch.zeros(8).long())], batch_size=None),
        ),
        r"samples of one shape and dtype: activation has \(8, 10, 10\), torch.float32, earlier ones \(8, 8, 8\)",
    ),
}


def attempt(case: str) -> None:
    act, _ = REFUSED[case]
    act(int(os.environ["NODE_RANK"]))
    print("done")


ALIKE = ("another number of blocks", "too few blocks on one rank")
"""Cases that are found as others are."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in ALIKE else case for case in REFUSED]
)
def test_what_cannot_work_is_refused_on_every_rank(case: str, job: Job) -> None:
    job.start_ranks(attempt, by_hand(2, num_nodes=2), case=case)
    outcome = job.wait()
    assert outcome.codes == [1, 1], str(outcome)
    assert outcome.left == [], str(outcome)
    for output in outcome.outputs:
        assert re.search(REFUSED[case][1], output), str(outcome)
        assert "done" not in output


# What is refused before there are ranks


def test_devices_that_cannot_be_dealt_to_replicas() -> None:
    message = r"devices × num_nodes \(3 × 1\) must be a multiple of data_parallel_size=2"
    with pytest.raises(ValueError, match=message):
        L.Trainer(accelerator="cpu", devices=3, strategy=DGLStrategy(data_parallel_size=2))


def test_running_a_notebook_as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(ValueError, match=r"start_method='popen'.*each of 2 ranks.*DGLStrategy\(start_method='fork'\)"):
        L.Trainer(accelerator="cpu", devices=2, strategy="dgl")
    L.Trainer(accelerator="cpu", devices=2, strategy=DGLStrategy(start_method="fork"), logger=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefetch": 0}, "prefetch must be an integer of at least 1, got 0"),
        ({"prefetch": 1.5}, r"prefetch must be an integer of at least 1, got 1\.5"),
        ({"data_parallel_size": 0}, "data_parallel_size must be an integer of at least 1, got 0"),
        ({"timeout": 0}, "timeout must be positive, got 0"),
        ({"timeout": -1.5}, r"timeout must be positive, got -1\.5"),
        ({"start_method": "thread"}, "start_method must be one of 'popen', .*got 'thread'"),
    ],
)
def test_arguments_of_the_strategy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DGLStrategy(**arguments)
