"""Well-sealed files that lie: refused by one line that names the field, before anything is run or allocated by them.

A small sample of the cases of `python -m tests.fuzz`, and the lies that a fuzzer rarely tells.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_one_line, remembering_model, reseal
from safetensors.numpy import save_file

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.arch.rmse.costs import parameters
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import CheckpointError, PackageError, UserError
from rmse_edge.package import Package
from rmse_edge.quantize import Quantized
from rmse_edge.quantize.store import load_quantized, save_quantized
from rmse_edge.runtimes import ModelInfo, open_runtime
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.session import SessionError, digest, restore_session, save_session
from rmse_edge.runtimes.host.signatures import read_model
from rmse_edge.text import train_character_tokenizer

ROOT = Path(__file__).resolve().parents[2]
Change = Callable[[dict[str, Any]], object]


def resealed(source: Path, folder: Path, change: Change) -> Path:
    """A copy of a package with a changed manifest, whose hash fits again."""
    shutil.copytree(source, folder, copy_function=os.link)
    reseal(folder, change)
    return folder


def model(**values: Any) -> Change:
    return lambda manifest: manifest["model"].update(values)


def text(**values: Any) -> Change:
    return lambda manifest: manifest["model"]["text"].update(values)


def config(**values: Any) -> Change:
    return lambda manifest: manifest["model"]["config"].update(values)


def sized(part: str | None = None, /, **values: Any) -> Change:
    """The configuration, the number of parameters that follows, and the fields of the model or of a part of it."""

    def change(manifest: dict[str, Any]) -> None:
        known = manifest["model"]
        known["config"].update({"d_model" if name == "width" else name: value for name, value in values.items()})
        (known if part is None else known[part]).update(values)
        known["parameters"] = parameters(RMSEConfig.from_dict(known["config"]))

    return change


def of_state(name: str, /, like: str = "past_keys", **values: Any) -> Change:
    """A tensor of the state, with other fields; a new one is like another."""

    def change(manifest: dict[str, Any]) -> None:
        state = manifest["model"]["state"]
        state[name] = state.get(name, state[like]) | values

    return change


def tensor(method: str, side: str, name: str, /, **values: Any) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        next(t for t in manifest["methods"][method][side] if t["name"] == name).update(values)

    return change


def window(size: int) -> Change:
    """As many positions, everywhere but in the program."""

    def change(manifest: dict[str, Any]) -> None:
        config(window=size)(manifest)
        for kept in manifest["model"]["state"].values():
            kept["shape"][-2] = size
        for method in manifest["methods"].values():
            for t in method["inputs"]:
                if t["name"].startswith("past_"):
                    t["shape"][-2] = size

    return change


LIES: dict[str, tuple[Change, str]] = {
    "a type": (text(vocab_size="65"), "model.text.vocab_size: got '65', expected a positive integer"),
    "a flag for a number": (model(max_loops=True), "model.max_loops: got True, expected a whole number from 1 to 64"),
    "no field": (lambda m: m["model"].pop("dials"), "model.dials: is missing"),
    "no model": (lambda m: m.pop("model"), "model: is missing"),
    "a list for the model": (lambda m: m.update(model=[1]), "model: got [1], expected an object"),
    "a dial": (
        lambda m: m["model"]["dials"].update(max_loops=9),
        "model.dials.max_loops: got 9, expected 4, as model.config says",
    ),
    "a dial's type": (
        lambda m: m["model"]["dials"].update(exit_threshold="0.5"),
        "model.dials.exit_threshold: got '0.5'",
    ),
    "the vocabulary": (text(vocab_size=66), "model.text.vocab_size: got 66, expected 65, as model.config says"),
    "the vocabulary, throughout": (
        sized("text", vocab_size=66),
        "logits: got [1, 1, 65] float32, expected [1, 1, 66] float32",
    ),
    "the width": (config(d_model=128), "model.width: got 64, expected 128, as model.config says"),
    "the width, throughout": (sized(width=128), "[1, 1, 64] float32"),
    "the depth, throughout": (
        sized(max_loops=5),
        "model.state.past_keys.shape: got (4, 1, 2, 64, 16), expected (5, 1, 2, 64, 16), as model.config says",
    ),
    "the window": (
        config(window=128),
        "model.state.past_keys.shape: got (4, 1, 2, 64, 16), expected (4, 1, 2, 128, 16), as model.config says",
    ),
    "another cache": (config(kv_dtype="float16"), "model.state.past_keys.dtype: got float32, expected float16"),
    "another state": (of_state("k"), "model.state.k: got a name that hosts give themselves, expected another"),
    "a state of its own kind": (
        of_state("more", kind="mood"),
        "model.state.more.kind: got 'mood', expected one of ring, ",
    ),
    "a state for nobody": (of_state("more", read_by=[]), "model.state.more.read_by: got nothing"),
    "a state for somebody else": (of_state("more", read_by=["mood"]), "model.state.more.read_by[0]: got 'mood'"),
    "a state from nowhere": (of_state("more", source="mood"), "outputs.mood: got no such tensor"),
    "no segment": (lambda m: m["model"].pop("segment"), "model.segment: is missing"),
    "no text": (lambda m: m["model"].pop("text"), "model.text.vocab_size: got None, expected 65, as model.config says"),
    "noise": (model(noise={"start": -1.0}), "model.noise.start: got -1.0, expected a positive number"),
    "noise in place of tokens": (model(noise={"tokens": 1.0}), "model.noise.tokens: got a name that hosts give"),
    "another target for the model": (model(target="torch"), "model.target: got torch, expected "),
    "another quantisation": (model(quant="int4"), "model.quant: got int4, expected fp32, as quantization.weights says"),
    "the parameters": (model(parameters=5), "model.parameters: got 5, expected"),
    "the width of experts": (config(expert_width=64), "model.parameters: got"),
    "a dial that is not the checkpoint's": (
        lambda m: m["model"]["config"].update(exit_threshold=0.5),
        "model.dials.exit_threshold: got 0.6, expected 0.5, as model.config says",
    ),
    "a rule twice": (
        lambda m: m["model"]["config"]["exit_rules"].append("gate"),
        "expected each rule once",
    ),
    "the window, throughout": (window(128), "2, 64, 16] float32, as the program has it"),
    "an enormous window": (config(window=2**40), "window: got 1099511627776"),
    "an enormous state": (
        of_state("more", shape=[4, 2**20, 2**9, 64, 16]),
        "expected at most 4294967296 (4 GiB)",
    ),
    "a configuration": (lambda m: m["model"]["config"].update(n_kv_heads=3), "model.config: n_kv_heads: got 3"),
    "a token": (lambda m: m["model"]["config"].update(eos_token_id="</s>"), "model.config: eos_token_id: got '</s>'"),
    "rows of calls": (model(chunks=[1, 65]), "model.chunks: got [1, 65], expected at most 64 rows"),
    "other rows of calls": (model(chunks=[1, 32]), "prelude_32 among them"),
    "a ring": (
        of_state("past_values", source="keys"),
        "model.state.past_values.source: got keys, expected values, as model",
    ),
    "a ring's name": (
        lambda m: m["model"]["state"].update(past=m["model"]["state"].pop("past_keys")),
        "model.state.past_keys.shape: got None, expected (4, 1, 2, 64, 16)",
    ),
    "a memory": (
        of_state("more", kind="written", source="memorize"),
        "model.remembers: got True, expected False, as model.config says",
    ),
    "a retrieval head": (
        model(retrieval={"key_dims": 16, "slots": 2, "hits": 2, "gamma": 2.0}),
        "model.retrieval: got {'key_dims': 16, 'slots': 2, 'hits': 2, 'gamma': 2.0}, expected None",
    ),
    "a method's input": (
        tensor("head_1", "inputs", "h", shape=[1, 1, 63]),
        "methods.head_1.inputs.h: got [1, 1, 63] float32",
    ),
    "an unknown input": (
        tensor("head_1", "inputs", "h", name="g"),
        "methods.head_1.inputs.g: got a tensor that nothing gives",
    ),
    "a type of a tensor": (
        tensor("head_1", "outputs", "logits", dtype="complex"),
        "dtype: got 'complex', expected one of float32",
    ),
    "a method": (lambda m: m["methods"].pop("head_64"), "head_64 among them"),
    "a file's size": (lambda m: m["sizes"].update({"sample.txt": "2000"}), "sizes.sample.txt: got '2000'"),
    "another size": (
        lambda m: m["sizes"].update({"sample.txt": 7}),
        "2000 bytes, the manifest says 7; written to since? export again",
    ),
    "no sizes": (lambda m: m.pop("sizes"), "sizes: is missing"),
    "a target": (lambda m: m.update(target=["onnx"]), "target: got ['onnx'], expected text"),
    "no lowering": (lambda m: m.pop("lowering"), "lowering: is missing"),
}
OF_TARGET: dict[str, dict[str, tuple[Change, str]]] = {
    "onnx": {
        "a graph": (lambda m: m["lowering"]["graphs"].update(head_1=5), "lowering.graphs.head_1: got 5, expected text"),
        "another graph": (
            lambda m: m["lowering"]["graphs"].update(head_1="prelude.onnx"),
            "methods.head_1.inputs: got h [1, 1, 64] float32, expected tokens [1, 1] int64, as the program has it",
        ),
        "a file that is not there": (lambda m: m["lowering"]["graphs"].update(head_1="x.onnx"), "holds no x.onnx"),
        "a graph that only other hosts call": (
            tensor("step_64", "inputs", "h", shape=[1, 64, 63]),
            "methods.step_64.inputs: got h [1, 64, 63] float32, expected h [1, 64, 64] float32, as the program has it",
        ),
        "another such graph": (
            lambda m: m["lowering"]["graphs"].update(step_1="head.onnx"),
            "methods.step_1.inputs: got k [] int64, expected h [1, 1, 64] float32, as the program has it",
        ),
        "a graph without a method": (lambda m: m["methods"].pop("step_1"), "as lowering.graphs says"),
        "rows that nothing calls": (
            lambda m: [part.update(step_2=part["step_1"]) for part in (m["methods"], m["lowering"]["graphs"])],
            "lowering.graphs: got step_2, expected METHOD_1 or METHOD_64",
        ),
    },
    "executorch": {
        "the program": (lambda m: m["lowering"].update(program=None), "lowering.program: got None, expected text"),
        "a type, in the manifest's own order": (
            tensor("step_1", "inputs", "active", dtype="int8"),
            "methods.step_1.inputs.active: got [1, 1] int8",
        ),
    },
    "coreml": {
        "a place to compute": (lambda m: m["lowering"].update(compute="abacus"), "lowering.compute: got 'abacus', expected one of"),
        "a ring that is no state": (
            lambda m: m["lowering"].update(rings={"x": {"shape": [1, 1, 1, 1], "held": [1, 1, 1, 1, 1]}}),
            "lowering.rings: got x, expected none, or past_keys, past_values",
        ),
        "a program elsewhere": (lambda m: m["lowering"].update(program="../other"), "holds no folder ../other"),
    },
}  # fmt: skip
FIXTURES = {"onnx": "package", "executorch": "executorch_package", "coreml": "coreml_package"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", ["onnx", *(pytest.param(t, marks=getattr(pytest.mark, t)) for t in ("executorch", "coreml"))]
)
def test_a_manifest_that_lies_is_refused_by_one_line(
    target: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(FIXTURES[target])
    for name, (change, said) in (LIES | OF_TARGET[target]).items():
        folder = resealed(source, tmp_path / name.replace(" ", "-"), change)
        with pytest.raises(PackageError) as caught:
            open_runtime(folder)
        assert said in str(caught.value), f"{name}: {caught.value}"
        assert_one_line(str(caught.value), str(folder))


def test_what_a_manifest_may_well_change(package: Path, tmp_path: Path) -> None:
    """The refusals above are not about the copy: a name, and a field that another version may add, change nothing."""
    folder = resealed(package, tmp_path / "p.rmse", lambda m: m["model"].update(name="other", novelty=[1]))
    tokens = np.arange(70) % 65
    runtimes = [open_runtime(p) for p in (package, folder)]
    fed = [runtime.feed(tokens, runtime.info.dials) for runtime in runtimes]
    assert runtimes[1].info.name == "other" and np.array_equal(fed[0].logits, fed[1].logits)


@pytest.mark.parametrize("size", [1 << 19, 31 << 17])
def test_nothing_is_allocated_by_a_manifest_that_lies(package: Path, tmp_path: Path, size: int) -> None:
    """A state of half a GiB, and one just under the limit of 4 GiB: the program is asked before either is made."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PackageError, match="as the program has it"):
        open_runtime(resealed(package, tmp_path / "p.rmse", window(size)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_tokenizer_of_another_model_is_refused(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "p.rmse"
    shutil.copytree(package, folder)
    train_character_tokenizer("".join(map(chr, range(33, 133))), folder / "tokenizer.json")
    reseal(folder)
    assert rmse_run([str(folder), "-p", "HELLO", "-n", "1"]) == 2
    assert_one_line(capsys.readouterr().err, str(folder / "tokenizer.json"), "100 tokens", "vocab_size 65")


def test_a_model_that_would_keep_more_than_the_limit_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"window": 2**24}))
    with pytest.raises(UserError) as caught:
        open_runtime(tmp_path / "model")
    assert_one_line(str(caught.value), "for 16777216 positions", "4 GiB", "lower window")


