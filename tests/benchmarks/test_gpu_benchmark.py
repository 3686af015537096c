"""The benchmark of the CUDA engine: that it runs, on the CPU, and that its report claims no number of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import assert_one_line

from benchmarks import gpu
from benchmarks.gpu_report import BARS, Report, read_tests

XML = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure/></testcase>
<testcase name="c"><skipped/></testcase><testcase name="d"/></testsuite></testsuites>"""


def test_one_run_says_everything(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tests.xml").write_text(XML)
    monkeypatch.setattr(gpu, "PRECISIONS", ("fp32", "bf16", "int4"))
    files = [f"--{name}={tmp_path / name}" for name in ("json", "markdown")]
    few = ["--device", "cpu", "--tokens", "1", "--batch", "2", "--rounds", "1"]
    assert gpu.main([str(checkpoint), *few, *files, "--tests", str(tmp_path / "tests.xml")]) == 1  # a test failed
    d = json.loads((tmp_path / "json").read_text())
    assert d["tests"] == {"passed": 2, "failed": ["b"], "skipped": ["c"]}
    assert d["dry_run"] == {"tiny": [16, 4]}
    names = [[row["name"] for row in section["rows"]] for section in d["sections"]]
    assert names[0] == [f"{p}, {of}" for p in ("fp32", "bf16", "int4") for of in ("all 4", "1 of 4")]
    assert "all, then select" in names[1] and "the device, by conditions" in names[1]
    assert names[2] == ["all iterations", "adaptive"]
    read = {row["name"]: row["bytes"] for row in d["sections"][0]["rows"]}
    assert read["int4, all 4"] < read["bf16, all 4"] < read["fp32, all 4"]
    assert [bar["bar"] for bar in d["bars"]] == list(BARS)
    assert all(bar["holds"] is None for bar in d["bars"])  # of a GPU nothing was measured
    text = (tmp_path / "markdown").read_text()
    assert text.count("not measured") == len(BARS) and "failed: b" in text


def test_a_dry_run_needs_no_gpu(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([str(checkpoint), "--dry-run"]) in (0, None)
    out = capsys.readouterr().out
    assert "tiny" in out and "a dry run" in out and "##" not in out


def test_bars_hold_where_numbers_of_a_gpu_say_so() -> None:
    report = Report({"l2_bytes": 1, "bandwidth": 1e9}, None)

    class Of:
        def __init__(self, **facts: float) -> None:
            self.facts = facts

    times = {"fp32, all 12": 0.010, "fp32, 4 of 12": 0.0039, "bf16, all 12": 0.005, "int4, all 12": 0.0026}
    report.add("m", "decoding, batch 1", times, {name: Of(bytes=7e6) for name in times})
    both = {"all iterations": Of(mean_depth=12.0), "adaptive": Of(mean_depth=6.0)}
    report.add("m", "batch of 64, fp32", {"all iterations": 0.010, "adaptive": 0.0056}, both)
    assert [bar["holds"] for bar in report.bars()] == [True, True, False, True]
    assert report.bars()[0]["number"] == pytest.approx(0.7)
    assert report.bars()[3]["number"] == pytest.approx(1.12)
    assert read_tests(None) is None and not report.failed_tests()


def test_without_a_gpu_it_says_so(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([str(checkpoint)]) == 2
    assert_one_line(capsys.readouterr().err, "--device", "PyTorch sees no CUDA device here")
