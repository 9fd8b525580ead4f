"""What the tests of splitting share: the comparison of blocks with their network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def compose(blocks: nn.ModuleList, x: Tensor) -> Any:
    """Run the blocks one after another, and check that none overwrites what an earlier one returned."""
    crossing: list[tuple[Tensor, int]] = []
    for block in blocks:
        x = block(x)
        crossing.append((x, x._version if isinstance(x, Tensor) else 0))
    for j, (tensor, version) in enumerate(crossing[:-1]):
        assert tensor._version == version, f"the output of block {j} was overwritten"
    return x


def assert_same(names: Sequence[str], actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Bit for bit, and None where None is expected."""
    for name, a, b in zip(names, actual, expected, strict=True):
        same = a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b)
        assert same, f"{name} differs"


def assert_equivalent(
    network: nn.Module, blocks: nn.ModuleList, x: Tensor, *, gradients: bool = True, enter: Callable[[], Any] = int
) -> set[str]:
    """Assert that the blocks return what the network returns, and leave the same gradients and buffers behind.

    Args:
        enter: called between the two runs; a chance to set the mode of the blocks by other means than the network's.

    Returns:
        The names of the parameters that had a gradient.
    """
    parameter_names = [name for name, _ in network.named_parameters()]
    buffer_names = [name for name, _ in network.named_buffers()]
    buffers = [buffer.clone() for buffer in network.buffers()]

    def run(forward: Callable[[Tensor], Any]) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        torch.manual_seed(0)
        with torch.set_grad_enabled(gradients):
            outputs = [output for output in tree_leaves(forward(x.clone())) if output is not None]
            if gradients:
                torch.stack([output.square().mean() for output in outputs]).sum().backward()
        left = [buffer.clone() for buffer in network.buffers()]
        found = [parameter.grad for parameter in network.parameters()]
        network.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(network.buffers(), buffers, strict=True):
                buffer.copy_(value)
        return [output.detach() for output in outputs], found, left

    expected = run(network)
    enter()
    actual = run(lambda x: compose(blocks, x))
    assert_same([f"output {i}" for i in range(len(expected[0]))], actual[0], expected[0])
    if gradients:
        assert any(grad is not None and grad.any() for grad in expected[1]), "there is nothing to compare"
    assert_same(parameter_names, actual[1], expected[1])
    assert_same(buffer_names, actual[2], expected[2])
    return {name for name, grad in zip(parameter_names, expected[1], strict=True) if grad is not None}
