"""Asynchronous DGL in one process, the paper's simulation, against Algorithm 2 written out as a plain PyTorch loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_dgl import Asynchronous, BlockMonitor, DGLModule, DGLStrategy, ReplayBuffer
from tests.conftest import loader, small_cnn
from tests.test_precision import PRECISIONS
from tests.test_synchronous import CUTS, pieces, sgd, step_lr

BATCHES = 5  # of each epoch; the last one is smaller


def make_module(num_blocks: int = 4, **kwargs: Any) -> DGLModule:
    defaults: dict[str, Any] = {"split_at": CUTS[num_blocks], "example_input": (2, 3, 8, 8), "optimizer": sgd}
    return DGLModule(small_cnn(), **{**defaults, **kwargs})


def data() -> DataLoader[tuple[Tensor, ...]]:
    return loader(num_samples=38)


class InOrder(Asynchronous):
    """Blocks take turns in a given order, over and over, or a random one; the turns can be read afterwards."""

    def __init__(self, order: list[int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._order = order
        self.turns: list[int] = []

    def next_block(self) -> int:
        order = self._order
        self.turns.append(super().next_block() if order is None else order[len(self.turns) % len(order)])
        return self.turns[-1]


def assert_equal(module: DGLModule, blocks: list[nn.Module], heads: list[nn.Module]) -> None:
    expected = [tensor for block in blocks for tensor in block.state_dict().values()]
    for (name, got), want in zip(module.network.state_dict().items(), expected, strict=True):
        assert torch.equal(got, want), name
    for head, want_head in zip(module.heads, heads, strict=False):
        for name, want in want_head.state_dict().items():
            assert torch.equal(head.state_dict()[name], want), name


class PlainBlock:
    """A block, its head, optimizer, scheduler and buffer; the buffer follows the rule by looking at all entries."""

    def __init__(self, block: nn.Module, head: nn.Module, buffer_size: int, max_reuse: int | None = None) -> None:
        self.block, self.head = block, head
        self.parameters = [*block.parameters(), *head.parameters()]
        self.optimizer = sgd(self.parameters)
        self.scheduler = step_lr(self.optimizer)
        self.updates = 0
        self._entries: list[list[Any]] = []
        self._buffer_size, self._max_reuse = buffer_size, max_reuse

    def put(self, activation: Tensor, targets: Tensor) -> None:
        self._entries = [*self._entries, [0, activation, targets]][-self._buffer_size :]

    def read(self) -> tuple[Tensor, Tensor] | None:
        readable = [entry for entry in self._entries if self._max_reuse is None or entry[0] < self._max_reuse]
        if not readable:
            return None
        entry = [e for e in readable if e[0] == min(e[0] for e in readable)][-1]
        entry[0] += 1
        return entry[1], entry[2]

    def step(self, x: Tensor, targets: Tensor, clip: float | None = None) -> Tensor:
        """Train on a batch; the scheduler counts this block's own epochs."""
        output = self.block(x)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.head(output), targets).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, clip)
        self.optimizer.step()
        self.updates += 1
        if self.updates % BATCHES == 0:
            self.scheduler.step()
        return output.detach()


def algorithm_2(
    plain: list[PlainBlock], epochs: int, turns: list[int], clip: float | None = None, warm_up: int = 2
) -> None:
    """Train in place: one step of block 0 on each batch of data, and ``turns`` of all blocks in between."""
    left = iter(turns)

    def train(j: int, batch: tuple[Tensor, Tensor] | None) -> None:
        if batch is not None:
            output = plain[j].step(*batch, clip)
            if j + 1 < len(plain):
                plain[j + 1].put(output, batch[1])

    for _ in range(epochs):
        for inputs, targets in data():
            train(0, (inputs, targets))
            if warm_up > 0:
                warm_up -= 1
                for j in range(1, len(plain)):
                    train(j, plain[j].read())
                continue
            while (j := next(left)) != 0:
                train(j, plain[j].read())


