"""Bad input raises before a weight changes, and says which argument is wrong, its value and what to do."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torchvision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dgl import DGLModule, DGLStrategy, SplitError
from tests.conftest import loader, small_cnn, small_data

MakeTrainer = Callable[..., L.Trainer]
EXAMPLE = (2, 3, 8, 8)


def make_module(**kwargs: Any) -> DGLModule:
    defaults: dict[str, Any] = {"split_at": ["6"], "example_input": EXAMPLE, "head": "linear"}
    return DGLModule(small_cnn(), **{**defaults, **kwargs})


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Unchanged:
    """Checks on leaving that the module's weights and buffers are those of before."""

    def __init__(self, module: nn.Module, parameters_only: bool = False) -> None:
        self.module, self.before = module, state(module)
        self.names = [name for name, _ in module.named_parameters()] if parameters_only else list(self.before)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        after = self.module.state_dict()
        assert all(torch.equal(self.before[name], after[name]) for name in self.names)


# The network and how it is split


class NotScores(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.features = small_cnn()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.features(x))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda scores: scores[:, :, None], r"shape \(2, 4, 1\)"),
        (lambda scores: scores.mean(dim=1), r"shape \(2,\)"),
        (lambda scores: scores[:, :1], r"shape \(2, 1\)"),
        (lambda scores: torch.cat([scores, scores]), r"shape \(4, 4\)"),
        (lambda scores: (scores, scores), "something other than one tensor"),
        (lambda scores: {"scores": scores}, "something other than one tensor"),
    ],
)
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_network_output_that_is_not_class_scores(change: Callable[[Tensor], Any], found: str, num_blocks: int) -> None:
    network = NotScores(change)
    with (
        Unchanged(network),
        pytest.raises(
            ValueError, match=rf"network must return class scores \(N, classes\), but NotScores returns {found}"
        ),
    ):
        DGLModule(network, num_blocks=num_blocks, example_input=EXAMPLE)


def test_network_with_auxiliary_outputs() -> None:
    network = torchvision.models.googlenet(aux_logits=True, init_weights=False)
    with pytest.raises(ValueError, match=r"something other than one tensor in train mode.*aux_logits=False"):
        DGLModule(network, num_blocks=2, example_input=(2, 3, 96, 96))


def test_network_that_is_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"network must be an nn\.Module, got function"):
        DGLModule(lambda x: x, num_blocks=2, example_input=EXAMPLE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of num_blocks and split_at, got num_blocks=None and split_at=None"),
        ({"num_blocks": 2, "split_at": ["6"]}, r"exactly one of num_blocks and split_at, got num_blocks=2"),
        ({"num_blocks": 0}, "num_blocks must be a whole number of at least 1, got 0"),
        ({"num_blocks": 2.5}, r"num_blocks must be a whole number of at least 1, got 2\.5"),
        ({"num_blocks": 200}, "200"),
        ({"split_at": "6"}, r"split_at must be a list of names, got the string '6'. Write \['6'\]"),
        ({"split_at": ["nowhere"]}, "split_at names 'nowhere', which is not a split point of Sequential"),
        ({"split_at": ["6", "6"]}, "split_at names the same place twice: '6'"),
        ({"split_at": ["10", "6"]}, "split_at is out of order: '6' comes before '10'"),
    ],
)
def test_splitting_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SplitError, match=message):
        DGLModule(small_cnn(), example_input=EXAMPLE, **arguments)


@pytest.mark.parametrize(
    ("example_input", "message"),
    [
        (torch.zeros(3), r"example_input must be a batch.*got shape \(3,\)"),
        (torch.zeros(2, 5, 8, 8), r"example_input of shape \(2, 5, 8, 8\).*does not pass through Sequential"),
        ((2, 5, 8, 8), r"example_input of shape \(2, 5, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), "example_input must be a batch"),
        (None, "example_input must be a batch.*got None"),
        ("cifar", "example_input must be a batch.*got 'cifar'"),
        ((), "example_input must be a batch"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), "example_input of shape .*float64"),
        (torch.zeros(2, 3, 8, 8, device="meta"), r"example_input is on meta, but the network is on cpu"),
    ],
)
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_example_input(example_input: Any, message: str, num_blocks: int) -> None:
    with pytest.raises(SplitError, match=message):
        DGLModule(small_cnn(), num_blocks=num_blocks, example_input=example_input)


