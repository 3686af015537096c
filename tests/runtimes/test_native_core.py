"""The runner's core by itself: no engine's headers, and the numbers and tokens of tests/data/sampler.json."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rmse_edge.package import seal

pytestmark = [pytest.mark.native, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "runtimes" / "native"
GOLDEN = ROOT / "tests" / "data" / "sampler.json"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """native_core.cpp with all of core/, compiled as an app without ExecuTorch would."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("core") / "native_core"
    sources = [Path(__file__).with_name("native_core.cpp"), *sorted((NATIVE / "core").glob("*.cpp"))]
    flags = ["-std=c++20", "-O0", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-missing-field-initializers"]
    command = [
        "g++",
        *flags,
        f"-I{NATIVE}",
        "-isystem",
        str(NATIVE / "third_party"),
        *map(str, sources),
        "-o",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return path


def tensor(name: str, dtype: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": shape}


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """A package of the model that native_core.cpp computes."""
    tokens, x0, h = tensor("tokens", "int64", 1, 1), tensor("x0", "float32", 1, 1, 1), tensor("h", "float32", 1, 1, 1)
    depth, k = tensor("depth", "int64", 1, 1), tensor("k", "int64")
    sizes = {"vocab_size": 4, "max_loops": 3, "window": 64, "rope_theta": 10000.0}
    dials = {"max_loops": 3, "min_loops": 1, "exit_threshold": 1.0, "exit_epsilon": 0.0, "exit_entropy": 0.0}
    folder = tmp_path / "counting.rmse"
    folder.mkdir()
    (folder / "program").write_text("none: the engine is a part of the test")
    methods = {
        "prelude_1": ([tokens], [x0]),
        "begin_1": ([x0], [h | {"name": "first_h"}]),
        "step_1": (
            [k, h, depth, x0],
            [h | {"name": "next_h"}, depth | {"name": "next_depth"}, tensor("any_active", "bool")],
        ),
        "head_1": ([h], [tensor("logits", "float32", 1, 1, 4)]),
        "commit_1": ([h], []),
    }
    manifest = {
        "target": "counting",
        "model": {
            "name": "counting", "quant": "fp32", **sizes, "rotary_dims": 2, "parameters": 0, "chunks": [1],
            "dials": dials, "state": {}, "rings": {},
            "config": {**sizes, "d_model": 1, "exit_rules": ["gate"]},
        },
        "methods": {name: {"inputs": takes, "outputs": gives} for name, (takes, gives) in methods.items()},
        "lowering": {"program": "program"},
    }  # fmt: skip
    seal(folder, manifest)
    return folder


def test_the_core_needs_no_engine_of_others(program: Path, counting: Path) -> None:
    """Numbers and tokens on record, and a package that an engine of the test's own runs."""
    done = subprocess.run([program, GOLDEN, counting], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("part", ["words", "uniform", "noise", "tokens"])
def test_other_numbers_are_noticed(program: Path, counting: Path, tmp_path: Path, part: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    golden[part][-1] |= {"seed": "8", "options": {"temperature": 2.0, "seed": "8"}}
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    done = subprocess.run([program, tmp_path / "golden.json", counting], capture_output=True, text=True)
    assert done.returncode == 1 and "expected" in done.stdout
