"""Dry runs: running a network on tensors without data, to learn shapes, FLOPs and in-place changes.

A dry run takes place on the network's *meta twin*, a copy with all tensors on PyTorch's "meta" device: they have a
shape, a dtype and a version counter, but no memory. So nothing is computed, and whatever the run changes, it changes in
the twin; the network itself needs no restoring. Nor does it start threads or look for a GPU, after which the process
could not fork.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.network_state import in_mode, preserved_state

T = TypeVar("T")


def meta_twin(network: nn.Module) -> nn.Module:
    """Copy ``network`` with every parameter, buffer and other tensor attribute on the meta device.

    Modules that share a tensor share its twin, too. An attribute that cannot be copied, such as a lock, is shared with
    the network.
    """
    modules = list(network.modules())
    tensors = [
        value
        for module in modules
        for store in (module._parameters, module._buffers, vars(module))
        for value in store.values()
        if isinstance(value, Tensor)
    ]
    # deepcopy takes what it finds here for copied already. The lists keep the originals alive: ids stay unique.
    memo: dict[int, Any] = {id(tensor): _meta_tensor(tensor) for tensor in tensors}
    memo.update({id(module): object.__new__(type(module)) for module in modules})
    for module in modules:
        attributes = vars(memo[id(module)])
        for name, value in vars(module).items():
            try:
                attributes[name] = copy.deepcopy(value, memo)
            except Exception:
                attributes[name] = value
    return memo[id(network)]


def _meta_tensor(tensor: Tensor) -> Tensor:
    twin = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin.requires_grad_(tensor.requires_grad)


@contextmanager
def without_data() -> Iterator[None]:
    """Run a meta twin: tensors that its forward makes are on the meta device, too."""
    with torch.no_grad(), torch.device("meta"), torch.random.fork_rng(devices=[]):
        yield


def dry_run(network: nn.Module, example_input: Tensor, training: bool, run: Callable[[nn.Module, Tensor], T]) -> T:
    """Call ``run`` with the twin of ``network`` and of the example; ``network`` stays as it was.

    Where that fails, ``run`` is called with ``network`` and the example themselves, and their state restored.

    Raises:
        SplitError: if ``run`` fails there, too.
    """
    try:
        twin = meta_twin(network).train(training)
        with without_data():
            return run(twin, example_input.to("meta"))
    except Exception:  # an operation that needs data, or an input that does not fit: real tensors will tell
        pass
    try:
        with in_mode(network, training), preserved_state(network), torch.no_grad():
            return run(network, example_input.clone())
    except Exception as error:
        raise SplitError(
            f"example_input of shape {tuple(example_input.shape)} and dtype {example_input.dtype} does not pass "
            f"through {type(network).__name__} in {'train' if training else 'eval'} mode ({type(error).__name__}: "
            f"{error}). Pass a batch that the network accepts."
        ) from error


def output_shape(network: nn.Module, example_input: Tensor, training: bool) -> tuple[int, ...] | None:
    """Return the shape of the network's output, or None if that is not one tensor; the network is not changed.

    Raises:
        SplitError: if the example does not pass through the network.
    """
    output = dry_run(network, example_input, training, lambda network, x: network(x))
    return tuple(output.shape) if isinstance(output, Tensor) else None
