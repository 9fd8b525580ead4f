"""A network in blocks with auxiliary heads: what they hold, and the class scores that they make."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_dgl._arguments import check_length
from lightning_dgl.augmented import Augmented, Heads, head_maker
from lightning_dgl.checks import check_head, number_of_classes, part_that_needs_two_samples, warn_of_large_heads
from lightning_dgl.hyperparameters import WithHyperparameters
from lightning_dgl.metrics import add_vote, ensemble
from lightning_dgl.optim import BlockParameters
from lightning_dgl.run import Run
from lightning_dgl.splitting import (
    Block,
    CompiledCall,
    SplitPoint,
    TracedNetwork,
    count_flops,
    extent,
    split_network,
)


class _HeadsAndInput(NamedTuple):
    """What blocks are made with, wherever the network is cut."""

    head: Heads
    example_input: Tensor
    compile: bool


class SplitModule(WithHyperparameters):
    """The half of DGLModule that needs no Trainer; see there for arguments, attributes and errors."""

    blocks: nn.ModuleList

    def __init__(
        self,
        network: nn.Module,
        num_blocks: int | None,
        split_at: list[str] | None,
        example_input: Tensor,
        balance: str,
        head: Heads,
        compile: bool,
    ) -> None:
        super().__init__()
        self.num_classes = number_of_classes(network, example_input)
        self.network = network
        self.run: Run | None = None
        self._cut(num_blocks, split_at, balance, _HeadsAndInput(head, example_input, compile))
        # Ranks that measure for themselves may cut differently; see cut_at.
        has_measured = balance == "time" and split_at is None
        self._to_cut_again = _HeadsAndInput(head, example_input[:2].clone(), compile) if has_measured else None

    def _cut(self, num_blocks: int | None, split_at: list[str] | None, balance: str, how: _HeadsAndInput) -> None:
        """Cut the network, and make the heads of its blocks."""
        network, num_classes = self.network, self.num_classes
        head, example_input, compile = how
        factories = [head_maker(h) for h in head] if isinstance(head, list) else [head_maker(head)]

        def make_head(traced: TracedNetwork, point: SplitPoint, j: int | None = None, num_heads: int = 3) -> nn.Module:
            make = factories[j or 0] if isinstance(head, list) else factories[0]
            if isinstance(make, Augmented):
                t = None if j is None else j / max(num_heads - 1, 1)
                return make.make(traced, point, num_classes, t, num_heads)
            return make(point.channels, point.spatial_size, num_classes)

        split = split_network(network, num_blocks, split_at, example_input, balance, make_head if factories else None)
        if isinstance(head, list):
            check_length("head", head, len(split.points), "the last block has the network's own classifier")
        # Not registered: blocks are pieces of the network, and their parameters would be counted and saved twice.
        self.__dict__["blocks"] = split.blocks
        self.split_points = split.points
        self.block_names = [extent(block) for block in split.blocks]
        self.heads = nn.ModuleList()
        for j, point in enumerate(split.points):
            assert split.traced is not None
            self.heads.append(make_head(split.traced, point, j, len(split.points)))
        self.heads.to(example_input.device)
        for j, point in enumerate(split.points):
            features = torch.zeros(point.shape, dtype=example_input.dtype, device=example_input.device)
            check_head(j, self.heads[j], point, features, num_classes)
        self.block_flops = split.costs
        self.head_flops = [
            count_flops(head, point.as_images(torch.empty(point.shape, device=example_input.device)))
            for head, point in zip(self.heads, split.points, strict=True)
        ]
        warn_of_large_heads(network, self.heads)
        self.needs_two_samples = part_that_needs_two_samples(network, example_input, self.heads, split.points)
        self._compiled_heads = [CompiledCall() for _ in self.heads] if compile else None
        if compile:
            for block in split.blocks:
                block.compile()
        self._unused_parameters = self._parameters_in_no_block()

    @property
    def measured_cuts(self) -> list[str] | None:
        """After which modules the network is cut, if that depends on measured times; else None."""
        return None if self._to_cut_again is None else [point.name for point in self.split_points]

    def cut_at(self, names: list[str]) -> None:
        """Cut the network where another rank has cut it by measured times, and make new heads."""
        assert self._to_cut_again is not None
        with torch.random.fork_rng(devices=[]):  # rank 0, which sends the heads' weights, draws none
            self._cut(None, names, "flops", self._to_cut_again)

    @property
    def num_blocks(self) -> int:
        """J, the number of blocks."""
        return len(self.blocks)

    def block_parameters(self, block: int) -> BlockParameters:
        """Return what block ``block`` trains: its parameters, in the network's order, then its head's."""
        inside = {id(p) for p in self.blocks[block].parameters()}
        named = [(name, p) for name, p in self.network.named_parameters() if id(p) in inside]
        if block < len(self.heads):
            named += [(f"heads.{block}.{name}", p) for name, p in self.heads[block].named_parameters()]
        return BlockParameters(named)

    def _parameters_in_no_block(self) -> list[str]:
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        return [name for name, p in self.network.named_parameters() if id(p) not in inside]

    def check_unchanged(self) -> None:
        """Raise ValueError if the network has got parameters that are in no block."""
        added = [name for name in self._parameters_in_no_block() if name not in self._unused_parameters]
        if added:
            raise ValueError(
                f"The network has changed since the DGLModule was made: {added[0]!r} is in no block. Change the "
                "network first, then make the DGLModule."
            )

    def block_tensors(self, block: int) -> list[Tensor]:
        """Return everything that block ``block`` and its head hold: parameters and buffers."""
        own = self.blocks[block]
        head = self.heads[block] if block < len(self.heads) else nn.Identity()
        tensors = own.tensors() if isinstance(own, Block) else [*own.parameters(), *own.buffers()]
        return [*tensors, *head.parameters(), *head.buffers()]

    # Scores

    def forward(self, x: Tensor, block: int | None = None) -> Tensor:
        """Return class scores (N, classes) of the last block, or of block ``block``: an early exit.

        Raises:
            RuntimeError: between training steps, if other ranks train other blocks.
        """
        self._check_whole()
        # On accelerators, the blocks of other ranks wait in the host's memory.
        is_spread = self.run is not None and self.run.stage.is_split and self.device.type != "cpu"
        if block is None and not is_spread:
            return self.network(x)
        block = self.num_blocks - 1 if block is None else block
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"block must be from 0 to {self.num_blocks - 1}, got {block}.")
        for j in range(block + 1):
            x = self._run_block(j, x)
        return self.score(block, x)

    def _run_block(self, block: int, x: Tensor) -> Tensor:
        held = next(iter(self.block_tensors(block)), x)
        return self.blocks[block](x if x.device == held.device else x.to(held.device))

    def block_scores(self, x: Tensor) -> list[Tensor]:
        """Return class scores (N, classes) of every block, first block first."""
        self._check_whole()
        scores = []
        for j in range(self.num_blocks):
            x = self._run_block(j, x)
            scores.append(self.score(j, x))
        return scores

    def ensemble(self, x: Tensor) -> Tensor:
        """Return class probabilities (N, classes) of the paper's ensemble: Σ_j 2^j softmax(scores of j), normalised."""
        votes = None
        for j, scores in enumerate(self.block_scores(x)):
            votes = add_vote(votes, j, scores.to(x.device))
        assert votes is not None
        return ensemble(votes, self.num_blocks)

    def score(self, block: int, output: Tensor) -> Tensor:
        """Return class scores (N, classes) of block ``block`` for its output (N, ...)."""
        if block == len(self.heads):
            return output
        images = self.split_points[block].as_images(output)
        head = self.heads[block]
        return head(images) if self._compiled_heads is None else self._compiled_heads[block](head, images)

    def _check_whole(self) -> None:
        if self.run is not None and self.run.others.are_hidden:
            raise RuntimeError(
                f"This rank trains only blocks {list(self.run.stage.blocks)} of {self.num_blocks}, so the module "
                "cannot be called between training steps. Call it at the start or end of a validation, at the end of "
                "an epoch, or after trainer.strategy.sync_blocks() on every rank."
            )
