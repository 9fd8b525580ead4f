"""Choosing cuts so that the most expensive block is as cheap as possible."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_dgl.splitting.cut_points import SplitPoint, TracedNetwork, operations
from lightning_dgl.splitting.dry_run import FakeRun, in_mode, preserved_state
from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.trace import run_node

HeadFactory = Callable[[SplitPoint], nn.Module]
"""Makes the auxiliary head for a block that ends at a split point."""

# Cuts at natural places (low rank) are taken as long as the largest block grows by no more than this.
_TOLERANCE = 1.1


def balanced_cuts(
    ranks: Sequence[int], costs: Sequence[float], head_costs: Sequence[float], num_blocks: int
) -> list[int]:
    """Choose ``num_blocks - 1`` of the split points, so that the largest block costs least.

    Args:
        ranks: rank of each split point.
        costs: cost of the network up to each split point, and last of the whole network; non-decreasing.
        head_costs: cost of the auxiliary head at each split point.
        num_blocks: how many blocks to make, at most ``len(ranks) + 1``.

    Returns:
        Indices of the chosen split points, ascending. Split points of higher rank are used only where that makes the
        largest block at least 10 % cheaper; among equals, the cuts of lowest rank, then the most even blocks.

    Example::

        >>> balanced_cuts(ranks=[1, 1, 1], costs=[1, 2, 3, 4], head_costs=[0, 0, 0], num_blocks=2)
        [1]
    """
    allowed = list(range(len(ranks)))
    bound = _smallest_bound(allowed, costs, head_costs, num_blocks)
    for rank in sorted(set(ranks)):
        natural = [i for i in allowed if ranks[i] <= rank]
        if len(natural) >= num_blocks - 1:
            natural_bound = _smallest_bound(natural, costs, head_costs, num_blocks)
            if natural_bound <= _TOLERANCE * bound:
                return _best_within(natural_bound, natural, ranks, costs, head_costs, num_blocks)
    raise AssertionError("the highest rank allows every split point")


def _block_costs(
    allowed: Sequence[int], costs: Sequence[float], head_costs: Sequence[float]
) -> Callable[[int, int], float]:
    """Cost of the block between the allowed split points number ``i`` and ``j`` (-1: input, len: output)."""

    def cost(i: int, j: int) -> float:
        start = costs[allowed[i]] if i >= 0 else 0.0
        if j == len(allowed):
            return costs[-1] - start
        return costs[allowed[j]] - start + head_costs[allowed[j]]

    return cost


def _smallest_bound(
    allowed: Sequence[int], costs: Sequence[float], head_costs: Sequence[float], num_blocks: int
) -> float:
    """The smallest possible cost of the largest of ``num_blocks`` blocks."""
    cost, end = _block_costs(allowed, costs, head_costs), len(allowed)
    best = {j: cost(-1, j) for j in range(end + 1)}
    for _ in range(num_blocks - 1):
        best = {
            j: min((max(best[i], cost(i, j)) for i in range(j) if i in best), default=math.inf) for j in range(end + 1)
        }
    return best[end]


def _best_within(
    bound: float,
    allowed: Sequence[int],
    ranks: Sequence[int],
    costs: Sequence[float],
    head_costs: Sequence[float],
    num_blocks: int,
) -> list[int]:
    """The cuts of least total rank, then of least sum of squares, among those with no block above ``bound``."""
    cost, end = _block_costs(allowed, costs, head_costs), len(allowed)
    limit = bound * (1 + 1e-9)

    def step(i: int, j: int) -> tuple[int, float]:
        return (ranks[allowed[j]] if j < end else 0, cost(i, j) ** 2)

    Best = dict[int, tuple[int, float, list[int]]]
    best: Best = {j: (*step(-1, j), []) for j in range(end + 1) if cost(-1, j) <= limit}
    for _ in range(num_blocks - 1):
        longer: Best = {}
        for j in range(end + 1):
            for i in range(j):
                if i in best and cost(i, j) <= limit:
                    rank, squares = step(i, j)
                    option = (best[i][0] + rank, best[i][1] + squares, [*best[i][2], allowed[i]])
                    if j not in longer or option < longer[j]:
                        longer[j] = option
        best = longer
    return best[end][2]


# Costs


def count_flops(module: nn.Module, example_input: Tensor) -> float:
    """Forward FLOPs of ``module`` for one sample of ``example_input``; nothing is computed."""
    fake = FakeRun(module)
    with in_mode(module, True), fake.active(), FlopCounterMode(display=False) as counter:
        module(fake.fake(example_input))
    return counter.get_total_flops() / example_input.shape[0]


def measure_segments(traced: TracedNetwork, repeats: int = 5) -> list[float]:
    """Seconds of forward and backward up to each usable split point, and last of the whole network.

    Each stretch between two neighbouring split points is run by itself on the example batch in train mode, as a block
    of its own would be; the median of ``repeats`` runs counts.
    """
    network, trace = traced.network, traced.traces[True]
    boundaries = [traced.cuts[True][point.name] for point in traced.usable]
    stops = [cut.position for cut in boundaries] + [len(operations(trace)) - 1]
    attributes = [node for node in trace.graph.nodes if node.op == "get_attr"]
    placeholder, output = next(iter(trace.graph.nodes)), next(iter(reversed(trace.graph.nodes)))
    seconds = []
    with preserved_state(network), in_mode(network, True), torch.enable_grad():
        start, source, tensor = 0, placeholder, traced.example_input
        for i, stop in enumerate(stops):
            nodes = operations(trace)[start : stop + 1]
            target = boundaries[i].node if i < len(boundaries) else output.args[0]
            runs = []
            for _ in range(repeats + 1):
                values: dict[fx.Node, Any] = {node: run_node(network, node, {}) for node in attributes}
                began = _now(tensor)
                # Detached, as a block's input is.
                values[source] = tensor.detach().clone()
                for node in nodes:
                    values[node] = run_node(network, node, values)
                outputs = [t for t in tree_leaves(fx.map_arg(target, values.__getitem__)) if t.requires_grad]
                if outputs:
                    total = torch.stack([t.float().sum() for t in outputs]).sum()
                    torch.autograd.grad(total, _parameters(network), allow_unused=True)
                runs.append(_now(tensor) - began)
            seconds.append(statistics.median(runs[1:]))
            if i < len(boundaries):
                start, source, tensor = stop + 1, boundaries[i].node, values[boundaries[i].node].detach()
    return [sum(seconds[: i + 1]) for i in range(len(seconds))]


def measure_head(head: nn.Module, example_input: Tensor, repeats: int = 5) -> float:
    """Seconds of one forward and backward of ``head`` in train mode; median of ``repeats``."""
    runs = []
    with preserved_state(head), in_mode(head, True), torch.enable_grad():
        for _ in range(repeats + 1):
            began = _now(example_input)
            scores = head(example_input.clone().requires_grad_())
            torch.autograd.grad(scores.sum(), _parameters(head), allow_unused=True)
            runs.append(_now(example_input) - began)
    return statistics.median(runs[1:])


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _now(tensor: Tensor) -> float:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    elif tensor.device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def choose_points(
    traced: TracedNetwork, num_blocks: int, balance: str, make_head: HeadFactory | None
) -> list[SplitPoint]:
    """The usable split points that make ``num_blocks`` balanced blocks, auxiliary heads counted in."""
    if balance not in ("flops", "time"):
        raise SplitError(f'balance must be "flops" or "time", got {balance!r}.')
    points = traced.usable
    if num_blocks > len(points) + 1:
        raise SplitError(_too_many_blocks(traced, num_blocks))
    by_time = balance == "time"
    costs = measure_segments(traced) if by_time else [*(point.cost for point in points), traced.cost]
    head_costs = _head_costs(points, traced.example_input, by_time, make_head)
    return [points[i] for i in balanced_cuts([point.rank for point in points], costs, head_costs, num_blocks)]


def _head_costs(
    points: Sequence[SplitPoint], example_input: Tensor, by_time: bool, make_head: HeadFactory | None
) -> list[float]:
    if make_head is None:
        return [0.0] * len(points)
    known: dict[Any, float] = {}
    for point in points:
        key = (point.channels, point.spatial_size)
        if key not in known:
            size = point.spatial_size if isinstance(point.spatial_size, tuple) else (point.spatial_size,) * 2
            with torch.random.fork_rng(devices=[]):
                if by_time:
                    head = make_head(point).to(example_input.device)
                    features = torch.randn(max(2, example_input.shape[0]), point.channels, *size)
                    known[key] = measure_head(head, features.to(example_input.device))
                else:
                    known[key] = head_flops(point, make_head)
    return [known[point.channels, point.spatial_size] for point in points]


def head_flops(point: SplitPoint, make_head: HeadFactory) -> float:
    """Forward FLOPs of the head at ``point`` for one sample; the head is made without its weights being set."""
    size = point.spatial_size if isinstance(point.spatial_size, tuple) else (point.spatial_size,) * 2
    try:
        with torch.device("meta"):
            head = make_head(point)
            features = torch.empty(2, point.channels, *size)
        with FlopCounterMode(display=False) as counter:
            head(features)
        return counter.get_total_flops() / 2
    except NotImplementedError:  # a head of the user's own that cannot be made without weights
        return count_flops(make_head(point), torch.zeros(2, point.channels, *size))


def _too_many_blocks(traced: TracedNetwork, num_blocks: int) -> str:
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
    whole = traced.traces[True].kept_whole
    if whole:
        path, reason = next(iter(whole.items()))
        message += f". {path!r} cannot be cut inside because it {reason}"
    return message + ". Ask for fewer blocks, or write the network as an nn.Sequential."
