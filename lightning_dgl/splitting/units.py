"""Units: the pieces that a network is made of, such as residual blocks; auxiliary heads are built of copies of them.

Between two neighbouring *borders*, natural places to cut, lies a unit. Borders are the ends of composite modules, and
elsewhere the outputs of activations::

    ResNet    stem │ layer1.0 │ layer1.1 │ layer2.0 │ ... │ layer4.1 │ tail: pool, flatten, fc
    VGG       conv, norm, relu │ pool, conv, norm, relu │ ... │ tail: pool, flatten, classifier

A unit that costs more than a sixth of the network is taken apart, where a cut inside it is possible. The *tail* follows
the last border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_dgl.splitting.blocks import Block, make_pieces
from lightning_dgl.splitting.costs import num_parameters
from lightning_dgl.splitting.cut_points import SplitPoint, TracedNetwork

_LARGE = 1 / 6


@dataclass(frozen=True)
class Unit:
    """A piece of a network.

    Attributes:
        block: runs it, on the network's own modules.
        end: the place after it; None for the tail.
        flops: forward FLOPs for one sample.
    """

    block: Block
    end: SplitPoint | None
    flops: float

    @property
    def name(self) -> str:
        """Name of its last module."""
        return self.end.name if self.end else "tail"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its output for one sample; empty for the tail."""
        return self.end.shape[1:] if self.end else ()

    @property
    def num_parameters(self) -> int:
        """How many parameters it has."""
        return num_parameters(self.block)


def units_after(traced: TracedNetwork, point: SplitPoint) -> tuple[list[Unit], Unit]:
    """Return the units that follow ``point``, in forward order, and the tail, which ends in the network's output."""
    borders = [border for border in _borders(traced) if border.cost > point.cost]
    points = [point, *borders]
    pieces = make_pieces(traced, points)
    units = []
    for j, (start, end) in enumerate(zip(points, [*borders, None], strict=True), start=1):
        block = Block(pieces, j, "")
        units.append(Unit(block, end, (end.cost if end else traced.cost) - start.cost))
    return units[:-1], units[-1]


def _borders(traced: TracedNetwork) -> list[SplitPoint]:
    """Return the natural places to cut among tensors with height and width, or tokens; one where costs are equal."""
    points = [point for point in traced.usable if len(point.shape) > 2]
    ends = [point for point in points if point.rank == 0]
    if not ends:
        return _apart([point for point in points if point.rank <= 1])
    first, last = ends[0].cost, ends[-1].cost
    borders = [p for p in points if p.rank == 0 or (p.rank == 1 and not first < p.cost < last)]
    for rank in (1, 2):
        edges = [0.0, *(border.cost for border in borders), traced.cost]
        large = [(a, b) for a, b in pairwise(edges) if b - a > _LARGE * traced.cost]
        borders = [p for p in points if p in borders or (p.rank <= rank and any(a < p.cost < b for a, b in large))]
    return _apart(borders)


def _apart(points: Sequence[SplitPoint]) -> list[SplitPoint]:
    """Leave out points that no FLOPs separate from the one before."""
    kept: list[SplitPoint] = []
    for point in points:
        if not kept or point.cost > kept[-1].cost:
            kept.append(point)
    return kept
