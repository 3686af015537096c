"""rmse-runner: what the Python runtime says, without Python; and one line for all that is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ALPHABET, FEW, decided_text, random_tokens, reference_of, reseal
from native_runner import Runner, flip
from paths import NATIVE
from small_tokenizers import cut_short

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.archive import pack
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import ParityError
from rmse_edge.export.gate.compare import agreement
from rmse_edge.export.gate.reference import conversation
from rmse_edge.package import MANIFEST, SUMS, Package, write_sums
from rmse_edge.quantize import Quantized
from rmse_edge.runtimes import Dials, open_runtime
from rmse_edge.runtimes.engines.kernels import executorch_folder

pytestmark = [pytest.mark.executorch, pytest.mark.native, pytest.mark.slow]

GREEDY = ("--temperature", "0")
LETTERS = "".join(ALPHABET[i] for i in random_tokens(100, seed=3))  # more than one call of 64 rows


# ----------------------------------------------------------------------------------------------- as Python does it

TEXTS = {
    "greedy": ("-p", "HELLO", *GREEDY),
    "a long prompt": ("-p", LETTERS, *GREEDY),
    "two loops": ("-p", "HELLO", "--max-loops", "2", *GREEDY),
    "gate": ("-p", LETTERS, "--exit-threshold", "0.3", "--min-loops", "2", "--seed", "1"),
    "no exits": ("-p", "HELLO", "--exit-threshold", "1", "--seed", "2"),
    "delta": ("-p", "HELLO", "--exit-epsilon", "0.9", "--seed", "3"),
    "a large seed": ("-p", "HELLO", "--temperature", "1.3", "--seed", str(2**63 + 11)),
    "top-k, top-p": ("-p", "HELLO", "--temperature", "1.3", "--top-k", "20", "--top-p", "0.9", "--seed", "4"),
    "one token": ("-p", "A", "-n", "1"),
}
TIMES = {"prompt_tokens_per_s", "time_to_first_token_s", "tokens_per_s"}


@pytest.mark.parametrize("flags", TEXTS.values(), ids=TEXTS)
def test_documents_are_those_of_rmse_run(
    fp32: Runner, executorch_package: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Text, tokens, depths, statistics and settings; under the same names, in the same order."""
    every = ("-n", "60", *flags)
    assert rmse_run([str(executorch_package), *every, "-t", "1", "-o", "json"]) == 0
    expected, found = json.loads(capsys.readouterr().out), fp32.document(*every)
    assert list(found) == list(expected)
    assert found.pop("runtime") == "executorch-native" and expected.pop("runtime") == "executorch"
    for name in TIMES:
        assert type(found.pop(name)) is type(expected.pop(name))
    assert found == expected


