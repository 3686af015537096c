"""The pipe between `python -m benchmarks` and what it times, with contestants made up, and with real ones."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import random_tokens

from benchmarks.artifacts import Artifacts
from benchmarks.child import ROOT, Child, Failed
from benchmarks.field import BASELINE, Timed, child
from benchmarks.first_token import first_tokens
from benchmarks.llama import VERSION, version_of
from benchmarks.rounds import run_section
from benchmarks.shapes import HrmText, Looped, Twin

MADE_UP = """
import os, sys, time
from benchmarks.contestants.protocol import serve

class MadeUp:
    facts = {"weights": {"loop": 1, "once": 2}}

    def measure(self, test, tokens, loops):
        print("an engine prints this"), os.system("echo and this")
        if tokens == 13:
            raise ValueError("13 is unlucky\\nand more")
        if tokens == 99:
            time.sleep(60)
        if tokens == 7:
            sys.stderr.write("out of memory\\n"), os._exit(9)
        return {"tok_per_s": tokens / (loops or 1)}

def start(given):
    if given.get("broken"):
        raise RuntimeError(given["broken"])
    return MadeUp()

serve(start)
"""


def made_up(folder: Path, limit: float = 60, **given: str) -> Child:
    return Child([sys.executable, "-c", MADE_UP, json.dumps(given)], folder / "log", limit)


def test_answers_are_apart_from_what_an_engine_prints(tmp_path: Path):
    opened = made_up(tmp_path)
    try:
        assert opened.facts == MADE_UP_FACTS
        assert opened.ask(test="tg", tokens=8, loops=4) == {"tok_per_s": 2.0}
        assert opened.ask(test="tg", tokens=8, loops=None) == {"tok_per_s": 8.0}
        assert "an engine prints this" in (tmp_path / "log").read_text()
        assert "and this" in (tmp_path / "log").read_text()
        if sys.platform == "linux":
            assert (opened.peak_bytes() or 0) > 1 << 20
    finally:
        opened.close()
    assert opened.process.returncode == 0


MADE_UP_FACTS = {"weights": {"loop": 1, "once": 2}}


def test_a_measurement_that_fails_is_a_line_and_the_next_one_works(tmp_path: Path):
    opened = made_up(tmp_path)
    try:
        with pytest.raises(Failed, match=r"^13 is unlucky$"):
            opened.ask(test="tg", tokens=13, loops=4)
        assert opened.ask(test="tg", tokens=8, loops=4) == {"tok_per_s": 2.0}
    finally:
        opened.close()


def test_a_contestant_that_does_not_open_says_why(tmp_path: Path):
    with pytest.raises(Failed, match=r"^no such model$"):
        made_up(tmp_path, broken="no such model")


def test_a_process_that_ends_is_reported_with_its_last_words(tmp_path: Path):
    opened = made_up(tmp_path)
    try:
        with pytest.raises(Failed, match=r"^its process ended with code 9: out of memory$"):
            opened.ask(test="tg", tokens=7, loops=4)
        with pytest.raises(Failed):
            opened.ask(test="tg", tokens=8, loops=4)
    finally:
        opened.close()


def test_one_that_takes_too_long_is_ended(tmp_path: Path):
    opened = made_up(tmp_path)
    opened.limit = 0.5
    try:
        with pytest.raises(Failed, match=r"^no answer within 0.5 s$"):
            opened.ask(test="tg", tokens=99, loops=4)
    finally:
        opened.close()
    assert opened.process.returncode != 0


# ---------------------------------------------------------------------------------------------------------- real ones


@pytest.mark.slow
@pytest.mark.native
def test_the_runner_answers(runner: Path, executorch_package: Path, tmp_path: Path):
    """It reads the package's own sample, at a depth and stopping by itself, and counts its own memory."""
    given = {"runner": str(runner), "package": str(executorch_package), "threads": 1}
    opened = Child(child(sys.executable, "native", given), tmp_path / "log", 300)
    try:
        fixed = opened.ask(test="tg", tokens=4, loops=2)
        assert fixed["mean_loops"] == 2 and fixed["tok_per_s"] > 0 and fixed["gb_per_s"] > 0
        alone = opened.ask(test="pp", tokens=64, loops=None)
        assert 1 <= alone["mean_loops"] <= 4 and alone["gb_per_s"] is None
        assert alone["peak_bytes"] > 1 << 20
        with pytest.raises(Failed, match=r"expected 1\.\.4"):
            opened.ask(test="tg", tokens=4, loops=9)
    finally:
        opened.close()


