"""Fixtures for tests of several ranks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

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
