"""Tracing: running a network's forward on stand-ins that record every operation.

Built on ``torch.fx``, which records what ``forward`` does to a :class:`Proxy`. Anything else that ``forward`` does
happens while tracing and never again: a branch is taken, a random number drawn, a mode read. Blocks made from such a
trace would be silently wrong. So the tracer notices these things and raises; then the module in which it happened is
kept as one call, and only if that is the network itself it cannot be split.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partialmethod
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument
from torch.fx.proxy import Proxy
from typing_extensions import override

from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.meta_twin import meta_twin, without_data
from lightning_dgl.splitting.trace import ModuleCall, Trace, run_node


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
    """Trace ``network``; where ``mode`` is not None, its own forward may read the mode, and reads this one."""
    with torch.enable_grad():
        tracer = _Tracer(network, example_input, mode)
    hidden: dict[nn.Module, Any] = {module: _HiddenMode(_Opaque) for module in network.modules()}
    hidden[network] = _HiddenMode(_RootReadsMode) if mode is None else mode
    with _modes(hidden):
        try:
            _refuse_hooks(network)
            with tracer.only_what_the_graph_records(network), torch.enable_grad():
                graph = tracer.trace(network)
        except _RootReadsMode:
            raise
        except Exception as error:
            raise SplitError(
                f"{type(network).__name__}.forward cannot be traced into blocks ({_reason(error)}). Move the part that "
                "cannot be into a separate submodule (a submodule that cannot be traced is kept whole), or pass the "
                "network as an nn.Sequential of its parts and name the cuts with split_at."
            ) from error
    return Trace(graph, tracer.frame, tracer.returns, tracer.kept_whole)


def _reason(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"it {first_line}" if isinstance(error, _Opaque) else f"{type(error).__name__}: {first_line}"


class _Opaque(Exception):
    """Raised where ``forward`` does what a graph cannot say; the text completes "it ..."."""


def _refuse_hooks(module: nn.Module) -> None:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        raise _Opaque("has hooks, which would not run if it were cut inside")


class _RootReadsMode(_Opaque):
    """Raised where the network's own ``forward`` reads ``self.training``: then each mode is traced."""


class _HiddenMode:
    """Stands in for ``module.training`` while tracing: a graph would freeze the mode that was read."""

    def __init__(self, error: type[_Opaque]) -> None:
        self._error = error

    def refuse(self, *_: Any) -> NoReturn:
        raise self._error("reads `self.training`")

    # By condition, comparison, index or number, and dictionary key.
    __bool__ = __eq__ = __index__ = __hash__ = refuse


@contextmanager
def _modes(modes: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Set ``module.training`` of each module, past its ``train()`` and without a check of the value."""
    before = {module: module.training for module in modes}
    for module, mode in modes.items():
        module.__dict__["training"] = mode
    try:
        yield
    finally:
        for module, mode in before.items():
            module.__dict__["training"] = mode


class _InPlaceProxy(Proxy):
    """Records augmented and item assignment as they are; a plain Proxy turns ``x += 1`` into ``x = x + 1``."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        assert isinstance(self.tracer, _Tracer)
        return self.tracer.length(self.node, "takes len() of a tensor (write x.shape[0] instead)")


def _record(self: Proxy, other: Any, function: Callable[..., Any]) -> Proxy:
    return self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_InPlaceProxy, f"__{_name}__", partialmethod(_record, function=getattr(operator, _name)))


def _ambient() -> tuple[bool, ...]:
    """Return the modes that a graph does not record: gradients on or off, autocast on or off."""
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")))


class _Tracer(fx.Tracer):
    """Traces into every module that allows it, and records the others as one call."""

    proxy_buffer_attributes = True  # else a graph would hold today's values of buffers

    def __init__(self, network: nn.Module, example_input: Tensor, mode: bool | None) -> None:
        super().__init__()
        self.frame = ModuleCall(path="")
        self.returns: list[tuple[str, fx.Node]] = []
        self.kept_whole: dict[str, str] = {}
        self._example_input = example_input
        self._values: dict[fx.Node, Any] = {}
        self._evaluating = False
        self._ambient = _ambient()
        try:
            # Made now, while modes can be read and no attribute is a Proxy.
            self._twin: nn.Module | None = meta_twin(network)
            if mode is not None:
                self._twin.training = mode
        except Exception:  # such as uninitialized parameters; most networks are traced without asking for a value
            self._twin = None

    # The graph

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
            # To be undone if tracing into the module fails half-way.
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
        except (NotImplementedError, _Opaque):  # an argument of a type that a graph cannot hold
            call.callable_whole = False
        return output

    @contextmanager
    def only_what_the_graph_records(self, m: nn.Module) -> Iterator[None]:
        """Raise if ``m`` draws random numbers or assigns attributes: blocks would not repeat it.

        Either is undone, because the module will be called as a whole after tracing into it has failed.
        """
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

    # Values that decide which way ``forward`` goes: sizes, and conditions on sizes. A condition on a tensor's values
    # is refused: another batch might go the other way.

    @override
    def to_bool(self, obj: Proxy) -> bool:
        value = self.value(obj.node)
        if isinstance(value, Tensor):
            raise _Opaque("branches on the values of a tensor")
        return bool(value)

    @override
    def iter(self, obj: Proxy) -> Iterator[Any]:
        return iter([operator.getitem(obj, i) for i in range(self.length(obj.node, "loops over a tensor"))])

    def length(self, node: fx.Node, else_reason: str) -> int:
        """Return the length of a tuple or list."""
        value = self.value(node)
        if not isinstance(value, (tuple, list)):
            raise _Opaque(else_reason)
        return len(value)

    def value(self, node: fx.Node) -> Any:
        """Return the value of ``node`` for the example input: sizes are numbers, tensors have no data."""
        if self._twin is None:
            raise _Opaque("depends on sizes, which cannot be found without running the network")
        self._evaluating = True
        try:
            with without_data():
                return self._evaluate(self._twin, node)
        finally:
            self._evaluating = False

    def _evaluate(self, twin: nn.Module, node: fx.Node) -> Any:
        if node not in self._values:
            if node.op == "placeholder":
                self._values[node] = self._example_input.to("meta")
            elif node.target is getattr and node.args[1] in _DEVICE_ATTRIBUTES:
                # Conditions on the device are those of the network's device, not of meta.
                self._values[node] = getattr(self._example_input, str(node.args[1]))
            else:
                values = {source: self._evaluate(twin, source) for source in node.all_input_nodes}
                if node.target not in (getattr, operator.eq, operator.ne):  # but what is made, is made on meta
                    values = {k: torch.device("meta") if isinstance(v, torch.device) else v for k, v in values.items()}
                self._values[node] = run_node(twin, node, values)
        return self._values[node]


_DEVICE_ATTRIBUTES = ("device", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu")
