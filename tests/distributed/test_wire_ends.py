"""Both ends of a wire in one process: what is sent, in which order, and whose fault an error is.

An accelerator is pretended: its memory is that of the host, and its streams and events only write down what they do.
"""

from __future__ import annotations

import contextlib
import gc
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dgl import VectorQuantizer
from lightning_dgl.address import Address
from lightning_dgl.codecs import Message
from lightning_dgl.distributed import Inbox, Outbox, RankFailedError, ReplayInbox, Watchdog
from lightning_dgl.replay import ReplayBuffer
from tests.distributed.conftest import Watchdogs

HERE = [Address("train", 0, 0, i, i) for i in range(9)]


class Accelerator(str):
    """The device "cpu" that looks like CUDA."""

    __slots__ = ()
    type = "cuda"


class Transport:
    """Stands in for torch.distributed and torch.cuda; ``log`` lists what this one wire has them do."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.dtypes: set[torch.dtype] = set()
        self.trouble: dict[str, Exception] = {}
        self._under_way: queue.Queue[Tensor] = queue.Queue()

    def send(self, tensor: Tensor, peer: int, group: Any) -> None:
        self._note("send", tensor)
        self._under_way.put(tensor.clone())

    def recv(self, tensor: Tensor, peer: int, group: Any) -> None:
        arrived = self._under_way.get()
        self._note("recv", tensor)
        tensor.copy_(arrived)

    def _note(self, what: str, tensor: Tensor) -> None:
        if what in self.trouble:
            raise self.trouble[what]
        self.dtypes.add(tensor.dtype)
        self.log.append(f"{what} {tensor.nbytes}")

    # torch.cuda

    def Event(self, blocking: bool) -> Any:
        assert blocking
        return SimpleNamespace(
            record=lambda: self.log.append("record"), synchronize=lambda: self.log.append("synchronize")
        )

    def set_device(self, device: Any) -> None: ...

    def Stream(self) -> Any: ...

    def current_stream(self) -> Any: ...

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Transport:
    transport = Transport()
    monkeypatch.setattr(dist, "send", transport.send)
    monkeypatch.setattr(dist, "recv", transport.recv)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: group.backend)
    monkeypatch.setattr(torch, "get_device_module", lambda _: transport)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, _: transport.log.append("record_stream"))
    return transport


BACKENDS = {"cpu": "cpu:gloo", "gloo": "cpu:gloo,cuda:gloo", "nccl": "cpu:gloo,cuda:nccl"}

Ends = Callable[..., Any]


@pytest.fixture
def end(transport: Transport, watch: Watchdogs) -> Iterator[Ends]:
    """Open an end of the wire."""
    opened: list[Any] = []

    def open(kind: type, watchdog: Watchdog | None = None, how: str = "cpu", **options: Any) -> Any:
        watchdog = watchdog or watch(0)[0]
        device: Any = torch.device("cpu") if how == "cpu" else Accelerator("cpu")
        opened.append(kind(SimpleNamespace(backend=BACKENDS[how]), 1, device, 2, watchdog, **options))
        return opened[-1]

    yield open
    for own in opened:
        if isinstance(own, Outbox):
            with contextlib.suppress(queue.Full):  # its thread has ended
                own._queue.put_nowait(None)


def messages() -> list[Sequence[Tensor | Message]]:
    generator = torch.Generator().manual_seed(0)
    quantizer = VectorQuantizer(300, 2)  # codes of 16 bits, which NCCL does not know
    quantizer.update(torch.randn(40, 8, 4, 4, generator=generator))
    images = torch.randn(3, 8, 4, 4, generator=generator)
    return [
        (images, torch.arange(3)),
        (images.to(memory_format=torch.channels_last), torch.arange(3, dtype=torch.int16)),
        (images.bfloat16().mT, images[:, 0] > 0),
        (images[:0], torch.tensor(2.5, dtype=torch.float64)),
        (quantizer.encode(images), torch.arange(3, dtype=torch.uint8)),
    ]


def tensors_of(parcel: Sequence[Any]) -> list[Tensor]:
    return [tensor for item in parcel for tensor in (item.tensors if isinstance(item, Message) else [item])]


@pytest.mark.parametrize("how", BACKENDS)
def test_what_arrives_is_what_was_sent_and_only_bytes_are(how: str, transport: Transport, end: Ends) -> None:
    outbox, inbox = end(Outbox, how=how), end(Inbox, how=how)
    for address, parcel in zip(HERE, messages(), strict=False):
        outbox.put(address, parcel)
        received = tensors_of(inbox.get(address))
        for tensor, sent in zip(received, tensors_of(parcel), strict=True):
            assert (tensor.dtype, tensor.shape, tensor.stride()) == (sent.dtype, sent.shape, sent.stride())
            assert torch.equal(tensor, sent)
    assert transport.dtypes == {torch.uint8}
    outbox.close()
    inbox.close()


@pytest.mark.parametrize("how", ["gloo", "nccl"])
def test_nothing_is_announced_before_it_exists(how: str, transport: Transport, end: Ends) -> None:
    # A receiver that knows of a tensor lets its device wait for it, which keeps that from computing.
    outbox = end(Outbox, how=how)
    outbox.put(HERE[0], (torch.zeros(3), torch.zeros(2)))
    outbox.close()
    assert transport.log == [
        *("record", "synchronize", "send 512", "send 12", "send 8"),
        *("record", "synchronize"),  # before the memory is used for something else
        "send 512",
    ]
    transport.log.clear()
    inbox = end(Inbox, how=how)
    inbox.get(HERE[0])
    inbox.close()
    arrival = ["recv 512", "recv 12", "recv 8", "record", "synchronize"]
    assert transport.log[:5] == arrival
    assert sorted(transport.log[5:]) == ["record_stream", "record_stream", "recv 512"]


def test_no_end_keeps_what_it_has_sent_or_handed_over(transport: Transport, end: Ends) -> None:
    outbox, inbox = end(Outbox), end(Inbox)
    tensor = torch.zeros(3)
    sent = weakref.ref(tensor)
    outbox.put(HERE[0], (tensor, torch.zeros(2)))
    del tensor
    (received, _) = inbox.get(HERE[0])
    kept = weakref.ref(received)
    del received, _
    outbox.put(HERE[1], (torch.zeros(3), torch.zeros(2)))
    inbox.get(HERE[1])  # so that both threads have gone on
    gc.collect()
    assert sent() is None
    assert kept() is None


# Whose fault an error is

OWN = [
    torch.OutOfMemoryError("CUDA out of memory"),
    torch.AcceleratorError("an illegal memory access was encountered"),
    TypeError("Input tensor data type is not supported"),
]


@pytest.mark.parametrize("error", OWN, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("what", ["send", "recv"])
def test_an_error_of_a_wires_own_thread_is_of_this_rank(
    what: str, error: Exception, transport: Transport, end: Ends, watch: Watchdogs
) -> None:
    transport.trouble[what] = error
    own, peer = watch(0, 1)
    outbox, inbox = end(Outbox, own if what == "send" else peer), end(Inbox, own if what == "recv" else peer)
    parcel = (torch.zeros(3), torch.zeros(2))

    def go_on() -> None:
        for address in HERE:
            outbox.put(address, parcel) if what == "send" else inbox.get(address)

    outbox.put(HERE[0], parcel)
    with pytest.raises(type(error)) as raised:
        go_on()
    assert raised.value is error
    assert str(own.failure).startswith("Rank 0 failed; ")
    assert str(error) in str(own.failure)
    with pytest.raises(SystemExit):  # as rank 0 says it
        threading.Event().wait(0.2)
        peer.check()


def test_batches_that_do_not_fit_into_a_replay_buffer_are_an_error_of_this_rank(
    transport: Transport, end: Ends, watch: Watchdogs
) -> None:
    (own,) = watch(0)
    outbox = end(Outbox)
    inbox = end(ReplayInbox, own, buffer=ReplayBuffer(4), may_read=lambda lead, is_exhausted: lead <= 0)
    for address, size in zip(HERE[:2], (3, 4), strict=True):
        outbox.put(address, (torch.zeros(2, size), torch.zeros(2)))
    with pytest.raises(ValueError, match="shape"):
        inbox.await_batch(HERE[1])
    assert str(own.failure).startswith("Rank 0 failed; ")


@pytest.mark.parametrize("what", ["send", "recv"])
def test_a_broken_connection_is_a_fault_of_the_peer(
    what: str, transport: Transport, end: Ends, watch: Watchdogs
) -> None:
    transport.trouble[what] = RuntimeError("Connection closed by peer")
    (own,) = watch(0, num_ranks=2)
    outbox, inbox = end(Outbox, own), end(Inbox, own)
    outbox.put(HERE[0], (torch.zeros(3), torch.zeros(2)))
    with pytest.raises(RankFailedError, match=r"Rank 1 exited without an error message; .*Connection closed by peer"):
        inbox.get(HERE[0])
