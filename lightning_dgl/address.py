"""Addresses: which batch of data an activation comes from."""

from __future__ import annotations

from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage

START_OF_VALIDATION = "start of validation"
"""Phase of the mark that follows the batches of training before a validation."""

END_OF_EPOCH = "end of epoch"
"""Phase of the mark that follows the batches of an epoch of training, and their validation."""


class Address(NamedTuple):
    """The batch of data that an activation comes from.

    Attributes:
        phase: what the Trainer does with it: "train", "validate", "sanity_check", "test" or "predict".
        epoch: the Trainer's epoch, from 0.
        dataloader_idx: which of several evaluation data loaders.
        batch_idx: number of the batch in its data loader.
        step: number of the training batch over all epochs; 0 in evaluation.
    """

    phase: str
    epoch: int
    dataloader_idx: int
    batch_idx: int
    step: int

    @property
    def is_mark(self) -> bool:
        """Whether it is no batch, but a place after the batches of training so far, where all ranks meet."""
        return self.phase in (START_OF_VALIDATION, END_OF_EPOCH)

    @property
    def is_training(self) -> bool:
        """Whether blocks train on the batch."""
        return self.phase == RunningStage.TRAINING.value

    def __str__(self) -> str:
        if self.is_mark:
            return f"the {self.phase.removesuffix(' of epoch')} of epoch {self.epoch}, after batch {self.batch_idx}"
        return f"batch {self.batch_idx} of {self.phase!r} in epoch {self.epoch} (data loader {self.dataloader_idx})"


def current_address(trainer: Trainer, batch_idx: int, dataloader_idx: int = 0) -> Address:
    """Return the address of the batch that a running Trainer is at."""
    running = trainer.state.stage
    assert running is not None
    step = trainer.fit_loop.total_batch_idx if trainer.training else 0
    return Address(running.value, trainer.current_epoch, dataloader_idx, batch_idx, step)
