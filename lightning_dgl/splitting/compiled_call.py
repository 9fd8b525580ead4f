"""Calls through ``torch.compile`` that survive copying and pickling."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import count
from types import FunctionType
from typing import Any

import torch

_numbers = count()


class CompiledCall:
    """Call a function or module through ``torch.compile``, which compiles it at the first call.

    Use one object for each function or module. A deep copy, or an object read from a pickle, compiles once more;
    ``nn.Module.compile`` would be forgotten there.
    """

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``."""
        return self._compiled(function, *args)

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        # torch keeps at most eight graphs for one piece of code, and all blocks, and all heads of a class, run the same
        # code. A copied function has code of its own, and with it eight graphs of its own. (From torch 2.13 on,
        # torch.compile(..., isolate_recompiles=True) does the same.) A name of its own, too: by it torch remembers
        # which sizes have varied, and would compile a block for any size because another block's differs.
        return torch.compile(FunctionType(_call.__code__.replace(co_name=f"_call_{next(_numbers)}"), globals()))

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
