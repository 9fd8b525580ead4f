"""The wire: carries tensors from the rank of one stage to the rank of the next.

Each end has a thread that sends or receives, and a bounded queue, so that a stage waits for a neighbour only when it is
further ahead or behind than the queues allow. A header precedes the tensors of a parcel: it gives their address and
layout, so that a smaller last batch and validation need nothing special, and ranks that have come apart notice it. Each
wire has a process group of two ranks: groups deliver in order, and only within themselves::

    rank r, main thread      Outbox thread              Inbox thread             rank r + 1, main thread
    put(address, tensors) -> queue of 1 -> header ----> header                -> queue of `prefetch` -> get(address)
                                           tensor ----> tensor                or
                                           ...          ...                      replay buffer       -> replay()
    close()               -> None       -> CLOSE -----> CLOSE                 -> None                -> close()
"""

from __future__ import annotations

import ctypes
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_dgl.address import Address
from lightning_dgl.codecs import HEADER_BYTES, Message, tensors_of
from lightning_dgl.distributed.watchdog import Watchdog
from lightning_dgl.replay import ReplayBuffer


class Parcel(NamedTuple):
    """What crosses a wire at once: an activation, or a codec's message of it, and what belongs to it."""

    address: Address
    tensors: Sequence[Any]


class _PeerLostError(Exception):
    """The connection to the rank at the other end broke."""


@contextmanager
def _to_peer() -> Iterator[None]:
    """Tell errors of the connection from this rank's own, such as too little memory: those are no fault of the peer."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        raise _PeerLostError(str(error)) from error


class _End:
    """An end of a wire: its thread and its bounded queue."""

    def __init__(self, group: dist.ProcessGroup, peer: int, device: torch.device, depth: int, watchdog: Watchdog):
        self.seconds_waited = 0.0
        self._group = group
        self._peer = peer
        self._device = device
        self._on_accelerator = device.type != "cpu"
        # gloo sends from the host's memory only
        self._direct = not self._on_accelerator or f"{device.type}:gloo" not in dist.get_backend_config(group)
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._watchdog = watchdog
        self._thread = threading.Thread(target=self._run_guarded, daemon=True, name=type(self).__name__)
        self._thread.start()

    def abandon(self) -> None:
        """Leave the wire as it is, after a failure.

        Its thread may be in gloo, where nothing can interrupt it. It ends when the peer does, but not while Python
        shuts down, when destroying the group would crash the process: hence the group is never freed.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
        self._thread.join(timeout=1.0)

    def _run_guarded(self) -> None:
        try:
            if self._on_accelerator:
                module = torch.get_device_module(self._device)
                module.set_device(self._device)
                with module.stream(module.Stream()):
                    self._run()
            else:
                self._run()
        except _PeerLostError as error:
            self._watchdog.lost(self._peer, error)
        except BaseException as error:
            self._watchdog.report(error)  # the main thread raises it where it next waits

    def _run(self) -> None:
        raise NotImplementedError

    def _event(self) -> Any:
        """Record how far the device is in this thread's stream; None on a CPU.

        A host thread that waits for the event sleeps, which ``synchronize`` of a stream would not.
        """
        if not self._on_accelerator:
            return None
        event = torch.get_device_module(self._device).Event(blocking=True)
        event.record()
        return event


class Outbox(_End):
    """The sending end of a wire: ``put`` hands a parcel to the thread, and waits while another one waits there.

    Attributes:
        bytes_sent: bytes sent so far, headers included.
        num_dropped: parcels that gave way to newer ones.
    """

    bytes_sent = 0
    num_dropped = 0

    def put(self, address: Address, tensors: Sequence[Tensor | Message]) -> None:
        """Send ``tensors`` (activation, targets, ...), which must not change any more.

        Raises:
            RankFailedError: if the receiver fails, or takes nothing for as long as the strategy's timeout.
        """
        self._put(self._packed(address, tensors))

    def offer(self, address: Address, tensors: Sequence[Tensor | Message]) -> None:
        """Like :meth:`put`, but never block: drop the oldest queued parcel if the queue is full."""
        item = self._packed(address, tensors)
        self._watchdog.check()
        while True:
            try:
                self._queue.put_nowait(item)
                return
            except queue.Full:
                with suppress(queue.Empty):  # the thread has taken it meanwhile
                    self._queue.get_nowait()
                    self.num_dropped += 1

    def close(self) -> None:
        """Tell the receiver that nothing follows, and wait until everything is sent."""
        self._put(None)

        def is_sent() -> bool:
            self._thread.join(self._watchdog.interval)
            return not self._thread.is_alive()

        self.seconds_waited += self._watchdog.wait_until(is_sent, self._peer, "to take what was sent to it")

    def _packed(self, address: Address, items: Sequence[Tensor | Message]) -> Any:
        tensors = [_dense(tensor.detach()) for tensor in tensors_of(items)]
        message = items[0] if items and isinstance(items[0], Message) else None
        return write_header(address, message, tensors), tensors, self._event()

    def _put(self, item: Any) -> None:
        self.seconds_waited += self._watchdog.put(self._queue, item, self._peer, "to take the next batch")

    @override
    def _run(self) -> None:
        while self._send_next():
            pass

    def _send_next(self) -> bool:
        """Send what is next in the queue, and keep nothing of it; return whether more follows."""
        item = self._queue.get()
        if item is None:
            self._send(write_header(None))
            return False
        header, tensors, event = item
        if event is not None:  # before the header, as the receiver's device spins from then on
            event.synchronize()
        self._send(header)
        for tensor in tensors:
            self._send(_flat(tensor if self._direct else tensor.cpu()))
        if self._on_accelerator:  # only once they are sent may the memory of the tensors be reused
            self._event().synchronize()
        return True

    def _send(self, tensor: Tensor) -> None:
        with _to_peer():
            dist.send(tensor, self._peer, group=self._group)
        self.bytes_sent += tensor.nbytes


