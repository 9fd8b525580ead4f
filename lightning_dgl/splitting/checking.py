"""Running blocks beside their network before they are used: what tracing did not notice shows here.

Everything runs on copies, with every random generator seeded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from lightning_dgl.splitting.blocks import build_blocks
from lightning_dgl.splitting.cut_points import SplitPoint, TracedNetwork
from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.meta_twin import real_twin
from lightning_dgl.splitting.network_state import preserved_random, seed_generators
from lightning_dgl.splitting.surroundings import kept_surroundings
from lightning_dgl.splitting.trace import ModuleCall, Trace, run_node

Call = tuple[bool, Tensor]
"""Mode (True: train) and batch."""


def module_that_differs(traced: TracedNetwork, points: Sequence[SplitPoint]) -> str | None:
    """Run the network and its blocks in both modes, twice each, with several batch sizes and image sizes.

    Returns:
        None if all results are equal, else the path of the module whose trace does something else than the module.

    Raises:
        SplitError: if a block overwrites what the block before it has returned.
    """
    network = traced.network
    with kept_surroundings(network), preserved_random(network), torch.no_grad(), torch.inference_mode(False):
        calls, expected, state = _first_that_runs(network, traced.example_input)
        copied = real_twin(network)
        blocks = build_blocks(replace(traced, network=copied), points)
        for number, ((training, batch), output) in enumerate(zip(calls, expected, strict=True)):
            seed_generators(network, number)
            copied.train(training)
            try:
                actual = _run_blocks(blocks, points, batch.clone())
            except _Overwritten as error:
                raise SplitError(str(error)) from None
            except Exception:
                if batch.shape[1:] == traced.example_input.shape[1:]:
                    return _culprit(network, traced.traces[training], training, batch)
                break  # blocks may be made for the size of the example, and say so; the others have passed by now
            if not _same(actual, output) and _repeats(network, calls[: number + 1], output):
                return _culprit(network, traced.traces[training], training, batch)
        else:
            if not _same(list(copied.buffers()), state) and _same(_run_network(network, calls)[1], state):
                return ""
    return None


def _batches(network: nn.Module, example: Tensor) -> Iterator[list[Call]]:
    """Yield choices of what to run, until the network takes one."""
    example = example[:2]
    choices = [example]
    if example.is_floating_point() and bool((example == example.flatten()[0]).all()):
        choices.insert(0, torch.randn_like(example))  # unless the network looks at the values
    for x in choices:
        first = [(True, x), (False, torch.cat([x, x[:1]]))]
        if x.ndim == 4:
            height, width = x.shape[2:]
            # Half the size is cheap; of small images, double the size.
            other = x[:, :, : height // 2, : width // 2] if min(height, width) >= 64 else x.repeat(1, 1, 2, 2)
            if _takes(network, other[:1]):
                yield [*first, (True, other), (False, other[:1])]
        yield [*first, (True, x), (False, x[:1])]


def _first_that_runs(network: nn.Module, example: Tensor) -> tuple[list[Call], list[Any], list[Tensor]]:
    for calls in _batches(network, example):
        try:
            return (calls, *_run_network(network, calls))
        except Exception as error:
            failure = error
    raise SplitError(
        f"{type(network).__name__} does not take 2 or 3 samples of shape {tuple(example.shape[1:])} in train and eval "
        f"mode ({type(failure).__name__}: {failure}). Pass an example_input that the network accepts; it must accept "
        "batches of any size."
    ) from failure


def _takes(network: nn.Module, batch: Tensor) -> bool:
    try:
        with kept_surroundings(network):
            _run_network(network, [(False, batch)])
    except Exception:
        return False
    return True


def _run_network(network: nn.Module, calls: list[Call]) -> tuple[list[Any], list[Tensor]]:
    """Return the results of a copy of the network, and its buffers after that."""
    copied, results = real_twin(network), []
    for number, (training, batch) in enumerate(calls):
        seed_generators(network, number)
        results.append(tree_leaves(copied.train(training)(batch.clone())))
    return results, list(copied.buffers())


def _repeats(network: nn.Module, calls: list[Call], output: list[Any]) -> bool:
    """Return whether the network returns ``output`` again; not if it draws random numbers that have no seed."""
    return _same(_run_network(network, calls)[0][-1], output)


class _Overwritten(Exception):
    pass


def _run_blocks(blocks: nn.ModuleList, points: Sequence[SplitPoint], x: Any) -> list[Any]:
    crossing: list[tuple[Any, int]] = []
    for j, block in enumerate(blocks):
        x = block(x)
        for (output, version), point in zip(crossing, points, strict=False):
            if output._version != version:
                raise _Overwritten(
                    f"Block {j} overwrites its input, the output of {point.name!r}, in place, which would corrupt what "
                    "the auxiliary head reads. Cut elsewhere (split_at), or avoid the in-place operation."
                )
        if j < len(points):
            crossing.append((x, x._version))
    return tree_leaves(x)


def _same(actual: Sequence[Any], expected: Sequence[Any]) -> bool:
    actual = [leaf for leaf in actual if isinstance(leaf, Tensor)]
    expected = [leaf for leaf in expected if isinstance(leaf, Tensor)]
    try:
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
    except AssertionError:
        return False
    return True


# Which module it is


def _culprit(network: nn.Module, trace: Trace, training: bool, batch: Tensor) -> str:
    """Return the path of the first module whose trace gives another result for the same arguments."""
    calls: dict[str, list[tuple[list[Any], list[Any]]]] = defaultdict(list)
    plain = real_twin(network).train(training)
    for path, module in plain.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_hook(
                lambda _, args, kwargs, output, path=path: calls[path].append(
                    (_copies((args, kwargs)), _copies(output))
                ),
                with_kwargs=True,
            )
    seed_generators(network, 0)
    plain(batch.clone())
    seed_generators(network, 0)
    runner = _TraceRunner(real_twin(network).train(training), trace, batch.clone(), calls)
    return next(runner.differences(trace.root), "")


def _copies(values: Any) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(values)]


class _TraceRunner:
    """Runs the operations of a trace and compares what each module call returns with a run of the network."""

    def __init__(self, network: nn.Module, trace: Trace, batch: Tensor, calls: dict[str, list[Any]]) -> None:
        self._network = network
        self._calls = {path: iter(pairs) for path, pairs in calls.items()}
        self._values: dict[fx.Node, Any] = {}
        for node in trace.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._values[node] = batch if node.op == "placeholder" else run_node(network, node, {})

    def differences(self, call: ModuleCall) -> Iterator[str]:
        """Yield the paths of modules that do something else, those first whose difference comes first."""
        for item in call.items:
            if isinstance(item, ModuleCall):
                arguments = self._find((item.args, item.kwargs))  # before an operation changes them in place
                yield from self.differences(item)
                yield from self._compare(call.path, item.path, item.path, arguments, self._find(item.output))
            elif item.op != "get_attr":
                arguments = self._find((item.args, item.kwargs))
                try:
                    self._values[item] = run_node(self._network, item, self._values)
                except Exception:
                    yield call.path
                    return
                if item.op == "call_module":
                    path = str(item.target)
                    yield from self._compare(call.path, path, None, arguments, _copies(self._values[item]))

    def _compare(
        self, outer: str, path: str, inner: str | None, arguments: list[Any], output: list[Any]
    ) -> Iterator[str]:
        pair = next(self._calls.get(path, iter(())), None)
        if pair is None or not _same(arguments, pair[0]):
            yield outer
        elif not _same(output, pair[1]) and inner is not None:
            yield inner

    def _find(self, argument: Any) -> list[Any]:
        return _copies(fx.map_arg(argument, lambda node: self._values[node]))
