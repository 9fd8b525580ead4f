"""A graph's operations as a Python function."""

from __future__ import annotations

import importlib
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
        code = graph.python_code(root_module="self")
        return cls(code.src, dict(code.globals))

    def __call__(self, module: nn.Module, x: Tensor) -> Any:
        """Run the graph's operations on ``x``."""
        return self._function(module, x)

    def __reduce__(self) -> tuple[Any, ...]:
        # Functions are pickled by name, modules are not.
        modules = {name: value.__name__ for name, value in self._names.items() if isinstance(value, ModuleType)}
        others = {name: value for name, value in self._names.items() if name not in modules}
        return (_restore, (self._source, others, modules))


def _restore(source: str, names: dict[str, Any], modules: dict[str, str]) -> GraphFunction:
    return GraphFunction(source, {**names, **{name: importlib.import_module(path) for name, path in modules.items()}})
