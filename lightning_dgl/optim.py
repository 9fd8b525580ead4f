"""One optimizer, one learning-rate scheduler and one gradient scaler for Lightning, each made of one for every block.

Lightning's automatic optimization wants a single optimizer; with these it counts one step for each batch, saves and
restores everything, and steps schedulers as usual, while every block keeps its own.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
LRSchedulerFactory = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


def sgd(params: Iterable[nn.Parameter]) -> Optimizer:
    """Return the paper's optimizer: SGD with learning rate 0.1, momentum 0.9 and weight decay 5e-4."""
    return SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)


class _States(MutableMapping[Tensor, Any]):
    """The states of all blocks' optimizers as one mapping; writing reaches the optimizer that owns the parameter."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def _owner(self, parameter: Tensor) -> Optimizer:
        for optimizer in self._optimizers:
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer
        raise KeyError(parameter)

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._owner(parameter).state[parameter]

    def __setitem__(self, parameter: Tensor, state: Any) -> None:
        self._owner(parameter).state[parameter] = state

    def __delitem__(self, parameter: Tensor) -> None:
        del self._owner(parameter).state[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        for optimizer in self._optimizers:
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


class BlockOptimizer(Optimizer):
    """The optimizers of all blocks as one: a step steps each of them.

    Attributes:
        optimizers: one for each block, in order.

    Raises:
        ValueError: if an optimizer's ``step`` needs a closure (LBFGS): a step cannot compute a block's loss again.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        # Not super().__init__(): parameter groups and states live in the blocks' optimizers, and are only shown here.
        for j, optimizer in enumerate(optimizers):
            closure = inspect.signature(optimizer.step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                raise ValueError(
                    f"The optimizer of block {j}, {type(optimizer).__name__}, needs a closure that computes the loss "
                    "again, which decoupled training does not offer. Use a first-order optimizer such as SGD or Adam."
                )
            for i, group in enumerate(optimizer.param_groups):
                own = group.get("name", "" if len(optimizer.param_groups) == 1 else f"pg{i + 1}")
                group["name"] = f"block{j}/{own}" if own else f"block{j}"  # what LearningRateMonitor shows
            # A fused optimizer offers to unscale gradients itself, and so Lightning refuses to clip them. Here they are
            # unscaled before, by BlockGradScaler.
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        self.optimizers = list(optimizers)
        self.defaults = optimizers[0].defaults
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()

    @property
    @override
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    @override
    def state(self) -> _States:  # type: ignore[override]
        return _States(self.optimizers)

    def trained_parameters(self) -> list[list[nn.Parameter]]:
        """Return, for each block, the parameters that its optimizer updates."""
        return [
            [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            for optimizer in self.optimizers
        ]

    @override
    @Optimizer.profile_hook_step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise NotImplementedError(
            "A parameter group belongs to one block: add it to module.optimizers().optimizers[j] of that block."
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"blocks": [optimizer.state_dict() for optimizer in self.optimizers]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = _states_of_blocks(state_dict, len(self.optimizers), "optimizer")
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(type(optimizer).__name__ for optimizer in self.optimizers)})"


class BlockLRScheduler:
    """The learning-rate schedulers of all blocks as one: a step steps each of them.

    Attributes:
        optimizer: the :class:`BlockOptimizer` whose rates they set.
        schedulers: one for each block, in order.

    Raises:
        TypeError: if a factory makes something other than a scheduler.
        ValueError: if some blocks, but not all, have a ReduceLROnPlateau; Lightning steps those at another time.
    """

    def __init__(self, optimizer: BlockOptimizer, make: Sequence[LRSchedulerFactory]) -> None:
        self.optimizer = optimizer
        self.schedulers = [factory(own) for factory, own in zip(make, optimizer.optimizers, strict=True)]
        for j, scheduler in enumerate(self.schedulers):
            if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
                raise TypeError(
                    f"lr_scheduler must return a torch.optim.lr_scheduler.LRScheduler, block {j} got "
                    f"{type(scheduler).__name__}."
                )
        plateau = [isinstance(scheduler, ReduceLROnPlateau) for scheduler in self.schedulers]
        if any(plateau) and not all(plateau):
            raise ValueError(
                "lr_scheduler mixes ReduceLROnPlateau with other schedulers. Use ReduceLROnPlateau for every block or "
                "for none."
            )
        self.reduce_on_plateau = all(plateau)

    def step(self, metrics: Mapping[int, Any] | None = None) -> None:
        """Step each block's scheduler; with ReduceLROnPlateau those of the blocks for which there are ``metrics``."""
        for j, scheduler in enumerate(self.schedulers):
            if not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()
            elif metrics is not None and j in metrics:
                scheduler.step(metrics[j])

    def get_last_lr(self) -> list[float]:
        """The current learning rate of every parameter group, first block first."""
        return [rate for scheduler in self.schedulers for rate in scheduler.get_last_lr()]  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"blocks": [...]}``, with the state of every block."""
        return {"blocks": [scheduler.state_dict() for scheduler in self.schedulers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; raise ValueError for another number of blocks."""
        states = _states_of_blocks(state_dict, len(self.schedulers), "learning-rate scheduler")
        for scheduler, state in zip(self.schedulers, states, strict=True):
            scheduler.load_state_dict(state)


