"""Where a network can be cut: the places in its forward where exactly one tensor crosses.

They are found in three steps: trace the network (once, or once for each mode), run the traced operations without data
to see shapes, costs and in-place changes, and look for the places after which one value alone is alive (drawn in
``trace.py``). Then each place is judged: how natural a cut it is, and which dimension of its tensor holds channels.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.example_batch import example_batch
from lightning_dgl.splitting.judging import channel_dim_of, rank_of
from lightning_dgl.splitting.meta_twin import dry_run, output_shape
from lightning_dgl.splitting.sizes import is_static, recipe
from lightning_dgl.splitting.trace import ModuleCall, Trace, run_node
from lightning_dgl.splitting.tracer import trace, trace_in_mode


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
    """A split point in one trace: after operation number ``position``, ``node`` alone is still needed.

    Attributes:
        sizes: what else is still needed, but no tensor, and how a block makes it again (see ``sizes.recipe``).
    """

    node: fx.Node
    position: int
    sizes: dict[fx.Node, Any]


@dataclass(frozen=True)
class TracedNetwork:
    """A network, its traces by mode (True: train), and every place where it can be cut.

    Attributes:
        points: the places that exist in both modes, in forward order.
        cuts: where each point is in the trace of each mode, by the point's name.
        tied: names of the points that have the same parameter or buffer on both sides.
        no_batch: places where one tensor crosses that does not have the batch as its first dimension, and its shape.
        cost: forward FLOPs of the whole network, for one sample.
    """

    network: nn.Module
    example_input: Tensor
    traces: dict[bool, Trace]
    points: list[SplitPoint]
    cuts: dict[bool, dict[str, Cut]]
    tied: set[str]
    no_batch: dict[str, tuple[int, ...]]
    cost: float

    @property
    def usable(self) -> list[SplitPoint]:
        """The points where cutting corrupts nothing and separates no weights from themselves."""
        return [point for point in self.points if not point.in_place_hazard and point.name not in self.tied]

    def parameters_upto(self, trainable: bool) -> list[int]:
        """Count the parameters that are used up to each usable point, and last in all."""
        counted = {id(parameter) for parameter in self.network.parameters() if parameter.requires_grad or not trainable}
        uses = _uses(self.network, self.traces[True])
        first = sorted(positions[0] for tensor, positions in uses.items() if tensor in counted)
        positions = [self.cuts[True][point.name].position for point in self.usable]
        return [bisect.bisect_right(first, position) for position in positions] + [len(first)]


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


def analyse(network: nn.Module, example_input: Tensor | Sequence[int], whole: Collection[str] = ()) -> TracedNetwork:
    """Trace ``network`` in both modes and find the places where it can be cut in both.

    Args:
        whole: paths of modules that must not be cut inside.
    """
    example_input = example_batch(network, example_input)
    traces, runs = _traces_that_run(network, example_input, whole)
    cuts = {mode: _find_cuts(network, traces[mode], runs[mode]) for mode in (True, False)}
    points, no_batch = [], {}
    for names, cut in cuts[True]:
        # Blocks switch between the modes, so their borders must be the same places in both.
        aliases, other = next(((others, c) for others, c in cuts[False] if others[0] == names[0]), ([], None))
        if other is None or runs[True].shapes[cut.node] != runs[False].shapes[other.node]:
            continue
        if not runs[True].batch_first(cut.node):
            no_batch.update(dict.fromkeys(names, runs[True].shapes[cut.node]))
            continue
        points.append(
            SplitPoint(
                name=names[0],
                aliases=tuple(name for name in names[1:] if name in aliases),
                shape=runs[True].shapes[cut.node],
                channel_dim=channel_dim_of(network, cut.node, runs[True].shapes),
                rank=rank_of(network, traces[True], cut.node, cut.position),
                cost=runs[True].flops[cut.position] / example_input.shape[0],
                in_place_hazard=cut.position in runs[True].overwritten or other.position in runs[False].overwritten,
            )
        )
    return TracedNetwork(
        network=network,
        example_input=example_input,
        traces=traces,
        points=points,
        cuts={mode: {names[0]: cut for names, cut in cuts[mode]} for mode in (True, False)},
        tied=_tied(network, traces[True], cuts[True]) | _tied(network, traces[False], cuts[False]),
        no_batch=no_batch,
        cost=runs[True].flops[-1] / example_input.shape[0],
    )


def cuts_named(network: nn.Module, example_input: Tensor, names: Sequence[str]) -> tuple[Trace, list[Cut]]:
    """Trace ``network`` with its present settings and the present mode of each module; return the cuts of these names.

    Raises:
        SplitError: if one of them is not there.
    """
    modes = {path: module.training for path, module in network.named_modules()}
    traced = trace_in_mode(network, example_input, modes)
    run = _runs(network, example_input, {True: traced, False: traced})[network.training]
    found = {other: cut for others, cut in _find_cuts(network, traced, run) for other in others}
    for name in names:
        if name not in found or found[name].position in run.overwritten or not run.batch_first(found[name].node):
            whole = next((p for p in traced.kept_whole if name.startswith(f"{p}.")), None)
            reason = f" ({whole!r} is kept whole: {traced.kept_whole[whole]})" if whole is not None else ""
            raise SplitError(f"there is no cut after {name!r} now{reason}. Undo that, or split again.")
    return traced, [found[name] for name in names]


# Running the traced operations


@dataclass
class _Run:
    """The findings of one dry run of a trace's operations, and of another with one sample more."""

    shapes: dict[fx.Node, tuple[int, ...]]  # of every node that is a tensor
    flops: list[int]  # forward FLOPs up to and including each operation
    overwritten: set[int]  # positions after which something changes the one tensor that crosses, in place
    sizes: dict[fx.Node, Any]  # values of the nodes that are no tensors
    larger: tuple[dict[fx.Node, tuple[int, ...]], dict[fx.Node, Any]]  # shapes and sizes for one sample more

    def batch_first(self, node: fx.Node) -> bool:
        """Return whether the first dimension of ``node`` is the batch, and no other one grows with it."""
        shape, larger = self.shapes[node], self.larger[0].get(node)
        return larger == (shape[0] + 1, *shape[1:])

    def recipe(self, node: fx.Node) -> Any:
        """Say how to make the size ``node`` again in a later block, None if there is no way."""
        if node not in self.sizes or node not in self.larger[1]:
            return None
        return recipe(self.sizes[node], self.larger[1][node], self.batches)

    @property
    def batches(self) -> tuple[int, int]:
        n = next(iter(self.shapes.values()))[0]  # of the input
        return n, n + 1


