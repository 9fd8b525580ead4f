"""The LightningModule that splits a network into blocks and trains each on its local loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelSummary
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import Metric, MetricCollection
from typing_extensions import Self, override

from lightning_dgl.boundaries import Boundaries
from lightning_dgl.callbacks import BlockSummary
from lightning_dgl.checks import (
    check_batch,
    check_choice,
    check_head,
    check_length,
    class_indices,
    number_of_classes,
    one_per_block,
)
from lightning_dgl.codecs import Activation
from lightning_dgl.distributed import Address, Report, Stage, StageBatch
from lightning_dgl.heads import HeadFactory, head_factory
from lightning_dgl.local_step import LocalStep, deliver, local_gradients
from lightning_dgl.metrics import BlockMetrics, add_vote, ensemble, is_headline, metric_collection
from lightning_dgl.optim import BlockGradScaler, BlockLRScheduler, BlockOptimizer
from lightning_dgl.random_streams import RandomStreams, get_random_state, set_random_state
from lightning_dgl.schedules import Schedule, Synchronous
from lightning_dgl.splitting import (
    Block,
    CompiledCall,
    SplitPoint,
    count_flops,
    example_batch,
    extent,
    in_mode,
    split_network,
)

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
LRSchedulerFactory = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


@dataclass
class BlockProgress:
    """How far the training of a block has come.

    Attributes:
        updates: local steps that it has taken.
        samples: on how many samples, those of replayed batches counted anew.
    """

    updates: int = 0
    samples: int = 0


class NonFiniteLossError(RuntimeError):
    """A block's local loss is NaN or infinite; the message names the block and the step."""


def sgd(params: Iterable[nn.Parameter]) -> Optimizer:
    """The paper's optimizer: SGD with learning rate 0.1, momentum 0.9 and weight decay 5e-4."""
    return SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)


