"""Asynchronous DGL in one process, the paper's simulation, against Algorithm 2 written out as a plain PyTorch loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dgl import Asynchronous, DGLModule, DGLStrategy
from tests.internals import InOrder, updates
from tests.runs import (
    PRECISIONS,
    MakeTrainer,
    assert_equal,
    block_parameters,
    block_weights,
    make_module,
    pieces,
    rates,
    same,
    sgd,
    step_lr,
)
from tests.schedules.plain import BATCHES, PlainBlock, algorithm_2, data


@pytest.mark.parametrize(("buffer_size", "max_reuse"), [(1, None), (3, None), (3, 1), (3, 2)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_weights_equal_the_plain_loop_bit_for_bit(
    buffer_size: int, max_reuse: int | None, clip: float | None, make_trainer: MakeTrainer
) -> None:
    module = make_module(lr_scheduler=step_lr)
    plain = [PlainBlock(*pair, buffer_size, max_reuse) for pair in zip(*pieces(module), strict=True)]
    schedule = InOrder(buffer_size=buffer_size, max_reuse=max_reuse, slowdown={2: 1.5})
    make_trainer(strategy=DGLStrategy(schedule), max_epochs=5, gradient_clip_val=clip).fit(module, data())
    assert any(a == b != 0 for a, b in zip(schedule.drawn, schedule.drawn[1:], strict=False))  # two updates in a row
    algorithm_2(plain, epochs=5, turns=schedule.drawn, clip=clip)
    assert_equal(module, [p.block for p in plain], [p.head for p in plain])
    assert updates(module) == [p.updates for p in plain]


def test_with_one_batch_and_forward_order_it_is_synchronous(make_trainer: MakeTrainer) -> None:
    module = make_module(lr_scheduler=step_lr)
    other = copy.deepcopy(module.network), copy.deepcopy(module.heads)
    make_trainer(strategy=DGLStrategy(InOrder([1, 2, 3, 0], buffer_size=1)), max_epochs=3).fit(module, data())
    synchronous = make_module(lr_scheduler=step_lr)
    synchronous.network.load_state_dict(other[0].state_dict())
    synchronous.heads.load_state_dict(other[1].state_dict())
    make_trainer(max_epochs=3).fit(synchronous, data())
    for (name, got), want in zip(module.state_dict().items(), synchronous.state_dict().values(), strict=True):
        assert torch.equal(got, want), name


def test_with_one_batch_and_backward_order_inputs_are_one_step_old(make_trainer: MakeTrainer) -> None:
    module = make_module(lr_scheduler=step_lr)
    blocks, heads = pieces(module)
    plain = [PlainBlock(block, head, buffer_size=1) for block, head in zip(blocks, heads, strict=True)]
    make_trainer(strategy=DGLStrategy(InOrder([3, 2, 1, 0], buffer_size=1)), max_epochs=3).fit(module, data())
    # All blocks step at once, each on what its predecessor has made in the step before.
    made: list[tuple[Tensor, Tensor]] = []
    for step, (inputs, targets) in enumerate(batch for _ in range(3) for batch in data()):
        if step < 2:  # warm-up
            made = []
            x = inputs
            for p in plain:
                x = p.step(x, targets)
                made.append((x, targets))
            continue
        # Block 0 opens a training step, which the others' turns close.
        made[0] = (plain[0].step(inputs, targets), targets)
        made = [made[0], *((p.step(x, y), y) for p, (x, y) in zip(plain[1:], made, strict=False))]
    assert_equal(module, blocks, heads)


# Epochs and learning rates


@pytest.mark.parametrize("lr_interval", ["epoch", "step"])
def test_schedulers_go_by_the_blocks_own_updates(lr_interval: Any, make_trainer: MakeTrainer) -> None:
    module = make_module(lr_scheduler=step_lr, lr_interval=lr_interval)
    schedule = Asynchronous(slowdown={1: 3.0})
    trainer = make_trainer(strategy=DGLStrategy(schedule), max_epochs=4)
    trainer.fit(module, data())
    taken = updates(module)
    assert taken[1] < taken[0] == 4 * BATCHES
    counts = [min(n, 4 * BATCHES) for n in taken]  # of epochs beyond the Trainer's, rates know nothing
    counts = counts if lr_interval == "step" else [n // BATCHES for n in counts]
    rates = [own.param_groups[0]["lr"] for own in trainer.optimizers[0].optimizers]  # type: ignore[attr-defined]
    assert rates == pytest.approx([0.05 * 0.5**n for n in counts])


class OneCycle(DGLModule):
    """Its learning rates go over all steps that the Trainer expects."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, lr_scheduler=self._make_scheduler, **kwargs)

    def _make_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        steps = int(self.trainer.estimated_stepping_batches)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 3 * BATCHES}])
def test_a_block_that_steps_more_often_than_expected_stays_at_its_last_rate(
    limit: dict[str, int], make_trainer: MakeTrainer
) -> None:
    module, synchronous = (make_module(kind=OneCycle, lr_interval="step") for _ in range(2))
    make_trainer(strategy=DGLStrategy(InOrder([1, 1, 2, 3, 0])), **limit).fit(module, data())
    make_trainer(**limit).fit(synchronous, data())
    assert updates(module)[1] > 3 * BATCHES
    assert rates(module) == rates(synchronous)


