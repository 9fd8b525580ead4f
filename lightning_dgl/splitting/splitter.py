"""Splitting: from a network and a number of blocks, or places to cut, to blocks that reproduce the network."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from lightning_dgl.splitting.balance import choose_points, reason_for_few_points
from lightning_dgl.splitting.blocks import build_blocks
from lightning_dgl.splitting.checking import module_that_differs
from lightning_dgl.splitting.costs import count_flops
from lightning_dgl.splitting.cut_points import SplitPoint, TracedNetwork, analyse
from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.example_batch import example_batch


@dataclass(frozen=True)
class SplitNetwork:
    """The blocks of a network, the split points between them, and each block's forward FLOPs for one sample.

    Attributes:
        traced: the network as it was traced; None if it is one block, which needs no trace.
    """

    blocks: nn.ModuleList
    points: list[SplitPoint]
    costs: list[float]
    traced: TracedNetwork | None


def split(
    network: nn.Module,
    num_blocks: int | None = None,
    *,
    split_at: Sequence[str] | None = None,
    example_input: Tensor | Sequence[int],
    balance: str = "flops",
) -> nn.ModuleList:
    """Split ``network`` into consecutive blocks that share its parameters and together compute what it computes.

    Running the blocks one after another equals running the network, bit for bit, in train and eval mode.

    Args:
        network: a feed-forward network that takes one tensor.
        num_blocks: how many blocks to make; the cuts are chosen so that the largest block costs least.
        split_at: instead of ``num_blocks``: names of the split points to cut after, in forward order.
        example_input: a batch of the shape the network is trained on, on the network's device, or that shape.
        balance: the cost of a block: "flops" (forward FLOPs, the same on every machine), "memory" (bytes held for
            backward; least memory on one device) or "time" (forward and backward of the example batch, measured here;
            give it the batch size that you train with).

    Returns:
        The blocks. ``block.parameters()`` are the network's own parameter objects.

    Raises:
        SplitError: if the network cannot be split like this; the message names the reason and the remedy.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> blocks = split(net, split_at=["1"], example_input=torch.zeros(2, 3, 8, 8))
        >>> blocks[0](torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 8, 6, 6])
        >>> blocks[1].get_parameter("3.weight") is net[3].weight
        True
    """
    return split_network(network, num_blocks, split_at, example_input, balance).blocks


def split_network(
    network: nn.Module,
    num_blocks: int | None,
    split_at: Sequence[str] | None,
    example_input: Tensor | Sequence[int],
    balance: str = "flops",
    make_head: Callable[[TracedNetwork, SplitPoint], nn.Module] | None = None,
) -> SplitNetwork:
    """:func:`split`, with the auxiliary heads that ``make_head`` makes counted in when blocks are balanced."""
    if (num_blocks is None) == (split_at is None):
        raise SplitError(
            f"Pass exactly one of num_blocks and split_at, got num_blocks={num_blocks!r} and split_at={split_at!r}."
        )
    if num_blocks is not None and (not isinstance(num_blocks, int) or num_blocks < 1):
        raise SplitError(f"num_blocks must be a whole number of at least 1, got {num_blocks!r}.")
    example_input = example_batch(network, example_input)
    if num_blocks == 1 or (split_at is not None and len(split_at) == 0):
        return SplitNetwork(nn.ModuleList([network]), [], [count_flops(network, example_input)], None)
    whole: set[str] = set()
    while True:
        traced = analyse(network, example_input, whole)
        if split_at is not None:
            points = _points_named(traced, split_at)
        else:
            assert num_blocks is not None
            points = choose_points(traced, num_blocks, balance, make_head and partial(make_head, traced))
        culprit = module_that_differs(traced, points)
        if culprit is None:
            break
        if culprit == "" or culprit in whole:
            raise SplitError(
                f"The blocks do not reproduce {type(network).__name__}: the forward of "
                f"{type(network.get_submodule(culprit)).__name__} depends on something that tracing does not see, such "
                "as the batch size or state kept outside buffers. Move that part into a separate submodule, or pass "
                "the network as an nn.Sequential."
            )
        whole.add(culprit)
    blocks = build_blocks(traced, points)
    ends = [*(point.cost for point in points), traced.cost]
    costs = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
    if split_at is None:
        _warn_if_lopsided(traced, points, costs)
    return SplitNetwork(blocks, points, costs, traced)


def _warn_if_lopsided(traced: TracedNetwork, points: list[SplitPoint], costs: list[float]) -> None:
    """Warn if one block does nearly all the work, and say why."""
    shares = [cost / sum(costs) for cost in costs]
    if max(shares) < 0.85:
        return
    largest = shares.index(max(shares))
    first, last = (
        (points[largest - 1].name if largest else "the input"),
        (points[largest].name if largest < len(points) else "the output"),
    )
    warnings.warn(
        f"Block {largest} of {type(traced.network).__name__} (from {first} to {last}) does {max(shares):.0%} of the "
        f"FLOPs; the blocks have {', '.join(f'{share:.0%}' for share in shares)}. {reason_for_few_points(traced)} "
        "Training it in blocks gains little.",
        stacklevel=4,
    )


def _points_named(traced: TracedNetwork, split_at: Sequence[str]) -> list[SplitPoint]:
    if isinstance(split_at, str):
        raise SplitError(f"split_at must be a list of names, got the string {split_at!r}. Write [{split_at!r}].")
    by_name = {name: point for point in traced.points for name in (point.name, *point.aliases)}
    points: list[SplitPoint] = []
    for name in split_at:
        if name not in by_name:
            raise SplitError(_unknown_name(traced, name, list(by_name)))
        point = by_name[name]
        if point.in_place_hazard:
            raise SplitError(
                f"split_at names {name!r}, but an operation after it works in place on its output and would corrupt "
                "what the auxiliary head reads. Cut after that operation instead, or give it inplace=False."
            )
        if points and point is points[-1]:
            raise SplitError(f"split_at names the same place twice: {name!r}. Name each cut once.")
        if points and traced.points.index(point) < traced.points.index(points[-1]):
            raise SplitError(
                f"split_at is out of order: {name!r} comes before {points[-1].name!r} in the forward. List the names "
                "in forward order."
            )
        points.append(point)
    return points


def _unknown_name(traced: TracedNetwork, name: str, known: list[str]) -> str:
    message = f"split_at names {name!r}, which is not a split point of {type(traced.network).__name__}"
    calls = [other for other in known if other.rpartition("@")[0] == name]
    if calls:
        return f"{message}, because the module is called more than once. Say after which call: {', '.join(calls)}."
    if name in traced.no_batch:
        return (
            f"{message}: what crosses there, of shape {traced.no_batch[name]} for {len(traced.example_input)} samples, "
            "does not have the batch as its first dimension. Cut elsewhere, or have it there (batch_first=True)."
        )
    whole = traced.traces[True].kept_whole
    inside = next((path for path in whole if str(name).startswith(f"{path}.")), None)
    if inside is not None:
        message += f": {inside!r} is kept whole ({whole[inside]})"
    elif name in dict(traced.network.named_modules()):
        message += ": the module exists, but more than its one output is needed after it (or it is the last one)"
    close = difflib.get_close_matches(str(name), known, n=3) or known[:3]
    return f"{message}. Names near it: {', '.join(close)}; find_split_points(network, example_input) lists all."
