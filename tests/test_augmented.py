"""Augmented heads: which units they copy, that the copies are their own, and that training works with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_dgl import Augmented, DGLModule, DGLStrategy
from lightning_dgl.augmented import AugmentedHead
from tests.runs import MakeTrainer, differences, loader, make_module, weights


class ResidualUnit(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=after // before, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Identity() if after == before else nn.Conv2d(before, after, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(residual + self.shortcut(x))


def cifar_resnet(depth: int) -> nn.Sequential:
    """A stem and (depth - 2) / 2 units of 16, 32 and 64 channels; unit i is network[i], the stem is network[0]."""
    widths = [width for width in (16, 32, 64) for _ in range((depth - 2) // 6)]
    units = [ResidualUnit(before, after) for before, after in zip([16, *widths], widths, strict=False)]
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(stem, *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def heads_of(module: DGLModule) -> list[AugmentedHead]:
    return [head for head in module.heads if isinstance(head, AugmentedHead)]


def auglocal(network_depth: int, depth: int) -> list[AugmentedHead]:
    """Each unit a block, but for the last depth + 1, which make the last block."""
    network = cifar_resnet(network_depth)
    cuts = [str(i) for i in range((network_depth - 2) // 2 + 1 - (depth + 1))]
    module = DGLModule(network, split_at=cuts, example_input=(2, 3, 32, 32), head=Augmented(depth=depth, pool=1))
    return heads_of(module)


def widths_and_strides(head: AugmentedHead) -> list[tuple[int, int]]:
    convolutions = [next(m for m in unit.modules() if isinstance(m, nn.Conv2d)) for unit in head.units]
    return [(convolution.out_channels, convolution.stride[0]) for convolution in convolutions]


def test_depths_of_auglocal_on_resnet32() -> None:
    heads = auglocal(32, depth=2)
    assert [len(head.units) for head in heads] == [2] * 13
    assert widths_and_strides(heads[0]) == [(32, 2), (64, 2)]
    assert [len(head.units) for head in auglocal(32, depth=5)] == [5, 5, 5, 4, 4, 4, 4, 3, 3, 3]


@pytest.mark.slow
def test_depths_of_auglocal_on_resnet110() -> None:
    heads = auglocal(110, depth=6)
    assert [len(head.units) for head in heads] == [6] * 10 + [5] * 19 + [4] * 19
    assert widths_and_strides(heads[0]) == [(16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)]


def test_units_are_copies_that_start_from_the_network_s_values() -> None:
    network = cifar_resnet(20)
    with torch.no_grad():
        for parameter in network.parameters():  # stand for pretrained values
            parameter.normal_()
    keys = list(network.state_dict())
    module = DGLModule(network, 4, example_input=(2, 3, 32, 32), head="augmented")
    assert list(network.state_dict()) == keys
    own = {id(p) for p in network.parameters()}
    assert not any(id(p) in own for p in module.heads.parameters())
    for head in heads_of(module):
        for name, unit in zip(head.unit_names, head.units, strict=True):
            original = network.get_submodule(name).state_dict()
            copied = {key.partition(".")[2]: value for key, value in unit.state_dict().items()}
            assert copied.keys() == original.keys()
            assert all(torch.equal(copied[key], original[key]) for key in original)
    before = copy.deepcopy(network.state_dict())
    scores = module.heads[0](torch.randn(2, 16, 32, 32))
    scores.sum().backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(p.grad is not None for p in module.heads[0].parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_frozen_units_are_trained_in_heads() -> None:
    network = cifar_resnet(20).requires_grad_(False)
    module = DGLModule(network, 4, example_input=(2, 3, 32, 32), head="augmented")
    assert all(p.requires_grad for p in module.heads.parameters())
    assert not any(p.requires_grad for p in network.parameters())


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("densenet201", "convnext_base", "efficientnet_b4", "vgg19_bn")
        ),
    ],
)
def test_heads_keep_to_their_budget(name: str) -> None:
    network = torchvision.models.get_model(name)
    module = DGLModule(network, 4, example_input=(2, 3, 224, 224), head="augmented")
    assert count(module.heads) <= 0.5 * count(network)
    assert sum(module.head_flops) <= 0.25 * sum(module.block_flops)
    assert any(head.unit_names for head in heads_of(module))


class Tokens(nn.Module):
    """A small vision transformer: (N, tokens, channels) between its layers, and a fixed number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.positions = nn.Parameter(torch.zeros(16, 16))
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(6))
        )
        self.norm, self.classifier = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.classifier(self.norm(self.layers(x)).mean(1))


