"""What is logged, and what evaluation and prediction return."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_dgl import DGLModule
from tests.runs import MakeTrainer, loader, make_module, pieces, sgd, small_cnn, small_data


@pytest.mark.parametrize("monitor", ["train/loss", "train/acc_block0"])
def test_what_a_callback_monitors_is_of_the_latest_step(monitor: str, make_trainer: MakeTrainer) -> None:
    seen: list[float] = []
    expected: list[float] = []

    class Reader(L.Callback):
        def __init__(self) -> None:
            self.monitor = monitor

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(trainer.callback_metrics[monitor].item())

    class Recording(DGLModule):
        def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
            loss = super().local_loss(block, scores, targets)
            if monitor == "train/acc_block0" and block == 0:
                expected.append((scores.argmax(1) == targets).float().mean().item())
            if monitor == "train/loss" and block == self.num_blocks - 1:
                expected.append(loss.item())
            return loss

    module = Recording(small_cnn(), num_blocks=2, example_input=(2, 3, 8, 8), optimizer=sgd)
    make_trainer(callbacks=[Reader()], log_every_n_steps=3).fit(module, loader())
    assert len(set(expected)) > 1
    assert seen == pytest.approx(expected)


def test_csv_logger_columns(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    logger = CSVLogger(tmp_path)
    make_trainer(logger=logger, log_every_n_steps=1).fit(make_module(2), loader(), loader())
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = {f"{stage}/{name}" for stage in ("train", "val") for name in ("loss", "acc")}
    expected |= {f"{name}_block{j}" for name in expected for j in range(2)} | {"val/acc_ensemble", "epoch", "step"}
    assert set(rows[0]) == expected
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    assert steps == [0, 1, 2, 3, 4]
    for row in rows:
        assert row["train/loss"] == row["train/loss_block1"]
        assert row["val/acc"] == row["val/acc_block1"]


def test_the_progress_bar_shows_the_last_block(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.fit(make_module(4), loader(), loader())
    metrics = trainer.progress_bar_metrics
    assert set(metrics) == {"train/loss", "train/acc", "val/loss", "val/acc"}
    assert metrics["val/acc"] == pytest.approx(trainer.callback_metrics["val/acc_block3"].item())


@pytest.fixture(scope="module")
def evaluated() -> tuple[DGLModule, list[Tensor], Tensor]:
    """A module in eval mode, each block's scores of all 22 samples by plain calls, and the targets."""
    torch.manual_seed(0)
    module = make_module(4).eval()
    x, y = small_data(22).tensors
    scores = []
    with torch.no_grad():
        for block, head in zip(*pieces(module), strict=True):
            x = block.eval()(x)
            scores.append(head.eval()(x))
    return module, scores, y


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_equals_a_plain_computation(
    stage: str, evaluated: tuple[DGLModule, list[Tensor], Tensor], make_trainer: MakeTrainer
) -> None:
    module, scores, targets = evaluated
    trainer = make_trainer()
    run = trainer.validate if stage == "val" else trainer.test
    (metrics,) = run(module, loader(num_samples=22, batch_size=8), verbose=False)  # 8 + 8 + 6
    mixed = torch.stack([2**j * s.softmax(dim=1) for j, s in enumerate(scores)]).sum(dim=0)
    expected = {f"{stage}/acc_ensemble": (mixed.argmax(dim=1) == targets).float().mean().item()}
    for j, block_scores in enumerate(scores):
        loss = nn.functional.cross_entropy(block_scores, targets).item()
        accuracy = (block_scores.argmax(dim=1) == targets).float().mean().item()
        for suffix in [f"_block{j}"] + [""] * (j == 3):
            expected |= {f"{stage}/loss{suffix}": loss, f"{stage}/acc{suffix}": accuracy}
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_scores_of_blocks_and_ensemble(evaluated: tuple[DGLModule, list[Tensor], Tensor]) -> None:
    module, scores, _ = evaluated
    x = small_data(22).tensors[0]
    with torch.no_grad():
        for j in range(4):
            assert torch.allclose(module(x, block=j), scores[j], atol=1e-6)
        assert torch.equal(module(x), module(x, block=3))
        mixed = torch.stack([2**j * s.softmax(dim=1) for j, s in enumerate(scores)]).sum(dim=0)
        assert torch.allclose(module.ensemble(x), mixed / 15, atol=1e-6)
    with pytest.raises(ValueError, match="block must be from 0 to 3, got 4"):
        module(x, block=4)


