"""Running a network to learn about it, and leaving no trace of having done so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only


@contextmanager
def in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Put ``network`` in train or eval mode, and every submodule back in its own mode afterwards."""
    before = {module: module.training for module in network.modules()}
    network.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def preserved_state(network: nn.Module) -> Iterator[None]:
    """Undo what running the network does to its buffers (BatchNorm statistics) and to the random generators."""
    saved = [(buffer, buffer.clone()) for buffer in network.buffers()]
    devices = {tensor.device for tensor in (*network.parameters(), *network.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)


class FakeRun:
    """A context in which the network runs on fake tensors: shapes are exact, nothing is computed or changed.

    Parameters and buffers are replaced by fake ones inside the context, because a fake run on the real ones would
    still count up ``num_batches_tracked``.
    """

    def __init__(self, network: nn.Module) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._network = network
        self._fakes: dict[int, Tensor] = {}

    def fake(self, value: Any) -> Any:
        """``value`` with every tensor in it replaced by its fake twin (one twin for each tensor)."""
        return tree_map_only(Tensor, self._fake_tensor, value)

    def _fake_tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._fakes:
            self._fakes[id(tensor)] = self.mode.from_tensor(tensor)
        return self._fakes[id(tensor)]

    @contextmanager
    def active(self) -> Iterator[None]:
        saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
        try:
            for module in self._network.modules():
                for store in (module._parameters, module._buffers):
                    if store:
                        saved.append((store, dict(store)))
                        for name, value in store.items():
                            if value is not None:
                                store[name] = self._fake_tensor(value)
            with torch.no_grad(), self.mode:
                yield
        finally:
            for store, values in saved:
                store.update(values)
