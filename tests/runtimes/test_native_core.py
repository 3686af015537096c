"""The runner's core by itself: no engine's headers, and the numbers and tokens of tests/data/sampler.json."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from paths import NATIVE, ROOT

from rmse_edge.info import ModelInfo, TextInfo
from rmse_edge.loop.contract import LoopSpec, TensorSpec
from rmse_edge.loop.dials import Dials
from rmse_edge.package import MANIFEST, seal
from rmse_edge.runtimes.host.text import LoopRuntime

pytestmark = [pytest.mark.native, pytest.mark.slow]

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
        "-pthread",
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


def tensor(name: str, dtype: str, *shape: int, **more: int) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": shape} | more


DEVIATIONS = {"start": 0.3, "turn": 2.0}  # of the noise that the model begins from


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """A package of the model that native_core.cpp computes: three kinds of state, each of which keeps x0."""
    tokens, slots = tensor("tokens", "int64", 1, 1), tensor("slots", "int64", 12, slots_axis=0)
    noise = [tensor(name, "float32", 1, 1, 1) for name in DEVIATIONS]
    x0, h = tensor("x0", "float32", 1, 1, 1), tensor("h", "float32", 1, 1, 1)
    depth, active, k = tensor("depth", "int64", 1, 1), tensor("active", "bool", 1, 1), tensor("k", "int64")
    state = {
        name: {"shape": [1, size, 1], "dtype": "float32", "kind": kind, "source": "x0", "read_by": ["prelude"], "per_loop": False}
        for name, kind, size in (("all", "append", 12), ("last", "ring", 3), ("latest", "replace", 1))
    }  # fmt: skip
    kept = [
        tensor(name, "float32", *s["shape"], **({"slots_axis": 1} if name == "all" else {}))
        for name, s in state.items()
    ]
    folder = tmp_path / "counting.rmse"
    folder.mkdir()
    (folder / "program").write_text("none: the engine is a part of the test")
    methods = {
        "prelude_1": ([tokens, slots, *noise, *kept], [x0]),
        "begin_1": ([x0], [h | {"name": "first_h"}, active | {"name": "first_active"}]),
        "step_1": (
            [k, h, active, depth, x0],
            [*(t | {"name": f"next_{t['name']}"} for t in (h, active, depth)), tensor("any_active", "bool")],
        ),
        "coda_1": ([h], [h | {"name": "y"}]),
        "head_1": ([h | {"name": "y"}], [tensor("logits", "float32", 1, 1, 4)]),
    }
    manifest = {
        "target": "counting",
        "model": {
            "name": "counting", "target": "counting", "model_type": "counting", "quant": "fp32", "max_loops": 3,
            "dials": {"max_loops": 3}, "rules": ["max_loops"], "width": 1, "parameters": 0, "chunks": [1], "segment": None,
            "methods": ["prelude", "loop", "head", "coda"], "state": state, "noise": DEVIATIONS, "page": 4,
            "text": {"vocab_size": 4},
        },
        "quantization": {"weights": "fp32"},
        "methods": {name: {"inputs": takes, "outputs": gives} for name, (takes, gives) in methods.items()},
        "lowering": {"program": "program"},
    }  # fmt: skip
    seal(folder, manifest)
    return folder


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """The numbers on record, and what a Python host fills the inputs of that model's first calls with."""
    spec = LoopSpec(1, 3, (), (), TensorSpec("h", (1, 1, 1)), TensorSpec("active", (1, 1)), (), noise=DEVIATIONS)
    info = ModelInfo.of_spec(
        {1: spec}, name="counting", target="torch", model_type="counting", dials=Dials(3), parameters=0, nbytes=0,
        text=TextInfo(4),
    )  # fmt: skip
    host = LoopRuntime(info, cast(Any, None))
    host.noise_seed = 2**63 + 5
    drawn = [host.inputs(1, np.zeros(1, np.int64), position) for position in range(4)]
    start = {name: [given[name].item() for given in drawn] for name in DEVIATIONS}
    path = tmp_path / "golden.json"
    path.write_text(json.dumps(json.loads(GOLDEN.read_text()) | {"start": {"seed": str(host.noise_seed)} | start}))
    return path


