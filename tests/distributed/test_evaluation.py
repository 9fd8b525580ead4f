"""Evaluation and prediction return on every rank what they return in one process."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
from torch.utils._pytree import tree_map

from tests.distributed.ranks import Keep, Launch, Notes, Run, assert_same_outcome, dropout_module
from tests.runs import differences, loader


@pytest.mark.parametrize(
    ("num_ranks", "verb"),
    [
        *((2, "test"), (3, "validate")),
        pytest.param(2, "validate", marks=pytest.mark.slow),
        pytest.param(3, "test", marks=pytest.mark.slow),
    ],
)
def test_evaluation_returns_what_one_process_returns(verb: str, num_ranks: int, launch: Launch) -> None:
    phase = "val" if verb == "validate" else "test"

    def run(num_ranks: int, data: Any) -> Run:
        return launch(
            num_ranks,
            lambda trainer: getattr(trainer, verb)(dropout_module(), data, verbose=False),
            limit_val_batches=3,
            limit_test_batches=3,
        )

    for data in (loader(30), [loader(30, 4), loader(20), loader(4)]):
        one, several = run(1, data), run(num_ranks, data)
        assert len(one.result) == (len(data) if isinstance(data, list) else 1)
        assert all(
            f"{phase}/acc_ensemble{'/dataloader_idx_2' * (len(one.result) > 1)}" in names for names in one.result
        )
        assert differences(several.result, one.result) == []
        assert_same_outcome(several, one)


@pytest.mark.parametrize("num_ranks", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_every_rank_has_all_predictions(num_ranks: int, launch: Launch) -> None:
    def run(num_ranks: int, data: Any) -> list[Notes]:
        def act(trainer: L.Trainer) -> None:
            trainer.predict(dropout_module(), data, return_predictions=False)

        return launch(num_ranks, act, callbacks=[Keep()], limit_predict_batches=4).ranks

    for data in (loader(30), [loader(30), loader(12, 4)]):
        (one,), several = run(1, data), run(num_ranks, data)
        shapes = [[8, 8, 8, 6], [4, 4, 4]] if isinstance(data, list) else [8, 8, 8, 6]
        assert tree_map(len, one["seen"][0]) == shapes
        assert len(several) == num_ranks
        for note in several:
            assert differences(note["seen"], one["seen"]) == []
