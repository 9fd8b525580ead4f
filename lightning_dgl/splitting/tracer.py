"""Tracing: running a network's forward on stand-ins that record every operation.

Built on ``torch.fx``, which records what ``forward`` does to a :class:`Proxy`. Anything else that ``forward`` does
happens while tracing and never again: a branch is taken, a random number drawn, a mode read. Blocks made from such a
trace would be silently wrong. So the tracer notices these things and raises; then the module in which it happened is
kept as one call, and only if that is the network itself it cannot be split.

What is traced is a copy of the network without data. Whatever ``forward`` stores, it stores there.
"""

from __future__ import annotations

import gc
import operator
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument
from torch.fx.proxy import Proxy
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.meta_twin import meta_twin
from lightning_dgl.splitting.refusals import refuse_hooks, refuse_kind
from lightning_dgl.splitting.sizes import Values, is_static, same_branch, same_number
from lightning_dgl.splitting.stand_ins import HiddenMode, InPlaceProxy, ReadsMode, instances_of_what_proxies_stand_for
from lightning_dgl.splitting.surroundings import kept_surroundings
from lightning_dgl.splitting.trace import ModuleCall, Trace
from lightning_dgl.splitting.watching import (
    Opaque,
    Snapshot,
    ambient,
    freeze,
    noting_reads,
    random_state,
    refusing_what_proxies_pass_through,
    set_random_state,
    setting,
    unlike,
)

_GENERATIONS = (0, 1, 2, None)
"""Of garbage, what to collect in turn to find out whether a proxy is still in use. What was made in a forward is young,
and all of it would take half a second."""


def trace(network: nn.Module, example_input: Tensor, whole: Collection[str] = ()) -> dict[bool, Trace]:
    """Trace ``network`` in train mode (key True) and eval mode (key False); ``network`` stays as it is.

    Both are the same trace unless a ``forward`` that is traced reads ``self.training``.

    Args:
        whole: paths of modules that must not be traced into.

    Raises:
        SplitError: if ``network.forward`` itself cannot be traced. Submodules that cannot be are kept whole.
    """
    try:
        both = trace_in_mode(network, example_input, None, whole)
        return {True: both, False: both}
    except ReadsMode:
        return {mode: trace_in_mode(network, example_input, mode, whole) for mode in (True, False)}


def trace_in_mode(
    network: nn.Module, example_input: Tensor, mode: bool | dict[str, bool] | None, whole: Collection[str] = ()
) -> Trace:
    """Trace ``network``; where ``mode`` is not None, networks inside it may read the mode, and read this one.

    Args:
        mode: the mode, or the mode of each module by its path.
    """
    while True:
        try:
            refuse_kind(network)
            refuse_hooks(network, "which would not run in the blocks")
            with kept_surroundings(network), torch.inference_mode(False), torch.enable_grad():
                tracer = _Tracer(network, meta_twin(network), example_input, mode, whole)
                graph, settings = tracer.record()
        except Exception as error:
            raise SplitError(
                f"{type(network).__name__}.forward cannot be traced into blocks ({_reason(error)}). {_remedy(error)}"
            ) from error
        if not tracer.leaks:
            return Trace(graph, tracer.frame, tracer.returns, tracer.passed, tracer.kept_whole, settings)
        if "" in tracer.leaks:
            raise SplitError(
                f"{type(network).__name__}.forward cannot be traced into blocks (it keeps an activation in a place "
                f"outside of the network, such as a global list). {_REMEDY}"
            )
        whole = {*whole, *tracer.leaks}


_REMEDY = (
    "Move the part that cannot be into a separate submodule (a submodule that cannot be traced is kept whole), or pass "
    "the network as an nn.Sequential of its parts and name the cuts with split_at."
)