def test_tokens_keep_their_layout_and_number() -> None:
    module = DGLModule(Tokens(), 3, example_input=(2, 3, 16, 16), head=Augmented(depth=1))
    assert [len(head.unit_names) for head in heads_of(module)] == [1, 1]
    assert [tuple(scores.shape) for scores in module.block_scores(torch.randn(5, 3, 16, 16))] == [(5, 4)] * 3


def test_pooling_is_left_out_where_units_need_the_full_size() -> None:
    network = nn.Sequential(
        *(layer for i in range(5) for layer in (nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.ReLU())),
        nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )
    unpooled = DGLModule(network, split_at=["3"], example_input=(2, 3, 8, 8), head=Augmented(depth=1))
    (head,) = heads_of(unpooled)
    assert head(torch.randn(2, 8, 8, 8)).shape == (2, 10)
    assert len(head.units) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be an integer of at least 1, got 0"),
        ({"pool": 0}, "pool must be an integer of at least 1, got 0"),
        ({"taper": 1.5}, "taper must be from 0 to 1, got 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmented(**arguments)


def test_heads_that_outweigh_the_network_are_warned_about() -> None:
    network = nn.Sequential(nn.Conv2d(3, 512, 1), nn.ReLU(), nn.Conv2d(512, 4, 4), nn.Flatten())
    with pytest.warns(UserWarning, match=r"auxiliary heads .* have 12,\d{3},\d{3} parameters, .* times the network's"):
        DGLModule(network, split_at=["1"], example_input=(2, 3, 4, 4), head="mlp")


# Training


def test_training_is_a_plain_loop_s(make_trainer: MakeTrainer) -> None:
    module = make_module(head="augmented", seed=0)
    plain = copy.deepcopy(module)
    make_trainer().fit(module, loader())
    optimizers = [torch.optim.SGD(plain.block_parameters(j), 0.05, 0.9, weight_decay=1e-3) for j in range(4)]
    plain.train()
    for x, y in loader():
        for j, optimizer in enumerate(optimizers):
            x = plain.blocks[j](x.detach())
            loss = nn.functional.cross_entropy(plain.score(j, x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert differences(weights(module), weights(plain)) == []


def test_copies_of_all_that_follows_are_backpropagation(make_trainer: MakeTrainer) -> None:
    """A copy takes the same steps as what it copies, so every block gets the gradients of the whole network."""
    module = make_module(head=Augmented(depth=100, pool=1, taper=0), seed=0)
    network = copy.deepcopy(module.network).train()
    make_trainer().fit(module, loader())
    optimizer = torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=1e-3)
    for x, y in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    assert differences(weights(module.network), weights(network)) == []


@pytest.mark.parametrize("strategy", [{"schedule": "async"}, {"schedule": "sequential"}, {"codec": "half"}])
def test_every_schedule_and_codec_trains_them(make_trainer: MakeTrainer, strategy: dict[str, Any]) -> None:
    module = make_module(head="augmented", seed=0)
    before = weights(module.heads)
    make_trainer(strategy=DGLStrategy(**strategy), max_epochs=4).fit(module, loader())
    assert not any(torch.equal(value, before[key]) for key, value in weights(module.heads).items() if "weight" in key)


@pytest.mark.slow
def test_compiled_heads_score_alike() -> None:
    module, compiled = (make_module(head="augmented", seed=0, compile=compile) for compile in (False, True))
    x = torch.randn(4, 3, 8, 8)
    for scores, expected in zip(compiled.block_scores(x), module.block_scores(x), strict=True):
        torch.testing.assert_close(scores, expected)


def test_checkpoints_load_into_a_new_module(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = make_module(head="augmented", seed=0).to(memory_format=torch.channels_last)
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    L.seed_everything(1, verbose=False)
    fresh = make_module(head="augmented")
    loaded = DGLModule.load_from_checkpoint(
        tmp_path / "last.ckpt", network=fresh.network, example_input=(2, 3, 8, 8), head="augmented"
    )
    assert differences(weights(loaded), weights(module)) == []
