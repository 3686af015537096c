"""A package of a model that is not RMS-E, in Python and in rmse-runner: tests/toy_recurrent.py says what it is made of."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_one_line, reseal
from native_runner import Runner
from toy_recurrent import ROOM, VOCAB, ToyRecurrent

from rmse_edge.cli.evaluate import main as rmse_eval
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import PackageError, UserError
from rmse_edge.runtimes import LoopRuntime, open_runtime
from rmse_edge.runtimes.engines.torch import TorchRuntime

pytestmark = [pytest.mark.executorch, pytest.mark.native, pytest.mark.slow]

IDS = np.random.default_rng(0).integers(0, VOCAB, ROOM)
PARTS = (3, 18, 1, 26)  # calls of one row and of eight, padded ones among them
DIALS: dict[str, dict[str, float]] = {"gate": {}, "two loops": {"max_loops": 2}, "full depth": {"exit_threshold": 1.0}}


@pytest.fixture(scope="module")
def reference() -> TorchRuntime:
    return TorchRuntime(ToyRecurrent().eval(), "toy")


@pytest.fixture
def toy(runner: Path, toy_package: Path) -> Runner:
    return Runner([runner], toy_package)


def fed_in_parts(runtime: LoopRuntime, dials: Any) -> tuple[np.ndarray, np.ndarray]:
    runtime.reset()
    fed = [runtime.feed(part, dials) for part in np.split(IDS, np.cumsum(PARTS)[:-1])]
    return np.concatenate([f.logits for f in fed]), np.concatenate([f.depth for f in fed])


def close(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-5)


def told(dials: dict[str, float]) -> list[str]:
    return [part for name, value in dials.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize("changes", DIALS.values(), ids=DIALS)
def test_both_hosts_say_what_pytorch_says(
    reference: TorchRuntime, toy_package: Path, toy: Runner, changes: dict[str, float], tmp_path: Path
) -> None:
    """However the text is cut: states, noise, coda and stops are those of each position."""
    dials = reference.info.dials_with(**changes)
    reference.reset()
    whole = reference.feed(IDS, dials)
    expected = whole.logits, whole.depth
    if not changes:
        assert len(set(whole.depth)) > 2
    runtime = open_runtime(toy_package, threads=1)
    assert isinstance(runtime, LoopRuntime)
    close(fed_in_parts(reference, dials), expected)
    close(fed_in_parts(runtime, dials), expected)
    parts = ("--parts", ",".join(map(str, PARTS)))
    close(toy.feed(IDS, tmp_path / "logits", *told(changes)), expected)
    close(toy.feed(IDS, tmp_path / "logits", *parts, *told(changes)), expected)


def test_another_noise_seed_begins_from_other_noise(reference: TorchRuntime) -> None:
    """The comparison above sees noise at all."""
    dials = reference.info.dials
    expected, _ = fed_in_parts(reference, dials)
    reference.noise_seed = 1
    try:
        found, _ = fed_in_parts(reference, dials)
    finally:
        reference.noise_seed = 0
    assert np.abs(found - expected).max() > 1e-3


def test_state_takes_what_its_shapes_say(toy: Runner, toy_package: Path) -> None:
    runtime = open_runtime(toy_package, threads=1)
    assert toy.document("--prompt-tokens", "1", "-n", "1")["state_bytes"] == runtime.state_bytes()


def test_its_calls_are_timed(toy: Runner) -> None:
    """Of one row and of eight, with whatever the loop reads."""
    flags = ("--prompt-tokens", ",".join(map(str, IDS)), "-p", "24", "-n", "0", "-r", "1")
    document = toy.document("--bench", *flags)
    assert {row["test"] for row in document["rows"]} == {"pp24"}
    assert {row["test"] for row in document["loop_rows"]} == {"loop1", "loop8"}


TIMES = ("prompt_tokens_per_s", "time_to_first_token_s", "tokens_per_s")


@pytest.mark.parametrize("flags", [("-n", "20", "--temperature", "0"), ("-n", "20", "--seed", "3"), ("-n", "100")])
def test_texts_are_ids_where_there_is_no_tokenizer(
    toy: Runner, toy_package: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The last one asks for more than the model has room for: it ends there."""
    every = ("--prompt-tokens", "1,2,3", *flags)
    assert rmse_run([str(toy_package), *every, "-t", "1", "-o", "json"]) == 0
    expected, found = json.loads(capsys.readouterr().out), toy.document(*every)
    assert list(found) == list(expected)
    for name in (*TIMES, "runtime"):
        assert type(found.pop(name)) is type(expected.pop(name))
    assert found == expected and found["text"] == " ".join(map(str, found["tokens"]))
    assert found["finish_reason"] == ("max_seq_len" if flags == ("-n", "100") else "length")


