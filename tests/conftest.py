"""What several test files share: small networks and data, and a Trainer that is quiet and fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from tests.jobs import Job


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-models", action="store_true", help="test every torchvision classification model")


@pytest.fixture(autouse=True)
def _doctest_namespace(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, nn=nn)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small_cnn(num_classes: int = 4, dropout: float = 0.0) -> nn.Sequential:
    """Four convolutions for (N, 3, 8, 8) inputs; cuts after "2", "6" and "10" leave one convolution in each block."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Dropout(dropout), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(16, num_classes),
    )


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)


class Backpropagation(L.LightningModule):
    """End-to-end backpropagation of a network with :func:`sgd`, without this package."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


def small_data(num_samples: int = 40, num_classes: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_samples, 3, 8, 8, generator=generator)
    return TensorDataset(inputs, torch.randint(0, num_classes, (num_samples,), generator=generator))


def loader(num_samples: int = 40, batch_size: int = 8, **kwargs: Any) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(small_data(num_samples), batch_size=batch_size, **kwargs)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A training in processes of its own, ended with the test."""
    from tests.jobs import Job  # which needs what is defined here

    with Job(tmp_path) as job:
        yield job


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Make a quiet one-device CPU Trainer under DGLStrategy that writes below ``tmp_path``; arguments override."""

    def make(**kwargs: Any) -> L.Trainer:
        defaults: dict[str, Any] = {
            "strategy": "dgl",
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**{**defaults, **kwargs})

    return make
