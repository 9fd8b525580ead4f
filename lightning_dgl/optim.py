"""One optimizer, one learning-rate scheduler and one gradient scaler for Lightning, each made of one for every block.

Lightning's automatic optimization wants a single optimizer; with these it counts one step for each batch, saves and
restores everything, and steps schedulers as usual, while every block keeps its own.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override


class BlockParameters(list[nn.Parameter]):
    """The parameters of a block and its head, as an optimizer factory gets them: a list that also knows their names.

    A factory that groups parameters by name iterates over :meth:`named`::

        def optimizer(params):
            decay = [p for name, p in params.named() if name.endswith("weight") and p.ndim > 1]
            others = [p for name, p in params.named() if not (name.endswith("weight") and p.ndim > 1)]
            return torch.optim.AdamW([{"params": decay}, {"params": others, "weight_decay": 0.0}], lr=1e-3)

    Args:
        named: pairs of name and parameter.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        pairs = list(named)
        super().__init__(parameter for _, parameter in pairs)
        self._names = [name for name, _ in pairs]

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """Return pairs of name and parameter: the network's own names, and "heads.{block}...." of the head's."""
        return list(zip(self._names, self, strict=True))


OptimizerFactory = Callable[[BlockParameters], Optimizer]
LRSchedulerFactory = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


def sgd(params: Iterable[nn.Parameter]) -> Optimizer:
    """Return the paper's optimizer: SGD with learning rate 0.1, momentum 0.9 and weight decay 5e-4."""
    return SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)


def make_optimizer(make: OptimizerFactory, parameters: BlockParameters, without_frozen: bool = False) -> Optimizer:
    """Let a factory make the optimizer of a block.

    Of a block that is frozen it may leave out everything, which torch's optimizers refuse; then there is one without
    parameters, to which finetuning callbacks add.

    Args:
        make: the factory.
        parameters: of the block.
        without_frozen: leave out frozen parameters, because a callback will add them in groups of their own.
    """
    trainable = BlockParameters((name, p) for name, p in parameters.named() if p.requires_grad)
    if trainable or not without_frozen:
        try:
            return make(trainable if without_frozen else parameters)
        except ValueError:
            if trainable:
                raise
    optimizer = make(BlockParameters([("", nn.Parameter(torch.zeros(1)))]))
    for group in optimizer.param_groups:
        group["params"].clear()
        group.get("param_names", []).clear()
    return optimizer


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


class _SharedGroup(MutableMapping[str, Any]):
    """A parameter group that has parts in several blocks' optimizers, as one: writing reaches every part."""

    def __init__(self, parts: Sequence[dict[str, Any]]) -> None:
        self._parts = parts

    def __getitem__(self, key: str) -> Any:
        if key in ("params", "param_names"):
            return [item for part in self._parts for item in part[key]]
        value = self._parts[0][key]
        return value.rpartition("/")[2] if key == "name" else value

    def __setitem__(self, key: str, value: Any) -> None:
        if key in ("params", "param_names", "name"):
            raise ValueError(f"{key!r} of a parameter group with parameters of several blocks cannot be changed.")
        for part in self._parts:
            part[key] = value

    def __delitem__(self, key: str) -> None:
        for part in self._parts:
            del part[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0])

    def __len__(self) -> int:
        return len(self._parts[0])


