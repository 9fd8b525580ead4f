"""ReplayBuffer against a naive model of the paper's rule, and what it promises about memory, devices and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dgl import ReplayBuffer

LABELS = torch.zeros(2, dtype=torch.int64)


def batch(number: int, size: int = 2) -> tuple[Tensor, Tensor]:
    """A batch that is known by its number."""
    return torch.full((size, 3), float(number)), torch.full((size,), number)


def read(buffer: ReplayBuffer) -> int:
    """Which batch is read."""
    activation, targets = buffer.get()
    assert activation.unique().item() == targets.unique().item()
    return int(targets[0])


# The rule


@given(
    capacity=st.integers(1, 6),
    max_reuse=st.none() | st.integers(1, 3),
    puts=st.lists(st.booleans(), max_size=60),
)
def test_reads_take_the_most_recent_of_the_least_used_batches(
    capacity: int, max_reuse: int | None, puts: list[bool]
) -> None:
    buffer = ReplayBuffer(capacity, max_reuse)
    model: list[list[int]] = []  # [number, uses], oldest first
    number = 0
    for is_put in puts:
        if is_put:
            buffer.put(*batch(number))
            model = [*model, [number, 0]][-capacity:]
            number += 1
        else:
            readable = [entry for entry in model if max_reuse is None or entry[1] < max_reuse]
            assert buffer.is_exhausted == (not readable)
            if readable:
                fewest = min(entry[1] for entry in readable)
                expected = [entry for entry in readable if entry[1] == fewest][-1]
                expected[1] += 1
                assert read(buffer) == expected[0]
            else:
                with pytest.raises(IndexError):
                    buffer.get()
        assert len(buffer) == len(model)
        assert buffer.uses == [uses for _, uses in model]
        assert buffer.ages == [number - 1 - other for other, _ in model]


def test_of_equally_used_batches_in_a_full_ring_the_most_recent_is_read() -> None:
    # The authors' code takes the oldest one here.
    buffer = ReplayBuffer(3)
    for number in range(5):
        buffer.put(*batch(number))
    assert [read(buffer) for _ in range(6)] == [4, 3, 2, 4, 3, 2]


def test_steps_of_the_predecessor_count_for_the_age() -> None:
    buffer = ReplayBuffer(3)
    for step in (4, 5, 9):
        buffer.put(*batch(step), step=step)
    assert buffer.ages == [5, 4, 0]
    assert read(buffer) == 9
    assert read(buffer) == 5
    reads = buffer.take_reads()
    assert (reads.count, reads.total_age, reads.max_age, reads.total_uses) == (2, 4, 4, 0)
    assert buffer.take_reads().count == 0


def test_clearing_makes_room_for_batches_of_another_shape() -> None:
    buffer = ReplayBuffer(2)
    for number in range(3):
        buffer.put(*batch(number))
    buffer.clear()
    assert len(buffer) == 0
    assert buffer.is_exhausted
    buffer.put(torch.zeros(2, 5), torch.zeros(2))
    assert buffer.get()[0].shape == (2, 5)


# Memory


def test_nothing_is_copied() -> None:
    buffer = ReplayBuffer(2)
    activation, targets = batch(1)
    buffer.put(activation, targets)
    got = buffer.get()
    assert got[0].data_ptr() == activation.data_ptr()
    assert got[1].data_ptr() == targets.data_ptr()


def test_what_is_stored_has_no_graph() -> None:
    buffer = ReplayBuffer(1)
    weight = torch.ones(3, requires_grad=True)
    buffer.put(batch(1)[0] * weight, batch(1)[1])
    assert not buffer.get()[0].requires_grad


def test_nbytes_counts_activations_and_targets_of_the_batches_that_are_there() -> None:
    buffer = ReplayBuffer(2)
    assert buffer.nbytes == 0
    for number, size in enumerate((4, 4, 1)):
        buffer.put(*batch(number, size))
    assert buffer.nbytes == (4 + 1) * (3 * 4 + 8)


def test_a_smaller_last_batch_is_kept_as_it_is() -> None:
    buffer = ReplayBuffer(2)
    buffer.put(*batch(0, size=4))
    buffer.put(*batch(1, size=3))
    assert [len(buffer.get()[0]) for _ in range(2)] == [3, 4]


def test_batches_are_stored_on_the_device_and_read_where_they_came_from() -> None:
    buffer = ReplayBuffer(1, device="meta")
    buffer.put(*batch(0))
    assert buffer.nbytes == 2 * (3 * 4 + 8)
    with pytest.raises(NotImplementedError):  # torch's, on the way back: a meta tensor has no values
        buffer.get()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_batches_may_wait_in_page_locked_memory() -> None:
    buffer = ReplayBuffer(2, pin_memory=True)
    activation, targets = (tensor.cuda() for tensor in batch(3))
    buffer.put(activation, targets)
    before = torch.cuda.memory_allocated()
    got = buffer.get()
    assert got[0].device == activation.device
    assert torch.equal(got[0], activation)
    assert torch.cuda.memory_allocated() > before


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "capacity must be an integer of at least 1, got 0"),
        ({"capacity": 2.5}, "capacity must be an integer of at least 1, got 2.5"),
        ({"capacity": 2, "max_reuse": 0}, "max_reuse must be an integer of at least 1, got 0"),
        ({"capacity": 2, "device": "cuda", "pin_memory": True}, "pin_memory=True .* but device is 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplayBuffer(**arguments)


def test_reading_from_an_empty_buffer() -> None:
    with pytest.raises(IndexError, match="replay buffer is empty: put a batch before"):
        ReplayBuffer(2).get()


def test_reading_from_an_exhausted_buffer() -> None:
    buffer = ReplayBuffer(2, max_reuse=1)
    buffer.put(*batch(0))
    buffer.get()
    with pytest.raises(IndexError, match="read max_reuse=1 times: wait for another"):
        buffer.get()
    assert buffer.get(beyond_max_reuse=True)[1].tolist() == [0, 0]
    assert buffer.uses == [2]


@pytest.mark.parametrize(
    ("activation", "targets", "message"),
    [
        (torch.zeros(2, 4), LABELS, r"activation has \(4,\), torch.float32, earlier ones \(3,\)"),
        (torch.zeros(2, 3).double(), LABELS, r"activation has \(3,\), torch.float64, earlier"),
        (torch.zeros(2, 3), torch.zeros(2, 5), r"targets has \(5,\), torch.float32, earlier ones \(\), torch.int64"),
        (torch.zeros(3, 3), LABELS, r"as many targets as samples, got activation of shape \(3, 3\)"),
        (torch.zeros(()), torch.zeros(()), "as many targets as samples"),
    ],
    ids=["shape", "dtype", "targets", "numbers", "no batch"],
)
def test_batches_that_do_not_fit(activation: Tensor, targets: Tensor, message: str) -> None:
    buffer = ReplayBuffer(2)
    buffer.put(*batch(0))
    with pytest.raises(ValueError, match=message):
        buffer.put(activation, targets)
    assert buffer.uses == [0]  # unharmed
