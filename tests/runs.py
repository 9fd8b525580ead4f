"""What all tests share: one small network, its data, one module and one Trainer made of them, and how to compare."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_dgl import DGLModule

MakeTrainer = Callable[..., L.Trainer]

# The network and its data


CUTS = {1: [], 2: ["6"], 4: ["2", "6", "10"]}
"""Where to cut :func:`small_cnn` into so many blocks."""


def small_cnn(num_classes: int = 4, dropout: float = 0.0) -> nn.Sequential:
    """Make four convolutions for (N, 3, 8, 8) inputs; in four blocks, each has one convolution and draws dropout."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Dropout(dropout), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(16, num_classes),
    )
    if dropout > 0:
        for i in (2, 7, 13):
            network[i] = nn.Sequential(network[i], nn.Dropout(dropout))
    return network


def small_data(num_samples: int = 40, num_classes: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_samples, 3, 8, 8, generator=generator)
    return TensorDataset(inputs, torch.randint(0, num_classes, (num_samples,), generator=generator))


def loader(num_samples: int = 40, batch_size: int = 8, **kwargs: Any) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(small_data(num_samples), batch_size=batch_size, **kwargs)


class ResumableLoader(DataLoader[Any]):
    """Continues after the batches that were read before the checkpoint; Lightning keeps its state."""

    def __init__(self) -> None:
        super().__init__(small_data(), batch_size=8)
        self._read = self._skip = 0

    def __iter__(self) -> Any:
        return self._unread(super().__iter__())

    def _unread(self, batches: Any) -> Any:
        skip, self._skip = self._skip, 0
        for self._read, batch in enumerate(batches, start=1):
            if self._read > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"read": self._read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["read"]


class Shifted(nn.Module):
    """Reads a parameter and a buffer of its own in a forward that a cut passes through."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.classifier = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.zeros(8, 1, 1))
        self.register_buffer("shift", torch.linspace(0, 1, 8).view(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x - self.shift[:3]))
        x = torch.relu(self.second(x) * self.scale + self.shift)
        return self.classifier(x.mean(dim=(2, 3)))


# The module and the Trainer


def sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)


def adam(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def step_lr(optimizer: Optimizer) -> LRScheduler:
    """Halve the rate at each step of the scheduler."""
    return StepLR(optimizer, step_size=1, gamma=0.5)


def make_module(
    blocks: int = 4,
    /,
    *,
    kind: type[DGLModule] = DGLModule,
    dropout: float = 0.0,
    seed: int | None = None,
    **kwargs: Any,
) -> DGLModule:
    """Make a module of :func:`small_cnn` in 1, 2 or 4 blocks, trained with :func:`sgd`; keywords are the module's."""
    if seed is not None:
        torch.manual_seed(seed)
    defaults: dict[str, Any] = {"network": small_cnn(dropout=dropout), "example_input": (2, 3, 8, 8)}
    defaults |= {"head": "mlp_sr", "optimizer": sgd}
    if "num_blocks" not in kwargs:
        defaults["split_at"] = CUTS[blocks]
    return kind(**{**defaults, **kwargs})


class Backpropagation(L.LightningModule):
    """End-to-end backpropagation of a network with :func:`sgd`, without this package."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)


def rates(module: DGLModule) -> list[float]:
    return [optimizer.param_groups[0]["lr"] for optimizer in module.optimizers().optimizers]


class BackpropagationWithSchedule(Backpropagation):
    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.parameters())
        return [optimizer], [cosine(optimizer)]


def quiet_trainer(**kwargs: Any) -> L.Trainer:
    """Make a one-device CPU Trainer for one epoch that prints and writes nothing; keywords override."""
    defaults: dict[str, Any] = {
        "strategy": "dgl",
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": os.getcwd(),
    }
    return L.Trainer(**{**defaults, **kwargs})


def half(init_scale: float = 2.0**10, growth_interval: int = 2000) -> MixedPrecision:
    """Make float16 with loss scaling on the CPU; Trainer(precision="16-mixed") would take bfloat16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed": lambda: {"plugins": [half()]},
    "64-true": lambda: {"precision": "64-true"},
    "bf16-true": lambda: {"precision": "bf16-true"},
}
"""Arguments of the Trainer for each precision."""


# Weights, and how to compare them


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copy a module's parameters and buffers."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def block_weights(module: DGLModule) -> list[dict[str, Tensor]]:
    """Copy the parameters and buffers of each block and its head."""
    result = [weights(block) for block in module.blocks]
    for state, head in zip(result, module.heads, strict=False):
        state.update({f"head.{name}": value for name, value in weights(head).items()})
    return result


def block_parameters(module: DGLModule) -> list[list[nn.Parameter]]:
    """List the parameters of each block and its head."""
    return [
        list(nn.ModuleList(pair).parameters())
        for pair in zip(module.blocks, [*module.heads, nn.Identity()], strict=True)
    ]


def differences(a: Any, b: Any, tolerance: float = 0.0, name: str = "") -> list[str]:
    """List where two values differ, through dicts and lists: bit for bit, or by more than ``tolerance`` in a tensor."""
    if isinstance(a, dict) and isinstance(b, dict):
        parts: list[Any] = [(key, a[key], b[key]) for key in a.keys() & b.keys()]
        found = [f"{name}.{key} is in one only" for key in a.keys() ^ b.keys()]
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        parts, found = list(zip(range(len(a)), a, b, strict=True)), []
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=tolerance)
        return [] if same else [f"{name}: {a} and {b}"]
    else:
        return [] if type(a) is type(b) and a == b else [f"{name}: {a!r} and {b!r}"]
    return found + [other for key, x, y in parts for other in differences(x, y, tolerance, f"{name}.{key}")]


def same(a: Any, b: Any) -> bool:
    """Tell whether two values are equal bit for bit, through dicts and lists."""
    return differences(a, b) == []


def pieces(module: DGLModule) -> tuple[list[nn.Module], list[nn.Module]]:
    """Copy the blocks of a :func:`small_cnn` as plain Sequentials, and the heads; the last block's changes nothing."""
    layers = list(copy.deepcopy(module.network))
    ends = [int(point.name) + 1 for point in module.split_points] + [len(layers)]
    blocks: list[nn.Module] = [nn.Sequential(*layers[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    return blocks, [*copy.deepcopy(module.heads), nn.Identity()]


def assert_equal(module: DGLModule, blocks: list[nn.Module], heads: list[nn.Module]) -> None:
    """Assert that a module has come to the weights and buffers of these :func:`pieces`, bit for bit."""
    expected = [tensor for block in blocks for tensor in block.state_dict().values()]
    for (name, got), want in zip(module.network.state_dict().items(), expected, strict=True):
        assert torch.equal(got, want), name
    for head, want_head in zip(module.heads, heads, strict=False):
        for name, want in want_head.state_dict().items():
            assert torch.equal(head.state_dict()[name], want), name


# What PyTorch is asked to do


class Operations(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))