class _RunError(Exception):
    """A traced operation failed; ``path`` is the innermost module that holds it and was traced into."""

    def __init__(self, path: str, reason: Exception) -> None:
        super().__init__(f"{type(reason).__name__}: {reason}")
        self.path = path


def _traces_that_run(
    network: nn.Module, example_input: Tensor, whole: Collection[str]
) -> tuple[dict[bool, Trace], dict[bool, _Run]]:
    """Trace the network and run the traces; keep modules whole in whose traces an operation fails."""
    while True:
        traces = trace(network, example_input, whole)
        try:
            return traces, _runs(network, example_input, traces)
        except SplitError as error:
            cause = error.__cause__
            if not isinstance(cause, _RunError):
                raise
            output_shape(network, example_input, True)  # raises if the network itself fails
            if cause.path == "":
                raise SplitError(
                    f"{type(network).__name__} cannot be traced into blocks: an operation of its forward fails in the "
                    f"trace ({cause}). Move the part that cannot be traced into a submodule."
                ) from error
            whole = {*whole, cause.path}


def _runs(network: nn.Module, example_input: Tensor, traces: dict[bool, Trace]) -> dict[bool, _Run]:
    larger = torch.cat([example_input, example_input[:1]])

    def run(mode: bool, batch: Tensor) -> _Run:
        return dry_run(network, batch, mode, partial(_run, traces[mode], mode and batch is example_input))

    train, eval_larger = run(True, example_input), run(False, larger)
    if traces[True] is traces[False]:
        train.larger = eval_larger.shapes, eval_larger.sizes
        return {True: train, False: replace(train, overwritten=eval_larger.overwritten)}
    train_larger, evaluation = run(True, larger), run(False, example_input)
    train.larger = train_larger.shapes, train_larger.sizes
    evaluation.larger = eval_larger.shapes, eval_larger.sizes
    return {True: train, False: evaluation}


def _run(trace: Trace, count: bool, network: nn.Module, example_input: Tensor) -> _Run:
    values: dict[fx.Node, Any] = {}
    flops: list[int] = []
    versions: dict[int, int] = {}
    crossing = {position: node for position, (node, _) in _single_crossings(trace).items()}
    counter = FlopCounterMode(display=False)
    with counter if count else nullcontext():
        for node in trace.graph.nodes:
            values[node] = _run_in_trace(trace, network, node, values, example_input)
            if node not in trace.order:
                continue
            position = trace.order[node]
            flops.append(counter.get_total_flops() if count else 0)
            # PyTorch counts in-place changes of a tensor, those through views included. Only later ones do harm.
            if isinstance(values.get(crossing.get(position)), Tensor):  # type: ignore[arg-type]
                versions[position] = values[crossing[position]]._version
    overwritten = {i for i, version in versions.items() if values[crossing[i]]._version > version}
    shapes = {node: tuple(value.shape) for node, value in values.items() if isinstance(value, Tensor)}
    sizes = {node: value for node, value in values.items() if node not in shapes}
    return _Run(shapes, flops, overwritten, sizes, larger=({}, {}))


