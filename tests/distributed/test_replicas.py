"""Replicas of every stage: together they train as one process does on the joint batch."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_dgl import DGLModule
from tests.distributed.ranks import Keep, Launch, Notes, Run, comparable, fit
from tests.internals import blocks_here
from tests.runs import block_weights, differences, loader, sgd, small_data, step_lr


def plain_cnn() -> nn.Sequential:
    """Three convolutions without BatchNorm, so that a batch may be dealt to replicas; cut after "1" and "4"."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


def flat_head(channels: int, spatial_size: Any, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * spatial_size**2, num_classes))


def make_plain_module(kind: type[DGLModule] = DGLModule, **kwargs: Any) -> DGLModule:
    defaults: dict[str, Any] = {"optimizer": sgd, "lr_scheduler": step_lr, "head": ["linear", flat_head]}
    return kind(plain_cnn(), split_at=["1", "4"], example_input=(2, 3, 8, 8), **{**defaults, **kwargs})


class OwnBlocks(L.Callback):
    """Remembers this rank's own blocks as they are before ranks exchange them."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Tensor]] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        own = block_weights(pl_module)
        self.seen = {j: own[j] for j in blocks_here(trainer)}


def assert_replicas_are_equal(run: Run, num_replicas: int) -> None:
    blocks = [note["seen"][0] for note in run.ranks]
    num_stages = len(blocks) // num_replicas
    assert sorted(j for own in blocks[:num_stages] for j in own) == [0, 1, 2]
    for rank in range(num_stages, len(blocks)):
        assert differences(blocks[rank], blocks[rank % num_stages]) == []


class DealtData(L.LightningDataModule):
    """Deals sample i to replica i % R in order, so that R batches hold the same samples as a joint one.

    Left to itself, Lightning shuffles what it deals out for training.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        data = small_data(48)
        sampler = DistributedSampler(data, shuffle=False, **self.trainer.distributed_sampler_kwargs)
        return DataLoader(data, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> Any:
        return loader(32, self.batch_size)


@pytest.mark.parametrize("num_ranks", [2, 4, pytest.param(6, marks=pytest.mark.slow)])
def test_replicas_equal_one_process_with_the_joint_batch(num_ranks: int, launch: Launch) -> None:
    def run(num_ranks: int, batch_size: int) -> Run:
        def act(trainer: L.Trainer) -> DGLModule:
            return fit(trainer, make_plain_module(), (DealtData(batch_size),))

        keep = ModelCheckpoint(filename="last")
        return launch(
            num_ranks,
            act,
            data_parallel_size=min(num_ranks, 2),
            callbacks=[keep, OwnBlocks()],
            enable_checkpointing=True,
            accumulate_grad_batches=2,
            gradient_clip_val=0.3,
        )

    one, several = run(1, batch_size=8), run(num_ranks, batch_size=4)
    (expected,) = one.ranks
    assert len(several.ranks) == num_ranks
    for note in several.ranks:
        assert note["progress"] == expected["progress"] == (6, 2)
        assert differences(note["weights"], expected["weights"], tolerance=1e-6) == []
        assert differences(note["weights"], several.ranks[0]["weights"]) == []
        assert note["metrics"].keys() == expected["metrics"].keys()
        for name in (name for name in expected["metrics"] if name.startswith("val/")):
            assert differences(note["metrics"][name], expected["metrics"][name], tolerance=1e-6) == []
            assert differences(note["metrics"][name], several.ranks[0]["metrics"][name]) == []
    assert_replicas_are_equal(several, num_replicas=2)
    saved, expected_file = (comparable(run.checkpoints["last.ckpt"]) for run in (several, one))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert differences(saved[part], expected_file[part], tolerance=1e-6) == []


class Samples(L.Callback):
    """Remembers which samples this rank reads, by epoch; on later stages, nothing."""

    def __init__(self) -> None:
        self.known = {round(float(x.sum()), 3): i for i, x in enumerate(small_data(24).tensors[0])}
        self.seen: dict[int, list[int]] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, (list, tuple)):
            samples = [self.known[round(float(x.sum()), 3)] for x in batch[0]]
            self.seen.setdefault(trainer.current_epoch, []).extend(samples)


def test_one_block_on_two_replicas_is_data_parallel_backpropagation(launch: Launch) -> None:
    def run(num_ranks: int, batch_size: int) -> list[Any]:
        def act(trainer: L.Trainer) -> DGLModule:
            module = DGLModule(plain_cnn(), 1, example_input=(2, 3, 8, 8), optimizer=sgd)
            return fit(trainer, module, (DealtData(batch_size),))

        return launch(num_ranks, act, data_parallel_size=num_ranks).ranks

    (one,), several = run(1, batch_size=8), run(2, batch_size=4)
    assert len(several) == 2
    for note in several:
        assert differences(note["weights"], one["weights"], tolerance=1e-6) == []


def test_replicas_share_the_data_anew_in_each_epoch(launch: Launch) -> None:
    run = launch(
        4,
        lambda trainer: fit(trainer, make_plain_module(), (loader(24, 4, shuffle=True),)),
        data_parallel_size=2,
        callbacks=[Samples()],
    )
    first, later, second, later_too = (note["seen"][0] for note in run.ranks)
    assert later == later_too == {}
    for epoch in range(2):
        assert sorted(first[epoch] + second[epoch]) == list(range(24))
    assert first[0] != first[1]
    assert sorted(first[0]) != sorted(first[1])


def test_replicas_predict_their_shares(launch: Launch) -> None:
    def run(num_ranks: int) -> list[Notes]:
        def act(trainer: L.Trainer) -> None:
            trainer.predict(make_plain_module(), loader(24, 4), return_predictions=False)

        return launch(num_ranks, act, data_parallel_size=min(num_ranks, 2), callbacks=[Keep()]).ranks

    (one,), several = run(1), run(4)
    scores = torch.cat(one["seen"][0])
    for rank, note in enumerate(several):
        torch.testing.assert_close(torch.cat(note["seen"][0]), scores[rank // 2 :: 2])


class SpoiltOnOneReplica(DGLModule):
    """On the second replica, the loss of block 0 is not a number in step 1, that of the last block in step 2."""

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        loss = super().local_loss(block, scores, targets)
        is_second = self.trainer.global_rank >= self.trainer.world_size // 2
        spoilt = self.trainer.training and (block, self.trainer.global_step) in ((0, 1), (2, 2))
        return loss * float("nan") if is_second and spoilt else loss


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_replica_may_skip_what_the_others_do_not(num_ranks: int, launch: Launch) -> None:
    def act(trainer: L.Trainer) -> DGLModule:
        return fit(trainer, make_plain_module(SpoiltOnOneReplica, on_nonfinite="skip"), (loader(48, 4), loader(16, 4)))

    run = launch(num_ranks, act, data_parallel_size=2, callbacks=[OwnBlocks()])
    assert run.ranks[0]["progress"] == (12, 2)
    assert all(value.isfinite().all() for value in run.result.state_dict().values())
    assert_replicas_are_equal(run, num_replicas=2)
    undisturbed = launch(
        num_ranks, lambda trainer: fit(trainer, make_plain_module(), (loader(48, 4),)), data_parallel_size=2
    )
    assert differences(undisturbed.ranks[0]["weights"], run.ranks[0]["weights"]) != []