def test_weights_too_few_for_their_configuration_are_refused_before_a_model_is_made(
    checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 2**22, "d_model": 2**16}))  # 2 TiB
    with pytest.raises(CheckpointError) as caught:
        open_runtime(tmp_path / "model")
    assert_one_line(
        str(caught.value), "model.safetensors", "are too few for the 554273996993 parameters", "config.json"
    )


QUANTIZED: list[tuple[Change, str]] = [
    (lambda d: d.update(quant=4), "quant: got 4, expected text"),
    (lambda d: d.update(sha256="0"), "sha256: got '0', expected 64 hexadecimal digits"),
    (lambda d: d["tensors"].update({"nothing.weight": {"bits": 4}}), "tensors.nothing.weight: is no tensor"),
    (lambda d: d["tensors"]["embed.weight"].update(symmetric="no"), "tensor embed.weight: symmetric: got 'no'"),
    (lambda d: d["tensors"]["embed.weight"].update(bits=True), "tensor embed.weight: bits: got True, expected 4 or 8"),
    (lambda d: d["tensors"]["embed.weight"].update(bit=4), "tensor embed.weight: unknown field 'bit'"),
    (
        lambda d: d["tensors"].update({"gate.bias": {"bits": 4}}),
        "tensor gate.bias: a tensor of shape (1,) has no integers",
    ),
]


