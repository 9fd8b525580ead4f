"""The local step: gradients that are delivered through autograd, and a random stream for each block."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_dgl.training import LocalStep, RandomStreams, deliver, local_gradients

CPU = torch.device("cpu")


def step_of(layer: nn.Module, x: Tensor) -> LocalStep:
    scores = layer(x)
    loss = scores.square().mean()
    parameters = list(layer.parameters())
    gradients = local_gradients(loss, parameters)
    return LocalStep(loss.detach(), scores.detach(), torch.zeros(len(x)), parameters, gradients, [])


def test_delivered_gradients_equal_backward() -> None:
    layers, x = [nn.Linear(3, 2), nn.Linear(3, 4)], torch.randn(5, 3)
    expected = copy.deepcopy(layers)
    for layer in expected:
        layer(x).square().mean().backward()
    total = deliver([step_of(layer, x) for layer in layers])
    assert total.item() == pytest.approx(sum(layer(x).square().mean().item() for layer in layers))
    for times in (1, 2):  # a second delivery is added, as any backward
        deliver([step_of(layer, x) for layer in layers]).backward() if times > 1 else total.backward()
        for layer, other in zip(layers, expected, strict=True):
            for p, q in zip(layer.parameters(), other.parameters(), strict=True):
                assert q.grad is not None and p.grad is not None
                assert torch.equal(p.grad, times * q.grad)


def test_the_value_that_backward_starts_from_does_not_scale_gradients() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    step = step_of(layer, x)
    expected = [g.clone() for g in step.gradients if g is not None]
    (1000 * deliver([step])).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), expected, strict=True) if p.grad is not None)


def test_hooks_on_parameters_run_once() -> None:
    layer, seen = nn.Linear(3, 2), list[Tensor]()
    layer.weight.register_hook(seen.append)
    deliver([step_of(layer, torch.randn(5, 3))]).backward()
    assert len(seen) == 1


def test_unused_parameters_have_no_gradient_unless_replicas_wait_for_one() -> None:
    layer, unused = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
    for dense in (False, True):
        loss = layer(torch.randn(5, 3)).sum()
        parameters = [*layer.parameters(), unused]
        step = LocalStep(loss.detach(), loss, loss, parameters, local_gradients(loss, parameters), [])
        deliver([step], dense).backward()
        assert (unused.grad is not None) is dense
    assert unused.grad is not None and not unused.grad.any()


def test_a_frozen_block_has_no_gradients() -> None:
    layer = nn.Linear(3, 2).requires_grad_(False)
    assert local_gradients(layer(torch.randn(5, 3)).sum(), list(layer.parameters())) == [None, None]
    deliver([]).backward()  # no block had its turn


def test_an_undone_step_leaves_nothing() -> None:
    layer, counter = nn.Linear(3, 2), torch.tensor(1)
    step = step_of(layer, torch.randn(5, 3))
    step.buffers = [(counter, counter.clone())]
    counter += 1
    step.undo()
    deliver([step]).backward()
    assert counter == 1
    assert all(p.grad is None for p in layer.parameters())


def test_streams_do_not_depend_on_who_else_draws() -> None:
    def draws(blocks: list[int]) -> dict[int, list[float]]:
        torch.manual_seed(5)
        streams = RandomStreams(4)
        streams.seed = 11
        drawn: dict[int, list[float]] = {block: [] for block in blocks}
        for _ in range(3):
            for block in blocks:
                with streams.of(block, CPU):
                    drawn[block].append(torch.rand(()).item())
        return drawn

    together, alone = draws([0, 1, 2, 3]), [draws([block])[block] for block in range(4)]
    assert [together[block] for block in range(4)] == alone
    assert len({tuple(values) for values in alone}) == 4


def test_streams_leave_the_default_generator_alone_and_resume() -> None:
    streams = RandomStreams(2)
    streams.seed = 3
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(())
    with streams.of(1, CPU):
        torch.rand(7)
    assert torch.equal(torch.stack([first, torch.rand(())]), expected)
    resumed = RandomStreams(2)
    resumed.load([streams[block] for block in range(2)])
    drawn = []
    for own in (streams, resumed):
        with own.of(1, CPU):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert streams[0] is None


def test_streams_of_a_checkpoint_without_an_accelerator_differ_there(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, device = torch.Generator().manual_seed(0), torch.device("cuda")
    stand_in = SimpleNamespace(get_rng_state=generator.get_state, set_rng_state=generator.set_state)
    monkeypatch.setattr(torch, "get_device_module", lambda device: stand_in)
    monkeypatch.setattr("lightning_dgl.training.seed_accelerator", lambda device, seed: generator.manual_seed(seed))
    saved = RandomStreams(3)
    saved.seed = 3
    for block in (1, 2):
        with saved.of(block, CPU):
            torch.rand(7)
    resumed = RandomStreams(3)
    resumed.seed = 3
    resumed.load([saved[block] for block in range(3)])
    drawn = []
    for block in (1, 2, 1, 2):
        with resumed.of(block, device):
            drawn.append((torch.rand(3), torch.rand(3, generator=generator)))
    for i, (on_cpu, on_device) in enumerate(drawn):
        with saved.of(i % 2 + 1, CPU):
            assert torch.equal(on_cpu, torch.rand(3))
        assert not any(torch.equal(on_device, other) for _, other in drawn[:i])
    assert generator.initial_seed() == 0


def test_streams_seed_no_other_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    streams = RandomStreams(2)
    streams.seed = 3
    with streams.of(1, CPU):
        pass
    assert seeds == []
