"""Modules, strategies and batches that cannot be trained on raise before a weight changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_dgl import DGLModule
from tests.checks.unchanged import Unchanged
from tests.runs import MakeTrainer, loader, make_module, sgd, small_cnn, small_data, weights


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
    module = make_module(2)
    with Unchanged(module), pytest.raises(TypeError, match=r"DGLModule trains under .* got Sharded.*strategy='dgl'"):
        make_trainer(strategy=Sharded()).fit(module, loader())


# Batches


def data(inputs: Tensor, targets: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(inputs, targets), batch_size=8)


@pytest.mark.parametrize("target", [4, -1, 255])
def test_targets_out_of_range(target: int, make_trainer: MakeTrainer) -> None:
    inputs, targets = small_data(16).tensors
    targets = targets.clone()
    targets[3] = target
    message = f"Targets must be from 0 to 3, the network has 4 classes, got {target}"
    module = make_module(2)
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
    trainer.fit(make_module(2), data(inputs, targets), data(inputs, targets))
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
    module = make_module(2)
    with Unchanged(module, parameters_only=True), pytest.raises(ValueError, match=r"got targets of shape"):
        make_trainer().fit(module, data(inputs, change(targets)))


@pytest.mark.parametrize("empty", [[], ["drop_last"]])
def test_empty_training_data(empty: list[str], make_trainer: MakeTrainer) -> None:
    module = make_module(2)
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
    module = make_module(2)
    with (
        Unchanged(module),
        pytest.raises(TypeError, match=rf"A batch must be a pair of tensors \(inputs, targets\), {found}.*collate_fn"),
    ):
        getattr(make_trainer(), stage)(module, DataLoader(Samples(sample), batch_size=8))


def test_inputs_of_another_size_than_the_example(make_trainer: MakeTrainer) -> None:
    # Every head pools, so other sizes are no mistake.
    make_trainer().fit(make_module(2), data(torch.randn(16, 3, 12, 12), small_data(16).tensors[1]))


def test_training_batch_of_one_sample(make_trainer: MakeTrainer) -> None:
    module = make_module(2, head="mlp_sr")
    for num_samples, batch_size in ((9, 8), (8, 1)):
        with Unchanged(module), pytest.raises(ValueError, match=r"one sample.*drop_last=True"):
            make_trainer().fit(module, loader(num_samples, batch_size))
    with pytest.raises(ValueError, match=r"one sample.*drop_last=True"):  # seen when it comes
        make_trainer().fit(module, DataLoader(small_data(9), batch_sampler=[range(8), [8]]))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4), nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.BatchNorm2d(4), nn.Flatten())]
)
def test_training_batch_of_one_sample_for_a_norm_of_the_network(norm: nn.Module, make_trainer: MakeTrainer) -> None:
    stem = [nn.Conv2d(3, 4, 3), nn.ReLU()]
    network = nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm, nn.Linear(4, 4))
    module = DGLModule(network, 2, example_input=(2, 3, 8, 8), head="linear")
    with Unchanged(module), pytest.raises(ValueError, match=r"one sample.*BatchNorm of the network.*drop_last=True"):
        make_trainer().fit(module, loader(9, 8))


@pytest.mark.parametrize(
    "make_data",
    [
        lambda: loader(num_samples=9, batch_size=8, drop_last=True),
        lambda: loader(num_samples=17, batch_size=8),
        lambda: loader(num_samples=9, batch_size=8, collate_fn=lambda batch: default_collate(batch * 2)),
        lambda: DataLoader(list(loader(num_samples=16, batch_size=8)), batch_size=None),
    ],
    ids=["dropped", "not reached", "made more by the loader", "batched before"],
)
def test_training_without_a_batch_of_one_sample(make_data: Callable[[], Any], make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(limit_train_batches=2)
    trainer.fit(make_module(2, head="mlp_sr"), make_data())
    assert trainer.global_step > 0


# What would train silently wrong


def test_layer_replaced_after_the_module_was_made(make_trainer: MakeTrainer) -> None:
    module = make_module(2)
    module.network[-1] = nn.Linear(16, 4)
    with pytest.raises(ValueError, match=r"network has changed.*'16.weight' is in no block"):
        make_trainer().fit(module, loader())


def test_copy_of_a_module_trains_its_own_parameters(make_trainer: MakeTrainer) -> None:
    module = make_module(2)
    before = weights(module)
    twin = copy.deepcopy(module)
    make_trainer().fit(twin, loader())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(torch.equal(before[name], p) for name, p in twin.named_parameters() if p.ndim > 1)
