"""Training under a Trainer comes to what plain PyTorch, plain Lightning and other strategies come to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_dgl import DGLModule, DGLStrategy
from tests.distributed.jobs import Job, by_hand
from tests.runs import (
    BackpropagationWithSchedule,
    MakeTrainer,
    cosine,
    loader,
    make_module,
    pieces,
    same,
    sgd,
    small_cnn,
    small_data,
    weights,
)


def plain_training(
    module: DGLModule,
    data: DataLoader[Any],
    clip: Callable[[list[nn.Parameter]], Any] = lambda parameters: None,
    accumulate: int = 1,
) -> dict[str, Tensor]:
    """The network's weights after one epoch of Algorithm 1 in plain PyTorch; ``module`` is not changed."""
    pairs = list(zip(*pieces(module), strict=True))
    optimizers = [sgd([*block.parameters(), *head.parameters()]) for block, head in pairs]
    batches = list(data)
    for i, (x, y) in enumerate(batches):
        for (block, head), optimizer in zip(pairs, optimizers, strict=True):
            output = block(x)
            (nn.functional.cross_entropy(head(output), y) / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == len(batches):
                clip([p for group in optimizer.param_groups for p in group["params"]])
                optimizer.step()
                optimizer.zero_grad()
            x = output.detach()
    layers = nn.Sequential(*(layer for block, _ in pairs for layer in block))
    return weights(layers)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping_clips_each_block_by_itself(algorithm: str, make_trainer: MakeTrainer) -> None:
    clip_val = 0.05
    module = make_module(4)

    def clip(parameters: list[nn.Parameter]) -> None:
        if algorithm == "norm":
            torch.nn.utils.clip_grad_norm_(parameters, clip_val)
        else:
            torch.nn.utils.clip_grad_value_(parameters, clip_val)

    expected = plain_training(module, loader(), clip)
    unclipped = plain_training(module, loader())
    make_trainer(gradient_clip_val=clip_val, gradient_clip_algorithm=algorithm).fit(module, loader())
    assert same(weights(module.network), expected)
    assert not same(expected, unclipped)


@pytest.mark.parametrize("num_samples", [48, 40])  # 40: the last step has fewer batches
def test_accumulate_grad_batches_equals_the_plain_loop(num_samples: int, make_trainer: MakeTrainer) -> None:
    module = make_module(4)
    expected = plain_training(module, loader(num_samples), accumulate=2)
    make_trainer(accumulate_grad_batches=2).fit(module, loader(num_samples))
    assert same(weights(module.network), expected)


@pytest.mark.parametrize("trainer_args", [{}, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}])
def test_one_block_is_end_to_end_backpropagation(trainer_args: dict[str, Any], make_trainer: MakeTrainer) -> None:
    network = small_cnn(dropout=0.3)
    plain = BackpropagationWithSchedule(copy.deepcopy(network))
    module = DGLModule(network, num_blocks=1, example_input=(2, 3, 8, 8), optimizer=sgd, lr_scheduler=cosine)
    torch.manual_seed(3)
    make_trainer(strategy="auto", max_epochs=3, **trainer_args).fit(plain, loader(num_samples=38, shuffle=True))
    torch.manual_seed(3)
    make_trainer(max_epochs=3, **trainer_args).fit(module, loader(num_samples=38, shuffle=True))
    assert same(weights(module.network), weights(plain.network))


@pytest.mark.parametrize("strategy", ["auto", DGLStrategy, lambda: DGLStrategy(schedule="sync")])
def test_strategies_give_the_same_weights(strategy: Any, make_trainer: MakeTrainer) -> None:
    a, b = make_module(4, dropout=0.2), make_module(4, dropout=0.2)
    b.load_state_dict(a.state_dict())
    torch.manual_seed(5)
    make_trainer(strategy="dgl").fit(a, loader(shuffle=True), loader())
    torch.manual_seed(5)
    make_trainer(strategy=strategy if isinstance(strategy, str) else strategy()).fit(b, loader(shuffle=True), loader())
    assert same(weights(a), weights(b))


def train_on_ranks(devices: int, folder: str) -> None:
    """Train on batches of 8, jointly over all ranks, and leave each rank's results in ``folder``."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)),
    )
    module = DGLModule(network, split_at=["1"], example_input=(2, 3, 8, 8), head="linear")
    trainer = L.Trainer(
        strategy="ddp" if devices > 1 else "dgl",
        accelerator="cpu",
        devices=devices,
        max_epochs=2,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,  # Lightning's would shuffle
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Two ranks with batches of 4 read samples 0, 2, 4, 6 and 1, 3, 5, 7: jointly the one process's batch of 8.
    sampler = DistributedSampler(small_data(32), devices, trainer.global_rank, shuffle=False)
    batches = loader(32, batch_size=8 // devices, sampler=sampler)
    trainer.fit(module, batches, batches)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if "val" in name}
    result = {"weights": module.state_dict(), "steps": trainer.global_step, "metrics": metrics}
    torch.save(result, Path(folder) / f"{devices}_{trainer.global_rank}.pt")


def test_two_ddp_processes_equal_one_on_the_joint_batch(tmp_path: Path) -> None:
    with Job(tmp_path) as job:
        job.start_ranks(train_on_ranks, by_hand(2), devices=2, folder=str(tmp_path))
        outcome = job.wait()
    assert outcome.codes == [0, 0], str(outcome)
    train_on_ranks(1, str(tmp_path))
    one, rank0, rank1 = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert same(rank0["weights"], rank1["weights"])
    assert one["steps"] == rank0["steps"] == 4
    assert one["weights"].keys() == rank0["weights"].keys()
    for name, value in one["weights"].items():
        assert torch.allclose(value, rank0["weights"][name], rtol=1e-4, atol=1e-6), name
    assert rank0["metrics"] == rank1["metrics"]
    assert rank0["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
