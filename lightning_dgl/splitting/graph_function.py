"""A graph's operations as a Python function."""

from __future__ import annotations

import importlib
import keyword
import linecache
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, fx, nn


class GraphFunction:
    """A function ``(module, x) -> output`` that does what a graph says, with whatever ``module`` holds when called.

    ``fx.GraphModule`` would hold tensors itself: it would miss a buffer that ``module.double()`` replaces. And it is
    traced again when it is unpickled.
    """

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        self._source = source
        self._names = names
        namespace = dict(names)
        file = f"<lightning_dgl {hash(source):x}>"
        # For tracebacks; and dynamo traces only code that has a file.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec"), namespace)
        self._function: Callable[[nn.Module, Tensor], Any] = namespace["forward"]

    @classmethod
    def of(cls, graph: fx.Graph) -> GraphFunction:
        """Write ``graph`` as Python source, and compile that."""
        # fx writes any path as attributes; modules may be named "global", or with quotes.
        unusual: dict[fx.Node, tuple[str, str]] = {}
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr") and any(map(_is_unusual, str(node.target).split("."))):
                unusual[node] = (f"_path_{len(unusual)}_", str(node.target))
                node.target = unusual[node][0]
        code = graph.python_code(root_module="self")
        source = code.src
        for node, (token, path) in unusual.items():
            node.target = path
            source = source.replace(f"self.{token}", _attribute(path))
        return cls(source, dict(code.globals))

    def __call__(self, module: nn.Module, x: Tensor) -> Any:
        """Run the graph's operations on ``x``."""
        return self._function(module, x)

    def __reduce__(self) -> tuple[Any, ...]:
        # Functions are pickled by name, modules are not.
        modules = {name: value.__name__ for name, value in self._names.items() if isinstance(value, ModuleType)}
        others = {name: value for name, value in self._names.items() if name not in modules}
        return (_restore, (self._source, others, modules))


def _is_unusual(name: str) -> bool:
    return keyword.iskeyword(name) or not (name.isidentifier() or name.isdecimal())


def _attribute(path: str) -> str:
    source = "self"
    for name in path.split("."):
        source = f"getattr({source}, {name!r})"
    return source


def _restore(source: str, names: dict[str, Any], modules: dict[str, str]) -> GraphFunction:
    return GraphFunction(source, {**names, **{name: importlib.import_module(path) for name, path in modules.items()}})
