"""Copies of a network to trace and to try out, so that a look at a network never changes it.

Whatever a forward stores - attributes, caches, buffers, flags of a first call - it stores in the copy.
"""

from __future__ import annotations

import copy
import functools
from collections import ChainMap, deque
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

CopyTensor = Callable[[Tensor], Tensor]

_ATOMIC = {type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.memory_format}


def copy_network(network: nn.Module, copy_tensor: CopyTensor) -> nn.Module:
    """Copy ``network`` with everything that its modules hold; ``copy_tensor`` makes the copy of each tensor.

    ``copy.deepcopy`` would refuse tensors that are results, and attributes such as locks. Here modules that share an
    object share its copy, and what cannot be copied is shared with the network.
    """
    copier = _Copier(copy_tensor)
    # First all modules, then their parts: parts refer to modules, in any order.
    modules = [module for module in network.modules() if not isinstance(module, torch.jit.ScriptModule)]
    for module in modules:
        copier.remember(module, object.__new__(type(module)))
    for module in modules:
        copier.fill(module)
    copied = copier(network)
    assert isinstance(copied, nn.Module)
    return copied


def clone_tensors() -> CopyTensor:
    """Return a function that copies tensors with their data; tensors that share memory have copies that do, too."""
    storages: dict[int, tuple[Any, Any]] = {}

    def clone(tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
            return copy.deepcopy(tensor)
        with torch.no_grad(), torch.inference_mode(False):
            storage = tensor.untyped_storage()
            if storage._cdata not in storages:
                storages[storage._cdata] = (storage, storage.clone())  # type: ignore[no-untyped-call]
            data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            data.set_(storages[storage._cdata][1], tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]
        return as_kind_of(tensor, data)

    return clone


def as_kind_of(tensor: Tensor, data: Tensor) -> Tensor:
    """Make ``data`` a parameter if ``tensor`` is one, and require gradients if it does."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data.requires_grad_(tensor.requires_grad)


class _Copier:
    """Copies objects, each once."""

    def __init__(self, copy_tensor: CopyTensor) -> None:
        self._copy_tensor = copy_tensor
        self._memo: dict[int, Any] = {}  # by id, as copy.deepcopy wants it
        self._alive: list[Any] = []  # so that ids stay unique

    def remember(self, original: Any, copied: Any) -> Any:
        self._memo[id(original)] = copied
        self._alive.append(original)
        return copied

    def fill(self, original: Any) -> None:
        """Copy the attributes of ``original`` to its copy."""
        attributes = vars(self._memo[id(original)])
        for name, value in vars(original).items():
            # A compiled call would run the original. Uncompiled, a module computes the same.
            attributes[name] = None if name == "_compiled_call_impl" else self(value)
        if "_orig_mod" in vars(original).get("_modules", ()):  # what torch.compile(module) returns
            attributes["forward"] = self(original._modules["_orig_mod"]).forward

    def __call__(self, value: Any) -> Any:
        if type(value) in _ATOMIC:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, Tensor):
            return self.remember(value, self._copy_tensor(value))
        if isinstance(value, torch.jit.ScriptModule):
            return self.remember(value, copy.deepcopy(value))
        if isinstance(value, torch.Generator):
            return self.remember(value, value.clone_state())
        if isinstance(value, nn.Module):  # not registered as a submodule
            copied = self.remember(value, object.__new__(type(value)))
            self.fill(value)
            return copied
        if isinstance(value, dict):
            return self._container(value, "update", lambda: {self(key): self(part) for key, part in value.items()})
        if isinstance(value, (list, deque)):
            return self._container(value, "extend", lambda: [self(part) for part in value])
        if isinstance(value, set):
            return self._container(value, "update", lambda: {self(part) for part in value})
        if type(value) is tuple:
            return tuple(self(part) for part in value)
        if isinstance(value, MethodType):
            return MethodType(self(value.__func__), self(value.__self__))
        if isinstance(value, functools.partial):
            return functools.partial(self(value.func), *map(self, value.args), **self(value.keywords))
        if isinstance(value, FunctionType):
            return self._function(value)
        return self._object(value)

    def _container(self, value: Any, add: str, parts: Callable[[], Any]) -> Any:
        # A shallow copy keeps the class, and what it keeps beside the parts.
        try:
            copied = copy.copy(value)
            copied.clear()
        except Exception:
            return value
        self.remember(value, copied)
        getattr(copied, add)(parts())
        return copied

    def _function(self, function: FunctionType) -> Any:
        """Copy a function if it encloses a part of the network, or something that it can write to."""
        cells = function.__closure__ or ()
        enclosed = [cell.cell_contents for cell in cells if cell != CellType()]
        kinds = (nn.Module, MethodType, dict, list, set, deque)
        if len(enclosed) < len(cells) or not any(isinstance(value, kinds) for value in enclosed):
            return function
        closure = tuple(CellType() for _ in enclosed)
        copied = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
        )
        copied.__kwdefaults__ = function.__kwdefaults__
        copied.__dict__.update(function.__dict__)
        self.remember(function, copied)
        for cell, value in zip(closure, enclosed, strict=True):
            cell.cell_contents = self(value) if isinstance(value, kinds) else value
        return copied

    def _object(self, value: Any) -> Any:
        attempt = ChainMap[Any, Any]({}, self._memo)
        try:
            copied = copy.deepcopy(value, attempt)  # type: ignore[arg-type]
        except Exception:  # a part of it, such as a lock, cannot be copied
            return self._by_parts(value)
        self._memo.update(attempt.maps[0])
        self._alive.append(value)
        return copied

    def _by_parts(self, value: Any) -> Any:
        try:
            copied = object.__new__(type(value))
            attributes = vars(value)
        except TypeError:
            return value
        self.remember(value, copied)
        vars(copied).update({name: self(part) for name, part in attributes.items()})
        return copied
