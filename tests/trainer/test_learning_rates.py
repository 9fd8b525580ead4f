"""Every block's learning rate, and what shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    LearningRateMonitor,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_dgl import DGLModule
from tests.runs import MakeTrainer, cosine, loader, make_module, rates, sgd, step_lr


def test_schedulers_step_each_epoch_or_each_step(make_trainer: MakeTrainer) -> None:
    for interval, factor in (("epoch", 0.5**2), ("step", 0.5**10)):
        module = make_module(4, lr_scheduler=step_lr, lr_interval=interval)
        make_trainer(max_epochs=2).fit(module, loader())
        assert rates(module) == pytest.approx([0.05 * factor] * 4)


def test_each_block_may_have_its_own_optimizer_and_scheduler(make_trainer: MakeTrainer) -> None:
    def decay(gamma: float) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
        return lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)

    module = make_module(
        2,
        optimizer=[sgd, lambda params: torch.optim.Adam(params, lr=0.01)],
        lr_scheduler=[decay(0.5), decay(0.1)],
    )
    make_trainer(max_epochs=2).fit(module, loader())
    assert rates(module) == pytest.approx([0.05 * 0.25, 0.01 * 0.01])
    kinds = [type(optimizer) for optimizer in module.optimizers().optimizers]
    assert kinds == [torch.optim.SGD, torch.optim.Adam]


def test_reduce_on_plateau_follows_each_block_s_own_validation_loss(make_trainer: MakeTrainer) -> None:
    class OnlyBlock1Improves(DGLModule):
        def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
            loss = super().local_loss(block, scores, targets)
            return loss if self.trainer.training else 0 * loss + (1.0 if block == 0 else -self.current_epoch)

    def plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)

    module = make_module(2, kind=OnlyBlock1Improves, lr_scheduler=plateau)
    make_trainer(max_epochs=3).fit(module, loader(), loader())
    assert rates(module) == pytest.approx([0.05 * 0.01, 0.05])


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    """Halve the rate at each step of the scheduler, as nothing is good enough."""
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e6, factor=0.5)


@pytest.mark.parametrize(
    ("when", "num_steps"),
    [
        ({}, 4),
        ({"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}, 2),
        ({"val_check_interval": 2, "check_val_every_n_epoch": None}, 4),
    ],
)
@pytest.mark.parametrize("num_loaders", [1, 2])
def test_reduce_on_plateau_steps_after_epochs_with_validation(
    when: dict[str, Any], num_steps: int, num_loaders: int, make_trainer: MakeTrainer
) -> None:
    module = make_module(2, lr_scheduler=halving)
    make_trainer(max_epochs=4, **when).fit(module, loader(), [loader(16), loader(8)][:num_loaders])
    assert rates(module) == pytest.approx([0.05 * 0.5**num_steps] * 2)


def test_reduce_on_plateau_follows_the_first_of_several_loaders(make_trainer: MakeTrainer) -> None:
    class OnlyTheFirstImproves(DGLModule):
        def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
            loss = super().local_loss(block, scores, targets)
            return loss if self.trainer.training else 0 * loss - self.current_epoch * (1.0 if len(scores) == 8 else -1)

    def plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)

    for loaders, expected in (((loader(8), loader(4)), 0.05), ((loader(4), loader(8)), 0.05 * 0.01)):
        module = make_module(2, kind=OnlyTheFirstImproves, lr_scheduler=plateau)
        make_trainer(max_epochs=3).fit(module, loader(), list(loaders))
        assert rates(module) == pytest.approx([expected] * 2)


@pytest.mark.parametrize(
    "when", [{"val_check_interval": 7, "check_val_every_n_epoch": None}, {"val_check_interval": "00:01:00:00"}]
)
def test_reduce_on_plateau_without_a_validation_in_each_epoch_is_refused(
    when: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(max_epochs=4, **when)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau.*val_check_interval=(7|a time) an epoch of 5 batches"):
        trainer.fit(make_module(2, lr_scheduler=halving), loader(), loader())
    assert trainer.global_step == 0


@pytest.mark.parametrize("with_scheduler", [True, False])
@pytest.mark.parametrize("num_blocks", [1, 4])
def test_learning_rate_monitor_shows_each_rate_once(
    with_scheduler: bool, num_blocks: int, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    def make(rate: float) -> Callable[..., torch.optim.Optimizer]:
        return lambda params: torch.optim.SGD(params, lr=rate)

    wanted = [0.1 * (j + 1) for j in range(num_blocks)]
    module = make_module(
        num_blocks,
        optimizer=[make(rate) for rate in wanted],
        lr_scheduler=(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 1.0)) if with_scheduler else None,
    )
    logger = CSVLogger(tmp_path)
    monitor = LearningRateMonitor(logging_interval="step")
    make_trainer(logger=logger, callbacks=[monitor], log_every_n_steps=1).fit(module, loader())
    names = [f"lr/block{j}" for j in range(num_blocks)]
    if with_scheduler:
        assert list(monitor.lrs) == names
    else:  # Lightning names what has no scheduler after the optimizer
        assert [name.rpartition("/")[2] for name in monitor.lrs] == [f"block{j}" for j in range(num_blocks)]
    assert [values[0] for values in monitor.lrs.values()] == pytest.approx(wanted)
    assert {len(values) for values in monitor.lrs.values()} == {5}


def test_learning_rate_monitor_names_parameter_groups(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    def two_groups(params: Any) -> torch.optim.Optimizer:
        params = list(params)
        return torch.optim.SGD([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], lr=0.1)

    module = make_module(2, optimizer=two_groups, lr_scheduler=cosine)
    monitor = LearningRateMonitor(logging_interval="step")
    trainer = make_trainer(logger=CSVLogger(tmp_path), callbacks=[monitor], log_every_n_steps=1)
    trainer.fit(module, loader())
    first = {name: values[0] for name, values in monitor.lrs.items()}
    assert first == {"lr/block0/pg1": 0.5, "lr/block0/pg2": 0.1, "lr/block1/pg1": 0.5, "lr/block1/pg2": 0.1}
