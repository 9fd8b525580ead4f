"""Compare the weights that two checkouts of the package train: they must be equal bit for bit.

python -m benchmarks.compare_checkouts OLD_CHECKOUT

Each checkout trains a small network under every schedule, on one to four ranks, with and without a codec, and resumes
from a checkpoint that the old one has written within an epoch. Ranks are forked and have one thread each. The exit
status is 1 if any weights differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SLOW = {"buffer_size": 3, "slowdown": {1: 2.0}}
QUANTIZER = {"num_codes": 16, "code_dim": 4}
CASES: dict[str, dict[str, Any]] = {
    "one device without DGLStrategy": {"strategy": "auto"},
    "backpropagation (one block)": {"blocks": 1},
    **{
        f"sync, {ranks} rank{'s' * (ranks > 1)}, codec {codec}": {"devices": ranks, "codec": codec}
        for ranks in (1, 2, 3)
        for codec in (None, "half", "quantizer")
    },
    "sync, 2 × 2 ranks": {"devices": 4, "replicas": 2},
    "sync, 2 × 2 ranks, codec quantizer": {"devices": 4, "replicas": 2, "codec": "quantizer"},
    "sync, 3 ranks, gradients of 2 batches": {"devices": 3, "trainer": {"accumulate_grad_batches": 2}},
    "sync, 2 ranks, clipped": {"devices": 2, "trainer": {"gradient_clip_val": 0.1}},
    "sync, 1 rank, bf16-mixed": {"trainer": {"precision": "bf16-mixed"}},
    "sync, 2 ranks, bf16-mixed": {"devices": 2, "trainer": {"precision": "bf16-mixed"}},
    **{
        f"async in one process, codec {codec}": {"schedule": "async", "codec": codec}
        for codec in (None, "half", "quantizer")
    },
    **{f"sequential, codec {codec}": {"schedule": "sequential", "codec": codec} for codec in (None, "quantizer")},
    "sync, 1 rank, resumed from an old checkpoint": {"codec": "quantizer", "resume": True},
    "sync, 2 ranks, resumed from an old checkpoint": {"devices": 2, "codec": "quantizer", "resume": True},
    "async in one process, resumed from an old checkpoint": {"schedule": "async", "codec": "quantizer", "resume": True},
}


def train(case: dict[str, Any], save: bool = False) -> str:
    """Train two epochs of six batches; return a digest of all weights. Uses public names only."""
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_dgl import Asynchronous, DGLModule, DGLStrategy, VectorQuantizer

    def convolution(channels: int, features: int) -> nn.Module:
        layers = (nn.Conv2d(channels, features, 3, padding=1), nn.BatchNorm2d(features), nn.ReLU(), nn.Dropout(0.1))
        return nn.Sequential(*layers)

    L.seed_everything(5, verbose=False)
    pairs = [convolution(3, 8), convolution(8, 8), convolution(8, 16), convolution(16, 16)]
    network = nn.Sequential(*pairs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    split_at = ["0", "1", "2"] if case.get("blocks", 4) == 4 else []
    module = DGLModule(network, split_at=split_at, example_input=(2, 3, 8, 8))
    codec = VectorQuantizer(**QUANTIZER) if case.get("codec") == "quantizer" else case.get("codec")
    schedule = case.get("schedule", "sync")
    strategy = case.get("strategy") or DGLStrategy(
        Asynchronous(**SLOW) if schedule == "async" else schedule,  # type: ignore[arg-type]
        codec=codec,
        data_parallel_size=case.get("replicas", 1),
        start_method="fork",
    )
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(44, 3, 8, 8, generator=generator), torch.randint(4, (44,), generator=generator)
    data = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=case.get("devices", 1),
        max_epochs=4 if schedule == "sequential" else 2,
        logger=False,
        enable_checkpointing=save,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(".", "checkpoint", every_n_train_steps=8, save_top_k=1, enable_version_counter=False)
        ]
        if save
        else [],
        **case.get("trainer", {}),
    )
    trainer.fit(module, data, data, ckpt_path=f"{schedule}.ckpt" if case.get("resume") else None)
    digest = hashlib.sha1()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().numpy().tobytes())
    return digest.hexdigest()[:12]


def digests(checkout: Path, folder: Path, names: list[str], save: bool = False) -> list[str]:
    """Train in a process that imports the package from ``checkout``."""
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--train", json.dumps([names, save])]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="the checkout to compare this one with")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        names, save = json.loads(args.train)
        print(json.dumps([train(CASES[name], save) for name in names]))
        return 0
    if args.old is None or not (args.old / "lightning_dgl" / "__init__.py").exists():
        parser.error(f"old must be a folder with a checkout of the package, got {args.old}")
    new = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for schedule, case in (
            ("sync", "sync, 1 rank, codec quantizer"),
            ("async", "async in one process, codec quantizer"),
        ):
            digests(args.old, folder, [case], save=True)
            (folder / "checkpoint.ckpt").rename(folder / f"{schedule}.ckpt")
        old_digests, new_digests = (digests(checkout, folder, list(CASES)) for checkout in (args.old, new))
    different = 0
    for own, a, b in zip(CASES, old_digests, new_digests, strict=True):
        different += a != b
        print(f"{own:55} {a} {b} {'equal' if a == b else 'DIFFERENT'}")
    print(f"{len(CASES) - different} of {len(CASES)} equal")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
