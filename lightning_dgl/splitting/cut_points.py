"""Where a network can be cut: the places in its forward where exactly one tensor crosses.

They are found in three steps: trace the network (once, or once for each mode), run the traced operations without data
to see shapes, costs and in-place changes, and look for the places after which one value alone is alive (drawn in
``trace.py``). Then each place is judged: how natural a cut it is, and which dimension of its tensor holds channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_dgl.splitting.example_batch import example_batch
from lightning_dgl.splitting.meta_twin import dry_run
from lightning_dgl.splitting.trace import ModuleCall, Trace, run_node
from lightning_dgl.splitting.tracer import trace


@dataclass(frozen=True)
class SplitPoint:
    """A place after which a network can be cut, because one tensor is all that crosses it.

    Attributes:
        name: the module (as in ``network.named_modules()``) or the operation whose output crosses. A module that is
            called several times is named ``name@1``, ``name@2``, ... in call order.
        aliases: other names of the same place (inner modules that end there too); ``split_at`` takes them as well.
        shape: shape of the crossing tensor for the example batch, batch dimension first.
        channel_dim: which dimension of it holds the channels (1 for NCHW, -1 for NHWC and token sequences).
        rank: how natural the place is. 0: end of a composite module such as a residual block; 1: output of an
            activation; 2: pooling, normalisation, other operations; 3: a bare convolution or linear layer; one more
            strictly inside a composite module whose class occurs at least twice.
        cost: forward FLOPs from the input up to here, for one sample.
        in_place_hazard: True if an operation after this place overwrites the tensor that crosses it. Cutting here
            would corrupt what the auxiliary head reads, so :func:`split` refuses to.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    channel_dim: int
    rank: int
    cost: float
    in_place_hazard: bool

    @property
    def channels(self) -> int:
        """Number of channels C of the crossing tensor."""
        return self.shape[self.channel_dim]

    @property
    def spatial_size(self) -> int | tuple[int, int]:
        """Height and width of the crossing tensor as (N, C, H, W): one number where they are equal, else a pair.

        A sequence of L tokens counts as (L, 1), a plain feature vector as 1.
        """
        height, width = self.as_images(torch.empty(self.shape, device="meta")).shape[2:]
        return height if height == width else (height, width)

    def as_images(self, x: Tensor) -> Tensor:
        """View a crossing tensor ``x`` of any layout as (N, C, H, W), which auxiliary heads read."""
        x = x.movedim(self.channel_dim, 1)
        if x.ndim > 4:
            return x.flatten(2, -2)
        return x.reshape(*x.shape, *(1,) * (4 - x.ndim))

    def from_images(self, images: Tensor) -> Tensor:
        """Undo :meth:`as_images`; height and width of (N, C, H, W) may have changed."""
        ndim = len(self.shape)
        if ndim > 4:
            outer = torch.empty(self.shape, device="meta").movedim(self.channel_dim, 1).shape[2:-1]
            images = images.reshape(*images.shape[:2], *outer, images.shape[-1])
        elif ndim < 4:
            images = images.flatten(ndim - 1)
        return images.movedim(1, self.channel_dim)


@dataclass(frozen=True)
class Cut:
    """A split point in one trace: after operation number ``position``, ``node`` alone is still needed."""

    node: fx.Node
    position: int


@dataclass(frozen=True)
class TracedNetwork:
    """A network, its traces by mode (True: train), and every place where it can be cut.

    Attributes:
        points: the places that exist in both modes, in forward order.
        cuts: where each point is in the trace of each mode, by the point's name.
        tied: names of the points that have the same parameter or buffer on both sides.
        cost: forward FLOPs of the whole network, for one sample.
    """

    network: nn.Module
    example_input: Tensor
    traces: dict[bool, Trace]
    points: list[SplitPoint]
    cuts: dict[bool, dict[str, Cut]]
    tied: set[str]
    cost: float

    @property
    def usable(self) -> list[SplitPoint]:
        """The points where cutting corrupts nothing and separates no weights from themselves."""
        return [point for point in self.points if not point.in_place_hazard and point.name not in self.tied]


def find_split_points(network: nn.Module, example_input: Tensor | Sequence[int]) -> list[SplitPoint]:
    """List every place after which ``network`` can be cut, in forward order.

    Args:
        network: a feed-forward network that takes one tensor. It is not changed.
        example_input: a batch of the shape the network is trained on, on the network's device, or that shape.

    Raises:
        SplitError: if the network's own ``forward`` cannot be traced, or the example does not pass through it.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
        >>> [(point.name, point.shape, point.rank) for point in find_split_points(net, torch.zeros(2, 3, 8, 8))]
        [('0', (2, 8, 6, 6), 3), ('1', (2, 8, 6, 6), 1), ('2', (2, 288), 2)]
    """
    points = analyse(network, example_input).points
    num_samples = len(example_input) if isinstance(example_input, Tensor) else example_input[0]
    return [replace(point, shape=(num_samples, *point.shape[1:])) for point in points]


