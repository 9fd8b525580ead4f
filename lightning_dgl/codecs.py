"""Codecs: compress what crosses a boundary between blocks, on the wire and in the replay buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_dgl._arguments import check_at_least
from lightning_dgl.nearest_codes import nearest_codes, nearest_codes_compiled

VERSION = 1
"""Version of the message format; a message of another version is refused."""

HEADER_BYTES = 512
"""Size of the header that precedes a message on the wire: its batch, and the dtypes and shapes of its tensors."""

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Message:
    """A block's output, encoded. It needs nothing else to be decoded, so that a receiver has no state to keep.

    Attributes:
        codes: (N, C, ...) in half precision; or (N, C / code_dim, ...), uint8 for up to 256 codes, else int16.
        codebook: (num_codebooks · num_codes, code_dim), float32, which ``codes`` index; None in half precision.
        dtype: of what it decodes to.
        version: of this format.
        num_codebooks: into how many codebooks ``codebook`` falls, each for as many consecutive groups of channels.
    """

    codes: Tensor
    codebook: Tensor | None
    dtype: torch.dtype
    version: int = VERSION
    num_codebooks: int = 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors to store or send."""
        return (self.codes,) if self.codebook is None else (self.codes, self.codebook)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the codebook."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def shape(self) -> torch.Size:
        """Shape of the decoded tensor."""
        code_dim = 1 if self.codebook is None else self.codebook.shape[1]
        return torch.Size([self.codes.shape[0], self.codes.shape[1] * code_dim, *self.codes.shape[2:]])

    @property
    def ndim(self) -> int:
        """Number of dimensions of the decoded tensor."""
        return self.codes.ndim

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.codes.device

    def __len__(self) -> int:
        """N, the number of samples."""
        return len(self.codes)

    def map(self, function: Callable[[Tensor], Tensor]) -> Message:
        """Return a message with ``function`` applied to the tensors, such as a copy to another device."""
        codebook = None if self.codebook is None else function(self.codebook)
        return replace(self, codes=function(self.codes), codebook=codebook)

    def to(self, *args: Any, **kwargs: Any) -> Message:
        """Return a copy on another device, like ``Tensor.to``."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def decode(self) -> Tensor:
        """Return the decoded tensor (N, C, ...), in ``dtype``.

        Raises:
            ValueError: for a message of another version.
        """
        if self.version != VERSION:
            raise ValueError(
                f"The message is of version {self.version}, this is version {VERSION}. Run the same version of "
                "lightning-dgl on every rank."
            )
        if self.codebook is None:
            return self.codes.to(self.dtype)
        codes = self.codes.int()
        if self.num_codebooks > 1:
            first = torch.arange(self.num_codebooks, device=codes.device) * (len(self.codebook) // self.num_codebooks)
            of_groups = first.repeat_interleave(codes.shape[1] // self.num_codebooks)
            codes = codes + of_groups.view(-1, *[1] * (codes.ndim - 2))
        vectors = F.embedding(codes, self.codebook)  # (N, C / code_dim, ..., code_dim)
        return vectors.movedim(-1, 2).reshape(self.shape).to(self.dtype)


Activation = Tensor | Message
"""A block's output, raw or encoded."""


def tensors_of(items: Iterable[Activation]) -> list[Tensor]:
    """Return the tensors, with those that messages hold."""
    return [tensor for item in items for tensor in (item.tensors if isinstance(item, Message) else (item,))]


class Codec(nn.Module):
    """The base of all codecs: turns a block's outputs into messages, and messages into tensors."""

    def update(self, x: Tensor) -> None:
        """Learn from a block's output (N, C, ...) before it is encoded; the base learns nothing."""

    def encode(self, x: Tensor) -> Message:
        """Encode a block's output (N, C, ...), floating-point."""
        raise NotImplementedError

    def decode(self, message: Message) -> Tensor:
        """Decode a message to a tensor (N, C, ...)."""
        return message.decode()


class Half(Codec):
    """Half precision (float16): half as many bytes as float32. Clamps values beyond ±65504."""

    @override
    def encode(self, x: Tensor) -> Message:
        _check_float(x)
        largest = torch.finfo(torch.float16).max
        # Clamped after the conversion: bfloat16 has no 65504, it would round the bound up to what becomes infinite.
        return Message(x.detach().to(torch.float16).clamp(-largest, largest), None, x.dtype)


