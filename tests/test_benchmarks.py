"""The benchmarks calculate correctly; no test asserts what they measure."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from benchmarks import single_device


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
