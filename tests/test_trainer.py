"""What a Lightning user expects of a Trainer holds for a DGLModule."""

from __future__ import annotations

import copy
import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_dgl import BlockSummary, DGLModule, DGLStrategy, NonFiniteLossError
from tests.conftest import Backpropagation, loader, sgd, small_cnn, small_data

CUTS = {1: [], 2: ["6"], 4: ["2", "6", "10"]}
MakeTrainer = Callable[..., L.Trainer]


def make_module(
    num_blocks: int = 2, dropout: float = 0.0, kind: type[DGLModule] = DGLModule, **kwargs: Any
) -> DGLModule:
    defaults: dict[str, Any] = {"head": "linear", "optimizer": sgd, "example_input": torch.zeros(2, 3, 8, 8)}
    return kind(small_cnn(dropout=dropout), split_at=CUTS[num_blocks], **{**defaults, **kwargs})


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def block_weights(module: DGLModule) -> list[dict[str, Tensor]]:
    """Parameters and buffers of each block and its head."""
    result = [weights(block) for block in module.blocks]
    for state, head in zip(result, module.heads, strict=False):
        state.update({f"head.{name}": value for name, value in weights(head).items()})
    return result


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plain_blocks(module: DGLModule) -> list[tuple[nn.Module, nn.Module]]:
    """Copies of the blocks as plain Sequentials, each with a copy of its head."""
    layers = list(copy.deepcopy(module.network))
    ends = [int(point.name) + 1 for point in module.split_points] + [len(layers)]
    blocks = [nn.Sequential(*layers[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    return list(zip(blocks, [*copy.deepcopy(module.heads), nn.Identity()], strict=True))


def plain_training(
    module: DGLModule,
    data: DataLoader[Any],
    clip: Callable[[list[nn.Parameter]], Any] = lambda parameters: None,
    accumulate: int = 1,
) -> dict[str, Tensor]:
    """The network's weights after one epoch of Algorithm 1 in plain PyTorch; ``module`` is not changed."""
    pairs = plain_blocks(module)
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


# Steps and limits


@pytest.mark.parametrize(("accumulate", "batches_seen"), [(1, 7), (2, 14)])
def test_global_step_counts_batches_not_blocks(accumulate: int, batches_seen: int, make_trainer: MakeTrainer) -> None:
    seen: list[int] = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(trainer.global_step)

    trainer = make_trainer(max_epochs=-1, max_steps=7, accumulate_grad_batches=accumulate, callbacks=[Count()])
    trainer.fit(make_module(4), loader(num_samples=64))
    assert trainer.global_step == 7
    assert len(seen) == batches_seen
    assert seen == [(i + 1) // accumulate for i in range(batches_seen)]


def test_limits_of_batches(make_trainer: MakeTrainer) -> None:
    ran: list[str] = []

    class Count(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ran.append("train")

        def on_validation_batch_end(self, *_: Any) -> None:
            ran.append("val")

        def on_test_batch_end(self, *_: Any) -> None:
            ran.append("test")

        def on_predict_batch_end(self, *_: Any) -> None:
            ran.append("predict")

    trainer = make_trainer(
        limit_train_batches=3,
        limit_val_batches=2,
        limit_test_batches=1,
        limit_predict_batches=4,
        num_sanity_val_steps=0,
        callbacks=[Count()],
    )
    module = make_module()
    trainer.fit(module, loader(), loader())
    trainer.test(module, loader(), verbose=False)
    predictions = trainer.predict(module, loader())
    assert {stage: ran.count(stage) for stage in ran} == {"train": 3, "val": 2, "test": 1, "predict": 4}
    assert predictions is not None
    assert len(predictions) == 4


def test_limit_train_batches_zero_trains_nothing(make_trainer: MakeTrainer) -> None:
    module = make_module()
    before = weights(module)
    make_trainer(limit_train_batches=0).fit(module, loader())
    assert same(before, weights(module))


def test_fast_dev_run(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(fast_dev_run=True)
    trainer.fit(make_module(), loader(), loader())
    assert trainer.global_step == 1
    assert "val/acc" in trainer.callback_metrics


def test_overfit_batches(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(overfit_batches=1, max_epochs=30)
    trainer.fit(make_module(4), loader())
    assert trainer.global_step == 30
    assert trainer.callback_metrics["train/acc"] == 1.0


@pytest.mark.parametrize("monitor", ["train/loss", "train/acc_block0"])
def test_what_a_callback_monitors_is_of_the_latest_step(monitor: str, make_trainer: MakeTrainer) -> None:
    seen: list[float] = []
    expected: list[float] = []

    class Reader(L.Callback):
        def __init__(self) -> None:
            self.monitor = monitor

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(trainer.callback_metrics[monitor].item())

    class Recording(DGLModule):
        def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
            loss = super().local_loss(block, scores, targets)
            if monitor == "train/acc_block0" and block == 0:
                expected.append((scores.argmax(1) == targets).float().mean().item())
            if monitor == "train/loss" and block == self.num_blocks - 1:
                expected.append(loss.item())
            return loss

    module = Recording(small_cnn(), num_blocks=2, example_input=(2, 3, 8, 8), optimizer=sgd)
    make_trainer(callbacks=[Reader()], log_every_n_steps=3).fit(module, loader())
    assert len(set(expected)) > 1
    assert seen == pytest.approx(expected)


def test_a_step_waits_for_the_device_equally_often_with_more_blocks(make_trainer: MakeTrainer) -> None:
    class Waits(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    class Counted(DGLModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with Waits() as waits:
                loss = super().training_step(batch, batch_idx)
            numbers.setdefault(self.num_blocks, []).append(waits.number)
            return loss

    numbers: dict[int, list[int]] = {}
    for cuts in (["6"], ["2", "6", "10"]):
        module = Counted(small_cnn(), split_at=cuts, example_input=(2, 3, 8, 8), optimizer=sgd)
        make_trainer(limit_train_batches=3, max_epochs=2).fit(module, loader())
    assert numbers[2] == numbers[4]  # whether losses are finite is asked for all blocks at once


def test_barebones(make_trainer: MakeTrainer) -> None:
    barebones = L.Trainer(strategy="dgl", accelerator="cpu", devices=1, max_epochs=1, barebones=True)
    a, b = make_module(), make_module()
    b.load_state_dict(a.state_dict())
    barebones.fit(a, loader(), loader())
    make_trainer().fit(b, loader(), loader())
    assert same(weights(a), weights(b))


def test_detect_anomaly(make_trainer: MakeTrainer) -> None:
    a, b = make_module(4), make_module(4)
    b.load_state_dict(a.state_dict())
    make_trainer(detect_anomaly=True).fit(a, loader())
    make_trainer().fit(b, loader())
    assert same(weights(a), weights(b))


def test_fit_twice_continues(make_trainer: MakeTrainer) -> None:
    module = make_module()
    first = make_trainer(max_epochs=1)
    first.fit(module, loader(), loader())
    before = weights(module)
    make_trainer(max_epochs=1).fit(module, loader(), loader())
    assert not same(before, weights(module))


def test_training_data_without_length(make_trainer: MakeTrainer) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from small_data(24)

    trainer = make_trainer()
    trainer.fit(make_module(), DataLoader(Stream(), batch_size=8))
    assert trainer.global_step == 3


# Equality with plain PyTorch and plain Lightning


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


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)


class BackpropagationWithSchedule(Backpropagation):
    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.parameters())
        return [optimizer], [cosine(optimizer)]


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
    script = tmp_path / "train.py"
    script.write_text(f"from tests.test_trainer import train_on_ranks\n\ntrain_on_ranks(2, {str(tmp_path)!r})\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    train_on_ranks(1, str(tmp_path))
    one, rank0, rank1 = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert same(rank0["weights"], rank1["weights"])
    assert one["steps"] == rank0["steps"] == 4
    assert one["weights"].keys() == rank0["weights"].keys()
    for name, value in one["weights"].items():
        assert torch.allclose(value, rank0["weights"][name], rtol=1e-4, atol=1e-6), name
    assert rank0["metrics"] == rank1["metrics"]
    assert rank0["metrics"] == pytest.approx(one["metrics"], rel=1e-4)


# Learning rates and callbacks


def rates(module: DGLModule) -> list[float]:
    return [optimizer.param_groups[0]["lr"] for optimizer in module.optimizers().optimizers]


def test_schedulers_step_each_epoch_or_each_step(make_trainer: MakeTrainer) -> None:
    def halve(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    for interval, factor in (("epoch", 0.5**2), ("step", 0.5**10)):
        module = make_module(4, lr_scheduler=halve, lr_interval=interval)
        make_trainer(max_epochs=2).fit(module, loader())
        assert rates(module) == pytest.approx([0.05 * factor] * 4)


def test_each_block_may_have_its_own_optimizer_and_scheduler(make_trainer: MakeTrainer) -> None:
    def decay(gamma: float) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
        return lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)

    module = make_module(
        2,
        optimizer=[sgd, lambda params: torch.optim.Adam(params, lr=0.01)],
        lr_scheduler=[decay(0.5), decay(0.1)],
    )
    make_trainer(max_epochs=2).fit(module, loader())
    assert rates(module) == pytest.approx([0.05 * 0.25, 0.01 * 0.01])
    kinds = [type(optimizer) for optimizer in module.optimizers().optimizers]
    assert kinds == [torch.optim.SGD, torch.optim.Adam]


def test_reduce_on_plateau_follows_each_block_s_own_validation_loss(make_trainer: MakeTrainer) -> None:
    class OnlyBlock1Improves(DGLModule):
        def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
            loss = super().local_loss(block, scores, targets)
            return loss if self.trainer.training else 0 * loss + (1.0 if block == 0 else -self.current_epoch)

    def plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)

    module = make_module(2, kind=OnlyBlock1Improves, lr_scheduler=plateau)
    make_trainer(max_epochs=3).fit(module, loader(), loader())
    assert rates(module) == pytest.approx([0.05 * 0.01, 0.05])


@pytest.mark.parametrize("with_scheduler", [True, False])
@pytest.mark.parametrize("num_blocks", [1, 4])
def test_learning_rate_monitor_shows_each_rate_once(
    with_scheduler: bool, num_blocks: int, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    def make(rate: float) -> Callable[..., torch.optim.Optimizer]:
        return lambda params: torch.optim.SGD(params, lr=rate)

    wanted = [0.1 * (j + 1) for j in range(num_blocks)]
    module = make_module(
        num_blocks,
        optimizer=[make(rate) for rate in wanted],
        lr_scheduler=(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 1.0)) if with_scheduler else None,
    )
    logger = CSVLogger(tmp_path)
    monitor = LearningRateMonitor(logging_interval="step")
    make_trainer(logger=logger, callbacks=[monitor], log_every_n_steps=1).fit(module, loader())
    names = [f"lr/block{j}" for j in range(num_blocks)]
    if with_scheduler:
        assert list(monitor.lrs) == names
    else:  # Lightning names what has no scheduler after the optimizer
        assert [name.rpartition("/")[2] for name in monitor.lrs] == [f"block{j}" for j in range(num_blocks)]
    assert [values[0] for values in monitor.lrs.values()] == pytest.approx(wanted)
    assert {len(values) for values in monitor.lrs.values()} == {5}


def test_learning_rate_monitor_names_parameter_groups(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    def two_groups(params: Any) -> torch.optim.Optimizer:
        params = list(params)
        return torch.optim.SGD([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], lr=0.1)

    module = make_module(2, optimizer=two_groups, lr_scheduler=cosine)
    monitor = LearningRateMonitor(logging_interval="step")
    trainer = make_trainer(logger=CSVLogger(tmp_path), callbacks=[monitor], log_every_n_steps=1)
    trainer.fit(module, loader())
    first = {name: values[0] for name, values in monitor.lrs.items()}
    assert first == {"lr/block0/pg1": 0.5, "lr/block0/pg2": 0.1, "lr/block1/pg1": 0.5, "lr/block1/pg2": 0.1}


def test_early_stopping(make_trainer: MakeTrainer) -> None:
    stop = EarlyStopping("val/acc", mode="max", patience=2, min_delta=2.0)  # no improvement is ever large enough
    trainer = make_trainer(max_epochs=20, callbacks=[stop])
    trainer.fit(make_module(4), loader(), loader())
    assert trainer.current_epoch == 3


def test_hooks_see_gradients(make_trainer: MakeTrainer) -> None:
    seen: dict[str, list[bool]] = {}

    class Watch(L.Callback):
        def _see(self, hook: str, pl_module: L.LightningModule) -> None:
            seen.setdefault(hook, []).append(all(p.grad is not None for p in pl_module.parameters()))

        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            self._see("on_before_zero_grad", pl_module)

        def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
            self._see("on_before_backward", pl_module)

        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self._see("on_after_backward", pl_module)

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            self._see("on_before_optimizer_step", pl_module)

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            self._see("on_train_batch_end", pl_module)

    make_trainer(limit_train_batches=2, callbacks=[Watch()]).fit(make_module(4), loader())
    assert seen == {
        "on_before_zero_grad": [False, False],  # those of the step before have made place for the new ones
        "on_before_backward": [False, False],
        "on_after_backward": [True, True],
        "on_before_optimizer_step": [True, True],
        "on_train_batch_end": [True, True],
    }


def test_changing_gradients_in_a_hook_changes_the_step(make_trainer: MakeTrainer) -> None:
    class NoGradients(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            for p in pl_module.parameters():
                p.grad = torch.zeros_like(p)

    module = make_module(4, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    before = [p.clone() for p in module.parameters()]
    make_trainer(callbacks=[NoGradients()]).fit(module, loader())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


class RecordParameters(L.Callback):
    """The module's parameters after each step and after each epoch."""

    def __init__(self) -> None:
        self.after_steps: list[list[Tensor]] = []
        self.after_epochs: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.after_steps.append([p.detach().clone() for p in pl_module.parameters()])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.after_epochs.append([p.detach().clone() for p in pl_module.parameters()])


def test_ema_weight_averaging(make_trainer: MakeTrainer) -> None:
    module, record = make_module(4), RecordParameters()
    averaging = EMAWeightAveraging(decay=0.9)
    make_trainer(max_epochs=2, callbacks=[record, averaging]).fit(module, loader(), loader())
    average, *others = record.after_steps
    for values in others:
        average = [0.9 * a + 0.1 * b for a, b in zip(average, values, strict=True)]
    for got, want in zip(module.parameters(), average, strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    assert len(record.after_steps) == 10


def test_stochastic_weight_averaging(make_trainer: MakeTrainer) -> None:
    def averaging() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)

    network = small_cnn()
    plain = BackpropagationWithSchedule(copy.deepcopy(network))
    make_trainer(strategy="auto", max_epochs=4, callbacks=[averaging()]).fit(plain, loader())
    module = DGLModule(network, num_blocks=1, example_input=(2, 3, 8, 8), optimizer=sgd, lr_scheduler=cosine)
    make_trainer(max_epochs=4, callbacks=[averaging()]).fit(module, loader())
    assert same(weights(module.network), weights(plain.network))

    blocks, record = make_module(4), RecordParameters()
    make_trainer(max_epochs=4, callbacks=[record, averaging()]).fit(blocks, loader())
    assert rates(blocks) == pytest.approx([0.01] * 4)
    for last, averaged in zip(record.after_epochs[3], blocks.parameters(), strict=True):
        assert torch.isfinite(averaged).all()
        assert not torch.equal(last, averaged)


def test_a_frozen_block_stays_as_it_is(make_trainer: MakeTrainer) -> None:
    module = make_module(4)
    module.blocks[0].requires_grad_(False)
    before = [{n: p.clone() for n, p in block.named_parameters()} for block in module.blocks]
    head = weights(module.heads[0])
    make_trainer(max_epochs=2).fit(module, loader(), loader())
    after = [dict(block.named_parameters()) for block in module.blocks]
    assert [same(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False, False]
    assert not same(head, weights(module.heads[0]))


def test_a_frozen_last_block_stays_as_it_is(make_trainer: MakeTrainer) -> None:
    module = make_module(4)
    module.blocks[3].requires_grad_(False)
    before = [{n: p.clone() for n, p in block.named_parameters()} for block in module.blocks]
    make_trainer(gradient_clip_val=0.1).fit(module, loader(), loader())
    after = [dict(block.named_parameters()) for block in module.blocks]
    assert [same(a, b) for a, b in zip(before, after, strict=True)] == [False, False, False, True]


def test_a_block_unfrozen_later_trains_from_then_on(make_trainer: MakeTrainer) -> None:
    changed: list[bool] = []

    class Unfreeze(L.Callback):
        def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
            pl_module.blocks[0].requires_grad_(False)

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.blocks[0].requires_grad_(True)
            self.before = {n: p.clone() for n, p in pl_module.blocks[0].named_parameters()}

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            changed.append(not same(self.before, dict(pl_module.blocks[0].named_parameters())))

    make_trainer(max_epochs=2, callbacks=[Unfreeze()]).fit(make_module(4), loader())
    assert changed == [False, True]


# The table of blocks


def test_model_summary_brings_the_table_of_blocks(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(enable_model_summary=False, fast_dev_run=True).fit(make_module(4), loader())
    assert "MLPSRHead" not in capsys.readouterr().out
    make_trainer(enable_model_summary=True, fast_dev_run=True).fit(make_module(4, head="mlp_sr"), loader())
    assert capsys.readouterr().out.count("MLPSRHead") == 3
    own = make_trainer(enable_model_summary=True, fast_dev_run=True, callbacks=[BlockSummary()])
    own.fit(make_module(4, head="mlp_sr"), loader())
    assert capsys.readouterr().out.count("MLPSRHead") == 3


# What is logged


def test_csv_logger_columns(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    logger = CSVLogger(tmp_path)
    make_trainer(logger=logger, log_every_n_steps=1).fit(make_module(2), loader(), loader())
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = {f"{stage}/{name}" for stage in ("train", "val") for name in ("loss", "acc")}
    expected |= {f"{name}_block{j}" for name in expected for j in range(2)} | {"val/acc_ensemble", "epoch", "step"}
    assert set(rows[0]) == expected
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    assert steps == [0, 1, 2, 3, 4]
    for row in rows:
        assert row["train/loss"] == row["train/loss_block1"]
        assert row["val/acc"] == row["val/acc_block1"]


def test_the_progress_bar_shows_the_last_block(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.fit(make_module(4), loader(), loader())
    metrics = trainer.progress_bar_metrics
    assert set(metrics) == {"train/loss", "train/acc", "val/loss", "val/acc"}
    assert metrics["val/acc"] == pytest.approx(trainer.callback_metrics["val/acc_block3"].item())


@pytest.fixture(scope="module")
def evaluated() -> tuple[DGLModule, list[Tensor], Tensor]:
    """A module in eval mode, each block's scores of all 22 samples by plain calls, and the targets."""
    torch.manual_seed(0)
    module = make_module(4, head="mlp_sr").eval()
    x, y = small_data(22).tensors
    scores = []
    with torch.no_grad():
        for block, head in plain_blocks(module):
            x = block.eval()(x)
            scores.append(head.eval()(x))
    return module, scores, y


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_equals_a_plain_computation(
    stage: str, evaluated: tuple[DGLModule, list[Tensor], Tensor], make_trainer: MakeTrainer
) -> None:
    module, scores, targets = evaluated
    trainer = make_trainer()
    run = trainer.validate if stage == "val" else trainer.test
    (metrics,) = run(module, loader(num_samples=22, batch_size=8), verbose=False)  # 8 + 8 + 6
    mixed = torch.stack([2**j * s.softmax(dim=1) for j, s in enumerate(scores)]).sum(dim=0)
    expected = {f"{stage}/acc_ensemble": (mixed.argmax(dim=1) == targets).float().mean().item()}
    for j, block_scores in enumerate(scores):
        loss = nn.functional.cross_entropy(block_scores, targets).item()
        accuracy = (block_scores.argmax(dim=1) == targets).float().mean().item()
        for suffix in [f"_block{j}"] + [""] * (j == 3):
            expected |= {f"{stage}/loss{suffix}": loss, f"{stage}/acc{suffix}": accuracy}
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_scores_of_blocks_and_ensemble(evaluated: tuple[DGLModule, list[Tensor], Tensor]) -> None:
    module, scores, _ = evaluated
    x = small_data(22).tensors[0]
    with torch.no_grad():
        for j in range(4):
            assert torch.allclose(module(x, block=j), scores[j], atol=1e-6)
        assert torch.equal(module(x), module(x, block=3))
        mixed = torch.stack([2**j * s.softmax(dim=1) for j, s in enumerate(scores)]).sum(dim=0)
        assert torch.allclose(module.ensemble(x), mixed / 15, atol=1e-6)
    with pytest.raises(ValueError, match="block must be from 0 to 3, got 4"):
        module(x, block=4)


def test_predict_returns_class_scores(
    evaluated: tuple[DGLModule, list[Tensor], Tensor], make_trainer: MakeTrainer
) -> None:
    module, scores, _ = evaluated
    predictions = make_trainer().predict(module, loader(num_samples=22))
    assert [tuple(p.shape) for p in predictions] == [(8, 4), (8, 4), (6, 4)]
    assert torch.allclose(torch.cat(predictions), scores[-1], atol=1e-6)
    inputs_only = DataLoader(small_data(22).tensors[0], batch_size=8)  # type: ignore[arg-type]
    assert torch.equal(torch.cat(make_trainer().predict(module, inputs_only)), torch.cat(predictions))


def test_metrics_start_anew_in_each_epoch(make_trainer: MakeTrainer) -> None:
    module = make_module(2, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    module.network.eval()
    seen: list[float] = []

    class FlipTargets(L.Callback):
        def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
            if trainer.current_epoch == 1:
                with torch.no_grad():
                    batch[1].copy_(pl_module(batch[0]).argmax(dim=1))

        def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(trainer.callback_metrics["val/acc"].item())

    make_trainer(max_epochs=2, num_sanity_val_steps=0, callbacks=[FlipTargets()]).fit(module, loader(), loader())
    assert seen[0] < 1.0
    assert seen[1] == 1.0


def test_two_validation_data_loaders(
    evaluated: tuple[DGLModule, list[Tensor], Tensor], make_trainer: MakeTrainer
) -> None:
    module, scores, targets = evaluated
    results = make_trainer().validate(module, [loader(num_samples=22), loader(num_samples=8)], verbose=False)
    merged = {name: value for result in results for name, value in result.items()}
    for i, samples in enumerate((22, 8)):
        loss = nn.functional.cross_entropy(scores[-1][:samples], targets[:samples]).item()
        right = small_data(samples).tensors[1]
        if samples == 22:
            assert merged[f"val/loss/dataloader_idx_{i}"] == pytest.approx(loss, abs=1e-5)
        with torch.no_grad():
            plain = (module(small_data(samples).tensors[0]).argmax(dim=1) == right).float().mean().item()
        assert merged[f"val/acc/dataloader_idx_{i}"] == pytest.approx(plain)
        assert f"val/acc_ensemble/dataloader_idx_{i}" in merged


def test_a_metric_collection_keeps_its_names(make_trainer: MakeTrainer) -> None:
    metrics = MetricCollection({"top2": MulticlassAccuracy(4, top_k=2), "f1": MulticlassF1Score(4)})
    module = make_module(2, metrics=metrics)
    trainer = make_trainer()
    trainer.fit(module, loader(), loader())
    for stage in ("train", "val"):
        for name in ("top2", "f1"):
            assert {f"{stage}/{name}", f"{stage}/{name}_block0", f"{stage}/{name}_block1"} <= set(
                trainer.callback_metrics
            )
    assert "val/top2_ensemble" in trainer.callback_metrics
    assert "val/acc" not in trainer.callback_metrics
    with torch.no_grad():
        for j in range(2):
            metric = MulticlassAccuracy(4, top_k=2)
            module.eval()
            for x, y in loader():
                metric.update(module(x, block=j), y)
            assert trainer.callback_metrics[f"val/top2_block{j}"] == metric.compute()


def test_class_probabilities_as_targets(make_trainer: MakeTrainer) -> None:
    x, y = small_data().tensors
    soft = nn.functional.one_hot(y, 4).float()
    hard, mixed = make_module(2), make_module(2)
    mixed.load_state_dict(hard.state_dict())
    trainer = make_trainer()
    trainer.fit(mixed, DataLoader(torch.utils.data.TensorDataset(x, soft), batch_size=8), loader())
    make_trainer().fit(hard, loader(), loader())
    for a, b in zip(mixed.parameters(), hard.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


# Losses that are not finite


class Spoiled(DGLModule):
    """The loss of block 1 is NaN in step 2."""

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        loss = super().local_loss(block, scores, targets)
        return loss * float("nan") if self.trainer.training and (block, self.trainer.global_step) == (1, 2) else loss


class Record(L.Callback):
    """Every block's state before training and after each step."""

    def __init__(self) -> None:
        self.states: list[list[dict[str, Tensor]]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.states.append(block_weights(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.states.append(block_weights(pl_module))

    def changed(self, step: int) -> list[bool]:
        return [not same(a, b) for a, b in zip(self.states[step], self.states[step + 1], strict=True)]


def test_a_loss_that_is_not_finite_stops_with_block_and_step(make_trainer: MakeTrainer) -> None:
    module, record = make_module(4, kind=Spoiled), Record()
    with pytest.raises(NonFiniteLossError, match=r"(?s)block 1 .*nan at step 2"):
        make_trainer(callbacks=[record]).fit(module, loader())
    parameters = [name for name, _ in module.blocks[0].named_parameters()]
    after = block_weights(module)[0]
    assert all(torch.equal(after[name], record.states[-1][0][name]) for name in parameters)
    assert len(record.states) == 3


def test_skip_leaves_out_only_that_block_s_update(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    module, record = make_module(4, kind=Spoiled, head="mlp_sr", on_nonfinite="skip"), Record()
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(callbacks=[record], logger=logger, log_every_n_steps=1)
    trainer.fit(module, loader())
    for step in range(5):
        assert record.changed(step) == [True, step != 2, True, True]
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/skipped_block1"]]
    assert [float(row["train/skipped_block1"]) for row in rows] == [0, 0, 1, 1, 1]
    assert {float(row["train/skipped_block0"]) for row in rows} == {0}


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_an_input_that_is_not_finite(on_nonfinite: str, make_trainer: MakeTrainer) -> None:
    data = small_data(24)
    data.tensors[0][10] = float("inf")
    batches = DataLoader(data, batch_size=8)
    module, record = make_module(4, on_nonfinite=on_nonfinite), Record()
    trainer = make_trainer(callbacks=[record])
    if on_nonfinite == "raise":
        with pytest.raises(NonFiniteLossError, match="block 0"):
            trainer.fit(module, batches)
    else:
        trainer.fit(module, batches)
        assert record.changed(0) == [True] * 4
        assert record.changed(1) == [False] * 4
        assert record.changed(2) == [True] * 4
    assert all(torch.isfinite(p).all() for p in module.parameters())
