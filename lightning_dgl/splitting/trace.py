"""Tracing a network into an ordered graph that remembers which module every operation belongs to.

One trace serves twice. Its nodes are as fine as tracing goes, so that every place where a single tensor crosses can be
found; and it keeps the tree of module calls, so that blocks can later call whole original submodules wherever no cut
passes through them (their hooks, modes, in-place operations and context managers then stay what they were).
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument
from torch.fx.proxy import Proxy
from typing_extensions import override

from lightning_dgl.splitting.dry_run import FakeRun
from lightning_dgl.splitting.errors import SplitError


@dataclass
class ModuleCall:
    """One call of a submodule, traced into: what it was called with, what ran inside, what it returned."""

    path: str
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    output: Any = None
    items: list[fx.Node | ModuleCall] = field(default_factory=list)
    # False if the arguments cannot be written into a graph: such a call is always taken apart.
    callable_whole: bool = True

    def nodes(self) -> Iterator[fx.Node]:
        """The operations inside, in the order in which they run."""
        for item in self.items:
            if isinstance(item, ModuleCall):
                yield from item.nodes()
            else:
                yield item


@dataclass
class Trace:
    """A traced network."""

    graph: fx.Graph
    root: ModuleCall
    # Which module returned what, in call order, inner calls before outer ones.
    returns: list[tuple[str, fx.Node]]
    # Modules with children that had to be kept whole, and why.
    kept_whole: dict[str, str]

    @cached_property
    def operations(self) -> list[fx.Node]:
        """What the network does, in order; reading a parameter or buffer is not an operation, any block can do it."""
        return [node for node in self.root.nodes() if node.op != "get_attr"]

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """The number of each operation."""
        return {node: i for i, node in enumerate(self.operations)}

    @cached_property
    def spans(self) -> list[tuple[str, int, int]]:
        """Every call of a module that was traced into: its path, and its first and last operation."""
        return list(self._spans(self.root))

    def _spans(self, call: ModuleCall) -> Iterator[tuple[str, int, int]]:
        for item in call.items:
            if isinstance(item, ModuleCall):
                inside = [self.order[node] for node in item.nodes() if node in self.order]
                if inside:
                    yield item.path, inside[0], inside[-1]
                yield from self._spans(item)


def trace(network: nn.Module, example_input: Tensor) -> dict[bool, Trace]:
    """Trace ``network`` in train mode (key True) and eval mode (key False).

    Both are the same trace unless the ``forward`` of ``network`` itself reads ``self.training``.

    Raises:
        SplitError: if ``network.forward`` itself cannot be traced. Submodules that cannot be are kept whole.
    """
    try:
        both = _trace(network, example_input, mode=None)
        return {True: both, False: both}
    except _RootReadsMode:
        return {mode: _trace(network, example_input, mode) for mode in (True, False)}


def _trace(network: nn.Module, example_input: Tensor, mode: bool | None) -> Trace:
    tracer = _Tracer(network, example_input)
    with _hidden_modes(network, mode):
        try:
            _refuse_hooks(network)
            with tracer.only_what_the_graph_records(network), torch.enable_grad():
                graph = tracer.trace(network)
        except _RootReadsMode:
            raise
        except Exception as error:
            raise SplitError(
                f"{type(network).__name__}.forward cannot be traced into blocks ({_reason(error)}). Move the part that "
                "cannot be into a submodule of its own (a submodule that cannot be traced is kept whole), or pass the "
                "network as an nn.Sequential of its parts and name the cuts with split_at."
            ) from error
    return Trace(graph, tracer.frame, tracer.returns, tracer.kept_whole)


def _reason(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"it {first_line}" if isinstance(error, _Opaque) else f"{type(error).__name__}: {first_line}"


class _Opaque(Exception):
    """What ``forward`` does here cannot be written into a graph; the text completes "it ..."."""


def _refuse_hooks(module: nn.Module) -> None:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        raise _Opaque("has hooks, which would not run if it were cut inside")


class _RootReadsMode(_Opaque):
    """The network's own ``forward`` reads ``self.training``."""


class _HiddenMode:
    """Stands in for ``module.training`` while tracing: a graph would freeze the mode that was read."""

    def __init__(self, mode: bool, error: type[_Opaque]) -> None:
        self.mode = mode
        self._error = error

    def refuse(self, *_: Any) -> NoReturn:
        raise self._error("reads `self.training`")

    # By condition, comparison, index or number, and dictionary key.
    __bool__ = __eq__ = __index__ = __hash__ = refuse


@contextmanager
def _hidden_modes(network: nn.Module, root_mode: bool | None) -> Iterator[None]:
    """Hide every module's mode; the root's only if ``root_mode`` is None, else it reads ``root_mode``."""
    before = {module: module.training for module in network.modules()}
    for module, mode in before.items():
        module.__dict__["training"] = _HiddenMode(mode, _RootReadsMode if module is network else _Opaque)
    if root_mode is not None:
        network.__dict__["training"] = root_mode
    try:
        yield
    finally:
        for module, mode in before.items():
            module.__dict__["training"] = mode


@contextmanager
def _revealed_modes(network: nn.Module) -> Iterator[None]:
    hidden = [(m, m.__dict__["training"]) for m in network.modules()]
    try:
        for module, mode in hidden:
            if isinstance(mode, _HiddenMode):
                module.__dict__["training"] = mode.mode
        yield
    finally:
        for module, mode in hidden:
            module.__dict__["training"] = mode


