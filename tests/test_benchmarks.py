"""The benchmarks calculate correctly; no test asserts what they measure."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import single_device
from benchmarks.scaling import Link
from benchmarks.simulation import METHODS, Cluster, simulate


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 64, 100, 1000, 4097])
def test_the_largest_batch_that_fits_is_found_to_within_a_sixteenth(limit: int) -> None:
    tried: list[int] = []

    def fits(batch_size: int) -> bool:
        tried.append(batch_size)
        return batch_size <= limit

    found = single_device.largest(fits)
    assert found <= limit <= found + max(1, found // 16)
    assert found == 0 or found in tried  # not merely reckoned
    assert len(tried) <= 20


def test_the_figure_has_a_point_for_every_method(tmp_path: Path) -> None:
    methods = [*single_device.METHODS, "backprop+compile", "dgl-4+compile+channels_last"]
    setups = [single_device.Setup("resnet50", method, 8, 224, "cpu", "32-true", 4, 2) for method in methods]
    for setup in setups:
        setup.check()
    results = [single_device.Result(setup, [1.0 + i, 2.0], 0.0, 100 + i, 32, None) for i, setup in enumerate(setups)]
    single_device.draw({"resnet50": results, "vgg19_bn": results[:1]}, tmp_path / "figure.svg")
    figure = (tmp_path / "figure.svg").read_text()
    assert [method for method in methods if f"<!-- {method} -->" not in figure] == []
    assert figure.count("<!-- vgg19_bn, 224×224 -->") == 1


@pytest.mark.parametrize("method", ["dgl-4+fast", "dgl", "greedy-4"])
def test_an_unknown_method_is_refused(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["single_device", "--methods", "backprop", method])
    with pytest.raises(SystemExit, match=f"KIND-K.*got {re.escape(repr(method))}"):
        single_device.main()


def test_an_unknown_benchmark_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "overhead", "nonsense"])
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.__main__").main()
    assert "single_device, overhead, parallel" in (message := capsys.readouterr().err)
    assert "got 'nonsense'" in message


def test_a_benchmark_that_fails_is_said_in_the_report_and_by_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = importlib.import_module("benchmarks.__main__")
    monkeypatch.setitem(main.TITLES, "missing", "One that is not there")
    monkeypatch.setattr("sys.argv", ["benchmarks", "missing", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        main.main()
    assert "**Failed** with exit status 1" in (tmp_path / "report.md").read_text()


def stay(rank: int, file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_processes_end_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = "import sys; from benchmarks.common import in_processes; from tests.test_benchmarks import stay\n"
    code += "in_processes(1, 1, stay, sys.argv[1])"
    benchmark = subprocess.Popen([sys.executable, "-c", code, str(file)], cwd=Path(__file__).parents[1])
    try:
        until = time.monotonic() + 100
        while not (file.exists() and file.read_text()):
            assert benchmark.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        benchmark.kill()
    benchmark.wait()
    pid, until = int(file.read_text()), time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_what_a_benchmark_has_made_is_cleaned_up_when_it_is_terminated() -> None:
    code = "import time; from benchmarks.common import clean_up_when_terminated; clean_up_when_terminated()\n"
    code += "try: print('ready', flush=True); time.sleep(600)\nfinally: print('cleaned')"
    root = Path(__file__).parents[1]
    benchmark = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert benchmark.stdout is not None
    assert benchmark.stdout.readline() == "ready\n"
    benchmark.terminate()
    assert benchmark.communicate(timeout=300)[0] == "cleaned\n"
    assert benchmark.returncode == 128 + signal.SIGTERM


# The simulation, where the outcome is known

FOUR_STAGES = Cluster((1.0, 1.0, 1.0, 1.0), gradient_bytes=(0.0,) * 4, batch_size=1)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("synchronous", 1.0),  # a step takes as long as a block
        ("asynchronous", 1.0),
        ("1F1B", 8 / (8 + 3)),  # the bubble of four stages with eight micro-batches
        ("DDP", 1.0),  # four batches in the time of four blocks
        ("DDP, same batch", 1.0),  # one in the time of one
    ],
)
def test_simulated_speed_over_free_links(method: str, expected: float) -> None:
    assert simulate(method, FOUR_STAGES).samples_per_second == pytest.approx(expected)


def test_simulated_speed_over_slow_links() -> None:
    slow = dataclasses.replace(FOUR_STAGES, message_bytes=3.0, link=Link(bandwidth=1.0))
    assert simulate("synchronous", slow).samples_per_second == pytest.approx(1 / 3)
    assert simulate("asynchronous", slow).samples_per_second == pytest.approx(1.0)  # trains on what it has
    averaging = dataclasses.replace(FOUR_STAGES, gradient_bytes=(1.0,) * 4, link=Link(latency=0.5, bandwidth=4.0))
    assert simulate("DDP", averaging).samples_per_second == pytest.approx(4 / (4 + 6 * (0.25 + 0.5)))


def test_simulated_pauses_take_their_share_of_the_time() -> None:
    paused = dataclasses.replace(FOUR_STAGES, block_seconds=(1.0,), gradient_bytes=(0.0,), paused=0.2, pause_seconds=3)
    outcome = simulate("synchronous", paused, num_steps=20_000)
    assert outcome.samples_per_second == pytest.approx(0.8, rel=0.05)


def test_every_simulated_method_takes_replicas() -> None:
    replicas = dataclasses.replace(FOUR_STAGES, replicas=3)
    for method in METHODS:
        speed = simulate(method, FOUR_STAGES).samples_per_second
        assert simulate(method, replicas).samples_per_second == pytest.approx(3 * speed)
