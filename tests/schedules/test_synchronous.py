"""Synchronous DGL against the paper's Algorithm 1, written out as a plain PyTorch loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_dgl import DGLModule
from tests.runs import MakeTrainer, assert_equal, loader, make_module, pieces, step_lr
from tests.schedules.plain import algorithm_1


class SeedEachStep(L.Callback):
    """Lets dropout draw the same masks in Lightning and in the plain loop."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


@pytest.mark.parametrize("num_blocks", [1, 2, 4])
@pytest.mark.parametrize("strategy", ["dgl", "auto"])
def test_weights_equal_the_plain_loop_bit_for_bit(num_blocks: int, strategy: str, make_trainer: MakeTrainer) -> None:
    module = make_module(num_blocks, dropout=0.3, lr_scheduler=step_lr)
    blocks, heads = pieces(module)
    data = loader(num_samples=38)  # an uneven last batch
    algorithm_1(blocks, heads, data, max_steps=20, lr_scheduler=step_lr)
    torch.manual_seed(0)
    trainer = make_trainer(strategy=strategy, max_epochs=-1, max_steps=20, callbacks=[SeedEachStep()])
    trainer.fit(module, data)
    assert_equal(module, blocks, heads)


def test_channels_last_holds_from_block_to_block_and_gives_the_same_weights(
    make_trainer: MakeTrainer,
) -> None:
    plain = make_module()
    module = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    in_that_layout: list[bool] = []
    for block in list(module.blocks)[1:]:
        block.register_forward_pre_hook(
            lambda _, inputs: in_that_layout.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    for each in (plain, module):  # the images are not channels_last
        make_trainer(limit_train_batches=4, precision="64-true").fit(each, loader())
    assert in_that_layout == [True] * 3 * 4
    for (name, got), want in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9, msg=name)


def test_no_gradient_crosses_a_link(make_trainer: MakeTrainer) -> None:
    # Only the last block has a loss that depends on anything, so only the last block can have gradients.
    class LastBlockOnly(DGLModule):
        def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
            loss = super().local_loss(block, scores, targets)
            return loss if block == self.num_blocks - 1 else 0.0 * loss

    module = make_module(kind=LastBlockOnly)
    seen: list[float] = []

    class Watch(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            for block in module.blocks:
                seen.append(sum(p.grad.abs().sum().item() for p in block.parameters() if p.grad is not None))

    make_trainer(limit_train_batches=1, callbacks=[Watch()]).fit(module, loader())
    assert seen[:3] == [0.0, 0.0, 0.0]
    assert seen[3] > 0


def test_gradients_of_the_step_before_are_freed_first(make_trainer: MakeTrainer) -> None:
    held: list[bool] = []

    class Watch(DGLModule):
        def local_loss(self, block: int, scores: Tensor, targets: Tensor) -> Tensor:
            held.append(any(p.grad is not None for p in self.parameters()))
            return super().local_loss(block, scores, targets)

    module = make_module(2, kind=Watch)
    make_trainer(limit_train_batches=4, accumulate_grad_batches=2).fit(module, loader())
    assert held == [False, False, True, True] * 2


def test_one_block_s_activations_are_held_at_a_time(make_trainer: MakeTrainer) -> None:
    module = make_module()
    held: dict[int, int] = {}  # storage -> how many saved tensors use it
    blocks_holding: list[set[int]] = []
    current = -1

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.block = tensor, current
            held[id(self)] = current
            blocks_holding.append(set(held.values()))

        def __del__(self) -> None:
            held.pop(id(self), None)

    def enter(block: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal current
            current = block

        return hook

    for j, block in enumerate(module.blocks):
        block.register_forward_pre_hook(enter(j))
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        make_trainer(limit_train_batches=2).fit(module, loader())
    assert {frozenset(blocks) for blocks in blocks_holding} == {frozenset({j}) for j in range(4)}


def test_hooks_on_parameters_run_once_for_each_backward(make_trainer: MakeTrainer) -> None:
    module = make_module(2)
    blocks, heads = pieces(module)
    for network_layer in (module.network[0], blocks[0][0]):  # type: ignore[index]
        network_layer.weight.register_hook(lambda gradient: 2 * gradient)
    data = loader()
    algorithm_1(blocks, heads, data, max_steps=3)
    make_trainer(max_steps=3).fit(module, data)
    assert torch.equal(module.network[0].weight, blocks[0][0].weight)  # type: ignore[index]


def test_blocks_step_on_outputs_from_before_the_update(make_trainer: MakeTrainer) -> None:
    # With a learning rate of zero everywhere but in block 0, block 1 must see what block 0 gave before its update.
    module = make_module(2)
    data = loader(num_samples=8)
    with torch.no_grad():
        before = module.network[:7](next(iter(data))[0])
    received: list[Tensor] = []
    module.blocks[1].register_forward_pre_hook(lambda block, args: received.append(args[0].clone()))
    make_trainer(limit_train_batches=1).fit(module, data)
    assert torch.equal(received[0], before)
