"""Share what all benchmarks need: fresh processes, clocks, tables."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import statistics
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn

T = TypeVar("T")

# What the processes start with. torch.set_num_threads has the last word on threads. Freed memory is kept for the next
# step: by default glibc returns every large tensor to the system, and getting its pages back can be a third of a step.
# Its pages are large ones, where the system has them.
PROCESS_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the package's default optimizer, with a learning rate so small that training on noise never diverges."""
    return torch.optim.SGD(params, lr=1e-5, momentum=0.9, weight_decay=5e-4, fused=True)


class Backpropagation(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


class Clock(L.Callback):
    """Measures the seconds of the training steps after the first ``warm_up``."""

    seconds = 0.0

    def __init__(self, warm_up: int) -> None:
        self._warm_up = warm_up

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self._warm_up:
            _wait_for_device(module)
            self._began = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        _wait_for_device(module)
        self.seconds = time.perf_counter() - self._began


def _wait_for_device(module: L.LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


def quiet_trainer(devices: int = 1, **kwargs: Any) -> L.Trainer:
    """Return a Trainer for one epoch, by default on one device, that prints and writes nothing."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return L.Trainer(
        max_epochs=1,
        devices=devices,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


# Processes


def clean_up_when_terminated() -> None:
    """Let SIGTERM end this process as Ctrl-C does, with what stands after ``finally``."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def in_processes(num_ranks: int, threads: int, work: Callable[..., T], *args: Any, together: bool = True) -> list[T]:
    """Return what ``work(rank, *args)`` returns in ``num_ranks`` fresh processes with ``threads`` intra-op threads.

    The processes know each other as Lightning's ranks do, and as ``init_process_group`` expects, if they work
    ``together``. They are forked from one that has imported everything and computed nothing.
    """
    for name, value in PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_dgl", "torch.distributed.pipelining"])
    meeting_port = free_port() if together and num_ranks > 1 else None
    with ProcessPoolExecutor(num_ranks, context, initializer=_end_with_parent) as pool:
        ranks = [pool.submit(_work, rank, meeting_port, threads, work, *args) for rank in range(num_ranks)]
        return [rank.result() for rank in ranks]


def _end_with_parent() -> None:
    """End this process when its parent has ended, however that came about."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _work(rank: int, port: int | None, threads: int, work: Callable[..., T], *args: Any) -> T:
    if port is not None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        return work(rank, *args)
    except BaseException:  # by ending this process, end the others, too: they would wait for it
        traceback.print_exc()
        os._exit(1)


def with_share(rank: int, share: float, work: Callable[..., T], *args: Any) -> T:
    """Return what ``work(rank, *args)`` returns while this process gets ``share`` of a core at most.

    Below 1 it is limited by a control group, which needs root. So ranks that outnumber the cores are as slow as if each
    had a slower core to itself: none is faster while another one waits. Its threads stay on one core, because a control
    group hands out its time to each core in pieces of 5 ms.
    """
    if share >= 1:
        return work(rank, *args)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    groups = Path("/sys/fs/cgroup")
    has_v2 = (groups / "cgroup.controllers").exists()
    group = (groups if has_v2 else groups / "cpu") / f"dgl-{os.getpid()}"
    quota, period = round(share * 10_000), 10_000  # microseconds
    group.mkdir()
    if has_v2:
        (groups / "cgroup.subtree_control").write_text("+cpu")
        (group / "cpu.max").write_text(f"{quota} {period}")
    else:
        (group / "cpu.cfs_period_us").write_text(str(period))
        (group / "cpu.cfs_quota_us").write_text(str(quota))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        return work(rank, *args)
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


# Tables


def spread(values: Sequence[float], digits: int) -> str:
    """Return median, smallest and largest of ``values``, as text."""
    middle, least, most = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({least}–{most})"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, all columns but the first aligned to the right; nothing if it has no rows."""
    if not rows:
        return ""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(text: str, output: Path | None) -> None:
    """Print ``text``, and write it to ``output`` if given."""
    print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