class Inbox(_End):
    """The receiving end of a wire: its thread receives up to ``depth`` parcels ahead."""

    def get(self, address: Address) -> Sequence[Any]:
        """Return the tensors of the next parcel, on this rank's device.

        Raises:
            RankFailedError: if the sender fails, or sends nothing for as long as the strategy's timeout.
            RuntimeError: if they belong to another batch than the one at ``address``.
        """
        parcel = self._take("to send the next batch")
        if parcel is None:
            raise _finished_before()
        if parcel.address != address:
            raise RuntimeError(
                f"The ranks have come apart: this one is at {address}, the one before it at {parcel.address}. They "
                "must take the same number of batches; a callback or hook that stops, skips or limits must do so on "
                "every rank (trainer.strategy.broadcast and reduce_boolean_decision agree on a decision; "
                "on_train_batch_start sees data on the first stage only)."
            )
        return self._usable(parcel.tensors)

    def close(self) -> None:
        """Wait for the sender to finish.

        Raises:
            RuntimeError: if it has sent parcels that this stage did not take.
        """
        left = self._take("to finish")
        if left is not None:
            raise RuntimeError(
                f"The ranks have come apart: this one has finished, the one before it is still at {left.address}. A "
                "callback or hook that stops training must do so on every rank."
            )
        self._thread.join()

    def _take(self, what: str) -> Parcel | None:
        parcel: Parcel | None
        parcel, seconds = self._watchdog.take(self._queue, self._peer, what)
        self.seconds_waited += seconds
        return parcel

    def _usable(self, tensors: Sequence[Any]) -> Sequence[Any]:
        if self._on_accelerator:
            stream = torch.get_device_module(self._device).current_stream()
            for tensor in tensors_of(tensors):
                tensor.record_stream(stream)
        return tensors

    @override
    def _run(self) -> None:
        while self._deliver(self._receive()):  # no variable holds a parcel while the next one arrives
            pass

    def _deliver(self, parcel: Parcel | None) -> bool:
        """Hand over what has arrived; return whether more follows."""
        self._queue.put(parcel)  # blocks while the stage is busy, which bounds what is received ahead
        return parcel is not None

    def _receive(self) -> Parcel | None:
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8, device="cpu")
        self._fill(header)
        found = read_header(header)
        if found is None:
            return None
        address, message, layouts = found
        device = self._device if self._direct else "cpu"
        tensors = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for dtype, shape, stride in layouts]
        for tensor in tensors:
            self._fill(_flat(tensor))
        if not self._direct:
            tensors = [tensor.to(self._device) for tensor in tensors]
        if self._on_accelerator:
            self._event().synchronize()
        return Parcel(address, tensors if message is None else message.restored(tensors))

    def _fill(self, tensor: Tensor) -> None:
        with _to_peer():
            dist.recv(tensor, self._peer, group=self._group)


