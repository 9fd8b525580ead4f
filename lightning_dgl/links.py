r"""Links: the way of an activation from one block to the next, with its codec, its traffic and its replay buffer.

``Run.links[j]`` leads to block j; ``links[0]`` brings the data, and ``links[J]``, after the last block, leads nowhere::

    data --links[0]--> block 0 --links[1]--> block 1 --links[2]--> ... --links[J-1]--> block J-1 --links[J]--> (nothing)

The life of a batch on a link, in training::

    block j - 1:  output -> detach -> codec.update, codec.encode -> put
                                                                     |  direct: kept until it is read
                                                                     |  buffered: kept in a replay buffer
                                                                     |  remote: outbox, wire, inbox (distributed.wire)
    block j:      x <- decode <- get <-------------------------------'

In evaluation a stage puts and gets tensors as they are, without a codec.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dgl.address import Address
from lightning_dgl.codecs import HEADER_BYTES, Activation, Codec, Half, Message
from lightning_dgl.distributed import Inbox, Outbox, ReplayInbox
from lightning_dgl.replay import ReplayBuffer


@dataclass
class Traffic:
    """What has gone over a link since the run began.

    Attributes:
        batches: how many outputs were encoded.
        raw_bytes: bytes of these outputs.
        encoded_bytes: bytes of the messages, with targets and headers.
        encode_seconds: host time spent on learning and encoding.
        decode_seconds: host time spent on decoding.
    """

    batches: int = 0
    raw_bytes: int = 0
    encoded_bytes: int = 0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0


class Link:
    """The base of all links: one that leads nowhere, or between blocks of other ranks.

    Args:
        codec: encodes what is sent in training; None sends it as it is.
        source: the block that sends, as messages call it.

    Attributes:
        buffer: the replay buffer that the link reads from, if it has one.
        traffic: what was encoded and decoded in this process.
    """

    buffer: ReplayBuffer | None = None
    bytes_sent: int | None = None
    """Bytes sent to another rank; None if the link does not send to one."""
    seconds_waited = 0.0
    """How long this process has waited for another rank, to send or to receive."""
    num_dropped = 0
    """Outputs that gave way to newer ones, because the next stage was too slow to take them."""

    def __init__(self, codec: Codec | None = None, source: str = "") -> None:
        self.codec = codec
        self.traffic = Traffic()
        self._source = source

    def is_ready(self, address: Address) -> bool:
        """Return whether a block has a batch to train on at ``address``; between ranks, wait until that is clear."""
        return True

    def put(self, address: Address, tensors: Sequence[Activation]) -> None:
        """Pass on what belongs to the batch at ``address``."""

    def get(self, address: Address) -> Sequence[Any]:
        """Return what belongs to the batch at ``address``; with a replay buffer, what was buffered of another batch."""
        raise NotImplementedError

    def send(self, address: Address, output: Tensor, targets: Tensor, learn: bool = True) -> None:
        """Detach and encode a block's output (N, ...) for the next block; if ``learn``, update the codec first.

        Raises:
            ValueError: if the codec cannot encode the output; the message names the block.
        """
        self.put(address, (self._encode(output.detach(), targets, learn), targets))

    def receive(self, address: Address) -> tuple[Tensor, Tensor]:
        """Return a decoded activation (N, ...) to train on, and its targets."""
        activation, targets = self.get(address)
        if isinstance(activation, Message):
            began = time.perf_counter()
            activation = activation.decode()
            self.traffic.decode_seconds += time.perf_counter() - began
        return activation, targets

    def send_mark(self, mark: Address) -> None:
        """Send the mark of a place where ranks meet; only a link to another rank does."""

    def await_mark(self, mark: Address) -> None:
        """Wait for the mark of a place where ranks meet; raise RuntimeError if it is another. Only between ranks."""

    def close(self) -> None:
        """Wait until everything is sent and read; only a link to another rank has anything to wait for."""

    def abandon(self) -> None:
        """Leave the link as it is, after a failure."""

    def _encode(self, output: Tensor, targets: Tensor, learn: bool) -> Activation:
        if self.codec is None:
            return output
        began = time.perf_counter()
        try:
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                if learn:
                    self.codec.update(output)
                message = self.codec.encode(output)
        except (ValueError, TypeError) as error:
            raise type(error)(f"The codec cannot encode the output of {self._source}: {error}") from error
        self.traffic.batches += 1
        self.traffic.raw_bytes += output.nbytes
        self.traffic.encoded_bytes += message.nbytes + targets.nbytes + HEADER_BYTES
        self.traffic.encode_seconds += time.perf_counter() - began
        return message


class DirectLink(Link):
    """A link within a process: holds one batch until the next block reads it."""

    _held: Sequence[Activation] = ()

    @override
    def is_ready(self, address: Address) -> bool:
        return len(self._held) > 0  # else the block before has skipped its turn

    @override
    def put(self, address: Address, tensors: Sequence[Activation]) -> None:
        self._held = tensors

    @override
    def get(self, address: Address) -> Sequence[Any]:
        held, self._held = self._held, ()
        return held


class BufferedLink(Link):
    """A link within a process through a replay buffer; each block reads from it when its turn comes."""

    buffer: ReplayBuffer

    def __init__(self, buffer: ReplayBuffer, codec: Codec | None, source: str) -> None:
        super().__init__(codec, source)
        self.buffer = buffer

    @override
    def is_ready(self, address: Address) -> bool:
        return not self.buffer.is_exhausted

    @override
    def put(self, address: Address, tensors: Sequence[Activation]) -> None:
        activation, targets = tensors
        assert isinstance(targets, Tensor)
        self.buffer.put(activation, targets)

    @override
    def get(self, address: Address) -> Sequence[Any]:
        return self.buffer.get()


class SendingLink(Link):
    """The near end of a link to the rank of the next stage.

    Args:
        outbox: sends to that rank.
        may_drop: in training, drop what was not sent yet rather than wait.
        codec: see :class:`Link`.
        source: see :class:`Link`.
    """

    def __init__(self, outbox: Outbox, may_drop: bool, codec: Codec | None, source: str) -> None:
        super().__init__(codec, source)
        self._outbox = outbox
        self._may_drop = may_drop

    @property
    def bytes_sent(self) -> int:  # type: ignore[override]
        """Bytes sent to the next rank."""
        return self._outbox.bytes_sent

    @property
    def seconds_waited(self) -> float:  # type: ignore[override]
        """How long this rank has waited for the next one to take something."""
        return self._outbox.seconds_waited

    @property
    def num_dropped(self) -> int:  # type: ignore[override]
        """Outputs that gave way to newer ones."""
        return self._outbox.num_dropped

    @override
    def put(self, address: Address, tensors: Sequence[Activation]) -> None:
        if self._may_drop and address.is_training:
            self._outbox.offer(address, tensors)
        else:
            self._outbox.put(address, tensors)

    @override
    def send_mark(self, mark: Address) -> None:
        self._outbox.put(mark, ())

    @override
    def close(self) -> None:
        self._outbox.close()

    @override
    def abandon(self) -> None:
        self._outbox.abandon()


class ReceivingLink(Link):
    """The far end of a link from the rank of the previous stage; an asynchronous stage reads from a replay buffer."""

    def __init__(self, inbox: Inbox, codec: Codec | None, source: str) -> None:
        super().__init__(codec, source)
        self._inbox = inbox
        if isinstance(inbox, ReplayInbox):
            self.buffer = inbox.buffer

    @property
    def seconds_waited(self) -> float:  # type: ignore[override]
        """How long this rank has waited for the previous one to send something."""
        return self._inbox.seconds_waited

    @override
    def is_ready(self, address: Address) -> bool:
        return not isinstance(self._inbox, ReplayInbox) or self._inbox.await_batch(address)

    @override
    def get(self, address: Address) -> Sequence[Any]:
        if isinstance(self._inbox, ReplayInbox) and address.is_training:
            return self._inbox.replay()
        return self._inbox.get(address)

    @override
    def await_mark(self, mark: Address) -> None:
        self._inbox.get(mark)

    @override
    def close(self) -> None:
        self._inbox.close()

    @override
    def abandon(self) -> None:
        self._inbox.abandon()


def make_links(
    codecs: Sequence[Codec | None],
    block_names: Sequence[str],
    blocks: range,
    *,
    new_buffer: Callable[[], ReplayBuffer | None] | None = None,
    inbox: Inbox | None = None,
    outbox: Outbox | None = None,
    may_drop: bool = False,
) -> list[Link]:
    """Return the links that lead to each of J blocks, and the one after the last.

    Args:
        codecs: of the J - 1 links between blocks.
        block_names: of the J blocks, for messages.
        blocks: the consecutive blocks of this process.
        new_buffer: makes the replay buffer of a link between two of these; by default such links are direct.
        inbox: receives from the rank of the block before these.
        outbox: sends to the rank of the block after these.
        may_drop: see :class:`SendingLink`.
    """
    links: list[Link] = [DirectLink()]
    for j, codec in enumerate(codecs, start=1):
        source = f"block {j - 1} ({block_names[j - 1]})"
        if j - 1 in blocks and j in blocks:
            buffer = None if new_buffer is None else new_buffer()
            links.append(DirectLink(codec, source) if buffer is None else BufferedLink(buffer, codec, source))
        elif j in blocks and inbox is not None:
            links.append(ReceivingLink(inbox, codec, source))
        elif j - 1 in blocks and outbox is not None:
            links.append(SendingLink(outbox, may_drop, codec, source))
        else:
            links.append(Link(codec, source))
    return [*links, Link()]


def make_codecs(codec: Any, num_links: int) -> list[Codec | None]:
    """Return a codec for each link between blocks, in order; each is a copy.

    Args:
        codec: None, "half", a :class:`~lightning_dgl.codecs.Codec`, or a list with one of these for each link.
        num_links: J - 1.

    Raises:
        ValueError: for another name, or a list of another length.
        TypeError: for something else.
    """
    if isinstance(codec, Sequence) and not isinstance(codec, str):
        if len(codec) != num_links:
            raise ValueError(
                f"codec is a list of {len(codec)}, but must have {num_links}: one for each link between blocks."
            )
        return [make_codecs(own, 1)[0] for own in codec]
    if codec is None:
        return [None] * num_links
    if codec == "half":
        return [Half() for _ in range(num_links)]
    choices = "None, 'half', a VectorQuantizer, or a list of these"
    if isinstance(codec, str):
        raise ValueError(f"codec must be {choices}, got {codec!r}.")
    if not isinstance(codec, Codec):
        raise TypeError(f"codec must be {choices}, got {type(codec).__name__}.")
    return [copy.deepcopy(codec) for _ in range(num_links)]
