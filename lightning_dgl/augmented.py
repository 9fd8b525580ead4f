r"""Auxiliary heads that are thin copies of the rest of the network, after AugLocal (Ma, Wu, Si, Tan, ICLR 2024).

A block whose head is like what follows it learns features that the rest of the network can use::

    network       block │ unit  unit  UNIT  unit  unit  UNIT  unit  unit  tail          UNIT: changes the shape
    head          pool ──────────────►UNIT──────────────►UNIT──────────►unit──►tail     copies, trained apart
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_dgl._arguments import check_at_least
from lightning_dgl.heads import HEADS, HeadFactory
from lightning_dgl.splitting import (
    SplitError,
    SplitPoint,
    TracedNetwork,
    Unit,
    num_parameters,
    output_shape,
    units_after,
)

# At four blocks, heads get up to half of the network's parameters and a quarter of its FLOPs together.
_PARAMETERS, _FLOPS = 1 / 2, 1 / 4
# A head of one unit may have up to this part of the network's parameters.
_AT_MOST = 1 / 3
# A head may always have so many parameters, however small the network is.
_FEW = 100_000


@dataclass(frozen=True)
class Augmented:
    """Makes auxiliary heads of copies of later units of the network, such as residual blocks.

    A head takes ``depth`` of the units that follow its block: those that change the shape, so that sizes fit, and
    others between them, evenly spaced. The copies start from the network's present values, pretrained ones too, and are
    trained apart from it. What follows the last unit in the network (pooling, the classifier) ends the head as well;
    where that is too large or was left behind, global average pooling and a linear layer do.

    With ``pool`` above 1 heads keep to a budget: together at most half of the network's parameters and a quarter of its
    FLOPs at four blocks, but always one unit where that has less than a third of the network's parameters. A head over
    budget has fewer units, or ends before the network narrows further. With ``pool=1`` a head is AugLocal's, of any
    size.

    Args:
        depth: how many units the head of block 0 has.
        pool: a head first average-pools its input by this factor; 1 where the units need the full size.
        taper: c, by how much depth shrinks towards the last head: head i of L has
            max(1, round(depth (1 - c t) + c t)) units, t = i / (L - 1).

    Raises:
        ValueError: for an argument that does not fit.

    Example::

        >>> import torch, torchvision
        >>> from lightning_dgl import DGLModule
        >>> network = torchvision.models.resnet18(num_classes=10)
        >>> module = DGLModule(network, 4, example_input=(2, 3, 64, 64), head=Augmented(depth=1))
        >>> [head.unit_names for head in module.heads]
        [['layer2.0'], ['layer3.0'], ['layer4.0']]
    """

    depth: int = 2
    pool: int = 2
    taper: float = 0.5

    def __post_init__(self) -> None:
        check_at_least("depth", self.depth, 1)
        check_at_least("pool", self.pool, 1)
        if not 0 <= self.taper <= 1:
            raise ValueError(f"taper must be from 0 to 1, got {self.taper!r}.")

    def depth_at(self, t: float) -> int:
        """Return the depth of a head at ``t``, from 0 (the first one) to 1 (the last one)."""
        return max(1, round(self.depth * (1 - self.taper * t) + self.taper * t))

    def make(
        self, traced: TracedNetwork, point: SplitPoint, num_classes: int, t: float | None = None, num_heads: int = 3
    ) -> AugmentedHead:
        """Make the head of a block that ends at ``point``.

        Args:
            traced: the network.
            point: where the block ends.
            num_classes: number of class scores.
            t: see :meth:`depth_at`; by default the part of the network's FLOPs that comes before ``point``.
            num_heads: among how many the budget is shared.
        """
        depth = self.depth_at(point.cost / traced.cost if t is None else t)
        units, tail = units_after(traced, point)
        can_pool = len(point.shape) == 4 and min(point.as_images(torch.empty(point.shape)).shape[2:]) >= 2 * self.pool
        for pool in (self.pool, 1) if can_pool and self.pool > 1 else (1,):
            budget = _Budget.of(traced, num_heads, pool) if self.pool > 1 else _Budget()
            chosen, ends = _choose(units, tail, point, depth, num_classes, budget)
            for end in (tail, None) if ends else (None,):
                head = AugmentedHead(point, pool, chosen, end, num_classes)
                if _runs(head, traced, point, num_classes):  # else units or tail need the full size
                    return head
        return AugmentedHead(point, 1, [], None, num_classes)


class AugmentedHead(nn.Module):
    """Scores a block's output by copies of later units of the network; made by :class:`Augmented`.

    Args:
        point: where the block ends.
        pool: by which factor to average-pool first.
        units: to copy, in order.
        tail: to copy after them; None: global average pooling and a linear layer.
        num_classes: number of class scores.

    Shape:
        (N, C, H, W) -> (N, num_classes)

    Attributes:
        unit_names: names of the network's units that were copied.
    """

    def __init__(
        self, point: SplitPoint, pool: int, units: Sequence[Unit], tail: Unit | None, num_classes: int
    ) -> None:
        super().__init__()
        self.unit_names = [unit.name for unit in units]
        self.pool = nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        self.units = nn.ModuleList(unit.block.detached_copy() for unit in units)
        last = units[-1].end if units else point
        assert last is not None
        self.tail = nn.Linear(last.channels, num_classes) if tail is None else tail.block.detached_copy()
        self._point, self._last = point, None if tail is not None else last

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores (N, classes)."""
        x = self._point.from_images(self.pool(images))
        for unit in self.units:
            x = unit(x)
        return self.tail(x if self._last is None else self._last.as_images(x).mean((2, 3)))