def test_predict_returns_class_scores(
    evaluated: tuple[DGLModule, list[Tensor], Tensor], make_trainer: MakeTrainer
) -> None:
    module, scores, _ = evaluated
    predictions = make_trainer().predict(module, loader(num_samples=22))
    assert [tuple(p.shape) for p in predictions] == [(8, 4), (8, 4), (6, 4)]
    assert torch.allclose(torch.cat(predictions), scores[-1], atol=1e-6)
    inputs_only = DataLoader(small_data(22).tensors[0], batch_size=8)  # type: ignore[arg-type]
    assert torch.equal(torch.cat(make_trainer().predict(module, inputs_only)), torch.cat(predictions))


def test_metrics_start_anew_in_each_epoch(make_trainer: MakeTrainer) -> None:
    module = make_module(2, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    module.network.eval()
    seen: list[float] = []

    class FlipTargets(L.Callback):
        def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
            if trainer.current_epoch == 1:
                with torch.no_grad():
                    batch[1].copy_(pl_module(batch[0]).argmax(dim=1))

        def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(trainer.callback_metrics["val/acc"].item())

    make_trainer(max_epochs=2, num_sanity_val_steps=0, callbacks=[FlipTargets()]).fit(module, loader(), loader())
    assert seen[0] < 1.0
    assert seen[1] == 1.0


def test_two_validation_data_loaders(
    evaluated: tuple[DGLModule, list[Tensor], Tensor], make_trainer: MakeTrainer
) -> None:
    module, scores, targets = evaluated
    results = make_trainer().validate(module, [loader(num_samples=22), loader(num_samples=8)], verbose=False)
    merged = {name: value for result in results for name, value in result.items()}
    for i, samples in enumerate((22, 8)):
        loss = nn.functional.cross_entropy(scores[-1][:samples], targets[:samples]).item()
        right = small_data(samples).tensors[1]
        if samples == 22:
            assert merged[f"val/loss/dataloader_idx_{i}"] == pytest.approx(loss, abs=1e-5)
        with torch.no_grad():
            plain = (module(small_data(samples).tensors[0]).argmax(dim=1) == right).float().mean().item()
        assert merged[f"val/acc/dataloader_idx_{i}"] == pytest.approx(plain)
        assert f"val/acc_ensemble/dataloader_idx_{i}" in merged


def test_a_metric_collection_keeps_its_names(make_trainer: MakeTrainer) -> None:
    metrics = MetricCollection({"top2": MulticlassAccuracy(4, top_k=2), "f1": MulticlassF1Score(4)})
    module = make_module(2, metrics=metrics)
    trainer = make_trainer()
    trainer.fit(module, loader(), loader())
    for stage in ("train", "val"):
        for name in ("top2", "f1"):
            assert {f"{stage}/{name}", f"{stage}/{name}_block0", f"{stage}/{name}_block1"} <= set(
                trainer.callback_metrics
            )
    assert "val/top2_ensemble" in trainer.callback_metrics
    assert "val/acc" not in trainer.callback_metrics
    with torch.no_grad():
        for j in range(2):
            metric = MulticlassAccuracy(4, top_k=2)
            module.eval()
            for x, y in loader():
                metric.update(module(x, block=j), y)
            assert trainer.callback_metrics[f"val/top2_block{j}"] == metric.compute()


def test_class_probabilities_as_targets(make_trainer: MakeTrainer) -> None:
    x, y = small_data().tensors
    soft = nn.functional.one_hot(y, 4).float()
    hard, mixed = make_module(2), make_module(2)
    mixed.load_state_dict(hard.state_dict())
    trainer = make_trainer()
    trainer.fit(mixed, DataLoader(torch.utils.data.TensorDataset(x, soft), batch_size=8), loader())
    make_trainer().fit(hard, loader(), loader())
    for a, b in zip(mixed.parameters(), hard.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
