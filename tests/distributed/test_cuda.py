"""What only a GPU can show of several ranks; all of them are on one."""

from __future__ import annotations

import itertools
import os
import queue
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_dgl import Asynchronous, DGLModule, DGLStrategy, RankFailedError, VectorQuantizer
from lightning_dgl.address import Address
from lightning_dgl.distributed import Inbox, Outbox
from tests.distributed.ranks import Run
from tests.distributed.ranks import launch as launch_into
from tests.runs import loader, make_module

DEVICE = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Launch = Callable[..., Run]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Train a module on some ranks of one GPU, which are spawned and meet through gloo."""
    numbers = itertools.count()

    def launch(
        num_ranks: int,
        module: DGLModule | None = None,
        kind: type[DGLStrategy] = DGLStrategy,
        strategy: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Run:
        ranks: dict[str, Any] = {}
        if num_ranks > 1:
            ranks = {
                "parallel_devices": [DEVICE] * num_ranks,
                "start_method": "spawn",
                "process_group_backend": "gloo",
                "timeout": 60,
            }
        module = module or make_module(4, dropout=0.2, seed=0)
        return launch_into(
            tmp_path / f"run{next(numbers)}",
            num_ranks,
            lambda trainer: trainer.fit(module, loader(), loader()),
            strategy=kind(**{**ranks, **(strategy or {})}),
            accelerator=DEVICE.type,
            devices=1,
            **kwargs,
        )

    return launch


def assert_close(several: Run, one: Run, tolerance: float) -> None:
    (expected,) = one.ranks
    for note in several.ranks:
        for what in ("weights", "metrics"):
            assert note[what].keys() == expected[what].keys()
            for name, value in expected[what].items():
                difference = (note[what][name].cpu().double() - value.cpu().double()).abs().max()
                assert difference <= tolerance, name


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-2), ("bf16-mixed", 0.3)])
def test_two_stages_come_to_what_one_process_comes_to(precision: Any, tolerance: float, launch: Launch) -> None:
    one, two = (launch(num_ranks, precision=precision) for num_ranks in (1, 2))
    assert_close(two, one, tolerance)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_replicas_train(num_ranks: int, launch: Launch) -> None:
    run = launch(num_ranks, strategy={"data_parallel_size": 2})
    first, *others = run.ranks
    assert torch.isfinite(first["metrics"]["val/loss"])
    for note in others:
        assert all(torch.equal(note["weights"][name], value) for name, value in first["weights"].items())


@pytest.mark.parametrize(
    "arguments",
    [{"schedule": Asynchronous(buffer_size=4)}, {"codec": "half"}, {"codec": VectorQuantizer(300, 4)}],
    ids=["asynchronous", "half", "codes of 16 bits"],
)
def test_other_schedules_and_codecs_train(arguments: dict[str, Any], launch: Launch) -> None:
    assert torch.isfinite(launch(2, strategy=arguments).ranks[0]["metrics"]["val/loss"])


class OnlyHostTensors(DGLStrategy):
    """Fails where a tensor on the device is pickled: to unpickle it, every rank opens a context on that device."""

    def _connect_ranks(self) -> None:
        gather = dist.all_gather_object

        def all_gather_object(everyones: list[Any], value: Any, *args: Any, **kwargs: Any) -> None:
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            assert all(tensor.device.type == "cpu" for tensor in tensors), value
            gather(everyones, value, *args, **kwargs)

        dist.all_gather_object = all_gather_object
        super()._connect_ranks()


def test_ranks_exchange_no_tensor_on_the_device(launch: Launch) -> None:
    launch(2, kind=OnlyHostTensors)


# Failures


class OutOfMemory(DGLStrategy):
    """Lets the second stage run out of memory where it receives."""

    def _connect_ranks(self) -> None:
        receive = Inbox._receive

        def fails(inbox: Inbox) -> Any:
            parcel = receive(inbox)
            if parcel is not None and parcel.address.batch_idx == 2:
                raise torch.OutOfMemoryError("CUDA out of memory (simulated).")
            return parcel

        Inbox._receive = fails  # type: ignore[method-assign]
        super()._connect_ranks()


def test_a_rank_without_memory_is_the_one_that_is_named(launch: Launch) -> None:
    with pytest.raises(RankFailedError, match=r"(?s)^Rank 1 .*out of memory"):
        launch(2, kind=OutOfMemory)


class Dies(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_is_killed_is_named(launch: Launch) -> None:
    with pytest.raises(RankFailedError, match=r"^Rank 1"):
        launch(2, callbacks=[Dies()])


# Streams and memory of a wire


class Transport:
    """Carries tensors as NCCL does: on the current stream, without waiting on the host."""

    def __init__(self) -> None:
        self._under_way: queue.Queue[Any] = queue.Queue()

    def send(self, tensor: Tensor, peer: int, group: Any) -> None:
        copied = tensor.clone()
        self._under_way.put((copied, torch.cuda.current_stream().record_event() if copied.is_cuda else None))

    def recv(self, tensor: Tensor, peer: int, group: Any) -> None:
        copied, event = self._under_way.get()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
            copied.record_stream(torch.cuda.current_stream())
        tensor.copy_(copied)


def num_wrong(watchdog: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Send 200 parcels whose memory is used anew at once, at both ends; return how many values arrive wrong."""
    transport, size = Transport(), 1 << 20
    monkeypatch.setattr(dist, "send", transport.send)
    monkeypatch.setattr(dist, "recv", transport.recv)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    group: Any = object()
    outbox, inbox = Outbox(group, 1, DEVICE, 1, watchdog), Inbox(group, 0, DEVICE, 2, watchdog)
    addresses = [Address("train", 0, 0, i, i) for i in range(200)]

    def send() -> None:
        for i, address in enumerate(addresses):
            torch.cuda._sleep(1_000_000)  # the activation is not there yet when it is handed on
            tensor = torch.full((size,), float(i), device=DEVICE).add_(0.5)
            outbox.put(address, (tensor, torch.full((8,), i, device=DEVICE)))
            del tensor
            torch.full((size,), -1.0, device=DEVICE)
        outbox.close()

    thread = threading.Thread(target=send)
    thread.start()
    wrong = torch.zeros((), dtype=torch.long, device=DEVICE)
    for i, address in enumerate(addresses):
        activation, targets = inbox.get(address)
        torch.cuda._sleep(1_000_000)
        wrong += (activation != i + 0.5).sum() + (targets != i).sum()
        del activation, targets
        torch.full((size,), -2.0, device=DEVICE)
    inbox.close()
    thread.join()
    return int(wrong)


