"""What ends training, and how much is read."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_dgl import DGLModule
from tests.runs import MakeTrainer, loader, make_module, same, sgd, small_cnn, small_data, weights


@pytest.mark.parametrize(("accumulate", "batches_seen"), [(1, 7), (2, 14)])
def test_global_step_counts_batches_not_blocks(accumulate: int, batches_seen: int, make_trainer: MakeTrainer) -> None:
    seen: list[int] = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(trainer.global_step)

    trainer = make_trainer(max_epochs=-1, max_steps=7, accumulate_grad_batches=accumulate, callbacks=[Count()])
    trainer.fit(make_module(4), loader(num_samples=64))
    assert trainer.global_step == 7
    assert len(seen) == batches_seen
    assert seen == [(i + 1) // accumulate for i in range(batches_seen)]


def test_limits_of_batches(make_trainer: MakeTrainer) -> None:
    ran: list[str] = []

    class Count(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ran.append("train")

        def on_validation_batch_end(self, *_: Any) -> None:
            ran.append("val")

        def on_test_batch_end(self, *_: Any) -> None:
            ran.append("test")

        def on_predict_batch_end(self, *_: Any) -> None:
            ran.append("predict")

    trainer = make_trainer(
        limit_train_batches=3,
        limit_val_batches=2,
        limit_test_batches=1,
        limit_predict_batches=4,
        num_sanity_val_steps=0,
        callbacks=[Count()],
    )
    module = make_module(2)
    trainer.fit(module, loader(), loader())
    trainer.test(module, loader(), verbose=False)
    predictions = trainer.predict(module, loader())
    assert {stage: ran.count(stage) for stage in ran} == {"train": 3, "val": 2, "test": 1, "predict": 4}
    assert predictions is not None
    assert len(predictions) == 4


def test_limit_train_batches_zero_trains_nothing(make_trainer: MakeTrainer) -> None:
    module = make_module(2)
    before = weights(module)
    make_trainer(limit_train_batches=0).fit(module, loader())
    assert same(before, weights(module))


def test_fast_dev_run(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(fast_dev_run=True)
    trainer.fit(make_module(2), loader(), loader())
    assert trainer.global_step == 1
    assert "val/acc" in trainer.callback_metrics


def test_overfit_batches(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(overfit_batches=1, max_epochs=30)
    trainer.fit(make_module(4), loader())
    assert trainer.global_step == 30
    assert trainer.callback_metrics["train/acc"] == 1.0


def test_a_step_waits_for_the_device_equally_often_with_more_blocks(make_trainer: MakeTrainer) -> None:
    class Waits(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    class Counted(DGLModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with Waits() as waits:
                loss = super().training_step(batch, batch_idx)
            numbers.setdefault(self.num_blocks, []).append(waits.number)
            return loss

    numbers: dict[int, list[int]] = {}
    for cuts in (["6"], ["2", "6", "10"]):
        module = Counted(small_cnn(), split_at=cuts, example_input=(2, 3, 8, 8), optimizer=sgd)
        make_trainer(limit_train_batches=3, max_epochs=2).fit(module, loader())
    assert numbers[2] == numbers[4]  # whether losses are finite is asked for all blocks at once


def test_barebones(make_trainer: MakeTrainer) -> None:
    barebones = L.Trainer(strategy="dgl", accelerator="cpu", devices=1, max_epochs=1, barebones=True)
    a, b = make_module(2), make_module(2)
    b.load_state_dict(a.state_dict())
    barebones.fit(a, loader(), loader())
    make_trainer().fit(b, loader(), loader())
    assert same(weights(a), weights(b))


def test_detect_anomaly(make_trainer: MakeTrainer) -> None:
    a, b = make_module(4), make_module(4)
    b.load_state_dict(a.state_dict())
    make_trainer(detect_anomaly=True).fit(a, loader())
    make_trainer().fit(b, loader())
    assert same(weights(a), weights(b))


def test_fit_twice_continues(make_trainer: MakeTrainer) -> None:
    module = make_module(2)
    first = make_trainer(max_epochs=1)
    first.fit(module, loader(), loader())
    before = weights(module)
    make_trainer(max_epochs=1).fit(module, loader(), loader())
    assert not same(before, weights(module))


def test_training_data_without_length(make_trainer: MakeTrainer) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from small_data(24)

    trainer = make_trainer()
    trainer.fit(make_module(2), DataLoader(Stream(), batch_size=8))
    assert trainer.global_step == 3


def test_early_stopping(make_trainer: MakeTrainer) -> None:
    stop = EarlyStopping("val/acc", mode="max", patience=2, min_delta=2.0)  # no improvement is ever large enough
    trainer = make_trainer(max_epochs=20, callbacks=[stop])
    trainer.fit(make_module(4), loader(), loader())
    assert trainer.current_epoch == 3