@pytest.mark.parametrize(("change", "said"), QUANTIZED)
def test_a_quantised_checkpoint_that_lies_is_refused_by_one_line(
    change: Change, said: str, calm: Quantized, tmp_path: Path
) -> None:
    save_quantized(calm, tmp_path / "q")
    path = tmp_path / "q" / "quantization.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        load_quantized(tmp_path / "q")
    assert_one_line(str(caught.value), str(path), said)


def test_a_manifest_of_a_model_reads_back(package: Path) -> None:
    info = read_model(Package.open(package))
    assert ModelInfo.from_json(json.loads(json.dumps(info.to_json())), info.nbytes) == info
    assert isinstance(info.chunks, tuple) and isinstance(info.state["past_keys"].shape, tuple)


# -------------------------------------------------------------------------------------------------------- sessions

Tensors = dict[str, np.ndarray]


def nan_in(name: str) -> Callable[[Tensors, dict[str, str]], object]:
    return lambda tensors, header: tensors[name].reshape(-1).__setitem__(3, np.nan)


def of_bytes(tensors: Tensors, header: dict[str, str]) -> None:
    tensors["retrieved_valid"] = np.full(tensors["retrieved_valid"].shape, 7, np.uint8).view(np.bool_)


SESSIONS: dict[str, tuple[Callable[[Tensors, dict[str, str]], object], str]] = {
    "a position": (lambda t, h: h.update(position="-1"), "position: got '-1', expected a number of tokens"),
    "an enormous position": (lambda t, h: h.update(position="9" * 30), "position: got '9999"),
    "pending": (lambda t, h: h.update(pending="1 x"), "pending: got '1 x', expected tokens"),
    "a pending token": (lambda t, h: h.update(pending="1 65"), "pending: got token 65, expected some below 65"),
    "no model": (lambda t, h: h.pop("model"), "model: is missing"),
    "a tensor": (lambda t, h: t.update(past_keys=t["past_keys"][:1]), "past_keys: got [1, 1, 2, 64, 16] float32, expected [4,"),
    "a type": (lambda t, h: t.update(segment=t["segment"].astype(np.float64)), "segment: got [1, 64, 64] of another type"),
    "a tensor less": (lambda t, h: t.pop("segment"), "segment: got none"),
    "a tensor more": (lambda t, h: t.update(more=np.zeros(1)), "more: got [1] of another type, expected none"),
    "NaN in a ring": (nan_in("past_keys"), "past_keys: holds numbers that are not finite"),
    "NaN in a memory": (nan_in("memory_up"), "memory_up: holds numbers that are not finite"),
    "flags": (of_bytes, "retrieved_valid: holds flags that are neither true nor false"),
}  # fmt: skip