class _InPlaceProxy(Proxy):
    """Records augmented and item assignment as what they are; a plain Proxy turns ``x += 1`` into ``x = x + 1``."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        assert isinstance(self.tracer, _Tracer)
        value = self.tracer.value(self.node)
        if not isinstance(value, (tuple, list)):
            raise _Opaque("takes len() of a tensor (write x.shape[0] instead)")
        return len(value)


def _record_in_place(function: Callable[..., Any]) -> Callable[[Proxy, Any], Any]:
    def method(self: Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_InPlaceProxy, f"__{_name}__", _record_in_place(getattr(operator, _name)))


def _ambient() -> tuple[bool, ...]:
    """Modes that a graph does not record: gradients on or off, autocast on or off."""
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")))


class _Tracer(fx.Tracer):
    """Inlines every module that can be traced, and keeps the others as one call."""

    proxy_buffer_attributes = True

    def __init__(self, network: nn.Module, example_input: Tensor) -> None:
        super().__init__()
        self.frame = ModuleCall(path="")
        self.returns: list[tuple[str, fx.Node]] = []
        self.kept_whole: dict[str, str] = {}
        self._example_input = example_input
        self._fake_run = FakeRun(network)
        self._values: dict[fx.Node, Any] = {}
        self._evaluating = False

    # What the graph consists of

    @override
    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._ambient = _ambient()
        return super().trace(root, concrete_args)

    @override
    def proxy(self, node: fx.Node) -> Proxy:
        return _InPlaceProxy(node, self)

    @override
    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient() != self._ambient:
            raise _Opaque("switches gradients or autocast on or off for a part of it")
        node = super().create_node(*args, **kwargs)
        if node.op not in ("placeholder", "output"):
            self.frame.items.append(node)
        return node

    @override
    def create_arg(self, a: Any) -> Argument:
        if isinstance(a, _HiddenMode):
            a.refuse()
        if isinstance(a, Tensor) and not self._belongs_to_network(a):
            raise _Opaque(
                "makes a tensor that does not depend on its input, whose values a graph would freeze (register a "
                "constant with register_buffer)"
            )
        return super().create_arg(a)

    def _belongs_to_network(self, tensor: Tensor) -> bool:
        return any(tensor is own for own in (*self.root.parameters(), *self.root.buffers(), *self.tensor_attrs))

    @override
    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # One tensor in; further arguments keep their defaults.
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    # Modules

    @override
    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            output = self.create_proxy("call_module", path, args, kwargs)
        else:
            parent, last_node, num_returns = self.frame, next(iter(reversed(self.graph.nodes))), len(self.returns)
            try:
                _refuse_hooks(m)
                self.frame = ModuleCall(path)
                output = self._inline(m, forward, args, kwargs)
                parent.items.append(self.frame)
                self.frame = parent
            except Exception as error:  # whatever tracing trips over, calling the module as a whole is right
                self.frame = parent
                self._roll_back(last_node)
                del self.returns[num_returns:]
                if next(m.children(), None) is not None:
                    self.kept_whole[path] = _reason(error)
                output = self.create_proxy("call_module", path, args, kwargs)
        if isinstance(output, Proxy):
            self.returns.append((path, output.node))
        return output

    def _inline(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.frame
        with self.only_what_the_graph_records(m):
            output = forward(*args, **kwargs)
        try:
            call.args, call.kwargs = self.create_arg(args), self.create_arg(kwargs)
            call.output = self.create_arg(output)
        except (NotImplementedError, _Opaque):
            call.callable_whole = False
        return output

    @contextmanager
    def only_what_the_graph_records(self, m: nn.Module) -> Iterator[None]:
        """Raise if ``m`` draws random numbers or assigns attributes: a graph would do so once and for all."""
        attributes = dict(m.__dict__)
        generators = torch.get_rng_state(), random.getstate()
        try:
            yield
            for name, value in m.__dict__.items():
                if attributes.get(name) is not value:
                    raise _Opaque(f"assigns `self.{name}`")
            if not torch.equal(torch.get_rng_state(), generators[0]) or random.getstate() != generators[1]:
                raise _Opaque("draws random numbers, which a graph would freeze")
        finally:
            torch.set_rng_state(generators[0])
            random.setstate(generators[1])
            m.__dict__.clear()
            m.__dict__.update(attributes)

    def _roll_back(self, last_node: fx.Node) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node is last_node:
                break
            self.graph.erase_node(node)

    @override
    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if self._evaluating:
            return attr_val
        return super().getattr(attr, attr_val, {})  # a cached proxy might belong to a node rolled back

    # Values that tracing itself needs: shapes, and conditions on shapes

    @override
    def to_bool(self, obj: Proxy) -> bool:
        value = self.value(obj.node)
        if isinstance(value, Tensor):
            raise _Opaque("branches on the values of a tensor")
        return bool(value)

    @override
    def iter(self, obj: Proxy) -> Iterator[Any]:
        value = self.value(obj.node)
        if not isinstance(value, (tuple, list)):
            raise _Opaque("loops over a tensor")
        return iter([operator.getitem(obj, i) for i in range(len(value))])

    def value(self, node: fx.Node) -> Any:
        """What ``node`` gives for the example input: tensors are fake, sizes are numbers."""
        self._evaluating = True
        try:
            with self._fake_run.active(), _revealed_modes(self.root):
                return self._evaluate(node)
        finally:
            self._evaluating = False

    def _evaluate(self, node: fx.Node) -> Any:
        if node not in self._values:
            if node.op == "placeholder":
                self._values[node] = self._fake_run.fake(self._example_input)
            else:
                inputs = {source: self._evaluate(source) for source in node.all_input_nodes}
                self._values[node] = run_node(self.root, node, inputs)
        return self._values[node]


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
