"""Blocks: consecutive pieces of a network that share its modules and parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_dgl.splitting.compiled_call import CompiledCall
from lightning_dgl.splitting.cut_points import SplitPoint, TracedNetwork
from lightning_dgl.splitting.errors import SplitError
from lightning_dgl.splitting.pieces import Pieces, Variant


class Block(nn.Module):
    """A consecutive piece of a network: one tensor in, one tensor out (the last block: the network's output).

    Its parameters, buffers and submodules are the network's own, under the names they have there. Its mode is the
    network's, too: ``network.eval()`` reaches every block, and ``block.train()`` or ``block.eval()`` sets the modules
    that the block runs, and the network's own flag, which all blocks of a network share.
    """

    _network: nn.Module

    def __init__(self, pieces: Pieces, number: int, extent: str) -> None:
        super().__init__()
        network = pieces.network
        # Attributes are private, because submodules of any name are attached.
        self._extent = extent
        self._pieces = pieces
        self._number = number
        self._compiled: dict[bool, CompiledCall] = {}
        # Not registered: the block is a piece of the network, not its owner.
        self.__dict__["_network"] = network
        containers: dict[str, None] = {}
        # Buffers of modules that a cut passes through stay with the network, which reads and moves them.
        self._cut_through_buffers: list[tuple[str, str]] = []
        for path in pieces.paths(number):
            parts = path.split(".")
            containers.update({".".join(parts[:i]): None for i in range(1, len(parts))})
            self._attach(path)
        self._containers = list(containers)

    def _attach(self, path: str) -> None:
        parent_path, _, name = path.rpartition(".")
        owner = self._network.get_submodule(parent_path)
        value = getattr(owner, name)
        if name in owner._buffers:
            if (parent_path, name) not in self._cut_through_buffers:
                self._cut_through_buffers.append((parent_path, name))
            return
        parent: nn.Module = self
        # Past add_module and register_parameter, which refuse the names of a block's own methods.
        for part in parent_path.split(".") if parent_path else ():
            parent = parent._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        if isinstance(value, nn.Module):
            parent._modules[name] = value
        elif isinstance(value, nn.Parameter):
            parent._parameters[name] = value

    def forward(self, x: Tensor) -> Any:
        """Run the piece on ``x``, in the network's present mode and with its present settings.

        Raises:
            SplitError: if the network was changed since the split in a way that the block cannot follow.
        """
        mode = self._network.training
        function = self._pieces.function(self._number)
        return self._compiled[mode](function, self._network, x) if self._compiled else function(self._network, x)

    @override
    def compile(self) -> None:  # type: ignore[override]
        """Run the piece through ``torch.compile`` from now on; it is compiled when it is first called."""
        self._compiled = {True: CompiledCall(), False: CompiledCall()}

    @property  # type: ignore[no-redef]
    def training(self) -> bool:
        """The network's mode: True in train mode."""
        return self._network.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_network" in self.__dict__:  # absent while nn.Module.__init__ runs
            self._network.training = mode
            for path in self.__dict__.get("_containers", ()):
                self._network.get_submodule(path).training = mode

    def detached_copy(self) -> Piece:
        """Return a module that does the same with copies of the block's parameters and buffers."""
        return Piece(self)

    def tensors(self) -> list[Tensor]:
        """Return everything the block holds: parameters, buffers, and those buffers of the network that it reads."""
        outside = [self._network.get_submodule(path)._buffers[name] for path, name in self._cut_through_buffers]
        return [*self.parameters(), *self.buffers(), *(buffer for buffer in outside if buffer is not None)]

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Block:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for path, name in self._cut_through_buffers:
            owner = self._network.get_submodule(path)
            owner._buffers[name] = fn(getattr(owner, name))
        return self

    @override
    def extra_repr(self) -> str:
        return self._extent


class Piece(nn.Module):
    """A copy of a block, which no longer depends on the network: its parameters are its own and are all trained."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        memo: dict[int, Any] = {}
        for name, module in block._modules.items():
            self._modules[name] = copy.deepcopy(module, memo)
        for name, parameter in block._parameters.items():
            self._parameters[name] = copy.deepcopy(parameter, memo)
        for path, name in block._cut_through_buffers:
            buffer = block._network.get_submodule(path)._buffers[name]
            owner = self.get_submodule(path) if path else self
            owner.register_buffer(name, copy.deepcopy(buffer, memo))
        self.requires_grad_(True)
        self._functions = {mode: block._pieces.function_in_mode(block._number, mode) for mode in (True, False)}

    def forward(self, x: Tensor) -> Any:
        """Run the piece on ``x``."""
        return self._functions[self.training](self, x)


def extent(block: nn.Module) -> str:
    """Name what a block contains, "first module to last module"; ``block`` may also be a whole network."""
    if isinstance(block, Block):
        return block._extent
    names = [name for name, _ in block.named_children()]
    return _from_to(names[0], names[-1]) if names else type(block).__name__


def _from_to(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def build_blocks(traced: TracedNetwork, points: Sequence[SplitPoint]) -> nn.ModuleList:
    """Cut a traced network after each of ``points``.

    Raises:
        SplitError: if two blocks would share a parameter, or a module with state.
    """
    pieces = make_pieces(traced, points)
    blocks = nn.ModuleList()
    for j in range(len(points) + 1):
        # A block is named after the modules that it calls; one that calls none, after its operations.
        operations = [n for n in pieces.graphs[j].nodes if n.op in ("call_module", "call_function", "call_method")]
        names = [str(n.target) for n in operations if n.op == "call_module"] or [n.name for n in operations]
        name = _from_to(names[0], points[j].name if j < len(points) else names[-1])
        blocks.append(Block(pieces, j, name))
    _check_nothing_shared(blocks)
    return blocks


def make_pieces(traced: TracedNetwork, points: Sequence[SplitPoint]) -> Pieces:
    """Deal the operations of a traced network to the pieces between ``points``."""
    traces = {True: traced.traces[True]}
    if traced.traces[False] is not traced.traces[True]:
        traces[False] = traced.traces[False]
    cuts = {mode: [traced.cuts[mode][point.name] for point in points] for mode in traces}
    variants = [Variant.of(traces[mode], cuts[mode]) for mode in traces]
    return Pieces(traced.network, traced.example_input, [point.name for point in points], variants)


def _check_nothing_shared(blocks: nn.ModuleList) -> None:
    owners: dict[int, tuple[int, str]] = {}
    for j, block in enumerate(blocks):
        stateful = [(n, t) for n, t in (*block.named_parameters(), *block.named_buffers())]
        for name, tensor in stateful:
            i, other = owners.setdefault(id(tensor), (j, name))
            if i != j:
                raise SplitError(
                    f"{name!r} is used in block {i} and again in block {j}"
                    + (f" (there as {other!r})" if other != name else "")
                    + ": a block trains its parameters on its own loss, so weights cannot be tied across a cut. Cut "
                    "elsewhere (split_at), or untie them."
                )
