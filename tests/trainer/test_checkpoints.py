"""Checkpoints: what is in them, what they restore, and that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_dgl import DGLModule
from tests.runs import (
    MakeTrainer,
    ResumableLoader,
    adam,
    loader,
    make_module,
    same,
    sgd,
    small_cnn,
    small_data,
    weights,
)

seeded_module = partial(make_module, seed=0, dropout=0.3)


@pytest.fixture
def saved(tmp_path: Path, make_trainer: MakeTrainer) -> tuple[DGLModule, Path]:
    """A module trained for an epoch, and its checkpoint."""
    module = seeded_module()
    trainer = make_trainer()
    trainer.fit(module, loader())
    path = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(path)
    return module, path


# What is in a checkpoint


def test_state_dict_holds_the_network_s_keys_and_the_heads_and_nothing_twice(saved: tuple[DGLModule, Path]) -> None:
    module, path = saved
    names = [f"network.{name}" for name in small_cnn().state_dict()]
    names += [f"heads.{j}.{name}" for j, head in enumerate(module.heads) for name in head.state_dict()]
    assert list(module.state_dict()) == names
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint["state_dict"]) == names
    pointers = [value.data_ptr() for value in module.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    assert len(list(module.parameters())) == len({id(p) for p in module.parameters()})


def test_network_weights_are_plain_weights(saved: tuple[DGLModule, Path], tmp_path: Path) -> None:
    module, _ = saved
    torch.save(module.network.state_dict(), tmp_path / "network.pt")
    fresh = small_cnn()
    fresh.load_state_dict(torch.load(tmp_path / "network.pt", weights_only=True))
    x = small_data().tensors[0]
    module.eval()
    assert torch.equal(fresh.eval()(x), module(x))


def test_a_whole_module_can_be_copied(saved: tuple[DGLModule, Path]) -> None:
    module, _ = saved
    twin = copy.deepcopy(module)
    x = small_data().tensors[0]
    assert all(
        torch.equal(a, b) for a, b in zip(twin.eval().block_scores(x), module.eval().block_scores(x), strict=True)
    )
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin.block_scores(x)[0].any()  # the copy's blocks belong to the copy's network
    assert module.block_scores(x)[0].any()


# Restoring


def test_load_from_checkpoint(saved: tuple[DGLModule, Path]) -> None:
    module, path = saved
    loaded = DGLModule.load_from_checkpoint(path, network=small_cnn(), example_input=torch.zeros(2, 3, 8, 8))
    assert same(dict(loaded.state_dict()), dict(module.state_dict()))
    assert loaded.block_names == module.block_names
    x = small_data().tensors[0]
    scores = zip(loaded.eval().block_scores(x), module.eval().block_scores(x), strict=True)
    assert all(torch.equal(a, b) for a, b in scores)


def test_load_from_checkpoint_with_num_blocks(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    module = seeded_module(num_blocks=3, head="linear")
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = DGLModule.load_from_checkpoint(
        tmp_path / "a.ckpt", network=small_cnn(), num_blocks=3, example_input=(2, 3, 8, 8)
    )
    assert same(dict(loaded.state_dict()), dict(module.state_dict()))


class Fixed(DGLModule):
    """Fixes some arguments, and hands on what else it is given."""

    def __init__(self, width: int = 8, **kwargs: Any) -> None:
        super().__init__(small_cnn(), split_at=["6"], example_input=(2, 3, 8, 8), optimizer=sgd, **kwargs)
        self.save_hyperparameters()


class HandsOn(DGLModule):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, example_input=(2, 3, 8, 8), **kwargs)


@pytest.mark.parametrize(
    ("make", "saved", "missing"),
    [
        (Fixed, {"width": 8}, {}),
        (lambda: Fixed(4, head="linear"), {"width": 4, "head": "linear"}, {}),
        (
            lambda: HandsOn(small_cnn(), 2, head="linear", balance="memory"),
            {"num_blocks": 2, "head": "linear", "balance": "memory"},
            {"network": small_cnn()},
        ),
    ],
)
def test_load_from_checkpoint_of_a_subclass_that_hands_on_arguments(
    make: Any, saved: dict[str, Any], missing: dict[str, Any], tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    module = make()
    trainer = make_trainer(limit_train_batches=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"] == saved
    assert copy.deepcopy(module).hparams == module.hparams
    loaded = type(module).load_from_checkpoint(tmp_path / "last.ckpt", **missing)
    assert same(weights(loaded), weights(module))
    assert type(loaded.heads[0]) is type(module.heads[0])


def test_blocks_balanced_by_time_are_loaded_as_they_were_cut(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    module = DGLModule(small_cnn(), 2, example_input=(8, 3, 8, 8), balance="time", head="linear")
    trainer = make_trainer(limit_train_batches=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert module.hparams["split_at"] == module.measured_cuts
    loaded = DGLModule.load_from_checkpoint(tmp_path / "last.ckpt", network=small_cnn())
    assert loaded.block_names == module.block_names
    assert same(weights(loaded), weights(module))


def test_a_datamodule_may_have_hyperparameters_of_the_same_name(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    class Data(L.LightningDataModule):
        def __init__(self, balance: bool = True) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return loader()

    logger = CSVLogger(tmp_path)
    trainer = make_trainer(logger=logger)
    trainer.fit(make_module(2, head="linear"), datamodule=Data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    logged = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert (logged["balance"], logged["head"]) == (True, "linear")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]["balance"] == "flops"


def test_load_from_checkpoint_may_name_the_cuts_instead(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    module = seeded_module(num_blocks=2, head="linear")
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    cuts = [point.name for point in module.split_points]
    loaded = DGLModule.load_from_checkpoint(
        tmp_path / "a.ckpt", network=small_cnn(), split_at=cuts, example_input=(2, 3, 8, 8)
    )
    assert same(dict(loaded.state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize("split_at", [["6"], ["2", "6", "9"]])
def test_a_checkpoint_of_another_split_is_refused(
    split_at: list[str], saved: tuple[DGLModule, Path], make_trainer: MakeTrainer
) -> None:
    _, path = saved
    other = seeded_module(split_at=split_at)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"checkpoint's blocks are .*this module's are .*split_at"):
        make_trainer(max_epochs=2).fit(other, loader(), ckpt_path=path, weights_only=True)
    assert same(before, dict(other.state_dict()))
    with pytest.raises(ValueError, match=r"checkpoint's blocks"):
        DGLModule.load_from_checkpoint(path, network=small_cnn(), example_input=(2, 3, 8, 8), split_at=split_at)


# Resuming


class LogRates(L.Callback):
    def __init__(self) -> None:
        self.rates: dict[int, list[float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.rates[trainer.global_step] = [group["lr"] for group in trainer.optimizers[0].param_groups]


@pytest.mark.parametrize(
    ("save", "validate"), [("train_epoch_end", False), ("train_epoch_end", True), ("validation_end", True)]
)
@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    save: str, validate: bool, optimizer: Any, interval: str, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    def cosine(own: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(own, T_max=4 if interval == "epoch" else 20)

    def train(module: DGLModule, **kwargs: Any) -> tuple[L.Trainer, LogRates]:
        rates = LogRates()
        keep = ModelCheckpoint(
            tmp_path,
            filename="{epoch}",
            save_top_k=-1,
            save_on_train_epoch_end=save == "train_epoch_end",
            enable_version_counter=False,
        )
        trainer = make_trainer(max_epochs=4, callbacks=[rates, keep], enable_checkpointing=True)
        data = [loader(num_samples=38, shuffle=True), *([loader()] if validate else [])]
        trainer.fit(module, *data, weights_only=True, **kwargs)
        return trainer, rates

    settings = {"optimizer": optimizer, "lr_scheduler": cosine, "lr_interval": interval}
    whole = seeded_module(**settings)
    _, all_rates = train(whole)
    final = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    resumed = seeded_module(seed=99, **settings)
    trainer, later_rates = train(resumed, ckpt_path=tmp_path / "epoch=1.ckpt")
    again = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    assert trainer.global_step == 20
    assert later_rates.rates == {step: rates for step, rates in all_rates.rates.items() if step > 10}
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert same(again[part], final[part]), part
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_resuming_with_plain_single_device_strategy(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    # Files do not depend on the strategy.
    whole, part, resumed = seeded_module(), seeded_module(), seeded_module(seed=5)
    torch.manual_seed(1)
    make_trainer(max_epochs=2).fit(whole, loader(shuffle=True))
    torch.manual_seed(1)
    first = make_trainer(max_epochs=1, strategy="auto")
    first.fit(part, loader(shuffle=True))
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = make_trainer(max_epochs=2, strategy="dgl")
    second.fit(resumed, loader(shuffle=True), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize("step", [3, 8])
def test_resuming_in_the_middle_of_an_epoch(step: int, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    def train(module: DGLModule, **kwargs: Any) -> None:
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(max_epochs=3, callbacks=[keep], enable_checkpointing=True)
        trainer.fit(module, ResumableLoader(), weights_only=True, **kwargs)
        assert trainer.global_step == 15

    whole, resumed = seeded_module(), seeded_module(seed=9)
    train(whole)
    train(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))


# ModelCheckpoint


def test_model_checkpoint_monitors_validation_accuracy(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    seen: list[float] = []

    class See(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
            if not trainer.sanity_checking:
                seen.append(trainer.callback_metrics["val/acc"].item())

    keep = ModelCheckpoint(tmp_path, monitor="val/acc", mode="max")
    trainer = make_trainer(max_epochs=4, callbacks=[See(), keep], enable_checkpointing=True)
    module = seeded_module()
    trainer.fit(module, loader(), loader())
    assert keep.best_model_score == pytest.approx(max(seen))
    assert torch.load(keep.best_model_path, weights_only=True)["epoch"] == seen.index(max(seen))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for p in module.parameters():
        nn.init.zeros_(p)
    (metrics,) = trainer.validate(module, loader(), ckpt_path="best", weights_only=True, verbose=False)
    assert metrics["val/acc"] == pytest.approx(max(seen))
    assert before.keys() == module.state_dict().keys()


def test_model_checkpoint_every_n_train_steps(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    make_trainer(max_epochs=2, callbacks=[keep], enable_checkpointing=True).fit(seeded_module(), loader())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=4.ckpt", "step=8.ckpt"]


def test_save_weights_only(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    module = seeded_module()
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    checkpoint = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert "optimizer_states" not in checkpoint
    loaded = DGLModule.load_from_checkpoint(tmp_path / "weights.ckpt", network=small_cnn(), example_input=(2, 3, 8, 8))
    assert same(dict(loaded.state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_a_checkpoint_read_for_evaluation_does_not_set_the_random_state(
    stage: str, saved: tuple[DGLModule, Path], make_trainer: MakeTrainer
) -> None:
    module, path = saved
    after = []
    for ckpt_path in (None, path):
        torch.manual_seed(7)
        getattr(make_trainer(), stage)(module, loader(), ckpt_path=ckpt_path, weights_only=True)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)