def _reason(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"it {first_line}" if isinstance(error, Opaque) else f"{type(error).__name__}: {first_line}"


def _remedy(error: Exception) -> str:
    return getattr(error, "remedy", _REMEDY)


class _Tracer(fx.Tracer):
    """Traces into every module that allows it, and records the others as one call."""

    proxy_buffer_attributes = True  # else a graph would hold today's values of buffers

    def __init__(
        self,
        network: nn.Module,
        twin: nn.Module,
        example_input: Tensor,
        mode: bool | dict[str, bool] | None,
        whole: Collection[str],
    ) -> None:
        super().__init__()
        self.frame = ModuleCall(path="")
        self.returns: list[tuple[str, fx.Node]] = []
        self.passed: set[int] = set()
        self.kept_whole: dict[str, str] = {}
        self.leaks: set[str] = set()
        self._network = network
        self._twin = twin
        self._example_input = example_input
        self._mode = mode
        self._whole = whole
        self._traced_by_mode: set[str] = set()
        self._paths = {module: path for path, module in twin.named_modules()}
        self._originals = {module: path for path, module in network.named_modules()}
        self._values: dict[int, Values] = {}
        self._evaluating = False
        self._ambient = ambient()
        self._number: dict[fx.Node, int] = {}
        self._kept: set[fx.Node] = set()
        self.entered: nn.Module | None = None
        self._proxies: list[tuple[weakref.ref[Proxy], str]] = []

    def record(self) -> tuple[fx.Graph, dict[str, dict[tuple[str, str], Any]]]:
        """Trace the network; return the graph and the settings that each module read, of itself or of others."""
        scripted = torch.jit.ScriptModule
        kinds = Counter(map(type, self._paths))
        for module, path in self._paths.items():
            # A network in a wrapper is one of its kind. What repeats is rather kept whole than traced in each mode.
            holds_layers = any(next(child.parameters(), None) is not None for child in module.children())
            traced_by_mode = path == "" or (path not in self._whole and kinds[type(module)] == 1 and holds_layers)
            if traced_by_mode:
                self._traced_by_mode.add(path)
            if self._mode is None or not traced_by_mode:
                vars(module)["training"] = HiddenMode(partial(self._read_mode, path))
            else:
                vars(module)["training"] = self._mode_of(path)
            if not isinstance(module, scripted):
                vars(module)["forward"] = _Forward(self, module, module.forward)
        before = {path: Snapshot(m) for m, path in self._paths.items() if not isinstance(m, scripted)}
        with ExitStack() as stack:
            reads = stack.enter_context(noting_reads(self._paths, lambda: self.frame.path))
            stack.enter_context(refusing_what_proxies_pass_through(lambda: not self._evaluating))
            stack.enter_context(instances_of_what_proxies_stand_for(self))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            with self._only_what_the_graph_records(self._twin):
                graph = self.trace(self._twin)
        for path, snapshot in before.items():
            if (name := snapshot.changed()) is not None:
                raise Opaque(f"assigns `{path}.{name}`")
        self._find_leaks()
        return graph, self._settings(reads)

    def _read_mode(self, path: str) -> bool:
        """Return the mode of the module at ``path``, which the module being traced reads: of itself, or of a part."""
        if not self._traced_by_mode & {path, self.frame.path}:
            raise Opaque("reads `self.training`")
        if self._mode is None:
            raise ReadsMode
        return self._mode_of(path)

    def _mode_of(self, path: str) -> bool:
        assert self._mode is not None
        return self._mode[path] if isinstance(self._mode, dict) else self._mode

    def _settings(self, reads: set[tuple[str, str, str]]) -> dict[str, dict[tuple[str, str], Any]]:
        modules = dict(self._network.named_modules())
        settings: dict[str, dict[tuple[str, str], Any]] = {}
        for reader, path, name in sorted(reads):
            value = setting(modules[path], name)
            if name == "training":
                may_read = self._mode is not None and self._traced_by_mode & {path, reader}
                value = freeze(self._mode_of(path)) if may_read else None
            if value is not None:
                settings.setdefault(reader, {})[path, name] = value
        return settings

    def _find_leaks(self) -> None:
        """Find the modules that made a proxy which somebody still keeps."""
        for generation in _GENERATIONS:
            alive = [(proxy(), path) for proxy, path in self._proxies]
            # Not those of a module whose trace was given up: it is kept whole by now.
            self.leaks = {
                path for p, path in alive if p is not None and p.node not in self._kept and not p.node._erased
            }
            del alive
            if not self.leaks:
                break
            if generation is not None:
                gc.collect(generation)
        self._proxies.clear()

    # The graph

    @override
    def proxy(self, node: fx.Node) -> Proxy:
        proxy = InPlaceProxy(node, self)
        self._proxies.append((weakref.ref(proxy), self.frame.path))
        return proxy

    @override
    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if (change := unlike(self._ambient)) is not None:
            raise Opaque(change)
        node = super().create_node(*args, **kwargs)
        self._number[node] = len(self._number)
        if node.op not in ("placeholder", "output"):
            self.frame.items.append(node)
        return node

    @override
    def create_arg(self, a: Any) -> Argument:
        if isinstance(a, HiddenMode):
            return a.read()
        if isinstance(a, Tensor) and not self._belongs_to_network(a):
            raise Opaque(
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
        # One tensor in; further arguments keep their defaults. A forward may have been set on the instance.
        return self._twin.forward.plain, [  # type: ignore[attr-defined]
            self.create_proxy("placeholder", "input", (), {})
        ]

    # Modules

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self._whole:
            self.kept_whole[module_qualified_name] = "blocks that cut it did not compute what it computes"
            return True
        compiled = "_orig_mod" in m._modules
        return compiled or isinstance(m, torch.jit.ScriptModule) or super().is_leaf_module(m, module_qualified_name)

    @override
    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        if m in self._originals:  # a function encloses the network itself
            return self._twin.get_submodule(self._originals[m])(*args, **kwargs)
        if m not in self._paths:  # made in a forward
            return forward(*args, **kwargs)
        path, made_before = self._paths[m], len(self._number)
        if self.is_leaf_module(m, path):
            output = self.create_proxy("call_module", path, args, kwargs)
        else:
            # To be undone if tracing into the module fails half-way.
            parent, last_node, num_returns = self.frame, next(iter(reversed(self.graph.nodes))), len(self.returns)
            try:
                refuse_hooks(m)
                self.frame = ModuleCall(path)
                output = self._inline(m, forward, args, kwargs)
                parent.items.append(self.frame)
                self.frame = parent
            except Exception as error:  # whatever tracing trips over, calling the module as a whole is right
                self.frame = parent
                self._roll_back(last_node)
                del self.returns[num_returns:]
                self.passed = {i for i in self.passed if i < num_returns}
                if next(m.children(), None) is not None:
                    self.kept_whole[path] = _reason(error)
                output = self.create_proxy("call_module", path, args, kwargs)
        if isinstance(output, Proxy):
            made_inside = self._number[output.node] >= made_before
            if not made_inside:
                self.passed.add(len(self.returns))
            self.returns.append((path, output.node))
        return output

    def _inline(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.frame
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Proxy)]
        references = [sys.getrefcount(proxy) for proxy in given]
        with self._only_what_the_graph_records(m):
            self.entered = m
            output = forward(*args, **kwargs)
            returned = {id(leaf) for leaf in tree_leaves(output)}
            for generation in _GENERATIONS:
                kept = [
                    sys.getrefcount(given[i]) > n and id(given[i]) not in returned for i, n in enumerate(references)
                ]
                if not any(kept):
                    break
                if generation is None:
                    raise Opaque("keeps its input in a place outside of the network, such as a global list")
                gc.collect(generation)
        try:
            call.args, call.kwargs = self.create_arg(args), self.create_arg(kwargs)
            call.output = self.create_arg(output)
        except (NotImplementedError, Opaque):  # an argument of a type that a graph cannot hold
            call.callable_whole = False
        return output

    @contextmanager
    def _only_what_the_graph_records(self, m: nn.Module) -> Iterator[None]:
        """Raise if ``m`` draws random numbers or assigns attributes: blocks would not repeat it.

        Either is undone, because the module will be called as a whole after tracing into it has failed.
        """
        before, generators = Snapshot(m), random_state()
        try:
            yield
            if (name := before.changed()) is not None:
                raise Opaque(f"assigns `self.{name}`")
            if random_state() != generators:
                raise Opaque("draws random numbers, which a graph would freeze")
        except BaseException:
            before.restore()
            set_random_state(generators)
            raise

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
        values = self._for_all_batches(obj.node, "branches on the values of a tensor")
        if isinstance(values[0], (tuple, list, dict)):
            return bool(values[0])
        taken = bool(values[0])
        if any(bool(value) is not taken for value in values):
            raise Opaque("branches on the batch size")
        self._check(same_branch, obj, taken)
        return taken

    def number(self, obj: Proxy, kind: Callable[[Any], Any]) -> Any:
        """Return a size as a number, which must be the same for all batches."""
        values = self._for_all_batches(obj.node, "reads the values of a tensor as numbers")
        if any(value != values[0] for value in values):
            raise Opaque("uses the batch size as a number that a graph would freeze")
        number = kind(values[0])
        self._check(same_number, obj, values[0])
        return number

    def _check(self, check: Callable[..., None], obj: Proxy, expected: Any) -> None:
        where = f"{type(self._network.get_submodule(self.frame.path)).__name__} ({self.frame.path or 'the network'})"
        self.create_proxy("call_function", check, (obj, expected, where), {})

    def _for_all_batches(self, node: fx.Node, else_reason: str) -> list[Any]:
        """Return the value of ``node`` for the example, and for those other batch sizes that the network takes."""
        value = self.value(node)
        if isinstance(value, Tensor) or not (is_static(node, {}) or isinstance(value, (tuple, list, dict))):
            raise Opaque(else_reason)
        values, n = [value], len(self._example_input)
        for batch in (n + 1, 1):
            try:
                values.append(self.value(node, batch))
            except Opaque:
                continue
        return values

    @override
    def iter(self, obj: Proxy) -> Iterator[Any]:
        return iter([operator.getitem(obj, i) for i in range(self.length(obj, "loops over a tensor"))])

    def length(self, obj: Proxy, else_reason: str) -> int:
        """Return the length of a tuple or list."""
        value = self.value(obj.node)
        if not isinstance(value, (tuple, list)):
            raise Opaque(else_reason)
        return len(value)

    def value(self, node: fx.Node, batch: int | None = None) -> Any:
        """Return the value of ``node`` for a batch size, that of the example by default; tensors have no data."""
        n = len(self._example_input)
        if batch is None:
            batch = n
        if batch not in self._values:
            x = self._example_input
            self._values[batch] = Values(self._network, torch.cat([x, x[:1]]) if batch > n else x[:batch])
        self._evaluating = True
        try:
            return self._values[batch][node]
        except Exception as error:
            raise Opaque("depends on sizes, which cannot be found without running the network") from error
        finally:
            self._evaluating = False


class _Forward:
    """Stands in for ``module.forward``, so that a direct call of it is recorded, too."""

    def __init__(self, tracer: _Tracer, module: nn.Module, plain: Callable[..., Any]) -> None:
        self._tracer, self._module, self.plain = tracer, module, plain
        self.__globals__ = getattr(plain, "__globals__", {})  # where fx looks for functions to wrap

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer = self._tracer
        if tracer.entered is self._module:
            tracer.entered = None
            return self.plain(*args, **kwargs)
        refuse_hooks(self._module, "which a direct call of its forward leaves out")
        return tracer.call_module(self._module, self, args, kwargs)