def test_shown_ids(toy: Runner, toy_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = ("--prompt-tokens", "1,2,3", "-n", "5", "--temperature", "0")
    assert rmse_run([str(toy_package), *every]) == 0
    alone = capsys.readouterr().out
    assert toy(*every).stdout == alone and re.fullmatch(r"\d+( \d+){4}\n", alone)
    assert rmse_run([str(toy_package), *every, "--show-prompt"]) == 0
    assert capsys.readouterr().out == f"1 2 3 {alone}"


def test_a_text_goes_on_from_a_session_without_tokenizer(
    toy_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, session = ("--temperature", "0", "-o", "json"), str(tmp_path / "text.session")

    def tokens(*more: str) -> list[int]:
        assert rmse_run([str(toy_package), *more, *flags]) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    first = tokens("--prompt-tokens", "1,2,3", "-n", "5", "--save-session", session)
    more = tokens("--prompt-tokens", "4,5", "-n", "5", "--session", session)
    assert more == tokens("--prompt-tokens", ",".join(map(str, [1, 2, 3, *first, 4, 5])), "-n", "5")


def test_what_no_text_may_be(toy: Runner, toy_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both say it in the same words."""
    ids = ",".join(["1"] * (ROOM + 1))
    said = f"{ROOM + 1} tokens are more than the {ROOM} that toy attends to; shorten the text"
    for flags, part in (
        (("--prompt-tokens", ids), said),
        (("--prompt-tokens", f"1,{VOCAB}"), f"token {VOCAB} is outside the vocabulary (0..{VOCAB - 1})"),
        (("--prompt-tokens", "1", "--exit-epsilon", "0.1"), "--exit-epsilon: toy has no such rule"),
        (("--prompt-tokens", "1", "--exit-entropy-change", "0.1"), "--exit-entropy-change: toy has no such rule"),
        (("--prompt-tokens", "1", "--exit-steady", "2"), "--exit-steady: toy has no such rule"),
        (
            ("--prompt-tokens", "1", "--exit-steady", "0.5"),
            "--exit-steady: got '0.5', expected a whole number of at least 0",
        ),
        (("--prompt-tokens", "1", "--exit-kl", "-1"), "--exit-kl: got '-1', expected a number of at least 0"),
        (("-p", "A"), "tokenizer.json"),
    ):
        assert part in toy.refusal(*flags)
        assert rmse_run([str(toy_package), *flags]) == 2
        assert_one_line(capsys.readouterr().err, part)
    runtime = open_runtime(toy_package, threads=1)
    with pytest.raises(UserError, match="49 tokens are more"):
        runtime.feed([1] * (ROOM + 1), runtime.info.dials)
    assert runtime.position == 0
    assert rmse_run([str(toy_package), "--prompt-tokens", "1", "--chat"]) == 2
    assert_one_line(capsys.readouterr().err, "leave out --chat")


def test_ids_are_scored(toy_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From an array and from a text; what is neither is refused."""

    def score(path: Path, code: int = 0) -> Any:
        assert rmse_eval([str(toy_package), "--ids", str(path), "-o", "json"]) == code
        output = capsys.readouterr()
        return json.loads(output.out) if code == 0 else output.err

    np.save(tmp_path / "ids.npy", IDS[:30].astype(np.int32))
    (tmp_path / "ids.txt").write_text("\n".join(map(str, IDS[:20])) + "\n" + ", ".join(map(str, IDS[20:30])))
    first, second = (score(tmp_path / name) for name in ("ids.npy", "ids.txt"))
    assert first["tokens"] == 29 and first["loss"] == second["loss"]
    runtime = open_runtime(toy_package, threads=1)
    logits = runtime.feed(IDS[:29], runtime.info.dials).logits.astype(np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(29), IDS[1:30]]
    assert abs(first["loss"] - losses.mean()) < 1e-5
    np.save(tmp_path / "floats.npy", np.ones(3))
    (tmp_path / "noise.npy").write_bytes(b"\x93NUMPY noise")
    (tmp_path / "words.txt").write_text("1 two 3")
    (tmp_path / "large.txt").write_text(f"1 {VOCAB}")
    for name, part in {
        "floats.npy": "expected whole numbers in one dimension",
        "noise.npy": "not an array of NumPy's",
        "words.txt": "got 'two', expected token ids",
        "large.txt": f"token {VOCAB} is outside the vocabulary",
    }.items():
        assert_one_line(score(tmp_path / name, 2), part)


# ----------------------------------------------------------------------------------------------------- what is refused

Change = Callable[[dict[str, Any]], object]


def of_state(name: str, /, **values: Any) -> Change:
    return lambda manifest: manifest["model"]["state"][name].update(values)


def model(**values: Any) -> Change:
    return lambda manifest: manifest["model"].update(values)


def without(*names: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        part = manifest
        for name in names[:-1]:
            part = part[name]
        del part[names[-1]]

    return change


def grows(method: str, side: str, name: str, axis: int | None) -> Change:
    """A tensor of a method says that another of its axes grows with the appended state, or none."""

    def change(manifest: dict[str, Any]) -> None:
        tensor = next(t for t in manifest["methods"][method][side] if t["name"] == name)
        tensor["slots_axis"] = axis

    return change


def renamed_state(manifest: dict[str, Any]) -> None:
    """`past` is called as what hosts give themselves."""
    state = manifest["model"]["state"]
    state["tokens"] = state.pop("past")


LIES: dict[str, tuple[Change, str]] = {
    "an unknown kind": (of_state("past", kind="mood"), "model.state.past.kind: got "),
    "an unknown reader": (of_state("past", read_by=["prelude", "mood"]), "model.state.past.read_by"),
    "no reader": (of_state("past", read_by=[]), "model.state.past.read_by: got nothing, expected the methods that read it"),
    "no kind": (without("model", "state", "past", "kind"), "model.state.past.kind: is missing"),
    "no flag": (of_state("past", per_loop="no"), "model.state.past.per_loop: got "),
    "a state of another name": (renamed_state, "model.state.tokens: got a name that hosts give themselves, expected another"),
    "a source that nothing gives": (of_state("past", source="mood"), "outputs.mood: got no such tensor"),
    "a source that is the host's": (of_state("memory", source="memory"), "outputs.memory: got no such tensor"),
    "a source of another shape": (of_state("past", source="keys"), "outputs.keys: got [4, 1, 1, 2, 16] float32, expected [1, 1, 32]"),
    "replaced by what has slots": (of_state("memory", kind="ring"), "outputs.new_memory: got [4, 1, 2, 16, 16] float32, expected "),
    "rows of other loops": (of_state("memory", shape=[3, 1, 2, 16, 16]), "a row for each of the 4 loops"),
    "rows of no loop": (of_state("memory", per_loop=False), "methods.step_1.inputs.memory: got [1, 2, 16, 16] float32"),
    "slots without positions": (of_state("tail", shape=[5, 32]), "positions in the last axis but one"),
    "more slots than the program has": (of_state("past", shape=[1, 49, 32]), "methods.prelude_1.inputs.past: got [1, 48, 32] float32"),
    "written, and never a segment": (of_state("tail", kind="written", source="coda"), "model.state.tail.kind"),
    "a part that is missing": (without("model", "text"), "model"),
    "a board": (lambda m: (without("model", "text")(m), model(board={"cells": 4, "symbols": 2})(m)), "manifest.json: m"),
    "no segment": (without("model", "segment"), "model.segment: is missing"),
    "a segment": (model(segment=4), "model.chunks: got [1, 8], expected at most 4 rows"),
    "angles": (lambda m: m["model"]["text"].update(rotary_dims=-2), "model.text.rotary_dims: got -2"),
    "angles of no base": (lambda m: m["model"]["text"].update(further_thetas={"near": 0}), "model.text.further_thetas.near: got 0"),
    "a prefix": (lambda m: m["model"]["text"].update(prefix=1), "model.text.prefix: got 1"),
    "a prefix that nothing reads": (lambda m: m["model"]["text"].update(prefix=True), "model.text.prefix: got true, expected false, since begin_1 takes no prefix"),
    "no deviation": (model(noise={"start": 0}), "model.noise.start: got 0"),
    "noise for something else": (model(noise={"other": 1.0}), "methods.prelude_1.inputs.start: got a tensor that nothing gives"),
    "noise in place of tokens": (model(noise={"start": 1.0, "tokens": 1.0}), "model.noise.tokens: got a name that hosts give"),
    "no coda": (lambda m: m["model"]["methods"].remove("coda"), "methods.head_1.inputs.y: got a tensor that nothing gives"),
    "a coda that is not there": (without("methods", "coda_8"), "expected coda_8 among them"),
    "no commit": (lambda m: m["model"]["methods"].remove("commit"), "outputs.new_memory: got no such tensor"),
    "no flag to go on": (lambda m: m["methods"]["step_8"]["outputs"].pop(), "any_active"),
    "all slots from the start": (model(page=None), "methods.prelude_1.inputs.past.slots_axis: got 1, expected null"),
    "no slots": (model(page=0), "model.page: got 0"),
    "slots that stay": (grows("prelude_1", "inputs", "past", None), "methods.prelude_1.inputs.past.slots_axis: got null, expected 1"),
    "tokens that grow": (grows("prelude_8", "inputs", "tokens", 1), "methods.prelude_8.inputs.tokens.slots_axis: got 1, expected null"),
    "a state that grows": (grows("begin_8", "outputs", "first_h", 1), "slots_axis: got 1, expected an axis of 48"),
    "logits that grow": (grows("head_8", "outputs", "logits", 1), "methods.head_8.outputs.logits.slots_axis: got 1, expected null"),
    "an axis that is not there": (grows("prelude_1", "inputs", "past", 3), "slots_axis: got 3, expected "),
    "states that grow apart": (of_state("tail", kind="append", shape=[1, 47, 16]), "model.state: got appended ones of "),
    "another width": (model(width=8), "expected [1, 1, 8] float32"),
    "no width": (without("model", "width"), "model.width: is missing"),
    "weights": (model(loop_weights=-1), "model.loop_weights: got -1"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused_by_both_hosts(
    runner: Path, toy_package: Path, tmp_path: Path, lie: str
) -> None:
    """By the same field, nearly always in the same words."""
    change, part = LIES[lie]
    folder = shutil.copytree(toy_package, tmp_path / "lie.rmse")
    reseal(folder, change)
    assert part in Runner([runner], folder).refusal("--prompt-tokens", "1", "-n", "1")
    with pytest.raises(PackageError) as caught:
        open_runtime(folder, threads=1)
    assert_one_line(str(caught.value), part, str(folder))