class ReplayInbox(Inbox):
    """The receiving end of a wire to an asynchronous stage: training parcels go to a replay buffer.

    The stage reads from there at its own pace. In evaluation parcels arrive one after another, as in :class:`Inbox`.

    Args:
        arguments: those of :class:`Inbox`.
        buffer: where training parcels go.
        may_read: the pace, see :meth:`lightning_dgl.Schedule.may_read`.
        may_skip: skip a step rather than train on used-up batches; not for replicas, which take each step together.
    """

    def __init__(
        self, *arguments: Any, buffer: ReplayBuffer, may_read: Callable[[int, bool], bool], may_skip: bool = True
    ) -> None:
        self.buffer = buffer
        self._may_read = may_read
        self._may_skip = may_skip
        self._newest: Address | None = None
        self._mark: Address | None = None  # the newest that has arrived, until it is taken
        self._is_closed = False
        self._arrival = threading.Condition()
        super().__init__(*arguments)

    @override
    def get(self, address: Address) -> Sequence[Any]:
        tensors = super().get(address)
        if self._mark == address:
            self._mark = None
        return tensors

    def await_batch(self, address: Address) -> bool:
        """Wait for the first batch, and while too far ahead; return whether to train at ``address``, or skip the step.

        A step is skipped if the buffer is used up and the sender is already past it, so that no batch may follow.

        Raises:
            RankFailedError: if the sender fails, or keeps this stage waiting for as long as the strategy's timeout.
            ValueError: if the batches that arrive are of different shapes.
        """

        def may_go_on() -> bool:
            with self._arrival:
                if not self._is_due(address):
                    if self._is_closed:
                        raise _finished_before()
                    if self._mark is not None:
                        self.get(address)  # raises: the sender is somewhere else
                    self._arrival.wait(self._watchdog.interval)
                return self._is_due(address)

        self.seconds_waited += self._watchdog.wait_until(may_go_on, self._peer, "to send another batch")
        with self._arrival:
            return not (self._may_skip and self.buffer.is_exhausted)

    def replay(self) -> Sequence[Any]:
        """Return a buffered batch to train on."""
        with self._arrival:
            return self._usable(self.buffer.get(beyond_max_reuse=not self._may_skip))

    def _is_due(self, address: Address) -> bool:
        if self._newest is None:
            return False
        # A sender that has skipped its last steps is as far as its mark says.
        places = [place for place in (self._newest, self._mark) if place is not None and place.epoch == address.epoch]
        reached = max((place.batch_idx for place in places), default=-1)
        return self._may_read(address.batch_idx - reached, self.buffer.is_exhausted)

    @override
    def _deliver(self, parcel: Parcel | None) -> bool:
        if parcel is None or not parcel.address.is_training:
            if parcel is not None and parcel.address.is_mark:
                with self._arrival:
                    self._mark = parcel.address
                    self._arrival.notify_all()
            return super()._deliver(parcel)
        with self._arrival:
            activation, targets = parcel.tensors
            self.buffer.put(activation, targets, parcel.address.step)
            self._newest = parcel.address
            self._arrival.notify_all()
        return True

    @override
    def _run(self) -> None:
        super()._run()
        with self._arrival:
            self._is_closed = True


def _finished_before() -> RuntimeError:
    return RuntimeError(
        "The ranks have come apart: the rank before this one has finished, this one expects another batch. A callback "
        "or hook that stops training must do so on every rank."
    )


def _dense(tensor: Tensor) -> Tensor:
    """Return ``tensor`` if it is dense in some memory format (channels_last, transposed), else a contiguous copy."""
    order = sorted(range(tensor.ndim), key=lambda d: tensor.stride(d), reverse=True)
    return tensor if tensor.permute(order).is_contiguous() else tensor.contiguous()


def _flat(tensor: Tensor) -> Tensor:
    """View the memory of a dense ``tensor`` as bytes: NCCL does not know every data type that a codec may choose."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


# The header: JSON in HEADER_BYTES bytes, padded with blanks

Layout = tuple[torch.dtype, list[int], list[int]]
"""Data type, shape and strides of a tensor."""


class _Encoding(NamedTuple):
    """How the first tensors of a parcel stand for a codec's message."""

    version: int
    dtype: torch.dtype
    num_codebooks: int  # 0: none

    def restored(self, tensors: list[Tensor]) -> list[Any]:
        """Return ``tensors`` with the message in place of those that it consists of."""
        codebook = tensors[1] if self.num_codebooks else None
        message = Message(tensors[0], codebook, self.dtype, self.version, max(self.num_codebooks, 1))
        return [message, *tensors[len(message.tensors) :]]


def write_header(address: Address | None, message: Message | None = None, tensors: Sequence[Tensor] = ()) -> Tensor:
    """Return the header (HEADER_BYTES,), uint8, of a parcel; without an address, of the end of all parcels.

    Raises:
        ValueError: if it does not fit.
    """
    encoding = None
    if message is not None:
        num_codebooks = 0 if message.codebook is None else message.num_codebooks
        encoding = [message.version, _name(message.dtype), num_codebooks]
    layouts = [[_name(tensor.dtype), list(tensor.shape), list(tensor.stride())] for tensor in tensors]
    text = json.dumps([address, encoding, layouts], separators=(",", ":")).encode()
    if len(text) > HEADER_BYTES:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(
            f"The header of a message takes {len(text)} bytes, {HEADER_BYTES} at most fit: too many dimensions, in "
            f"tensors of shapes {shapes}. Flatten the block's output or the targets."
        )
    return torch.frombuffer(bytearray(text.ljust(HEADER_BYTES)), dtype=torch.uint8)


def read_header(header: Tensor) -> tuple[Address, _Encoding | None, list[Layout]] | None:
    """Return what :func:`write_header` was given, as address, encoding and layouts; None at the end of all parcels."""
    address, encoding, layouts = json.loads(bytes(header.tolist()))
    if address is None:
        return None
    if encoding is not None:
        encoding = _Encoding(encoding[0], getattr(torch, encoding[1]), encoding[2])
    return Address(*address), encoding, [(getattr(torch, name), shape, stride) for name, shape, stride in layouts]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
