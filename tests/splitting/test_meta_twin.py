"""Dry runs: what they find out is exact, and they change nothing."""

from __future__ import annotations

import os
import threading
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dgl import SplitError, find_split_points, split
from lightning_dgl.splitting import count_flops, output_shape
from lightning_dgl.splitting.meta_twin import dry_run, meta_twin
from tests.runs import small_cnn
from tests.splitting.networks import Around, Branch, Network, assert_equivalent


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 8, 8)


# The twin


def test_the_twin_has_the_networks_tensors_without_their_data() -> None:
    network = small_cnn().to(memory_format=torch.channels_last)
    network[0].weight.requires_grad_(False)
    twin = meta_twin(network)
    assert list(twin.state_dict()) == list(network.state_dict())
    assert {tensor.device.type for tensor in (*twin.parameters(), *twin.buffers())} == {"meta"}
    for ours, theirs in zip(twin.parameters(), network.parameters(), strict=True):
        assert isinstance(ours, nn.Parameter)
        assert ours.requires_grad is theirs.requires_grad
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
    assert all(parameter.device.type == "cpu" for parameter in network.parameters())


def test_what_modules_share_their_twins_share() -> None:
    network = Network()
    network.alias, network.middle.weight = network.stem, nn.Parameter(torch.zeros(4, 4, 3, 3))
    network.last = nn.Conv2d(4, 4, 3)
    network.last.weight = network.middle.weight
    twin = meta_twin(network)
    assert twin.alias is twin.stem is not network.stem
    assert twin.last.weight is twin.middle.weight is not network.middle.weight


class Plain(Network):
    """Holds a tensor that is neither parameter nor buffer, and a lock, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((1, 4, 1, 1), 2.0)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[1] == 4:
            x = self.middle(x * self.scale)
        return self.head(x)


def test_any_attribute_will_do(x: Tensor) -> None:
    network = Plain()
    twin = meta_twin(network)
    assert twin.scale.device.type == "meta"
    assert twin.lock is network.lock
    assert_equivalent(network, split(network, split_at=["middle"], example_input=x), x)


class WeightNorm(Network):
    """Its weight is recomputed by a hook in each forward, and is no leaf: ``copy.deepcopy`` refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.middle.weight_g = nn.Parameter(torch.ones(1))
        self.middle.weight_v = nn.Parameter(self.middle.weight.detach().clone())
        del self.middle.weight
        self.middle.register_forward_pre_hook(self.reweight)
        self.reweight(self.middle, ())

    @staticmethod
    def reweight(module: Any, args: Any) -> None:
        module.weight = module.weight_g * module.weight_v

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.relu(self.stem(x)))
        return self.head(x if x.shape[-1] == 8 else x * 2)


def test_weights_that_hooks_compute(x: Tensor) -> None:
    network = WeightNorm()
    before = network.middle.weight
    names = [point.name for point in find_split_points(network, x)]
    assert network.middle.weight is before
    assert {"stem", "relu", "middle"} <= set(names)
    assert_equivalent(network, split(network, split_at=["relu"], example_input=x), x)


# Dry runs


def test_a_dry_run_computes_nothing_and_changes_nothing(x: Tensor) -> None:
    network = small_cnn(dropout=0.5)
    network.requires_grad_(False)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    devices: list[str] = []
    note = types.SimpleNamespace(device=devices.append)  # a hook's own list would be a copy, too
    network[0].register_forward_hook(lambda module, args, output: note.device(output.device.type))
    assert output_shape(network, x, training=True) == (3, 4)
    assert devices == ["meta"]
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_tensors_made_in_forward_are_without_data_too(x: Tensor) -> None:
    class Noisy(Network):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x) * torch.rand(1) + torch.arange(8))

    network, generator = Noisy(), torch.get_rng_state()
    assert dry_run(network, x, True, lambda network, x: network(x).device.type) == "meta"
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_network_that_needs_data_runs_on_the_example_and_is_restored(x: Tensor) -> None:
    network = Around(Branch())
    network.norm.eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    assert dry_run(network, x, True, lambda network, x: network(x).device.type) == "cpu"
    assert output_shape(network, x, training=True) == (3, 5)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == [m is not network.norm for m in network.modules()]
    assert torch.equal(torch.get_rng_state(), generator)


def test_an_example_that_does_not_fit(x: Tensor) -> None:
    for run in (lambda: output_shape(small_cnn(), x[:, :2], True), lambda: count_flops(small_cnn(), x[:, :2])):
        with pytest.raises(SplitError, match=r"shape \(3, 2, 8, 8\).*does not pass through Sequential in train mode"):
            run()


def test_flops_are_those_of_one_sample(x: Tensor) -> None:
    assert count_flops(nn.Linear(5, 7), torch.zeros(4, 5)) == 2 * 5 * 7


class OnDevice(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * 2 if x.device.type == "cpu" and x.is_cpu and x.device == torch.device("cpu") else x * 0
        positions = torch.arange(x.shape[-1], device=x.device)
        return self.head(x + positions if positions.shape[0] == 8 else x)


def test_a_condition_on_the_device_holds_for_the_networks_device(x: Tensor) -> None:
    network = OnDevice()
    assert_equivalent(network, split(network, split_at=["stem"], example_input=x), x)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux shows them")
def test_a_dry_run_starts_no_thread_so_that_the_process_can_fork(x: Tensor) -> None:
    before = set(os.listdir("/proc/self/task"))
    find_split_points(small_cnn(), x)
    output_shape(small_cnn(), x, training=True)
    count_flops(small_cnn(), x)
    assert set(os.listdir("/proc/self/task")) <= before