def analyse(network: nn.Module, example_input: Tensor | Sequence[int]) -> TracedNetwork:
    """Trace ``network`` in both modes and find the places where it can be cut in both."""
    example_input = example_batch(network, example_input)
    traces = trace(network, example_input)
    runs = {mode: dry_run(network, example_input, mode, partial(_run, traces[mode])) for mode in (True, False)}
    cuts = {mode: _find_cuts(network, traces[mode], runs[mode]) for mode in (True, False)}
    points = []
    for names, cut in cuts[True]:
        # Blocks switch between the modes, so their borders must be the same places in both.
        same = [other for other_names, other in cuts[False] if other_names == names]
        if not same or runs[True].shapes[cut.node] != runs[False].shapes[same[0].node]:
            continue
        points.append(
            SplitPoint(
                name=names[0],
                aliases=tuple(names[1:]),
                shape=runs[True].shapes[cut.node],
                channel_dim=_channel_dim(network, cut.node, runs[True].shapes),
                rank=_rank(network, traces[True], cut),
                cost=runs[True].flops[cut.position] / example_input.shape[0],
                in_place_hazard=cut.position in runs[True].overwritten or same[0].position in runs[False].overwritten,
            )
        )
    return TracedNetwork(
        network=network,
        example_input=example_input,
        traces=traces,
        points=points,
        cuts={mode: {names[0]: cut for names, cut in cuts[mode]} for mode in (True, False)},
        tied=_tied(network, traces[True], cuts[True]) | _tied(network, traces[False], cuts[False]),
        cost=runs[True].flops[-1] / example_input.shape[0],
    )


# Running the traced operations


@dataclass
class _Run:
    """The findings of one dry run of a trace's operations."""

    shapes: dict[fx.Node, tuple[int, ...]]  # of every node that is a tensor
    flops: list[int]  # forward FLOPs up to and including each operation
    overwritten: set[int]  # positions after which something changes the one tensor that crosses, in place


def _run(trace: Trace, network: nn.Module, example_input: Tensor) -> _Run:
    values: dict[fx.Node, Any] = {}
    flops: list[int] = []
    versions: dict[int, int] = {}
    crossing = _single_crossings(trace)
    with FlopCounterMode(display=False) as counter:
        for node in trace.graph.nodes:
            values[node] = example_input if node.op == "placeholder" else run_node(network, node, values)
            if node not in trace.order:
                continue
            position = trace.order[node]
            flops.append(counter.get_total_flops())
            # PyTorch counts in-place changes of a tensor, those through views included. Only later ones do harm.
            if isinstance(values.get(crossing.get(position)), Tensor):  # type: ignore[arg-type]
                versions[position] = values[crossing[position]]._version
    return _Run(
        shapes={node: tuple(value.shape) for node, value in values.items() if isinstance(value, Tensor)},
        flops=flops,
        overwritten={i for i, version in versions.items() if values[crossing[i]]._version > version},
    )


# Finding the cuts


def _single_crossings(trace: Trace) -> dict[int, fx.Node]:
    """Map each position after which exactly one value is alive to that value's node.

    A value is alive from the operation that makes it to the last one that reads it. The network's output counts as
    read at the end. Parameters and buffers do not count: every block can read them.
    """
    ops, order, end = trace.operations, trace.order, len(trace.operations)
    placeholder = next(iter(trace.graph.nodes))
    # A node without number is the graph's output, which comes last.
    last_use = {node: max((order.get(user, end) for user in node.users), default=-1) for node in (placeholder, *ops)}
    crossings = {}
    alive = {placeholder}
    for position, node in enumerate(ops):
        alive = {other for other in (*alive, node) if last_use[other] > position}
        if len(alive) == 1 and placeholder not in alive:
            crossings[position] = next(iter(alive))
    crossings.pop(end - 1, None)  # the network's output is not a cut
    return crossings


def _find_cuts(network: nn.Module, trace: Trace, run: _Run) -> list[tuple[list[str], Cut]]:
    """Return every cut with its names, outermost module first, in forward order."""
    positions: dict[fx.Node, list[int]] = {}
    for position, node in _single_crossings(trace).items():
        if node in run.shapes and len(run.shapes[node]) >= 2:  # a tensor with samples and channels
            positions.setdefault(node, []).append(position)

    # The same value may cross alone at several positions: operations in between, such as an assertion about its
    # shape, make nothing that is read later. Prefer a position after which it is not overwritten, then one outside of
    # modules, which blocks can then call whole; among equals, the first.
    def preference(position: int) -> tuple[bool, int, int]:
        depth = sum(start <= position < stop for _, start, stop in trace.spans)
        return position in run.overwritten, depth, position

    names = _names(trace)
    return [(names[node], Cut(node, min(choices, key=preference))) for node, choices in positions.items()]


