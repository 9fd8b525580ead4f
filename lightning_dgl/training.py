"""Local training: what a block does when its turn comes, and how Lightning's backward gets the gradients.

Gradients are computed right after a block's forward. That frees the block's activations before the next block runs, so
a step holds the activations of one block at a time. They are delivered through autograd, as the gradients of the loss
that ``training_step`` returns. So the rest of Lightning's step stays as it is: when gradients are zeroed, which hooks
run, how gradients accumulate, and how DistributedDataParallel averages them::

    training_step      block 0: forward, send, loss, autograd.grad ── gradients of block 0 ─┐
                       block 1: forward, send, loss, autograd.grad ── gradients of block 1 ─┤  kept in _Deliver
                       return total = _Deliver(sum of the losses; parameters) ◄─────────────┘
    Lightning          total.backward():  total ──► _Deliver ──► parameter.grad += its gradient   (no other graph)
                       clipping, optimizer.step() of every block
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_dgl.address import Address
from lightning_dgl.checks import check_scalar
from lightning_dgl.lightning_internals import set_batch_size
from lightning_dgl.optim import BlockGradScaler, BlockLRScheduler, BlockOptimizer
from lightning_dgl.run import Run
from lightning_dgl.splitting import in_mode, seed_accelerator

Gradients = list[Tensor | None]


class NonFiniteLossError(RuntimeError):
    """A block's local loss is NaN or infinite; the message names the block and the step."""


@dataclass
class Progress:
    """How far the training of a block has come.

    Attributes:
        updates: local steps that it has taken.
        samples: samples that it has trained on, counted again when a batch is replayed.
    """

    updates: int = 0
    samples: int = 0


