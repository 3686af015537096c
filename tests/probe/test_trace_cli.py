"""rmse-trace from the command line, on small models: what it says is what the runtime did and what rmse-probe reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ALPHABET, assert_one_line, random_tokens, remembering_model, write_checkpoint
from paths import ROOT

from rmse_edge.cli.index import main as rmse_index
from rmse_edge.cli.trace import main as rmse_trace
from rmse_edge.probe.readings import read
from rmse_edge.probe.subjects import open_subject
from rmse_edge.probe.trace_plots import draw_trace
from rmse_edge.runtimes import open_runtime

pytestmark = pytest.mark.slow
TEXT = "".join(ALPHABET[i] for i in random_tokens(140, seed=2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(remembering_model(), tmp_path_factory.mktemp("trace") / "tiny")


def traced(model: Path, out: Path, *flags: object) -> dict[str, Any]:
    assert rmse_trace([str(model), "-o", str(out), *map(str, flags)]) == 0
    assert {file.name for file in out.iterdir()} == {"trace.json", "trace.png", "trace.svg", "trace.html"}
    return json.loads((out / "trace.json").read_text())


def test_a_text_is_followed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(TEXT)
    found = traced(model, tmp_path / "a", "--text", tmp_path / "text", "--max-tokens", 130, "--exit-threshold", 0.9)
    runtime, (subject, tokenizer) = open_runtime(model), open_subject(model)
    ids = np.array(tokenizer.encode(TEXT)[:131], np.int64)
    fed = runtime.feed(ids[:-1], runtime.info.dials_with(exit_threshold=0.9))
    assert [row["depth"] for row in found["trace"]] == fed.depth.tolist() and len(set(fed.depth.tolist())) > 2
    assert [s["value"] for s in found["surprises"]] == [s.value for s in fed.surprises] and len(fed.surprises) == 2
    readings = read(subject, ids[None])
    for k in range(4):
        for name in ("entropy", "change"):
            values = [row["iterations"][k][name] for row in found["trace"]]
            assert np.allclose(
                [np.nan if v is None else v for v in values], getattr(readings, name)[k, 0], atol=1e-3, equal_nan=True
            )
    (layer,) = found["experts"]
    assert (
        np.array(layer).shape == (4, 32) and (np.array(layer).sum(1) == 130 * 4).all()
    )  # 4 experts of a token and loop
    said = capsys.readouterr().out
    assert f"{fed.depth.mean():.2f} of 4 loops on average" in said and "experts in use" in said
    page = (tmp_path / "a" / "trace.html").read_text()
    assert "{{" not in page and "Surprise of the memory" in page and not re.search(r"(src|href)=\"(?!data:)", page)
    assert (tmp_path / "a" / "trace.svg").read_text().count("<svg ") == 1


def test_a_prompt_is_continued_and_passages_are_looked_up(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text(TEXT[:100])
    assert rmse_index([str(model), str(tmp_path / "notes"), "-o", str(tmp_path / "kb")]) == 0
    flags = ("-p", TEXT[:90], "-n", 40, "--kb", tmp_path / "kb", "--gamma", -9, "--temperature", 0)
    found = traced(model, tmp_path / "a", *flags)
    assert found["prompt_tokens"] == 90 and len(found["trace"]) == 90 + 40 - 1
    assert found["consultations"] and found["gamma"] == -9
    page = (tmp_path / "a" / "trace.html").read_text()
    assert "Looked up" in page and "written from here" in (tmp_path / "a" / "trace.svg").read_text()
    draw_trace(found, [tmp_path / "again.png", tmp_path / "again.svg"])  # as the command does: the first lays out
    assert (tmp_path / "a" / "trace.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_a_package_says_its_depths(package: Path, checkpoint: Path, tmp_path: Path) -> None:
    flags = ("-p", TEXT[:20], "-n", 12, "--temperature", 0)
    packed, plain = traced(package, tmp_path / "a", *flags), traced(checkpoint, tmp_path / "b", *flags)
    assert [row["depth"] for row in packed["trace"]] == [row["depth"] for row in plain["trace"]]
    assert packed["runtime"] == "onnx" and not packed["trace"][0]["iterations"] and not packed["experts"]


def test_what_cannot_be_followed_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").write_text("A")
    cases: list[tuple[list[object], str]] = [
        ([model, "-p", ""], "--prompt: is empty"),
        ([model, "--text", tmp_path / "one"], "--text: has 1 tokens"),
        ([model], "--prompt"),
        ([ROOT / "models" / "trm-sudoku", "-p", "A"], "reads no text"),
        ([model, "-p", "A", "--max-loops", 9], "--max-loops"),
        ([model, "-p", "A", "--max-tokens", 9], "--max-tokens: is of a text"),
        ([model, "--text", tmp_path / "one", "-n", 9], "--max-new-tokens: is of a prompt"),
    ]
    for argv, needle in cases:
        assert rmse_trace([*map(str, argv), "-o", str(tmp_path / "out")]) == 2
        assert_one_line(capsys.readouterr().err, "rmse-trace: error:", needle)
        assert not (tmp_path / "out").exists()
