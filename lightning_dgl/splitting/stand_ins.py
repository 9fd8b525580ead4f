"""What stands in for tensors, sizes and modes while a forward is traced."""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

from torch.fx.proxy import Attribute, Proxy

from lightning_dgl.splitting.sizes import ATTRIBUTES


class ReadsMode(BaseException):
    """Raised where a traced ``forward`` reads ``self.training``: then each mode is traced."""


class HiddenMode:
    """Stands in for ``module.training`` while tracing: a graph would freeze the mode that was read."""

    __slots__ = ("read",)

    def __init__(self, read: Callable[[], bool]) -> None:
        self.read = read  # raises where the mode must not be read

    # By condition, comparison, index or number, and dictionary key.

    def __bool__(self) -> bool:
        return self.read()

    def __eq__(self, other: object) -> bool:
        return self.read() == other

    def __index__(self) -> int:
        return int(self.read())

    def __hash__(self) -> int:
        return hash(self.read())


class InPlaceProxy(Proxy):
    """Records augmented and item assignment as they are; a plain Proxy turns ``x += 1`` into ``x = x + 1``."""

    tracer: Any

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        return self.tracer.length(self, "takes len() of a tensor (write x.shape[0] instead)")

    def __index__(self) -> int:
        return self.tracer.number(self, int)

    __int__ = __index__

    def __float__(self) -> float:
        return self.tracer.number(self, float)

    def __getattr__(self, name: str) -> Any:
        attribute = _InPlaceAttribute(self, name)
        if name in ATTRIBUTES:
            _ = attribute.node  # recorded where it is read, not where it is used
        return attribute


def _record(self: Proxy, other: Any, function: Callable[..., Any]) -> Proxy:
    return self.tracer.create_proxy("call_function", function, (self, other), {})


class _InPlaceAttribute(Attribute, InPlaceProxy):
    """An attribute of a proxy, such as its shape."""


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(InPlaceProxy, f"__{_name}__", partialmethod(_record, function=getattr(operator, _name)))


@contextmanager
def instances_of_what_proxies_stand_for(tracer: Any) -> Iterator[None]:
    """Have ``isinstance(proxy, Tensor)`` and the like be what they are for the value, in everything but PyTorch."""
    plain = builtins.isinstance

    def is_instance(value: Any, kind: Any, /) -> bool:
        if plain(value, Proxy) and not plain(value, kind):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith(("torch.", "lightning_dgl.")):
                return plain(tracer.value(value.node), kind)
        return plain(value, kind)

    builtins.isinstance = is_instance  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.isinstance = plain