@pytest.mark.parametrize("flags", [(), ("--show-depth",), ("--stop", "("), ("--stop", "(", "--show-depth")])
def test_what_is_shown_is_what_rmse_run_shows(
    fp32: Runner, executorch_package: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    every = ("-p", "HELLO", "-n", "40", *GREEDY, *flags)
    assert rmse_run([str(executorch_package), *every, "-t", "1"]) == 0
    expected, found = capsys.readouterr(), fp32(*every)
    speeds = re.compile(r"\d+(\.\d)? (?=tokens/s|ms)")
    assert found.stdout == expected.out
    assert speeds.sub("", found.stderr) == speeds.sub("", expected.err)


def tell_of_text(values: dict[str, Any], manifest: dict[str, Any]) -> None:
    manifest["model"]["text"].update(values)


@pytest.mark.parametrize("flags", [GREEDY, ("--temperature", "2"), ("--temperature", "2", "--top-k", "9")])
def test_end_tokens_and_unused_ids_are_those_of_rmse_run(
    runner: Path, executorch_package: Path, tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them."""
    free = Runner([runner], executorch_package).document("-p", "HELLO", "-n", "40", *flags)["tokens"]
    unlike = next(token for token in range(65) if token not in free)
    for name, values in {
        "several": {"eos_token_ids": [unlike, free[9]]},
        "a gap and the last ones": {"unused_token_ids": [[free[0], free[0] + 1], [50, 65]]},
    }.items():
        folder = shutil.copytree(executorch_package, tmp_path / f"{name}.rmse")

        reseal(folder, partial(tell_of_text, values))
        assert rmse_run([str(folder), "-p", "HELLO", "-n", "40", *flags, "-t", "1", "-o", "json"]) == 0
        expected = json.loads(capsys.readouterr().out)
        found = Runner([runner], folder).document("-p", "HELLO", "-n", "40", *flags)
        assert (found["tokens"], found["finish_reason"]) == (expected["tokens"], expected["finish_reason"])
        if name == "a gap and the last ones":
            assert not {free[0], *range(50, 65)} & set(found["tokens"])
        else:
            assert (found["tokens"], found["finish_reason"]) == (free[: free.index(free[9]) + 1], "eos")


def test_prompts_come_from_stdin_too(fp32: Runner) -> None:
    assert fp32("-n", "20", *GREEDY, input="HELLO").stdout == fp32("-n", "20", *GREEDY, "-p", "HELLO").stdout


def test_prompts_come_from_files_too(fp32: Runner, tmp_path: Path) -> None:
    expected = fp32("-n", "20", *GREEDY, "-p", "HELLO\n").stdout
    (tmp_path / "prompt").write_text("HELLO\n")
    assert fp32("-n", "20", *GREEDY, "-f", str(tmp_path / "prompt")).stdout == expected
    assert fp32("-n", "20", *GREEDY, "--file", "-", input="\ufeffHELLO\n").stdout == expected
    assert "prompt: not UTF-8 at byte 1" in fp32.refusal("-f", str(_file(tmp_path / "prompt", b"A\xff")))
    for nothing in (
        ("-f", str(_file(tmp_path / "prompt", b"\xef\xbb\xbf"))),
        ("-f", os.devnull),
        ("-p", ""),
        ("-f", "-"),
        (),
    ):
        assert "the prompt is empty" in fp32.refusal(*nothing, input="")
    assert "none: cannot be read" in fp32.refusal("-f", str(tmp_path / "none"))
    assert "--file: leave out --prompt" in fp32.refusal("-f", "x", "-p", "A")
    assert "--prompt-tokens" in fp32.refusal("-f", "x", "--prompt-tokens", "1")


def test_stored_truncation_and_padding_are_left_out(
    fp32: Runner, runner: Path, executorch_package: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cut.rmse"
    shutil.copytree(executorch_package, folder)
    cut_short(folder / "tokenizer.json")
    reseal(folder)
    flags = ("-p", LETTERS, "-n", "9", "-o", "json", *GREEDY)
    found, expected = (json.loads(run(*flags).stdout) for run in (Runner([runner], folder), fp32))
    assert found["tokens"] == expected["tokens"] and found["prompt_tokens"] == len(LETTERS) > 16
    assert found["text"] == expected["text"]


def test_text_is_written_as_it_comes_and_ctrl_c_ends_it(fp32: Runner) -> None:
    command = [*fp32.command, "-p", "HELLO", "-n", str(10**9)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130 and b"; interrupted" in err and out.endswith(b"\n")


@pytest.mark.parametrize(
    "dials", [{}, {"max_loops": 3}, {"exit_threshold": 0.3, "min_loops": 2}, {"exit_epsilon": 0.9}]
)
@pytest.mark.parametrize("quant", ["fp32", "int4"])
def test_logits_and_depths_are_the_python_runtimes(
    request: pytest.FixtureRequest, quant: str, dials: dict[str, float], tmp_path: Path
) -> None:
    """int4 with a memory that is written three times, and an int8 cache."""
    ours: Runner = request.getfixturevalue(quant)
    package = request.getfixturevalue({"fp32": "executorch_package", "int4": "executorch_int4"}[quant])
    tokens = random_tokens(210, seed=12, vocab=65 if quant == "fp32" else FEW)
    reference = open_runtime(package, threads=1)
    expected = reference.feed(tokens, reference.info.dials_with(**dials))
    flags = [part for name, value in dials.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    logits, depth = ours.feed(tokens, tmp_path / "logits", *flags)
    np.testing.assert_array_equal(depth, expected.depth)
    np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=1e-5)


def assert_pytorch_agrees(run: Runner, model: RMSE, tokens: np.ndarray, dials: Dials, file: Path, *flags: str) -> None:
    """The runner's logits and depths of a conversation are those of PyTorch over the whole text, which has no host.

    By the rule of the parity gate that the package has passed; of hits, this runner knows nothing.

    Raises:
        ParityError: they are not.
    """
    first, last = conversation(len(tokens), reference_of(model).info)
    parts = [first - 64, 64, *[1] * (last - first), len(tokens) - last]
    given = {name: torch.from_numpy(value) for name, value in dials.arrays().items()}
    expected = model.whole_text(torch.from_numpy(tokens), given)
    told = [part for name, value in vars(dials).items() for part in (f"--{name.replace('_', '-')}", str(value))]
    logits, depth = run.feed(tokens, file, "--parts", ",".join(map(str, parts)), *told, *flags)
    ours, depths = expected.logits.numpy(), np.stack([expected.depth.numpy(), depth])
    if model.config.kv_dtype == "int8":
        agreement(ours, logits, depths, [], len(tokens), exact=False)
    elif (depths[0] != depths[1]).any() or not np.abs(ours - logits).max() <= 1e-4:
        raise ParityError(
            f"logits differ by {np.abs(ours - logits).max():.1e}, depths at {(depths[0] != depths[1]).sum()}"
        )


# More than a window and two segments each.
FP32_TEXT, INT4_TEXT = decided_text(330), random_tokens(700, seed=7, vocab=FEW)
FULL, GATE = Dials(4), Dials(4, 1, 0.6)


@pytest.mark.parametrize("dials", [FULL, GATE], ids=["full depth", "gate"])
def test_whole_texts_are_pytorchs(
    fp32: Runner, int4: Runner, tiny: RMSE, calm: Quantized, dials: Dials, tmp_path: Path
) -> None:
    """Against a reference without ring, calls or moments of writing: prompts, single tokens, a prompt.

    In int4 only shares are compared. Finer faults of what the memory is taught show beside the Python runtime, above,
    whose host is held against the same reference exactly.
    """
    assert_pytorch_agrees(fp32, tiny, FP32_TEXT, dials, tmp_path / "logits")
    assert_pytorch_agrees(int4, calm.model, INT4_TEXT, dials, tmp_path / "logits")
    with pytest.raises(ParityError):  # a memory that is never written
        assert_pytorch_agrees(int4, calm.model, INT4_TEXT, dials, tmp_path / "logits", "--no-memory")


def test_greedy_tokens_are_pytorchs(fp32: Runner, tiny: RMSE) -> None:
    """What is written, token by token, over more than the window: PyTorch, given all of it, picks the same."""
    prompt = decided_text(100)
    flags = ("--prompt-tokens", ",".join(map(str, prompt)), "-n", "200", "--exit-threshold", "0.6", *GREEDY)
    found = fp32.document(*flags)
    text = torch.from_numpy(np.concatenate([prompt, found["tokens"]]).astype(np.int64))
    expected = tiny.whole_text(text[:-1], {k: torch.from_numpy(v) for k, v in GATE.arrays().items()})
    best = expected.logits[len(prompt) - 1 :].topk(2)
    # Up to where PyTorch itself can hardly decide; from there on the two may go different ways.
    clear = ((best.values[:, 0] - best.values[:, 1]) > 1e-3) & (expected.margin[len(prompt) - 1 :] > 1e-4)
    count = len(clear) if clear.all() else int((~clear).int().argmax())
    assert count > 128 and len(set(found["depth"])) > 1
    assert found["tokens"][:count] == best.indices[:count, 0].tolist()
    assert found["depth"][:count] == expected.depth[len(prompt) - 1 :][:count].tolist()


# Faults of the host: what is written instead of a line of model.cpp.
HOST_FAULTS = {
    "one slot too far": ("(position + row) % size", "(position + row + 1) % size"),
    "decoding a position too far": (
        "calls.prelude(tokens.first(n), position_, ",
        "calls.prelude(tokens.first(n), position_ + (n == 1), ",
    ),
    "the memory written a token late": (
        "position_ % *info_.segment == 0 && remember_",
        "position_ % *info_.segment == 1 && remember_",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", HOST_FAULTS)
def test_a_wrong_host_is_seen(
    runner: Path, fp32: Runner, int4: Runner, tiny: RMSE, calm: Quantized, fault: str, tmp_path: Path
) -> None:
    """The comparison above fails where the runner is built again with a fault in one line of its host."""
    old, new = HOST_FAULTS[fault]
    native, build = tmp_path / "native", tmp_path / "build"
    shutil.copytree(NATIVE, native)
    shutil.copytree(runner.parent, build)  # objects as new as they were: only one is made again
    source = (native / "core" / "model.cpp").read_text()
    assert source.count(old) == 1
    (native / "core" / "model.cpp").write_text(source.replace(old, new))
    command = ["make", "-C", str(native), f"EXECUTORCH={executorch_folder()}", f"BUILD={build}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("compiling") == 1, done.stdout + done.stderr
    package, model, text = (int4, calm.model, INT4_TEXT) if "memory" in fault else (fp32, tiny, FP32_TEXT)
    with pytest.raises(ParityError):
        wrong = Runner([build / "rmse-runner"], Path(package.command[-1]))
        assert_pytorch_agrees(wrong, model, text, FULL, tmp_path / "logits")


def test_threads_change_nothing(fp32: Runner, int4: Runner, tmp_path: Path) -> None:
    for run, vocab in ((fp32, 65), (int4, FEW)):
        tokens = random_tokens(100, seed=12, vocab=vocab)
        one, two = (run.feed(tokens, tmp_path / "logits", "-t", count) for count in ("1", "2"))
        np.testing.assert_array_equal(one[1], two[1])
        np.testing.assert_allclose(one[0], two[0], rtol=0, atol=1e-5)


def test_portable_products_give_the_same_bits(fp32: Runner, int4: Runner, tmp_path: Path) -> None:
    for run, vocab in ((fp32, 65), (int4, FEW)):
        tokens = random_tokens(100, seed=12, vocab=vocab)
        fast = run.feed(tokens, tmp_path / "logits")
        plain = run.feed(tokens, tmp_path / "logits", env={**os.environ, "RMSE_PRODUCTS": "portable"})
        assert fast[0].tobytes() == plain[0].tobytes()


# ------------------------------------------------------------------------------------------------- what is refused


def resealed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: reseal(folder, change)


def written(name: str, content: bytes, fits: bool = False) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)
        if fits:
            reseal(folder)

    return change


def model(**values: Any) -> Callable[[Path], None]:
    return resealed(lambda manifest: manifest["model"].update(values))


def text(**values: Any) -> Callable[[Path], None]:
    return resealed(partial(tell_of_text, values))


def listed_as(size: int) -> Callable[[Path], None]:
    """A manifest that is wrong about a file's size."""
    return resealed(lambda manifest: manifest["sizes"].update({"sample.txt": size}))


def state(*more: str, **values: Any) -> Callable[[Path], None]:
    """Of all that is kept, and of as many more like it."""

    def change(manifest: dict[str, Any]) -> None:
        kept = manifest["model"]["state"]
        kept.update({name: kept["past_keys"] for name in more})
        kept.update({name: s | values for name, s in kept.items()})

    return resealed(change)


def deeper(manifest: dict[str, Any]) -> None:
    """One loop more, in all that is said of the model itself."""
    manifest["model"]["max_loops"] += 1
    for kept in manifest["model"]["state"].values():
        kept["shape"][0] += 1


def narrower(manifest: dict[str, Any]) -> None:
    """Another width of what prelude gives to others, throughout: only the program knows better."""
    for method in manifest["methods"].values():
        for tensor in (*method["inputs"], *method["outputs"]):
            if tensor["name"] == "x0":
                tensor["shape"][-1] -= 1


def edited(folder: Path) -> None:
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace('"exit_threshold": 0.6', '"exit_threshold": 0.5'))


def listed(change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / SUMS).write_text(change((folder / SUMS).read_text()))


def archived(folder: Path) -> None:
    """In the place of the folder that it holds."""
    pack(Package.open(folder), folder.with_name("p.rmse.zip"))
    shutil.rmtree(folder)
    folder.with_name("p.rmse.zip").rename(folder)


def a_pipe(folder: Path) -> None:
    (folder / "sample.txt").unlink()
    os.mkfifo(folder / "sample.txt")


def cut_in_half(folder: Path) -> None:
    program = folder / "program.pte"
    os.truncate(program, program.stat().st_size // 2)
    reseal(folder)


def nested(depth: int) -> Any:
    """A value with so many lists around it."""
    return [nested(depth - 1)] if depth else 0


def first_input(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["methods"]["step_1"]["inputs"][0]


NOISE = np.random.default_rng(0).bytes(5000)
BAD_PACKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such package folder"),
    "an archive": (archived, "is an archive; unpack it into a folder: unzip NAME.rmse.zip -d NAME.rmse"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json: missing"),
    "no JSON": (written(MANIFEST, b'{"a":'), "not readable as JSON"),
    "nested deeply": (written(MANIFEST, b"[" * 10**6), "nested too deeply"),
    "objects nested deeply": (written(MANIFEST, b'{"a":' * 10**6), "nested too deeply"),
    "nested a little too deeply": (resealed(lambda m: m.update(a=nested(32))), "nested too deeply"),
    "no UTF-8": (written(MANIFEST, b'{"\xff": 1}'), "not UTF-8 at byte 2"),
    "half a surrogate pair": (written(MANIFEST, b'{"a": "\\ud800"}'), "not readable as JSON"),
    "a name twice": (written(MANIFEST, b'{"a": 1, "a": 2}'), '"a" occurs twice in one object'),
    "a number that is none": (written(MANIFEST, b'{"a": NaN}'), "not readable as JSON"),
    "a number beyond all": (written(MANIFEST, b'{"a": 1e999}'), "not readable as JSON"),
    "a word without end": (written(MANIFEST, b'{"a": ' + b"x" * 10**6), "not readable as JSON"),
    "a count beyond all integers": (model(width=2**70), "model.width: got 1.1805916207174113e+21, expected a whole number"),
    "a count with a point": (model(width=64.0), "model.width: got 64.0, expected a whole number"),
    "another manifest": (written(MANIFEST, b"{}"), "not the manifest of an rmse-edge package"),
    "an edited manifest": (edited, "was edited after the export"),
    "another target": (resealed(lambda m: m.update(target="onnx")), "made for onnx"),
    "a file that is missing": (lambda f: (f / "sample.txt").unlink(), "sample.txt: missing"),
    "format 1": (resealed(lambda m: m.update(format_version=1)), "format version 1, this runner reads 2; export the package again with this version"),
    "no list of hashes": (lambda f: (f / SUMS).unlink(), "SHA256SUMS: missing from the package"),
    "a list of none": (written(SUMS, b""), "SHA256SUMS: lists no manifest.json"),
    "a list of noise": (written(SUMS, NOISE), "SHA256SUMS: not a list of hashes"),
    "a file listed twice": (listed(lambda s: s + s.splitlines()[0]), "SHA256SUMS: line 5: the same file again"),
    "a file elsewhere": (listed(lambda s: f"{s}{'0' * 64}  ../x\n"), "x: missing from the package"),
    "another hash": (listed(lambda s: s.replace(s[:4], "0000", 1)), "its SHA-256 is not that in SHA256SUMS"),
    "a size that is no number": (resealed(lambda m: m["sizes"].update({"sample.txt": "2000"})), 'sizes.sample.txt: got "2000", expected a whole number'),
    "no sizes": (resealed(lambda m: m.pop("sizes")), 'there is no "sizes"'),
    "a pipe": (a_pipe, "sample.txt: is no file"),
    "a file that is not listed": (written("notes", b""), "notes: not listed"),
    "a program that is cut": (lambda f: os.truncate(f / "program.pte", 5000), "program.pte: 5000 bytes"),
    "a flipped weight": (lambda f: flip(0.7)(f / "program.pte"), "program.pte: its SHA-256 is not that in SHA256SUMS"),
    "noise as program": (written("program.pte", NOISE, True), "not an ExecuTorch program"),
    "noise behind the magic": (written("program.pte", b"\x30\0\0\0ET12" + NOISE, True), "cannot load it"),
    "a fitting hash of half a program": (cut_in_half, "cannot load it"),
    "a method that is not there": (resealed(lambda m: m["methods"].pop("step_64")), "step_64 among them"),
    "another shape": (resealed(lambda m: first_input(m).update(shape=[1, 1, 63])), "methods.step_1.inputs.k: got [1, 1, 63] int64, expected [] int64"),
    "a huge shape": (resealed(lambda m: first_input(m).update(shape=[2**40, 2**40])), "methods.step_1.inputs[0].shape: got 1099511627776"),
    "an unknown type": (resealed(lambda m: first_input(m).update(dtype="float19")), 'methods.step_1.inputs[0].dtype: got "float19"'),
    "an unknown tensor": (resealed(lambda m: first_input(m).update(name="zz")), "zz"),
    "another program": (resealed(narrower), "x0 in another form than the manifest says"),
    "a method more": (resealed(lambda m: m["methods"].update(more_1=m["methods"]["head_1"])), "holds no more_1, which the manifest has"),
    "no text": (model(text=None), "manifest.json: model: got neither text nor board, expected one of them"),
    "a board": (model(text=None, board={"cells": 4, "symbols": 2}), "model.text: got none, expected a model of texts, as this runner runs"),
    "a plan": (model(plan={"layers": 2, "prompt": 4}), "model.plan: got one of layers, expected a model whose iterations are alike, as this runner runs"),
    "no model": (resealed(lambda m: m.pop("model")), 'there is no "model"'),
    "another window": (state(shape=[4, 1, 2, 32, 16]), "methods.step_1.inputs.past_keys: got [1, 2, 64, 16] float32, expected [1, 2, 32, 16] float32"),
    "another vocabulary": (text(vocab_size=66), "logits: got [1, 1, 65] float32, expected [1, 1, 66] float32"),
    "another depth": (model(max_loops=5), "a row for each of the 5 loops"),
    "an enormous vocabulary": (text(vocab_size=2**30), "model.text.vocab_size: got 1073741824, expected a whole number from 1 to 4194304"),
    "another depth, twice": (resealed(deeper), "methods.commit_1.inputs.new_keys: got [4, 1, 2, 1, 16] float32, expected [5, 1, 2, 1, 16]"),
    "another target for the model": (model(target="torch"), 'model.target: got torch, expected "executorch", as target says'),
    "another quantisation": (model(quant="int4"), 'model.quant: got int4, expected "fp32", as quantization.weights says'),
    "another number of parameters": (model(parameters=-1), "model.parameters: got -1"),
    "an enormous state": (state(shape=[4, 2**15, 2**10, 64, 16]), "model.state.past_keys.shape: got"),
    "more states than fit": (state("more", shape=[4, 1, 2**13, 64, 200]), "expected at most 4294967296 (4 GiB)"),
    "a state of nearly 2 GiB": (state(shape=[4, 1, 2**13, 64, 200]), "expected [1, 8192, 64, 200] float32"),
    "another state": (state(shape=[4, 1, 3, 64, 16]), "expected [1, 3, 64, 16] float32"),
    "another cache": (state(dtype="float16"), "methods.step_1.inputs.past_keys: got [1, 2, 64, 16] float32, expected [1, 2, 64, 16] float16"),
    "one state more": (state("k"), "model.state.k: got a name that hosts give themselves, expected another"),
    "a ring that is filled from another": (state(source="other"), "outputs.other: got no such tensor, expected [4, 1, 2, 1, 16] float32"),
    "other channels that turn": (text(rotary_dims=8), "expected [1, 1, 4] float32"),
    "a memory that it has not": (state(kind="written", source="memorize"), "model.state.past_keys.source: got memorize, expected some of commit, head, loop, prelude"),
    "a dial": (model(dials={"max_loops": 9, "min_loops": 1, "exit_threshold": 1, "exit_epsilon": 0, "exit_entropy": 0}), "model.dials"),
    "rules that are none": (model(rules="gate"), 'model.rules: got "gate", expected an array'),
    "a number too large": (text(rope_theta=10**400), "not readable as JSON"),
    "a deep manifest": (resealed(lambda m: m.update(more=nested(40))), "nested too deeply"),
    "a file of no bytes": (listed_as(0), "sample.txt: 2000 bytes, the manifest says 0; written to since?"),
    "calls of 100 rows": (model(chunks=[1, 100]), "model.chunks: got [1, 100], expected at most 64 rows"),
    "an end token that is none": (text(eos_token_ids=[1, -2]), "model.text.eos_token_ids: got -2"),
    "unused ids beyond the head": (text(unused_token_ids=[[60, 66]]), "model.text.unused_token_ids: got [[60, 66]]"),
    "no dials": (model(dials={}), "model.dials.max_loops: is missing"),
    "no tokenizer": (written("tokenizer.json", b"{}", True), "not a tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD_PACKAGES)
def test_a_bad_package_is_one_line(runner: Path, executorch_package: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "bad.rmse"
    shutil.copytree(executorch_package, folder)
    change, part = BAD_PACKAGES[damage]
    change(folder)
    line = Runner([runner], folder).refusal("-p", "A", "-n", "1")
    assert part in line and "bad.rmse" in line and len(line) < 1000


def test_what_a_manifest_may_well_hold(runner: Path, fp32: Runner, executorch_package: Path, tmp_path: Path) -> None:
    """The refusals above are not about the copy: any JSON text will do, and names that this version does not know."""
    folder = shutil.copytree(executorch_package, tmp_path / "good.rmse")
    reseal(folder, lambda m: m.update(a=nested(31), b=[-0.0, 1e300, 2**64 - 1, "\u2028\x7f"]))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest, indent="\t", ensure_ascii=False, sort_keys=True))
    write_sums(folder)
    flags = ("-p", "HELLO", "-n", "9", *GREEDY)
    assert Runner([runner], folder).document(*flags)["tokens"] == fp32.document(*flags)["tokens"]


BAD_FLAGS = {
    "--bogus": "--bogus", "extra": "extra", "--prompt": "--prompt: expected one argument",
    "-n 0": "-n: got '0'", "-n 99999999999999999999": "-n: got", "--seed -1": "--seed: got",
    "--temperature nan": "--temperature", "--temperature -1": "--temperature",
    "--top-p 0": "--top-p", "--top-p 1.5": "--top-p", "--top-k -1": "--top-k",
    "--max-loops 5": "--max-loops: got 5, expected 1..4", "--max-loops 0": "--max-loops",
    "--max-loops 2 --min-loops 3": "--min-loops: got 3", "--exit-threshold 0": "--exit-threshold",
    "--exit-epsilon -1": "--exit-epsilon", "--exit-entropy 0.5": "--exit-entropy", "--no-memory": "--no-memory",
    "-o xml": "-o: got 'xml'", "--help=3": "--help: takes no value", "-t 0": "-t: got '0'", "-t 100000": "at most 1024",
    "--stop=": "--stop: got an empty string", "--prompt-tokens 1": "--prompt-tokens", "--logits x": "--logits: needs",
    "--parts 1": "--parts: needs --logits", "--parts 0": "--parts: got '0'",
    "--depths 3": "--depths", "--packed-weights /nowhere/x": "--packed-weights: /nowhere/x: cannot be written",
    f"--packed-weights {'x' * 300}": "longer than the 255 bytes", "--packed-weights /": "is no file",
    "--bench --seed 3": "--seed", "--bench -d 5": "--max-loops: got 5", "--bench -r 0": "-r: got '0'",
    "--bench -p 9999": "this bench needs 9999; lower -p or -n", "--bench --text /nowhere": "/nowhere",
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_one_line(fp32: Runner, flags: str) -> None:
    prompt = () if "--bench" in flags else ("-p", "A")
    assert BAD_FLAGS[flags] in fp32.refusal(*prompt, *flags.split())


def test_bad_tokens_and_texts_are_one_line(fp32: Runner, tmp_path: Path) -> None:
    assert "token 65 is outside the vocabulary (0..64)" in fp32.refusal("--prompt-tokens", "1,65")
    assert "--prompt-tokens: got ''" in fp32.refusal("--prompt-tokens", "1,,2")
    assert "no token for '~'" in fp32.refusal("-p", "~")
    assert "UTF-8" in fp32.refusal(stdin=(_file(tmp_path / "latin", b"\xe9")).open("rb"))
    for parts in ("1", "1,2", f"{2**62},{2**62}"):
        line = fp32.refusal("--prompt-tokens", "1,2", "--logits", str(tmp_path / "logits"), "--parts", parts)
        assert "add up to the 2 of --prompt-tokens" in line
    line = fp32.refusal("--prompt-tokens", "1", "--logits", str(tmp_path / "no" / "file"))
    assert "cannot be written" in line


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
