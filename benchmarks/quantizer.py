"""Measure what codecs save and what they cost.

    python -m benchmarks.quantizer --output quantizer.md
    python -m benchmarks.quantizer --network vgg11_bn --precision bf16-mixed
    python -m benchmarks.quantizer --network resnet50 --image-size 64 --precision bf16-mixed

The first table has the bytes that each link carries in a step of the paper's network of six convolutions with 128 to
512 channels, batch 128: codes, codebooks, targets and headers, in MB; and the size of buffers of 30 such batches.

The second has the time to learn, encode and decode, against the local step of the block whose output is encoded.

The block has two 3×3 convolutions, BatchNorm and ReLU after each, and an MLP-SR head; its output has 128 channels at
16×16, batch 128; one thread. With ``--network`` it is the first of two blocks of that network, with the default head,
as in benchmarks.parallel; in bf16-mixed its output is bfloat16 in channels_last. Beside the quantizer stands the plain
way to find the nearest code: a matrix product in chunks, then argmax; and a float32 copy of what is encoded. Repeats
are interleaved; shares are taken pair by pair within a repeat.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import in_processes, markdown_table, publish, sgd, spread
from benchmarks.workloads import PRECISIONS, Workload
from lightning_dgl import MLPSRHead, VectorQuantizer
from lightning_dgl.address import Address
from lightning_dgl.codecs import HEADER_BYTES
from lightning_dgl.links import make_codecs, make_links

SHAPE = (128, 128, 16, 16)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def plain_search(x: Tensor, codebook: Tensor, chunk: int = 65536) -> Tensor:
    """Return the nearest code of every vector, by a product and argmax."""
    samples, channels, height, width = x.shape
    code_dim = codebook.shape[1]
    grouped = (
        x.float().reshape(samples, channels // code_dim, code_dim, height * width).transpose(2, 3).reshape(-1, code_dim)
    )
    bias = -0.5 * codebook.square().sum(1)
    codes = [torch.addmm(bias, part, codebook.T).argmax(1).to(torch.uint8) for part in grouped.split(chunk)]
    return torch.cat(codes)


def paper_block() -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a block, its head, and its input."""
    convolutions = [nn.Conv2d(SHAPE[1], SHAPE[1], 3, padding=1, bias=False) for _ in range(2)]
    block = nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.BatchNorm2d(SHAPE[1]), nn.ReLU())))
    return block, MLPSRHead(SHAPE[1], SHAPE[2], 10), torch.randn(SHAPE)


def measure(
    rank: int, codebooks: list[tuple[int, int]], repeats: int, workload: Workload | None
) -> dict[str, list[float]]:
    if workload is None:
        block, head, x = paper_block()
        autocast: Any = nullcontext()
    else:
        module, autocast = workload.make_module(), workload.autocast()
        block, head = module.blocks[0], module.heads[0]
        x = next(iter(workload.images(1)))[0].to(memory_format=workload.memory_format)
    optimizer = sgd([*block.parameters(), *head.parameters()])
    targets = torch.randint(0, 10, (len(x),))

    def local_step() -> Tensor:
        optimizer.zero_grad()
        with autocast:
            output: Tensor = block(x)
            loss = nn.functional.cross_entropy(head(output), targets)
        loss.backward()
        optimizer.step()
        return output.detach()

    output = local_step()
    quantizers = [VectorQuantizer(*codebook) for codebook in codebooks]
    compiled = [VectorQuantizer(*codebook, compile=True) for codebook in codebooks]
    for quantizer in quantizers + compiled:
        quantizer.update(output)
    taken: dict[str, list[float]] = {}
    for _ in range(repeats + 1):
        taken.setdefault("step", []).append(seconds(local_step))
        taken.setdefault("copy in float32", []).append(seconds(lambda: output.float().clone()))
        for own, fast in zip(quantizers, compiled, strict=True):
            name = f"({own.num_codes}, {own.code_dim})"
            message = own.encode(output)
            taken.setdefault(f"{name} update", []).append(seconds(lambda own=own: own.update(output)))  # type: ignore[misc]
            taken.setdefault(f"{name} encode", []).append(seconds(lambda own=own: own.encode(output)))  # type: ignore[misc]
            fast.encode(output)
            own_compiled = seconds(lambda fast=fast: fast.encode(output))  # type: ignore[misc]
            taken.setdefault(f"{name} encode, compiled", []).append(own_compiled)
            taken.setdefault(f"{name} decode", []).append(seconds(message.decode))
            search = seconds(lambda own=own: plain_search(output, own.codebook))  # type: ignore[misc]
            taken.setdefault(f"{name} plain search", []).append(search)
    return {name: values[1:] for name, values in taken.items()}


def bytes_on_links() -> str:
    """Return a table with a column for each link; the number of bytes does not depend on the values."""
    shapes = [(128, 128, 32, 32)] * 2 + [(128, 256, 16, 16)] * 2 + [(128, 512, 8, 8)]
    codecs: dict[str, Any] = {"raw": None, "half": "half"} | {
        f"(256, {code_dim})": VectorQuantizer(256, code_dim) for code_dim in (4, 8, 16)
    }
    outputs, targets = [torch.rand(shape) for shape in shapes], torch.zeros(128, dtype=torch.int64)
    raw = [output.nbytes + targets.nbytes + HEADER_BYTES for output in outputs]
    rows = []
    for name, codec in codecs.items():
        num_blocks = len(shapes) + 1
        links = make_links(make_codecs(codec, len(shapes)), ["?"] * num_blocks, range(num_blocks))[1:-1]
        for link, output in zip(links, outputs, strict=True):
            link.send(Address("train", 0, 0, 0, 0), output, targets)
        sent = raw if codec is None else [link.traffic.encoded_bytes for link in links]
        smaller = [own_raw / own for own_raw, own in zip(raw, sent, strict=True)]
        cells = [f"{own / 1e6:.2f} ({times:.1f})" for own, times in zip(sent, smaller, strict=True)]
        rows.append(
            [name, *cells, f"{sum(sent) / 1e6:.1f} ({sum(raw) / sum(sent):.1f})", f"{30 * sum(sent) / 1e9:.2f}"]
        )
    columns = ["codec", *(f"after block {j}" for j in range(len(shapes))), "all", "five buffers of 30, GB"]
    return f"MB a step (times smaller than raw).\n\n{markdown_table(columns, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", help="a classification model of torchvision; default: the block above")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--precision", default="32-true", choices=PRECISIONS, help="of --network")
    parser.add_argument("--batch-size", type=int, default=128, help="of --network")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="file to write the table to, besides printing it")
    args = parser.parse_args()
    workload = None
    if args.network:
        workload = Workload(
            args.network, image_size=args.image_size, precision=args.precision, batch_size=args.batch_size
        ).balanced()
    (taken,) = in_processes(1, 1, measure, [(256, 4), (256, 8), (256, 16), (64, 8)], args.repeats, workload)
    rows = []
    for name, values in taken.items():
        shares = [100 * own / step for own, step in zip(values, taken["step"], strict=True)]
        rows.append([name, spread([1e3 * s for s in values], 0), spread(shares, 1)])
    times = markdown_table(["(codes, code_dim)", "ms", "% of the block's step"], rows)
    before = f"{bytes_on_links()}\n" if workload is None else f"Block 0 of {workload}.\n"
    publish(f"{before}{args.repeats} repeats: median (min–max).\n\n{times}", args.output)


if __name__ == "__main__":
    main()
