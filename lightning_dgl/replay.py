"""The replay buffer between a block and its predecessor, from which asynchronous blocks train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dgl._arguments import check_at_least
from lightning_dgl.codecs import Message


@dataclass
class Entry:
    """A batch in a replay buffer.

    Attributes:
        activation: the predecessor's detached output (N, ...), or what a codec made of it.
        targets: of these samples (N, ...).
        step: of the predecessor, when it made the batch.
        uses: how often the batch was read.
    """

    activation: Tensor | Message
    targets: Tensor
    step: int
    uses: int = 0


@dataclass
class Reads:
    """What was read from a replay buffer since the last report.

    Attributes:
        count: how many batches were read.
        total_age: their ages, summed: steps of the predecessor between a batch and the newest in the buffer.
        max_age: the largest.
        total_uses: how often they had been read before, summed.
    """

    count: int = 0
    total_age: int = 0
    max_age: int = 0
    total_uses: int = 0


class ReplayBuffer:
    """The last M batches that a block's predecessor has made, to train on again and again (Algorithm 2 of the paper).

    Writing overwrites the oldest batch. Reading takes, among the batches that were read the fewest times, the most
    recent one. The buffer keeps the tensors themselves, which must not change after they were put; nothing is copied
    unless ``device`` is another one than theirs.

    Args:
        capacity: M, in batches.
        max_reuse: how many times a batch may be read; None: without bound.
        device: where to store batches; by default where they are. They are read on the device that they came from.
        pin_memory: store in page-locked host memory, from which a CUDA device reads faster.

    Raises:
        ValueError: if ``capacity`` or ``max_reuse`` is not at least 1, or ``pin_memory`` meets a ``device`` that is not
            the host.

    Example::

        >>> buffer = ReplayBuffer(capacity=2)
        >>> for i in range(3):
        ...     buffer.put(torch.full((4, 8), float(i)), torch.tensor([i] * 4))
        >>> [buffer.get()[1][0].item() for _ in range(3)]  # batch 0 was overwritten
        [2, 1, 2]
    """

    def __init__(
        self,
        capacity: int,
        max_reuse: int | None = None,
        *,
        device: torch.device | str | None = None,
        pin_memory: bool = False,
    ) -> None:
        check_at_least("capacity", capacity, 1)
        if max_reuse is not None:
            check_at_least("max_reuse", max_reuse, 1)
        if pin_memory and device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"pin_memory=True stores batches in the host's memory, but device is {str(device)!r}.")
        self.capacity = capacity
        self.max_reuse = max_reuse
        self._device = torch.device("cpu") if pin_memory else None if device is None else torch.device(device)
        self._pin_memory = pin_memory
        self._entries: list[Entry] = []
        self._oldest = 0
        self._newest_step = -1
        self._origin: torch.device | None = None
        self._reads = Reads()

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes that the batches take, targets counted in."""
        return sum(entry.activation.nbytes + entry.targets.nbytes for entry in self._entries)

    @property
    def uses(self) -> list[int]:
        """How often each batch was read, oldest batch first."""
        return [entry.uses for entry in self._in_order()]

    @property
    def ages(self) -> list[int]:
        """Steps of the predecessor between each batch and the newest one, oldest batch first."""
        return [self._newest_step - entry.step for entry in self._in_order()]

    @property
    def is_exhausted(self) -> bool:
        """Whether there is no batch to read: none was put yet, or all were read ``max_reuse`` times."""
        return not self._entries or (
            self.max_reuse is not None and min(entry.uses for entry in self._entries) >= self.max_reuse
        )

    def put(self, activation: Tensor | Message, targets: Tensor, step: int | None = None) -> None:
        """Store a batch, in place of the oldest if the buffer is full; takes the same time however full it is.

        Args:
            activation: the predecessor's output (N, ...), any dtype, or what a codec made of it.
            targets: of these samples (N, ...).
            step: of the predecessor; by default one more than that of the batch before.

        Raises:
            ValueError: if a sample is not shaped as those in the buffer, or there are not as many targets as samples.
        """
        if activation.ndim == 0 or targets.ndim == 0 or len(activation) != len(targets):
            raise ValueError(
                f"A batch has as many targets as samples, got activation of shape {tuple(activation.shape)} and "
                f"targets of shape {tuple(targets.shape)}."
            )
        if self._entries:
            self._check_like("activation", activation, self._entries[0].activation)
            self._check_like("targets", targets, self._entries[0].targets)
        self._origin = activation.device
        self._newest_step = self._newest_step + 1 if step is None else step
        stored = activation.map(self._stored) if isinstance(activation, Message) else self._stored(activation)
        entry = Entry(stored, self._stored(targets), self._newest_step)
        if len(self._entries) < self.capacity:
            self._entries.append(entry)
        else:
            self._entries[self._oldest] = entry
            self._oldest = (self._oldest + 1) % self.capacity

    def get(self, *, beyond_max_reuse: bool = False) -> tuple[Any, Tensor]:
        """Return the most recent of the least used batches, ``(activation, targets)``, on the device that it came from.

        Args:
            beyond_max_reuse: read one even if all were read ``max_reuse`` times.

        Raises:
            IndexError: if no batch was put yet, or all were read ``max_reuse`` times.
        """
        if not self._entries:
            raise IndexError("The replay buffer is empty: put a batch before you get one.")
        if self.is_exhausted and not beyond_max_reuse:
            raise IndexError(
                f"Every batch in the replay buffer was read max_reuse={self.max_reuse} times: wait for another, or "
                "check is_exhausted first."
            )
        entry = min(reversed(self._in_order()), key=lambda entry: entry.uses)  # the first of equals: the most recent
        age = self._newest_step - entry.step
        self._reads.count += 1
        self._reads.total_age += age
        self._reads.max_age = max(self._reads.max_age, age)
        self._reads.total_uses += entry.uses
        entry.uses += 1
        assert self._origin is not None
        asynchronous = self._pin_memory
        return (
            entry.activation.to(self._origin, non_blocking=asynchronous),
            entry.targets.to(self._origin, non_blocking=asynchronous),
        )

    def clear(self) -> None:
        """Forget all batches."""
        self._entries.clear()
        self._oldest = 0

    def take_reads(self) -> Reads:
        """Return what was read since the last call."""
        reads, self._reads = self._reads, Reads()
        return reads

    def _in_order(self) -> list[Entry]:
        """Return the entries, oldest first."""
        return self._entries[self._oldest :] + self._entries[: self._oldest]

    def _stored(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if self._pin_memory:
            # Not .pin_memory() of a copy, which would hold the batch in the host's memory twice.
            pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
            return pinned.copy_(tensor)
        return tensor if self._device is None else tensor.to(self._device)

    @staticmethod
    def _check_like(what: str, new: Tensor | Message, old: Tensor | Message) -> None:
        if (new.shape[1:], new.dtype) != (old.shape[1:], old.dtype):
            raise ValueError(
                f"All batches in a replay buffer have samples of one shape and dtype: {what} has "
                f"{tuple(new.shape[1:])}, {new.dtype}, earlier ones {tuple(old.shape[1:])}, {old.dtype}. Clear the "
                "buffer first, or use another."
            )
