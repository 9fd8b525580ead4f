"""A link carries (activations, targets) from the rank of one stage to the rank of the next.

Each end has a thread that sends or receives, and a bounded queue, so that a stage waits for a neighbour only when it is
further ahead or behind than the queues allow. A header precedes the tensors of a message: it says which batch they
belong to and how they look, so that smaller last batches and validation need nothing special, and ranks that have come
apart notice it. Each link has a process group of its own: groups deliver in order, and only within themselves.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from typing_extensions import override

from lightning_dgl.codecs import HEADER_BYTES, Message, tensors_of
from lightning_dgl.distributed.watchdog import Watchdog
from lightning_dgl.replay import ReplayBuffer

_PHASES = [stage.value for stage in RunningStage]
_DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
_HEADER_SIZE = HEADER_BYTES // 8
_CLOSE = -1


class Address(NamedTuple):
    """Which batch a message belongs to; ``step`` counts training batches over all epochs."""

    phase: str
    epoch: int
    dataloader_idx: int
    batch_idx: int
    step: int

    def __str__(self) -> str:
        return f"batch {self.batch_idx} of {self.phase!r} in epoch {self.epoch} (data loader {self.dataloader_idx})"


class StageBatch:
    """A batch that a later stage receives: what the previous stage made of a batch of data.

    Attributes:
        address: which batch of data.
        tensors: the previous stage's detached output (N, ...), in training as a codec made it; targets, except in
            prediction; and in evaluation the ensemble's votes (N, classes), float32. All on this rank's device.
        is_replayed: whether it comes from a replay buffer, and so may be of any earlier batch.
    """

    def __init__(self, address: Address, tensors: Sequence[Any], is_replayed: bool = False) -> None:
        self.address = address
        self.tensors = tensors
        self.is_replayed = is_replayed

    def __iter__(self) -> Iterator[Tensor]:
        """The tensors: Lightning looks there for the size of a batch."""
        return iter(tensors_of(self.tensors))

    def expect(self, address: Address) -> None:
        """Raise RuntimeError unless this is the batch that this rank has come to."""
        if self.address != address and not self.is_replayed:
            raise RuntimeError(
                f"The ranks have come apart: this one is at {address}, the one before it at {self.address}. They must "
                "take the same number of batches; a callback or hook that stops, skips or limits must do so on every "
                "rank (trainer.strategy.broadcast and reduce_boolean_decision agree on a decision)."
            )


class _End:
    """What both ends of a link have: a thread, a bounded queue, and the time that the stage has waited for them."""

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
        """Leave the link as it is, after a failure.

        Its thread may be in gloo, where nothing can interrupt it. It ends when the peer does, but not, as it would when
        the group were destroyed, while Python shuts down: there it would crash the process.
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
        except BaseException as error:
            self._watchdog.lost(self._peer, error)

    def _run(self) -> None:
        raise NotImplementedError


class Outbox(_End):
    """The sending end of a link: ``put`` hands a message to the thread, and waits while ``depth`` others wait there."""

    bytes_sent = 0
    num_dropped = 0

    def put(self, address: Address, tensors: Sequence[Tensor | Message]) -> None:
        """Send ``tensors`` as what this stage makes of the batch at ``address``; they must not change any more."""
        self._put(self._item(address, tensors))

    def offer(self, address: Address, tensors: Sequence[Tensor | Message]) -> None:
        """As :meth:`put`, but never wait: what waits already gives way, and is dropped."""
        item = self._item(address, tensors)
        self._watchdog.check()
        while True:
            try:
                self._queue.put_nowait(item)
                return
            except queue.Full:
                with suppress(queue.Empty):  # the thread has taken it meanwhile
                    self._queue.get_nowait()
                    self.num_dropped += 1

    def _item(self, address: Address, tensors: Sequence[Tensor | Message]) -> Any:
        event = torch.get_device_module(self._device).current_stream().record_event() if self._on_accelerator else None
        return address, [tensor.detach() for tensor in tensors], event

    def close(self) -> None:
        """Tell the receiver that nothing follows, and wait until everything is sent."""
        self._put(None)

        def is_sent() -> bool:
            self._thread.join(self._watchdog.interval)
            return not self._thread.is_alive()

        self._watchdog.wait_until(is_sent, self._peer, "to take what was sent to it")

    def _put(self, item: Any) -> None:
        began = time.monotonic()

        def has_room() -> bool:
            try:
                self._queue.put(item, timeout=self._watchdog.interval)
            except queue.Full:
                return False
            return True

        self._watchdog.wait_until(has_room, self._peer, "to take the next batch")
        self.seconds_waited += time.monotonic() - began

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                self._send(_header(None, None, ()))
                return
            address, items, event = item
            if event is not None:
                event.wait()
            message = items[0] if isinstance(items[0], Message) else None
            tensors = [_dense(tensor if self._direct else tensor.cpu()) for tensor in tensors_of(items)]
            self._send(_header(address, message, tensors))
            for tensor in tensors:
                self._send(_flat(tensor))
            if self._on_accelerator:  # the tensors' memory may be used anew once they are sent
                torch.get_device_module(self._device).current_stream().synchronize()
            del item, items, message, tensors

    def _send(self, tensor: Tensor) -> None:
        dist.send(tensor, self._peer, group=self._group)
        self.bytes_sent += tensor.nbytes


