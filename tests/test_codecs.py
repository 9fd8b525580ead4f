"""What codecs learn, what a message holds, and what they refuse."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from lightning_dgl import Message, VectorQuantizer
from lightning_dgl.codecs import Half, _draw_by_whole_numbers
from lightning_dgl.links import make_codecs


def activations(*shape: int) -> Tensor:
    """As a block makes them: half of the values are zero."""
    return torch.randn(shape).relu()


def vectors(x: Tensor, code_dim: int) -> Tensor:
    """(N, C, ...) -> (N, C / code_dim, positions, code_dim), float64."""
    return x.double().reshape(len(x), x.shape[1] // code_dim, code_dim, -1).transpose(2, 3)


def clusters(num: int, dim: int, samples: int) -> tuple[Tensor, Tensor]:
    """Far-apart centres (num, dim), and samples (samples, dim, 6, 6) near them."""
    centres = torch.randn(num, dim) * 10
    which = torch.randint(num, (samples, 6, 6))
    return centres, (centres[which] + 0.01 * torch.randn(samples, 6, 6, dim)).permute(0, 3, 1, 2)


# Learning


def test_clusters_are_recovered() -> None:
    centres, x = clusters(num=32, dim=4, samples=100)
    quantizer = VectorQuantizer(32, 4)
    quantizer.update(x)
    distances = torch.cdist(centres, quantizer.codebook).min(1).values
    assert distances.max() < 0.05
    assert quantizer.error < 1e-4
    assert quantizer.perplexity > 25


def test_codes_follow_data_that_moves() -> None:
    quantizer = VectorQuantizer(16, 4, decay=0.8)
    x = activations(16, 8, 10, 10)
    quantizer.update(x)
    at_first = (quantizer.decode(quantizer.encode(x + 3)) - x - 3).square().mean()
    for _ in range(30):
        quantizer.update(x + 3)
    later = (quantizer.decode(quantizer.encode(x + 3)) - x - 3).square().mean()
    assert later < 0.1 * at_first


def test_error_decreases_online() -> None:
    quantizer = VectorQuantizer(64, 8)
    errors = []
    for _ in range(60):
        quantizer.update(activations(8, 32, 8, 8))
        errors.append(quantizer.error)
    assert sum(errors[-10:]) < sum(errors[:10])


@pytest.mark.parametrize(("num_codes", "code_dim"), [(64, 4), (256, 8)])
def test_error_is_no_worse_than_that_of_a_well_kept_library(num_codes: int, code_dim: int) -> None:
    mixing = torch.randn(32, 32) / 32**0.5

    def batch() -> Tensor:  # channels that go together, as a network's do
        return torch.einsum("cd,ndhw->nchw", mixing, torch.randn(16, 32, 8, 8)).relu()

    other = VectorQuantize(code_dim, num_codes, decay=0.9, kmeans_init=True, threshold_ema_dead_code=2)
    own = VectorQuantizer(num_codes, code_dim, decay=0.9)
    for _ in range(30):
        x = batch()
        own.update(x)
        other(vectors(x, code_dim).float().reshape(1, -1, code_dim))
    x = batch()
    flat = vectors(x, code_dim).float().reshape(1, -1, code_dim)
    theirs = (other.eval()(flat)[0] - flat).square().mean()
    ours = (own.decode(own.encode(x)) - x).square().mean()
    assert ours <= 1.02 * theirs


def test_codes_that_nothing_is_near_to_are_drawn_anew() -> None:
    quantizer = VectorQuantizer(8, 2)
    quantizer.update(activations(16, 4, 6, 6))
    quantizer.codebook[3:] = 1e3
    quantizer.counts[3:] = 0
    quantizer.update(activations(16, 4, 6, 6))
    assert quantizer.codebook.abs().max() < 10
    assert quantizer.perplexity > 1


def test_codes_drawn_on_an_accelerator_follow_their_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 4.0, 1e-9, 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn = _draw_by_whole_numbers(weights, 8000, True, generator)
    shares = torch.bincount(drawn, minlength=7) / 8000
    torch.testing.assert_close(shares, weights / 8, rtol=0, atol=0.02)
    assert set(drawn.tolist()) == {1, 3, 4}
    alike = _draw_by_whole_numbers(torch.ones(4), 8000, True, generator)
    torch.testing.assert_close(torch.bincount(alike) / 8000, torch.full((4,), 0.25), rtol=0, atol=0.02)


def test_error_and_perplexity_are_what_they_say() -> None:
    _, x = clusters(num=4, dim=2, samples=4)
    quantizer = VectorQuantizer(4, 2, decay=0.5)
    quantizer.update(x)
    own = vectors(x, 2).reshape(-1, 2)
    codes = torch.cdist(own, quantizer.codebook.double()).argmin(1)
    shares = torch.bincount(codes).double() / len(own)
    assert quantizer.perplexity == pytest.approx(math.exp(-(shares * shares.log()).sum()))
    assert 0 <= quantizer.error < 1e-4


def test_state_is_kept_in_a_state_dict() -> None:
    quantizer, other = VectorQuantizer(16, 4), VectorQuantizer(16, 4)
    x = activations(8, 8, 5, 5)
    quantizer.update(x)
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    for own in (quantizer, other):
        torch.manual_seed(1)
        own.update(x)
    assert torch.equal(quantizer.encode(x).codes, other.encode(x).codes)
    assert torch.equal(quantizer.codebook, other.codebook)


# Messages


def test_a_message_holds_all_that_decoding_needs_and_counts_it() -> None:
    x = activations(128, 32, 8, 8)
    quantizer = VectorQuantizer(256, 8)
    quantizer.update(x)
    message = quantizer.encode(x)
    assert message.nbytes == x.numel() // 8 + 256 * 8 * 4
    expected = quantizer.decode(message)
    for _ in range(5):
        quantizer.update(activations(128, 32, 8, 8) + 1)
    assert torch.equal(message.decode(), expected)
    assert torch.equal(VectorQuantizer(256, 8).decode(message), expected)
    assert (message.shape, message.ndim, len(message)) == (x.shape, 4, 128)


@pytest.mark.parametrize(("code_dim", "least"), [(4, 15), (8, 30)])
def test_the_papers_activations_become_this_much_smaller(code_dim: int, least: float) -> None:
    x = activations(128, 128, 32, 32)
    quantizer = VectorQuantizer(256, code_dim)
    quantizer.update(x[:8])
    labels_and_header = 128 * 8 + 512
    assert x.nbytes / (quantizer.encode(x).nbytes + labels_and_header) >= least


def test_half_precision() -> None:
    x = torch.tensor([[0.1, -1e6, 1e6, 3.0]])
    message = Half().encode(x)
    assert message.nbytes == x.nbytes // 2
    assert torch.equal(message.decode(), torch.tensor([[0.1, -65504.0, 65504.0, 3.0]]).half().float())
    assert Half().encode(x.bfloat16()).decode().dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_half_precision_makes_large_values_the_largest_that_it_has(dtype: torch.dtype) -> None:
    x = torch.tensor([[65000.0, 65519.0, 1e6, -1e6, math.inf, -math.inf, math.nan]], dtype=dtype)
    codes = Half().encode(x).codes
    assert codes[0, 1:-1].tolist() == [65504.0, 65504.0, -65504.0, 65504.0, -65504.0]
    assert codes[0, 0] == x[0, 0].clamp(max=65504).half()
    assert codes[0, -1].isnan()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_codes": 1}, "num_codes must be an integer of at least 2, got 1"),
        ({"num_codes": 32769}, "num_codes must be at most 32768, two bytes a vector, got 32769"),
        ({"code_dim": 0}, "code_dim must be an integer of at least 1, got 0"),
        ({"decay": 1.0}, "decay must be between 0 and 1, got 1.0"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**arguments)


def test_groups_that_cannot_be_shared_among_codebooks() -> None:
    message = r"24 channels in groups of code_dim=4 cannot be .* num_codebooks=4: choose a number that divides 6"
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(16, 4, num_codebooks=4).update(torch.randn(2, 24, 5, 5))


def test_channels_that_cannot_be_cut_in_groups() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 12, 4, 4\) cannot be cut in groups of code_dim=8"):
        VectorQuantizer(4, 8).update(activations(2, 12, 4, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_codebook_survives_values_that_are_not_finite(bad: float) -> None:
    quantizer = VectorQuantizer(16, 4)
    x = activations(4, 8, 5, 5)
    quantizer.update(x)
    before = copy.deepcopy(quantizer.state_dict())
    x[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinite; the codebook was left as it was"):
        quantizer.update(x)
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("codec", [VectorQuantizer(4, 2), Half()])
def test_integers_are_refused(codec: Any) -> None:
    with pytest.raises(TypeError, match=r"takes floating-point activations, got torch\.int64"):
        codec.encode(torch.zeros(2, 4, dtype=torch.int64))


def test_encoding_before_learning() -> None:
    with pytest.raises(RuntimeError, match=r"codebook is empty: update\(x\) with a first batch"):
        VectorQuantizer(4, 2).encode(activations(2, 4))


def test_messages_of_another_version_or_codebook() -> None:
    quantizer = VectorQuantizer(4, 2)
    quantizer.update(activations(8, 4, 5))
    message = quantizer.encode(activations(8, 4, 5))
    with pytest.raises(ValueError, match="message is of version 7, this is version 1"):
        Message(message.codes, message.codebook, message.dtype, version=7).decode()
    with pytest.raises(ValueError, match=r"has a codebook of \(4, 2\), this quantizer .* = \(4, 4\)"):
        VectorQuantizer(4, 4).decode(message)
    with pytest.raises(ValueError, match="has no codebook"):
        quantizer.decode(Half().encode(activations(2, 4)))


def test_each_link_gets_a_codec() -> None:
    quantizer = VectorQuantizer(4, 2)
    assert make_codecs(None, 2) == [None, None]
    first, second = make_codecs(quantizer, 2)
    assert isinstance(first, VectorQuantizer) and isinstance(second, VectorQuantizer)
    assert len({id(codec) for codec in (quantizer, first, second)}) == 3
    kinds = [type(codec) for codec in make_codecs([None, "half", quantizer], 3)]
    assert kinds == [type(None), Half, VectorQuantizer]
    with pytest.raises(ValueError, match="codec is a list of 1, but must have 3: one for each link"):
        make_codecs(["half"], 3)
    with pytest.raises(ValueError, match=r"codec must be None, 'half', a VectorQuantizer, .* got 'zip'"):
        make_codecs("zip", 3)
    with pytest.raises(TypeError, match=r"codec must be None, 'half', .* got int"):
        make_codecs(3, 3)
