"""The header of what crosses a wire: what is written is read, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dgl import VectorQuantizer
from lightning_dgl.address import Address
from lightning_dgl.codecs import HEADER_BYTES, Half, Message
from lightning_dgl.distributed.wire import read_header, write_header

HERE = Address("train", 2, 0, 7, 31)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1000), max_size=5), st.sampled_from(DTYPES)), max_size=3),
    st.sampled_from(["train", "validate", "sanity_check", "test", "predict"]),
    st.integers(0, 2**62),
)
def test_what_is_written_is_read(layouts: list[tuple[list[int], torch.dtype]], phase: str, step: int) -> None:
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in layouts]
    address = Address(phase, 3, 1, 4, step)
    header = write_header(address, None, tensors)
    assert (header.shape, header.dtype) == ((HEADER_BYTES,), torch.uint8)
    read = read_header(header)
    assert read is not None
    assert read[:2] == (address, None)
    assert read[2] == [(t.dtype, list(t.shape), list(t.stride())) for t in tensors]


def test_strides_are_kept() -> None:
    x = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    read = read_header(write_header(HERE, None, [x]))
    assert read is not None
    assert read[2] == [(torch.float32, [2, 3, 4, 5], list(x.stride()))]


def messages() -> list[Message]:
    found = [Half().encode(torch.randn(3, 8, dtype=torch.bfloat16))]
    for num_codebooks in (1, 2):
        quantizer = VectorQuantizer(4, 2, num_codebooks=num_codebooks)
        quantizer.update(torch.randn(3, 8, 4))
        found.append(quantizer.encode(torch.randn(3, 8, 4).double()))
    return found


def test_messages_of_codecs_are_restored() -> None:
    for message in messages():
        targets = torch.arange(3)
        sent: list[Tensor] = [*message.tensors, targets]
        read = read_header(write_header(HERE, message, sent))
        assert read is not None and read[1] is not None
        restored, rest = read[1].restored(sent)
        assert rest is targets
        assert torch.equal(restored.decode(), message.decode())
        assert (restored.dtype, restored.num_codebooks) == (message.dtype, message.num_codebooks)


def test_the_end_has_no_address() -> None:
    assert read_header(write_header(None)) is None


def test_a_header_that_does_not_fit_is_refused() -> None:
    many = torch.empty([1] * 60, device="meta")
    with pytest.raises(ValueError, match=f"takes [0-9]+ bytes, {HEADER_BYTES} at most fit: too many dimensions"):
        write_header(HERE, None, [many, many])
