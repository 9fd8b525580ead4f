"""Launch ranks as Lightning does, but keep them together until the last hook has run, and tell which rank failed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException
from typing_extensions import override

from lightning_dgl.distributed.failures import RankFailedError
from lightning_dgl.lightning_internals import (
    MultiProcessingLauncher,
    SubprocessScriptLauncher,
    collect_random_states,
    set_random_states,
)


class ScriptLauncher(SubprocessScriptLauncher):
    """Lets every process run the user's script; ranks part when the Trainer has nothing more to do on any of them.

    Args:
        environment: tells which rank this is, and whether the others are started already.
        num_processes: on each node.
        num_nodes: how many nodes there are.
        part: called when the Trainer's work is done; waits for the other ranks.
    """

    def __init__(
        self, environment: ClusterEnvironment, num_processes: int, num_nodes: int, part: Callable[[], None]
    ) -> None:
        super().__init__(environment, num_processes, num_nodes)
        self._part = part

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        result = super().launch(function, *args, trainer=trainer, **kwargs)
        self._part()
        return result


class RankLauncher(MultiProcessingLauncher):
    """Starts a process for each rank; if one fails, raises an error that names the rank and the reason.

    Args:
        strategy: the strategy of the ranks.
        start_method: how to start a process.
        part: called in a rank when the Trainer's work is done; waits for the other ranks.
        on_failure: called in a rank with the exception that it raised; returns the failure of the run, or None if there
            is nothing to pass on.
        name_of: returns the name in messages of the rank with this number on this node.
    """

    _failure: Path
    _random_states: dict[str, Any]

    def __init__(
        self,
        strategy: ParallelStrategy,
        start_method: Literal["spawn", "fork", "forkserver"],
        part: Callable[[], None],
        on_failure: Callable[[BaseException], BaseException | None],
        name_of: Callable[[int], str],
    ) -> None:
        super().__init__(strategy, start_method)
        self._part = part
        self._on_failure = on_failure
        self._name_of = name_of

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self._random_states = collect_random_states(include_cuda=False)
        with tempfile.TemporaryDirectory() as folder:
            self._failure = Path(folder) / "failure"
            try:
                return super().launch(function, *args, trainer=trainer, **kwargs)
            except ProcessException as error:
                if self._failure.exists():
                    raise RankFailedError(self._failure.read_text()) from None
                if isinstance(error, ProcessExitedException):
                    name = self._name_of(error.error_index)
                    raise RankFailedError(
                        f"{name} exited without an error message; the run was stopped: {error}."
                    ) from None
                raise
            finally:
                if trainer is not None:  # as Lightning does in each rank; here are the weights that they end with
                    trainer.lightning_module.trainer = trainer

    @override
    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        if self._start_method == "forkserver":  # the other methods pass on the random state
            set_random_states(self._random_states)
        try:
            super()._wrapping_function(*args, **kwargs)
            self._part()
        except BaseException as error:
            # Lightning calls Strategy.on_exception only in the process that called the Trainer, and that is not a rank.
            failure = self._on_failure(error)
            if failure is not None and not self._failure.exists():  # the first failure counts
                self._failure.write_text(str(failure))
            raise
