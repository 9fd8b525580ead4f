"""The search for the nearest codes: for each vector, the number of the codebook's vector that is nearest to it.

It is exact, fast on a CPU, and needs little memory: scores, K for each vector, are never held for all vectors at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def nearest_codes(x: Tensor, codebook: Tensor) -> Tensor:
    """Return, for each vector of ``x``, the number of the nearest code by Euclidean distance.

    Args:
        x: (N, G, D, S), floating-point; a vector runs along D.
        codebook: (K, D), float32.

    Returns:
        (N, G, S), uint8 if K is at most 256, else int16. Of codes that are equally near, any.
    """
    num_samples, num_groups, _, positions = x.shape
    on_cpu = x.device.type == "cpu"
    # How many vectors at once: for a core eight times what stays in its cache, or what keeps an accelerator busy.
    chunk = 8 * _at_once(codebook) if on_cpu else max(1, 2**24 // len(codebook))
    # |x - c|² is least where x · c - |c|² / 2 is largest: one product, with a constant 1 appended to x.
    augmented = torch.cat([codebook, -0.5 * codebook.square().sum(1, keepdim=True)], dim=1)
    search = _GridSearch(augmented) if on_cpu else _search_by_argmax(augmented)
    found = torch.empty(num_samples, num_groups, positions, dtype=_dtype_of_codes(codebook), device=x.device)
    samples, groups = max(1, chunk // (num_groups * positions)), max(1, chunk // positions)
    for n in range(0, num_samples, samples):
        for g in range(0, num_groups, groups):
            for s in range(0, positions, chunk):
                part = x[n : n + samples, g : g + groups, :, s : s + chunk].movedim(2, 0)
                codes = search(part).view(part.shape[1:])
                found[n : n + samples, g : g + groups, s : s + chunk] = codes
    return found


def _search_by_argmax(augmented: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that finds the code of the largest score for each vector of (D, ...).

    A GPU may compute products in TF32, which keeps 10 of 23 bits of each factor. So every factor is split into two that
    TF32 keeps; the product of the two low parts is too small to matter.
    """
    high, low = _split_for_tf32(augmented)
    codes = torch.cat([high, high, low], dim=1)

    def search(part: Tensor) -> Tensor:
        part = part.float()
        high, low = _split_for_tf32(torch.cat([part, torch.ones_like(part[:1])]).flatten(1))
        return (codes @ torch.cat([high, low, high])).argmax(0)

    return search


