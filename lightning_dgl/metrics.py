"""Losses and metrics of every block, under the names in which they are logged."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torchmetrics import Accuracy, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override


class _Ratio(Metric):
    """A ratio of two sums. Unlike the metrics of torchmetrics, it never waits for the device to look at values."""

    full_state_update = False
    numerator: Tensor
    denominator: Tensor

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self.add_state("numerator", zero, dist_reduce_fx="sum")
        self.add_state("denominator", zero.clone(), dist_reduce_fx="sum")


class MeanLoss(_Ratio):
    """The mean of local losses, weighted by the number of samples."""

    def __init__(self) -> None:
        super().__init__(torch.tensor(0.0))

    @override
    def update(self, loss: Tensor, num_samples: int) -> None:
        """Take in the loss of one batch, a scalar."""
        self.numerator += loss.to(self.numerator.dtype) * num_samples
        self.denominator += num_samples

    @override
    def compute(self) -> Tensor:
        """Return the mean over all samples."""
        return self.numerator / self.denominator


class Top1Accuracy(_Ratio):
    """The share of samples whose highest score is that of their class.

    Args:
        ignore_index: a class whose samples do not count.
    """

    is_differentiable = False
    higher_is_better = True

    def __init__(self, ignore_index: int | None) -> None:
        super().__init__(torch.tensor(0))
        self._ignore_index = ignore_index

    @override
    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Take in class scores (N, classes) and class indices (N,) of one batch."""
        right = scores.argmax(dim=1) == targets
        if self._ignore_index is None:
            self.denominator += len(targets)
        else:
            counts = targets != self._ignore_index
            right &= counts
            self.denominator += counts.sum()
        self.numerator += right.sum()

    @override
    def compute(self) -> Tensor:
        """Return the share; 0 if no sample counts."""
        return self.numerator.float() / self.denominator.clamp_min(1).float()


def class_indices(targets: Tensor) -> Tensor:
    """Return targets as metrics take them, (N,): class probabilities, as of mixup, count as the most probable class."""
    return targets.argmax(dim=1) if targets.is_floating_point() else targets


def metric_collection(metrics: Metric | MetricCollection | None, ignore_index: int | None) -> MetricCollection:
    """Return what is measured for each block: by default top-1 accuracy as ``acc``.

    A collection keeps its own names; a single metric is named after its class, an accuracy ``acc``.
    """
    if metrics is None:
        return MetricCollection({"acc": Top1Accuracy(ignore_index)})
    if isinstance(metrics, MetricCollection):
        return metrics
    if not isinstance(metrics, Metric):
        raise TypeError(f"metrics must be a torchmetrics Metric or MetricCollection, got {type(metrics).__name__}.")
    name = "acc" if isinstance(metrics, (Accuracy, MulticlassAccuracy)) else type(metrics).__name__
    return MetricCollection({name: metrics})


def add_vote(votes: Tensor | None, block: int, scores: Tensor) -> Tensor:
    """Return the paper's ensemble up to ``block``: Σ_j 2^j softmax(scores of block j), each over (N, classes).

    Args:
        votes: the sum up to the block before; None before block 0.
        block: j.
        scores: class scores (N, classes) of block j.
    """
    vote = 2.0**block * scores.float().softmax(dim=1)
    return vote if votes is None else votes + vote


def ensemble(votes: Tensor, num_blocks: int) -> Tensor:
    """Return class probabilities (N, classes) of the ensemble, from the votes of all J blocks."""
    return votes / (2.0**num_blocks - 1)


def is_headline(name: str) -> bool:
    """Return whether a value is named as the last block's, without the suffix of a block or of the ensemble."""
    return re.search(r"_(block\d+|ensemble)(/|$)", name) is None


class BlockMetrics(nn.Module):
    """Local losses and metrics of blocks, and the metrics of their ensemble, over one pass through some data.

    Values are named ``loss_block{j}`` and ``{metric}_block{j}`` for every block, ``loss`` and ``{metric}`` for the last
    one of the network, and ``{metric}_ensemble``.

    Args:
        metrics: what to measure, cloned for each block.
        num_blocks: J.
        blocks: those of the J blocks that this process holds; the ensemble is measured where the last one is.
    """

    def __init__(self, metrics: MetricCollection, num_blocks: int, blocks: range) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.losses = {j: MeanLoss() for j in blocks}
        self.blocks = {j: metrics.clone() for j in blocks}
        self.ensemble = metrics.clone() if num_blocks - 1 in blocks else None
        # Registered, so that they move between devices.
        self._registered = nn.ModuleList(
            [*self.losses.values(), *self.blocks.values(), *([] if self.ensemble is None else [self.ensemble])]
        )

    def batch_values(self, steps: Mapping[int, tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
        """Return the values of one local step, without the ensemble's.

        Args:
            steps: by block, its local loss (a scalar), class scores (N, classes) and targets.
        """
        return self._named(
            {
                j: {"loss": loss, **self.blocks[j](scores, class_indices(targets))}
                for j, (loss, scores, targets) in sorted(steps.items())
            }
        )

    def update(self, block: int, loss: Tensor, scores: Tensor, targets: Tensor) -> None:
        """Take in one batch of N samples: a block's local loss (a scalar) and class scores (N, classes)."""
        self.losses[block].update(loss, len(targets))
        self.blocks[block].update(scores, targets)

    def update_ensemble(self, votes: Tensor, targets: Tensor) -> None:
        """Take in the votes (N, classes) of all J blocks on one batch, where the last block is."""
        if self.ensemble is not None:
            self.ensemble.update(ensemble(votes, self.num_blocks), targets)

    def compute(self) -> dict[str, Tensor]:
        """Return the values over everything taken in."""
        values = self._named({j: {"loss": self.losses[j].compute(), **self.blocks[j].compute()} for j in self.blocks})
        if self.ensemble is not None:
            values |= {f"{name}_ensemble": value for name, value in self.ensemble.compute().items()}
        return values

    def _named(self, blocks: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        named = {f"{name}_block{j}": value for j, values in blocks.items() for name, value in values.items()}
        return {**blocks.get(self.num_blocks - 1, {}), **named}


class EpochMetrics:
    """The metrics of this rank's blocks for each phase and data loader, made when they are first needed.

    Args:
        make: makes the :class:`BlockMetrics` of one phase and data loader.
    """

    def __init__(self, make: Callable[[], BlockMetrics]) -> None:
        self._make = make
        self._metrics: dict[tuple[str, int], BlockMetrics] = {}

    def of(self, phase: str, dataloader_idx: int = 0) -> BlockMetrics:
        """Return the metrics of ``phase`` ("train", "val" or "test")."""
        key = phase, dataloader_idx
        if key not in self._metrics:
            self._metrics[key] = self._make()
        return self._metrics[key]

    def pop(self, phase: str) -> dict[int, BlockMetrics]:
        """Return the metrics of ``phase`` by data loader, and forget them."""
        found = {loader: own for (name, loader), own in sorted(self._metrics.items()) if name == phase}
        self._metrics = {key: own for key, own in self._metrics.items() if key[0] != phase}
        return found
