"""Generated functions that run a module, each of which can be compiled by itself."""

from __future__ import annotations

import importlib
import linecache
from collections.abc import Callable
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn


class Code:
    """A function ``(module, x) -> output`` from Python source that reads whatever it calls from ``module``."""

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        self._source = source
        self._names = names
        namespace = dict(names)
        file = f"<lightning_dgl {hash(source):x}>"
        # For tracebacks; and only what has a file does dynamo take for a piece of code of its own.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec"), namespace)
        self._function: Callable[[nn.Module, Tensor], Any] = namespace["forward"]

    @classmethod
    def of_graph(cls, graph: fx.Graph) -> Code:
        """Write down what ``graph`` does."""
        code = graph.python_code(root_module="self")
        return cls(code.src, dict(code.globals))

    @classmethod
    def of_call(cls) -> Code:
        """Call the module."""
        return cls("def forward(self, x):\n    return self(x)\n", {})

    def __call__(self, module: nn.Module, x: Tensor, compiled: bool) -> Any:
        """Run it as it is written, or through ``torch.compile``."""
        return (self._compiled if compiled else self._function)(module, x)

    @cached_property
    def _compiled(self) -> Callable[[nn.Module, Tensor], Any]:
        # Its graphs are kept with this function alone, so that they do not count towards the number that another block,
        # or another module of the same class, may have (eight in torch).
        return torch.compile(self._function)

    def __deepcopy__(self, memo: dict[int, Any]) -> Code:
        return self  # the module is an argument, so a copied one is as good

    def __reduce__(self) -> tuple[Any, ...]:
        modules = {name: value.__name__ for name, value in self._names.items() if isinstance(value, ModuleType)}
        others = {name: value for name, value in self._names.items() if name not in modules}
        return (_restore, (self._source, others, modules))


def _restore(source: str, names: dict[str, Any], modules: dict[str, str]) -> Code:
    return Code(source, {**names, **{name: importlib.import_module(path) for name, path in modules.items()}})