def _split_for_tf32(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return two parts whose sum is ``x``, float32: one of its first 10 bits, and the rest."""
    high = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return high, x - high


class _GridSearch:
    """Finds the same codes on a CPU, where ``argmax`` is slow, ``amax`` is fast, and fresh memory is slower still.

    Codes are laid out as a grid. The largest score is compared with the largest of each row, and of each column: where
    they are equal, that is its row and its column::

        scores of 9 codes      largest of row
          1   4   2                 4
          3   7   5                 7   <- row 1
          0   6   2                 6
          3   7   5   largest of column
              ^ column 1            code = 1 * 3 + 1 = 4

    Where two scores are largest, more than one row or column is marked; there ``argmax`` decides.
    """

    def __init__(self, augmented: Tensor) -> None:
        side = 1
        while side * side < len(augmented):
            side *= 2
        self._num_columns = side
        self._num_rows = -(-len(augmented) // side)
        padding = augmented.new_zeros(self._num_rows * side - len(augmented), augmented.shape[1])
        padding[:, -1] = float("-inf")
        # Equal codes would have equal scores everywhere: only the first of them counts.
        _, which = torch.unique(augmented, dim=0, return_inverse=True)
        first = torch.full_like(which, len(augmented)).scatter_reduce(0, which, torch.arange(len(which)), "amin")
        augmented = augmented.clone()
        augmented[first[which] != torch.arange(len(which)), -1] = float("-inf")
        self._augmented = torch.cat([augmented, padding])
        # A product with the marks yields the number of the marked row, that of the marked column, and how many marks.
        rows, columns = torch.arange(self._num_rows), torch.arange(side)
        numbers = [torch.cat([rows, 0 * columns]), torch.cat([0 * rows, columns]), torch.cat([rows, columns]) * 0 + 1]
        self._numbers = torch.stack(numbers).float()
        self._at_once = _at_once(augmented)
        self._scores = torch.empty(len(self._augmented) * self._at_once)
        self._num_vectors = -1

    def _reserve(self, num_vectors: int) -> None:
        if num_vectors == self._num_vectors:
            return
        self._num_vectors = num_vectors
        self._vectors = torch.ones(self._augmented.shape[1], num_vectors)
        self._largest = torch.empty(self._num_rows + self._num_columns, num_vectors)
        self._marks = torch.empty_like(self._largest)

    def __call__(self, part: Tensor) -> Tensor:
        self._reserve(part[0].numel())
        self._vectors[:-1].view(part.shape).copy_(part)
        of_rows, of_columns = self._largest[: self._num_rows], self._largest[self._num_rows :]
        for first in range(0, self._num_vectors, self._at_once):
            few = slice(first, first + self._at_once)
            vectors = self._vectors[:, few]
            scores = self._scores[: len(self._augmented) * vectors.shape[1]].view(len(self._augmented), -1)
            grid = torch.mm(self._augmented, vectors, out=scores).view(self._num_rows, self._num_columns, -1)
            torch.amax(grid, 1, out=of_rows[:, few])
            torch.amax(grid, 0, out=of_columns[:, few])
        torch.eq(self._largest, of_rows.amax(0), out=self._marks)
        row, column, how_many = self._numbers @ self._marks
        found = row * self._num_columns + column
        if how_many.max() > 2:
            unclear = how_many > 2
            found[unclear] = (self._augmented @ self._vectors[:, unclear]).argmax(0).float()
        return found


def _at_once(codebook: Tensor) -> int:
    """Return for how many vectors the scores stay in a core's cache."""
    return max(1, 2**18 // len(codebook))


def nearest_codes_compiled(x: Tensor, codebook: Tensor) -> Tensor:
    """Return what :func:`nearest_codes` returns, from one compiled function for product and search."""
    bias = -0.5 * codebook.square().sum(1)
    torch._dynamo.mark_static(codebook)  # compiled for its shape; the shape of x, which differs by block, may vary
    torch._dynamo.mark_static(bias)
    found = torch.empty(*x.shape[:2], x.shape[3], dtype=_dtype_of_codes(codebook), device=x.device)
    samples = max(1, 2**17 // (x.shape[1] * x.shape[3]))
    for n in range(0, len(x), samples):
        # Once for all codes: in one layout, what is computed at once lies side by side, and in float32.
        part = x[n : n + samples].contiguous().float()
        codes = _compiled_search()(part, codebook, bias)
        if (unclear := codes < 0).any():
            vectors = part.movedim(2, -1)[unclear]
            codes[unclear] = (vectors @ codebook.T + bias).argmax(1).to(codes.dtype)
        found[n : n + samples] = codes
    return found


@cache
def _compiled_search() -> Callable[..., Tensor]:
    # The scores, K times as many as there are vectors, must be computed where they are used, and never stored.
    never = 10**6
    options: dict[str, Any] = dict.fromkeys(
        ("realize_reads_threshold", "realize_opcount_threshold", "realize_acc_reads_threshold"), never
    )
    return torch.compile(_search_by_comparing, fullgraph=True, dynamic=True, options=options)


def _search_by_comparing(x: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
    """Return the number of the largest score of each vector, as a float; -1 where the two passes disagree.

    One pass finds the largest score, another one the number of a score that equals it: this is faster than a pass that
    keeps both. Scores of both are the same unless a compiler rounds differently in one of them.
    """
    scores = bias[:, None, None, None]
    for d in range(x.shape[2]):
        scores = scores + codebook[:, d, None, None, None] * x[None, :, :, d]
    numbers = torch.arange(len(codebook), dtype=torch.float32, device=x.device)[:, None, None, None]
    return torch.where(scores == scores.amax(0), numbers, -1.0).amax(0)


def _dtype_of_codes(codebook: Tensor) -> torch.dtype:
    return torch.uint8 if len(codebook) <= 256 else torch.int16