class DGLModule(LightningModule):
    """A network split into J blocks, each trained greedily on a local loss (Algorithm 1 of the paper).

    Block j maps its predecessor's detached output to its own; its auxiliary head scores that output, and the local loss
    of the scores trains block and head. The last block ends in the network's own classifier and needs no head. No
    gradient crosses a boundary, and at most one block's activations are held at a time.

    Works under any single-device strategy and under DDP, and with :class:`~lightning_dgl.DGLStrategy`. A batch is
    ``(inputs, targets)``: a tensor that the network takes, and class indices (N,) or class probabilities (N, classes).

    Logged are ``train/loss`` and ``train/acc``, ``val/loss`` and ``val/acc`` (``test/`` alike) for each epoch, all of
    the last block; the same followed by ``_block0``, ``_block1``, ... for every block; and ``val/acc_ensemble``. In
    training, ``train/loss`` is taken in every step, all other values every ``Trainer(log_every_n_steps)`` steps and at
    the end of an epoch; in every step if a callback monitors one of them.

    Args:
        network: any feed-forward network, (N, C, H, W) -> class scores (N, classes). It is trained in place.
        num_blocks: J, cut where blocks are balanced; 1 is plain end-to-end backpropagation.
        split_at: instead of ``num_blocks``: names of the modules to cut after, see :func:`find_split_points`.
        example_input: a batch of the shape the network is trained on (its values do not matter), or that shape.
        head: auxiliary head: "linear", "mlp", "mlp_sr" or "cnn", a callable ``(channels, spatial_size, num_classes) ->
            nn.Module`` reading (N, C, H, W), or a list of J - 1 of these.
        loss: ``(scores, targets) -> scalar``; cross-entropy by default.
        optimizer: callable ``params -> Optimizer``, or a list of J; by default SGD with learning rate 0.1, momentum 0.9
            and weight decay 5e-4.
        lr_scheduler: callable ``optimizer -> LRScheduler``, or a list of J. ReduceLROnPlateau of block j watches
            ``val/loss_block{j}``.
        lr_interval: whether schedulers step each "epoch" or each "step".
        metrics: a torchmetrics metric or collection, cloned for every block; top-1 accuracy by default.
        balance: what ``num_blocks`` balances: "flops", "memory" held for backward, or measured "time"; heads count.
        on_nonfinite: what a NaN or infinite local loss does: "raise" :class:`NonFiniteLossError` before any update, or
            "skip" that block's gradients and buffer changes of this batch, counted in ``train/skipped_block{j}``.
        compile: run every block and every head through ``torch.compile``, each by itself, in training and evaluation;
            weights and checkpoints stay the same. ``forward`` of the whole network is left as it is. On a CPU it saves
            memory, but hardly any time.

    Attributes:
        network: the original object; ``network.state_dict()`` holds plain weights under the original keys.
        blocks: the J blocks; they share the network's modules and parameters.
        heads: the J - 1 auxiliary heads.
        block_names: what each block contains, "first module to last module".
        split_points: the J - 1 places where the network was cut.
        progress: how far the training of each block has come; of the blocks that this process trains.

    Raises:
        SplitError: if the network cannot be split as asked.
        ValueError: for an argument that does not fit; the message names it, its value and the remedy.
    """

    blocks: nn.ModuleList

    def __init__(
        self,
        network: nn.Module,
        num_blocks: int | None = None,
        *,
        split_at: list[str] | None = None,
        example_input: Tensor | Sequence[int],
        head: str | HeadFactory | list[str | HeadFactory] = "mlp_sr",
        loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer: OptimizerFactory | list[OptimizerFactory] = sgd,
        lr_scheduler: LRSchedulerFactory | list[LRSchedulerFactory] | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        metrics: Metric | MetricCollection | None = None,
        balance: Literal["flops", "memory", "time"] = "flops",
        on_nonfinite: Literal["raise", "skip"] = "raise",
        compile: bool = False,
    ) -> None:
        super().__init__()
        check_choice("lr_interval", lr_interval, ("epoch", "step"))
        check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be an nn.Module, got {type(network).__name__}.")
        example_input = example_batch(network, example_input)
        given = {"num_blocks": num_blocks, "split_at": split_at, "head": head if isinstance(head, str) else None}
        choices = {"lr_interval": lr_interval, "balance": balance, "on_nonfinite": on_nonfinite, "compile": compile}
        self.save_hyperparameters({k: v for k, v in given.items() if v is not None} | choices)

        num_classes = number_of_classes(network, example_input)
        factories = [head_factory(h) for h in head] if isinstance(head, list) else [head_factory(head)]

        def make_head(point: SplitPoint, j: int = 0) -> nn.Module:
            return factories[j if isinstance(head, list) else 0](point.channels, point.spatial_size, num_classes)

        split = split_network(network, num_blocks, split_at, example_input, balance, make_head if factories else None)
        num_blocks = len(split.blocks)
        if isinstance(head, list):
            check_length("head", head, num_blocks - 1, "the last block has the network's own classifier")
        self._optimizer_factories = one_per_block("optimizer", optimizer, num_blocks)
        self._lr_scheduler_factories = (
            None if lr_scheduler is None else one_per_block("lr_scheduler", lr_scheduler, num_blocks)
        )

        self.num_classes = num_classes
        self.network = network
        # Not registered: blocks are pieces of the network, and their parameters would be counted and saved twice.
        self.__dict__["blocks"] = split.blocks
        self.split_points = split.points
        self.block_names = [extent(block) for block in split.blocks]
        self.heads = nn.ModuleList(make_head(point, j) for j, point in enumerate(split.points))
        self.heads.to(example_input.device)
        for j, point in enumerate(split.points):
            features = torch.zeros(point.shape, dtype=example_input.dtype, device=example_input.device)
            check_head(j, self.heads[j], point, features, num_classes)
        self.block_flops = split.costs
        self.head_flops = [
            count_flops(head, point.as_images(torch.empty(point.shape, device=example_input.device)))
            for head, point in zip(self.heads, split.points, strict=True)
        ]
        if isinstance(loss, nn.Module) and next(loss.parameters(), None) is not None:
            raise ValueError(
                f"loss ({type(loss).__name__}) has parameters, which no block trains. Put them into the heads."
            )
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self._ignore_index: int | None = getattr(self.loss, "ignore_index", None)
        self._compiled_heads = [CompiledCall() for _ in self.heads] if compile else None
        if compile:
            for block in split.blocks:
                block.compile()
        self._lr_interval = lr_interval
        self._on_nonfinite = on_nonfinite
        self._metric_template = [metric_collection(metrics, num_classes, self._ignore_index)]  # a list: not a submodule
        self._metrics = nn.ModuleDict()
        self.progress = [BlockProgress() for _ in range(num_blocks)]
        self._plain_boundaries = Boundaries(None, self.block_names)
        self._skipped = [0] * num_blocks
        self._stepped: list[int] = []  # the blocks that Lightning is to update after this training step
        self._unused_parameters = self._parameters_in_no_block()
        self._random_streams: RandomStreams | None = None
        self._random_state: dict[str, Any] | None = None  # of a checkpoint, until training goes on from it
        self._latest: dict[str, Tensor] = {}  # training values of this rank's blocks

    @property
    def num_blocks(self) -> int:
        """J, the number of blocks."""
        return len(self.blocks)

    def block_parameters(self, block: int) -> list[nn.Parameter]:
        """What block ``block`` trains: its own parameters, in the network's order, then its head's."""
        inside = {id(p) for p in self.blocks[block].parameters()}
        parameters = [p for p in self.network.parameters() if id(p) in inside]
        if block < len(self.heads):
            parameters += self.heads[block].parameters()
        return parameters

    def _parameters_in_no_block(self) -> list[str]:
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        return [name for name, p in self.network.named_parameters() if id(p) not in inside]

    def block_tensors(self, block: int) -> list[Tensor]:
        """Everything that block ``block`` and its head hold: parameters and buffers."""
        own = self.blocks[block]
        assert isinstance(own, Block)
        head = self.heads[block] if block < len(self.heads) else nn.Identity()
        return [*own.tensors(), *head.parameters(), *head.buffers()]

    def ranks_of_blocks(self) -> list[list[int]]:
        """The ranks that train each block, where a Trainer runs on several; else an empty list."""
        return [] if self._trainer is None else self.stage.ranks_of_blocks()

    # Scores

    def forward(self, x: Tensor, block: int | None = None) -> Tensor:
        """Class scores (N, classes) of the last block, or of block ``block``: an early exit.

        Raises:
            RuntimeError: while a Trainer runs with other blocks on other ranks.
        """
        self._check_whole()
        if block is None:
            return self.network(x)
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"block must be from 0 to {self.num_blocks - 1}, got {block}.")
        for j in range(block):
            x = self.blocks[j](x)
        return self._score(block, self.blocks[block](x))

    def block_scores(self, x: Tensor) -> list[Tensor]:
        """Class scores (N, classes) of every block, first block first."""
        self._check_whole()
        scores = []
        for j, block in enumerate(self.blocks):
            x = block(x)
            scores.append(self._score(j, x))
        return scores

    def ensemble(self, x: Tensor) -> Tensor:
        """Class probabilities (N, classes) of the paper's ensemble: Σ_j 2^j softmax(scores of block j), normalised."""
        votes = None
        for j, scores in enumerate(self.block_scores(x)):
            votes = add_vote(votes, j, scores)
        assert votes is not None
        return ensemble(votes, self.num_blocks)

    def _score(self, block: int, output: Tensor) -> Tensor:
        if block == len(self.heads):
            return output
        images = self.split_points[block].as_images(output)
        head = self.heads[block]
        return head(images) if self._compiled_heads is None else self._compiled_heads[block](head, images)

    def _check_whole(self) -> None:
        if self._trainer is not None and self.stage.is_split:
            raise RuntimeError(
                f"This rank holds only blocks {list(self.stage.blocks)} of {self.num_blocks} while the Trainer runs, "
                "so the module cannot be called. Use trainer.validate, test or predict, or call it after fit."
            )

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        """The loss (a scalar) that trains block ``block``; override it for losses that differ between blocks."""
        return self.loss(scores, targets)

    # Training

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        address = self.address(batch_idx)
        inputs, targets = self._tensors_of(batch, address)
        if len(inputs) == 1 and any(isinstance(module, nn.BatchNorm1d) for module in self.heads.modules()):
            raise ValueError(
                "A training batch has one sample, on which the BatchNorm of the auxiliary heads cannot train. Pass "
                "drop_last=True to the DataLoader, or another batch size."
            )
        if batch_idx % self.trainer.accumulate_grad_batches == 0 and not self.trainer.fit_loop._skip_backward:
            # As Lightning will, but it frees the gradients of the step before only when there are new ones.
            self.trainer.optimizers[0].zero_grad()
        stage, boundaries = self.stage, self.boundaries
        streams = self._random_streams
        assert streams is not None
        steps: dict[int, LocalStep] = {}
        parameters = self._trained_parameters()

        def local_step(block: int, given: Activation, y: Tensor) -> Activation:
            x = boundaries.decode(block, given)
            if block in steps:  # each block's last step is Lightning's to take, those before it are taken at once
                self._update(block, steps.pop(block))
            if self._is_finished(block):
                return self._pass_on(block, x, y, address)
            buffers = [(buffer, buffer.clone()) for buffer in self._buffers_to_restore(block)]
            with streams.of(block, self.device):
                output = self.blocks[block](x)
                handed_on = self._hand_on(block, output, y, address)  # before its backward: the next need not wait
                scores = self._score(block, output)
                loss = self.local_loss(block, scores, y)
                gradients = local_gradients(self._scaled(block, loss), parameters[block])
            steps[block] = LocalStep(loss.detach(), scores.detach(), y, parameters[block], gradients, buffers)
            self.progress[block].updates += 1
            self.progress[block].samples += len(x)
            return handed_on

        self.schedule.start_step(self.trainer.current_epoch)
        self.schedule.step(local_step, stage.blocks, inputs, targets)
        self._undo_nonfinite(steps)
        self._stepped = list(steps)
        self._log_training(steps)
        return deliver(steps.values(), dense=stage.is_replicated)

    def _update(self, block: int, step: LocalStep) -> None:
        """Update a block that takes another local step on this batch of data, as Lightning does after the last one."""
        self._undo_nonfinite({block: step})
        optimizer = self.trainer.optimizers[0]
        optimizer.zero_grad()

        def closure() -> Tensor:
            loss = deliver([step])
            self.trainer.strategy.backward(loss, optimizer)
            return loss.detach()

        with torch.autocast(self.device.type, enabled=False):
            self.trainer.strategy.optimizer_step(optimizer, closure, self)
        self._step_lr_scheduler(block)

    def _is_finished(self, block: int) -> bool:
        updates = self.progress[block].updates
        return self.schedule.has_finished(block, updates, self.trainer.num_training_batches)

    def _pass_on(self, block: int, x: Tensor, targets: Tensor, address: Address) -> Activation:
        """The output of a block that trains no longer."""
        with torch.no_grad(), in_mode(self.blocks[block], training=False):
            return self._hand_on(block, self.blocks[block](x), targets, address, learn=False)

    def _hand_on(self, block: int, output: Tensor, targets: Tensor, address: Address, learn: bool = True) -> Activation:
        """What the next block is given of this one's output; sent to the next stage, if that holds the block."""
        handed_on = self.boundaries.encode(block, output, targets, learn)
        if block == self.stage.blocks[-1]:
            self.stage.hand_on(address, (handed_on, targets))
        return handed_on

    @property
    def boundaries(self) -> Boundaries:
        """What happens to a block's output on its way to the next block, while a Trainer runs."""
        return getattr(self.trainer.strategy, "boundaries", None) or self._plain_boundaries

    def address(self, batch_idx: int, dataloader_idx: int = 0) -> Address:
        """Which batch a stage has come to, while a Trainer runs."""
        running = self.trainer.state.stage
        assert running is not None
        step = self.trainer.fit_loop.total_batch_idx if self.trainer.training else 0
        return Address(running.value, self.trainer.current_epoch, dataloader_idx, batch_idx, step)

    def _tensors_of(self, batch: Any, address: Address) -> Sequence[Tensor]:
        """Inputs, targets and, on a later stage in evaluation, the votes of the blocks before."""
        if isinstance(batch, StageBatch):
            batch.expect(address)
            return batch.tensors
        return check_batch(batch, address.batch_idx, self.num_classes, self._ignore_index)

    @override
    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, StageBatch):  # the user's hook has seen it on the first stage
            return batch
        return super()._on_before_batch_transfer(batch, dataloader_idx)

    def _trained_parameters(self) -> list[list[nn.Parameter]]:
        optimizer = self.trainer.optimizers[0]
        assert isinstance(optimizer, BlockOptimizer)
        return [
            [p for group in own.param_groups for p in group["params"] if p.requires_grad]
            for own in optimizer.optimizers
        ]

    @property
    def stage(self) -> Stage:
        """Which blocks this process trains, while a Trainer runs."""
        return getattr(self.trainer.strategy, "stage", None) or Stage(range(self.num_blocks))

    @property
    def schedule(self) -> Schedule:
        """Which block steps when, while a Trainer runs."""
        return getattr(self.trainer.strategy, "schedule", Synchronous())

    def _scaled(self, block: int, loss: Tensor) -> Tensor:
        loss = loss / self.trainer.accumulate_grad_batches
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return loss
        if not isinstance(scaler, BlockGradScaler):
            raise RuntimeError(
                "16-bit mixed precision was not set up for the blocks: on_fit_start is overridden without calling "
                "super().on_fit_start(). Call it."
            )
        return scaler.scalers[block].scale(loss)

    def _buffers_to_restore(self, block: int) -> list[Tensor]:
        if self._on_nonfinite != "skip":
            return []
        return [tensor for tensor in self.block_tensors(block) if not isinstance(tensor, nn.Parameter)]

    def _undo_nonfinite(self, steps: dict[int, LocalStep]) -> None:
        """Undo, or refuse, steps whose loss is not finite; one synchronisation with the device."""
        if not steps:
            return
        finite = torch.stack([step.loss.float() for step in steps.values()]).isfinite()
        if finite.all():
            return
        blocks = [block for block, is_finite in zip(steps, finite.tolist(), strict=True) if not is_finite]
        if self._on_nonfinite == "raise":
            first = blocks[0]
            raise NonFiniteLossError(
                f"The local loss of block {first} ({self.block_names[first]}) is {steps[first].loss.item()} at step "
                f"{self.global_step}. Lower the learning rate or check the data; on_nonfinite='skip' skips that "
                "block's update instead."
            )
        for block in blocks:
            self._skipped[block] += 1
            steps[block].undo()

    def _log_training(self, steps: dict[int, LocalStep]) -> None:
        stage = self.stage
        detailed = self._logs_every_block_now()
        shown: dict[str, Tensor] = {}
        if detailed:
            shown = self._metrics_of("train").batch_values(dict(sorted(steps.items())))
            if self._on_nonfinite == "skip":
                shown |= {f"skipped_block{j}": torch.tensor(float(self._skipped[j])) for j in steps}
        elif self.num_blocks - 1 in steps:
            shown["loss"] = steps[self.num_blocks - 1].loss
        if stage.is_split:
            self._latest |= shown
            if detailed and not stage.is_first and self._logs_now():
                numbers = {f"train/{name}": float(value) for name, value in shown.items()}
                stage.report(Report(self.global_step, numbers | {"epoch": self.current_epoch}))
        if shown:
            batch_size = len(next(iter(steps.values())).targets)
            self._log_values("train", shown, on_step=True, on_epoch=False, batch_size=batch_size)
        for name, value in self._log_reports().items():
            if name != "epoch":
                self.log(name, value, prog_bar=is_headline(name), logger=False, on_step=True, on_epoch=False)

    def _log_reports(self) -> dict[str, float]:
        """Log what later stages have measured, under the step at which they did; returns the latest of it."""
        latest: dict[str, float] = {}
        for report in self.stage.reports():
            self.trainer._logger_connector.log_metrics(report.values, report.step)  # type: ignore[arg-type]
            latest |= report.values
        return latest

    def _logs_every_block_now(self) -> bool:
        """Whether something will read more than the last block's loss: each value logged costs time in every step."""
        trainer = self.trainer
        is_last = trainer.is_last_batch or trainer.global_step + 1 == trainer.max_steps
        is_due = trainer._logger_connector.should_update_logs or is_last or trainer.global_step == 0
        return is_due or any(name.startswith("train/") and name != "train/loss" for name in self._monitored())

    def _monitored(self) -> Iterator[str]:
        """What callbacks such as ModelCheckpoint watch; they may do so after any step."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            name = getattr(callback, "monitor", None)
            if isinstance(name, str):
                yield name

    def _logs_now(self) -> bool:
        """Whether Lightning gives what this step has logged to the loggers."""
        trainer = self.trainer
        return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()

    # Evaluation

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch, batch_idx, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch, batch_idx, dataloader_idx)

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Class scores (N, classes) of the last block; a batch is inputs, or inputs first.

        With blocks on several ranks, those of the last stage; on the other stages, this stage's output.
        """
        stage = self.stage
        if not stage.is_split:
            return self(batch[0] if isinstance(batch, (tuple, list)) else batch)
        address = self.address(batch_idx, dataloader_idx)
        if isinstance(batch, StageBatch):
            batch.expect(address)
            x = batch.tensors[0]
        else:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
        for j in stage.blocks:
            x = self.blocks[j](x)
        stage.hand_on(address, (x,))
        return x

    def _evaluate(self, phase: str, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        address = self.address(batch_idx, dataloader_idx)
        x, targets, *votes_before = self._tensors_of(batch, address)
        votes = votes_before[0] if votes_before else None
        metrics, classes = self._metrics_of(phase, dataloader_idx), class_indices(targets)
        for j in self.stage.blocks:
            x = self.blocks[j](x)
            scores = self._score(j, x)
            votes = add_vote(votes, j, scores)
            metrics.update(j, self.local_loss(j, scores, targets), scores, classes)
        assert votes is not None
        metrics.update_ensemble(votes, classes)
        self.stage.hand_on(address, (x, targets, votes))

    @override
    def on_train_epoch_start(self) -> None:
        self._forget_metrics("train")

    @override
    def on_train_epoch_end(self) -> None:
        """Let all ranks know all training values, so that callbacks that monitor one decide alike."""
        stage = self.stage
        if stage.is_split:
            values = stage.merge({name: value.cpu() for name, value in self._latest.items()})
            self._log_values("train", values, on_step=False, on_epoch=True, logger=False, **stage.log_options)
            self._log_reports()

    @override
    def on_validation_epoch_start(self) -> None:
        self._forget_metrics("val")

    @override
    def on_test_epoch_start(self) -> None:
        self._forget_metrics("test")

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val", len(self.trainer.num_val_batches))

    @override
    def on_test_epoch_end(self) -> None:
        self._log_epoch("test", len(self.trainer.num_test_batches))

    def _metrics_of(self, phase: str, dataloader_idx: int = 0) -> BlockMetrics:
        key = f"{phase}{dataloader_idx}"
        if key not in self._metrics:
            own = BlockMetrics(self._metric_template[0], self.num_blocks, self.stage.blocks).to(self.device)
            self.stage.synchronise(own)
            self._metrics[key] = own
        metrics = self._metrics[key]
        assert isinstance(metrics, BlockMetrics)
        return metrics

    def _forget_metrics(self, phase: str) -> None:
        for key in [key for key in self._metrics if key.rstrip("0123456789") == phase]:
            del self._metrics[key]

    def _log_epoch(self, phase: str, num_dataloaders: int) -> None:
        for i in range(num_dataloaders):
            if f"{phase}{i}" in self._metrics:
                suffix = f"/dataloader_idx_{i}" if num_dataloaders > 1 else ""
                values = self.stage.merge(self._metrics_of(phase, i).compute())
                values = {f"{name}{suffix}": value for name, value in values.items()}
                self._log_values(phase, values, **self.stage.log_options)

    def _log_values(self, phase: str, values: dict[str, Tensor], **how: Any) -> None:
        """Log values under the name of their phase; those of the last block go to the progress bar."""
        for name, value in values.items():
            # The data loader's number is in the name already, where there are several.
            self.log(f"{phase}/{name}", value, prog_bar=is_headline(name), add_dataloader_idx=False, **how)

    # What Lightning asks for

    @override
    def configure_optimizers(self) -> Any:
        added = [name for name in self._parameters_in_no_block() if name not in self._unused_parameters]
        if added:
            raise ValueError(
                f"The network has changed since the DGLModule was made: {added[0]!r} is in no block. Change the "
                "network first, then make the DGLModule."
            )
        optimizers = []
        for j, make in enumerate(self._optimizer_factories):
            parameters = self.block_parameters(j)
            if not parameters:
                raise ValueError(
                    f"Block {j} ({self.block_names[j]}) has no parameters to train. Cut elsewhere (split_at)."
                )
            optimizers.append(make(parameters))
            if not isinstance(optimizers[j], Optimizer):
                raise TypeError(
                    f"optimizer must return a torch.optim.Optimizer, block {j} got {type(optimizers[j]).__name__}."
                )
        optimizer = BlockOptimizer(optimizers)
        if self._lr_scheduler_factories is None:
            return optimizer
        scheduler = BlockLRScheduler(optimizer, self._lr_scheduler_factories)
        interval = "step" if self.schedule.counts_own_epochs else self._lr_interval
        config: dict[str, Any] = {"scheduler": scheduler, "interval": interval, "name": "lr"}
        if scheduler.reduce_on_plateau:
            every = self.trainer.check_val_every_n_epoch or 1
            config |= {"reduce_on_plateau": True, "monitor": "val/loss", "frequency": every, "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    @override
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if metric is not None:
            watched = {j: self.trainer.callback_metrics[f"val/loss_block{j}"] for j in range(self.num_blocks)}
            only = self.schedule.only_block
            scheduler.step(watched if only is None else {only: watched[only]})
        elif self.schedule.counts_own_epochs:
            for block in self._stepped:
                self._step_lr_scheduler(block)
        else:
            scheduler.step()

    def _step_lr_scheduler(self, block: int) -> None:
        """Step the scheduler of a block whose updates, and with them epochs, are counted by themselves."""
        is_due = self._lr_interval == "step" or self.progress[block].updates % self.trainer.num_training_batches == 0
        for config in self.trainer.lr_scheduler_configs:
            assert isinstance(config.scheduler, BlockLRScheduler)
            if is_due and not config.reduce_on_plateau:
                config.scheduler.schedulers[block].step()  # type: ignore[call-arg]

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each block's gradients by themselves, so that a block's update does not depend on the others."""
        assert isinstance(optimizer, BlockOptimizer)
        for own in optimizer.optimizers:
            if any(p.grad is not None for group in own.param_groups for p in group["params"]):
                self.clip_gradients(own, gradient_clip_val, gradient_clip_algorithm)

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Show the table of blocks wherever Lightning shows its table of modules."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        shown = any(isinstance(callback, ModelSummary) for callback in callbacks)
        added = any(isinstance(callback, BlockSummary) for callback in callbacks)
        return [BlockSummary()] if shown and not added else []

    @override
    def on_fit_start(self) -> None:
        strategy = self.trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not hasattr(strategy, "schedule"):
            raise TypeError(
                f"DGLModule trains under DGLStrategy, a single-device strategy or DDP, got {type(strategy).__name__}, "
                "which does not leave every block's parameters whole on its device. Pass Trainer(strategy='dgl')."
            )
        optimizers = self.trainer.optimizers
        if not all(isinstance(optimizer, BlockOptimizer) for optimizer in optimizers):
            raise TypeError(
                f"DGLModule needs one optimizer for each block, but configure_optimizers returned "
                f"{type(optimizers[0]).__name__}. Pass optimizer=... to DGLModule instead of overriding it (with "
                "LightningCLI: --model.optimizer, not --optimizer)."
            )
        on_plateau = any(config.reduce_on_plateau for config in self.trainer.lr_scheduler_configs)
        if on_plateau and not self.trainer.enable_validation:
            raise ValueError(
                "lr_scheduler is ReduceLROnPlateau, which watches the validation loss, but there is no validation. "
                "Pass a validation data loader, or another scheduler."
            )
        accumulates = self.trainer.accumulate_grad_batches > 1 or any(
            isinstance(callback, GradientAccumulationScheduler)
            for callback in self.trainer.callbacks  # type: ignore[attr-defined]
        )
        if self.schedule.draws_blocks and accumulates:
            raise ValueError(
                "accumulate_grad_batches counts batches of data, but with the asynchronous schedule in one process a "
                "block is updated whenever it is drawn. Pass accumulate_grad_batches=1, or train on several ranks."
            )
        self.trainer.fit_loop.max_epochs = self.schedule.num_epochs(self.trainer.max_epochs, self.num_blocks)
        if self.trainer.global_step == 0 and self._random_state is None:  # not resumed
            self.progress = [BlockProgress() for _ in range(self.num_blocks)]
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
            plugin.scaler = BlockGradScaler(self.num_blocks, like=plugin.scaler)  # type: ignore[assignment]
        if self._random_streams is None:
            self._random_streams = RandomStreams(self.num_blocks, self.stage.agree(torch.initial_seed()))
        if self._random_state is not None and "blocks" in self._random_state:
            self._random_streams.load(self._random_state["blocks"])
        self._restore_random_state()  # a run saved between epochs goes on with drawing the data loader's seed

    @override
    def on_train_start(self) -> None:
        if self.trainer.fit_loop.restarted_mid_epoch:  # a run saved within an epoch had drawn that seed before
            self._restore_random_state()
        self._random_state = None
        schedule = self.schedule
        if schedule.counts_own_epochs and self.trainer.num_training_batches == float("inf"):
            raise ValueError(
                "The training data loader has no length, by which blocks count their epochs. Use a map-style data set, "
                "or pass limit_train_batches=<number>."
            )

    @override
    def on_fit_end(self) -> None:
        if self.trainer.num_training_batches == 0 and self.trainer.limit_train_batches != 0:
            raise ValueError(
                "The training data loader is empty: it has no batch. Check the data set's length, and that drop_last "
                "leaves at least one batch."
            )

    # Checkpoints: which blocks they are of, and the random state, so that a resumed run continues as if uninterrupted

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """As in Lightning; pass at least ``network`` and ``example_input``, which a checkpoint does not hold."""
        if kwargs.get("split_at") is not None or kwargs.get("num_blocks") is not None:
            kwargs = {"split_at": None, "num_blocks": None, **kwargs}
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        streams, blocks = self._random_streams, self.stage.blocks
        random_state: dict[str, Any] = get_random_state(self.device)
        plugin = self.trainer.precision_plugin
        scalers: dict[str, Any] = checkpoint.get(type(plugin).__qualname__, {})
        # These are known to the ranks that hold the blocks.
        own = {
            j: (
                None if streams is None else streams[j],
                scalers["blocks"][j] if scalers else None,
                asdict(self.progress[j]),
                self.boundaries.state_dict(j),
            )
            for j in blocks
        }
        everyones = self.stage.merge(own)
        of_blocks = [everyones[j] for j in range(self.num_blocks)]
        random_state["blocks"] = [stream for stream, _, _, _ in of_blocks]
        if scalers:
            scalers["blocks"] = [scaler for _, scaler, _, _ in of_blocks]
        checkpoint["lightning_dgl"] = {
            "block_names": self.block_names,
            "random_state": random_state,
            "progress": [progress for _, _, progress, _ in of_blocks],
            "codecs": [codec for _, _, _, codec in of_blocks],
            "schedule": self.schedule.state_dict(),
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("lightning_dgl")
        if saved is None:
            return
        if saved["block_names"] != self.block_names:
            raise ValueError(
                f"The checkpoint's blocks are {saved['block_names']}, this module's are {self.block_names}. Make the "
                "module with split_at so that it has the checkpoint's blocks."
            )
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._random_state = saved["random_state"]
            self.progress = [BlockProgress(**progress) for progress in saved.get("progress", [])] or self.progress
            self.schedule.load_state_dict(saved.get("schedule", {}))
            for j, state in enumerate(saved.get("codecs", [])):
                self.boundaries.load_state_dict(j, state)

    def _restore_random_state(self) -> None:
        if self._random_state is not None:
            set_random_state(self._random_state, self.device)
