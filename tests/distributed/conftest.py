"""Fixtures for tests of several ranks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lightning_dgl.distributed import failures, watchdog
from lightning_dgl.distributed.watchdog import Watchdog
from tests.distributed.jobs import Job
from tests.distributed.ranks import Launch, Run
from tests.distributed.ranks import launch as launch_into


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A training in processes of its own, ended with the test."""
    with Job(tmp_path) as job:
        yield job


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Let a Trainer act on some ranks; see :func:`tests.distributed.ranks.launch`."""
    if torch.cuda.is_available():
        pytest.skip("a process that has seen a GPU cannot be forked: run these tests with CUDA_VISIBLE_DEVICES=''")
    numbers = itertools.count()

    def launch(*args: Any, **kwargs: Any) -> Run:
        return launch_into(tmp_path / f"run{next(numbers)}", *args, **kwargs)

    # One thread each: sums in the same order everywhere, and no thread pool, which would not survive the fork.
    # Lightning sets the number of threads by itself, unless the environment does.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        yield launch
    torch.set_num_threads(threads)


Watchdogs = Callable[..., list[Watchdog]]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watchdogs]:
    """Start watchdogs of some ranks, of which only rank 0 is loud; stop them after the test.

    Their hearts beat ten times as fast as in a run, and they wait less.
    """
    monkeypatch.setattr(Watchdog, "interval", 0.02)
    monkeypatch.setattr(watchdog, "_FEW_BEATS", 0.4)
    monkeypatch.setattr(watchdog, "PATIENCE", 1.0)
    monkeypatch.setattr(failures, "_SUSPICION", 0.1)
    monkeypatch.setattr(failures, "_SUSPICION_OF_LAUNCHER", 0.05)
    started: list[Watchdog] = []

    def start(*ranks: int, num_ranks: int = 0, store: Any = None, **kwargs: Any) -> list[Watchdog]:
        store = store or dist.HashStore()
        names = [f"Rank {rank}" for rank in range(num_ranks or len(ranks))]
        defaults: dict[str, Any] = {"timeout": 30.0, "received_sigterm": lambda: False, "children": []}
        for rank in ranks:
            started.append(Watchdog(store, rank, names, is_loud=rank == 0, **{**defaults, **kwargs}))
        return started

    yield start
    for dog in started:
        dog.stop()
