"""Whatever callbacks and hooks read on a rank is the run's, or says that it is not."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn

from lightning_dgl import DGLModule, DGLStrategy
from tests.distributed.ranks import Launch, Run, assert_same_outcome, dropout_module, fit
from tests.distributed.training import weights_of
from tests.runs import adam, differences, loader, small_data


class Reader(L.Callback):
    """Reads weights, scores and logged values wherever the run's own are to be had, and tries to elsewhere."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.messages: set[str] = set()

    def _read(self, when: str, trainer: L.Trainer, module: Any) -> None:
        was_training = module.network.training
        module.eval()
        with torch.no_grad():
            scores = [module.network(small_data(4).tensors[0]), module(small_data(4).tensors[0], block=1)]
        module.train(was_training)
        logged = {name: value.cpu() for name, value in trainer.callback_metrics.items() if "skipped" not in name}
        self.seen.append((when, weights_of(module), scores, logged))
        if when == "epoch end":  # and the gradients of the blocks that are trained here, no others
            for j in range(module.num_blocks):
                has_gradients = {p.grad is not None for p in module.block_parameters(j)}
                assert has_gradients == {j in module.run.stage.blocks}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read("epoch start", trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read("validation", trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read("epoch end", trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read("end", trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        run = pl_module.run
        pl_module.log("mine/by_callback", float(trainer.global_step), batch_size=1)
        pl_module.log("mine/rank", float(trainer.global_rank), sync_dist=True, batch_size=1)
        assert all(p.isfinite().all() for j in run.stage.blocks for p in pl_module.block_parameters(j))
        if not run.stage.is_split:
            return
        if trainer.global_rank > 0:  # the first rank is told of the others' values some steps later
            known = [name for name in trainer.callback_metrics if name.startswith("train/")]
            assert all(int(name[-1]) in run.stage.blocks for name in known if "_block" in name), known
            assert run.stage.is_last == ("train/loss" in known), known
        there = next(j for j in range(pl_module.num_blocks) if j not in run.stage.blocks)
        weight = pl_module.block_parameters(there)[0]
        assert (weight.shape, weight.requires_grad, "Block" in repr(weight)) == (weight.size(), True, True)
        running_mean = next(
            t for t in pl_module.block_tensors(there) if not t.is_floating_point() or not t.requires_grad
        )
        for read in (
            *(pl_module.state_dict, lambda: weight.data, lambda: weight.grad, lambda: weight + 1, lambda: weight.sum()),
            *(lambda: running_mean.clone(), lambda: pl_module.network.eval()(small_data(4).tensors[0])),
            lambda: nn.utils.clip_grad_norm_(pl_module.parameters(), 1.0),
        ):
            with pytest.raises(RuntimeError) as caught:
                read()
            self.messages.add(re.sub(r"\d+", "N", str(caught.value)))
        pl_module.train()
        with pytest.raises(RuntimeError, match=r"trains only blocks .* cannot be called between training steps"):
            pl_module(small_data(4).tensors[0])
        if trainer.global_step == 7:
            trainer.strategy.sync_blocks()  # type: ignore[attr-defined]
            self.seen.append(weights_of(pl_module))


class Logging(DGLModule):
    """Logs for each block, where it is trained, and clips gradients in a hook."""

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        phase = "train" if self.trainer.training else "val"
        self.log(f"mine/{phase}_block{block}", scores.detach().std(), batch_size=len(targets), on_epoch=True)
        return super().local_loss(block, scores, targets)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")


def test_weights_and_values_are_those_of_the_run(launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        def act(trainer: L.Trainer) -> None:
            fit(trainer, dropout_module(kind=Logging), (loader(38, shuffle=True), loader(20)))

        return launch(num_ranks, act, callbacks=[Reader()], val_check_interval=3, num_sanity_val_steps=1)

    one, several = run(1), run(3)
    (expected,) = one.ranks
    (moments,) = expected["seen"]
    assert [moment[0] for moment in moments].count("validation") == 2 + 1
    for rank, note in enumerate(several.ranks):
        (seen,) = note["seen"]
        synced = [moment for moment in seen if isinstance(moment, str)]
        assert len(synced) == 1
        seen = [moment for moment in seen if not isinstance(moment, str)]
        assert [moment[:2] for moment in seen] == [moment[:2] for moment in moments]
        for (when, _, scores, logged), (_, _, own_scores, own_logged) in zip(seen, moments, strict=True):
            assert differences(scores, own_scores) == [], when
            assert logged.pop("mine/rank", 1.0) == 1.0, when  # the mean over ranks 0, 1 and 2
            own_logged = {name: value for name, value in own_logged.items() if name != "mine/rank"}
            if when != "epoch start":
                assert differences(logged, own_logged) == [], (rank, when)
        assert differences(note["weights"], expected["weights"]) == []
    names = {name for row in one.rows.values() for name in row} - {"mine/rank"}
    assert {"mine/train_block3_step", "mine/train_block3_epoch", "mine/val_block3", "mine/by_callback"} <= names
    for step, row in one.rows.items():
        several_row = several.rows[step]
        assert {k: v for k, v in several_row.items() if k != "mine/rank"} == {
            k: v for k, v in row.items() if k != "mine/rank"
        }


# Finetuning


class Backbone(DGLModule):
    backbone = property(lambda self: self.network[:9])  # in blocks 0, 1 and 2


def test_a_backbone_is_unfrozen(launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        def act(trainer: L.Trainer) -> None:
            fit(trainer, dropout_module(kind=Backbone, optimizer=adam), (loader(38, shuffle=True), loader(20)))

        return launch(num_ranks, act, callbacks=[BackboneFinetuning(1, backbone_initial_lr=0.001)], max_epochs=3)

    assert_same_outcome(run(2), run(1))


# Batches that are skipped


class Skipping(DGLModule):
    """Ends epochs early, on some ranks."""

    ranks: tuple[int, ...] = (0, 1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 and self.trainer.global_rank in self.ranks else None


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_an_epoch_may_end_early_on_every_rank(schedule: str, launch: Launch) -> None:
    def run(num_ranks: int) -> Run:
        strategy = {"strategy": DGLStrategy("async", timeout=60, start_method="fork")} if schedule == "async" else {}
        data = (loader(48), loader(20))
        return launch(num_ranks, lambda t: fit(t, dropout_module(2, kind=Skipping), data), **strategy)

    several = run(2)
    assert [note["progress"] for note in several.ranks] == [(6, 2)] * 2
    if schedule == "sync":
        assert_same_outcome(several, run(1))


@pytest.mark.parametrize(("rank", "schedule"), [(0, "sync"), (0, "async"), (1, "sync"), (1, "async")])
def test_an_epoch_that_ends_early_on_one_rank_is_an_error_at_once(rank: int, schedule: str, launch: Launch) -> None:
    strategy = DGLStrategy(schedule, timeout=60, start_method="fork")

    def act(trainer: L.Trainer) -> None:
        module = dropout_module(2, kind=Skipping)
        module.ranks = (rank,)
        fit(trainer, module, (loader(48), loader(20)))

    with pytest.raises(RuntimeError, match=r"ranks have come apart: .*(the end of epoch 0, after batch|is at batch 3)"):
        launch(2, act, strategy=strategy)


def _without_one(samples: Any) -> Any:
    return None if samples[0][1] == 0 else torch.utils.data.default_collate(samples)


class OwnStep(DGLModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx)


def test_what_would_part_the_ranks_is_refused(launch: Launch) -> None:
    data = (loader(38, batch_size=2, collate_fn=_without_one),)
    with pytest.raises(
        RuntimeError, match=r"A batch is None, which Lightning skips on the rank that reads the data only"
    ):
        launch(2, lambda trainer: fit(trainer, dropout_module(2), data))
    with pytest.raises(
        (ValueError, RuntimeError), match=r"OwnStep overrides training_step, .* on_after_batch_transfer, .*local_loss"
    ):
        launch(2, lambda trainer: fit(trainer, dropout_module(2, kind=OwnStep), (loader(),)))
