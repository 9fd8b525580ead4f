"""Networks and modules that are not traced, whatever their forward does."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_dgl.splitting.watching import Opaque


def refuse_kind(network: nn.Module) -> None:
    """Refuse networks of which a copy cannot be traced, whatever their forward does."""
    remedy = None
    if isinstance(network, torch.jit.ScriptModule):
        remedy, text = "Pass the network that TorchScript was made from.", "is TorchScript"
    elif "_orig_mod" in network._modules:
        remedy = "Pass the network itself (network._orig_mod) and compile the blocks: block.compile()."
        text = "is compiled with torch.compile"
    elif any(
        isinstance(p, (UninitializedBuffer, UninitializedParameter))
        for p in (*network.parameters(), *network.buffers())
    ):
        remedy = "Run the network once on a batch before you split it; that gives lazy layers their shapes."
        text = "has lazy layers without shapes"
    elif _takes_more_inputs(network):
        remedy = "Wrap it in a module whose forward takes one tensor, for example a batch of pairs, and takes it apart."
        text = "takes more than one input"
    if remedy is not None:
        error = Opaque(text)
        error.remedy = remedy  # type: ignore[attr-defined]
        raise error


def _takes_more_inputs(network: nn.Module) -> bool:
    parameters = list(inspect.signature(network.forward).parameters.values())
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(p.default is p.empty and p.kind not in fixed for p in parameters) > 1


def refuse_hooks(module: nn.Module, text: str = "which would not run if it were cut inside") -> None:
    """Raise if ``module`` has hooks."""
    if has_hooks(module):
        error = Opaque(f"has hooks, {text}")
        error.remedy = (  # type: ignore[attr-defined]
            "Remove them (handle.remove()), or register them on submodules: one that is not cut inside keeps its hooks."
        )
        raise error


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling ``module`` runs hooks beside its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
