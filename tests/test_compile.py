"""DGLModule(compile=True): the same training, through torch.compile."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch.nn.parallel import DistributedDataParallel

from lightning_dgl import DGLModule
from tests.runs import loader, pieces, sgd, small_cnn
from tests.schedules.plain import algorithm_1


class Backend:
    """Runs what dynamo captures as it is, and counts how often it was asked to compile."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.num_graphs += 1
        return graph.forward


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """In place of the compiler."""
    torch._dynamo.reset()
    backend = Backend()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return backend


def module_of(network: nn.Module, cuts: list[str], **kwargs: Any) -> DGLModule:
    return DGLModule(network, split_at=cuts, example_input=[2, 3, 8, 8], optimizer=sgd, head="linear", **kwargs)


def test_the_compiler_takes_part_in_training_and_evaluation(make_trainer: Callable[..., L.Trainer]) -> None:
    torch._dynamo.reset()
    data = loader(16, batch_size=8)
    modules = [module_of(small_cnn(), ["6"], compile=compile) for compile in (False, True)]
    modules[1].load_state_dict(modules[0].state_dict())
    values = []
    for module in modules:
        trainer = make_trainer(max_epochs=1)
        trainer.fit(module, data, data)
        values.append(trainer.callback_metrics)
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value, rtol=1e-3, atol=1e-3)
    for name, weight in modules[0].state_dict().items():
        torch.testing.assert_close(modules[1].state_dict()[name], weight, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["inductor"]


def test_weights_equal_the_plain_loop(backend: Backend, make_trainer: Callable[..., L.Trainer]) -> None:
    module = module_of(small_cnn(), ["2", "6", "10"], compile=True)
    blocks, heads = pieces(module)
    data = loader(40, batch_size=16)
    algorithm_1(blocks, heads, data, max_steps=6)
    make_trainer(max_steps=6, max_epochs=-1).fit(module, data)
    assert backend.num_graphs > 0
    for j, block in enumerate(blocks):
        for ours, plain in zip(module.blocks[j].parameters(), block.parameters(), strict=True):
            assert torch.equal(ours, plain)


def test_every_block_and_head_is_compiled_once_for_each_shape(
    backend: Backend, make_trainer: Callable[..., L.Trainer]
) -> None:
    module = module_of(small_cnn(), ["6"], compile=True)
    pieces = 2 + 1
    make_trainer(max_epochs=3).fit(module, loader(16, batch_size=8))
    assert backend.num_graphs == pieces
    make_trainer(max_epochs=3).fit(module, loader(20, batch_size=8))  # the last batch of each epoch has four
    assert backend.num_graphs == 2 * pieces
    make_trainer().validate(module, loader(16, batch_size=8), verbose=False)
    assert backend.num_graphs == 3 * pieces


def test_many_blocks_are_all_compiled(backend: Backend, make_trainer: Callable[..., L.Trainer]) -> None:
    # torch keeps at most eight graphs of one piece of code, and all blocks, and all heads, are of one class.
    num_blocks = 9
    layers = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(num_blocks)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    module = module_of(network, [str(j) for j in range(num_blocks - 1)], compile=True)
    make_trainer(max_epochs=1).fit(module, loader(8))
    assert backend.num_graphs == 2 * num_blocks - 1


def test_checkpoints_are_those_of_a_module_that_is_not_compiled(
    backend: Backend, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    module = module_of(small_cnn(), ["6"], compile=True)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    plain = module_of(small_cnn(), ["6"])
    assert list(plain.state_dict()) == list(module.state_dict())
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(plain.eval()(x), module.eval()(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_compiled_too(
    copied: Callable[[DGLModule], DGLModule], backend: Backend, make_trainer: Callable[..., L.Trainer]
) -> None:
    module = copied(module_of(small_cnn(), ["6"], compile=True))
    make_trainer(max_epochs=1).fit(module, loader())
    assert backend.num_graphs > 0


def test_mixed_precision(backend: Backend, make_trainer: Callable[..., L.Trainer]) -> None:
    plain, compiled = (module_of(small_cnn(), ["6"], compile=compile) for compile in (False, True))
    compiled.load_state_dict(plain.state_dict())
    for module in (plain, compiled):
        make_trainer(max_epochs=1, precision="bf16-mixed").fit(module, loader())
    for name, weight in plain.state_dict().items():
        assert torch.equal(compiled.state_dict()[name], weight), name


def test_sizes_of_other_blocks_make_no_size_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    sizes: list[list[Any]] = []

    def record(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        sizes.append([value for value in example_inputs if isinstance(value, torch.SymInt)])
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=record))
    module = module_of(small_cnn(), ["2", "6", "10"], compile=True).eval()
    module.block_scores(torch.randn(4, 3, 8, 8))  # blocks and heads see 8×8 and 4×4, with 3 to 16 channels
    assert sizes == [[]] * 7


def test_replicas_compile_whole_blocks(
    backend: Backend, make_trainer: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(self: DDPOptimizer, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        raise AssertionError("a graph is cut in pieces")

    monkeypatch.setattr(DDPOptimizer, "compile_fn", cut)
    # As inside its forward.
    replica = SimpleNamespace(bucket_bytes_cap=2**20)
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", replica)
    make_trainer(max_epochs=1).fit(module_of(small_cnn(), ["6"], compile=True), loader(16, batch_size=8))
    assert backend.num_graphs == 2 + 1