class Trainable(Protocol):
    """What local steps need of a DGLModule."""

    blocks: nn.ModuleList
    block_names: list[str]
    lr_interval: str
    on_nonfinite: str
    progress: list[Progress]
    streams: RandomStreams

    @property
    def trainer(self) -> Trainer:
        """The Trainer that runs."""

    @property
    def device(self) -> torch.device:
        """Where this rank's blocks are."""

    def score(self, block: int, output: Tensor) -> Tensor:
        """Return class scores for a block's output."""

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the loss that trains a block."""

    def block_tensors(self, block: int) -> list[Tensor]:
        """Return the parameters and buffers of a block and its head."""


# One batch of data


def take_turns(module: Trainable, run: Run, address: Address) -> dict[int, LocalStep]:
    """Take the local steps that one batch of data calls for.

    Returns:
        The last step of each block that trained. It is for Lightning to update those blocks; a block that has its turn
        again before that is updated here.
    """
    steps: dict[int, LocalStep] = {}
    trainer, schedule = module.trainer, run.schedule
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, BlockOptimizer)
    parameters = optimizer.trained_parameters()
    for block in schedule.turns(run.stage.blocks, address.epoch):
        if not run.links[block].is_ready(address):
            continue  # it has trained on everything in its replay buffer as often as it may
        if block in steps:
            _update(module, run, block, steps.pop(block))
        updates = module.progress[block].updates
        if schedule.is_finished(block, address.epoch, updates, trainer.num_training_batches):
            _pass_on(module, run, block, address)
        else:
            steps[block] = _local_step(module, trainer, run, block, address, parameters[block])
    if not steps and not run.stage.is_first:
        set_batch_size(trainer, 1)  # a stage that skips a step has no batch, but hooks may log values
    _settle_nonfinite(module, run, steps)
    run.stepped = list(steps)
    return steps


def whole_graphs(compiled: bool) -> AbstractContextManager[Any]:
    """Enter a context in which DistributedDataParallel does not cut what torch.compile compiles.

    It cuts graphs so that it can average some gradients while others are computed; here it gets all at once.
    """
    return torch._dynamo.config.patch(optimize_ddp=False) if compiled else nullcontext()  # type: ignore[no-any-return]


def _local_step(
    module: Trainable, trainer: Trainer, run: Run, block: int, address: Address, parameters: Sequence[nn.Parameter]
) -> LocalStep:
    x, targets = run.links[block].receive(address)
    if not run.stage.is_first:
        set_batch_size(trainer, len(x))
    buffers = _copies_of_buffers(module, block) if module.on_nonfinite == "skip" else []
    with module.streams.of(block, module.device):
        output = module.blocks[block](x)
        run.links[block + 1].send(address, output, targets)  # before the backward: the next block need not wait
        scores = module.score(block, output)
        loss = check_scalar(module.local_loss(block, scores, targets), block)
        gradients = local_gradients(_scaled(trainer, block, loss), parameters)
    module.progress[block].updates += 1
    module.progress[block].samples += len(x)
    return LocalStep(loss.detach(), scores.detach(), targets, parameters, gradients, buffers)


def _pass_on(module: Trainable, run: Run, block: int, address: Address) -> None:
    """Send the output of a block that has finished training."""
    x, targets = run.links[block].receive(address)
    with torch.no_grad(), in_mode(module.blocks[block], training=False):
        run.links[block + 1].send(address, module.blocks[block](x), targets, learn=False)


def _update(module: Trainable, run: Run, block: int, step: LocalStep) -> None:
    """Update a block that takes another local step on this batch of data, as Lightning does after the last one."""
    _settle_nonfinite(module, run, {block: step})
    strategy, optimizer = module.trainer.strategy, module.trainer.optimizers[0]
    optimizer.zero_grad()

    def closure() -> Tensor:
        loss = deliver([step])
        strategy.backward(loss, optimizer)
        return loss.detach()

    with torch.autocast(module.device.type, enabled=False):
        strategy.optimizer_step(optimizer, closure, module)  # type: ignore[arg-type]
    step_lr_scheduler(module, block)


def step_lr_scheduler(module: Trainable, block: int) -> None:
    """Step the scheduler of a block that counts its own epochs, if one has ended or it steps after every update.

    A block that trains more often than batches come stays at its last rate: schedulers end with the training, and some
    raise an error when they are stepped beyond their end.
    """
    trainer, updates = module.trainer, module.progress[block].updates
    ends_epoch = updates % trainer.num_training_batches == 0
    is_past_end = updates > trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
    if is_past_end or not (module.lr_interval == "step" or ends_epoch):
        return
    for config in trainer.lr_scheduler_configs:
        assert isinstance(config.scheduler, BlockLRScheduler)
        if not config.reduce_on_plateau:
            config.scheduler.schedulers[block].step()  # type: ignore[call-arg]


def _scaled(trainer: Trainer, block: int, loss: Tensor) -> Tensor:
    loss = loss / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.scalers[block].scale(loss) if isinstance(scaler, BlockGradScaler) else loss


# Losses that are not finite


def _copies_of_buffers(module: Trainable, block: int) -> list[tuple[Tensor, Tensor]]:
    return [(t, t.clone()) for t in module.block_tensors(block) if not isinstance(t, nn.Parameter)]


def _settle_nonfinite(module: Trainable, run: Run, steps: dict[int, LocalStep]) -> None:
    """Undo steps whose loss is not finite, or raise; waits for the device once."""
    if not steps:
        return
    finite = torch.stack([step.loss.float() for step in steps.values()]).isfinite().tolist()
    blocks = [block for block, is_finite in zip(steps, finite, strict=True) if not is_finite]
    if blocks and module.on_nonfinite == "raise":
        first = blocks[0]
        raise NonFiniteLossError(
            f"The local loss of block {first} ({module.block_names[first]}) is {steps[first].loss.item()} at step "
            f"{module.trainer.global_step}. Lower the learning rate or check the data; on_nonfinite='skip' skips that "
            "block's update instead."
        )
    for block in blocks:
        run.num_skipped[block] += 1
        steps[block].undo()


# One local step, and its delivery


@dataclass
class LocalStep:
    """The outcome of one block's step on one batch.

    Attributes:
        loss: the local loss, a detached scalar.
        scores: detached class scores (N, classes).
        targets: what they were scored against.
        parameters: what the block trains.
        gradients: of these parameters, accumulation and loss scaling included; None where there is none.
        buffers: buffers with their values from before the step, for :meth:`undo`.
    """

    loss: Tensor
    scores: Tensor
    targets: Tensor
    parameters: Sequence[nn.Parameter]
    gradients: Gradients
    buffers: list[tuple[Tensor, Tensor]]

    def undo(self) -> None:
        """Drop the gradients and put the buffers back, as if the block had not seen the batch."""
        self.gradients = [None] * len(self.gradients)
        for buffer, before in self.buffers:
            buffer.copy_(before)


def local_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Gradients:
    """Return the gradients of a block's ``parameters`` (None where unused); free the block's activations."""
    if not parameters or not loss.requires_grad:  # nothing to train, or the block is frozen
        return [None] * len(parameters)
    # As outside of Lightning's forward context: autocast would change the dtype of what backward computes.
    with torch.autocast(loss.device.type, enabled=False), _hooks_put_aside(parameters):
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))


@contextmanager
def _hooks_put_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep hooks on parameters (``parameter.register_hook``) for the delivery; else they would run twice."""
    hooks = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    try:
        for parameter, _ in hooks:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, own in hooks:
            parameter._backward_hooks = own


