"""Judging places to cut: how natural a cut is, and which dimension of its tensor holds channels."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from lightning_dgl.splitting.trace import Trace

_ACTIVATIONS = {
    *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "prelu", "relu", "relu6"),
    *("rrelu", "selu", "sigmoid", "silu", "softplus", "swish", "tanh", "threshold"),
}
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)


def is_composite(module: nn.Module) -> bool:
    """Return whether ``module`` has children and does more than call them one after another."""
    return next(module.children(), None) is not None and type(module).forward is not nn.Sequential.forward


def rank_of(network: nn.Module, trace: Trace, node: fx.Node, position: int) -> int:
    """Return the rank that :class:`SplitPoint` describes."""
    returns = (call for i, call in enumerate(trace.returns) if i not in trace.passed)
    returned_by = [network.get_submodule(path) for path, returned in returns if returned is node]
    rank = 0 if any(is_composite(module) for module in returned_by) else _operation_rank(network, node)
    # Inside a module of a repeated class, such as a residual block, a cut takes apart what the author made one piece.
    classes = Counter(type(network.get_submodule(path)) for path, _, _ in trace.spans)
    inside = [network.get_submodule(path) for path, start, stop in trace.spans if start <= position < stop]
    return rank + any(is_composite(module) and classes[type(module)] > 1 for module in inside)


def _operation_rank(network: nn.Module, node: fx.Node) -> int:
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            return 3
        return 1 if type(module).__name__.lower() in _ACTIVATIONS else 2
    name = _operation(node)
    if name.startswith("conv") or name == "linear":
        return 3
    return 1 if name.rstrip("_") in _ACTIVATIONS else 2


def channel_dim_of(network: nn.Module, node: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]) -> int:
    """Return which dimension of ``node`` holds the channels, going by the layers around it, else by its shape.

    Walk from ``node`` to the operations that read it, through those that keep its shape (activations, sums), until a
    layer tells by its kind: a convolution has channels at 1, a linear layer at -1. If none does, walk the other way.
    """
    shape = shapes[node]
    if len(shape) == 2:
        return 1
    for forwards in (True, False):
        seen, queue = {node}, [node]
        while queue:
            here = queue.pop(0)
            for other in here.users if forwards else here.all_input_nodes:
                kind = _layout(network, other)
                if kind is not None and shapes.get(other, ())[:1] == shape[:1]:
                    return kind
                moves = _operation(other) in _MOVES_DIMS
                if shapes.get(other) == shape and other not in seen and kind is None and not moves:
                    seen.add(other)
                    queue.append(other)
    # No layer tells. Images are square more often than not: (N, H, H, C) is channels last.
    if len(shape) == 4 and not (shape[1] == shape[2] != shape[3]):
        return 1
    return -1


def _layout(network: nn.Module, node: fx.Node) -> int | None:
    """Return the dimension at which the layer ``node`` has channels, None if any would do."""
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if isinstance(module, _CHANNELS_FIRST):
            return 1
        if isinstance(module, _CHANNELS_LAST):
            return -1
    elif _operation(node) in ("conv1d", "conv2d", "conv3d", "batch_norm", "group_norm", "instance_norm"):
        return 1
    elif _operation(node) in ("linear", "layer_norm", "scaled_dot_product_attention"):
        return -1
    return None


_MOVES_DIMS = ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "flatten", "reshape", "view")


def _operation(node: fx.Node) -> str:
    """Return the name of the function or method that ``node`` calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