def test_parcels_arrive_whole_although_their_memory_is_used_anew(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_wrong(watch(0, num_ranks=2)[0], monkeypatch) == 0


def test_parcels_would_not_if_the_sender_did_not_wait(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Outbox._packed
    monkeypatch.setattr(Outbox, "_packed", lambda *arguments: (*packed(*arguments)[:2], None))
    assert num_wrong(watch(0, num_ranks=2)[0], monkeypatch) > 0


# NCCL


@pytest.fixture
def nccl_group() -> Any:
    """A group of this process alone."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group([0], backend="cpu:gloo,cuda:nccl")
    dist.destroy_process_group()


def test_nccl_knows_what_wires_and_replicas_send(nccl_group: Any) -> None:
    for dtype in (torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16):
        dist.broadcast(torch.zeros(4, dtype=dtype, device=DEVICE), 0, nccl_group)


def test_nccl_sends_on_a_stream_of_another_thread(nccl_group: Any) -> None:
    arrived: list[bool] = []
    torch.cuda._sleep(100_000_000)
    sent = torch.full((1 << 20,), 3.0, device=DEVICE)
    event = torch.cuda.current_stream().record_event()

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            event.wait()
            received = torch.empty_like(sent)
            both = [dist.P2POp(dist.isend, sent, 0, nccl_group), dist.P2POp(dist.irecv, received, 0, nccl_group)]
            for operation in dist.batch_isend_irecv(both):
                operation.wait()
            torch.cuda.current_stream().synchronize()
            arrived.append(bool((received == 3).all()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert arrived == [True]


@pytest.mark.skipif(
    os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1",
    reason="NCCL puts one rank on a GPU only; newer ones take several if NCCL_MULTI_RANK_GPU_ENABLE=1 is set",
)
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_nccl_between_two_ranks(num_replicas: int, launch: Launch) -> None:
    run = launch(2, strategy={"data_parallel_size": num_replicas, "process_group_backend": "nccl"})
    assert torch.isfinite(run.ranks[0]["metrics"]["val/loss"])
