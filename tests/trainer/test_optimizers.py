"""Each block's optimizer trains that block, whatever the factory and callbacks do."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn

from lightning_dgl import DGLModule, DGLStrategy
from lightning_dgl.optim import sgd as default_optimizer
from tests.runs import MakeTrainer, loader, make_module, same, sgd, small_cnn


def test_names_come_with_the_parameters(make_trainer: MakeTrainer) -> None:
    seen: dict[str, nn.Parameter] = {}

    def without_decay(params: Any) -> torch.optim.Optimizer:
        seen.update(params.named())
        decay = [p for name, p in params.named() if name.endswith("weight") and p.ndim > 1]
        rest = [p for name, p in params.named() if not (name.endswith("weight") and p.ndim > 1)]
        return torch.optim.SGD([{"params": decay}, {"params": rest, "weight_decay": 0.0}], 0.1, weight_decay=0.5)

    module = make_module(4, optimizer=without_decay)
    make_trainer().fit(module, loader())
    own = dict(module.network.named_parameters()) | {f"heads.{k}": p for k, p in module.heads.named_parameters()}
    assert {name: id(p) for name, p in seen.items()} == {name: id(p) for name, p in own.items()}
    groups = module.optimizers().param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0] * 4


def test_a_named_optimizer_of_torch_takes_them(make_trainer: MakeTrainer) -> None:
    module, plain = (
        make_module(2, seed=1, optimizer=lambda params, named=named: sgd(params.named() if named else params))
        for named in (True, False)
    )
    for each in (module, plain):
        L.seed_everything(1, verbose=False)
        make_trainer().fit(each, loader())
    assert same(dict(module.state_dict()), dict(plain.state_dict()))
    assert module.optimizers().param_groups[0]["param_names"][0] == "0.weight"


NETWORK = small_cnn()
WRONG: dict[str, tuple[Any, str]] = {
    "the whole network": (
        lambda params: torch.optim.SGD(NETWORK.parameters(), 0.1),
        r"The optimizer of block 0 \(0 to 6\) trains parameters that are not the block's: '8\.weight' of block 1 and "
        r"9 more\. Let it train exactly .*params\.named\(\)",
    ),
    "the head is forgotten": (
        lambda params: torch.optim.SGD([p for name, p in params.named() if not name.startswith("heads")], 0.1),
        r"The optimizer of block 0 \(0 to 6\) leaves out 'heads\.0\.\S+' and \d+ more, which would not train",
    ),
    "one of no block": (
        lambda params: torch.optim.SGD([*params, nn.Parameter(torch.zeros(1))], 0.1),
        r"The optimizer of block 0 .* trains parameters that are not the block's: one of no block\.",
    ),
    "no optimizer": (lambda params: None, "optimizer must return a torch.optim.Optimizer, block 0 got NoneType"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_optimizer_of_other_parameters_is_refused(case: str, make_trainer: MakeTrainer) -> None:
    factory, message = WRONG[case]
    module = make_module(2, network=NETWORK, optimizer=factory)
    with pytest.raises((ValueError, TypeError), match=message):
        make_trainer().fit(module, loader())


def test_frozen_parameters_may_be_left_out(make_trainer: MakeTrainer) -> None:
    module = make_module(2, optimizer=lambda params: sgd([p for p in params if p.requires_grad]))
    for parameter in module.block_parameters(0):
        parameter.requires_grad_(False)
    before = [p.clone() for p in module.block_parameters(0)]
    make_trainer().fit(module, loader())
    assert all(torch.equal(p, q) for p, q in zip(module.block_parameters(0), before, strict=True))


# Parameter groups that callbacks add


class Backbone(DGLModule):
    backbone = property(lambda self: self.network[:9])  # in block 0 and in block 1


class Rates(L.Callback):
    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.rates.append([group["lr"] for group in pl_module.optimizers().param_groups])
        parts = [own.param_groups[1]["lr"] for own in pl_module.optimizers().optimizers if len(own.param_groups) > 1]
        assert parts in ([], [self.rates[-1][-1]] * 2)


TRAINABLE = lambda params: sgd([p for p in params if p.requires_grad])  # noqa: E731


@pytest.mark.parametrize("schedule, optimizer", [("sync", sgd), ("async", default_optimizer), ("sync", TRAINABLE)])
def test_a_backbone_is_unfrozen_and_resumed(
    schedule: str, optimizer: Any, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    def fit(module: DGLModule, epochs: int, ckpt_path: Path | None = None) -> Rates:
        rates, unfreeze = Rates(), BackboneFinetuning(1, backbone_initial_lr=0.001)
        save = ModelCheckpoint(tmp_path / str(epochs), "{epoch}", save_top_k=-1)
        trainer = make_trainer(
            max_epochs=epochs,
            callbacks=[unfreeze, rates, save],
            enable_checkpointing=True,
            strategy=DGLStrategy(schedule),
        )
        L.seed_everything(1, verbose=False)
        trainer.fit(module, loader(shuffle=True), ckpt_path=ckpt_path)
        return rates

    module = make_module(2, kind=Backbone, optimizer=optimizer, seed=1)
    before = module.network[0].weight.clone()
    rates = fit(module, 4).rates
    main = rates[0][0]
    assert rates == [pytest.approx(own) for own in ([main] * 2, *([main, main, lr] for lr in (0.001, 0.002, 0.004)))]
    assert not torch.equal(module.network[0].weight, before)
    resumed = make_module(2, kind=Backbone, optimizer=optimizer, seed=2)
    assert fit(resumed, 4, tmp_path / "4" / "epoch=1.ckpt").rates == rates[2:]
    if schedule == "sync":
        assert same(dict(resumed.state_dict()), dict(module.state_dict()))


def test_a_group_of_a_parameter_in_no_block_is_refused(make_trainer: MakeTrainer) -> None:
    module = make_module(2)
    make_trainer().fit(module, loader())
    with pytest.raises(ValueError, match="is in no block"):
        module.optimizers().add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


# What a checkpoint does not hold


def test_what_must_be_passed_again_is_named(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    smooth, adam = nn.CrossEntropyLoss(label_smoothing=0.3), functools.partial(torch.optim.AdamW, lr=0.01)
    trainer = make_trainer()
    trainer.fit(make_module(2, loss=smooth, optimizer=adam), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(
        UserWarning, match=r"loss=CrossEntropyLoss, optimizer=AdamW\(lr=0\.01\), which checkpoints do not"
    ):
        loaded = DGLModule.load_from_checkpoint(tmp_path / "a.ckpt", network=small_cnn())
    assert loaded.hparams["example_input"] == [2, 3, 8, 8]
    with pytest.raises(ValueError, match=r"optimizer state of block 0 is not of SGD: it has no 'momentum'. Pass"):
        make_trainer(max_epochs=2).fit(loaded, loader(), ckpt_path=tmp_path / "a.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The checkpoint is of a module with")
        DGLModule.load_from_checkpoint(tmp_path / "a.ckpt", network=small_cnn(), loss=smooth, optimizer=adam)


def test_manual_optimization_is_refused(make_trainer: MakeTrainer) -> None:
    module = make_module(2)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization=False is not supported"):
        make_trainer().fit(module, loader())
