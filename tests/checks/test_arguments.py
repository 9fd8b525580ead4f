"""Arguments that do not fit raise before a weight changes, and say which one is wrong, its value and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dgl import DGLModule, DGLStrategy
from tests.checks.unchanged import Unchanged
from tests.runs import MakeTrainer, loader, make_module, sgd, small_cnn, step_lr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": ["linear", "linear"]}, "head is a list of 2, but must have 1"),
        ({"head": []}, "head is a list of 0, but must have 1"),
        ({"head": []} | {"split_at": ["2", "6"]}, "head is a list of 0, but must have 2"),
        ({"head": ["linear"] * 3, "split_at": ["2", "6"]}, "head is a list of 3, but must have 2"),
        ({"head": ["linear"], "split_at": ["2", "6"]}, "head is a list of 1, but must have 2"),
        ({"head": ["linear"], "split_at": None, "num_blocks": 3}, "head is a list of 1, but must have 2"),
        ({"head": ["linear"], "split_at": []}, "head is a list of 1, but must have 0"),
        ({"optimizer": [sgd]}, "optimizer is a list of 1, but must have 2: one for each block"),
        ({"optimizer": [sgd] * 3}, "optimizer is a list of 3, but must have 2"),
        ({"lr_scheduler": [step_lr]}, "lr_scheduler is a list of 1, but must have 2"),
        (
            {"head": "conv"},
            "head must be 'linear', 'mlp', 'mlp_sr', 'cnn', 'augmented', an Augmented, or a callable, got 'conv'",
        ),
        ({"head": ["conv"]}, "head must be .* got 'conv'"),
        ({"lr_interval": "batch"}, "lr_interval must be one of 'epoch', 'step', got 'batch'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of 'raise', 'skip', got 'ignore'"),
        ({"balance": "speed", "split_at": None, "num_blocks": 2}, "balance must be one of .*'speed'"),
    ],
)
def test_arguments_with_a_wrong_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(2, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": 3}, "head must be .* a callable .* got int"),
        ({"head": nn.Linear(8, 4)}, "head must"),
        ({"head": None}, "head must be .* got NoneType"),
        (
            {"head": lambda channels, spatial_size, num_classes: None},
            r"head must make an nn\.Module, block 0 got NoneType",
        ),
        ({"optimizer": "sgd"}, "optimizer must be a callable .* got str"),
        ({"optimizer": None}, "optimizer must be a callable .* got NoneType"),
        ({"optimizer": torch.optim.SGD(small_cnn().parameters(), lr=0.1)}, "optimizer must be a callable .* got SGD"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler must be a callable .* got str"),
        ({"metrics": "accuracy"}, "metrics must be a torchmetrics Metric or MetricCollection, got str"),
    ],
)
def test_arguments_of_a_wrong_type(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make_module(2, **arguments)


def test_strategy_arguments() -> None:
    with pytest.raises(ValueError, match=r"schedule must be one of 'sync'.* got 'fast'"):
        DGLStrategy(schedule="fast")
    with pytest.raises(TypeError, match=r"schedule must be .* got int"):
        DGLStrategy(schedule=3)  # type: ignore[arg-type]


class Configured(Sequence[Any]):
    """A list as libraries of configurations make them: no list, but a sequence."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)


def test_any_sequence_may_stand_for_a_list(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    arguments = {
        "split_at": Configured("2", "6"),
        "example_input": Configured(2, 3, 8, 8),
        "head": Configured("linear", "mlp"),
        "optimizer": Configured(sgd, sgd, torch.optim.Adam),
        "lr_scheduler": Configured(step_lr, step_lr, step_lr),
    }
    trainer = make_trainer(strategy=DGLStrategy(codec=Configured("half", None)))
    trainer.fit(make_module(2, **arguments), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    # Only plain values can be read safely.
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["split_at"] == ["2", "6"]


# Losses


def test_loss_with_parameters() -> None:
    loss = nn.AdaptiveLogSoftmaxWithLoss(4, 4, [2])
    with pytest.raises(ValueError, match=r"loss \(AdaptiveLogSoftmaxWithLoss\) has parameters"):
        make_module(2, loss=loss)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"a tensor of shape \(2,\)"),
        (lambda scores, targets: nn.functional.cross_entropy(scores, targets)[None], r"a tensor of shape \(1,\)"),
        (lambda scores, targets: float(nn.functional.cross_entropy(scores, targets)), "float"),
        # For class probabilities only
        (lambda scores, targets: (scores - targets).square(), r"a tensor of shape \(2, 4\)"),
    ],
)
def test_loss_that_is_no_scalar(loss: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"loss must return a scalar, got {found}\. Average over the samples"):
        make_module(2, loss=loss)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, "cross_entropy"])
