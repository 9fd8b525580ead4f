"""Small changes of the modern recipe that others report gains of; docs/results.md tells what they gain here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from networks import ResidualUnit
from torch import Tensor, nn

from lightning_dgl import Augmented, DGLModule


class TransportLoss(nn.CrossEntropyLoss):
    """Cross-entropy plus ``weight`` times the mean square of each residual branch of the block (TRGL's penalty).

    The penalty is counted in training only. It relies on blocks whose loss follows their forward pass at once.
    """

    def __init__(self, network: nn.Module, weight: float = 0.05) -> None:
        super().__init__()
        self._weight = weight
        self._squares: list[Tensor] = []
        branches = [unit.bn2 for unit in network.modules() if isinstance(unit, ResidualUnit)]
        if not branches:
            raise ValueError("--change trgl is for the residual networks of networks.py, such as resnet20.")
        for branch in branches:
            branch.register_forward_hook(self._measure)

    def _measure(self, branch: nn.Module, inputs: Any, output: Tensor) -> None:
        if branch.training:
            self._squares.append(output.float().square().mean())

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        penalty = self._weight * sum(self._squares)
        self._squares.clear()
        return super().forward(input, target) + penalty


def penalise_branches(module: DGLModule) -> None:
    module.loss = TransportLoss(module.network)


def shuffle_heads(module: DGLModule) -> None:
    """Give heads values of their own: as those they copied are distributed, but in another order."""
    for parameter in module.heads.parameters():
        with torch.no_grad():
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))


CHANGES: dict[str, dict[str, Any]] = {
    "label-smoothing": {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "full-resolution": {"head": Augmented(pool=1)},
    "trgl": {},
    "fresh-heads": {},
}
"""Options of DGLModule that each change sets."""

AFTERWARDS: dict[str, Callable[[DGLModule], None]] = {"trgl": penalise_branches, "fresh-heads": shuffle_heads}
"""What is done to the module once it is made."""
