"""The way from each block to the next: what codec is on it, and what has gone through."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dgl.codecs import HEADER_BYTES, Activation, Codec, Half, Message


def make_codecs(codec: Any, num_boundaries: int) -> list[Codec | None]:
    """One codec for each boundary between blocks, in order; each is a copy of its own.

    Args:
        codec: None, "half", a :class:`Codec`, or a list with one of these for each boundary.
        num_boundaries: J - 1.

    Raises:
        ValueError: for another name, or a list of another length.
        TypeError: for something else.
    """
    if isinstance(codec, Sequence) and not isinstance(codec, str):
        if len(codec) != num_boundaries:
            raise ValueError(
                f"codec is a list of {len(codec)}, but must have {num_boundaries}: one for each boundary between "
                "blocks."
            )
        return [make_codecs(own, 1)[0] for own in codec]
    if codec is None:
        return [None] * num_boundaries
    if codec == "half":
        return [Half() for _ in range(num_boundaries)]
    choices = "None, 'half', a VectorQuantizer, or a list of these"
    if isinstance(codec, str):
        raise ValueError(f"codec must be {choices}, got {codec!r}.")
    if not isinstance(codec, Codec):
        raise TypeError(f"codec must be {choices}, got {type(codec).__name__}.")
    return [copy.deepcopy(codec) for _ in range(num_boundaries)]


@dataclass
class Traffic:
    """What encoding a block's output, and decoding its input, has come to since a run began.

    Attributes:
        batches: how many outputs were encoded.
        raw_bytes: bytes of these outputs.
        encoded_bytes: bytes of the messages, with targets and headers.
        encode_seconds: host time for learning and encoding.
        decode_seconds: host time for decoding what the block was given.
    """

    batches: int = 0
    raw_bytes: int = 0
    encoded_bytes: int = 0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0


class Boundaries:
    """The way from each block to the next: through a codec, or as it is.

    Args:
        codec: see :func:`make_codecs`.
        block_names: of the J blocks, for messages.

    Attributes:
        codecs: that which follows each block, or None; always None after the last.
        traffic: one for each block, of those that this process holds.
    """

    def __init__(self, codec: Any, block_names: Sequence[str]) -> None:
        self.codecs = [*make_codecs(codec, len(block_names) - 1), None]
        self.traffic = [Traffic() for _ in block_names]
        self._block_names = block_names

    def encode(self, block: int, output: Tensor, targets: Tensor, learn: bool = True) -> Activation:
        """What the next block is given of this one's output, without a graph; the codec learns from it, if it is to.

        Raises:
            ValueError: if the codec cannot encode the output; the message names the block.
        """
        codec = self.codecs[block]
        output = output.detach()
        if codec is None:
            return output
        began = time.perf_counter()
        try:
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                if learn:
                    codec.update(output)
                message = codec.encode(output)
        except (ValueError, TypeError) as error:
            raise type(error)(
                f"The codec cannot encode the output of block {block} ({self._block_names[block]}): {error}"
            ) from error
        traffic = self.traffic[block]
        traffic.batches += 1
        traffic.raw_bytes += output.nbytes
        traffic.encoded_bytes += message.nbytes + targets.nbytes + HEADER_BYTES
        traffic.encode_seconds += time.perf_counter() - began
        return message

    def decode(self, block: int, given: Activation) -> Tensor:
        """What block ``block`` is given, decoded if it is a message."""
        if not isinstance(given, Message):
            return given
        began = time.perf_counter()
        x = given.decode()
        self.traffic[block].decode_seconds += time.perf_counter() - began
        return x

    def to(self, device: torch.device) -> None:
        """Move the codecs to ``device``."""
        for codec in self.codecs:
            if codec is not None:
                codec.to(device)

    def state_dict(self, block: int) -> dict[str, Tensor] | None:
        """The state of the codec that follows ``block``, in the host's memory; None without one."""
        codec = self.codecs[block]
        return None if codec is None else {name: value.cpu() for name, value in codec.state_dict().items()}

    def load_state_dict(self, block: int, state: dict[str, Tensor] | None) -> None:
        """Restore what :meth:`state_dict` returned, if there are both a codec and its state."""
        codec = self.codecs[block]
        if codec is not None and state is not None:
            codec.load_state_dict(state)
