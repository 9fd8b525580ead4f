"""Running a network to learn about it, and leaving no trace of having done so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from lightning_dgl.splitting.errors import SplitError

T = TypeVar("T")


def example_batch(network: nn.Module, example_input: Tensor | Sequence[int]) -> Tensor:
    """``example_input`` (or zeros of that shape) as a batch of at least two: BatchNorm cannot train on one sample.

    Raises:
        SplitError: if it is not a batch, or not on the network's device.
    """
    device = next((p.device for p in network.parameters()), None)
    if isinstance(example_input, (tuple, list)) and example_input and all(isinstance(n, int) for n in example_input):
        example_input = torch.zeros(*example_input, device=device)
    if not isinstance(example_input, Tensor) or example_input.ndim < 2 or len(example_input) < 1:
        given = f"shape {tuple(example_input.shape)}" if isinstance(example_input, Tensor) else repr(example_input)
        raise SplitError(
            "example_input must be a batch of inputs such as torch.zeros(2, 3, 32, 32), batch dimension first, got "
            f"{given}."
        )
    if device is not None and device != example_input.device:
        raise SplitError(
            f"example_input is on {example_input.device}, but the network is on {device}. Move one of them, e.g. "
            f"example_input.to({str(device)!r})."
        )
    return torch.cat([example_input, example_input]) if len(example_input) == 1 else example_input


def output_shape(network: nn.Module, example_input: Tensor, training: bool) -> tuple[int, ...] | None:
    """Shape of what ``network`` returns, None if that is not one tensor; the network is not changed.

    Raises:
        SplitError: if the example does not pass through the network.
    """
    output = dry_run(network, example_input, training, network)
    return tuple(output.shape) if isinstance(output, Tensor) else None


def dry_run(network: nn.Module, example_input: Tensor, training: bool, run: Callable[[Tensor], T]) -> T:
    """Call ``run`` on a fake of the example, or on the example where that fails, and leave ``network`` as it was.

    Raises:
        SplitError: if ``run`` fails on the example, too.
    """
    fake = FakeRun(network)
    with in_mode(network, training):
        try:
            with fake.active():
                return run(fake.fake(example_input))
        except Exception:  # an operation without a fake kernel, or an input that does not fit: real tensors will tell
            pass
        try:
            with preserved_state(network), torch.no_grad():
                return run(example_input.clone())
        except Exception as error:
            raise SplitError(
                f"example_input of shape {tuple(example_input.shape)} and dtype {example_input.dtype} does not pass "
                f"through {type(network).__name__} in {'train' if training else 'eval'} mode ({type(error).__name__}: "
                f"{error}). Pass a batch that the network accepts."
            ) from error


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


class _FakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """As it is, but for one thing: where there is no GPU, the original makes PyTorch act as if there were eight.

    Autograd then starts a thread for each, and a process with these threads cannot fork ranks.
    """

    avoid_device_init = property(lambda self: False, lambda self, value: None)


class FakeRun:
    """A context in which the network runs on fake tensors: shapes are exact, nothing is computed or changed.

    Parameters and buffers are replaced by fake ones inside the context, because a fake run on the real ones would
    still count up ``num_batches_tracked``.
    """

    def __init__(self, network: nn.Module) -> None:
        self.mode = _FakeMode(allow_non_fake_inputs=True)
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
        """Let the network's parameters and buffers be fake."""
        saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
        try:
            for module in self._network.modules():
                stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                for store in stores:
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
