"""Blocks: consecutive pieces of a network that share its modules and parameters."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from typing_extensions import override

from lightning_dgl.splitting.compiled_call import CompiledCall
from lightning_dgl.splitting.cut_points import Cut, SplitPoint, TracedNetwork
from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.graph_function import GraphFunction
from lightning_dgl.splitting.trace import ModuleCall, Trace


class Block(nn.Module):
    """A consecutive piece of a network: one tensor in, one tensor out (the last block: the network's output).

    Its parameters, buffers and submodules are the network's own, under the names they have there. Its mode is the
    network's, too: ``network.eval()`` reaches every block, and ``block.train()`` or ``block.eval()`` sets the modules
    that the block runs, and the network's own flag, which all blocks of a network share.
    """

    _network: nn.Module

    def __init__(self, network: nn.Module, extent: str, graphs: dict[bool, fx.Graph]) -> None:
        super().__init__()
        # Attributes are private, because submodules of any name are attached.
        self._extent = extent
        self._functions = {mode: GraphFunction.of(graph) for mode, graph in graphs.items()}
        self._compiled: dict[bool, CompiledCall] = {}
        # Not registered: the block is a piece of the network, not its owner.
        self.__dict__["_network"] = network
        containers: dict[str, None] = {}
        # Buffers of modules that a cut passes through stay with the network, which reads and moves them.
        self._cut_through_buffers: list[tuple[str, str]] = []
        for graph in graphs.values():
            for node in graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    path = str(node.target)
                    parts = path.split(".")
                    containers.update({".".join(parts[:i]): None for i in range(1, len(parts))})
                    self._attach(path)
        self._containers = list(containers)

    def _attach(self, path: str) -> None:
        parent_path, _, name = path.rpartition(".")
        owner = self._network.get_submodule(parent_path)
        value = getattr(owner, name)
        if name in owner._buffers:
            if (parent_path, name) not in self._cut_through_buffers:
                self._cut_through_buffers.append((parent_path, name))
            return
        parent: nn.Module = self
        for part in parent_path.split(".") if parent_path else ():
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        if isinstance(value, nn.Module):
            parent._modules[name] = value
        elif isinstance(value, nn.Parameter):
            parent.register_parameter(name, value)

    def forward(self, x: Tensor) -> Any:
        """Run the piece on ``x``, in the network's present mode."""
        mode = self._network.training
        function = self._functions[mode]
        return self._compiled[mode](function, self._network, x) if self._compiled else function(self._network, x)

    @override
    def compile(self) -> None:  # type: ignore[override]
        """Run the piece through ``torch.compile`` from now on; it is compiled when it is first called."""
        self._compiled = {True: CompiledCall(), False: CompiledCall()}

    @property  # type: ignore[no-redef]
    def training(self) -> bool:
        """The network's mode: True in train mode."""
        return self._network.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_network" in self.__dict__:  # absent while nn.Module.__init__ runs
            self._network.training = mode
            for path in self.__dict__.get("_containers", ()):
                self._network.get_submodule(path).training = mode

    def detached_copy(self) -> Piece:
        """Return a module that does the same with copies of the block's parameters and buffers."""
        return Piece(self)

    def tensors(self) -> list[Tensor]:
        """Return everything the block holds: parameters, buffers, and those buffers of the network that it reads."""
        outside = [self._network.get_submodule(path)._buffers[name] for path, name in self._cut_through_buffers]
        return [*self.parameters(), *self.buffers(), *(buffer for buffer in outside if buffer is not None)]

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Block:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for path, name in self._cut_through_buffers:
            owner = self._network.get_submodule(path)
            owner._buffers[name] = fn(getattr(owner, name))
        return self

    @override
    def extra_repr(self) -> str:
        return self._extent


class Piece(nn.Module):
    """A copy of a block, which no longer depends on the network: its parameters are its own and are all trained."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        memo: dict[int, Any] = {}
        for name, module in block._modules.items():
            self.add_module(name, copy.deepcopy(module, memo))
        for name, parameter in block._parameters.items():
            self.register_parameter(name, copy.deepcopy(parameter, memo))
        for path, name in block._cut_through_buffers:
            buffer = block._network.get_submodule(path)._buffers[name]
            owner = self.get_submodule(path) if path else self
            owner.register_buffer(name, copy.deepcopy(buffer, memo))
        self.requires_grad_(True)
        self._functions = block._functions

    def forward(self, x: Tensor) -> Any:
        """Run the piece on ``x``."""
        return self._functions[self.training](self, x)


def extent(block: nn.Module) -> str:
    """Name what a block contains, "first module to last module"; ``block`` may also be a whole network."""
    if isinstance(block, Block):
        return block._extent
    names = [name for name, _ in block.named_children()]
    return _from_to(names[0], names[-1]) if names else type(block).__name__


def _from_to(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def build_blocks(traced: TracedNetwork, points: Sequence[SplitPoint]) -> nn.ModuleList:
    """Cut a traced network after each of ``points``.

    Raises:
        SplitError: if two blocks would share a parameter, or a module with state.
    """
    graphs = build_graphs(traced, points)
    blocks = nn.ModuleList()
    for j in range(len(points) + 1):
        pair = {mode: graphs[mode][j] for mode in (True, False)}
        # A block is named after the modules that it calls; one that calls none, after its operations.
        operations = [node for node in pair[True].nodes if node.op in ("call_module", "call_function", "call_method")]
        names = [str(n.target) for n in operations if n.op == "call_module"] or [n.name for n in operations]
        name = _from_to(names[0], points[j].name if j < len(points) else names[-1])
        blocks.append(Block(traced.network, name, pair))
    _check_nothing_shared(blocks)
    return blocks


def build_graphs(traced: TracedNetwork, points: Sequence[SplitPoint]) -> dict[bool, list[fx.Graph]]:
    """Write, for each mode (True: train), one graph for each piece of the network between ``points``."""
    return {
        mode: _BlockGraphs(traced.traces[mode], [traced.cuts[mode][point.name] for point in points]).graphs
        for mode in (True, False)
    }


class _BlockGraphs:
    """Writes the operations of a trace into one graph for each block, whole module calls wherever possible."""

    def __init__(self, trace: Trace, cuts: Sequence[Cut]) -> None:
        self.graphs: list[fx.Graph] = []
        self._cuts = list(cuts)
        self._order = trace.order
        self._open(next(iter(trace.graph.nodes)))
        self._add(trace.root)
        self._close(next(iter(reversed(trace.graph.nodes))).args[0])

    def _open(self, source: fx.Node) -> None:
        self._graph = fx.Graph()
        self._values = {source: self._graph.placeholder("x")}

    def _close(self, result: Any) -> None:
        self._graph.output(self._map(result))
        self._graph.lint()
        self.graphs.append(self._graph)

    def _add(self, call: ModuleCall) -> None:
        for item in call.items:
            if isinstance(item, ModuleCall):
                if self._can_be_whole(item):
                    self._add_whole(item)
                else:
                    self._add(item)
                last = max((self._order[node] for node in item.nodes() if node in self._order), default=-1)
            elif item.op == "get_attr":
                continue  # copied into each block that reads it
            else:
                self._values[item] = self._graph.node_copy(item, self._copy)
                last = self._order[item]
            if self._cuts and last == self._cuts[0].position:
                boundary = self._cuts.pop(0).node
                self._close(boundary)
                self._open(boundary)

    def _can_be_whole(self, call: ModuleCall) -> bool:
        if not call.callable_whole:
            return False
        inside = set(call.nodes())
        span = [self._order[node] for node in inside if node in self._order]
        if any(min(span, default=0) <= cut.position < max(span, default=0) for cut in self._cuts):
            return False
        # An argument that the module ignores may have been left behind at the last cut.
        arguments: set[fx.Node] = set()
        fx.map_arg((call.args, call.kwargs), arguments.add)  # type: ignore[arg-type]
        if any(node not in self._values and node.op != "get_attr" for node in arguments):
            return False
        # What happens inside must not be used outside, but for what the call returns.
        returned: set[fx.Node] = set()
        fx.map_arg(call.output, returned.add)  # type: ignore[arg-type]
        return all(user in inside for node in inside - returned for user in node.users if user.op != "get_attr")

    def _add_whole(self, call: ModuleCall) -> None:
        result = self._graph.call_module(call.path, self._map(call.args), self._map(call.kwargs))
        self._unpack(call.output, result)

    def _unpack(self, output: Any, result: fx.Node) -> None:
        if isinstance(output, fx.Node):
            self._values[output] = result
        elif isinstance(output, dict):
            for key, part in output.items():
                self._unpack(part, self._graph.call_function(operator.getitem, (result, key)))
        elif isinstance(output, (tuple, list)):
            for i, part in enumerate(output):
                self._unpack(part, self._graph.call_function(operator.getitem, (result, i)))

    def _copy(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr" and node not in self._values:
            self._values[node] = self._graph.node_copy(node)
        return self._values[node]

    def _map(self, argument: Any) -> Any:
        return fx.map_arg(argument, self._copy)


def _check_nothing_shared(blocks: nn.ModuleList) -> None:
    owners: dict[int, tuple[int, str]] = {}
    for j, block in enumerate(blocks):
        stateful = [(n, t) for n, t in (*block.named_parameters(), *block.named_buffers())]
        for name, tensor in stateful:
            i, other = owners.setdefault(id(tensor), (j, name))
            if i != j:
                raise SplitError(
                    f"{name!r} is used in block {i} and again in block {j}"
                    + (f" (there as {other!r})" if other != name else "")
                    + ": a block trains its parameters on its own loss, so weights cannot be tied across a cut. Cut "
                    "elsewhere (split_at), or untie them."
                )
