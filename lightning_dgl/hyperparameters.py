"""Which arguments of a DGLModule are its hyperparameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from typing_extensions import Self

from lightning_dgl.lightning_internals import do_not_log_hparams


class WithHyperparameters(LightningModule):
    """A LightningModule that saves arguments as hyperparameters, so that load_from_checkpoint can repeat its making.

    Attributes:
        saved_arguments: the names of these arguments.
    """

    saved_arguments: set[str]
    _given: set[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note by which names a subclass takes arguments: what it passes on by itself is no hyperparameter."""
        self = super().__new__(cls)
        parameters = inspect.signature(cls.__init__).parameters.values()
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if len(args) > 1 and any(p.kind is p.VAR_POSITIONAL for p in parameters):
            named.add("num_blocks")
        self.__dict__["_given"] = named | kwargs.keys()
        return self

    def save_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Save those of ``arguments`` by which the module can be made again."""
        own = {name: value for name, value in arguments.items() if name in self._given}
        self.saved_arguments = set(own)
        self.save_hyperparameters(own)

    def leave_to(self, datamodule: LightningDataModule) -> None:
        """Keep away from loggers what ``datamodule`` has under the same name; Lightning takes it for a mistake."""
        do_not_log_hparams(self, [name for name in self.saved_arguments if name in datamodule.hparams])
