"""Let three asynchronous ranks train through a bad day: stopped and killed ranks, links that get slow and fast.

    sudo python -m benchmarks.soak --data cifar10 --output soak.md                        # 20 minutes on two cores
    python -m benchmarks.soak --data digits --epochs 60 --kill-every 20 --rates           # a look at it, without root

The recipe is that of ``cifar10.py --recipe modern --network four_layers``, on three ranks under torchrun, which
restarts them from the last checkpoint. It trains twice, at first undisturbed; the second time, until all its epochs are
taken:

- every few seconds, a rank stands still for some seconds (SIGSTOP, SIGCONT), or the ranks' connections get another of
  ``--rates``; all ranks are in a network namespace for that, ``dgl-soak``, which needs root and ``tc`` (iproute2);
- every ``--kill-every`` seconds, a rank is killed. Then the last checkpoint must load.

It ends with status 1 if the ranks hang, if torchrun gives up, or if a checkpoint is lost. The slope of the resident
memory is that of a line through the readings of one rank between two restarts, without their first minute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.common import clean_up_when_terminated, free_port, markdown_table, publish
from benchmarks.slow_link import limit, require_root, run
from examples.recipes.recipe import add_codec, make_codec
from lightning_dgl import Asynchronous, DGLStrategy

NAMESPACE = "dgl-soak"
NUM_RANKS = 3
TIMEOUT = 60.0
"""Seconds that a rank may keep the others waiting."""
HANGS_AFTER = 4 * TIMEOUT
"""Seconds without a step of any rank, restarts included."""
RECIPES = Path(__file__).parents[1] / "examples" / "recipes"


class Reading(NamedTuple):
    """What a rank writes down every second or so."""

    seconds: float
    resident_mb: float


class Diary(L.Callback):
    """Writes down which process a rank is, and :class:`Reading` after reading."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._latest = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (self._folder / f"pid{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        now = time.monotonic()
        if now - self._latest < 1:
            return
        self._latest = now
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        reading = Reading(now, pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        with open(self._folder / f"rank{trainer.global_rank}-{os.getpid()}", "a") as file:
            file.write(json.dumps(reading) + "\n")


def make_strategy(args: argparse.Namespace) -> DGLStrategy:
    return DGLStrategy(Asynchronous(max_reuse=args.max_reuse), codec=make_codec(args), timeout=TIMEOUT)


def find_recipe(args: argparse.Namespace) -> tuple[ModuleType, argparse.Namespace]:
    """Return the script whose recipe it is, and the arguments of that script."""
    sys.path.insert(0, str(RECIPES))  # the recipes import each other by name
    import cifar10

    of_run = ["--seed", str(args.seed), "--data", args.data, "--cache", args.cache, "--epochs", str(args.epochs)]
    return cifar10, cifar10.parse(["--recipe", "modern", "--network", "four_layers", *of_run])


def work(args: argparse.Namespace) -> None:
    """Train one rank, in a process that torchrun has started."""
    torch.set_num_threads(1)
    cifar10, recipe = find_recipe(args)
    cifar10.be_quiet()
    train_images, test_images = cifar10.load_images(recipe)
    L.seed_everything(args.seed, verbose=False)
    module = cifar10.make_module(train_images, recipe)
    folder: Path = args.work
    trainer = L.Trainer(
        strategy=make_strategy(args),
        accelerator="cpu",
        devices=NUM_RANKS,
        precision=recipe.precision,
        max_epochs=recipe.epochs,
        logger=False,
        callbacks=[Diary(folder), ModelCheckpoint(folder, save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    last = folder / "last.ckpt"
    trainer.fit(
        module, cifar10.batches(train_images, recipe.batch_size, train=True), ckpt_path=last if last.exists() else None
    )
    trainer.test(module, cifar10.batches(test_images, 500), verbose=False)
    if trainer.is_global_zero:
        accuracy = 100 * trainer.callback_metrics["test/acc"].item()
        (folder / "outcome").write_text(json.dumps({"accuracy": accuracy}))


@contextmanager
def namespace(rates: Sequence[str]) -> Iterator[list[str]]:
    """Make a network namespace if there are ``rates``; yield how a command is run in it."""
    if not rates:
        yield []
        return
    try:
        run("ip", "netns", "add", NAMESPACE)
        run("ip", "-n", NAMESPACE, "link", "set", "lo", "up")
        yield ["ip", "netns", "exec", NAMESPACE]
    finally:
        subprocess.run(["ip", "netns", "delete", NAMESPACE], capture_output=True, check=False)


def train(folder: Path, prefix: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start torchrun, which starts the ranks with the arguments of this process."""
    launcher = ["torch.distributed.run", "--nproc-per-node", str(NUM_RANKS), "--max-restarts", "100"]
    meeting = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    of_rank = [*sys.argv[1:], "--work", str(folder)]
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", *launcher, *meeting, "-m", "benchmarks.soak", *of_rank],
        env={"OMP_NUM_THREADS": "1", **os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        stdout=sys.stderr,
    )


class Soak:
    """One training, and what befalls it.

    Args:
        folder: where its ranks write.
        process: torchrun.

    Attributes:
        events: how often what has happened.
        failure: why the training counts as failed.
    """

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.events: Counter[str] = Counter()
        self.failure: str | None = None
        self._folder = folder
        self._process = process
        self._began = self._stepped = time.monotonic()
        self._size = 0

    @property
    def is_running(self) -> bool:
        """Whether it goes on; ends it if no rank takes a step any more."""
        size = sum(path.stat().st_size for path in self._folder.glob("rank*"))
        now = time.monotonic()
        if size != self._size:
            self._size, self._stepped = size, now
        if now - self._stepped > HANGS_AFTER:
            self.failure = f"no rank has taken a step in {HANGS_AFTER:g} s"
            self.end()
        return self._process.poll() is None

    def disturb(self, chance: random.Random, rates: Sequence[str], kill_every: float) -> None:
        """Make life hard for the ranks until they have finished."""
        kills = self._began + kill_every
        while self.is_running:
            time.sleep(chance.uniform(2, 8))
            if time.monotonic() > kills:
                if self._signal(chance.randrange(NUM_RANKS), signal.SIGKILL):
                    kills += kill_every
                    self.events["killed"] += 1
                    self._look_at_checkpoint()
            elif rates and chance.random() < 0.4:
                limit(NAMESPACE, "lo", chance.choice(rates))  # of all connections between ranks together
                self.events["rates changed"] += 1
            elif self._signal(rank := chance.randrange(NUM_RANKS), signal.SIGSTOP):
                seconds = chance.uniform(1, 10)
                time.sleep(seconds)
                self._signal(rank, signal.SIGCONT)
                self.events["stopped"] += 1
                self.events["seconds stopped"] += round(seconds)

    def _signal(self, rank: int, what: signal.Signals) -> bool:
        """Send a signal to a rank; return whether it is there."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self._folder / f"pid{rank}").read_text())
            if b"benchmarks.soak" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, what)
                return True
        return False

    def _look_at_checkpoint(self) -> None:
        last = self._folder / "last.ckpt"
        if not last.exists():
            return
        try:
            checkpoint = torch.load(last, weights_only=True, map_location="cpu")
            if not all(block["state"] for block in checkpoint["optimizer_states"][0]["blocks"]):
                raise ValueError("the optimizer of a block has no state")
            self.events["checkpoints loaded"] += 1
        except Exception as error:
            self.failure = f"the last checkpoint is lost: {type(error).__name__}: {error}"

    def end(self) -> None:
        """End torchrun and its ranks, if they run."""
        if self._process.poll() is None:
            for rank in range(NUM_RANKS):
                self._signal(rank, signal.SIGCONT)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
            for rank in range(NUM_RANKS):
                self._signal(rank, signal.SIGKILL)
            self._process.kill()

    def outcome(self) -> dict[str, Any]:
        """Return what is to be told of it."""
        if self.failure is None and self._process.wait() != 0:
            self.failure = f"torchrun has ended with status {self._process.returncode}"
        file = self._folder / "outcome"
        return {
            "minutes": (time.monotonic() - self._began) / 60,
            "accuracy": json.loads(file.read_text())["accuracy"] if file.exists() else None,
            "restarts": len(list(self._folder.glob("rank0-*"))) - 1,
            "slopes": slopes(self._folder),
            "failure": self.failure,
            **self.events,
        }


def slopes(folder: Path) -> list[tuple[float, float]]:
    """Return for each rank, between restarts, the slope of its resident memory in MB a minute, and its mean in MB."""
    found = []
    for path in folder.glob("rank*"):
        readings = [Reading(*json.loads(line)) for line in path.read_text().splitlines()]
        readings = [reading for reading in readings if reading.seconds - readings[0].seconds > 60]
        if len(readings) >= 60:
            minutes, memory = [r.seconds / 60 for r in readings], [r.resident_mb for r in readings]
            found.append((statistics.linear_regression(minutes, memory).slope, statistics.fmean(memory)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="cifar10, digits, or a folder with train/ and test/")
    parser.add_argument("--cache", default="data", help="folder for what is downloaded and decoded")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0, help="of the training, and of what befalls it")
    parser.add_argument("--kill-every", type=float, default=300, help="seconds")
    parser.add_argument("--max-reuse", type=int, help="how often a block trains on one batch; default: without bound")
    add_codec(parser)
    parser.add_argument(
        "--rates", nargs="*", default=["unlimited", "1gbit", "300mbit", "100mbit"], help="none: links stay as they are"
    )
    parser.add_argument("--output", type=Path, help="file to write the table to, besides printing it")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    try:
        # torchrun would start ranks that refuse their arguments again and again
        make_strategy(args)
        cifar10, recipe = find_recipe(args)
        cifar10.load_images(recipe)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if args.rates:
        require_root()
    clean_up_when_terminated()
    outcomes = []
    with namespace(args.rates) as prefix, TemporaryDirectory() as parent:
        for is_disturbed in (False, True):
            (folder := Path(parent) / str(is_disturbed)).mkdir()
            ranks = train(folder, prefix)
            soak = Soak(folder, ranks)
            try:
                if is_disturbed:
                    soak.disturb(random.Random(args.seed), args.rates, args.kill_every)
                while soak.is_running:
                    time.sleep(1)
            finally:  # Ctrl-C, too
                soak.end()
            outcomes.append(soak.outcome())
            print(outcomes[-1], file=sys.stderr, flush=True)

    def row(title: str, show: Any) -> list[str]:
        return [title, *("" if (value := show(outcome)) is None else value for outcome in outcomes)]

    def slope(outcome: dict[str, Any]) -> str | None:
        if not outcome["slopes"]:
            return None
        of_time, memory = zip(*outcome["slopes"], strict=True)
        return f"{statistics.median(of_time):+.1f} ({min(of_time):+.1f} to {max(of_time):+.1f}) of {max(memory):.0f}"

    rows = [
        row("minutes", lambda o: f"{o['minutes']:.1f}"),
        row("accuracy of the last block, %", lambda o: o["accuracy"] and f"{o['accuracy']:.2f}"),
        row("a rank was stopped, times (seconds)", lambda o: f"{o.get('stopped', 0)} ({o.get('seconds stopped', 0)})"),
        row("links got another rate, times", lambda o: str(o.get("rates changed", 0))),
        row("a rank was killed, times", lambda o: str(o.get("killed", 0))),
        row("restarts", lambda o: str(o["restarts"])),
        row("checkpoints that were there then, and loaded", lambda o: str(o.get("checkpoints loaded", 0))),
        row("resident memory, slope in MB a minute", slope),
        row("failure", lambda o: o["failure"]),
    ]
    about = f"four_layers, three asynchronous ranks, {args.epochs} epochs on {Path(args.data).name}, seed {args.seed}"
    if args.max_reuse:
        about += f", max_reuse={args.max_reuse}"
    if args.codec:
        about += f", codec {args.codec if isinstance(args.codec, str) else 'x'.join(map(str, args.codec))}"
    publish(f"{about}.\n\n{markdown_table(['', 'undisturbed', 'disturbed'], rows)}", args.output)
    if any(outcome["failure"] for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
