"""Settings of the Trainer and of the module come on three ranks to what they come to in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    Timer,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_dgl import DGLModule
from tests.distributed.ranks import Launch, Run, assert_same_outcome, dropout_module, fit, scaled
from tests.runs import Shifted, adam, block_parameters, loader, make_module, sgd, step_lr


class Flattening(nn.Module):
    """Images become tokens (N, T, C) half-way, of which the classifier reads the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Conv2d(3, 16, 4, stride=2)
        self.norm = nn.LayerNorm(16)
        self.mix = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.images(x).flatten(2).transpose(1, 2))
        return self.classifier((x + torch.relu(self.mix(x))).mean(dim=1))


def frozen_module() -> DGLModule:
    """Its first three blocks train nothing, neither in the network nor in their heads."""
    module = dropout_module()
    for j in range(3):
        for p in block_parameters(module)[j]:
            p.requires_grad_(False)
    return module


class Spoilt(DGLModule):
    """The loss of block 1 is not a number in step 2, that of the last block in step 3."""

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        loss = super().local_loss(block, scores, targets)
        spoilt = self.trainer.training and (block, self.trainer.global_step) in ((1, 2), (3, 3))
        return loss * float("nan") if spoilt else loss


class OneCycle(DGLModule):
    """Its learning-rate schedulers are told how many steps there will be."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, lr_scheduler=self._make_scheduler, **kwargs)

    def _make_scheduler(self, optimizer: Optimizer) -> LRScheduler:
        return OneCycleLR(optimizer, max_lr=0.1, total_steps=int(self.trainer.estimated_stepping_batches))


class LogsBatchNumbers(L.Callback):
    """Leaves it to Lightning to find out the size of a batch."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("number", float(batch_idx), on_step=True, on_epoch=True)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        pl_module.log("val/number", float(batch_idx))