def test_the_core_needs_no_engine_of_others(program: Path, counting: Path, golden: Path) -> None:
    """Numbers and tokens on record, and a package that an engine of the test's own runs: state, a coda, noise."""
    done = subprocess.run([program, golden, counting], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("part", ["words", "uniform", "noise", "tokens", "start"])
def test_other_numbers_are_noticed(program: Path, counting: Path, golden: Path, part: str) -> None:
    known = json.loads(golden.read_text())
    (known[part] if part == "start" else known[part][-1]).update(seed="8", options={"temperature": 2.0, "seed": "8"})
    golden.write_text(json.dumps(known))
    done = subprocess.run([program, golden, counting], capture_output=True, text=True)
    assert done.returncode == 1 and "expected" in done.stdout


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1, 3_000_001])
def test_digests_are_those_of_python(program: Path, tmp_path: Path, size: int) -> None:
    """By the instructions that this processor has for it, and in plain C++; two files side by side."""
    content, lengths = np.random.default_rng(size).bytes(size), 201
    file = tmp_path / "content"
    file.write_bytes(content)
    done = subprocess.run([program, "sha256", file, str(lengths)], capture_output=True, text=True, check=True)
    *found, of_file, first, second = done.stdout.split()
    expected = [hashlib.sha256(content[:n]).hexdigest() for n in (*range(lengths), size)]
    ways = [found[i : i + 1 + len(expected)] for i in range(0, len(found), 1 + len(expected))]
    assert [way[1:] for way in ways] == [expected] * len(ways) and ways[-1][0] == "plain"
    assert of_file == first == expected[-1] and second == hashlib.sha256(content[lengths:]).hexdigest()
    if "sha_ni" in Path("/proc/cpuinfo").read_text():
        assert ways[0][0] == "x86"


# Parts of a program of 300,000 bytes: what an engine would parse, weights, and that again.
CUT = [{"bytes": 50_000}, *[{"bytes": 50_000, "weights": True}] * 4, {"bytes": 50_000}]


@pytest.fixture
def in_parts(counting: Path) -> Path:
    (counting / "program").write_bytes(np.random.default_rng(0).bytes(300_000))
    seal(counting, json.loads((counting / MANIFEST).read_text()) | {"parts": {"program": {"parts": CUT}}})
    return counting


def stages(program: Path, package: Path, meanwhile: str = "", *before: str) -> list[str]:
    done = subprocess.run([*before, program, "stages", package, meanwhile], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_weights_are_computed_with_before_they_are_verified_and_nothing_is_given(program: Path, in_parts: Path) -> None:
    """A flipped bit anywhere: where an engine would parse it, the package is not opened; of a weight, no call gives anything.

    On one core there are no threads: who waits verifies. On others a thread may have seen a damaged weight before.
    """
    if shutil.which("taskset") is None:
        pytest.skip("needs taskset")
    alone = ("taskset", "-c", "0")
    assert stages(program, in_parts) == stages(program, in_parts, "", *alone) == ["opened", "fed", "computed", ""]
    file, said = in_parts / "program", "its SHA-256 is not that in SHA256SUMS; the file is damaged, export again"
    whole = file.read_bytes()
    for at in (0, 49_999, 50_000, 149_999, 150_000, 249_999, 250_000, 299_999):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        expected = ["opened", "computed"] if 50_000 <= at < 250_000 else []
        assert stages(program, in_parts, "", *alone) == [*expected, f"{file}: {said}"], at
        *reached, line = stages(program, in_parts)
        assert line == f"{file}: {said}" and reached == expected[: len(reached)]
    file.write_bytes(whole)
    assert "fed" in stages(program, in_parts)


@pytest.mark.parametrize("meanwhile", ["cut", "written"])
def test_a_file_that_changes_while_it_is_verified_gives_nothing(program: Path, in_parts: Path, meanwhile: str) -> None:
    """Whether before its parts are read or after."""
    *reached, line = stages(program, in_parts, meanwhile)
    assert reached in (["opened"], ["opened", "computed"]) and line.startswith(f"{in_parts / 'program'}: ")
    said = ("was written to while it was in use", "cannot be read to its end", "its SHA-256 is not that")
    assert any(what in line for what in said)
