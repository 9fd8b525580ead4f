"""What only a GPU can show."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
import torch
from torch import nn

from lightning_dgl import DGLModule
from tests.runs import loader, small_cnn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_every_block_trains(precision: str, make_trainer: Callable[..., L.Trainer]) -> None:
    module = DGLModule(small_cnn(), split_at=["2", "6", "10"], example_input=[2, 3, 8, 8])
    before = [[p.clone() for p in block.parameters()] for block in module.blocks]
    trainer = make_trainer(accelerator="cuda", precision=precision, max_epochs=2)
    trainer.fit(module, loader(), loader())
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    for block, parameters in zip(module.blocks, before, strict=True):
        assert all(not torch.equal(p.cpu(), q) for p, q in zip(block.parameters(), parameters, strict=True))


def test_splitting_works_on_the_device() -> None:
    network = small_cnn().cuda()
    module = DGLModule(network, 3, example_input=[2, 3, 8, 8])
    assert module(torch.randn(4, 3, 8, 8, device="cuda"), block=0).shape == (4, 4)


def test_step_needs_less_memory_than_backpropagation(make_trainer: Callable[..., L.Trainer]) -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(12):
        layers += [nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    peaks = []
    for num_blocks in (1, 4):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        module = DGLModule(network, num_blocks, example_input=[2, 3, 64, 64], head="linear", balance="memory")
        data = torch.utils.data.TensorDataset(torch.randn(64, 3, 64, 64), torch.zeros(64, dtype=torch.int64))
        make_trainer(accelerator="cuda").fit(module, torch.utils.data.DataLoader(data, batch_size=64))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.6 * peaks[0]