class BlockOptimizer(Optimizer):
    """The optimizers of all blocks as one: a step steps those of the blocks that are trained here.

    Its parameter groups are those of the blocks, first block first. One that is added later, as finetuning callbacks
    do, comes last; if it has parameters of several blocks, each block's optimizer gets its part.

    Args:
        optimizers: one for each block, in order.
        parameters: of each block.
        here: the blocks that are trained in this process.

    Attributes:
        optimizers: one for each block, in order.
        here: the blocks that are trained in this process.

    Raises:
        ValueError: if an optimizer's ``step`` needs a closure (LBFGS): a step cannot compute a block's loss again.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], parameters: Sequence[Sequence[nn.Parameter]], here: Sequence[int]
    ) -> None:
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
        self.here = here
        self._block_of: dict[Tensor, int] = {parameter: j for j, own in enumerate(parameters) for parameter in own}
        # By group: the places of its parts, as block and number in that block's optimizer.
        self._places: list[list[tuple[int, int]]] = []
        self.defaults = optimizers[0].defaults
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()

    @property
    @override
    def param_groups(self) -> list[Any]:  # type: ignore[override]
        # The blocks' optimizers replace their groups when they load a state, so only places are kept.
        known = {place for places in self._places for place in places}
        for j, optimizer in enumerate(self.optimizers):
            self._places += [[(j, i)] for i in range(len(optimizer.param_groups)) if (j, i) not in known]
        groups = [[self.optimizers[j].param_groups[i] for j, i in places] for places in self._places]
        return [_SharedGroup(parts) if len(parts) > 1 else parts[0] for parts in groups]

    @param_groups.setter
    def param_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        parts = [self._parts_of(group) for group in groups]
        self._places = []
        for optimizer in self.optimizers:
            optimizer.param_groups = []
        for own in parts:
            self._places.append([(j, len(self.optimizers[j].param_groups)) for j in own])
            for j, part in own.items():
                self.optimizers[j].param_groups.append(part)
                # A resumed finetuning callback restores groups that it had unfrozen; its set-up has frozen them again.
                for parameter in part["params"]:
                    parameter.requires_grad_(True)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        name = param_group.get("name", f"pg{len(self.param_groups) + 1}")
        parts = self._parts_of({**param_group, "params": params, "name": name})
        self._places.append([(j, len(self.optimizers[j].param_groups)) for j in parts])
        for j, part in parts.items():
            self.optimizers[j].add_param_group(part)

    def _parts_of(self, group: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """Return the part of a parameter group that belongs to each block."""
        names = list(group.get("param_names", ()))
        parts: dict[int, dict[str, Any]] = {}
        label = str(group.get("name", "")).rpartition("/")[2]
        if not group["params"] and (found := re.match(r"block(\d+)", group.get("name", ""))):
            return {int(found[1]): dict(group)}
        for i, parameter in enumerate(group["params"]):
            if not isinstance(parameter, Tensor) or parameter not in self._block_of:
                raise ValueError(
                    "A parameter group was added with a parameter that is in no block. Take parameters from "
                    "module.block_parameters(j)."
                )
            j = self._block_of[parameter]
            if j not in parts:
                own = label if label == f"block{j}" else f"block{j}/{label}"
                parts[j] = {**group, "params": [], "name": own} | ({"param_names": []} if names else {})
            parts[j]["params"].append(parameter)
            if names:
                parts[j]["param_names"].append(names[i])
        return dict(sorted(parts.items()))

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
        for j in self.here:
            self.optimizers[j].step()
        return loss

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        for j in self.here:
            self.optimizers[j].zero_grad(set_to_none)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"blocks": [optimizer.state_dict() for optimizer in self.optimizers]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = _states_of_blocks(state_dict, len(self.optimizers), "optimizer")
        for j, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=True)):
            remedy = "Pass the optimizer of the training that is resumed as optimizer= to DGLModule."
            try:
                optimizer.load_state_dict(state)
            except ValueError as error:
                raise ValueError(f"The optimizer state of block {j} does not fit ({error}). {remedy}") from error
            missing = [name for group in optimizer.param_groups for name in optimizer.defaults if name not in group]
            if missing:
                raise ValueError(
                    f"The optimizer state of block {j} is not of {type(optimizer).__name__}: it has no "
                    f"{missing[0]!r}. {remedy}"
                )

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
        self._has_stepped = False

    def step(self, metrics: Mapping[int, Any] | None = None) -> None:
        """Step each block's scheduler; with ReduceLROnPlateau those of the blocks for which there are ``metrics``."""
        if self._has_stepped:
            self._step(metrics)
            return
        self._has_stepped = True
        with warnings.catch_warnings():
            # At its first step a scheduler warns if its optimizer took none, as here for the blocks of other ranks.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self._step(metrics)

    def _step(self, metrics: Mapping[int, Any] | None) -> None:
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
        for j in optimizer.here:
            if has_gradients(optimizer.optimizers[j]):
                self.scalers[j].unscale_(optimizer.optimizers[j])

    def step(self, optimizer: BlockOptimizer) -> None:
        """Step each block's optimizer, unless that block's gradients overflowed or there are none."""
        pairs = [(self.scalers[j], optimizer.optimizers[j]) for j in optimizer.here]
        with_gradients = [(scaler, own) for scaler, own in pairs if has_gradients(own)]
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


def has_gradients(optimizer: Optimizer) -> bool:
    """Return whether a parameter of ``optimizer`` has a gradient."""
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
