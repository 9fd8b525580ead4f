"""What Lightning's finders of learning rates and batch sizes find, and what they leave behind: nothing."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_dgl import DGLModule, DGLStrategy
from tests.runs import MakeTrainer, differences, loader, make_module, rates, sgd, small_data, step_lr, weights


class Data(L.LightningDataModule):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(small_data(), self.batch_size)

    val_dataloader = train_dataloader


def fit(trainer: L.Trainer) -> tuple[Any, Any]:
    """Train for two epochs, with dropout but in block 0, whose random stream is Lightning's; return what came of it."""
    module = make_module(4, dropout=0.2, seed=3, lr_scheduler=step_lr)
    module.blocks[0].apply(lambda part: setattr(part, "p", 0.0))
    data = Data()
    data.batch_size = 8
    trainer.fit(module, datamodule=data)
    return weights(module), dict(trainer.callback_metrics)


class KeepsTheSize(BatchSizeFinder):
    """Puts back the batch size that the data had."""

    def scale_batch_size(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().scale_batch_size(trainer, pl_module)
        trainer.datamodule.batch_size = 8  # type: ignore[attr-defined]
        trainer.fit_loop._combined_loader = None
        trainer.fit_loop.epoch_loop.val_loop._combined_loader = None


@pytest.mark.parametrize(
    "make_finder",
    [
        lambda: LearningRateFinder(num_training_steps=12, update_attr=False),
        lambda: KeepsTheSize(max_trials=2, init_val=4),
    ],
    ids=["learning rate", "batch size"],
)
def test_a_finder_leaves_the_training_as_it_would_be(make_finder: Any, make_trainer: MakeTrainer) -> None:
    plain = fit(make_trainer(max_epochs=2))
    finder = make_finder()
    assert differences(fit(make_trainer(max_epochs=2, callbacks=[finder])), plain) == []


class WithRate(DGLModule):
    lr = 0.1


def test_a_rate_is_found_for_all_blocks(make_trainer: MakeTrainer) -> None:
    module, finder = make_module(4, kind=WithRate), LearningRateFinder(num_training_steps=15)
    make_trainer(max_epochs=3, callbacks=[finder]).fit(module, loader())
    assert finder.optimal_lr is not None
    found = finder.optimal_lr.suggestion()
    assert rates(module) == [found] * 4
    assert module.lr == found  # type: ignore[comparison-overlap]


def test_the_tuner_finds_a_rate_and_a_batch_size(make_trainer: MakeTrainer) -> None:
    module = make_module(4)
    before = weights(module)
    found: Any = Tuner(make_trainer(max_epochs=3)).lr_find(module, loader(), num_training=15, update_attr=False)
    assert 1e-8 < found.suggestion() < 1
    assert Tuner(make_trainer()).scale_batch_size(module, datamodule=Data(), init_val=4, max_trials=2) == 8
    assert differences(weights(module), before) == []


@pytest.mark.parametrize("method", ["validate", "test"])
def test_a_batch_size_for_evaluation_does_not_change_what_is_measured(method: str, make_trainer: MakeTrainer) -> None:
    class TestData(Data):
        test_dataloader = Data.train_dataloader

    def evaluate(**kwargs: Any) -> Any:
        module = make_module(4, seed=3, optimizer=sgd)
        return getattr(make_trainer(**kwargs), method)(module, datamodule=TestData(), verbose=False)

    (expected,) = evaluate()
    (found,) = evaluate(callbacks=[BatchSizeFinder(max_trials=2, init_val=4)])
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["async", "sequential"])
@pytest.mark.parametrize(
    ("make_callback", "message"),
    [
        (LearningRateFinder, r"LearningRateFinder measures steps in which all blocks train.*DGLStrategy\('sync'\)"),
        (BatchSizeFinder, r"BatchSizeFinder measures steps in which all blocks train.*DGLStrategy\('sync'\)"),
        (lambda: StochasticWeightAveraging(0.01), r"StochasticWeightAveraging goes by the Trainer's epochs"),
    ],
)
def test_what_needs_all_blocks_in_every_step_is_refused_without(
    schedule: str, make_callback: Any, message: str, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(strategy=DGLStrategy(schedule), max_epochs=4, callbacks=[make_callback()])
    with pytest.raises(ValueError, match=message):
        trainer.fit(make_module(4), datamodule=Data())
    assert trainer.global_step == 0