# Other arguments


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def step_lr(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


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
        ({"head": "conv"}, "head must be one of 'linear', 'mlp', 'mlp_sr', 'cnn' or a callable, got 'conv'"),
        ({"head": ["conv"]}, "head must be one of .* got 'conv'"),
        ({"lr_interval": "batch"}, "lr_interval must be one of 'epoch', 'step', got 'batch'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of 'raise', 'skip', got 'ignore'"),
        ({"balance": "speed", "split_at": None, "num_blocks": 2}, "balance must be one of .*'speed'"),
    ],
)
def test_arguments_with_a_wrong_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": 3}, "head must be one of .* a callable .* got int"),
        ({"head": nn.Linear(8, 4)}, "head must"),
        ({"head": None}, "head must be one of .* got NoneType"),
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
        make_module(**arguments)


class Pooled(nn.Sequential):
    def __init__(self, channels: int, num_classes: int, *first: nn.Module) -> None:
        super().__init__(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


@pytest.mark.parametrize("num_classes", [5, 1])
def test_head_with_another_number_of_classes(num_classes: int) -> None:
    with pytest.raises(
        ValueError, match=rf"The head of block 0 must return class scores \(2, 4\), but returns \(2, {num_classes}\)"
    ):
        make_module(head=lambda channels, spatial_size, _: Pooled(channels, num_classes))


def test_head_without_pooling() -> None:
    with pytest.raises(ValueError, match=r"must return class scores .*\(channels, spatial_size, num_classes\) = \(8, "):
        make_module(head=lambda channels, spatial_size, num_classes: nn.Conv2d(channels, num_classes, 1))


def test_head_that_does_not_take_the_block_s_output() -> None:
    with pytest.raises((ValueError, TypeError), match="head of block 0"):
        make_module(head=lambda channels, spatial_size, num_classes: nn.Linear(17, num_classes))


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Dropout(inplace=True), nn.Hardswish(inplace=True)])
def test_head_that_works_in_place_on_its_input(first: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"head of block 0 overwrites its input in place.*inplace=False"):
        make_module(head=lambda channels, spatial_size, num_classes: Pooled(channels, num_classes, first))


def test_strategy_arguments() -> None:
    with pytest.raises(ValueError, match=r"schedule must be one of 'sync'.* got 'fast'"):
        DGLStrategy(schedule="fast")
    with pytest.raises(TypeError, match=r"schedule must be .* got int"):
        DGLStrategy(schedule=3)  # type: ignore[arg-type]


# What a Trainer is given


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = small_cnn()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_module_that_is_not_a_dgl_module(stage: str, make_trainer: MakeTrainer) -> None:
    module = Plain()
    with Unchanged(module), pytest.raises(TypeError, match=r"DGLStrategy trains a DGLModule, got Plain.*DGLModule\("):
        getattr(make_trainer(), stage)(module, loader())


