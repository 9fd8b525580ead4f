"""Lightning's launcher of spawned and forked ranks, which passes on a failed rank's own message."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException
from typing_extensions import override

from lightning_dgl.distributed.watchdog import RankFailedError


class RankLauncher(_MultiProcessingLauncher):
    """Starts a process for each rank; if one fails, the error says which, and why.

    Args:
        strategy: whose ranks they are.
        start_method: how to start them.
        on_failure: in a rank, what to do about an exception; returns the failure, as messages speak of it.
        name_of: how messages speak of the process with this number on this node.
    """

    _failure: Path
    _random_states: dict[str, Any]

    def __init__(
        self,
        strategy: ParallelStrategy,
        start_method: Literal["spawn", "fork", "forkserver"],
        on_failure: Callable[[BaseException], BaseException | None],
        name_of: Callable[[int], str],
    ) -> None:
        super().__init__(strategy, start_method)
        self._on_failure = on_failure
        self._name_of = name_of

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self._random_states = _collect_rng_states(include_cuda=False)
        with tempfile.TemporaryDirectory() as folder:
            self._failure = Path(folder) / "failure"
            try:
                return super().launch(function, *args, trainer=trainer, **kwargs)
            except ProcessException as error:
                if self._failure.exists():
                    raise RankFailedError(self._failure.read_text()) from None
                if isinstance(error, ProcessExitedException):
                    name = self._name_of(error.error_index)
                    raise RankFailedError(f"{name} has gone without a word, and with it the run: {error}.") from None
                raise

    @override
    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        if self._start_method == "forkserver":  # the other methods hand on the random state by themselves
            _set_rng_states(self._random_states)
        try:
            super()._wrapping_function(*args, **kwargs)
        except BaseException as error:
            # Lightning tells the strategy only in the process that has called the Trainer, which is none of the ranks.
            failure = self._on_failure(error)
            if failure is not None and not self._failure.exists():
                self._failure.write_text(str(failure))
            raise