class Inbox(_End):
    """The receiving end of a link: its thread receives up to ``depth`` batches ahead."""

    def get(self) -> StageBatch:
        """The next batch, on this rank's device.

        Raises:
            RankFailedError: if the sender fails, or sends nothing for as long as the strategy's timeout.
        """
        began = time.monotonic()
        received: list[StageBatch] = []

        def has_arrived() -> bool:
            try:
                received.append(self._queue.get(timeout=self._watchdog.interval))
            except queue.Empty:
                return False
            return True

        self._watchdog.wait_until(has_arrived, self._peer, "to send the next batch")
        self.seconds_waited += time.monotonic() - began
        batch = received[0]
        if batch is None:
            raise _finished_before()
        return self._usable(batch)

    def _usable(self, batch: StageBatch) -> StageBatch:
        if self._on_accelerator:
            stream = torch.get_device_module(self._device).current_stream()
            for tensor in batch:
                tensor.record_stream(stream)
        return batch

    def close(self) -> None:
        """Wait for the sender to finish.

        Raises:
            RuntimeError: if it has sent batches that this stage did not take.
        """
        left: list[Any] = []

        def has_closed() -> bool:
            try:
                left.append(self._queue.get(timeout=self._watchdog.interval))
            except queue.Empty:
                return False
            return True

        self._watchdog.wait_until(has_closed, self._peer, "to finish")
        if left[0] is not None:
            raise RuntimeError(
                f"The ranks have come apart: this one has finished, the one before it is still at {left[0].address}. A "
                "callback or hook that stops training must do so on every rank."
            )
        self._thread.join()

    def _run(self) -> None:
        while True:
            batch = self._receive()
            self._deliver(batch)
            if batch is None:
                return

    def _deliver(self, batch: StageBatch | None) -> None:
        self._queue.put(batch)  # waits while the stage is busy, which bounds what is received ahead

    def _receive(self) -> StageBatch | None:
        header = torch.empty(_HEADER_SIZE, dtype=torch.int64)
        dist.recv(header, self._peer, group=self._group)
        address, encoding, layouts = _read_header(header)
        if address is None:
            return None
        device = self._device if self._direct else "cpu"
        tensors = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for dtype, shape, stride in layouts]
        for tensor in tensors:
            dist.recv(_flat(tensor), self._peer, group=self._group)
        if not self._direct:
            tensors = [tensor.to(self._device) for tensor in tensors]
        if self._on_accelerator:
            torch.get_device_module(self._device).current_stream().synchronize()
        if encoding is None:
            return StageBatch(address, tensors)
        codebook = tensors[1] if encoding.num_codebooks else None
        activation = Message(tensors[0], codebook, encoding.dtype, encoding.version, max(encoding.num_codebooks, 1))
        return StageBatch(address, [activation, *tensors[len(activation.tensors) :]])


