"""What blocks run: the operations of a trace, dealt to blocks, and traced again when the network's settings change.

A trace holds whatever plain attributes - numbers, flags, names of modes - the forward read: ``x / self.temperature``
divides by what the temperature was. So a block compares, whenever it runs, the attributes of the modules that it takes
apart with those of the trace. Modules that it calls as a whole read their attributes themselves.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_dgl.splitting.cut_points import Cut, cuts_named
from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.graph_function import GraphFunction
from lightning_dgl.splitting.refusals import has_hooks
from lightning_dgl.splitting.sizes import again, check_again
from lightning_dgl.splitting.trace import ModuleCall, Trace
from lightning_dgl.splitting.watching import setting

_MOST_VARIANTS = 8


@dataclass
class Variant:
    """The graphs of all blocks for one set of settings.

    Attributes:
        taken_apart: for each block, the paths of the modules that it takes apart, "" for the network.
        settings: see :class:`~.trace.Trace`.
    """

    graphs: list[fx.Graph]
    functions: list[GraphFunction]
    taken_apart: list[list[str]]
    settings: dict[str, dict[tuple[str, str], Any]]

    @classmethod
    def of(cls, trace: Trace, cuts: Sequence[Cut]) -> Variant:
        """Cut a trace after each of ``cuts``."""
        writer = _BlockGraphs(trace, cuts)
        functions = [GraphFunction.of(graph) for graph in writer.graphs]
        return cls(writer.graphs, functions, writer.taken_apart, trace.settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "graphs": []}  # the functions are made; graphs are slow to copy

    def difference(self, network: nn.Module, number: int) -> str | None:
        """Say which setting of ``network`` is not that of this variant in one block, None if all are."""
        for path in self.taken_apart[number]:
            if has_hooks(network.get_submodule(path)):
                return f"{path or 'the network'} got hooks"
            for (owner, name), value in self.settings.get(path, {}).items():
                if setting(network.get_submodule(owner), name) != value:
                    return f"`{owner + '.' if owner else ''}{name}` was changed"
        return None


class Pieces:
    """What the blocks of a network run."""

    def __init__(self, network: nn.Module, example_input: Tensor, names: list[str], variants: list[Variant]) -> None:
        self.network = network
        self._example = example_input[:2].detach().cpu()
        self._follows_dtype = example_input.dtype == self._dtype
        self._names = names
        self._variants = variants
        self._paths = [
            list(dict.fromkeys(path for variant in variants for path in _paths(variant.graphs[number])))
            for number in range(len(names) + 1)
        ]

    @property
    def _dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), None)

    @property
    def graphs(self) -> list[fx.Graph]:
        """The graphs of all blocks in train mode, as the network was when it was split."""
        return self._variants[0].graphs

    def paths(self, number: int) -> list[str]:
        """Return the paths of the modules, parameters and buffers that a block uses."""
        return self._paths[number]

    def function(self, number: int) -> GraphFunction:
        """Return what a block does, for the present settings of the network."""
        if torch.compiler.is_compiling():  # from outside; compares no more than the mode
            return self.function_in_mode(number, self.network.training)
        for variant in self._variants:
            if variant.difference(self.network, number) is None:
                return variant.functions[number]
        return self._follow(number)

    def _follow(self, number: int) -> GraphFunction:
        change = self._variants[0].difference(self.network, number)
        try:
            variant = self._trace_again()
        except SplitError as error:
            if torch.is_grad_enabled() or "hooks" not in str(change):
                raise SplitError(
                    f"Since {type(self.network).__name__} was split, {change}, and its blocks cannot follow: {error}"
                ) from error
            warnings.warn(
                f"Since {type(self.network).__name__} was split, {change}; they do not run in its blocks.", stacklevel=3
            )
            return self.function_in_mode(number, self.network.training)
        del self._variants[2 : len(self._variants) - _MOST_VARIANTS + 3]
        self._variants.append(variant)
        return variant.functions[number]

    def function_in_mode(self, number: int, training: bool) -> GraphFunction:
        """Return what a block did in this mode when the network was split."""
        return self._variants[0 if training or len(self._variants) == 1 else 1].functions[number]

    def _trace_again(self) -> Variant:
        parameter = next(self.network.parameters(), None)
        example = self._example if parameter is None else self._example.to(parameter.device)
        if self._follows_dtype:
            example = example.to(self._dtype)
        trace, cuts = cuts_named(self.network, example, self._names)
        variant = Variant.of(trace, cuts)
        for number, graph in enumerate(variant.graphs):
            new = self._parameters(_paths(graph)) - self._parameters(self._paths[number])
            if new:
                raise SplitError(
                    f"block {number} would use {min(new)!r} now, which is not among its parameters. Split again."
                )
        return variant

    def _parameters(self, paths: Sequence[str]) -> set[str]:
        names = [name for name, _ in self.network.named_parameters(remove_duplicate=False)]
        return {name for name in names if any(name == path or name.startswith(f"{path}.") for path in paths)}


def _paths(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]


class _BlockGraphs:
    """Writes the operations of a trace into one graph for each block, whole module calls wherever possible."""

    def __init__(self, trace: Trace, cuts: Sequence[Cut]) -> None:
        self.graphs: list[fx.Graph] = []
        self.taken_apart: list[list[str]] = [[]]
        self._inside: list[str] = []  # paths of the module being taken apart and of those around it
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
        self._inside.append(call.path)
        self.taken_apart[-1].append(call.path)
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
                cut = self._cuts.pop(0)
                self._check_sizes(cut)
                self._close(cut.node)
                self._open(cut.node)
                self.taken_apart.append(list(self._inside))
                for node, recipe in cut.sizes.items():
                    self._values[node] = self._graph.call_function(again, (recipe, self._values[cut.node]))
        self._inside.pop()

    def _check_sizes(self, cut: Cut) -> None:
        for node, recipe in cut.sizes.items():
            if node in self._values:  # not if it was left in a module that is called whole
                self._graph.call_function(check_again, (self._values[node], recipe, self._values[cut.node]))

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
