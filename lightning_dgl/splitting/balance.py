"""Choosing cuts so that the most expensive block is as cheap as possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from lightning_dgl.splitting.costs import COSTS, HeadFactory
from lightning_dgl.splitting.cut_points import SplitPoint, TracedNetwork
from lightning_dgl.splitting.errors import SplitError

BlockCost = Callable[[int, int], float]
"""``(i, j) -> cost`` of the block from split point i (-1: the network's input) to j (their number: its output)."""

# Cuts at natural places (low rank) are taken as long as the largest block grows by no more than this.
_TOLERANCE = 1.1


def balanced_cuts(
    ranks: Sequence[int],
    costs: Sequence[float],
    head_costs: Sequence[float],
    num_blocks: int,
    input_costs: Sequence[float] | None = None,
    parameters: Sequence[int] | None = None,
) -> list[int]:
    """Choose ``num_blocks - 1`` of the split points, so that the largest block costs least.

    Args:
        ranks: rank of each split point.
        costs: cost of the network up to each split point, and last of the whole network; non-decreasing.
        head_costs: cost of the auxiliary head at each split point.
        num_blocks: how many blocks to make, at most ``len(ranks) + 1``.
        input_costs: what a block that begins at each split point costs on top; nothing by default.
        parameters: how many parameters the network has up to each split point, and last in all: then no block is
            without one, unless that is impossible.

    Returns:
        Indices of the chosen split points, ascending. Split points of higher rank are used only where that makes the
        largest block at least 10 % cheaper; among equals, the cuts of lowest rank, then the most even blocks.

    Example::

        >>> balanced_cuts(ranks=[1, 1, 1], costs=[1, 2, 3, 4], head_costs=[0, 0, 0], num_blocks=2)
        [1]
    """
    if num_blocks == 1:
        return []
    inputs = [0.0] * len(ranks) if input_costs is None else input_costs

    def cost_between(allowed: Sequence[int]) -> BlockCost:
        starts = [0.0, *(inputs[i] - costs[i] for i in allowed)]
        ends = [*(costs[i] + head_costs[i] for i in allowed), costs[-1]]
        if parameters is None:
            return lambda i, j: starts[i + 1] + ends[j]
        upto = [0, *(parameters[i] for i in allowed), parameters[-1]]
        return lambda i, j: starts[i + 1] + ends[j] if upto[j + 1] > upto[i + 1] else math.inf

    everywhere = range(len(ranks))
    bound = _smallest_bound(len(ranks), cost_between(everywhere), num_blocks)
    if bound == math.inf:
        return balanced_cuts(ranks, costs, head_costs, num_blocks, input_costs)
    for rank in sorted(set(ranks)):
        natural = [i for i in everywhere if ranks[i] <= rank]
        if len(natural) >= num_blocks - 1:
            cost = cost_between(natural)
            natural_bound = _smallest_bound(len(natural), cost, num_blocks)
            if natural_bound <= _TOLERANCE * bound:
                chosen = _best_within(natural_bound, [ranks[i] for i in natural], cost, num_blocks)
                return [natural[i] for i in chosen]
    raise AssertionError("the highest rank allows every split point")


def _smallest_bound(num_points: int, cost: BlockCost, num_blocks: int) -> float:
    """Return the smallest possible cost of the largest of ``num_blocks`` blocks."""
    # best[j]: of the blocks so far, which end at split point j.
    best = {j: cost(-1, j) for j in range(num_points + 1)}
    for _ in range(num_blocks - 1):
        best = {j: min((max(best[i], cost(i, j)) for i in range(j)), default=math.inf) for j in range(num_points + 1)}
    return best[num_points]


def _best_within(bound: float, ranks: Sequence[int], cost: BlockCost, num_blocks: int) -> list[int]:
    """Return the cuts of least total rank, then of least sum of squares, with no block above ``bound``."""
    end = len(ranks)
    limit = bound * (1 + 1e-9)
    Best = dict[int, tuple[int, float, list[int]]]  # by where the blocks so far end: rank, sum of squares, cuts
    best: Best = {j: (0, cost(-1, j) ** 2, []) for j in range(end + 1) if cost(-1, j) <= limit}
    for _ in range(num_blocks - 1):
        longer: Best = {}
        for j in range(end + 1):
            options = [
                (best[i][0] + ranks[i], best[i][1] + cost(i, j) ** 2, [*best[i][2], i])
                for i in range(j)
                if i in best and cost(i, j) <= limit
            ]
            if options:
                longer[j] = min(options)
        best = longer
    return best[end][2]


def assign_blocks(costs: Sequence[float], num_stages: int) -> list[range]:
    """Deal consecutive blocks to stages, so that the most expensive stage costs least.

    Args:
        costs: cost of each block, heads counted in.
        num_stages: at most as many as there are blocks.

    Example::

        >>> assign_blocks([1, 1, 1, 3], num_stages=2)
        [range(0, 3), range(3, 4)]
    """
    num_cuts = len(costs) - 1
    cuts = balanced_cuts([0] * num_cuts, list(accumulate(costs)), [0.0] * num_cuts, num_stages)
    ends = [cut + 1 for cut in cuts] + [len(costs)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def choose_points(
    traced: TracedNetwork, num_blocks: int, balance: str, make_head: HeadFactory | None
) -> list[SplitPoint]:
    """Choose the usable split points that make ``num_blocks`` balanced blocks, auxiliary heads counted in.

    Raises:
        SplitError: if there are too few of them, or ``balance`` is none of :data:`COSTS`.
    """
    if balance not in COSTS:
        raise SplitError(f"balance must be one of {', '.join(map(repr, COSTS))}, got {balance!r}.")
    points = traced.usable
    if num_blocks > len(points) + 1:
        raise SplitError(_why_too_many(traced, num_blocks))
    costs = COSTS[balance](traced, make_head)
    ranks = [point.rank for point in points]
    for parameters in (traced.parameters_upto(trainable=True), traced.parameters_upto(trainable=False)):
        cuts = balanced_cuts(ranks, costs.upto, costs.head, num_blocks, costs.input, parameters)
        ends = [0, *(parameters[i] for i in cuts), parameters[-1]]
        if all(start < end for start, end in pairwise(ends)):
            return [points[i] for i in cuts]
    block = next(j for j, (start, end) in enumerate(pairwise(ends)) if start == end)
    raise SplitError(
        f"num_blocks={num_blocks} is more than {type(traced.network).__name__} allows: block {block} would have no "
        f"parameters, so nothing to train. {reason_for_few_points(traced)} Ask for fewer blocks."
    )


def _why_too_many(traced: TracedNetwork, num_blocks: int) -> str:
    points, name = traced.usable, type(traced.network).__name__
    message = (
        f"num_blocks={num_blocks} is more than {name} allows: it has {len(points)} usable split points, so at most "
        f"{len(points) + 1} blocks"
    )
    hazards = [point.name for point in traced.points if point.in_place_hazard]
    if hazards:
        message += (
            f" ({len(hazards)} more, such as {hazards[0]!r}, are followed by an in-place operation; pass inplace=False "
            "to that layer to use them)"
        )
    return f"{message}. {reason_for_few_points(traced)} Ask for fewer blocks."


def reason_for_few_points(traced: TracedNetwork) -> str:
    """Say in a sentence why a network has few split points."""
    reasons = []
    parameters = sum(p.numel() for p in traced.network.parameters())
    whole = [
        f"{path!r} is kept whole ({reason}); written as an nn.Sequential it might be cut inside"
        for path, reason in traced.traces[True].kept_whole.items()
        if 2 * sum(p.numel() for p in traced.network.get_submodule(path).parameters()) >= parameters
    ]
    reasons += whole[:1]
    if traced.no_batch:
        name, shape = next(iter(traced.no_batch.items()))
        reasons.append(
            f"what crosses at {name!r} and {len(traced.no_batch) - 1} other places, here of shape {shape}, does not "
            "have the batch as its first dimension"
        )
    if not reasons:
        path, reason = next(iter(traced.traces[True].kept_whole.items()), (None, None))
        if path is not None:
            reasons.append(f"{path!r} is kept whole ({reason}); written as an nn.Sequential it might be cut inside")
        else:
            reasons.append("elsewhere more than one tensor crosses")
    text = "; ".join(reasons)
    return text[0].upper() + text[1:] + "."
