"""Noticing what a graph of operations does not record: state that a forward keeps, random numbers, ambient modes.

A tracer sees the operations on tensors. Everything else that a forward does would happen once, while tracing, and never
again in a block. So it must be noticed.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves


class Opaque(Exception):
    """Raised where ``forward`` does what a graph cannot say; the text completes "it ..."."""


# Modes of the thread


def ambient() -> tuple[Any, ...]:
    """Return the modes that operations run in and that a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch.is_autocast_cache_enabled(),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")),
        torch._C._len_torch_function_stack(),
        torch.backends.cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        torch.backends.cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        torch.backends.cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        torch.backends.cudnn.enabled,
        torch.backends.mkldnn.enabled,
    )


def unlike(before: tuple[Any, ...]) -> str | None:
    """Say what forward changed if the modes are no longer as ``before``."""
    now = ambient()
    if now == before:
        return None
    if now[_SAVED_TENSORS] is not before[_SAVED_TENSORS]:
        return "checkpoints activations, which a graph would no longer do"
    return "switches gradients or autocast on or off for a part of it, or another mode of PyTorch"


_SAVED_TENSORS = 3


@contextmanager
def refusing_what_proxies_pass_through(active: Callable[[], bool]) -> Iterator[None]:
    """Raise where ``forward`` enters autocast or calls an autograd function while ``active()``.

    Proxies pass through these without a trace; ``autocast(enabled=False)`` does not even change a mode.
    """
    autocast, function = torch.amp.autocast_mode.autocast, torch.autograd.Function
    enter, apply = autocast.__enter__, function.__dict__["apply"]

    def refuse_autocast(self: Any) -> Any:
        if active():
            raise Opaque("switches gradients or autocast on or off for a part of it")
        return enter(self)  # type: ignore[no-untyped-call]

    def refuse_proxies(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if active() and any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            if cls.__module__ == torch.utils.checkpoint.__name__:
                raise Opaque("checkpoints activations, which a graph would no longer do")
            raise Opaque(f"calls the autograd function {cls.__name__}, whose backward a graph would lose")
        return apply.__get__(None, cls)(*args, **kwargs)

    autocast.__enter__ = refuse_autocast  # type: ignore[method-assign]
    function.apply = classmethod(refuse_proxies)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        autocast.__enter__ = enter  # type: ignore[method-assign]
        function.apply = apply  # type: ignore[method-assign]


# State


def random_state() -> tuple[Any, ...]:
    """Return the state of every global random generator, to be compared with ``==``."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy else ()
    return (
        torch.get_rng_state().numpy().tobytes() if numpy else torch.get_rng_state().tolist(),
        random.getstate(),
        *(part.tobytes() if hasattr(part, "tobytes") else part for part in state),
    )


def set_random_state(state: tuple[Any, ...]) -> None:
    """Set every global random generator to what :func:`random_state` returned."""
    saved, python, *numpy = state
    torch.set_rng_state(torch.tensor(list(saved), dtype=torch.uint8))
    random.setstate(python)
    if numpy:
        module = sys.modules["numpy"]
        module.random.set_state((numpy[0], module.frombuffer(numpy[1], dtype=module.uint32), *numpy[2:]))


class Snapshot:
    """What a module's attributes hold now, containers and helper objects included, to find changes and undo them."""

    def __init__(self, module: nn.Module) -> None:
        self._attributes = vars(module)
        self._parts: list[tuple[str, Any, Any]] = []  # attribute, container, its contents
        self._generators: list[tuple[str, Any, Any]] = []
        self._seen: set[int] = set()
        self._add("", self._attributes)

    def _add(self, name: str, value: Any) -> None:
        if type(value) in _WITHOUT_PARTS or id(value) in self._seen:
            return
        if isinstance(value, (dict, list, set, deque)):
            if not value and name in _HOOKS:
                return
            self._seen.add(id(value))
            contents = value.copy()
            self._parts.append((name, value, contents))
            for key, part in contents.items() if isinstance(contents, dict) else enumerate(contents):
                self._add(name or str(key), part)
        elif isinstance(value, (Tensor, nn.Module, type)) or callable(value):
            return
        elif (state := _generator_state(value)) is not None:
            self._generators.append((name, value, state))
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._add(name, vars(value))

    def changed(self) -> str | None:
        """Return the name of an attribute that is no longer what it was, None if all are."""
        for name, value, contents in self._parts:
            now = list(value.items()) if isinstance(value, dict) else list(value)
            then = list(contents.items()) if isinstance(contents, dict) else list(contents)
            same = len(now) == len(then) and all(map(_same, now, then))
            if not same:
                if value is self._attributes:
                    return next((key for key in {**contents, **value} if contents.get(key) is not value.get(key)), "")
                return name
        return next(
            (name for name, value, state in self._generators if str(_generator_state(value)) != str(state)), None
        )

    def restore(self) -> None:
        """Undo changes."""
        for _, value, state in self._generators:
            _set_generator_state(value, state)
        for _, value, contents in self._parts:
            value.clear()
            if isinstance(value, (MutableMapping, set)):
                value.update(contents)
            else:
                value.extend(contents)


def _same(now: Any, then: Any) -> bool:
    if type(now) is tuple and type(then) is tuple:  # an item of a dict
        return len(now) == len(then) and all(map(_same, now, then))
    return now is then or (type(now) in _WITHOUT_PARTS and type(now) is type(then) and now == then)


def _generator_state(value: Any) -> Any:
    """Return the state of a random generator, None if ``value`` is no generator."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    bits = getattr(value, "bit_generator", None)  # of a numpy.random.Generator
    return None if bits is None else copy.deepcopy(bits.state)


def _set_generator_state(value: Any, state: Any) -> None:
    if isinstance(value, random.Random):
        value.setstate(state)
    elif isinstance(value, torch.Generator):
        value.set_state(torch.tensor(state, dtype=torch.uint8))
    else:
        value.bit_generator.state = state


_WITHOUT_PARTS = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size}
_HOOKS = {name for name in vars(nn.Module()) if "hook" in name}


# Attributes that a forward reads


@contextmanager
def noting_reads(paths: Mapping[nn.Module, str], reader: Callable[[], str]) -> Iterator[set[tuple[str, str, str]]]:
    """Note which attributes of the modules in ``paths`` are read: what ``reader`` returns then, the path, the name."""
    reads: set[tuple[str, str, str]] = set()
    plain = object.__getattribute__

    def read(module: Any, name: str) -> Any:
        if name not in _OWN and module in paths:
            reads.add((reader(), paths[module], name))
        return plain(module, name)

    nn.Module.__getattribute__ = read  # type: ignore[method-assign]
    try:
        yield reads
    finally:
        del nn.Module.__getattribute__


_OWN = {*vars(nn.Module()), *dir(object), "forward", "__module__"} - {"training"}


def setting(module: nn.Module, name: str) -> Any:
    """Return :func:`freeze` of an attribute; None if it is no plain attribute."""
    if name in vars(module):
        return freeze(vars(module)[name])
    value = getattr(type(module), name, None)
    return None if value is None or callable(value) or hasattr(value, "__get__") else freeze(value)


def freeze(value: Any, depth: int = 4) -> Any:
    """Return ``value`` in a form that later changes do not reach and that can be compared; None if it is no setting.

    A setting is a number, a string or a function, or a container or object made of them.
    """
    kind = type(value)
    if kind in _WITHOUT_PARTS:
        return (kind, value)
    if isinstance(value, (Tensor, nn.Module)) or depth == 0:
        return None
    if isinstance(value, dict):
        return (kind, tuple((key, freeze(part, depth - 1)) for key, part in value.items()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return (kind, tuple(freeze(part, depth - 1) for part in value))
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        return (kind, value)
    if callable(value) or not isinstance(getattr(value, "__dict__", None), dict):
        return None
    return (kind, tuple((name, freeze(part, depth - 1)) for name, part in vars(value).items()))
