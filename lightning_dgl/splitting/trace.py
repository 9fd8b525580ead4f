"""The trace of a network: an ordered graph that remembers which module every operation belongs to.

One trace serves twice.

To *find* cuts, it is as fine as tracing goes. After each operation, the values that a later operation still reads are
alive; where one alone is alive, the network can be cut. A residual block::

    number   operation          alive after it
       7     relu               relu                cut
       8     conv1(relu)        conv1, relu
       9     conv2(conv1)       conv2, relu         the skip connection crosses, too
      10     add(conv2, relu)   add                 cut

To *write* blocks, it keeps the tree of module calls, so that a block calls a whole original submodule wherever no cut
passes through it: its hooks, mode, in-place operations and context managers then stay what they were. Cut after
``layer2.conv1``::

    call tree    stem     layer1              layer2                   fc
                          ├ conv1  ├ relu     ├ conv1     ╎ ├ relu
                                                          ╎
    block 0      stem     layer1              layer2.conv1╎
    block 1                                               ╎ layer2.relu  fc
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx, nn


@dataclass
class ModuleCall:
    """One call of a submodule, traced into: its arguments, the operations that ran inside, its result."""

    path: str
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    output: Any = None
    items: list[fx.Node | ModuleCall] = field(default_factory=list)
    # False if the arguments cannot be written into a graph: such a call is always taken apart.
    callable_whole: bool = True

    def nodes(self) -> Iterator[fx.Node]:
        """Yield the operations inside, in the order in which they run."""
        for item in self.items:
            if isinstance(item, ModuleCall):
                yield from item.nodes()
            else:
                yield item


@dataclass
class Trace:
    """A traced network.

    Attributes:
        graph: every operation, with the parameters and buffers that it reads as separate nodes (``get_attr``).
        root: the tree of module calls.
        returns: the path of a module and the node that it returned, for each call, inner calls before outer ones.
        passed: the numbers of those calls that returned what they were given.
        kept_whole: the path of each module with children that could not be traced into, and the reason.
        settings: by path of a module traced into, the plain attributes that its forward has read, by path of their
            module, mostly itself, and name.
    """

    graph: fx.Graph
    root: ModuleCall
    returns: list[tuple[str, fx.Node]]
    passed: set[int]
    kept_whole: dict[str, str]
    settings: dict[str, dict[tuple[str, str], Any]]

    @cached_property
    def operations(self) -> list[fx.Node]:
        """The operations in order, without reads of parameters and buffers: any block can do these."""
        return [node for node in self.root.nodes() if node.op != "get_attr"]

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """The number of each operation."""
        return {node: i for i, node in enumerate(self.operations)}

    @cached_property
    def spans(self) -> list[tuple[str, int, int]]:
        """The path of every module that was traced into, and its first and last operation, for each call."""
        return list(self._spans(self.root))

    def path_of(self, node: fx.Node) -> str:
        """Return the path of the innermost module that was traced into and contains ``node``."""
        call, inner = self.root, True
        while inner:
            inner = False
            for item in call.items:
                if isinstance(item, ModuleCall) and any(node is other for other in item.nodes()):
                    call, inner = item, True
                    break
        return call.path

    def _spans(self, call: ModuleCall) -> Iterator[tuple[str, int, int]]:
        for item in call.items:
            if isinstance(item, ModuleCall):
                inside = [self.order[node] for node in item.nodes() if node in self.order]
                if inside:
                    yield item.path, inside[0], inside[-1]
                yield from self._spans(item)


def run_node(network: nn.Module, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Run one operation of a traced network on the ``values`` of the nodes that it reads."""
    args = fx.map_arg(node.args, lambda n: values[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(network)
    if node.op == "call_module":
        return network.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return args[0]  # output