def test_reduce_on_plateau_steps_after_validation(make_trainer: MakeTrainer) -> None:
    def plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e6, factor=0.5)

    module = make_module(lr_scheduler=plateau)
    trainer = make_trainer(strategy="dgl_async", max_epochs=3)
    trainer.fit(module, data(), data())
    rates = [own.param_groups[0]["lr"] for own in trainer.optimizers[0].optimizers]  # type: ignore[attr-defined]
    assert rates == [0.05 * 0.5**3] * 4


class WeightsAfterEpochs(L.Callback):
    def __init__(self) -> None:
        self.weights: list[list[dict[str, Tensor]]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.weights.append(block_weights(pl_module))


def test_after_its_last_epoch_a_block_only_passes_on_its_output(make_trainer: MakeTrainer) -> None:
    module = make_module()
    schedule = InOrder([1, 0, 1, 2, 3, 0], epochs_per_block=2)  # blocks 2 and 3 step half as often as the others
    seen = WeightsAfterEpochs()
    make_trainer(strategy=DGLStrategy(schedule), max_epochs=5, callbacks=[seen]).fit(module, data())
    assert updates(module) == [2 * BATCHES] * 4
    changes = [
        [not same(a, b) for a, b in zip(before, after, strict=True)]
        for before, after in zip(seen.weights, seen.weights[1:], strict=False)
    ]
    assert changes[0][0] and changes[0][1]
    assert not any(changed for epoch in changes[1:] for changed in epoch[:2])  # BatchNorm's buffers stay, too
    assert changes[2][2] and changes[2][3]  # trained by what finished blocks pass on


# Lightning around it


def test_a_run_is_reproducible(make_trainer: MakeTrainer) -> None:
    digests = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        module = make_module()
        L.seed_everything(seed, verbose=False)
        make_trainer(strategy="dgl_async", max_epochs=2).fit(module, data())
        digests.append(sum(p.double().sum().item() for p in module.parameters()))
    assert digests[0] == digests[1] != digests[2]


def test_a_resumed_run_keeps_its_counters_and_draws_but_warms_up_again(
    tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    schedule = InOrder(buffer_size=3, slowdown={1: 2.0})
    module = make_module()
    trainer = make_trainer(strategy=DGLStrategy(schedule), max_epochs=2)
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    taken = updates(module)
    following = [schedule.next_block() for _ in range(5)]

    class Counts(L.Callback):
        warm_up: list[int]

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 2 * BATCHES + 2:
                self.warm_up = updates(pl_module)

    counts = Counts()
    resumed, other = make_module(), InOrder(buffer_size=3, slowdown={1: 2.0})
    make_trainer(strategy=DGLStrategy(other), max_epochs=3, callbacks=[counts]).fit(
        resumed, data(), ckpt_path=tmp_path / "two.ckpt", weights_only=False
    )
    assert counts.warm_up == [count + 2 for count in taken]
    assert other.drawn[:5] == following
    assert updates(resumed)[0] == 3 * BATCHES


def test_a_new_run_counts_anew(make_trainer: MakeTrainer) -> None:
    module = make_module()
    for _ in range(2):
        make_trainer(strategy="dgl_async").fit(module, data())
        assert updates(module)[0] == BATCHES


@pytest.mark.parametrize("precision", PRECISIONS)
def test_trains_in_any_precision(precision: str, make_trainer: MakeTrainer) -> None:
    module = make_module()
    before = [[p.clone() for p in parameters] for parameters in block_parameters(module)]
    make_trainer(strategy="dgl_async", max_epochs=3, **PRECISIONS[precision]()).fit(module, data())
    for tensors, after in zip(before, block_parameters(module), strict=True):
        assert all(t.isfinite().all() for t in after)
        assert any(not torch.equal(a.to(b.dtype), b) for a, b in zip(after, tensors, strict=True))


def test_one_batch_is_enough_to_see_all_blocks(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(strategy="dgl_async", fast_dev_run=True)
    trainer.fit(make_module(), data(), data())
    assert {f"train/loss_block{j}" for j in range(4)} < set(trainer.callback_metrics)


def test_values_are_measured_against_the_targets_of_the_replayed_batch(make_trainer: MakeTrainer) -> None:
    # Samples whose target can be read off their first pixel, also after an identity block.
    class Reader(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(x[:, 0, 0, 0].long().clamp(0, 3), 4).float() * 100

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zero = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * self.zero

    class Scorer(nn.Sequential):
        pass

    network = nn.Sequential(Shift(), Scorer(Shift(), Reader()))
    targets = torch.arange(40) % 4
    inputs = targets.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    module = DGLModule(
        network,
        split_at=["0"],
        example_input=torch.zeros(2, 1, 2, 2),
        head=lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(4, 4)),
        optimizer=sgd,
    )

    class Accuracies(L.Callback):
        def __init__(self) -> None:
            self.seen: set[float] = set()

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.seen.add(trainer.callback_metrics["train/acc"].item())

    schedule = InOrder([1, 1, 1, 0], buffer_size=4)
    batches = DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=4, shuffle=True)
    accuracies = Accuracies()
    make_trainer(strategy=DGLStrategy(schedule), callbacks=[accuracies], max_epochs=2).fit(module, batches)
    assert accuracies.seen == {1.0}
