"""What a forward may write to outside of the network: attributes of classes, globals, caches of functions."""

from __future__ import annotations

import operator
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

_CACHED = type(lru_cache(lambda: None))
_CONTAINERS = (dict, list, set, deque)


@contextmanager
def kept_surroundings(network: nn.Module) -> Iterator[None]:
    """Undo what happens to the classes of the network's modules and to the globals of their source files.

    A grid that a forward keeps in a global dictionary, made in a dry run, would have no data.
    """
    classes = {kind for module in network.modules() for kind in type(module).__mro__ if _is_users(kind.__module__)}
    files = {kind.__module__ for kind in classes}
    for name in list(files):  # functions from elsewhere may keep something there
        values = list(vars(sys.modules[name]).values()) if name in sys.modules else []
        kinds = (FunctionType, type)
        files |= {value.__module__ for value in values if isinstance(value, kinds) and _is_users(value.__module__)}
    owners: list[Any] = [*classes, *(sys.modules[name] for name in files if name in sys.modules)]
    names = [(owner, dict(vars(owner))) for owner in owners]
    held = {id(value): value for _, before in names for value in before.values()}.values()
    contents: list[tuple[Any, Any]] = [(value, value.copy()) for value in held if isinstance(value, _CONTAINERS)]
    caches = [(value, value.cache_info().currsize) for value in held if isinstance(value, _CACHED)]
    try:
        yield
    finally:
        for owner, before in names:
            for name in [name for name, value in vars(owner).items() if before.get(name) is not value]:
                if not isinstance(vars(owner)[name], (ModuleType, FunctionType, type)):
                    setattr(owner, name, before[name]) if name in before else delattr(owner, name)
        for value, content in contents:
            if len(value) != len(content) or any(map(operator.is_not, value, content)):
                value.clear()
                (value.extend if isinstance(value, (list, deque)) else value.update)(content)
            elif isinstance(value, dict):
                value.update({key: part for key, part in content.items() if value[key] is not part})
        for value, size in caches:
            if value.cache_info().currsize != size:
                value.cache_clear()


def _is_users(name: str | None) -> bool:
    top = str(name).partition(".")[0]
    return top not in sys.stdlib_module_names and top not in ("torch", "lightning_dgl", "numpy")
