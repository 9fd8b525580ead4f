"""A stage as DistributedDataParallel needs it, where several ranks train the same blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn


class Replica(nn.Module):
    """A module that has the parameters and buffers of one stage only, and whose forward is the training step.

    Args:
        training_step: of the whole module, which is not registered: it has the other blocks, too.
        parts: the blocks and heads of the stage.
        at_work: context in which this rank works alone, inside a collective of all replicas.
        wait_for_buffers: waits until the device has the buffers of the first replica.
    """

    def __init__(
        self,
        training_step: Callable[..., Any],
        parts: Iterable[nn.Module],
        at_work: Callable[[], AbstractContextManager[None]],
        wait_for_buffers: Callable[[], None],
    ) -> None:
        super().__init__()
        self.__dict__["_training_step"] = training_step
        self._at_work = at_work
        self._wait_for_buffers = wait_for_buffers
        self._parts = nn.ModuleList(parts)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take a training step."""
        if next(self.buffers(), None) is not None:
            self._wait_for_buffers()
        with self._at_work():
            return self.__dict__["_training_step"](*args, **kwargs)