@pytest.mark.parametrize("lie", SESSIONS)
def test_a_session_that_lies_is_refused_by_one_line(lie: str, tmp_path: Path) -> None:
    """With a digest that fits; and nothing of it is taken over."""
    from safetensors import safe_open

    runtime, path = TorchRuntime(remembering_model(), "mem"), tmp_path / "text.session"
    runtime.feed(np.arange(70) % 65, runtime.info.dials)
    save_session(runtime, path, [1, 2])
    with safe_open(path, framework="numpy") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change, said = SESSIONS[lie]
    change(tensors, header)
    header["sha256"] = digest(tensors, header)
    save_file(tensors, path, metadata=header)
    before = {name: array.copy() for name, array in runtime.tensors().items()}
    with pytest.raises(SessionError) as caught:
        restore_session(runtime, path)
    assert_one_line(str(caught.value), said, str(path), "start a new session")
    assert runtime.position == 70
    for name, array in runtime.tensors().items():
        assert np.array_equal(array, before[name]), name


# -------------------------------------------------------------------------------------------------- knowledge bases


def node_bytes(data: bytearray) -> int:
    """Where the first node of a usearch file begins."""
    rows, columns = struct.unpack_from("<2I", data)
    return 8 + rows * columns + 64 + 40 + 2 * rows


