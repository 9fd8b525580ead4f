"""One batch of evaluation or prediction, by the blocks of this rank."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from lightning_dgl.address import Address
from lightning_dgl.checks import check_scalar
from lightning_dgl.metrics import add_vote, class_indices
from lightning_dgl.run import Run


class Scorer(Protocol):
    """What evaluation needs of a DGLModule."""

    blocks: nn.ModuleList

    def score(self, block: int, output: Tensor) -> Tensor:
        """Return class scores for a block's output."""

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a block."""


def evaluate(module: Scorer, run: Run, phase: str, address: Address) -> int:
    """Measure this rank's blocks on the batch at ``address``; return how many samples it has.

    A later stage also receives the votes for the ensemble of the blocks before its own, and sends on its own votes.

    Args:
        module: holds the blocks.
        run: of this rank; its incoming link has the batch.
        phase: "val" or "test".
        address: of the batch.
    """
    x, targets, *received = run.incoming.get(address)
    votes: Tensor | None = received[0] if received else None
    metrics, classes = run.metrics.of(phase, address.dataloader_idx), class_indices(targets)
    for j in run.stage.blocks:
        x = module.blocks[j](x)
        scores = module.score(j, x)
        votes = add_vote(votes, j, scores)
        metrics.update(j, check_scalar(module.local_loss(j, scores, targets), j), scores, classes)
    assert votes is not None
    metrics.update_ensemble(votes, classes)
    run.outgoing.put(address, (x, targets, votes))
    return len(x)


def predict(module: Scorer, run: Run, address: Address) -> Tensor:
    """Return the output of this rank's last block for the batch at ``address``, and send it on."""
    (x,) = run.incoming.get(address)
    for j in run.stage.blocks:
        x = module.blocks[j](x)
    run.outgoing.put(address, (x,))
    return x