@pytest.mark.parametrize(("buffer_size", "max_reuse"), [(1, None), (3, None), (3, 1), (3, 2)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_weights_equal_the_plain_loop_bit_for_bit(
    buffer_size: int, max_reuse: int | None, clip: float | None, make_trainer: Callable[..., L.Trainer]
) -> None:
    module = make_module(lr_scheduler=step_lr)
    plain = [PlainBlock(*pair, buffer_size, max_reuse) for pair in zip(*pieces(module), strict=True)]
    schedule = InOrder(buffer_size=buffer_size, max_reuse=max_reuse, slowdown={2: 1.5})
    make_trainer(strategy=DGLStrategy(schedule), max_epochs=5, gradient_clip_val=clip).fit(module, data())
    assert any(a == b != 0 for a, b in zip(schedule.turns, schedule.turns[1:], strict=False))  # two updates in a row
    algorithm_2(plain, epochs=5, turns=schedule.turns, clip=clip)
    assert_equal(module, [p.block for p in plain], [p.head for p in plain])
    assert [progress.updates for progress in module.progress] == [p.updates for p in plain]


def test_with_one_batch_and_forward_order_it_is_synchronous(make_trainer: Callable[..., L.Trainer]) -> None:
    module = make_module(lr_scheduler=step_lr)
    other = copy.deepcopy(module.network), copy.deepcopy(module.heads)
    make_trainer(strategy=DGLStrategy(InOrder([1, 2, 3, 0], buffer_size=1)), max_epochs=3).fit(module, data())
    synchronous = make_module(lr_scheduler=step_lr)
    synchronous.network.load_state_dict(other[0].state_dict())
    synchronous.heads.load_state_dict(other[1].state_dict())
    make_trainer(max_epochs=3).fit(synchronous, data())
    for (name, got), want in zip(module.state_dict().items(), synchronous.state_dict().values(), strict=True):
        assert torch.equal(got, want), name


def test_with_one_batch_and_backward_order_inputs_are_one_step_old(make_trainer: Callable[..., L.Trainer]) -> None:
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


# Which blocks take turns


def updates_of(schedule: Asynchronous, num_blocks: int, num_batches: int, seed: int = 0) -> list[int]:
    """How many local steps each block takes, without training anything."""
    updates = [0] * num_blocks
    targets = torch.zeros(1)

    def local_step(block: int, x: Tensor, y: Tensor) -> Tensor:
        updates[block] += 1
        return x

    schedule.start(range(num_blocks), num_blocks, seed)
    for _ in range(num_batches):
        schedule.step(local_step, range(num_blocks), targets, targets)
    return updates


def test_a_block_of_slowdown_s_takes_one_sth_of_the_updates() -> None:
    # Standard deviation of each below: about 2 % of 5000.
    updates = updates_of(Asynchronous(slowdown={1: 2.0, 3: 1.25}), num_blocks=4, num_batches=5000)
    assert updates[0] == 5000
    for got, expected in zip(updates[1:], (2500, 5000, 4000), strict=True):
        assert got == pytest.approx(expected, rel=0.08)


def test_where_block_0_is_slow_the_others_take_more_turns() -> None:
    updates = updates_of(Asynchronous(slowdown={0: 2.0}), num_blocks=3, num_batches=5000)
    assert updates[0] == 5000
    assert updates[1:] == pytest.approx([10_000, 10_000], rel=0.08)


def test_first_two_batches_are_a_warm_up_of_every_block() -> None:
    schedule = Asynchronous(buffer_size=5, slowdown={2: 100.0})
    assert updates_of(schedule, num_blocks=4, num_batches=1) == [1, 1, 1, 1]
    assert updates_of(schedule, num_blocks=4, num_batches=2) == [2, 2, 2, 2]
    assert {block: len(buffer) for block, buffer in schedule.buffers.items()} == {1: 2, 2: 2, 3: 2}


def test_a_block_whose_batches_are_used_up_skips_its_turn() -> None:
    updates = updates_of(Asynchronous(buffer_size=50, max_reuse=1), num_blocks=2, num_batches=1000)
    assert updates[1] <= 1000
    assert updates[1] > 900  # 50 batches make up for most of what it has missed


def test_draws_are_seeded() -> None:
    first, again, other = (updates_of(Asynchronous(), 3, 100, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_run_is_reproducible(make_trainer: Callable[..., L.Trainer]) -> None:
    digests = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        module = make_module()
        L.seed_everything(seed, verbose=False)
        make_trainer(strategy="dgl_async", max_epochs=2).fit(module, data())
        digests.append(sum(p.double().sum().item() for p in module.parameters()))
    assert digests[0] == digests[1] != digests[2]


# Epochs and learning rates


@pytest.mark.parametrize("lr_interval", ["epoch", "step"])
def test_schedulers_go_by_the_blocks_own_updates(lr_interval: Any, make_trainer: Callable[..., L.Trainer]) -> None:
    def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    module = make_module(lr_scheduler=halving, lr_interval=lr_interval)
    schedule = Asynchronous(slowdown={1: 3.0})
    trainer = make_trainer(strategy=DGLStrategy(schedule), max_epochs=4)
    trainer.fit(module, data())
    updates = [progress.updates for progress in module.progress]
    assert updates[1] < updates[0] == 4 * BATCHES
    counts = updates if lr_interval == "step" else [n // BATCHES for n in updates]
    rates = [own.param_groups[0]["lr"] for own in trainer.optimizers[0].optimizers]  # type: ignore[attr-defined]
    assert rates == pytest.approx([0.05 * 0.5**n for n in counts])


def test_reduce_on_plateau_steps_after_validation(make_trainer: Callable[..., L.Trainer]) -> None:
    def plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e6, factor=0.5)

    module = make_module(lr_scheduler=plateau)
    trainer = make_trainer(strategy="dgl_async", max_epochs=3)
    trainer.fit(module, data(), data())
    rates = [own.param_groups[0]["lr"] for own in trainer.optimizers[0].optimizers]  # type: ignore[attr-defined]
    assert rates == [0.05 * 0.5**3] * 4


class WeightsAfterEpochs(L.Callback):
    def __init__(self) -> None:
        self.weights: list[list[list[Tensor]]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.weights.append([[t.clone() for t in pl_module.block_tensors(j)] for j in range(pl_module.num_blocks)])


def test_after_its_last_epoch_a_block_only_passes_on_its_output(make_trainer: Callable[..., L.Trainer]) -> None:
    module = make_module()
    schedule = InOrder([1, 0, 1, 2, 3, 0], epochs_per_block=2)  # blocks 2 and 3 step half as often as the others
    seen = WeightsAfterEpochs()
    make_trainer(strategy=DGLStrategy(schedule), max_epochs=5, callbacks=[seen]).fit(module, data())
    updates = [progress.updates for progress in module.progress]
    assert updates == [2 * BATCHES] * 4
    changes = [
        [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)]
        for before, after in zip(seen.weights, seen.weights[1:], strict=False)
    ]
    assert changes[0][0] and changes[0][1]
    assert not any(changed for epoch in changes[1:] for changed in epoch[:2])  # BatchNorm's buffers stay, too
    assert changes[2][2] and changes[2][3]  # trained by what finished blocks pass on


# Lightning around it


def test_a_resumed_run_keeps_its_counters_and_draws_but_warms_up_again(
    tmp_path: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    schedule = InOrder(buffer_size=3, slowdown={1: 2.0})
    module = make_module()
    trainer = make_trainer(strategy=DGLStrategy(schedule), max_epochs=2)
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    updates = [progress.updates for progress in module.progress]
    following = [schedule.next_block() for _ in range(5)]

    class Counts(L.Callback):
        warm_up: list[int]

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 2 * BATCHES + 2:
                self.warm_up = [progress.updates for progress in pl_module.progress]

    counts = Counts()
    resumed, other = make_module(), InOrder(buffer_size=3, slowdown={1: 2.0})
    make_trainer(strategy=DGLStrategy(other), max_epochs=3, callbacks=[counts]).fit(
        resumed, data(), ckpt_path=tmp_path / "two.ckpt", weights_only=False
    )
    assert counts.warm_up == [count + 2 for count in updates]
    assert other.turns[:5] == following
    assert resumed.progress[0].updates == 3 * BATCHES


def test_a_new_run_counts_anew(make_trainer: Callable[..., L.Trainer]) -> None:
    module = make_module()
    for _ in range(2):
        make_trainer(strategy="dgl_async").fit(module, data())
        assert module.progress[0].updates == BATCHES


@pytest.mark.parametrize("precision", PRECISIONS)
def test_trains_in_any_precision(precision: str, make_trainer: Callable[..., L.Trainer]) -> None:
    module = make_module()
    before = [[t.clone() for t in module.block_parameters(j)] for j in range(4)]
    make_trainer(strategy="dgl_async", max_epochs=3, **PRECISIONS[precision]()).fit(module, data())
    for j, tensors in enumerate(before):
        after = module.block_parameters(j)
        assert all(t.isfinite().all() for t in after)
        assert any(not torch.equal(a.to(b.dtype), b) for a, b in zip(after, tensors, strict=True))


def test_one_batch_is_enough_to_see_all_blocks(make_trainer: Callable[..., L.Trainer]) -> None:
    trainer = make_trainer(strategy="dgl_async", fast_dev_run=True)
    trainer.fit(make_module(), data(), data())
    assert {f"train/loss_block{j}" for j in range(4)} < set(trainer.callback_metrics)


def test_values_are_measured_against_the_targets_of_the_replayed_batch(make_trainer: Callable[..., L.Trainer]) -> None:
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


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buffer_size": 0}, "buffer_size must be an integer of at least 1, got 0"),
        ({"max_reuse": 0}, "max_reuse must be an integer of at least 1, got 0"),
        ({"max_lead": -1}, "max_lead must be an integer of at least 0, got -1"),
        ({"epochs_per_block": 0}, "epochs_per_block must be an integer of at least 1, got 0"),
        ({"slowdown": {1: 0.5}}, "slowdown of block 1 must be at least 1, a block that is 0.5 times as slow"),
        ({"slowdown": {1: float("nan")}}, "slowdown of block 1 must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Asynchronous(**arguments)


def test_slowdown_of_a_block_that_does_not_exist(make_trainer: Callable[..., L.Trainer]) -> None:
    trainer = make_trainer(strategy=DGLStrategy(Asynchronous(slowdown={4: 2.0})))
    with pytest.raises(ValueError, match="slowdown is given for block 4, but there are blocks 0 to 3 only"):
        trainer.fit(make_module(), data())


@pytest.mark.parametrize(
    "arguments", [{"accumulate_grad_batches": 2}, {"callbacks": [GradientAccumulationScheduler({1: 2})]}]
)
def test_accumulation_is_refused(arguments: dict[str, Any], make_trainer: Callable[..., L.Trainer]) -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches counts batches of data"):
        make_trainer(strategy="dgl_async", **arguments).fit(make_module(), data())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(small for small in zip(*loader().dataset.tensors, strict=True))  # type: ignore[attr-defined]


def test_a_loader_without_length_is_refused(make_trainer: Callable[..., L.Trainer]) -> None:
    with pytest.raises(ValueError, match="loader has no length, by which blocks count their epochs"):
        make_trainer(strategy="dgl_async").fit(make_module(), DataLoader(Stream(), batch_size=8))


def test_buffers_are_empty_when_a_run_starts() -> None:
    schedule = Asynchronous()
    updates_of(schedule, num_blocks=3, num_batches=5)
    schedule.start(range(3), 3, seed=0)
    assert all(isinstance(buffer, ReplayBuffer) and len(buffer) == 0 for buffer in schedule.buffers.values())


# What BlockMonitor sees


class Monitored(L.Callback):
    """Keeps what BlockMonitor logs, step by step, and what the progress bar shows."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.bar: set[str] = set()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        names = [name for name in trainer.callback_metrics if name.startswith("monitor/")]
        self.steps.append({name: trainer.callback_metrics[name].item() for name in names})
        self.bar |= set(trainer.progress_bar_metrics)


def test_monitor_logs_updates_ages_and_reuse_of_every_block(make_trainer: Callable[..., L.Trainer]) -> None:
    # Block 1 reads what block 0 has just made, then the same again.
    schedule = InOrder([2, 1, 1, 0], buffer_size=1)
    module = make_module(num_blocks=4, split_at=["2", "6"])
    seen = Monitored()
    trainer = make_trainer(
        strategy=DGLStrategy(schedule), callbacks=[BlockMonitor(), seen], log_every_n_steps=1, max_epochs=2
    )
    trainer.fit(module, data())
    last, before = seen.steps[-1], seen.steps[-2]
    assert [last[f"monitor/updates_block{j}"] for j in range(3)] == [progress.updates for progress in module.progress]
    assert last["monitor/updates_block1"] - before["monitor/updates_block1"] == 2
    assert last["monitor/reuse_block1"] == 0.5
    assert last["monitor/age_mean_block1"] == last["monitor/age_max_block1"] == 0
    assert [last[f"monitor/buffer_batches_block{j}"] for j in (1, 2)] == [1, 1]
    assert last["monitor/buffer_bytes_block1"] == schedule.buffers[1].nbytes
    assert all(last[f"monitor/samples_per_second_block{j}"] > 0 for j in range(3))
    assert "monitor/age_mean_block0" not in last
    assert {name for name in seen.bar if name.startswith("monitor/")} == {"monitor/age"}


def test_monitor_measures_the_age_in_steps_of_the_predecessor(make_trainer: Callable[..., L.Trainer]) -> None:
    # With each batch used once at most, block 1 goes back from the newest batch to older ones.
    seen = Monitored()
    trainer = make_trainer(
        strategy=DGLStrategy(InOrder([0, 0, 1, 1, 1, 0], buffer_size=8, max_reuse=1)),
        callbacks=[BlockMonitor(), seen],
        log_every_n_steps=1,
        max_epochs=1,
    )
    trainer.fit(make_module(num_blocks=2), data())
    # Batches 0 and 1 were used in the warm-up; then three turns on 4, 3 and 2.
    assert (seen.steps[-1]["monitor/age_mean_block1"], seen.steps[-1]["monitor/age_max_block1"]) == (1, 2)


def test_monitor_works_with_the_synchronous_schedule(make_trainer: Callable[..., L.Trainer]) -> None:
    for strategy in ("dgl", "auto"):
        seen = Monitored()
        trainer = make_trainer(strategy=strategy, callbacks=[BlockMonitor(), seen], log_every_n_steps=1)
        trainer.fit(make_module(), data(), data())
        assert {name.split("_block")[0] for name in seen.steps[-1]} == {"monitor/updates", "monitor/samples_per_second"}
        assert seen.steps[-1]["monitor/updates_block3"] == BATCHES
