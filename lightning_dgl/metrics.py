"""Losses and metrics of every block, under the names in which they are logged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Accuracy, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_dgl.local_step import LocalStep


def metric_collection(
    metrics: Metric | MetricCollection | None, num_classes: int, ignore_index: int | None
) -> MetricCollection:
    """What is measured for each block: by default top-1 accuracy as ``acc``.

    A collection keeps its own names; a single metric is named after its class, an accuracy ``acc``.
    """
    if metrics is None:
        # Targets are checked once for each batch; checking in every metric would synchronise with the device.
        metrics = MulticlassAccuracy(num_classes, average="micro", ignore_index=ignore_index, validate_args=False)
    if isinstance(metrics, MetricCollection):
        return metrics
    if not isinstance(metrics, Metric):
        raise TypeError(f"metrics must be a torchmetrics Metric or MetricCollection, got {type(metrics).__name__}.")
    name = "acc" if isinstance(metrics, (Accuracy, MulticlassAccuracy)) else type(metrics).__name__
    return MetricCollection({name: metrics})


def ensemble(scores: Sequence[Tensor]) -> Tensor:
    """The paper's ensemble of all blocks' class scores: Σ_j 2^j softmax(scores_j), normalised.

    Args:
        scores: J tensors (N, classes), first block first.

    Returns:
        Class probabilities (N, classes).
    """
    weights = [2.0**j for j in range(len(scores))]
    total = torch.stack([w * s.float().softmax(dim=1) for w, s in zip(weights, scores, strict=True)]).sum(dim=0)
    return total / sum(weights)


def is_headline(name: str) -> bool:
    """Whether a value is named as the last block's, without the suffix of a block or of the ensemble."""
    return re.search(r"_(block\d+|ensemble)(/|$)", name) is None


class BlockMetrics(nn.Module):
    """Local losses and metrics of J blocks, and the metrics of their ensemble, over one pass through some data.

    Values are named ``loss_block{j}`` and ``{metric}_block{j}`` for every block, ``loss`` and ``{metric}`` for the last
    block, and ``{metric}_ensemble``.
    """

    def __init__(self, metrics: MetricCollection, num_blocks: int) -> None:
        super().__init__()
        self.losses = [MeanMetric() for _ in range(num_blocks)]
        self.blocks = [metrics.clone() for _ in range(num_blocks)]
        self.ensemble = metrics.clone()
        self._registered = nn.ModuleList([*self.losses, *self.blocks])  # so that they move between devices

    def batch_values(self, steps: Mapping[int, LocalStep], targets: Tensor) -> dict[str, Tensor]:
        """Values of one batch alone, for the blocks that ``steps`` holds by number; the ensemble's left out."""
        return self._named(
            {j: {"loss": step.loss, **self.blocks[j](step.scores, targets)} for j, step in steps.items()}
        )

    def update(self, losses: Sequence[Tensor], scores: Sequence[Tensor], targets: Tensor) -> None:
        """Take in one batch of N samples: J local losses (scalars) and class scores (N, classes)."""
        for mean, loss in zip(self.losses, losses, strict=True):
            mean.update(loss, weight=len(targets))
        for metric, block_scores in zip(self.blocks, scores, strict=True):
            metric.update(block_scores, targets)
        self.ensemble.update(ensemble(scores), targets)

    def compute(self) -> dict[str, Tensor]:
        """The values over everything taken in since the last reset."""
        blocks = enumerate(zip(self.losses, self.blocks, strict=True))
        values = self._named({j: {"loss": loss.compute(), **metric.compute()} for j, (loss, metric) in blocks})
        values.update({f"{name}_ensemble": value for name, value in self.ensemble.compute().items()})
        return values

    def reset(self) -> None:
        """Forget everything taken in."""
        for loss in self.losses:
            loss.reset()
        for metric in (*self.blocks, self.ensemble):
            metric.reset()

    def _named(self, blocks: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        named = {f"{name}_block{j}": value for j, values in blocks.items() for name, value in values.items()}
        return {**blocks.get(len(self.blocks) - 1, {}), **named}
