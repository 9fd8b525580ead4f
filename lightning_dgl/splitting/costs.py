"""The costs of blocks: FLOPs, memory held for backward, or measured time, up to each place to cut a network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_dgl.splitting.cut_points import SplitPoint, TracedNetwork
from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.meta_twin import dry_run, real_twin
from lightning_dgl.splitting.network_state import in_mode, preserved_random, preserved_state
from lightning_dgl.splitting.surroundings import kept_surroundings
from lightning_dgl.splitting.trace import run_node

HeadFactory = Callable[[SplitPoint], nn.Module]
"""Makes the auxiliary head for a block that ends at a split point."""


@dataclass(frozen=True)
class Costs:
    """Costs in one unit.

    Attributes:
        upto: of the network up to each usable split point, and last of the whole network.
        head: of the auxiliary head at each usable split point.
        input: what a block that begins at each usable split point costs on top.
    """

    upto: list[float]
    head: list[float]
    input: list[float]


# Forward FLOPs for one sample: the same on every machine


def flops(traced: TracedNetwork, make_head: HeadFactory | None) -> Costs:
    """Count forward FLOPs for one sample."""
    upto = [*(point.cost for point in traced.usable), traced.cost]
    return Costs(upto, _of_heads(traced, make_head, count_flops), [0.0] * len(traced.usable))


def num_parameters(module: nn.Module) -> int:
    """Return how many parameters ``module`` has."""
    return sum(p.numel() for p in module.parameters())


def count_flops(module: nn.Module, example_input: Tensor) -> float:
    """Count the forward FLOPs of ``module`` for one sample of ``example_input``, in train mode.

    Raises:
        SplitError: if the example does not pass through ``module``.
    """

    def run(module: nn.Module, x: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            module(x)
        return counter.get_total_flops()

    return dry_run(module, example_input, True, run) / len(example_input)


# Bytes that autograd holds for backward, for one sample


class _Held:
    """Records which storages autograd saves inside ``saving``, and the first and last step at which it saves each."""

    def __init__(self, left_out: list[Tensor]) -> None:
        self.step = 0
        self._left_out = {tensor.untyped_storage()._cdata for tensor in left_out}
        # By address of the storage; tensors are kept alive, so that no two storages share an address.
        self._saved: dict[int, tuple[Tensor, int, int]] = {}

    @contextmanager
    def saving(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
            yield

    def _save(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self._left_out:
            _, first, _ = self._saved.get(key, (tensor, self.step, self.step))
            self._saved[key] = (tensor, first, self.step)
        return tensor

    def upto(self, step: int) -> int:
        """Return the bytes saved up to ``step``."""
        return sum(tensor.untyped_storage().nbytes() for tensor, first, _ in self._saved.values() if first <= step)

    def across(self, step: int) -> int:
        """Return the bytes saved up to ``step`` and again after it: a block that begins there holds them once more."""
        return sum(t.untyped_storage().nbytes() for t, first, last in self._saved.values() if first <= step < last)


def memory(traced: TracedNetwork, make_head: HeadFactory | None) -> Costs:
    """Count the bytes that autograd holds for backward, for one sample: in a block, at its input and in its head."""
    network, trace = real_twin(traced.network).train(), traced.traces[True]
    # Two real samples: without data, attention takes another path than on a device, and holds its whole matrix.
    samples = traced.example_input[:2].clone()
    held = _Held([*network.parameters(), *network.buffers()])
    values: dict[fx.Node, Any] = {}
    with kept_surroundings(network), preserved_random(network), torch.enable_grad(), held.saving():
        for node in trace.graph.nodes:
            held.step = trace.order.get(node, held.step)
            values[node] = samples if node.op == "placeholder" else run_node(network, node, values)
    positions = [traced.cuts[True][point.name].position for point in traced.usable]
    return Costs(
        upto=[held.upto(position) / len(samples) for position in (*positions, len(trace.operations))],
        head=_of_heads(traced, make_head, _head_memory),
        input=[held.across(position) / len(samples) for position in positions],
    )


def _head_memory(head: nn.Module, features: Tensor) -> float:
    held = _Held([*head.parameters(), *head.buffers(), features])
    with in_mode(head, True), torch.enable_grad(), held.saving():
        head(features.requires_grad_())
    return held.upto(0) / len(features)


# Seconds of forward and backward, measured here


def seconds(traced: TracedNetwork, make_head: HeadFactory | None) -> Costs:
    """Measure seconds of forward and backward of the example batch."""
    return Costs(
        measure_segments(traced),
        _of_heads(traced, make_head, measure_head, compute=True),
        [0.0] * len(traced.usable),
    )


def measure_segments(traced: TracedNetwork, repeats: int = 5) -> list[float]:
    """Measure seconds of forward and backward up to each usable split point, and last of the whole network.

    Each stretch between two neighbouring split points is run on the example batch in train mode, as if it were a block;
    the median of ``repeats`` runs counts.
    """
    network, trace = real_twin(traced.network).train(), traced.traces[True]
    boundaries = [traced.cuts[True][point.name] for point in traced.usable]
    stops = [cut.position for cut in boundaries] + [len(trace.operations) - 1]
    attributes = [node for node in trace.graph.nodes if node.op == "get_attr"]
    placeholder, output = next(iter(trace.graph.nodes)), next(iter(reversed(trace.graph.nodes)))
    seconds = []
    with kept_surroundings(network), preserved_random(network), torch.enable_grad():
        start, source, tensor = 0, placeholder, traced.example_input
        for i, stop in enumerate(stops):
            nodes = trace.operations[start : stop + 1]
            target = boundaries[i].node if i < len(boundaries) else output.args[0]
            runs = []
            for _ in range(repeats + 1):
                values: dict[fx.Node, Any] = {node: run_node(network, node, {}) for node in attributes}
                began = _now(tensor)
                # Detached, as a block's input is.
                values[source] = tensor.detach().clone()
                for node in nodes:
                    values[node] = run_node(network, node, values)
                outputs = [t for t in tree_leaves(fx.map_arg(target, values.__getitem__)) if t.requires_grad]
                if outputs:
                    total = torch.stack([t.float().sum() for t in outputs]).sum()
                    torch.autograd.grad(total, _parameters(network), allow_unused=True)
                runs.append(_now(tensor) - began)
            seconds.append(statistics.median(runs[1:]))
            if i < len(boundaries):
                start, source, tensor = stop + 1, boundaries[i].node, values[boundaries[i].node].detach()
    return [sum(seconds[: i + 1]) for i in range(len(seconds))]


def measure_head(head: nn.Module, example_input: Tensor, repeats: int = 5) -> float:
    """Measure seconds of one forward and backward of ``head`` in train mode; the median of ``repeats`` counts."""
    runs = []
    with preserved_state(head), in_mode(head, True), torch.enable_grad():
        for _ in range(repeats + 1):
            began = _now(example_input)
            scores = head(example_input.clone().requires_grad_())
            torch.autograd.grad(scores.sum(), _parameters(head), allow_unused=True)
            runs.append(_now(example_input) - began)
    return statistics.median(runs[1:])


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _now(tensor: Tensor) -> float:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    elif tensor.device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


# Heads


def _of_heads(
    traced: TracedNetwork,
    make_head: HeadFactory | None,
    measure: Callable[[nn.Module, Tensor], float],
    compute: bool = False,
) -> list[float]:
    """Return ``measure(head, features)`` at each usable split point; on meta tensors unless ``compute`` is True."""
    if make_head is None:
        return [0.0] * len(traced.usable)
    known: dict[torch.Size, float] = {}
    shapes = [point.as_images(torch.empty(point.shape, device="meta")).shape for point in traced.usable]
    for point, shape in zip(traced.usable, shapes, strict=True):
        if shape in known:
            continue
        with torch.random.fork_rng(devices=[]):
            if not compute:
                try:
                    with torch.device("meta"):
                        known[shape] = measure(make_head(point), torch.empty(shape))
                    continue
                except (NotImplementedError, RuntimeError, SplitError):  # a user's head that needs real weights
                    pass
            device = traced.example_input.device
            known[shape] = measure(make_head(point).to(device), torch.randn(shape, device=device))
    return [known[shape] for shape in shapes]


COSTS: dict[str, Callable[[TracedNetwork, HeadFactory | None], Costs]] = {
    "flops": flops,
    "memory": memory,
    "time": seconds,
}
"""The choices for ``balance``."""