class _Deliver(torch.autograd.Function):
    """Pass the loss on; in backward, give each parameter the gradient that was computed before."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Gradients, *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Given away rather than kept, so that each can become the parameter's .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        return (None, None, *gradients)


def deliver(steps: Iterable[LocalStep], dense: bool = False) -> Tensor:
    """Return the sum of the local losses; its backward adds each step's gradients to the ``.grad`` of its parameters.

    The value that backward starts from does not scale them: accumulation and loss scaling are in them already.

    Args:
        steps: one for each block, in order.
        dense: deliver zeros where there is no gradient; replicas that average theirs wait for every one.
    """
    steps = list(steps)
    if not steps:
        return torch.zeros((), requires_grad=True)
    total = torch.stack([step.loss.float() for step in steps]).sum()
    gradients = [gradient for step in steps for gradient in step.gradients]
    parameters = [parameter for step in steps for parameter in step.parameters]
    if dense:
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    if not parameters:
        total.requires_grad_()
    return _Deliver.apply(total, gradients, *parameters)  # type: ignore[no-untyped-call]


# Random streams

RandomState = dict[str, torch.Tensor]
"""States of the default generators, by device type ("cpu", and that of an accelerator where there is one)."""


def get_random_state(device: torch.device) -> RandomState:
    """Return the state of the CPU's default generator, and of ``device``'s."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Restore what :func:`get_random_state` returned; a device type that ``state`` lacks is left as it is."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type].cpu())


class RandomStreams:
    """A random stream for each of J blocks, so that dropout draws the same masks on any number of ranks.

    Block 0 draws from the default generators, as data loading does, which is on the same rank. Every other block has a
    separate stream, which is seeded with ``seed + block`` and continues from one local step to the next.

    Attributes:
        seed: set before the first use.
    """

    seed: int | None = None

    def __init__(self, num_blocks: int) -> None:
        self._states: list[RandomState | None] = [None] * num_blocks

    @contextmanager
    def of(self, block: int, device: torch.device) -> Iterator[None]:
        """Enter a context in which the default generators draw from the stream of ``block``."""
        if block == 0:
            yield
            return
        outside = get_random_state(device)
        state = self._states[block]
        # At the first use; on an accelerator also at the first use after a checkpoint that was saved without one.
        if state is None or device.type not in state:
            assert self.seed is not None
            seed = (self.seed + block) % 2**63
            torch.default_generator.manual_seed(seed)
            if device.type != "cpu":
                seed_accelerator(device, seed)
        if state is not None:
            set_random_state(state, device)
        try:
            yield
        finally:
            self._states[block] = get_random_state(device)
            set_random_state(outside, device)

    def __getitem__(self, block: int) -> RandomState | None:
        """Return the state of the stream of ``block``; None before its first use, and for block 0."""
        return self._states[block]

    def load(self, states: Sequence[Any]) -> None:
        """Continue from these states, one for each block."""
        self._states = list(states)
