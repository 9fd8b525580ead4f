"""Sizes: what a forward reads of a tensor beside its values, and how blocks get it right.

A size, a device or a dtype that is read before a cut and used after it is no tensor that crosses. The next block makes
it again: what grows with the batch from the batch that arrives, everything else as it was for the example. The block
before the cut checks that this is what the forward had found, and a branch on a size checks that it goes as it did for
the example. So other sizes than those of the example give the right result or an error.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.meta_twin import meta_twin, real_twin, without_data
from lightning_dgl.splitting.network_state import preserved_random
from lightning_dgl.splitting.trace import run_node

# Which operations give sizes

_DEVICE_ATTRIBUTES = ("device", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu")
ATTRIBUTES = {*_DEVICE_ATTRIBUTES, "shape", "ndim", "dtype", "layout"}
_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "get_device", "element_size", "is_contiguous"}
_METHODS |= {"is_floating_point", "is_complex"}
_FUNCTIONS = {torch.numel, torch.is_floating_point, torch.is_complex, len}
_MODULES = {"_operator", "operator", "builtins", "math"}


def is_static(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Return whether ``node`` is made of sizes, devices and dtypes alone, not of the values of tensors."""
    if node not in known:
        inputs = node.all_input_nodes
        if (
            (node.op == "call_function" and node.target is getattr and node.args[1] in ATTRIBUTES)
            or (node.op == "call_method" and node.target in _METHODS)
            or node.target in _FUNCTIONS
        ):
            known[node] = True
        elif node.op in ("call_function", "call_method") and inputs:
            pure = node.op == "call_method" or node.target in _CHECKS
            pure = pure or getattr(node.target, "__module__", None) in _MODULES or node.target is torch.Size
            known[node] = pure and all(is_static(source, known) for source in inputs)
        else:
            known[node] = False
    return known[node]


class Values:
    """The values of a trace's nodes for one batch, found when asked for: sizes are numbers, tensors have no data."""

    def __init__(self, network: nn.Module, batch: Tensor) -> None:
        self._network = network
        self._batch = batch
        self._twin: nn.Module | None = None
        self._real = False
        self._values: dict[fx.Node, Any] = {}

    def __getitem__(self, node: fx.Node) -> Any:
        if node in self._values:
            return self._values[node]
        if not self._real:
            try:
                self._twin = self._twin or meta_twin(self._network)
                with without_data():
                    return self._evaluate(self._twin, node)
            except Exception:  # an operation needs data
                self._twin, self._real, self._values = None, True, {}
        self._twin = self._twin or real_twin(self._network)
        with preserved_random(self._network), torch.no_grad():
            return self._evaluate(self._twin, node)

    def _evaluate(self, twin: nn.Module, node: fx.Node) -> Any:
        stack = [node]
        while stack:
            missing = [source for source in stack[-1].all_input_nodes if source not in self._values]
            if missing:
                stack += missing
            elif stack[-1] in self._values:
                stack.pop()
            else:
                here = stack.pop()
                self._values[here] = self._compute(twin, here)
        return self._values[node]

    def _compute(self, twin: nn.Module, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._batch.clone() if self._real else self._batch.to("meta")
        if node.target is getattr and node.args[1] in _DEVICE_ATTRIBUTES:
            # Conditions on the device are those of the network's device, not of meta.
            return getattr(self._batch, str(node.args[1]))
        values = {source: self._values[source] for source in node.all_input_nodes}
        if not self._real and node.target not in (getattr, operator.eq, operator.ne):  # what is made, is made on meta
            values = {k: torch.device("meta") if isinstance(v, torch.device) else v for k, v in values.items()}
        return run_node(twin, node, values)


# Branches, and sizes that are used as numbers


def same_branch(condition: Any, taken: bool, where: str) -> None:
    """Raise if a branch on sizes goes another way than it did for the example."""
    if bool(condition) is not taken:
        raise SplitError(
            f"{where} branches on the size of its input, which goes another way here than for example_input. Split "
            "with an example_input of this size, or resize the batch."
        )


def same_number(number: Any, expected: Any, where: str) -> None:
    """Raise if a size that the forward used as a number is not what it was for the example."""
    if number != expected:
        raise SplitError(
            f"{where} depends on a size of its input: {expected} for example_input, {number} here. Split with an "
            "example_input of this size, or resize the batch."
        )


# Sizes that cross a cut


def recipe(value: Any, other: Any, batches: tuple[int, int]) -> Any:
    """Say how to make ``value`` again from the tensor that crosses; ``other`` is its value for another batch size.

    Returns:
        A nested tuple that a graph can hold, for :func:`again`; None if there is no way.
    """
    if isinstance(value, torch.device):
        return ("device",)
    if isinstance(value, (tuple, list)) and type(other) is type(value) and len(other) == len(value):
        parts = tuple(recipe(a, b, batches) for a, b in zip(value, other, strict=True))
        return None if None in parts else (_KINDS.get(type(value)), *parts) if type(value) in _KINDS else None
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.layout)):
        if value == other:
            return ("as it was", value)
        factor, rest = divmod(value, batches[0]) if isinstance(value, int) else (0, 1)
        if not rest and other == factor * batches[1]:
            return ("for each sample", factor)
    return None


_KINDS: dict[type, str] = {tuple: "tuple", list: "list", torch.Size: "size"}
_MAKERS: dict[str, Any] = {"tuple": tuple, "list": list, "size": torch.Size}


def again(recipe: tuple[Any, ...], crossing: Tensor) -> Any:
    """Make a size, device or dtype again."""
    kind = recipe[0]
    if kind == "as it was":
        return recipe[1]
    if kind == "for each sample":
        return crossing.shape[0] * recipe[1]
    if kind == "device":
        return crossing.device
    return _MAKERS[kind]([again(part, crossing) for part in recipe[1:]])


def check_again(value: Any, recipe: tuple[Any, ...], crossing: Tensor) -> None:
    """Raise if the next block would make another value."""
    made = again(recipe, crossing)
    if value != made:
        raise SplitError(
            f"A size (or dtype) that is read before a cut and used after it is {value} for this batch, but {made} "
            "for example_input. Split with an example_input like this batch, or give batches the size of the example."
        )


_CHECKS = {same_branch, same_number, check_again}