class ReplayInbox(Inbox):
    """The receiving end of a link to an asynchronous stage: what it is to train on goes to a replay buffer.

    The stage reads from there at its own pace. In evaluation batches arrive one after another, as in :class:`Inbox`.
    """

    def __init__(self, *arguments: Any, buffer: ReplayBuffer, max_lead: int) -> None:
        self._buffer = buffer
        self._max_lead = max_lead
        self._newest: Address | None = None
        self._error: Exception | None = None
        self._is_closed = False
        self._arrival = threading.Condition()
        super().__init__(*arguments)

    def replay(self, address: Address) -> StageBatch:
        """A batch to train on at ``address``: waits for the first, and while this stage is too far ahead.

        Raises:
            RankFailedError: if the sender fails, or keeps this stage waiting for as long as the strategy's timeout.
            ValueError: if the batches that arrive are of different shapes.
        """
        began = time.monotonic()
        read: list[StageBatch] = []

        def can_read() -> bool:
            with self._arrival:
                if self._error is not None:
                    raise self._error
                if not self._is_ready(address):
                    if self._is_closed:
                        raise _finished_before()
                    self._arrival.wait(self._watchdog.interval)
                if self._is_ready(address):
                    read.append(StageBatch(address, self._buffer.get(beyond_max_reuse=True), is_replayed=True))
            return bool(read)

        self._watchdog.wait_until(can_read, self._peer, "to send another batch")
        self.seconds_waited += time.monotonic() - began
        return self._usable(read[0])

    def _is_ready(self, address: Address) -> bool:
        if self._newest is None:
            return False
        reached = self._newest.batch_idx if self._newest.epoch == address.epoch else -1
        lead = address.batch_idx - reached
        # The one before this stage may wait for it already, at the next place where all meet: a stage that is not ahead
        # does not wait for another batch, even if those it has are used up.
        return lead <= self._max_lead and (lead <= 0 or not self._buffer.is_exhausted)

    @override
    def _deliver(self, batch: StageBatch | None) -> None:
        if batch is None or batch.address.phase != RunningStage.TRAINING.value:
            super()._deliver(batch)
            return
        with self._arrival:
            activation, targets = batch.tensors
            try:
                self._buffer.put(activation, targets, batch.address.step)
                self._newest = batch.address
            except ValueError as error:  # for the main thread to raise
                self._error = error
            self._arrival.notify_all()

    @override
    def _run(self) -> None:
        super()._run()
        with self._arrival:
            self._is_closed = True


class Replay(NamedTuple):
    """How an asynchronous stage trains: from which buffer (None on the first stage), and how far ahead it may be."""

    buffer: ReplayBuffer | None
    max_lead: int


class StageLoader:
    """Stands in for a data loader on a later stage: as many batches, each what the previous stage makes of one.

    Args:
        next_batch: returns the next of them.
        length: how many there are.
    """

    def __init__(self, next_batch: Callable[[], StageBatch], length: int) -> None:
        self._next_batch = next_batch
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[StageBatch]:
        for _ in range(self._length):
            yield self._next_batch()


class StatefulStageLoader(StageLoader):
    """Stands in for a data loader with a state, which is kept by the first stage."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the state is the first stage's."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the first stage resumes, and sends what follows."""


def _finished_before() -> RuntimeError:
    return RuntimeError(
        "The ranks have come apart: the rank before this one has finished, this one expects another batch. A callback "
        "or hook that stops training must do so on every rank."
    )


def _dense(tensor: Tensor) -> Tensor:
    """``tensor`` in its own memory format, if it has one (channels_last, transposed), else a contiguous copy."""
    order = sorted(range(tensor.ndim), key=lambda d: tensor.stride(d), reverse=True)
    return tensor if tensor.permute(order).is_contiguous() else tensor.contiguous()


def _flat(tensor: Tensor) -> Tensor:
    """The memory of a dense ``tensor``, as one dimension."""
    return tensor.as_strided((tensor.numel(),), (1,))


class _Encoding(NamedTuple):
    """How the first tensors stand for the activation, if they are a codec's message."""

    version: int
    dtype: torch.dtype
    num_codebooks: int  # 0: none


def _header(address: Address | None, message: Message | None, tensors: Sequence[Tensor]) -> Tensor:
    if address is None:
        words = [_CLOSE]
    else:
        words = [_PHASES.index(address.phase), *address[1:]]
        if message is None:
            words += [0, 0, 0]
        else:
            num_codebooks = 0 if message.codebook is None else message.num_codebooks
            words += [message.version, _DTYPES.index(message.dtype), num_codebooks]
        words.append(len(tensors))
        for tensor in tensors:
            words += [_DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape, *tensor.stride()]
    return torch.tensor(words + [0] * (_HEADER_SIZE - len(words)), dtype=torch.int64)


def _read_header(
    header: Tensor,
) -> tuple[Address | None, _Encoding | None, list[tuple[torch.dtype, list[int], list[int]]]]:
    words = iter(header.tolist())
    phase = next(words)
    if phase == _CLOSE:
        return None, None, []
    address = Address(_PHASES[phase], next(words), next(words), next(words), next(words))
    encoding = _Encoding(next(words), _DTYPES[next(words)], next(words))
    layouts = []
    for _ in range(next(words)):
        dtype, ndim = _DTYPES[next(words)], next(words)
        layouts.append((dtype, [next(words) for _ in range(ndim)], [next(words) for _ in range(ndim)]))
    return address, encoding if encoding.version else None, layouts