def _run_in_trace(trace: Trace, network: nn.Module, node: fx.Node, values: dict[fx.Node, Any], x: Tensor) -> Any:
    if node.op == "placeholder":
        return x
    try:
        return run_node(network, node, values)
    except Exception as error:
        raise _RunError(trace.path_of(node), error) from error


# Finding the cuts


def _single_crossings(trace: Trace) -> dict[int, tuple[fx.Node, list[fx.Node]]]:
    """Map each position after which exactly one tensor is alive to its node, and to those of the sizes alive there.

    A value is alive from the operation that makes it to the last one that reads it. The network's output counts as
    read at the end. Parameters and buffers do not count: every block can read them.
    """
    ops, order, end = trace.operations, trace.order, len(trace.operations)
    placeholder = next(iter(trace.graph.nodes))
    # A node without number is the graph's output, which comes last.
    last_use = {node: max((order.get(user, end) for user in node.users), default=-1) for node in (placeholder, *ops)}
    static: dict[fx.Node, bool] = {}
    crossings = {}
    alive, sizes = {placeholder}, set[fx.Node]()
    for position, node in enumerate(ops):
        (sizes if is_static(node, static) else alive).add(node)
        alive = {other for other in alive if last_use[other] > position}
        sizes = {other for other in sizes if last_use[other] > position}
        if len(alive) == 1 and placeholder not in alive:
            crossings[position] = (next(iter(alive)), sorted(sizes, key=order.__getitem__))
    crossings.pop(end - 1, None)  # the network's output is not a cut
    return crossings


def _find_cuts(network: nn.Module, trace: Trace, run: _Run) -> list[tuple[list[str], Cut]]:
    """Return every cut with its names, outermost module first, in forward order."""
    cuts: dict[fx.Node, list[Cut]] = {}
    for position, (node, alive) in _single_crossings(trace).items():
        if node not in run.shapes or len(run.shapes[node]) < 2:  # no tensor with samples and channels
            continue
        sizes = {size: run.recipe(size) for size in alive}
        if None not in sizes.values():
            cuts.setdefault(node, []).append(Cut(node, position, sizes))

    # The same value may cross alone at several positions: operations in between, such as an assertion about its
    # shape, make nothing that is read later. Prefer a position after which it is not overwritten, then one outside of
    # modules, which blocks can then call whole; then the first that the fewest sizes cross.
    def preference(cut: Cut) -> tuple[bool, int, int, int]:
        depth = sum(start <= cut.position < stop for _, start, stop in trace.spans)
        return cut.position in run.overwritten, depth, len(cut.sizes), cut.position

    names = _names(trace)
    return [(names[node], min(choices, key=preference)) for node, choices in cuts.items()]


def _tied(network: nn.Module, trace: Trace, cuts: list[tuple[list[str], Cut]]) -> set[str]:
    """Return names of the cuts that have the same parameter, or the same module with buffers, on both sides."""
    spans = [(positions[0], positions[-1]) for positions in _uses(network, trace).values()]
    return {names[0] for names, cut in cuts if any(first <= cut.position < last for first, last in spans)}


def _uses(network: nn.Module, trace: Trace) -> dict[int, list[int]]:
    """Map each parameter, and each buffer of a module that is called, to the operations that use it, by its id."""
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
    return uses


def _names(trace: Trace) -> dict[fx.Node, list[str]]:
    """Name each node after the modules that returned it, outermost first, else after its operation."""
    total = Counter(path for path, _ in trace.returns)
    seen: Counter[str] = Counter()
    names: dict[fx.Node, list[str]] = {}
    weaker: list[tuple[fx.Node, str]] = []
    for i, (path, node) in enumerate(trace.returns):  # inner calls come first
        seen[path] += 1
        name = path if total[path] == 1 else f"{path}@{seen[path]}"
        if i in trace.passed:  # a module that returns its input is no good name for it
            weaker.append((node, name))
        else:
            names.setdefault(node, []).insert(0, name)
    for node, name in weaker:
        names.setdefault(node, []).append(name)

    def name_operations(call: ModuleCall) -> None:
        for item in call.items:
            if isinstance(item, ModuleCall):
                name_operations(item)
            elif item not in names:
                names[item] = [f"{call.path}.{item.name}" if call.path else item.name]

    name_operations(trace.root)
    return names
