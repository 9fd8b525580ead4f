"""The LightningModule that splits a network into blocks and trains each on its local loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelSummary
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection
from typing_extensions import Self, override

from lightning_dgl._arguments import check_choice, describe, one_per_block, plain_list, warn_of_unsaved
from lightning_dgl.address import current_address
from lightning_dgl.augmented import Heads
from lightning_dgl.bookkeeping import KEY, Bookkeeping
from lightning_dgl.callbacks import BlockSummary
from lightning_dgl.checks import check_batch, check_loss, check_optimizer, check_sample_size
from lightning_dgl.distributed import Stage, Token
from lightning_dgl.evaluation import evaluate, predict
from lightning_dgl.lightning_internals import set_batch_size, skips_backward
from lightning_dgl.links import make_codecs, make_links
from lightning_dgl.logs import log_step
from lightning_dgl.metrics import BlockMetrics, EpochMetrics, metric_collection
from lightning_dgl.optim import (
    BlockLRScheduler,
    BlockOptimizer,
    LRSchedulerFactory,
    OptimizerFactory,
    has_gradients,
    make_optimizer,
    sgd,
)
from lightning_dgl.other_blocks import OtherBlocks
from lightning_dgl.run import Run
from lightning_dgl.schedules import Schedule, Synchronous
from lightning_dgl.shared_values import log_arguments
from lightning_dgl.split_module import SplitModule
from lightning_dgl.splitting import (
    example_batch,
)
from lightning_dgl.trainer_checks import check_block_names, check_strategy
from lightning_dgl.training import Progress, RandomStreams, deliver, step_lr_scheduler, take_turns, whole_graphs


class DGLModule(SplitModule):
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
        head: auxiliary head: "augmented" or an :class:`Augmented`, copies of later parts of the network; the paper's
            "linear", "mlp", "mlp_sr" or "cnn"; a callable ``(channels, spatial_size, num_classes) -> nn.Module``
            reading (N, C, H, W); or a list of J - 1 of these.
        loss: ``(scores, targets) -> scalar``; cross-entropy by default.
        optimizer: callable ``params -> Optimizer``, or a list of J; by default SGD with learning rate 0.1, momentum 0.9
            and weight decay 5e-4. It gets the parameters of one block and its head, must train these and no others
            (frozen ones may be left out), and has their names from ``params.named()``: (name, parameter) pairs.
        lr_scheduler: callable ``optimizer -> LRScheduler``, or a list of J. ReduceLROnPlateau of block j watches
            ``val/loss_block{j}``, with several validation loaders that of the first.
        lr_interval: whether schedulers step each "epoch" or each "step".
        metrics: a torchmetrics metric or collection, cloned for every block; top-1 accuracy by default.
        balance: what ``num_blocks`` balances: "flops", "memory" held for backward, or measured "time"; heads count.
        on_nonfinite: what a NaN or infinite local loss does: "raise" :class:`NonFiniteLossError` before any update, or
            "skip" that block's gradients and buffer changes of this batch, counted in ``train/skipped_block{j}``.
        compile: run every block and every head through ``torch.compile``, each apart, in training and evaluation;
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

    def __init__(
        self,
        network: nn.Module,
        num_blocks: int | None = None,
        *,
        split_at: list[str] | None = None,
        example_input: Tensor | Sequence[int],
        head: Heads = "augmented",
        loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer: OptimizerFactory | list[OptimizerFactory] = sgd,
        lr_scheduler: LRSchedulerFactory | list[LRSchedulerFactory] | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        metrics: Metric | MetricCollection | None = None,
        balance: Literal["flops", "memory", "time"] = "flops",
        on_nonfinite: Literal["raise", "skip"] = "raise",
        compile: bool = False,
    ) -> None:
        check_choice("lr_interval", lr_interval, ("epoch", "step"))
        check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be an nn.Module, got {type(network).__name__}.")
        example_input = example_batch(network, example_input)
        head, split_at = plain_list(head), plain_list(split_at)
        super().__init__(network, num_blocks, split_at, example_input, balance, head, compile)
        if self.measured_cuts is not None and "split_at" in self._given:
            num_blocks, split_at = None, self.measured_cuts  # to be made again with the same blocks
        given: dict[str, Any] = {
            "num_blocks": num_blocks,
            "split_at": split_at,
            "head": head if isinstance(head, str) else None,
            "example_input": list(example_input.shape) if example_input.dtype == torch.float32 else None,
        }
        unsaved: dict[str, Any] = {"head": None if isinstance(head, str) else head, "loss": loss, "metrics": metrics}
        unsaved |= {"optimizer": None if optimizer is sgd else optimizer, "lr_scheduler": lr_scheduler}
        self.unsaved_arguments = {name: describe(value) for name, value in unsaved.items() if value is not None}
        choices = {"lr_interval": lr_interval, "balance": balance, "on_nonfinite": on_nonfinite, "compile": compile}
        self.save_arguments({k: v for k, v in given.items() if v is not None} | choices)
        self._optimizer_factories = one_per_block("optimizer", optimizer, self.num_blocks)
        self._lr_scheduler_factories = (
            None if lr_scheduler is None else one_per_block("lr_scheduler", lr_scheduler, self.num_blocks)
        )
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        check_loss(self.loss, self.num_classes, example_input.device)
        self._ignore_index: int | None = getattr(self.loss, "ignore_index", None)
        self.lr_interval: str = lr_interval
        self.on_nonfinite: str = on_nonfinite
        self._metric_template = [metric_collection(metrics, self._ignore_index)]  # a list: not a submodule
        self.progress = [Progress() for _ in range(self.num_blocks)]
        self.streams = RandomStreams(self.num_blocks)

    def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the loss (a scalar) that trains block ``block``; override it for losses that differ by block."""
        return self.loss(scores, targets)

    # The run

    def _attach_trainer(self, trainer: Trainer | None) -> None:
        """Start afresh with a Trainer, which Lightning attaches before it calls any hook."""
        LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        self.run = None
        if isinstance(trainer, Trainer):
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            if not any(isinstance(callback, Bookkeeping) for callback in callbacks):
                callbacks.insert(0, Bookkeeping())

    trainer = property(LightningModule.trainer.fget, _attach_trainer)  # type: ignore[attr-defined,assignment]

    def start_run(self, stage: Stage, schedule: Schedule, codec: Any = None, **ends: Any) -> Run:
        """Make the run of this rank's blocks.

        Args:
            stage: which blocks these are.
            schedule: which of them steps when.
            codec: see :func:`~lightning_dgl.links.make_codecs`.
            ends: of wires to other ranks, see :func:`~lightning_dgl.links.make_links`.
        """
        schedule.start(stage.blocks, self.num_blocks, torch.initial_seed())
        codecs = make_codecs(codec, self.num_blocks - 1)
        new_buffer = schedule.new_buffer if schedule.draws_blocks else None
        links = make_links(codecs, self.block_names, stage.blocks, new_buffer=new_buffer, **ends)
        others = OtherBlocks(stage, self.num_blocks, self.block_tensors)
        self.run = Run(stage, schedule, links, EpochMetrics(self._new_metrics), others)
        if self.on_nonfinite == "skip":
            self.run.num_skipped = dict.fromkeys(stage.blocks, 0)
        return self.run

    def start_run_if_none(self) -> None:
        """Make a run of all blocks in this process, under a strategy that has not made one."""
        if self.run is None:
            if not (self.trainer.evaluating or self.trainer.predicting):
                check_strategy(self.trainer)
            self.start_run(Stage(range(self.num_blocks)), Synchronous())

    def _new_metrics(self) -> BlockMetrics:
        assert self.run is not None
        metrics = BlockMetrics(self._metric_template[0], self.num_blocks, self.run.stage.blocks).to(self.device)
        self.run.stage.synchronise(metrics)
        return metrics

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "run": None}  # it has threads and process groups

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as in Lightning; on several ranks, each for its own blocks, rank 0's loggers and all callbacks get it.

        Where several stages log a name, the first one's value counts; with ``sync_dist=True`` they are reduced when
        an epoch or a validation ends.
        """
        if self.run is not None:
            kwargs = log_arguments(self.run, name, value, kwargs)
        super().log(name, value, *args, **kwargs)

    # Training

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.run is not None
        address = current_address(self.trainer, batch_idx)
        if not isinstance(batch, Token):
            inputs, targets = check_batch(batch, batch_idx, self.num_classes, self._ignore_index)
            check_sample_size(inputs, self.needs_two_samples)
            self.run.links[0].put(address, (inputs, targets))
        if batch_idx % self.trainer.accumulate_grad_batches == 0 and not skips_backward(self.trainer):
            # As Lightning will, but it frees the gradients of the step before only when there are new ones.
            self.trainer.optimizers[0].zero_grad()
        with whole_graphs(self._compiled_heads is not None):
            steps = take_turns(self, self.run, address)
        log_step(self, self.run, batch_idx, steps)
        return deliver(steps.values(), dense=self.run.stage.is_replicated)

    @override
    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, Token):  # the user's hook sees the data on the first stage
            return batch
        return super()._on_before_batch_transfer(batch, dataloader_idx)

    # Evaluation

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch, batch_idx, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch, batch_idx, dataloader_idx)

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return class scores (N, classes) of the last block; a batch is inputs, or inputs first.

        With blocks on several ranks, the last stage returns these scores; the others, what they send.
        """
        run = self.run
        if isinstance(batch, (tuple, list)):
            batch = batch[0]
        if run is None or not run.stage.is_split:
            return self(batch)
        address = current_address(self.trainer, batch_idx, dataloader_idx)
        if not isinstance(batch, Token):
            run.links[0].put(address, (batch,))
        return predict(self, run, address)

    def _evaluate(self, phase: str, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        assert self.run is not None
        address = current_address(self.trainer, batch_idx, dataloader_idx)
        if not isinstance(batch, Token):
            batch = check_batch(batch, batch_idx, self.num_classes, self._ignore_index)
            self.run.links[0].put(address, batch)
        set_batch_size(self.trainer, evaluate(self, self.run, phase, address))

    # What Lightning asks for

    @override
    def configure_optimizers(self) -> Any:
        self.check_unchanged()
        parameters = [self.block_parameters(j) for j in range(self.num_blocks)]
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        finetunes = any(isinstance(callback, BaseFinetuning) for callback in callbacks)
        optimizers = []
        for j, make in enumerate(self._optimizer_factories):
            if not parameters[j]:
                raise ValueError(
                    f"Block {j} ({self.block_names[j]}) has no parameters to train. Cut elsewhere (split_at)."
                )
            optimizers.append(make_optimizer(make, parameters[j], without_frozen=finetunes))
            check_optimizer(j, self.block_names[j], optimizers[j], parameters)
        here = range(self.num_blocks) if self.run is None else self.run.stage.blocks
        optimizer = BlockOptimizer(optimizers, parameters, here)
        if self._lr_scheduler_factories is None:
            return optimizer
        scheduler = BlockLRScheduler(optimizer, self._lr_scheduler_factories)
        assert self.run is not None
        interval = "step" if self.run.schedule.counts_own_epochs else self.lr_interval
        config: dict[str, Any] = {"scheduler": scheduler, "interval": interval, "name": "lr"}
        if scheduler.reduce_on_plateau:
            every = self.trainer.check_val_every_n_epoch or 1
            config |= {"reduce_on_plateau": True, "monitor": "val/loss", "frequency": every, "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    @override
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        assert self.run is not None
        schedule = self.run.schedule
        if metric is not None:
            suffix = str(self.trainer.lr_scheduler_configs[0].monitor).removeprefix("val/loss")
            watched = {j: self.trainer.callback_metrics[f"val/loss_block{j}{suffix}"] for j in range(self.num_blocks)}
            only = schedule.only_block(self.trainer.current_epoch)
            scheduler.step(watched if only is None else {only: watched[only]})
        elif schedule.counts_own_epochs:
            for block in self.run.stepped:
                step_lr_scheduler(self, block)
        else:
            scheduler.step()

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as the Trainer was asked to, see :meth:`clip_gradients`."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of each block apart, so that a block's update does not depend on the others."""
        if not isinstance(optimizer, BlockOptimizer):
            super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for own in (optimizer.optimizers[j] for j in optimizer.here):
            if has_gradients(own):
                super().clip_gradients(own, gradient_clip_val, gradient_clip_algorithm)

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the blocks that are trained in this process."""
        for j in range(self.num_blocks) if self.run is None else self.run.stage.blocks:
            for parameter in self.block_parameters(j):
                parameter.grad = None if set_to_none or parameter.grad is None else parameter.grad.detach().zero_()

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Show the table of blocks wherever Lightning shows its table of modules."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        shown = any(isinstance(callback, ModelSummary) for callback in callbacks)
        added = any(isinstance(callback, BlockSummary) for callback in callbacks)
        return [BlockSummary()] if shown and not added else []

    # Checkpoints

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load as in Lightning; pass ``network``, and whatever a warning names, which a checkpoint does not hold."""
        if kwargs.get("split_at") is not None or kwargs.get("num_blocks") is not None:
            kwargs = {"split_at": None, "num_blocks": None, **kwargs}
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the names of the blocks to a checkpoint of weights only, so that loading can compare them."""
        checkpoint.setdefault(KEY, {"block_names": self.block_names})["unsaved_arguments"] = self.unsaved_arguments

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError unless a checkpoint's blocks are this module's."""
        if KEY in checkpoint:
            check_block_names(checkpoint[KEY]["block_names"], self.block_names)
            warn_of_unsaved(checkpoint[KEY].get("unsaved_arguments", {}), self.unsaved_arguments)
