"""Lightning's launcher of spawned and forked ranks, which passes on a failed rank's own message."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException
from typing_extensions import override

from lightning_dgl.distributed.watchdog import RankFailedError

if TYPE_CHECKING:
    from lightning_dgl.strategy import DGLStrategy


class RankLauncher(_MultiProcessingLauncher):
    """Starts a process for each rank; if one fails, the error says which, and why."""

    _strategy: DGLStrategy  # type: ignore[assignment]
    _failure: Path

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            self._failure = Path(folder) / "failure"
            try:
                return super().launch(function, *args, trainer=trainer, **kwargs)
            except ProcessException as error:
                if self._failure.exists():
                    raise RankFailedError(self._failure.read_text()) from None
                if isinstance(error, ProcessExitedException):
                    name = self._strategy.rank_names()[self._strategy.first_rank_of_node + error.error_index]
                    raise RankFailedError(f"{name} has gone without a word, and with it the run: {error}.") from None
                raise

    @override
    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._wrapping_function(*args, **kwargs)
        except BaseException as error:
            # As Lightning does in the process that has called the Trainer, which here is none of the ranks.
            failure = self._strategy.fail(error)
            if failure is not None and not self._failure.exists():
                self._failure.write_text(str(failure))
            raise