@pytest.mark.slow
@pytest.mark.native
def test_first_tokens_of_the_runner(
    runner: Path, executorch_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = Artifacts(tmp_path / "cache", None, runner, print)
    monkeypatch.setattr(files, "package", lambda model, target: executorch_package)
    model = Looped("tiny", {"max_loops": 4}, Twin(64, 96, 4, 65))
    cold, warm = first_tokens(model, 1, ["rmse-runner"], 2, files, 60)
    assert len(warm.seconds) == 2 and min(warm.seconds) > 0 and warm.failed is None
    assert len(cold.seconds) == 2 or "no cold start" in (cold.failed or "")


@pytest.mark.slow
@pytest.mark.onnx
def test_a_package_answers(package: Path, tmp_path: Path):
    """At a depth and stopping by itself, on its own text; a row that was not asked for at the start is refused."""
    arguments = [str(package), "-p", "64", "-n", "4", "-d", "2", "-t", "1"]
    opened = Child(child(sys.executable, "in_python", {"arguments": arguments}), tmp_path / "log", 300)
    try:
        assert opened.ask(test="pp", tokens=64, loops=2)["mean_loops"] == 2
        assert 1 <= opened.ask(test="tg", tokens=4, loops=None)["mean_loops"] <= 4
        with pytest.raises(Failed):
            opened.ask(test="tg", tokens=5, loops=2)
    finally:
        opened.close()


def llama_python() -> Path:
    """LLAMA_PYTHON, or the environment that the command makes."""
    given = os.environ.get("LLAMA_PYTHON")
    python = Path(given) if given else ROOT / "build" / "benchmarks" / f"llama-cpp-python-{VERSION}" / "bin" / "python"
    if version_of(python) != VERSION:
        pytest.skip(
            f"needs llama-cpp-python {VERSION} and gguf: make benchmarks makes the environment, or LLAMA_PYTHON=FILE"
        )
    return python


@pytest.mark.slow
def test_llama_cpp_runs_a_twin(tmp_path: Path):
    python = llama_python()
    files = Artifacts(tmp_path / "cache", python, tmp_path / "no-runner", print)
    model = Looped("tiny", {"max_loops": 4}, Twin(64, 96, 2, 65, layers=2))
    cells, facts = run_section(model, 1, [BASELINE], Timed(70, 4), 2, files, 300, print)
    for cell in cells:
        assert cell.failed is None and sorted(cell.speeds) == [1, 2] and cell.ratio(cells) == 1.0
    twin = files.gguf(model.twin)
    # Q4_0: 18 bytes for 32 weights; norms are float32; the rest is the file's own description.
    matrices = 2 * 65 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96)
    assert 0 < twin.stat().st_size - matrices * 18 / 32 - 5 * 64 * 4 < 4096
    assert facts[BASELINE]["parameters"] == matrices + 5 * 64
    cold, warm = first_tokens(model, 1, [BASELINE], 1, files, 300)
    assert warm.failed is None and (cold.seconds or "no cold start" in (cold.failed or ""))


@pytest.mark.slow
def test_llama_cpp_runs_hrm_text(tmp_path: Path):
    """Its stacks several times, from a file that has each once."""
    files = Artifacts(tmp_path / "cache", llama_python(), tmp_path / "no-runner", print)
    own = HrmText(64, 96, 2, 65, layers=1)
    cells, facts = run_section(Looped("tiny", own.config(), own), 1, [BASELINE], Timed(70, 4), 1, files, 300, print)
    assert [cell.failed for cell in cells] == [None, None]
    assert facts[BASELINE]["parameters"] == 2 * 65 * 64 + 2 * (5 * 64 * 64 + 3 * 64 * 96) + 64  # and what L begins with


def test_random_tokens_are_of_the_vocabulary(tmp_path: Path):
    files = Artifacts(tmp_path / "cache", None, tmp_path / "no-runner", print)
    ids = np.load(files.ids(65, 200))
    assert len(ids) == 200 and ids.max() < 65 and (ids == random_tokens(200)).all()
