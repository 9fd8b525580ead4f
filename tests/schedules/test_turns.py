"""Which blocks take turns in an asynchronous run, and which arguments it takes."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_dgl import Asynchronous, DGLStrategy, Sequential, Synchronous
from tests.internals import InOrder, buffers, links_of, turns_of
from tests.runs import MakeTrainer, loader, make_module
from tests.schedules.plain import data


def test_a_block_of_slowdown_s_takes_one_sth_of_the_updates() -> None:
    # Standard deviation of each below: about 2 % of 5000.
    steps, _ = turns_of(Asynchronous(slowdown={1: 2.0, 3: 1.25}), num_blocks=4, num_batches=5000)
    assert steps[0] == 5000
    for got, expected in zip(steps[1:], (2500, 5000, 4000), strict=True):
        assert got == pytest.approx(expected, rel=0.08)


def test_where_block_0_is_slow_the_others_take_more_turns() -> None:
    steps, _ = turns_of(Asynchronous(slowdown={0: 2.0}), num_blocks=3, num_batches=5000)
    assert steps[0] == 5000
    assert steps[1:] == pytest.approx([10_000, 10_000], rel=0.08)


def test_first_two_batches_are_a_warm_up_of_every_block() -> None:
    schedule = Asynchronous(buffer_size=5, slowdown={2: 100.0})
    assert turns_of(schedule, num_blocks=4, num_batches=1)[0] == [1, 1, 1, 1]
    steps, links = turns_of(schedule, num_blocks=4, num_batches=2)
    assert steps == [2, 2, 2, 2]
    assert {block: len(buffer) for block, buffer in buffers(links).items()} == {1: 2, 2: 2, 3: 2}


def test_a_block_whose_batches_are_used_up_skips_its_turn() -> None:
    steps, _ = turns_of(Asynchronous(buffer_size=50, max_reuse=1), num_blocks=2, num_batches=1000)
    assert steps[1] <= 1000
    assert steps[1] > 900  # 50 batches make up for most of what it has missed


def test_draws_are_seeded() -> None:
    first, again, other = (turns_of(Asynchronous(), 3, 100, seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_buffers_are_empty_when_a_run_starts(make_trainer: MakeTrainer) -> None:
    schedule, module = Asynchronous(), make_module()
    make_trainer(strategy=DGLStrategy(schedule)).fit(module, data())
    assert all(len(buffer) > 0 for buffer in buffers(links_of(module)).values())
    make_trainer(strategy=DGLStrategy(schedule)).validate(module, data(), verbose=False)
    assert [len(buffer) for buffer in buffers(links_of(module)).values()] == [0, 0, 0]


def test_turns_are_those_of_the_table() -> None:
    assert list(Synchronous().turns(range(1, 3), epoch=0)) == [1, 2]
    schedule = InOrder([2, 1, 1, 0, 0])
    schedule.start(range(3), 3, seed=0)
    turns = [list(schedule.turns(range(3), epoch=0)) for _ in range(4)]
    assert turns == [[0, 1, 2], [0, 1, 2], [0, 2, 1, 1], [0]]
    one_by_one = Sequential()
    one_by_one.num_epochs(6, num_blocks=3)
    assert [list(one_by_one.turns(range(3), epoch)) for epoch in range(6)] == [
        [0],
        [0],
        [0, 1],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2],
    ]


def test_on_several_ranks_blocks_of_a_stage_step_in_order() -> None:
    schedule = Asynchronous()
    schedule.start(range(1, 3), 4, seed=0)
    assert [list(schedule.turns(range(1, 3), epoch=0)) for _ in range(4)] == [[1, 2]] * 4


def test_a_stage_waits_only_if_it_is_ahead() -> None:
    schedule = Asynchronous(max_lead=2)
    assert [schedule.may_read(lead, is_exhausted=False) for lead in (-1, 0, 1, 2, 3)] == [True, True, True, True, False]
    assert [schedule.may_read(lead, is_exhausted=True) for lead in (-1, 0, 1)] == [True, True, False]


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


def test_slowdown_of_a_block_that_does_not_exist(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(strategy=DGLStrategy(Asynchronous(slowdown={4: 2.0})))
    with pytest.raises(ValueError, match="slowdown is given for block 4, but there are blocks 0 to 3 only"):
        trainer.fit(make_module(), data())


@pytest.mark.parametrize(
    "arguments", [{"accumulate_grad_batches": 2}, {"callbacks": [GradientAccumulationScheduler({1: 2})]}]
)
def test_accumulation_is_refused(arguments: dict[str, Any], make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches counts batches of data"):
        make_trainer(strategy="dgl_async", **arguments).fit(make_module(), data())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(small for small in zip(*loader().dataset.tensors, strict=True))  # type: ignore[attr-defined]


def test_a_loader_without_length_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="loader has no length, by which blocks count their epochs"):
        make_trainer(strategy="dgl_async").fit(make_module(), DataLoader(Stream(), batch_size=8))