@dataclass(frozen=True)
class _Budget:
    """How many parameters, and forward FLOPs at full size for one sample, a head may have."""

    parameters: float = math.inf
    flops: float = math.inf
    at_most: float = math.inf  # parameters of a head with one unit

    @classmethod
    def of(cls, traced: TracedNetwork, num_heads: int, pool: int) -> _Budget:
        total = num_parameters(traced.network)
        share = max(1 / num_heads, 1 / 3)
        parameters = max(_FEW, _PARAMETERS * share * total)
        return cls(parameters, _FLOPS * share * traced.cost * pool**2, max(parameters, _AT_MOST * total))


def _choose(
    units: Sequence[Unit], tail: Unit, point: SplitPoint, depth: int, num_classes: int, budget: _Budget
) -> tuple[list[Unit], bool]:
    """Return the units of a head, and whether the tail follows them: as far as the budget goes, then as deep."""
    shapes = [point.shape[1:], *(unit.shape for unit in units)]
    changes = [i for i in range(len(units)) if shapes[i] != shapes[i + 1]]
    for reach in range(min(len(changes), depth), -1, -1):
        within = units[: changes[reach]] if reach < len(changes) else units
        reaches_end = reach == len(changes)
        for d in range(min(depth, len(within)), max(reach, 1) - 1, -1):
            chosen = [within[i] for i in spread(len(within), changes[:reach], d)]
            num_parameters = sum(unit.num_parameters for unit in chosen)
            if sum(unit.flops for unit in chosen) > budget.flops:
                continue
            if reaches_end and num_parameters + tail.num_parameters <= budget.parameters:
                return chosen, True
            if num_parameters + _channels(chosen, point) * num_classes <= budget.parameters:
                return chosen, False
    if not units:  # a tail as small as the linear layer in its place is always taken
        return [], tail.num_parameters <= max(budget.parameters, (point.channels + 1) * num_classes)
    first = units[0]
    fits = first.num_parameters + _channels([first], point) * num_classes <= budget.at_most
    return ([first] if fits else []), False


def _channels(units: Sequence[Unit], point: SplitPoint) -> int:
    end = units[-1].end if units else point
    assert end is not None
    return end.channels


def spread(num_units: int, changes: Sequence[int], depth: int) -> list[int]:
    """Choose ``depth`` of the units 0, 1, ..., evenly spaced up to the last one, with all of ``changes`` among them.

    Example::

        >>> spread(15, changes=[5, 10], depth=2)
        [5, 10]
        >>> spread(15, changes=[5, 10], depth=5)
        [4, 5, 9, 10, 14]
    """
    starts = [0, *changes, num_units]
    groups = list(pairwise(starts))  # units of one shape; but for the first, a change first
    evenly = [round(num_units * k / depth) - 1 for k in range(1, depth + 1)]
    counts = [sum(start <= i < stop for i in evenly) for start, stop in groups]
    for g in range(1, len(groups)):
        if counts[g] == 0:
            counts[counts.index(max(counts))] -= 1
            counts[g] = 1
    chosen = []
    for g, ((start, stop), count) in enumerate(zip(groups, counts, strict=True)):
        if g > 0 and count > 0:
            chosen.append(start)
            start, count = start + 1, count - 1
        chosen += [start + round((stop - start) * k / count) - 1 for k in range(1, count + 1)]
    return chosen


def _runs(head: nn.Module, traced: TracedNetwork, point: SplitPoint, num_classes: int) -> bool:
    """Return whether ``head`` makes class scores of what comes from ``point``."""
    features = torch.empty(point.shape, dtype=traced.example_input.dtype, device="meta")
    try:
        return all(
            output_shape(head, point.as_images(features), training) == (point.shape[0], num_classes)
            for training in (True, False)
        )
    except SplitError:
        return False


Heads = str | Augmented | HeadFactory | list[str | Augmented | HeadFactory]
"""What makes the auxiliary heads: one for all blocks, or one for each block but the last."""


def head_maker(head: str | HeadFactory | Augmented) -> HeadFactory | Augmented:
    """Return what makes the heads that ``head`` names, or ``head`` itself.

    Raises:
        ValueError: if there is no head of that name.
        TypeError: if ``head`` is neither a name nor a callable; modules are refused, because blocks need one each.
    """
    if head == "augmented":
        return Augmented()
    if isinstance(head, str) and head in HEADS:
        return HEADS[head]
    if isinstance(head, Augmented) or (callable(head) and not isinstance(head, (str, nn.Module))):
        return head
    choices = f"{', '.join(map(repr, HEADS))}, 'augmented', an Augmented, or a callable"
    if isinstance(head, str):
        raise ValueError(f"head must be {choices}, got {head!r}.")
    raise TypeError(
        f"head must be {choices} (channels, spatial_size, num_classes) -> nn.Module, got "
        f"{'the module ' if isinstance(head, nn.Module) else ''}{type(head).__name__}."
    )