class Sharded(SingleDeviceStrategy.__base__):  # type: ignore[misc, name-defined]
    """A strategy of a kind that DGLModule does not know, such as FSDP, which needs CUDA."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def is_global_zero(self) -> bool:
        return True

    def model_to_device(self) -> None: ...

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def all_gather(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    def barrier(self, name: str | None = None) -> None: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj


def test_strategy_that_may_shard(make_trainer: MakeTrainer) -> None:
    module = make_module()
    with Unchanged(module), pytest.raises(TypeError, match=r"DGLModule trains under .* got Sharded.*strategy='dgl'"):
        make_trainer(strategy=Sharded()).fit(module, loader())


def data(inputs: Tensor, targets: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(inputs, targets), batch_size=8)


@pytest.mark.parametrize("target", [4, -1, 255])
def test_targets_out_of_range(target: int, make_trainer: MakeTrainer) -> None:
    inputs, targets = small_data(16).tensors
    targets = targets.clone()
    targets[3] = target
    message = f"Targets must be from 0 to 3, the network has 4 classes, got {target}"
    module = make_module()
    with Unchanged(module), pytest.raises(ValueError, match=message):
        make_trainer().fit(module, data(inputs, targets))
    with Unchanged(module), pytest.raises(ValueError, match=message):
        make_trainer().validate(module, data(inputs, targets), verbose=False)
    with Unchanged(module), pytest.raises(ValueError, match=message):
        make_trainer().fit(module, loader(), data(inputs, targets))


def test_targets_to_be_ignored_are_not_out_of_range(make_trainer: MakeTrainer) -> None:
    inputs, targets = small_data(16).tensors
    targets = targets.clone()
    targets[3] = -100  # what cross-entropy ignores by default
    trainer = make_trainer()
    trainer.fit(make_module(), data(inputs, targets), data(inputs, targets))
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda targets: targets[:, None],
        lambda targets: targets.float(),
        lambda targets: nn.functional.one_hot(targets, 5).float(),
        lambda targets: nn.functional.one_hot(targets, 4),
    ],
    ids=["column", "float", "five classes", "integer one-hot"],
)
def test_targets_of_a_wrong_shape(change: Callable[[Tensor], Tensor], make_trainer: MakeTrainer) -> None:
    inputs, targets = small_data(16).tensors
    module = make_module()
    with Unchanged(module, parameters_only=True), pytest.raises(ValueError, match=r"got targets of shape"):
        make_trainer().fit(module, data(inputs, change(targets)))


@pytest.mark.parametrize("empty", [[], ["drop_last"]])
def test_empty_training_data(empty: list[str], make_trainer: MakeTrainer) -> None:
    module = make_module()
    dataset = small_data(5 if empty else 0)
    with Unchanged(module), pytest.raises(ValueError, match=r"training data loader is empty.*drop_last"):
        make_trainer().fit(module, DataLoader(dataset, batch_size=8, drop_last=bool(empty)))


class Samples(torch.utils.data.Dataset[Any]):
    def __init__(self, sample: Any) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return self.sample


IMAGE, LABEL = torch.zeros(3, 8, 8), torch.tensor(1)


@pytest.mark.parametrize(
    ("sample", "found"),
    [
        (IMAGE, "got Tensor"),
        ((IMAGE,), "got a list of Tensor"),
        ((IMAGE, LABEL, LABEL), "got a list of Tensor, Tensor, Tensor"),
        ({"image": IMAGE, "label": LABEL}, "got dict"),
        ((IMAGE, {"label": LABEL}), "got a list of Tensor, dict"),
        ((IMAGE, "cat"), "got a list of Tensor, (list|tuple)"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_batches_that_are_not_pairs(sample: Any, found: str, stage: str, make_trainer: MakeTrainer) -> None:
    module = make_module()
    with (
        Unchanged(module),
        pytest.raises(TypeError, match=rf"A batch must be a pair of tensors \(inputs, targets\), {found}.*collate_fn"),
    ):
        getattr(make_trainer(), stage)(module, DataLoader(Samples(sample), batch_size=8))


def test_inputs_of_another_size_than_the_example(make_trainer: MakeTrainer) -> None:
    # Every head pools, so other sizes are no mistake.
    make_trainer().fit(make_module(), data(torch.randn(16, 3, 12, 12), small_data(16).tensors[1]))


# Optimizers and schedulers


def test_optimizer_that_needs_a_closure(make_trainer: MakeTrainer) -> None:
    module = make_module(optimizer=[sgd, torch.optim.LBFGS])
    with (
        Unchanged(module),
        pytest.raises(ValueError, match=r"optimizer of block 1, LBFGS, needs a closure.*SGD or Adam"),
    ):
        make_trainer().fit(module, loader())


def test_optimizer_factory_that_returns_something_else(make_trainer: MakeTrainer) -> None:
    module = make_module(optimizer=lambda params: list(params))
    with Unchanged(module), pytest.raises(TypeError, match=r"optimizer .*block 0.* list"):
        make_trainer().fit(module, loader())


def test_scheduler_factory_that_returns_something_else(make_trainer: MakeTrainer) -> None:
    module = make_module(lr_scheduler=lambda optimizer: {"scheduler": step_lr(optimizer)})
    with Unchanged(module), pytest.raises(TypeError, match=r"lr_scheduler .*block 0.* dict"):
        make_trainer().fit(module, loader())


def test_plateau_for_some_blocks_only(make_trainer: MakeTrainer) -> None:
    module = make_module(lr_scheduler=[step_lr, torch.optim.lr_scheduler.ReduceLROnPlateau])
    with Unchanged(module), pytest.raises(ValueError, match="lr_scheduler mixes ReduceLROnPlateau"):
        make_trainer().fit(module, loader(), loader())


def test_plateau_without_validation(make_trainer: MakeTrainer) -> None:
    module = make_module(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with Unchanged(module), pytest.raises(ValueError, match=r"ReduceLROnPlateau.*validation"):
        make_trainer().fit(module, loader())


def test_overridden_configure_optimizers(make_trainer: MakeTrainer) -> None:
    class Own(DGLModule):
        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    module = Own(small_cnn(), split_at=["6"], example_input=EXAMPLE)
    with Unchanged(module), pytest.raises(TypeError, match=r"configure_optimizers returned SGD.*optimizer=\.\.\."):
        make_trainer().fit(module, loader())


def test_no_optimizer(make_trainer: MakeTrainer) -> None:
    class Own(DGLModule):
        def configure_optimizers(self) -> Any:
            return None

    module = Own(small_cnn(), split_at=["6"], example_input=EXAMPLE)
    with Unchanged(module), pytest.raises(TypeError, match=r"configure_optimizers returned"):
        make_trainer().fit(module, loader())


def test_block_without_parameters(make_trainer: MakeTrainer) -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(dim=1))
    )
    module = DGLModule(network, split_at=["1"], example_input=EXAMPLE, head="linear")
    with Unchanged(module), pytest.raises(ValueError, match=r"Block 1 \(.*\) has no parameters to train.*split_at"):
        make_trainer().fit(module, loader())


def test_messages_are_one_line() -> None:
    with pytest.raises(SplitError) as caught:
        make_module(split_at=["nowhere"])
    assert not re.search(r"\n", str(caught.value))


# What would train silently wrong


def test_layer_replaced_after_the_module_was_made(make_trainer: MakeTrainer) -> None:
    module = make_module()
    module.network[-1] = nn.Linear(16, 4)
    with pytest.raises(ValueError, match=r"network has changed.*'16.weight' is in no block"):
        make_trainer().fit(module, loader())


def test_copy_of_a_module_trains_its_own_parameters(make_trainer: MakeTrainer) -> None:
    module = make_module()
    before = state(module)
    twin = copy.deepcopy(module)
    make_trainer().fit(twin, loader())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(torch.equal(before[name], p) for name, p in twin.named_parameters() if p.ndim > 1)


def test_loss_with_parameters() -> None:
    loss = nn.AdaptiveLogSoftmaxWithLoss(4, 4, [2])
    with pytest.raises(ValueError, match=r"loss \(AdaptiveLogSoftmaxWithLoss\) has parameters"):
        make_module(loss=loss)


def test_training_batch_of_one_sample(make_trainer: MakeTrainer) -> None:
    module = make_module(head="mlp_sr")
    with pytest.raises(ValueError, match=r"one sample.*drop_last=True"):
        make_trainer().fit(module, loader(num_samples=9, batch_size=8))
    make_trainer().fit(module, loader(num_samples=9, batch_size=8, drop_last=True))
