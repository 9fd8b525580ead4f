"""Hide tensors whose values another rank changes: reading them raises an error instead of giving old values.

A hidden tensor is the same object with another class, as torch does for parameters that are not initialised yet. What
does not depend on its values stays readable: shapes, dtypes, devices, and whether it takes gradients.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_DESCRIPTIONS = (
    *("shape", "dtype", "device", "layout", "ndim", "names", "itemsize", "nbytes", "requires_grad", "is_leaf"),
    *("is_cpu", "is_cuda", "is_mps", "is_xpu", "is_xla", "is_hpu", "is_mkldnn", "is_meta", "is_nested", "is_quantized"),
    *("is_sparse", "is_sparse_csr", "grad_fn", "output_nr", "_backward_hooks", "_post_accumulate_grad_hooks"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "get_device"),
    *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_inference", "type", "__len__"),
    *("requires_grad_", "register_hook", "register_post_accumulate_grad_hook"),
)
_HARMLESS: set[Any] = {
    *(getattr(Tensor, name).__get__ for name in _DESCRIPTIONS if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)),
    *(
        getattr(Tensor, name).__set__
        for name in ("requires_grad", "grad", "_backward_hooks", "_post_accumulate_grad_hooks")
    ),
}
"""What may be done with a hidden tensor: nothing of it reads values, weights or gradients."""
_WRITES = {Tensor.copy_, Tensor.zero_, Tensor.fill_}
"""What gives all elements of a tensor new values, as ``load_state_dict`` does."""


class _Hidden:
    """Marks the classes of hidden tensors."""


def hide(tensors: Iterable[Tensor], why: str, until_written: bool = False) -> None:
    """Let whoever reads the values of ``tensors`` or their gradients get a RuntimeError that says ``why``.

    Args:
        tensors: to hide; those that are hidden already stay so, with their own reason.
        why: the message.
        until_written: whether a tensor that is given other values may be read again.
    """
    for tensor in tensors:
        if not isinstance(tensor, _Hidden):
            tensor.__class__ = _hidden_class(type(tensor), why, until_written)


def show(tensors: Iterable[Tensor]) -> None:
    """Let ``tensors`` be read again."""
    for tensor in tensors:
        if isinstance(tensor, _Hidden):
            tensor.__class__ = type(tensor).__mro__[2]


@cache
def _hidden_class(kind: type[Tensor], why: str, until_written: bool) -> type[Tensor]:
    def torch_function(
        cls: type, function: Callable[..., Any], _: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        if until_written and function in _WRITES and isinstance(args[0], _Hidden):
            show(args[:1])
            return function(*args, **(kwargs or {}))
        raise RuntimeError(why)

    body: dict[str, Any] = {
        "__torch_function__": classmethod(torch_function),
        "__repr__": lambda self: f"<{kind.__name__} of shape {tuple(self.shape)}: {why}>",
        "__reduce_ex__": lambda self, protocol: _raise(why),
    }
    return types.new_class(f"Hidden{kind.__name__}", (_Hidden, kind), {}, lambda namespace: namespace.update(body))


def _raise(why: str) -> Any:
    raise RuntimeError(why)