class BlockGradScaler:
    """The gradient scalers of all blocks as one, for 16-bit mixed precision.

    Each block scales its own local loss, and an overflow in one block makes only that block skip its update and lower
    its scale. Takes the place of the one scaler that Lightning's ``MixedPrecision`` plugin would use.

    Attributes:
        scalers: one for each block, in order, configured like the scaler that this one replaces.
    """

    def __init__(self, num_blocks: int, like: GradScaler | BlockGradScaler) -> None:
        template = like.scalers[0] if isinstance(like, BlockGradScaler) else like  # an earlier fit of the same Trainer
        self.scalers: list[GradScaler] = [
            GradScaler(
                device=template._device,
                init_scale=template.get_scale(),
                growth_factor=template.get_growth_factor(),
                backoff_factor=template.get_backoff_factor(),
                growth_interval=template.get_growth_interval(),
                enabled=template.is_enabled(),
            )
            for _ in range(num_blocks)
        ]

    def scale(self, outputs: Tensor) -> Tensor:
        """Leave the step's summed loss as it is: every local loss was scaled before its own backward."""
        return outputs

    def unscale_(self, optimizer: BlockOptimizer) -> None:
        """Divide every block's gradients by its scale, and note which blocks overflowed."""
        for scaler, own in zip(self.scalers, optimizer.optimizers, strict=True):
            if _has_gradients(own):
                scaler.unscale_(own)

    def step(self, optimizer: BlockOptimizer) -> None:
        """Step each block's optimizer, unless that block's gradients overflowed or there are none."""
        pairs = zip(self.scalers, optimizer.optimizers, strict=True)
        with_gradients = [(scaler, own) for scaler, own in pairs if _has_gradients(own)]
        # GradScaler.step would wait for the device once for each block.
        overflows = [sum(scaler._found_inf_per_device(own).values()) for scaler, own in with_gradients]
        overflowed = torch.stack(overflows).tolist() if overflows else []
        for (scaler, own), is_infinite in zip(with_gradients, overflowed, strict=True):
            if not is_infinite:
                own.step()
            scaler.update()

    def update(self) -> None:
        """Do nothing: each scaler was updated in its own step."""

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"blocks": [...]}``, with the state of every block."""
        return {"blocks": [scaler.state_dict() for scaler in self.scalers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; raise ValueError for another number of blocks."""
        for scaler, state in zip(
            self.scalers, _states_of_blocks(state_dict, len(self.scalers), "gradient scaler"), strict=True
        ):
            scaler.load_state_dict(state)


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _states_of_blocks(state_dict: dict[str, Any], num_blocks: int, what: str) -> list[Any]:
    states = state_dict.get("blocks")
    if states is None or len(states) != num_blocks:
        found = "no blocks" if states is None else f"{len(states)} blocks"
        raise ValueError(
            f"The checkpoint holds {what} states of {found}, this module has {num_blocks}. Make the module with the "
            "same number of blocks as the one that was saved."
        )
    return states
