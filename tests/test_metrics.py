"""Metrics of blocks: what they are called, what they count, and the ensemble's votes."""

from __future__ import annotations

import pytest
import torch
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_dgl.metrics import (
    BlockMetrics,
    EpochMetrics,
    MeanLoss,
    Top1Accuracy,
    add_vote,
    class_indices,
    ensemble,
    is_headline,
    metric_collection,
)


def accuracy() -> MetricCollection:
    return metric_collection(None, ignore_index=None)


def test_votes_double_from_block_to_block() -> None:
    scores = [torch.randn(4, 3) for _ in range(3)]
    votes = None
    for j, own in enumerate(scores):
        votes = add_vote(votes, j, own)
    assert votes is not None
    expected = sum(2**j * own.softmax(1) for j, own in enumerate(scores)) / 7
    assert torch.allclose(ensemble(votes, 3), expected)
    assert torch.allclose(ensemble(votes, 3).sum(1), torch.ones(4))


def test_values_of_an_epoch_weight_samples_not_batches() -> None:
    metrics = BlockMetrics(accuracy(), num_blocks=2, blocks=range(2))
    right = torch.eye(3)
    for n, loss in ((1, 4.0), (3, 0.0)):
        targets = torch.arange(n)
        for j in range(2):
            metrics.update(j, torch.tensor(loss + j), right[:n] if j else right[:n].roll(1, 1), targets)
        metrics.update_ensemble(right[:n], targets)
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert values == {
        **{"loss": 2.0, "loss_block0": 1.0, "loss_block1": 2.0},
        **{"acc": 1.0, "acc_block0": 0.0, "acc_block1": 1.0, "acc_ensemble": 1.0},
    }


def torchmetrics_accuracy(ignore_index: int | None) -> Metric:
    return MulticlassAccuracy(5, average="micro", ignore_index=ignore_index, validate_args=False)


@pytest.mark.parametrize("ignore_index", [None, -100, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_equals_that_of_torchmetrics(ignore_index: int | None, dtype: torch.dtype) -> None:
    own, other = Top1Accuracy(ignore_index), torchmetrics_accuracy(ignore_index)
    batches = [(torch.randn(n, 5).to(dtype), torch.randint(5, (n,))) for n in (13, 8, 1)]
    batches.append((torch.ones(6, 5), torch.arange(6) % 5))  # scores that are equal
    batches.append((torch.full((3, 5), torch.nan), torch.arange(3)))
    if ignore_index is not None:
        batches[0][1][::3] = ignore_index
        batches.append((torch.randn(4, 5), torch.full((4,), ignore_index)))  # none counts
    for scores, targets in batches:
        assert torch.equal(own(scores, targets), other(scores, targets))
    assert torch.equal(own.compute(), other.compute())


def test_accuracy_of_nothing_is_zero() -> None:
    own = Top1Accuracy(0)
    own.update(torch.randn(3, 5), torch.zeros(3, dtype=torch.long))
    assert own.compute() == 0


def test_the_mean_loss_equals_that_of_torchmetrics() -> None:
    own, other = MeanLoss(), MeanMetric()
    for loss, n in ((0.3, 8), (2.7, 8), (1e-3, 3)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            own.update(torch.tensor(loss, dtype=dtype), n)
            other.update(torch.tensor(loss, dtype=dtype), weight=n)
    assert torch.equal(own.compute(), other.compute())
    own.update(torch.tensor(torch.nan), 8)
    assert own.compute().isnan()


def test_a_stage_counts_its_blocks_only() -> None:
    first, last = (BlockMetrics(accuracy(), num_blocks=3, blocks=blocks) for blocks in (range(2), range(2, 3)))
    step = (torch.tensor(1.5), torch.eye(3), torch.tensor([0, 1, 0]))
    assert set(first.batch_values({1: step, 0: step})) == {"loss_block0", "acc_block0", "loss_block1", "acc_block1"}
    values = last.batch_values({2: step})
    assert list(values) == ["loss", "acc", "loss_block2", "acc_block2"]
    assert values["acc"].item() == pytest.approx(2 / 3)
    first.update_ensemble(torch.eye(3), torch.arange(3))  # it does not see the last block
    assert not any("ensemble" in name for name in first.state_dict())


def test_metrics_keep_their_names() -> None:
    several = MetricCollection({"f1": MulticlassF1Score(3), "top2": MulticlassAccuracy(3, top_k=2)})
    assert metric_collection(several, None) is several
    assert list(metric_collection(MulticlassF1Score(3), None)) == ["MulticlassF1Score"]
    assert list(accuracy()) == ["acc"]
    with pytest.raises(TypeError, match="metrics must be a torchmetrics Metric or MetricCollection, got str"):
        metric_collection("acc", None)  # type: ignore[arg-type]


def test_headlines_are_the_last_blocks_values() -> None:
    names = ("acc", "acc_block0", "acc_block12", "acc_ensemble", "acc/dataloader_idx_1", "acc_block1/dataloader_idx_0")
    assert [is_headline(name) for name in names] == [True, False, False, False, True, False]


def test_probabilities_count_as_the_most_probable_class() -> None:
    assert class_indices(torch.tensor([[0.2, 0.8], [0.6, 0.4]])).tolist() == [1, 0]
    assert class_indices(torch.tensor([1, 0])).tolist() == [1, 0]


def test_each_phase_and_loader_has_its_metrics_until_they_are_taken() -> None:
    epoch = EpochMetrics(lambda: BlockMetrics(accuracy(), 1, range(1)))
    validation = [epoch.of("val", i) for i in (1, 0)]
    training = epoch.of("train")
    assert epoch.of("val", 1) is validation[0]
    assert list(epoch.pop("val").items()) == [(0, validation[1]), (1, validation[0])]
    assert epoch.pop("val") == {}
    assert epoch.of("train") is training
