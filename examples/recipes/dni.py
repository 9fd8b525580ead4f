"""Decoupled Neural Interfaces (Jaderberg et al., 2017), the baseline that learns to predict gradients instead."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from lightning_dgl import split


class Synthesiser(nn.Module):
    """Predicts the gradient of the loss in an activation (N, C, H, W), from it and, with context, from the labels.

    Three 5×5 convolutions, BatchNorm and ReLU before the last two; the last one starts at zero.
    """

    def __init__(self, channels: int, num_classes: int, context: bool) -> None:
        super().__init__()
        self.first, self.hidden, self.last = (nn.Conv2d(channels, channels, 5, padding=2) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.context = nn.Linear(num_classes, channels) if context else None
        self.num_classes = num_classes
        nn.init.zeros_(self.last.weight)

    def forward(self, activation: Tensor, labels: Tensor) -> Tensor:
        x = self.first(activation)
        if self.context is not None:
            x = x + self.context(F.one_hot(labels, self.num_classes).to(x.dtype))[:, :, None, None]
        x = self.hidden(F.relu(self.norms[0](x)))
        return self.last(F.relu(self.norms[1](x)))


class DNIModule(L.LightningModule):
    """Blocks that are updated with synthetic gradients, so that none waits for those after it.

    Args:
        network: as for a DGLModule.
        split_at: names of the modules to cut after; a synthesiser stands at each cut.
        example_input: a batch of the shape that the network is trained on.
        num_classes: that the network tells apart.
        context: whether synthesisers see the labels (cDNI).
        lr: learning rate of Adam, for the network and the synthesisers.
    """

    def __init__(
        self,
        network: nn.Module,
        split_at: list[str],
        example_input: Tensor,
        num_classes: int,
        context: bool,
        lr: float,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.__dict__["blocks"] = split(network, split_at=split_at, example_input=example_input)
        with torch.no_grad():
            channels, x = [], example_input
            for block in self.blocks[:-1]:
                x = block(x)
                channels.append(x.shape[1])
        self.synthesisers = nn.ModuleList(Synthesiser(number, num_classes, context) for number in channels)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, labels = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        synthetic: Tensor | None = None  # gradient in x, as predicted by the synthesiser before this block
        for j, block in enumerate(self.blocks):
            x = x.detach().requires_grad_(j > 0)
            output = block(x)
            if j < len(self.synthesisers):
                prediction = self.synthesisers[j](output.detach(), labels)
                output.backward(prediction.detach())
            else:
                loss = F.cross_entropy(output, labels)
                loss.backward()
                self.log("train/loss", loss.detach(), prog_bar=True)
            if synthetic is not None:
                F.mse_loss(synthetic, x.grad).backward()
            if j < len(self.synthesisers):
                synthetic, x = prediction, output
        optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, phase: str, batch: Any) -> None:
        images, labels = batch
        scores = self.network(images)
        self.accuracy(scores, labels)
        self.log(f"{phase}/acc", self.accuracy, prog_bar=True)
        self.log(f"{phase}/loss", F.cross_entropy(scores, labels))

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)