class VectorQuantizer(Codec):
    """Online vector quantization (the 2021 paper's addition; its constants were not available, these are our own).

    Channels are cut in groups of ``code_dim``; a group at one position is a vector, which is replaced by the number of
    the nearest of ``num_codes`` codes, by Euclidean distance. One codebook serves all groups, unless ``num_codebooks``
    asks for several. It is learned online: the first batch initialises it (k-means++ and a few steps of k-means); each
    further batch moves each code, by an exponential moving average, towards the mean of the vectors it stands for. A
    code that hardly any vector is nearest to is drawn again, from vectors that are far from theirs. From each batch it
    learns from random vectors: 64 for each code of a codebook, and 65536 at most.

    A float32 tensor becomes 4 · ``code_dim`` times smaller with 256 codes, the codebook apart, which each message holds
    (8 KiB for 256 codes of 8).

    Args:
        num_codes: K, from 2 to 32768; up to 256 take a byte for each vector, more take two.
        code_dim: D, channels of a vector; the number of channels must be a multiple.
        decay: of the moving average, between 0 and 1.
        num_codebooks: how many codebooks share the groups of channels, so that each fits its own better; the number of
            groups must be a multiple.
        compile: search by ``torch.compile``: same codes, some seconds when it first encodes, then on CPU up to twice as
            fast with ``code_dim`` up to 8, and no faster from 16. Needs a C++ compiler (on an accelerator, Triton, and
            the host waits for the codes).

    Attributes:
        codebook: (K, D), float32; several codebooks one after another.
        num_updates: how many batches it has learned from, a scalar.
        perplexity: of the codes' use in the last batch learned from, from 1 to K: how many are in equal use; of several
            codebooks the mean.
        error: of that batch: squared distance to the codes over the vectors' variance; 0 is perfect.

    Raises:
        ValueError: for an argument that does not fit; the message names it, its value and the remedy.

    Example::

        >>> quantizer = VectorQuantizer(num_codes=16, code_dim=4)
        >>> x = torch.randn(8, 32, 10, 10)
        >>> quantizer.update(x)
        >>> message = quantizer.encode(x)
        >>> message.codes.shape, message.nbytes  # of 102400 bytes
        (torch.Size([8, 8, 10, 10]), 6656)
        >>> quantizer.decode(message).shape
        torch.Size([8, 32, 10, 10])
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    num_updates: Tensor

    def __init__(
        self,
        num_codes: int = 256,
        code_dim: int = 8,
        decay: float = 0.99,
        *,
        num_codebooks: int = 1,
        compile: bool = False,
    ) -> None:
        super().__init__()
        check_at_least("num_codes", num_codes, 2)
        if num_codes > 32768:
            raise ValueError(f"num_codes must be at most 32768, two bytes a vector, got {num_codes}.")
        check_at_least("code_dim", code_dim, 1)
        check_at_least("num_codebooks", num_codebooks, 1)
        if not 0 < decay < 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay!r}.")
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.decay = decay
        self.num_codebooks = num_codebooks
        self.compile_search = compile
        self._measured = torch.full((2,), float("nan"))  # read when asked for, as that waits for the device
        self.register_buffer("codebook", torch.zeros(num_codebooks * num_codes, code_dim))
        self.register_buffer("counts", torch.zeros(num_codebooks * num_codes))
        self.register_buffer("sums", torch.zeros(num_codebooks * num_codes, code_dim))
        self.register_buffer("num_updates", torch.tensor(0))

    @override
    def extra_repr(self) -> str:
        several = f", num_codebooks={self.num_codebooks}" if self.num_codebooks > 1 else ""
        return f"num_codes={self.num_codes}, code_dim={self.code_dim}, decay={self.decay}{several}"

    @property
    def perplexity(self) -> float:
        """How many codes are in equal use."""
        return float(self._measured[0])

    @property
    def error(self) -> float:
        """Squared distance to the codes over the vectors' variance."""
        return float(self._measured[1])

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VectorQuantizer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.num_updates = self.num_updates.cpu()  # the host reads it for every batch
        return self

    @override
    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Learn from ``x`` (N, C, ...).

        Raises:
            ValueError: if C is not a multiple of ``code_dim``, or if a value is NaN or infinite; then the codebook
                stays as it was.
            TypeError: if ``x`` is not floating-point.
        """
        self._check(x)
        is_finite = torch.stack(torch.aminmax(x)).isfinite().all()  # NaN, too, shows in both
        # A separate random stream: data and dropout are drawn as they would be without a codec.
        generator = torch.Generator(x.device).manual_seed(int(self.num_updates))
        books = [self._sample(part, generator) for part in self._parts(x)]
        if not self.num_updates:
            _check_finite(bool(is_finite))
            for b, sample in enumerate(books):
                self._rows(b, self.codebook).copy_(self._first_codes(sample, generator))
            for _ in range(5):
                self._learn(books, 0.0, generator, is_finite)
        self._learn(books, self.decay, generator, is_finite)
        self.num_updates += 1

    @override
    @torch.no_grad()
    def encode(self, x: Tensor) -> Message:
        """Encode ``x`` (N, C, ...): for each vector the nearest code.

        Needs at most 8 MiB of memory (on an accelerator 128 MiB) besides ``x`` and the message.

        Raises:
            ValueError: if C is not a multiple of ``code_dim``.
            TypeError: if ``x`` is not floating-point.
            RuntimeError: before the first :meth:`update`.
        """
        self._check(x)
        if not self.num_updates:
            raise RuntimeError("The codebook is empty: update(x) with a first batch before you encode.")
        search = nearest_codes_compiled if self.compile_search else nearest_codes
        found = [search(part, self._rows(b, self.codebook)) for b, part in enumerate(self._parts(x))]
        codes = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        codes = codes.view(len(x), -1, *x.shape[2:])
        return Message(codes, self.codebook.clone(), x.dtype, num_codebooks=self.num_codebooks)

    @override
    def decode(self, message: Message) -> Tensor:
        """Decode ``message`` to a tensor (N, C, ...), in the dtype that was encoded.

        Raises:
            ValueError: if the message is of another version, or of other codes than this quantizer's.
        """
        expected = tuple(self.codebook.shape)
        if message.codebook is None or tuple(message.codebook.shape) != expected:
            found = "no codebook" if message.codebook is None else f"a codebook of {tuple(message.codebook.shape)}"
            raise ValueError(f"The message has {found}, this quantizer (num_codes, code_dim) = {expected}.")
        return message.decode()

    def _check(self, x: Tensor) -> None:
        _check_float(x)
        if x.ndim < 2 or x.shape[1] % self.code_dim or x.numel() == 0:
            raise ValueError(
                f"x of shape {tuple(x.shape)} cannot be cut in groups of code_dim={self.code_dim} channels: choose a "
                "code_dim that divides the number of channels, C in (N, C, ...)."
            )
        if x.shape[1] // self.code_dim % self.num_codebooks:
            raise ValueError(
                f"{x.shape[1]} channels in groups of code_dim={self.code_dim} cannot be shared equally among "
                f"num_codebooks={self.num_codebooks}: choose a number that divides {x.shape[1] // self.code_dim}."
            )

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the groups of each codebook, (N, groups, D, positions), without a copy where memory format allows."""
        positions = x[0, 0].numel()
        vectors = x.detach().reshape(len(x), x.shape[1], positions).view(len(x), -1, self.code_dim, positions)
        return vectors.chunk(self.num_codebooks, dim=1)

    def _rows(self, codebook: int, of: Tensor) -> Tensor:
        """Return the part of ``of`` (codes, counts or sums) that belongs to one codebook."""
        return of[codebook * self.num_codes : (codebook + 1) * self.num_codes]

    def _sample(self, vectors: Tensor, generator: torch.Generator) -> Tensor:
        """Draw some of the vectors (N, groups, D, positions) at random, (M, D), float32; all if there are few."""
        num_vectors = vectors.numel() // self.code_dim
        wanted = max(min(64 * self.num_codes, 65536) // self.num_codebooks, 8 * self.num_codes)
        if num_vectors <= wanted:
            return vectors.movedim(2, -1).reshape(-1, self.code_dim).float()
        places = torch.randint(num_vectors, (wanted,), generator=generator, device=vectors.device)
        _, num_groups, _, positions = vectors.shape
        samples, groups = places // (num_groups * positions), places // positions % num_groups
        return vectors[samples, groups, :, places % positions].float()

    def _first_codes(self, sample: Tensor, generator: torch.Generator) -> Tensor:
        """k-means++: each code is drawn with a probability proportional to the squared distance to those before it."""

        def some(number: int) -> Tensor:
            return sample[torch.randint(len(sample), (number,), generator=generator, device=sample.device)]

        if self.num_codes > 1024:  # one after another would take long
            return some(self.num_codes)
        codes = some(1)
        distances = (sample - codes).square().sum(1)
        for _ in range(self.num_codes - 1):
            new = sample[_draw(distances, 1, generator)]
            codes = torch.cat([codes, new])
            distances = torch.minimum(distances, (sample - new).square().sum(1))
        return codes

    def _learn(self, books: Sequence[Tensor], decay: float, generator: torch.Generator, is_finite: Tensor) -> None:
        """Learn from the sample of each codebook; waits for the device once.

        Args:
            books: the samples, (M, D) each.
            decay: of the moving average.
            generator: draws new codes.
            is_finite: a scalar; if False, ValueError is raised and nothing changes.
        """
        learned = [self._learned(b, sample, decay) for b, sample in enumerate(books)]
        finite, *numbers = torch.stack([is_finite, *(own.unused.sum() for own in learned)]).tolist()
        _check_finite(finite)
        for b, (sample, own, number) in enumerate(zip(books, learned, numbers, strict=True)):
            codebook, counts, sums = (self._rows(b, of) for of in (self.codebook, self.counts, self.sums))
            codebook.copy_(own.codebook)
            counts.copy_(own.counts)
            sums.copy_(own.sums)
            if number:
                unused = own.unused.byte().argsort(descending=True, stable=True)[:number]
                new = sample[_draw(own.distances, number, generator)]
                total = own.counts.sum()
                codebook[unused] = new
                counts[unused] = total / self.num_codes
                sums[unused] = new * total / self.num_codes
        perplexity, error, variance = torch.stack([own.measured for own in learned]).sum(0)
        self._measured = torch.stack([perplexity / len(books), error / variance.clamp_min(1e-12)])

    def _learned(self, b: int, sample: Tensor, decay: float) -> _Learned:
        """What codebook ``b`` learns from its sample."""
        codebook, counts, sums = (self._rows(b, own) for own in (self.codebook, self.counts, self.sums))
        codes = nearest_codes(sample.T[None, None], codebook).flatten().long()
        distances = (sample - codebook[codes]).square().sum(1)
        used = torch.zeros_like(counts).index_add_(0, codes, torch.ones_like(distances))
        counts = counts.lerp(used, 1 - decay)
        sums = sums.lerp(torch.zeros_like(sums).index_add_(0, codes, sample), 1 - decay)
        total = counts.sum()
        smoothed = (counts + 1e-5) / (total + 1e-5 * self.num_codes) * total
        unused = counts < 0.01 * total / self.num_codes
        perplexity = torch.special.entr(used / len(sample)).sum().exp()
        measured = torch.stack([perplexity, distances.mean(), sample.var(0, correction=0).sum()])
        return _Learned(sums / smoothed[:, None], counts, sums, unused, distances, measured)


@dataclass(frozen=True)
class _Learned:
    """What a codebook has learned from one sample of M vectors, before codes are drawn anew.

    Attributes:
        codebook, counts, sums: the new ones.
        unused: (K,), whether hardly any vector is nearest to a code.
        distances: (M,), squared, of each vector to its code.
        measured: perplexity, mean of the distances, and variance of the vectors.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    unused: Tensor
    distances: Tensor
    measured: Tensor


def _draw(weights: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Draw indices with probabilities proportional to ``weights``; uniformly if those are zero."""
    total = weights.sum()
    weights = torch.where(total > 0, weights / total, 1.0)
    draw = torch.multinomial if weights.device.type == "cpu" else _draw_by_whole_numbers
    return draw(weights, number, replacement=True, generator=generator)


def _draw_by_whole_numbers(weights: Tensor, number: int, replacement: bool, generator: torch.Generator) -> Tensor:
    """As ``torch.multinomial``, which on an accelerator adds up in any order and refuses to be deterministic."""
    ends = (weights / weights.max() * 2**24).long().cumsum(0)
    places = torch.randint(2**62, (number,), generator=generator, device=weights.device) % ends[-1]
    return torch.searchsorted(ends, places, right=True)


def _check_finite(is_finite: bool) -> None:
    if not is_finite:
        raise ValueError("x has values that are NaN or infinite; the codebook was left as it was.")


def _check_float(x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"A codec takes floating-point activations, got {x.dtype}.")
