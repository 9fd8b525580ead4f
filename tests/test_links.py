"""Links between blocks in one process: what goes through them, as it is or through a codec."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_dgl import Asynchronous, DGLModule, DGLStrategy, Message, VectorQuantizer
from tests.internals import buffers, links_of, traffic
from tests.runs import MakeTrainer, assert_equal, block_weights, loader, make_module, pieces, same, sgd, small_cnn


def test_weights_equal_a_plain_loop_that_quantizes_between_blocks(make_trainer: MakeTrainer) -> None:
    module = make_module()
    blocks, heads = pieces(module)
    quantizers = [VectorQuantizer(16, 4) for _ in range(3)]
    optimizers = [sgd([*block.parameters(), *head.parameters()]) for block, head in zip(blocks, heads, strict=True)]
    for _ in range(2):
        for inputs, targets in loader():
            x = inputs
            for j, (block, head, optimizer) in enumerate(zip(blocks, heads, optimizers, strict=True)):
                output = block(x)
                if j < 3:
                    quantizers[j].update(output)
                    x = quantizers[j].encode(output).decode()
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(output), targets).backward()
                optimizer.step()
    make_trainer(strategy=DGLStrategy(codec=VectorQuantizer(16, 4)), max_epochs=2).fit(module, loader())
    assert_equal(module, blocks, heads)


def test_a_blocks_own_codec_does_not_change_how_it_trains(make_trainer: MakeTrainer) -> None:
    raw = make_module()
    network, heads = copy.deepcopy(raw.network.state_dict()), copy.deepcopy(raw.heads.state_dict())
    L.seed_everything(0)
    make_trainer(max_epochs=2).fit(raw, loader(shuffle=True))
    quantized = make_module()
    quantized.network.load_state_dict(network)
    quantized.heads.load_state_dict(heads)
    L.seed_everything(0)
    make_trainer(strategy=DGLStrategy(codec=VectorQuantizer(4, 4)), max_epochs=2).fit(quantized, loader(shuffle=True))
    changes = [not same(a, b) for a, b in zip(block_weights(raw), block_weights(quantized), strict=True)]
    assert changes == [False, True, True, True]


def test_evaluation_is_of_the_network_that_is_kept(make_trainer: MakeTrainer) -> None:
    module = make_module()
    trainer = make_trainer(strategy=DGLStrategy(codec=VectorQuantizer(2, 8)))
    trainer.fit(module, loader(), loader())
    with torch.no_grad():
        scores = torch.cat([module.eval()(inputs) for inputs, _ in loader()])
    targets = torch.cat([targets for _, targets in loader()])
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(
        nn.functional.cross_entropy(scores, targets).item(), rel=1e-5
    )


def test_replay_buffers_hold_messages(make_trainer: MakeTrainer) -> None:
    held = []
    for codec in (None, VectorQuantizer(4, 8)):
        torch.manual_seed(0)
        module = make_module()
        strategy = DGLStrategy(Asynchronous(buffer_size=4), codec=codec)
        make_trainer(strategy=strategy, max_epochs=2).fit(module, loader())
        held.append(buffers(links_of(module))[2])
    raw, quantized = held
    activation, targets = quantized.get()
    assert isinstance(activation, Message)
    assert activation.codes.dtype == torch.uint8
    assert isinstance(targets, Tensor)
    assert isinstance(raw.get()[0], Tensor)
    codebooks = 4 * (4 * 8 * 4)  # each of the four messages has its own
    activations = 4 * 8 * (8 * 8 * 8) * 4
    assert raw.nbytes == activations + 4 * 8 * 8
    assert quantized.nbytes == activations // 32 + codebooks + 4 * 8 * 8


def test_a_codec_for_each_link(make_trainer: MakeTrainer) -> None:
    strategy = DGLStrategy(codec=[None, "half", VectorQuantizer(8, 2)])
    module = make_module()
    make_trainer(strategy=strategy).fit(module, loader())
    passed = [(t.batches, t.raw_bytes / max(t.encoded_bytes, 1)) for t in traffic(module)]
    assert [batches for batches, _ in passed] == [0, 5, 5, 0]
    assert 1.5 < passed[1][1] < 2 < passed[2][1]


def test_resumes_bit_for_bit_with_the_codebooks(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    def train(max_epochs: int, resume: Path | None = None) -> tuple[L.Trainer, DGLModule]:
        torch.manual_seed(0)
        module = make_module()
        trainer = make_trainer(strategy=DGLStrategy(codec=VectorQuantizer(8, 4)), max_epochs=max_epochs)
        trainer.fit(module, loader(), ckpt_path=resume, weights_only=False)
        return trainer, module

    trainer, _ = train(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=False)
    assert [sorted(state) for state in saved["lightning_dgl"]["codecs"][:3]] == [
        ["codebook", "counts", "num_updates", "sums"]
    ] * 3
    assert set(saved["state_dict"]) == set(make_module().state_dict())  # the codebooks are not the network's
    _, resumed = train(3, tmp_path / "one.ckpt")
    _, uninterrupted = train(3)
    for (name, got), want in zip(resumed.state_dict().items(), uninterrupted.state_dict().values(), strict=True):
        assert torch.equal(got, want), name


def test_values_that_are_not_finite_are_an_error_that_names_the_block(make_trainer: MakeTrainer) -> None:
    class Explodes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float("inf")

    network = small_cnn()
    network[6] = nn.Sequential(nn.ReLU(), Explodes())
    module = DGLModule(network, split_at=["2", "6", "10"], example_input=(2, 3, 8, 8), optimizer=sgd)
    trainer = make_trainer(strategy=DGLStrategy(codec=VectorQuantizer(4, 4)))
    with pytest.raises(ValueError, match=r"output of block 1 \(3 to 6\): .* NaN or infinite"):
        trainer.fit(module, loader())


def test_channels_that_do_not_fit_are_an_error_that_names_the_block(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(strategy=DGLStrategy(codec=VectorQuantizer(4, 16)))
    with pytest.raises(ValueError, match=r"output of block 0 .*cannot be cut in groups of code_dim=16"):
        trainer.fit(make_module(), loader())


def test_a_list_of_codecs_of_another_length(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="codec is a list of 2, but must have 3"):
        make_trainer(strategy=DGLStrategy(codec=["half", None])).fit(make_module(), loader())
    with pytest.raises(ValueError, match=r"codec must be None, 'half', a VectorQuantizer, .* got 'zip'"):
        DGLStrategy(codec="zip")
