"""A guard on weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.runs import weights


class Unchanged:
    """Checks on leaving that the module's weights and buffers are those of before."""

    def __init__(self, module: nn.Module, parameters_only: bool = False) -> None:
        self.module, self.before = module, weights(module)
        self.names = [name for name, _ in module.named_parameters()] if parameters_only else list(self.before)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        after = self.module.state_dict()
        assert all(torch.equal(self.before[name], after[name]) for name in self.names)
