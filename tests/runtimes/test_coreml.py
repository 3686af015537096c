"""Core ML packages: what is in them, what the runtime makes of them, and what is refused.

They run on the interpreter here, which tests/runtimes/test_mil.py and tests/runtimes/test_mil_operators.py hold to its own account.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    FEW,
    assert_memory_and_hits_take_part,
    assert_one_line,
    decided_text,
    random_tokens,
    refused_export,
    reseal,
)

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.cli.evaluate import main as rmse_eval
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import PackageError, UserError
from rmse_edge.package import Package
from rmse_edge.quantize import Quantized
from rmse_edge.runtimes import Dials, open_runtime
from rmse_edge.runtimes.engines.coreml import CoremlMethods, CoremlRuntime
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.base import Arrays
from rmse_edge.runtimes.host.session import SessionError, restore_session, save_session
from rmse_edge.runtimes.mil.file import ModelFile, operations

pytestmark = [pytest.mark.coreml, pytest.mark.slow]

FULL, ADAPTIVE = Dials(4), Dials(4, 1, 0.6)
FUNCTIONS = [f"{name}_{rows}" for rows in (1, 64) for name in ("prelude", "begin", "step", "loop", "head", "commit")]
SEGMENTS = ["blank_64", "memorize_64", "embed_segment_64"]
WEIGHTS = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"


def runtime_of(folder: Path) -> CoremlRuntime:
    runtime = open_runtime(folder)
    assert isinstance(runtime, CoremlRuntime)
    return runtime


# ------------------------------------------------------------------------------------------------------ the package


def test_an_fp32_package_passed_the_exact_rule(coreml_package: Path) -> None:
    """All settings and every function; keys and values go in and out."""
    manifest = Package.open(coreml_package).manifest
    assert list(manifest["methods"]) == FUNCTIONS
    parity = manifest["parity"]
    assert parity["rule"] == "exact" and list(parity["settings"]) == ["full depth", "gate", "delta"]
    assert all(s["positions"] >= 200 and s["same_depth"] == 1 for s in parity["settings"].values())
    assert set(parity["methods"]) == set(FUNCTIONS)
    assert manifest["lowering"]["rings"] == {} and manifest["lowering"]["structure"]["state_writes"] == 0
    assert "past_keys" in {t["name"] for t in manifest["methods"]["step_1"]["inputs"]}
    assert [t["name"] for t in manifest["methods"]["commit_64"]["outputs"]] == ["keys", "values"]


def test_an_int4_package_passed_the_rounded_rule_with_states_memory_and_hits(coreml_int4: Path) -> None:
    manifest = Package.open(coreml_int4).manifest
    assert set(manifest["methods"]) == {*FUNCTIONS, *SEGMENTS} == set(manifest["parity"]["methods"])
    parity = manifest["parity"]
    assert parity["rule"] == "rounded"
    for setting in parity["settings"].values():
        assert setting["positions"] >= 200 and setting["same_top_token"] >= 0.98 and setting["same_depth"] >= 0.97
    assert parity["memory"]["writes"]["memory_up"] <= 1e-4  # it is float32 in every package
    assert manifest["model"]["config"]["kv_dtype"] == "float16"
    assert manifest["quantization"]["accuracy_level"] == 0
    structure = manifest["lowering"]["structure"]
    assert structure["state_writes"] == 4  # two rings in calls of two sizes
    assert structure["weight_bytes"] <= 1.05 * structure["ideal_bytes"]


def test_states_are_of_sizes_that_every_engine_takes(coreml_int4: Path) -> None:
    """Heads of 16 channels lie in states of 32, and who looks at a state sees 16."""
    file = ModelFile(coreml_int4 / "model.mlpackage")
    rings = Package.open(coreml_int4).manifest["lowering"]["rings"]
    for name in ("step_1", "step_64", "loop_1", "commit_64"):
        states = file.function(name).states
        assert {k: (t.shape, t.dtype) for k, t in states.items()} == {
            k: (tuple(r["shape"]), "float16") for k, r in rings.items()
        }
    assert rings["past_keys"] == {"shape": [4, 2, 64, 32], "held": [4, 1, 2, 64, 16]}
    assert not file.function("head_1").states
    runtime = runtime_of(coreml_int4)
    assert runtime.tensors()["past_keys"].shape == (4, 1, 2, 64, 16) and "past_keys" not in runtime.state


def test_what_decides_computes_in_float32(coreml_int4: Path) -> None:
    """The router and the exit gate, and no other product of a step; memories are written in float32 altogether."""
    file = ModelFile(coreml_int4 / "model.mlpackage")
    for name in ("step_1", "loop_64"):
        products = [op for op in operations(file.function(name)) if op.kind in ("linear", "matmul")]
        full = [op for op in products if "float32" in {t.dtype for t in op.outputs.values()}]
        assert len(full) == 2 and len(products) > 12
        shapes = {t.shape[-1] for op in full for t in op.outputs.values()}
        assert shapes == {32, 1}  # experts, and the gate's one number
    written = operations(file.function("memorize_64"))
    assert not any(t.dtype == "float16" for op in written for t in op.outputs.values())


def test_the_loop_is_in_the_graph_and_step_has_none(coreml_package: Path) -> None:
    """Control flow is not for the GPU and the Neural Engine, so what the host drives has none."""
    file = ModelFile(coreml_package / "model.mlpackage")
    kinds = {name: Counter(op.kind for op in operations(file.function(name))) for name in file.functions}
    assert {name for name, found in kinds.items() if found["while_loop"]} == {"loop_1", "loop_64"}
    assert kinds["loop_64"]["linear"] == kinds["step_64"]["linear"] > 5
    weights = list(file.blobs(file.function("loop_64")))
    assert len(weights) > 20 and not [b for b in weights if ".body." in b.place]  # or they would be stored again


# ------------------------------------------------------------------------------------------------------ the runtime


@pytest.mark.parametrize("dials", [FULL, ADAPTIVE, Dials(2), Dials(4, 3, 0.3)])
def test_depths_and_iterations_are_pytorchs(coreml_package: Path, tiny: RMSE, dials: Dials) -> None:
    """The loop in the graph runs as often as the deepest position needs, over the ring's wrap-around."""
    runtime, reference = runtime_of(coreml_package), TorchRuntime(tiny, "tiny")
    tokens = decided_text(150)
    fed, expected = runtime.feed(tokens, dials), reference.feed(tokens, dials)
    np.testing.assert_array_equal(fed.depth, expected.depth)
    assert fed.iterations == expected.iterations
    np.testing.assert_allclose(fed.logits, expected.logits, atol=1e-4)


