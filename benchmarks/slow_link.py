"""Train over a really slow link: two ranks in two network namespaces, joined by a link with a token-bucket limit.

    sudo python -m benchmarks.slow_link --output slow_link.md
    sudo python -m benchmarks.slow_link --network vgg11_bn --precision bf16-mixed
    sudo python -m benchmarks.slow_link --network resnet50 --image-size 64 --precision bf16-mixed

Needs root, and the programs ``ip`` and ``tc`` (iproute2), to make the namespaces ``dgl-rank0`` and ``dgl-rank1``; they
are removed at the end, after Ctrl-C, too. Two blocks, one on each rank, one thread a rank, images in memory, as in
benchmarks.parallel:

- ``raw``, ``half``, ``vq-D``: DGL, with DGLStrategy(codec=None), "half", or VectorQuantizer(256, D, compile=True);
- ``gpipe``, ``1f1b``: torch.distributed.pipelining with 4 micro-batches, which sends activations and their gradients;
- ``ddp``: end-to-end backpropagation under Lightning's DDP, each rank on half of the batch, which sends gradients; they
  are compressed in ``ddp+bf16`` and ``ddp+powersgd``.

Bytes are those that the interface of the first rank has sent, with TCP's headers.

Every run has fresh processes, and repeats are interleaved. Times are taken as in benchmarks.parallel, from the end of
the warm-up to the last step of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import PROCESS_ENVIRONMENT, clean_up_when_terminated, markdown_table, publish, spread
from benchmarks.parallel import Reading, Setup, conditions, how_long, options, train, workload_of
from benchmarks.workloads import Workload
from lightning_dgl import VectorQuantizer

NAMESPACES = ("dgl-rank0", "dgl-rank1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
METHODS = ("raw", "half", "vq-4", "vq-8", "vq-16", "1f1b", "gpipe", "ddp", "ddp+bf16", "ddp+powersgd")
RATES = ("unlimited", "1gbit", "100mbit")


@contextmanager
def link() -> Iterator[None]:
    """Two namespaces, joined by a pair of virtual interfaces."""
    try:
        for name in NAMESPACES:
            run("ip", "netns", "add", name)
        first, second = NAMESPACES
        run("ip", "link", "add", "link0", "netns", first, "type", "veth", "peer", "name", "link1", "netns", second)
        for rank, name in enumerate(NAMESPACES):
            run("ip", "-n", name, "address", "add", f"{ADDRESSES[rank]}/24", "dev", f"link{rank}")
            run("ip", "-n", name, "link", "set", f"link{rank}", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMESPACES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def limit(namespace: str, device: str, rate: str) -> None:
    """Let an interface send at ``rate``, as tc understands it, or "unlimited"."""
    qdisc, root = ("tc", "-n", namespace, "qdisc"), ("dev", device, "root")
    subprocess.run([*qdisc, "del", *root], capture_output=True, check=False)
    if rate != "unlimited":
        run(*qdisc, "add", *root, "tbf", "rate", rate, "burst", "256kb", "latency", "100ms")


def require_root() -> None:
    """End with one line unless network namespaces can be made."""
    if os.geteuid() != 0:
        raise SystemExit("This benchmark makes network namespaces, which needs root: run it with sudo.")
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise SystemExit(f"This benchmark needs the program {program}: install iproute2.")


def run(*command: str) -> None:
    """Run a program; end with what it says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")


def measure(method: str, workload: Workload, how: dict[str, int]) -> list[Reading]:
    """Run one method, a rank in each namespace."""
    ranks = []
    for rank, name in enumerate(NAMESPACES):
        environment = {
            **PROCESS_ENVIRONMENT,
            **os.environ,
            **{"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29577", "NODE_RANK": str(rank), "LOCAL_RANK": "0"},
            **{"GLOO_SOCKET_IFNAME": f"link{rank}", "WORLD_SIZE": "2"},
        }
        work = json.dumps({"method": method, "rank": rank, "workload": vars(workload), "how": how})
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "benchmarks.slow_link", "--work", work]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [rank.communicate(timeout=900)[0] for rank in ranks]
    finally:  # Ctrl-C, too
        for process in ranks:
            process.kill()
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{method} failed.")
    return [Reading(**json.loads(output.splitlines()[-1])) for output in outputs]


def work(method: str, rank: int, workload: dict[str, Any], how: dict[str, int]) -> Reading:
    """Train one rank, in its own process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trains = Workload(**workload | {"split_at": tuple(workload["split_at"])})
    if not method.startswith(("raw", "half", "vq")):
        name = f"backprop-2x1{method.removeprefix('ddp')}" if method.startswith("ddp") else f"{method}-2x1-m4"
        return train(rank, Setup.parse(name, trains, **how), num_nodes=2)
    codec: Any = method
    if method.startswith("vq-"):
        codec = VectorQuantizer(256, int(method.removeprefix("vq-")), compile=True)
    return train(rank, Setup.parse("dgl-2x1", trains, **how), None if codec == "raw" else codec, num_nodes=2)


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(channels=32, steps=8)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", default=list(RATES), help="of the link, as tc understands it")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(vars(work(**json.loads(args.work)))))
        return
    require_root()
    clean_up_when_terminated()
    workload, how = workload_of(args), how_long(args)
    readings: dict[tuple[str, str], list[list[Reading]]] = {(m, r): [] for m in args.methods for r in args.rates}
    with link():
        for repeat in range(args.repeats):
            for rate in args.rates:
                for rank, name in enumerate(NAMESPACES):
                    limit(name, f"link{rank}", rate)
                for method in args.methods:
                    readings[method, rate].append(measure(method, workload, how))
                    seconds = max(reading.seconds for reading in readings[method, rate][-1])
                    speed = args.steps * args.batch_size / seconds
                    print(f"repeat {repeat + 1}, {rate}, {method}: {speed:.1f} samples/s", file=sys.stderr, flush=True)

    def speeds(method: str, rate: str) -> list[float]:
        return [args.steps * args.batch_size / max(r.seconds for r in ranks) for ranks in readings[method, rate]]

    rows = []
    for method in args.methods:
        sent = statistics.median(ranks[0].bytes_sent for ranks in readings[method, args.rates[0]]) / args.steps
        rows.append([method, f"{sent / 1e6:.2f}", *(spread(speeds(method, r), 1) for r in args.rates)])
    table = markdown_table(["method", "MB sent a step", *(f"samples/s, {rate}" for rate in args.rates)], rows)
    publish(f"{conditions(args, workload)}\n\n{table}", Path(args.output) if args.output else None)


if __name__ == "__main__":
    main()
