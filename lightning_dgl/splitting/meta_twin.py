"""Dry runs: running a network on tensors without data, to learn shapes, FLOPs and in-place changes.

A dry run takes place on the network's *meta twin*, a copy with all tensors on PyTorch's "meta" device: they have a
shape, a dtype and a version counter, but no memory. So nothing is computed, and whatever the run changes, it changes in
the twin; the network itself needs no restoring. Nor does it start threads or look for a GPU, after which the process
could not fork.

Where an operation needs data, a copy with data is run instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_dgl.splitting.copying import as_kind_of, clone_tensors, copy_network
from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.network_state import preserved_random
from lightning_dgl.splitting.surroundings import kept_surroundings

T = TypeVar("T")


def meta_twin(network: nn.Module) -> nn.Module:
    """Copy ``network`` with every parameter, buffer and other tensor attribute on the meta device."""
    return copy_network(network, lambda tensor: as_kind_of(tensor, torch.empty_like(tensor, device="meta").detach()))


def real_twin(network: nn.Module) -> nn.Module:
    """Copy ``network`` with the values of its tensors."""
    return copy_network(network, clone_tensors())


@contextmanager
def without_data() -> Iterator[None]:
    """Run a meta twin: tensors that its forward makes are on the meta device, too."""
    with torch.no_grad(), torch.device("meta"), preserved_random():
        yield


def dry_run(network: nn.Module, example_input: Tensor, training: bool, run: Callable[[nn.Module, Tensor], T]) -> T:
    """Call ``run`` with the twin of ``network`` and of the example; ``network`` stays as it was.

    Where that fails, ``run`` is called with copies of ``network`` and the example that have data.

    Raises:
        SplitError: if ``run`` fails there, too.
    """
    try:
        twin = meta_twin(network).train(training)
        with kept_surroundings(network), without_data():
            return run(twin, example_input.to("meta"))
    except Exception:  # an operation that needs data, or an input that does not fit: real tensors will tell
        pass
    try:
        with kept_surroundings(network), preserved_random(network), torch.no_grad():
            return run(real_twin(network).train(training), example_input.clone())
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