def neighbour(data: bytearray) -> None:
    struct.pack_into("<I", data, node_bytes(data) + 14, 2**31)


def level(data: bytearray) -> None:
    struct.pack_into("<h", data, node_bytes(data) - 2 * struct.unpack_from("<I", data)[0], 30_000)


def start(data: bytearray) -> None:
    struct.pack_into("<Q", data, node_bytes(data) - 2 * struct.unpack_from("<I", data)[0] - 8, 2**40)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (neighbour, "has a neighbour that is not there"),
        (level, "of a level that is not there"),
        (start, "does not fit"),
    ],
)
def test_an_index_that_leads_astray_is_refused(damage: Callable[[bytearray], None], said: str, tmp_path: Path) -> None:
    """usearch would follow it, and end the process."""
    pytest.importorskip("usearch", reason="needs usearch: pip install 'rmse-edge[knowledge]'")
    import contextlib
    import sqlite3

    from hashed_embedder import random_entries

    from rmse_edge.files import digest_file
    from rmse_edge.knowledge import KnowledgeError, KnowledgeInfo
    from rmse_edge.knowledge.rows import digest_manifest
    from rmse_edge.knowledge.store import KnowledgeBase

    info = KnowledgeInfo(16, 2, 8, "model-1")
    with KnowledgeBase.create(tmp_path / "a.kb", info) as kb:
        kb.add(random_entries(info, 40))
    [path] = (tmp_path / "a.kb").glob("index-*.usearch")
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    with contextlib.closing(sqlite3.connect(tmp_path / "a.kb" / "passages.sqlite")) as db, db:
        manifest = json.loads(db.execute("SELECT json FROM manifest").fetchone()[0])
        manifest["index"]["sha256"] = digest_file(path)
        manifest["sha256"] = digest_manifest(manifest)
        db.execute("UPDATE manifest SET json = ?", (json.dumps(manifest),))
    with pytest.raises(KnowledgeError) as caught:
        KnowledgeBase.open(tmp_path / "a.kb")
    assert_one_line(str(caught.value), str(path), said, "rmse-index --rebuild")


# ------------------------------------------------------------------------------------------------------------- fuzz


def test_a_sample_of_the_fuzzer(package: Path, checkpoint: Path, tmp_path: Path) -> None:
    """All of it: `python -m tests.fuzz`, which takes more than an hour (docs/robustness.md)."""
    subjects = ["onnx", "session", "config"] + ["knowledge"] * (importlib.util.find_spec("usearch") is not None)
    shutil.copytree(package, tmp_path / "onnx.rmse")
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    command = [sys.executable, "-m", "tests.fuzz", *subjects, "-n", "10", "--seed", "1", "--cache", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("10 cases") == done.stdout.count(", 0 wrong") == len(subjects)
