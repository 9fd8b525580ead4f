"""split: blocks that together are the network, whatever its forward looks like."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import Tensor, nn

from lightning_dgl import split
from tests.runs import small_cnn
from tests.splitting.networks import (
    NETWORKS,
    Around,
    Composite,
    Functional,
    NoGrad,
    Noise,
    Remembers,
    assert_equivalent,
    assert_same,
    compose,
    nested_sequential,
    split_everywhere,
)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 8, 8)


@pytest.mark.parametrize("kind", NETWORKS)
def test_blocks_are_the_network(kind: str, x: Tensor) -> None:
    network = NETWORKS[kind]()
    blocks = split_everywhere(network, x)
    for training in (True, False):
        network.train(training)
        assert_equivalent(network, blocks, x)
        assert_equivalent(network, blocks, torch.randn(5, 3, 8, 8))
        network.train(not training)
        blocks.train(training)
        assert network.training is training
        assert_equivalent(network, blocks, x)


@pytest.mark.parametrize("kind", NETWORKS)
def test_blocks_follow_when_the_network_is_cast_and_the_network_when_blocks_are(kind: str, x: Tensor) -> None:
    network = NETWORKS[kind]()
    blocks = split_everywhere(network, x)
    network.double()
    assert_equivalent(network, blocks, x.double())
    blocks.float()
    assert_equivalent(network, blocks, x)


@pytest.mark.parametrize("kind", NETWORKS)
def test_splitting_leaves_everything_as_it_was(kind: str, x: Tensor) -> None:
    network = NETWORKS[kind]()
    next(module for module in network.modules() if next(module.children(), None) is None).eval()  # like frozen layers
    state = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    given, generators = x.clone(), (torch.get_rng_state(), random.getstate())

    split_everywhere(network, x)

    assert list(network.state_dict()) == list(state)
    assert_same(list(state), list(network.state_dict().values()), list(state.values()))
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]


def test_parameters_are_the_networks_own_and_each_is_in_one_block(x: Tensor) -> None:
    network = Around(Composite())
    blocks = split_everywhere(network, x)
    named = dict(network.named_parameters())
    owned = [name for block in blocks for name, _ in block.named_parameters()]
    assert sorted(owned) == sorted(named)
    assert all(named[name] is parameter for block in blocks for name, parameter in block.named_parameters())


@pytest.mark.parametrize("kind", ["sequential", "Functional", "ModeInRoot", "StateInRoot", "InPlace", "ManyTensors"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copied_blocks_belong_to_the_copied_network(kind: str, how: str, x: Tensor) -> None:
    network = NETWORKS[kind]()
    pair = (network, split_everywhere(network, x))
    new_network, new_blocks = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()  # the copies must not notice
    assert any(parameter.any() for parameter in new_blocks.parameters())
    for training in (True, False):
        new_network.train(training)
        assert_equivalent(new_network, new_blocks, x)


@pytest.mark.parametrize("kind", ["sequential", "nested_sequential", "Functional", "StateInRoot", "with_Composite"])
def test_blocks_compile_without_graph_breaks(kind: str, x: Tensor) -> None:
    torch._dynamo.reset()
    network = NETWORKS[kind]()
    blocks = split(network, 3, example_input=x)
    compiled = nn.ModuleList(torch.compile(block, fullgraph=True, backend="eager") for block in blocks)
    for training in (True, False):
        network.train(training)
        assert_equivalent(network, compiled, x)


def test_hooks_on_layers_fire_in_the_blocks(x: Tensor) -> None:
    network = Around(Composite())
    blocks = split_everywhere(network, x)
    calls: list[str] = []
    for name, module in network.named_modules():
        if next(module.children(), None) is None:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    compose(blocks, x)
    assert calls == ["stem", "part.body.0", "part.body.1", "part.body.2", "middle", "norm", "classifier"]


def test_a_module_that_no_cut_passes_through_is_called_as_a_whole(x: Tensor) -> None:
    network = Around(Composite())
    blocks = split(network, split_at=["tanh", "middle"], example_input=x)
    calls: list[str] = []
    network.part.register_forward_hook(lambda *_: calls.append("part"))
    compose(blocks, x)
    assert calls == ["part"]


def test_a_module_may_keep_state(x: Tensor) -> None:
    network = Around(Remembers())
    blocks = split(network, split_at=["tanh", "middle"], example_input=x)
    compose(blocks, x)
    assert torch.equal(network.part.last, blocks[0](x))


def test_no_grad_inside_a_module_stays(x: Tensor) -> None:
    network = Around(NoGrad())
    compose(split(network, split_at=["part"], example_input=x), x).sum().backward()
    assert network.middle.weight.grad is not None
    assert network.part.conv.weight.grad is None
    assert network.stem.weight.grad is None


def test_random_numbers_inside_a_module_are_drawn_at_every_call(x: Tensor) -> None:
    network = Around(Noise()).eval()
    blocks = split(network, split_at=["part"], example_input=x)
    assert not torch.equal(blocks[0](x), blocks[0](x))


def test_one_block_is_the_network_itself(x: Tensor) -> None:
    network = Functional()
    for blocks in (split(network, 1, example_input=x), split(network, split_at=[], example_input=x)):
        assert len(blocks) == 1
        assert_equivalent(network, blocks, x)


def test_an_example_of_one_sample_will_do(x: Tensor) -> None:
    network = small_cnn()
    assert_equivalent(network, split(network, 4, example_input=x[:1]), x)


def test_blocks_say_where_they_begin_and_end(x: Tensor) -> None:
    blocks = split(small_cnn(), split_at=["2", "6"], example_input=x)
    assert [block.extra_repr() for block in blocks] == ["0 to 2", "3 to 6", "7 to 16"]


def test_an_alias_names_the_same_cut(x: Tensor) -> None:
    network = nested_sequential()
    for name in ("0.0", "0.0.2"):
        blocks = split(network, split_at=[name], example_input=x)
        assert len(blocks[0].state_dict()) == len(network[0][0].state_dict())


def test_splitting_seeds_no_accelerator_that_the_network_is_not_on(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(1234)
    split(small_cnn(dropout=0.5), num_blocks=2, example_input=x)
    assert seeds == [1234]
    assert torch.initial_seed() == 1234