def soft(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, targets = (torch.stack(parts) for parts in zip(*batch, strict=True))
    return inputs, 0.9 * nn.functional.one_hot(targets, 4) + 0.025


class GrowingData(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return loader(24 + 8 * self.trainer.current_epoch, shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(20)


# Made anew for each run: "module" and "data" make these, "proof" tells from the run whether the setting had an effect;
# the rest is for the Trainer. Settings of different parts share a run, as a run takes seconds.
SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "limits": lambda: {
        "limit_train_batches": 3,
        "limit_val_batches": 0.5,
        "proof": lambda run: run.trainer.global_step == 6,
    },
    "fast_dev_run": lambda: {"fast_dev_run": 2},
    "max_steps within an epoch": lambda: {
        "max_epochs": -1,
        "max_steps": 7,
        "proof": lambda run: run.trainer.global_step == 7,
    },
    "max_steps with accumulation": lambda: {
        "max_epochs": -1,
        "max_steps": 4,
        "accumulate_grad_batches": 2,
        "proof": lambda run: run.trainer.global_step == 4,
    },
    "val_check_interval": lambda: {"val_check_interval": 0.4, "proof": lambda run: "val/loss" in run.rows[3]},
    "check_val_every_n_epoch": lambda: {
        "check_val_every_n_epoch": 2,
        "max_epochs": 3,
        "proof": lambda run: [step for step, row in run.rows.items() if "val/loss" in row] == [9],
    },
    "several validation loaders, full sanity check, own metrics": lambda: {
        "module": lambda: dropout_module(
            metrics=MetricCollection({"f1": MulticlassF1Score(4), "top2": MulticlassAccuracy(4, top_k=2)})
        ),
        "num_sanity_val_steps": -1,
        "data": lambda: (loader(shuffle=True), [loader(20), loader(12, 4)]),
        "proof": lambda run: (
            {"train/f1_block0"} | {f"val/top2_ensemble/dataloader_idx_{i}" for i in range(2)} <= run.names
        ),
    },
    "overfit_batches": lambda: {"overfit_batches": 2, "data": lambda: (loader(38), loader(20))},
    "loaders made anew": lambda: {"reload_dataloaders_every_n_epochs": 1, "data": lambda: (GrowingData(),)},
    "loader with workers": lambda: {"data": lambda: (loader(38, shuffle=True, num_workers=1), loader(20))},
    "scheduled accumulation": lambda: {
        "callbacks": [GradientAccumulationScheduler({0: 2, 1: 1})],
        "proof": lambda run: run.trainer.global_step == 8,
    },
    "early stopping within an epoch": lambda: {
        "callbacks": [EarlyStopping("val/loss", min_delta=0.05, patience=1)],
        "val_check_interval": 0.4,
        "max_epochs": 8,
        "proof": lambda run: run.trainer.global_step % 5 > 0,
    },
    "early stopping on a training value": lambda: {
        "callbacks": [EarlyStopping("train/loss_block0", min_delta=0.1, patience=0, check_on_train_epoch_end=True)],
        "max_epochs": 8,
        "proof": lambda run: 1 < run.trainer.current_epoch < 8,
    },
    "timer, a callback that logs": lambda: {
        "callbacks": [LogsBatchNumbers(), Timer(duration={"hours": 1})],  # which lets all ranks meet after each batch
        "proof": lambda run: {"number", "val/number"} <= run.names,
    },
    "plateau": lambda: {
        "module": lambda: dropout_module(lr_scheduler=lambda own: ReduceLROnPlateau(own, patience=0, threshold=0.03)),
        "callbacks": [LearningRateMonitor()],
        "max_epochs": 4,
        "proof": lambda run: len({tuple(rates(row)) for row in run.rows.values() if len(set(rates(row))) > 1}) > 0,
    },
    "learning rates by step": lambda: {
        "module": lambda: dropout_module(lr_scheduler=step_lr, lr_interval="step"),
        "callbacks": [LearningRateMonitor("step")],
        "log_every_n_steps": 1,
        "proof": lambda run: rates(run.rows[3]) == ["0.00625"] * 4,
    },
    "learning rates over all steps": lambda: {
        "module": lambda: dropout_module(kind=OneCycle, lr_interval="step"),
        "callbacks": [LearningRateMonitor("step")],
        "proof": lambda run: float(rates(run.rows[9])[0]) < 1e-4,
    },
    "optimizers of different kinds, soft targets, no sanity check": lambda: {
        "module": lambda: dropout_module(optimizer=[sgd, adam, sgd, adam]),
        "data": lambda: (loader(collate_fn=soft), loader(collate_fn=soft)),
        "num_sanity_val_steps": 0,
    },
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed": scaled,
    "channels last, clipping by value": lambda: {
        "module": lambda: dropout_module().to(memory_format=torch.channels_last),
        "gradient_clip_val": 0.01,
        "gradient_clip_algorithm": "value",
    },
    "tokens, 64-true": lambda: {
        "precision": "64-true",
        "module": lambda: DGLModule(
            Flattening(), split_at=["images", "norm"], example_input=(2, 3, 8, 8), head="linear", optimizer=adam
        ),
    },
    "parameters and buffers of the root": lambda: {
        "module": lambda: DGLModule(
            Shifted(), split_at=["first"], example_input=(2, 3, 8, 8), head="linear", optimizer=sgd
        ),
        "num_ranks": 2,
    },
    "frozen blocks, no validation": lambda: {"module": frozen_module, "data": lambda: (loader(),)},
    "skipped blocks": lambda: {
        "module": lambda: dropout_module(kind=Spoilt, on_nonfinite="skip"),
        "proof": lambda run: (
            [run.trainer.callback_metrics[f"train/skipped_block{j}"] for j in range(4)] == [0, 1, 0, 1]
        ),
    },
}


def rates(row: dict[str, str]) -> list[str]:
    return [value for name, value in sorted(row.items()) if name.startswith("lr/block")]


@pytest.mark.parametrize("settings", SETTINGS)
def test_three_ranks_come_to_what_one_process_comes_to(settings: str, launch: Launch) -> None:
    def run(num_ranks: int) -> tuple[Run, Callable[[Run], bool]]:
        kwargs = SETTINGS[settings]()
        num_ranks = min(num_ranks, kwargs.pop("num_ranks", num_ranks))
        module = kwargs.pop("module", make_module)
        data = kwargs.pop("data", lambda: (loader(38, shuffle=True), loader(20)))
        proof = kwargs.pop("proof", lambda run: run.trainer.global_step > 0)
        return launch(num_ranks, lambda trainer: fit(trainer, module(), data()), **kwargs), proof

    (one, proof), (several, _) = run(1), run(3)
    assert proof(one)
    assert_same_outcome(several, one)
