"""The search for the nearest code."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dgl import VectorQuantizer
from lightning_dgl.nearest_codes import _search_by_argmax, nearest_codes

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def activations(*shape: int) -> Tensor:
    """As a block makes them: half of the values are zero."""
    return torch.randn(shape).relu()


def vectors(x: Tensor, code_dim: int) -> Tensor:
    """(N, C, ...) -> (N, C / code_dim, positions, code_dim), float64."""
    return x.double().reshape(len(x), x.shape[1] // code_dim, code_dim, -1).transpose(2, 3)


@pytest.mark.parametrize(
    ("num_codes", "code_dim", "shape"),
    [
        (256, 8, (4, 32, 7, 5)),
        (256, 4, (2, 8, 60, 60)),
        (2, 4, (3, 8, 3, 3)),
        (17, 1, (5, 6)),
        (300, 4, (2, 16, 20, 30)),
        (1024, 8, (2, 16, 9, 9)),
        (32768, 2, (2, 4, 30)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_the_nearest(num_codes: int, code_dim: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = activations(*shape).to(dtype)
    quantizer = VectorQuantizer(num_codes, code_dim)
    quantizer.update(x)
    message = quantizer.encode(x)
    assert message.codes.dtype == (torch.uint8 if num_codes <= 256 else torch.int16)
    assert message.codes.shape == (shape[0], shape[1] // code_dim, *shape[2:])
    own = vectors(x, code_dim)
    codebook = quantizer.codebook.double()
    distances = torch.cdist(own.reshape(-1, code_dim), codebook, compute_mode="donot_use_mm_for_euclid_dist")
    chosen = distances.gather(1, message.codes.long().view(-1, 1))[:, 0]
    assert torch.allclose(chosen, distances.min(1).values, rtol=0, atol=2e-3)
    decoded = quantizer.decode(message)
    assert (decoded.shape, decoded.dtype) == (x.shape, dtype)
    expected = codebook[message.codes.long().view(-1)].to(dtype)
    assert torch.equal(vectors(decoded, code_dim).reshape(-1, code_dim), expected.double())


@needs_compiler
@pytest.mark.parametrize(
    ("num_codes", "code_dim", "offset"),
    [
        *((256, 8, 0), (300, 4, 1000)),  # far from zero, scores differ in their lowest bits only
        pytest.param(256, 8, 1000, marks=pytest.mark.slow),
        pytest.param(300, 4, 0, marks=pytest.mark.slow),
    ],
)
def test_compiled_search_finds_codes_as_near(num_codes: int, code_dim: int, offset: float) -> None:
    quantizer = VectorQuantizer(num_codes, code_dim)
    compiled = VectorQuantizer(num_codes, code_dim, compile=True)
    quantizer.update(offset + activations(4, 2 * code_dim, 20, 20))
    compiled.load_state_dict(quantizer.state_dict())
    for shape in ((4, 2 * code_dim, 20, 20), (3, code_dim, 30), (1, 4 * code_dim)):  # one function for all of them
        x = offset + activations(*shape)
        own = vectors(x, code_dim).reshape(-1, code_dim)
        near = [codebook_distances(own, quantizer.codebook, q.encode(x).codes) for q in (quantizer, compiled)]
        # Scores are sums of squares in float32: what they can tell apart depends on how large they are.
        assert torch.allclose(*near, rtol=0, atol=1e-6 * float(own.square().sum(1).max()) + 1e-5)


def codebook_distances(own: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """Squared distance of each of the vectors ``own`` to its code."""
    return (own - codebook.double()[codes.long().view(-1)]).square().sum(1)


@pytest.mark.parametrize("compile_it", [False, pytest.param(True, marks=needs_compiler)])
def test_several_codebooks_each_for_its_groups_of_channels(compile_it: bool) -> None:
    x = activations(6, 32, 15, 10) * torch.linspace(1, 9, 32)[:, None, None]
    quantizer = VectorQuantizer(20, 4, num_codebooks=2, compile=compile_it)
    quantizer.update(x)
    message = quantizer.encode(x)
    assert message.codes.shape == (6, 8, 15, 10) and message.codes.dtype == torch.uint8
    assert message.nbytes == 6 * 8 * 150 + 2 * 20 * 4 * 4
    decoded = quantizer.decode(message)
    for half, codebook in enumerate(quantizer.codebook.split(20)):
        own, got = (vectors(t[:, 16 * half : 16 * half + 16], 4).reshape(-1, 4) for t in (x, decoded))
        distances = torch.cdist(own, codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
        assert torch.allclose((own - got).norm(dim=1), distances.min(1).values, rtol=0, atol=1e-3)
    single = VectorQuantizer(20, 4)
    single.update(x)
    assert quantizer.error < 0.9 * single.error
    assert torch.equal(message.to("cpu").decode(), decoded)


def test_codes_that_are_equal_or_equally_near() -> None:
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [-1.0, 0.0]])
    x = torch.tensor([[0.0, 0.0], [0.5, 0.5], [2.0, 0.1], [0.1, -3.0], [-5.0, 5.0]]).T[None, None]
    codes = nearest_codes(x, codebook)[0, 0].long()
    distances = torch.cdist(x[0, 0].T, codebook)
    assert torch.allclose(distances.gather(1, codes[:, None])[:, 0], distances.min(1).values)


def test_memory_format_does_not_matter() -> None:
    x = activations(4, 32, 12, 12)
    quantizer = VectorQuantizer(64, 4)
    quantizer.update(x)
    expected = quantizer.encode(x).codes
    assert torch.equal(quantizer.encode(x.contiguous(memory_format=torch.channels_last)).codes, expected)


class InTF32(TorchDispatchMode):
    """Computes products as a GPU does in TF32: from 10 bits of each factor, rounded."""

    num_products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.num_products += 1
            args = [((factor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for factor in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("offset", [0, 30])
def test_search_on_a_gpu_is_as_exact_in_tf32(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dgl.nearest_codes._GridSearch", _search_by_argmax)
    x = offset + activations(8, 4, 8, 256)
    codebook = offset + torch.randn(256, 8)
    with InTF32() as mode:
        codes = nearest_codes(x, codebook)
    assert mode.num_products
    own = x.movedim(2, -1).reshape(-1, 8).double()
    distances = torch.cdist(own, codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = distances.gather(1, codes.long().view(-1, 1))[:, 0]
    # As far as float32 can tell scores apart, which are sums of squares.
    assert torch.allclose(chosen, distances.min(1).values, rtol=0, atol=1e-5 * (1 + offset**2))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not any(
            isinstance(a, Tensor) and a.data_ptr() == result.data_ptr() for a in args
        ):
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("num_codes", [256, pytest.param(4096, marks=pytest.mark.slow)])
def test_encoding_needs_little_memory(num_codes: int, memory_format: Any) -> None:
    x = activations(16, 16, 64, 64).contiguous(memory_format=memory_format)  # 4 MiB; all scores would take 128 MiB
    quantizer = VectorQuantizer(num_codes, 8)
    quantizer.update(x)
    with Largest() as largest:
        quantizer.encode(x)
    assert largest.nbytes <= 2 * 2**20