def _tied(network: nn.Module, trace: Trace, cuts: list[tuple[list[str], Cut]]) -> set[str]:
    """Return names of the cuts that have the same parameter, or the same module with buffers, on both sides."""
    uses: dict[int, list[int]] = {}
    for position, node in enumerate(trace.operations):
        tensors: list[Tensor] = []
        if node.op == "call_module":
            module = network.get_submodule(str(node.target))
            tensors += [*module.parameters(), *module.buffers()]
        read = [run_node(network, source, {}) for source in node.all_input_nodes if source.op == "get_attr"]
        tensors += [tensor for tensor in read if isinstance(tensor, nn.Parameter)]
        for tensor in tensors:
            uses.setdefault(id(tensor), []).append(position)
    spans = [(positions[0], positions[-1]) for positions in uses.values()]
    return {names[0] for names, cut in cuts if any(first <= cut.position < last for first, last in spans)}


def _names(trace: Trace) -> dict[fx.Node, list[str]]:
    """Name each node after the modules that returned it, outermost first, else after its operation."""
    total = Counter(path for path, _ in trace.returns)
    seen: Counter[str] = Counter()
    names: dict[fx.Node, list[str]] = {}
    for path, node in trace.returns:  # inner calls come first
        seen[path] += 1
        names.setdefault(node, []).insert(0, path if total[path] == 1 else f"{path}@{seen[path]}")

    def name_operations(call: ModuleCall) -> None:
        for item in call.items:
            if isinstance(item, ModuleCall):
                name_operations(item)
            elif item not in names:
                names[item] = [f"{call.path}.{item.name}" if call.path else item.name]

    name_operations(trace.root)
    return names


# Judging the cuts

_ACTIVATIONS = {
    *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "prelu", "relu", "relu6"),
    *("rrelu", "selu", "sigmoid", "silu", "softplus", "swish", "tanh", "threshold"),
}
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)


def is_composite(module: nn.Module) -> bool:
    """Return whether ``module`` has children and does more than call them one after another."""
    return next(module.children(), None) is not None and type(module).forward is not nn.Sequential.forward


def _rank(network: nn.Module, trace: Trace, cut: Cut) -> int:
    """Return the rank that :class:`SplitPoint` describes."""
    returned_by = [network.get_submodule(path) for path, node in trace.returns if node is cut.node]
    rank = 0 if any(is_composite(module) for module in returned_by) else _operation_rank(network, cut.node)
    # Inside a module of a repeated class, such as a residual block, a cut takes apart what the author made one piece.
    classes = Counter(type(network.get_submodule(path)) for path, _, _ in trace.spans)
    inside = [network.get_submodule(path) for path, start, stop in trace.spans if start <= cut.position < stop]
    return rank + any(is_composite(module) and classes[type(module)] > 1 for module in inside)


def _operation_rank(network: nn.Module, node: fx.Node) -> int:
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            return 3
        return 1 if type(module).__name__.lower() in _ACTIVATIONS else 2
    name = _operation(node)
    if name.startswith("conv") or name == "linear":
        return 3
    return 1 if name.rstrip("_") in _ACTIVATIONS else 2


def _channel_dim(network: nn.Module, node: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]) -> int:
    """Return which dimension of ``node`` holds the channels, going by the layers around it, else by its shape.

    Walk from ``node`` to the operations that read it, through those that keep its shape (activations, sums), until a
    layer tells by its kind: a convolution has channels at 1, a linear layer at -1. If none does, walk the other way.
    """
    shape = shapes[node]
    if len(shape) == 2:
        return 1
    for forwards in (True, False):
        seen, queue = {node}, [node]
        while queue:
            here = queue.pop(0)
            for other in here.users if forwards else here.all_input_nodes:
                kind = _layout(network, other)
                if kind is not None and shapes.get(other, ())[:1] == shape[:1]:
                    return kind
                moves = _operation(other) in _MOVES_DIMS
                if shapes.get(other) == shape and other not in seen and kind is None and not moves:
                    seen.add(other)
                    queue.append(other)
    # No layer tells. Images are square more often than not: (N, H, H, C) is channels last.
    if len(shape) == 4 and not (shape[1] == shape[2] != shape[3]):
        return 1
    return -1


def _layout(network: nn.Module, node: fx.Node) -> int | None:
    """Return the dimension at which the layer ``node`` has channels, None if any would do."""
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if isinstance(module, _CHANNELS_FIRST):
            return 1
        if isinstance(module, _CHANNELS_LAST):
            return -1
    elif _operation(node) in ("conv1d", "conv2d", "conv3d", "batch_norm", "group_norm", "instance_norm"):
        return 1
    elif _operation(node) in ("linear", "layer_norm", "scaled_dot_product_attention"):
        return -1
    return None


_MOVES_DIMS = ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "flatten", "reshape", "view")


def _operation(node: fx.Node) -> str:
    """Return the name of the function or method that ``node`` calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
