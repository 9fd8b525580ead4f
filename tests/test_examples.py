"""The recipes: each script does what its README says, and refuses what it cannot do."""

from __future__ import annotations

import copy
import importlib
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image
from wandb.proto import wandb_internal_pb2

from tests.recipes import TINY, Main
from tests.runs import loader


def image_folder(folder: Path, parts: Sequence[tuple[str, int]] = (("train", 16), ("test", 4))) -> Path:
    for part, number in parts:
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for i in range(number):
                image = to_pil_image(torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8))
                image.save(folder / part / name / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("--network", "resnet20", "--blocks", "3", "--head", "linear"),
        ("--network", "vgg11_bn", "--method", "backprop"),
        ("--network", "dni_network", "--method", "async", "--slowdown", "2", "--channels", "8"),
        ("--network", "dni_network", "--method", "cdni", "--channels", "8", "--lr", "1e-3"),
        ("--network", "four_layers", "--method", "sequential", "--channels", "8"),
    ],
)
def test_any_network_on_any_folder_of_images(
    arguments: tuple[str, ...], script: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--epochs", "1", "--batch-size", "16", "--accelerator", "cpu")
    script("cifar10", "--data", str(image_folder(tmp_path / "pets")), *few, *arguments)
    assert "ensemble: " in capsys.readouterr().out


def test_changes_of_the_recipe(script: Main) -> None:
    cifar10 = importlib.import_module("cifar10")
    arguments = ["--network", "resnet20", "--blocks", "2", "--head", "augmented"]
    images = torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 3

    def make(change: str = "") -> Any:
        torch.manual_seed(0)
        return cifar10.make_module(images, cifar10.parse([*arguments, *change.split()]))

    plain, x = make(), torch.randn(8, 3, 32, 32)
    branches: list[torch.Tensor] = []
    for name, norm in plain.network.named_modules():
        if name.endswith("bn2"):
            norm.register_forward_hook(lambda module, args, output: branches.append(output))
    scores = plain.heads[0](plain.blocks[0](x))
    penalty = 0.05 * sum(branch.square().mean() for branch in branches)
    penalised = make("--change trgl")
    for _ in range(2):  # no penalty is left over for the next step
        loss = penalised.local_loss(0, penalised.heads[0](penalised.blocks[0](x)), images[1])
        torch.testing.assert_close(loss, nn.functional.cross_entropy(scores, images[1]) + penalty)

    fresh = make("--change fresh-heads")
    for copied, own in zip(plain.heads.parameters(), fresh.heads.parameters(), strict=True):
        assert torch.equal(copied.flatten().sort().values, own.flatten().sort().values)
        assert copied.dim() == 1 or not torch.equal(copied, own)
    assert make("--change label-smoothing").loss.label_smoothing == 0.1
    assert make("--change full-resolution").head_flops[0] > 3 * plain.head_flops[0]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "cifar10",
            ("--data", "nowhere"),
            "There is no folder nowhere/train. Data is 'digits', 'cifar10', or a folder",
        ),
        ("cifar10", ("--network", "vgg12"), "There is no network 'vgg12'. There are six_layers"),
        ("cifar10", ("--codec", "8"), "must be raw, half, or codes x dimension such as 256x8, got '8'"),
        ("cifar10", ("--method", "magic"), "invalid choice: 'magic'"),
        ("cifar10", ("--network", "resnet18", "--channels", "8"), "--channels is of six_layers"),
        ("cifar10", ("--method", "dni", "--change", "trgl"), "argument --change: is of blocks and heads"),
        ("cifar10", ("--data", "digits", "--change", "trgl"), "--change trgl is for the residual networks"),
        (
            "cifar10",
            ("--network", "resnet18", "--data", "digits"),
            "resnet18 takes images of three channels, these have 1",
        ),
        (
            "imagenet",
            ("--data", "nowhere"),
            "There is no folder nowhere/train. --data is a folder with train/ and val/.",
        ),
        ("imagenet", ("--data", "nowhere", "--network", "vgg12"), "got 'vgg12'"),
        ("imagenet", (), "one of the arguments --data --synthetic is required"),
    ],
)
def test_arguments_that_do_not_fit(
    name: str, arguments: tuple[str, ...], message: str, script: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        script(name, *arguments)
    assert message in " ".join(f"{ended.value} {capsys.readouterr().err}".split())


def break_an_image(folder: Path) -> None:
    (folder / "test" / "dog" / "3.png").write_bytes(b"not an image")


def leave_out_a_class(folder: Path) -> None:
    shutil.rmtree(folder / "test" / "dog")


def empty_a_class(folder: Path) -> None:
    for image in (folder / "train" / "dog").iterdir():
        image.unlink()


def add_another_size(folder: Path) -> None:
    to_pil_image(torch.zeros(3, 20, 20, dtype=torch.uint8)).save(folder / "train" / "dog" / "z.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_an_image, "test/dog/3.png cannot be read: cannot identify image file"),
        (leave_out_a_class, "train has classes ['cat', 'dog'], but test has ['cat']. Unpack the data again"),
        (empty_a_class, "Found no valid file for the classes dog"),
        (add_another_size, "train/dog/z.png is of shape (3, 20, 20), others of (3, 32, 32)"),
    ],
)
def test_broken_image_folders(spoil: Callable[[Path], None], message: str, script: Main, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets")
    spoil(folder)
    with pytest.raises(SystemExit) as ended:
        script("cifar10", "--data", str(folder))
    assert message in str(ended.value)
    assert not list((tmp_path / "data").glob("*.pt"))  # nothing half-decoded is left for the next run


def test_two_processes_decode_a_folder_at_once(script: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_data = importlib.import_module("image_data")
    folder = image_folder(tmp_path / "pets")
    save, others = torch.save, []

    def save_with_another(images: Any, path: Path) -> None:
        save(images, path)
        if not others:
            others.append(None)
            others.append(image_data.load(str(folder), tmp_path / "data"))

    monkeypatch.setattr(torch, "save", save_with_another)
    (own, _), (other, _) = image_data.load(str(folder), tmp_path / "data"), others[1]
    assert torch.equal(own[0], other[0])
    assert [path.suffix for path in (tmp_path / "data").iterdir()] == [".pt"]


def records(file: Path) -> Iterator[Any]:
    """Yield what Weights & Biases wrote for a run: a log of 32 KiB blocks, each record in one part or several."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_weights_and_biases_records_a_run(script: Main, tmp_path: Path) -> None:
    arguments = ("--data", "digits", "--epochs", "1", "--channels", "8", "--accelerator", "cpu")
    script("cifar10", *arguments, "--wandb", "offline", "--codec", "16x8")
    (file,) = tmp_path.glob("runs/**/run-*.wandb")
    history: set[str] = set()
    config: dict[str, str] = {}
    artifacts = []
    deadline = time.monotonic() + 60
    while not any(record.HasField("exit") for record in records(file)):  # another process writes it
        assert time.monotonic() < deadline, "the record of the run has no end"
        time.sleep(0.1)
    for record in records(file):
        match record.WhichOneof("record_type"):
            case "history":
                history |= {item.key or "/".join(item.nested_key) for item in record.history.item}
            case "config":
                config |= {item.key or "/".join(item.nested_key): item.value_json for item in record.config.update}
            case "artifact":
                artifacts.append(record.artifact.type)
    assert config["network"] == '"six_layers"' and config["lr"] == "0.1" and config["codec"] == "[16,8]"
    for j in range(6):  # a panel section for each of train/, val/, monitor/ and lr/
        assert {f"train/loss_block{j}", f"val/acc_block{j}", f"monitor/updates_block{j}", f"lr/block{j}"} <= history
    assert {"val/acc_ensemble", "monitor/compression_block0", "blocks/nrows", "plots/blocks/count"} <= history
    assert artifacts == ["run_table", "model"]


def test_logs_plot_and_checkpoint_are_left(script: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("cifar10", "--data", "digits", *TINY)
    folder = tmp_path / "runs" / "six_layers-dgl" / "version_0"
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {"metrics.csv", "hparams.yaml", "blocks.png", "checkpoints/last.ckpt"}
    assert "--wandb online or offline logs to Weights & Biases, too" in capsys.readouterr().out


@pytest.mark.parametrize(("package", "arguments"), [("wandb", ("--wandb", "offline")), ("matplotlib.figure", ())])
def test_packages_that_are_missing(
    package: str,
    arguments: tuple[str, ...],
    script: Main,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", package != "wandb")
    message = ""
    try:
        script("cifar10", "--data", "digits", *TINY, *arguments)
    except SystemExit as ended:
        message = str(ended)
    name = package.partition(".")[0]
    assert f"pip install {name}" in message + capsys.readouterr().out


@pytest.mark.parametrize(
    ("network", "blocks"),
    [
        ("resnet18", "2"),
        *(pytest.param(*of_paper, marks=pytest.mark.slow) for of_paper in (("vgg13_bn", "4"), ("vgg19_bn", "2"))),
        pytest.param("resnet152", "2", marks=pytest.mark.slow),
    ],
)
def test_imagenet_trains_and_logs_every_block(network: str, blocks: str, script: Main, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets", parts=(("train", 4), ("val", 2)))
    arguments = ("--data", str(folder), "--network", network, "--blocks", blocks, "--image-size", "32")
    small = ("--batch-size", "4", "--limit-batches", "2", "--epochs", "1", "--workers", "0", "--accelerator", "cpu")
    script("imagenet", *arguments, *small, "--head", "linear")
    (log,) = tmp_path.glob("runs/*/version_0/metrics.csv")
    columns = log.read_text().splitlines()[0].split(",")
    assert {f"val/{name}_block{j}" for name in ("loss", "acc", "acc5") for j in range(int(blocks))} <= set(columns)
    shutil.rmtree(tmp_path / "runs")  # a checkpoint of a VGG has a gigabyte


def test_imagenet_resumes_with_the_blocks_that_were_balanced_by_time(script: Main, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets", parts=(("train", 4), ("val", 2)))
    arguments = ("--data", str(folder), "--network", "resnet18", "--blocks", "2", "--image-size", "32")
    small = ("--batch-size", "4", "--limit-batches", "2", "--workers", "0", "--accelerator", "cpu", "--head", "linear")
    script("imagenet", *arguments, *small, "--balance", "time", "--epochs", "1")
    (last,) = tmp_path.glob("runs/**/last.ckpt")
    cuts = torch.load(last, weights_only=True)["hyper_parameters"]["split_at"]
    resumed = importlib.import_module("imagenet")
    args = resumed.parse([*arguments, *small, "--balance", "time", "--resume", str(last)])
    assert [point.name for point in resumed.make_module(2, args).split_points] == cuts


def test_imagenet_measures_throughput_without_data(script: Main, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--network", "resnet18", "--blocks", "2", "--image-size", "32", "--batch-size", "2")
    script("imagenet", "--synthetic", "5", *arguments, "--accelerator", "cpu", "--channels-last")
    assert re.search(r"\d+ images/s in training, over 2 steps", capsys.readouterr().out)


def test_dni_equals_a_plain_loop(script: Main, make_trainer: Callable[..., L.Trainer]) -> None:
    dni = importlib.import_module("dni")
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())]
    network = nn.Sequential(*layers, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)))
    module = dni.DNIModule(network, ["0", "1"], torch.zeros(2, 3, 8, 8), 4, context=True, lr=1e-3)
    for synthesiser in module.synthesisers:
        nn.init.normal_(synthesiser.last.weight, std=0.1)  # else the blocks before would learn nothing at first
    plain, synthesisers = copy.deepcopy(network), copy.deepcopy(module.synthesisers)
    optimizer = torch.optim.Adam([*plain.parameters(), *synthesisers.parameters()], 1e-3)
    for x, y in loader():
        h0 = plain[0](x)
        h1 = plain[1](x1 := h0.detach().requires_grad_())
        loss = nn.functional.cross_entropy(plain[2](x2 := h1.detach().requires_grad_()), y)
        g0, g1 = synthesisers[0](x1.detach(), y), synthesisers[1](x2.detach(), y)
        (true1,) = torch.autograd.grad(loss, x2, retain_graph=True)
        (true0,) = torch.autograd.grad((h1 * g1.detach()).sum(), x1, retain_graph=True)
        optimizer.zero_grad()
        errors = nn.functional.mse_loss(g0, true0) + nn.functional.mse_loss(g1, true1)
        ((h0 * g0.detach()).sum() + (h1 * g1.detach()).sum() + loss + errors).backward()
        optimizer.step()
    make_trainer(strategy="auto", max_epochs=1).fit(module, loader())
    for name, value in plain.state_dict().items():
        assert torch.allclose(network.state_dict()[name], value, atol=1e-6), name


def test_slow_link_shows_what_each_codec_sends(
    script: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow_link = importlib.import_module("slow_link")
    few = [(images[:96], labels[:96]) for images, labels in slow_link.load("digits", Path())]
    monkeypatch.setattr(slow_link, "load", lambda *_: few)
    script("slow_link", "--epochs", "1", "--blocks", "2", "--accelerator", "cpu")
    lines = capsys.readouterr().out.splitlines()
    smaller = {line.split("│")[1].strip(): line.split("│")[3] for line in lines if "│" in line}
    assert (float(smaller["raw"]), float(smaller["half"])) == (1, 2)
    assert 2 < float(smaller["256 codes of 4"]) < float(smaller["256 codes of 8"])
