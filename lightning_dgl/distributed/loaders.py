"""Data loaders of later stages: they count batches, while the activations come over the wire."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn


class Token:
    """Stands in for a batch on a rank that gets activations instead of data; the training step takes them."""

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "On this rank a batch holds no data: only the first stage reads data, later ones train on what the stage "
            "before sends. Let a callback or hook that looks into batches do so on the first stage only (where "
            "trainer.strategy.run.stage.is_first), or train on one device. To change batches, override "
            "on_after_batch_transfer, which is called where the data is."
        )

    def __getitem__(self, index: Any) -> NoReturn:
        self.__iter__()

    def __len__(self) -> int:
        self.__iter__()

    def __bool__(self) -> bool:
        return True


class StageLoader:
    """Stands in for a data loader on a later stage: yields as many tokens as the data loader has batches.

    Args:
        length: number of batches.
    """

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Token]:
        for _ in range(self._length):
            yield Token()


class StatefulStageLoader(StageLoader):
    """Stands in for a data loader with a state, which the first stage keeps."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the state is the first stage's."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the first stage resumes, and sends what follows."""