def test_loss_that_cannot_be_called(loss: Any) -> None:
    with pytest.raises(TypeError, match=r"loss must be a callable \(scores, targets\) -> scalar, got (Cross|str)"):
        make_module(2, loss=loss)


class Counting(nn.Module):
    """Draws random numbers and keeps count, and only takes targets (N, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        self.count += 1
        noise = torch.rand(())
        if targets.ndim != 2 or targets.shape[1] != 1:
            raise ValueError("other targets")
        return noise * scores.mean()


def test_trying_a_loss_changes_nothing() -> None:
    loss = Counting()
    torch.manual_seed(1)
    plain = make_module(2)
    after = torch.rand(1)
    torch.manual_seed(1)
    module = make_module(2, loss=loss)
    assert torch.equal(torch.rand(1), after)
    assert loss.count == 0
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), module.parameters(), strict=True))


@pytest.mark.parametrize("method", ["fit", "validate"])
def test_local_loss_that_is_no_scalar(method: str, make_trainer: MakeTrainer) -> None:
    class Own(DGLModule):
        def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(scores, targets, reduction="mean" if block == 0 else "none")

    module = make_module(2, kind=Own)
    message = r"local loss of block 1 must be a scalar, got a tensor of shape \(8,\)\. Average"
    with Unchanged(module, parameters_only=True), pytest.raises(ValueError, match=message):
        getattr(make_trainer(), method)(module, loader())


# Optimizers and schedulers


def test_optimizer_that_needs_a_closure(make_trainer: MakeTrainer) -> None:
    module = make_module(2, optimizer=[sgd, torch.optim.LBFGS])
    with (
        Unchanged(module),
        pytest.raises(ValueError, match=r"optimizer of block 1, LBFGS, needs a closure.*SGD or Adam"),
    ):
        make_trainer().fit(module, loader())


def test_optimizer_factory_that_returns_something_else(make_trainer: MakeTrainer) -> None:
    module = make_module(2, optimizer=lambda params: list(params))
    with Unchanged(module), pytest.raises(TypeError, match=r"optimizer .*block 0.* list"):
        make_trainer().fit(module, loader())


def test_scheduler_factory_that_returns_something_else(make_trainer: MakeTrainer) -> None:
    module = make_module(2, lr_scheduler=lambda optimizer: {"scheduler": step_lr(optimizer)})
    with Unchanged(module), pytest.raises(TypeError, match=r"lr_scheduler .*block 0.* dict"):
        make_trainer().fit(module, loader())


def test_plateau_for_some_blocks_only(make_trainer: MakeTrainer) -> None:
    module = make_module(2, lr_scheduler=[step_lr, torch.optim.lr_scheduler.ReduceLROnPlateau])
    with Unchanged(module), pytest.raises(ValueError, match="lr_scheduler mixes ReduceLROnPlateau"):
        make_trainer().fit(module, loader(), loader())


def test_plateau_without_validation(make_trainer: MakeTrainer) -> None:
    module = make_module(2, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with Unchanged(module), pytest.raises(ValueError, match=r"ReduceLROnPlateau.*validation"):
        make_trainer().fit(module, loader())


def test_overridden_configure_optimizers(make_trainer: MakeTrainer) -> None:
    class Own(DGLModule):
        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    module = Own(small_cnn(), split_at=["6"], example_input=(2, 3, 8, 8))
    with Unchanged(module), pytest.raises(TypeError, match=r"configure_optimizers returned SGD.*optimizer=\.\.\."):
        make_trainer().fit(module, loader())


def test_no_optimizer(make_trainer: MakeTrainer) -> None:
    class Own(DGLModule):
        def configure_optimizers(self) -> Any:
            return None

    module = Own(small_cnn(), split_at=["6"], example_input=(2, 3, 8, 8))
    with Unchanged(module), pytest.raises(TypeError, match=r"configure_optimizers returned"):
        make_trainer().fit(module, loader())


def test_block_without_parameters(make_trainer: MakeTrainer) -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(dim=1))
    )
    module = DGLModule(network, split_at=["1"], example_input=(2, 3, 8, 8), head="linear")
    with Unchanged(module), pytest.raises(ValueError, match=r"Block 1 \(.*\) has no parameters to train.*split_at"):
        make_trainer().fit(module, loader())
