"""The blocks that other ranks train, as this rank has them.

A rank's copy of them is out of date from its first training step on, and nothing shows it: whoever exports, averages or
evaluates the network there would do so with old weights. So the copy is hidden (see :mod:`.distributed.hidden`) until
the weights are copied again: at the start of a validation and at the end of an epoch, before any callback or hook::

    training steps   hidden: reading raises        on_validation_start ... on_validation_end   copied: the run's own
    on_train_epoch_end ... on_train_epoch_start, the first on_train_batch_start                copied: the run's own
    after a failure                                                                            lost: reading raises
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from lightning_dgl.distributed import Stage, hide, show


class OtherBlocks:
    """Hides and copies the parameters and buffers of the blocks that are not of this rank.

    Args:
        stage: the blocks of this rank.
        num_blocks: J.
        tensors_of: returns everything that a block and its head hold.

    Attributes:
        are_hidden: whether this rank's copy is out of date.
    """

    def __init__(self, stage: Stage, num_blocks: int, tensors_of: Callable[[int], Iterable[Tensor]]) -> None:
        self.are_hidden = False
        self._stage = stage
        self._num_blocks = num_blocks
        self._tensors_of = tensors_of

    def hide(self) -> None:
        """Let reading raise, because the other ranks begin to train."""
        if self.are_hidden or not self._stage.is_split:
            return
        self.are_hidden = True
        self._hide(
            f"Block {{block}} is trained on rank {{rank}}; here, on a rank with blocks {list(self._stage.blocks)}, its "
            "weights and gradients are out of date. Read them at the start or the end of a validation or at the end of "
            "an epoch, when all ranks have the weights of all blocks; call trainer.strategy.sync_blocks() on every "
            "rank first; or read only this rank's: module.block_parameters(j) for j in module.run.stage.blocks."
        )

    def copy(self) -> None:
        """Copy the weights of every block from the rank that trains it; all ranks must call it."""
        self.show()
        for rank, blocks in enumerate(self._stage.assignment if self._stage.is_split else ()):
            self._stage.broadcast((tensor for j in blocks for tensor in self._tensors_of(j)), src=rank)
        self.are_hidden = False

    def copy_if_hidden(self) -> None:
        """Copy the weights if blocks were trained since the last time; all ranks must call it."""
        if self.are_hidden:
            self.copy()

    def lose(self) -> None:
        """Let reading raise for good, unless the copy is the run's own: the ranks that have the weights are gone."""
        if not self.are_hidden:
            return
        self._hide(
            "Block {block} was trained on rank {rank}, and its weights are lost, because the run failed: this rank has "
            "old ones. Load the last checkpoint, into a new module (DGLModule.load_from_checkpoint, or "
            "trainer.fit(..., ckpt_path='last')) or into this one (load_state_dict).",
            until_written=True,
        )
        self.are_hidden = False

    def show(self) -> None:
        """Let the copy be read as it is, old or not."""
        for j in range(self._num_blocks):
            show(self._tensors_of(j))

    def _hide(self, why: str, until_written: bool = False) -> None:
        """Hide what no block of this rank holds, too; ``why`` has places for a block and the rank that trains it."""
        own = {id(tensor) for j in self._stage.blocks for tensor in self._tensors_of(j)}
        for j, ranks in enumerate(self._stage.ranks_of_blocks()):
            tensors = (tensor for tensor in self._tensors_of(j) if id(tensor) not in own)
            hide(tensors, why.format(block=j, rank=ranks[0]), until_written)
