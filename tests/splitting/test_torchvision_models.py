"""torchvision's classification models at K = 4: the blocks are the network, bit for bit, and have augmented heads.

One of each family, some of them slow; ``pytest tests/splitting/test_torchvision_models.py --all-models`` takes all.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from lightning_dgl import DGLModule, split
from lightning_dgl.augmented import AugmentedHead
from tests.splitting.networks import assert_equivalent, assert_same

ONE_PER_FAMILY = [
    *("densenet121", "efficientnet_b0", "googlenet", "mobilenet_v3_small", "resnet18"),
    *("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_16"),
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("alexnet", "convnext_tiny", "mnasnet0_5", "regnet_y_400mf")
    ),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_name" in metafunc.fixturenames:
        every = torchvision.models.list_models(module=torchvision.models)
        metafunc.parametrize("model_name", every if metafunc.config.getoption("--all-models") else ONE_PER_FAMILY)


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    gc.collect()  # the larger networks do not fit twice


def make_network(name: str, **arguments: Any) -> tuple[nn.Module, int]:
    """A model with weights of its own, and the smallest size in pixels at which every part of it works."""
    size = 64
    if name.startswith("vit"):
        size = 28 if name == "vit_h_14" else 32
        arguments["image_size"] = size
    elif name.startswith("maxvit"):
        size = 224
    elif name in ("googlenet", "inception_v3"):
        size = 299 if name == "inception_v3" else 64
        arguments["init_weights"] = False  # takes long, and its values do not matter here
    network = torchvision.models.get_model(name, weights=None, **arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():  # a last layer of zeros would send no gradient back
                parameter.normal_(std=0.02)
    return network, size


def test_blocks_are_the_network(model_name: str) -> None:
    network, size = make_network(model_name)
    x = torch.randn(3, 3, size, size)
    before = {name: value.clone() for name, value in network.state_dict().items()}

    blocks = split(network, 4, example_input=x[:2])

    assert len(blocks) == 4
    after = network.state_dict()
    assert list(after) == list(before)
    assert_same(list(before), list(after.values()), list(before.values()))
    del before, after
    parameters = dict(network.named_parameters())
    owned = [name for block in blocks for name, _ in block.named_parameters()]
    assert len(set(owned)) == len(owned)
    assert all(parameters[name] is parameter for block in blocks for name, parameter in block.named_parameters())

    network.eval()
    assert_equivalent(network, blocks, x)
    network.train()
    trained = assert_equivalent(network, blocks, x)
    assert trained <= set(owned)

    # The same, but it is the blocks that are told the mode.
    network.eval()

    def blocks_to_eval() -> None:
        network.train()
        blocks.eval()

    assert_equivalent(network, blocks, x[:1], gradients=False, enter=blocks_to_eval)
    assert not any(module.training for module in (*network.modules(), *blocks.modules()))
    network.train()

    def blocks_to_train() -> None:
        network.eval()
        blocks.train()

    assert_equivalent(network, blocks, x, gradients=False, enter=blocks_to_train)
    assert all(module.training for module in (*network.modules(), *blocks.modules()))


def test_augmented_heads_train_a_step(model_name: str) -> None:
    one_output = {"aux_logits": False} if model_name in ("googlenet", "inception_v3") else {}
    network, size = make_network(model_name, **one_output)
    module = DGLModule(network, 4, example_input=(2, 3, size, size), head="augmented")
    of_network = {id(parameter) for parameter in network.parameters()}
    scores = module.train().block_scores(torch.randn(4, 3, size, size))
    sum(nn.functional.cross_entropy(own, torch.arange(4)) for own in scores).backward()  # type: ignore[union-attr]
    assert isinstance(module.heads[0], AugmentedHead) and len(module.heads[0].unit_names) > 0
    for head in module.heads:
        assert isinstance(head, AugmentedHead)
        own = list(head.parameters())
        assert not {id(parameter) for parameter in own} & of_network
        assert own and all(p.grad is not None and p.grad.isfinite().all() for p in own if p.requires_grad)