@pytest.mark.parametrize("fixture", ["coreml_package", "coreml_int4"])
def test_both_loops_are_the_same_and_stop_for_real(
    fixture: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Driven by the host or in the graph: equal to the last bit, and `step` runs no more often than it must."""
    runtime = runtime_of(request.getfixturevalue(fixture))
    tokens = random_tokens(100, seed=12, vocab=runtime.info.vocab_size)
    in_graph = runtime.feed(tokens, ADAPTIVE)
    runtime.reset()
    calls: Counter[str] = Counter()
    plain = CoremlMethods.call

    def counted(self: CoremlMethods, function: str, feeds: Any) -> Arrays:
        calls[function] += 1
        return plain(self, function, feeds)

    monkeypatch.setattr(CoremlMethods, "call", counted)
    runtime.calls.loop = "host_loop"
    by_host = runtime.feed(tokens, ADAPTIVE)
    np.testing.assert_array_equal(in_graph.logits, by_host.logits)
    np.testing.assert_array_equal(in_graph.depth, by_host.depth)
    assert calls["step_1"] + calls["step_64"] == sum(by_host.iterations) and calls["loop_64"] == 0
    assert len(set(by_host.depth)) > 1


def test_packages_for_gpu_and_neural_engine_are_driven_by_the_host(coreml_package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "gpu.rmse"
    shutil.copytree(coreml_package, copy)
    reseal(copy, lambda manifest: manifest["lowering"].update(compute="gpu"))
    assert runtime_of(copy).calls.loop == "host_loop" and runtime_of(coreml_package).calls.loop == "loop"


@pytest.mark.parametrize("fixture", ["coreml_package", "coreml_int4"])
def test_one_token_at_a_time_reads_what_long_calls_left(fixture: str, request: pytest.FixtureRequest) -> None:
    """Chunked and single calls of the same text agree, over the window's end and with early exits."""
    runtime = runtime_of(request.getfixturevalue(fixture))
    tokens = random_tokens(150, seed=12, vocab=runtime.info.vocab_size)
    at_once = runtime.feed(tokens, ADAPTIVE)
    runtime.reset()
    singly = [runtime.feed(tokens[i : i + 1], ADAPTIVE) for i in range(len(tokens))]
    depth, logits = (np.concatenate([getattr(f, part) for f in singly]) for part in ("depth", "logits"))
    if fixture == "coreml_package":
        np.testing.assert_array_equal(at_once.depth, depth)
        np.testing.assert_allclose(at_once.logits, logits, atol=1e-4)
    else:
        assert (at_once.depth == depth).mean() > 0.97
        assert (at_once.logits.argmax(-1) == logits.argmax(-1)).mean() > 0.97


def test_rmse_run_writes_what_pytorch_writes(
    coreml_package: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = []
    for folder in (checkpoint, coreml_package):
        assert rmse_run([str(folder), "-p", "HELLO", "-n", "60", "--temperature", "0", "-o", "json"]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0]["tokens"] == documents[1]["tokens"] and documents[0]["depth"] == documents[1]["depth"]
    assert documents[1]["runtime"] == "coreml (interpreted)"  # whoever reads its times must see what took them


def test_rmse_eval_reads_a_package(coreml_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rmse_eval([str(coreml_package), "--max-tokens", "128", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["runtime"] == "coreml (interpreted)"


@pytest.mark.parametrize("fixture", ["coreml_package", "coreml_int4"])
def test_sessions_take_states_along(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """What the engine keeps is saved and put back: a text goes on in another runtime as if nothing had happened."""
    folder = request.getfixturevalue(fixture)
    runtime = runtime_of(folder)
    tokens = random_tokens(110, seed=12, vocab=runtime.info.vocab_size)
    runtime.feed(tokens[:90], ADAPTIVE)
    save_session(runtime, tmp_path / "s.session", [])
    expected = runtime.feed(tokens[90:], ADAPTIVE).logits
    other = runtime_of(folder)
    other.feed(tokens[:5], ADAPTIVE)
    restore_session(other, tmp_path / "s.session")
    assert other.position == 90
    np.testing.assert_array_equal(other.feed(tokens[90:], ADAPTIVE).logits, expected)
    other.reset()
    assert other.position == 0 and not any(array.any() for array in other.tensors().values() if array.ndim == 5)
    fresh = runtime_of(folder).feed(tokens[:20], ADAPTIVE).logits
    np.testing.assert_array_equal(other.feed(tokens[:20], ADAPTIVE).logits, fresh)


def test_a_session_begun_by_pytorch_goes_on_here(coreml_package: Path, tiny: RMSE, tmp_path: Path) -> None:
    tokens = decided_text(100)
    reference = TorchRuntime(tiny, "tiny")
    reference.feed(tokens[:70], FULL)
    save_session(reference, tmp_path / "s.session", [])
    runtime = runtime_of(coreml_package)
    restore_session(runtime, tmp_path / "s.session")
    found, expected = runtime.feed(tokens[70:], FULL), reference.feed(tokens[70:], FULL)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)


def test_a_session_with_another_cache_is_refused(coreml_int4: Path, calm: Quantized, tmp_path: Path) -> None:
    """The model has an int8 cache, its Core ML package a float16 one."""
    reference = TorchRuntime(calm.model, "mem")
    reference.info = runtime_of(coreml_int4).info  # even if they go by the same name
    reference.feed(random_tokens(10, vocab=FEW), FULL)
    save_session(reference, tmp_path / "s.session", [])
    with pytest.raises(SessionError, match="its tensors are not those of"):
        restore_session(runtime_of(coreml_int4), tmp_path / "s.session")


def test_memory_and_hits_take_part(coreml_int4: Path, calm: Quantized) -> None:
    assert_memory_and_hits_take_part(runtime_of(coreml_int4), calm)


def test_reading_a_passage_alone_leaves_the_text_as_it_was(coreml_int4: Path) -> None:
    """What a knowledge base is searched with is made from an empty past, beside states that are not empty."""
    runtime = runtime_of(coreml_int4)
    tokens = random_tokens(100, seed=1, vocab=FEW)
    key, _ = runtime.embed(tokens[:40])
    runtime.feed(tokens, FULL)
    before = {name: np.array(array) for name, array in runtime.tensors().items()}
    again, _ = runtime.embed(tokens[:40])
    np.testing.assert_array_equal(key, again)
    for name, array in runtime.tensors().items():
        np.testing.assert_array_equal(before[name], array, name)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--compute", "ane"], ["--compute ane", "no fp32", "--quant fp16"]),
        (["--compute", "ane", "--dry-run"], ["--compute ane", "no fp32"]),
        (["--quant", "fp16", "--accuracy-level", "4"], ["--accuracy-level 4", "--quant fp16"]),
        (["--quant", "int8", "--calibrate", "x", "--accuracy-level", "4"], ["--accuracy-level 4", "does not round"]),
        (["--no-compact"], ["--no-compact", "coreml"]),
        (["--target", "onnx", "--compute", "gpu"], ["--compute gpu", "onnx"]),
        (["--quant", "int3"], ["--quant", "int3"]),
    ],
)
def test_what_the_target_cannot_do_is_one_line(
    checkpoint: Path, tmp_path: Path, flags: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused_export("coreml", checkpoint, tmp_path, flags) == 2
    assert_one_line(capsys.readouterr().err, *parts)
    assert not list(tmp_path.glob("*.rmse"))


def test_an_unknown_compute_unit_lists_those_there_are(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rmse_export(["--target", "coreml", "-m", str(checkpoint), "--compute", "npu"]) == 2
    assert_one_line(capsys.readouterr().err, "npu", "cpu", "gpu", "ane")


@pytest.mark.parametrize("quant", ["fp32", "int4"])
def test_a_dry_run_says_what_there_will_be(
    checkpoint: Path, quant: str, capsys: pytest.CaptureFixture[str], coreml_package: Path
) -> None:
    flags = ["--method", "rtn"] if quant == "int4" else []
    command = ["--target", "coreml", "-m", str(checkpoint), "--quant", quant, "--dry-run", "--format", "json", *flags]
    assert rmse_export(command) == 0
    described = json.loads(capsys.readouterr().out)
    names = {side: set(t) for side, t in described["methods"]["step_64"].items()}
    assert ("past_keys" in names["inputs"]) == (quant == "fp32")
    if quant == "fp32":
        methods = Package.open(coreml_package).manifest["methods"]
        for name, sides in described["methods"].items():
            for side, tensors in sides.items():
                assert tensors == {t["name"]: [t["shape"], t["dtype"]] for t in methods[name][side]}


def truncated(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def half_a_program(folder: Path) -> None:
    path = folder / "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "parts", "sealed"),
    [
        (truncated, ["weight.bin", "truncated"], ["weight.bin", "export the package again"]),
        (without_weights, ["weight.bin", "missing"], ["weight.bin", "export the package again"]),
        (half_a_program, ["model.mlmodel", "truncated"], ["model.mlmodel", "export the package again"]),
    ],
)
def test_a_damaged_package_is_one_line(
    coreml_package: Path, tmp_path: Path, damage: Any, parts: list[str], sealed: list[str]
) -> None:
    """By the package's hashes; and where these were made anew, by the reader of the program."""
    copy = tmp_path / "p.rmse"
    shutil.copytree(coreml_package, copy)
    damage(copy)
    with pytest.raises(PackageError) as refused:
        open_runtime(copy)
    assert_one_line(str(refused.value), *parts)
    reseal(copy)
    with pytest.raises(PackageError) as refused:
        runtime_of(copy).feed([1, 2, 3], FULL)
    assert_one_line(str(refused.value), *sealed)


def test_a_wrong_function_or_shape_is_one_line(coreml_package: Path) -> None:
    methods = runtime_of(coreml_package).methods
    with pytest.raises(PackageError) as refused:
        methods.run("step", 7, {})
    assert_one_line(str(refused.value), "no step for 7 rows", "step_64")
    with pytest.raises(ValueError, match=r"h: got \(1, 2, 64\), expected \(1, 1, 64\)"):
        methods.run("head", 1, {"h": np.zeros((1, 2, 64), np.float32)})
    with pytest.raises(UserError, match="no function foo"):
        methods.engine.predict("foo", {})


def test_a_manifest_of_another_target_is_one_line(coreml_package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "p.rmse"
    shutil.copytree(coreml_package, copy)
    reseal(copy, lambda manifest: manifest["lowering"].pop("rings"))
    with pytest.raises(PackageError) as refused:
        open_runtime(copy)
    assert_one_line(str(refused.value), "lowering.rings: is missing", "export the package again")


def test_threads_are_refused(coreml_package: Path) -> None:
    with pytest.raises(UserError, match=r"^threads: "):
        open_runtime(coreml_package, threads=2)
