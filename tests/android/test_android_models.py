"""The core on models: it says what PyTorch says, over memories, wrapped rings and sessions, and writes what rmse-run writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import TEXTS, Case, settings_of, text_of, whole
from conftest import made_once, made_package
from helpers import reseal
from kotlin_core import Core, CoreRuntime, assert_says_what_pytorch_says
from paths import ROOT
from shipped import sample

from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.bench import main as rmse_bench
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import UserError
from rmse_edge.info import PAGE
from rmse_edge.package import Package
from rmse_edge.runtimes import runtime_for
from rmse_edge.runtimes.host.session import restore_session, save_session

pytestmark = [pytest.mark.android, pytest.mark.onnx, pytest.mark.slow]

DENSE = ROOT / "models" / "ouro-shakespeare"
PROMPT = "ROMEO:\nIt is the east, and "


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Another architecture, which appends what it keeps, in fp32."""
    package = made_once(
        "ouro.rmse", tmp_path_factory, lambda folder: rmse_export(["-m", str(DENSE), "-o", str(folder)])
    )
    return load_checkpoint(DENSE), package


@pytest.fixture
def run(core: Core, shipped_int4: tuple[Any, Path], tmp_path: Path) -> Iterator[CoreRuntime]:
    runtime = CoreRuntime(core, shipped_int4[1], tmp_path)
    yield runtime
    runtime.close()


# -------------------------------------------------------------------------------------------------- as PyTorch says


@pytest.mark.parametrize("made", ["shipped_int4", pytest.param("dense", marks=pytest.mark.nightly)])
def test_the_core_says_what_pytorch_says(core: Core, made: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """As the parity gate asks of every runtime, by its exact rule, at full depth and by each exit rule: logits, depths, and what the
    memory made of every segment, over 256 tokens of a conversation with a session in the middle.
    """
    model, package = request.getfixturevalue(made)
    runtime, text = CoreRuntime(core, package, tmp_path), sample(300)[:256]
    window, segment = runtime.info.window, runtime.info.segment
    assert window is None or (window < 200 and segment is not None and segment < window)  # wrapped and learned within
    assert_says_what_pytorch_says(model, runtime, text)
    runtime.close()


@pytest.mark.packages
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.nightly] if c.is_nightly("onnx", "fp32") else [], id=c.name) for c in TEXTS],
)
def test_every_architecture_of_texts(
    core: Core, case: Case, tmp_path: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rings, appended and replaced state, angles of several bases, noise, prefixes, codas, exits of every rule."""
    if (fixture := case.made.get(("onnx", "fp32"))) is not None:
        folder = request.getfixturevalue(fixture)
    else:
        _, folder = made_package(case, "onnx", "fp32", tmp_path_factory)
    runtime, text = CoreRuntime(core, folder, tmp_path), text_of(case)
    for dials in settings_of(case).values():
        runtime.reset()
        logits, depth = whole(case.model(), text, dials)
        half = len(text) // 2
        fed = [runtime.feed(part, dials) for part in (text[:half], text[half : half + 1], text[half + 1 :])]
        assert np.array_equal(np.concatenate([f.depth for f in fed]), depth)
        np.testing.assert_allclose(np.concatenate([f.logits for f in fed]), logits, atol=1e-4)
    if runtime.info.language.prefix:
        import torch

        dials = settings_of(case)["adaptive"]
        scalars = {name: torch.from_numpy(value) for name, value in dials.arrays().items()}
        expected = case.model().whole_text(torch.from_numpy(text), scalars, prefix=40)
        runtime.reset()
        fed = [runtime.feed(text[:50], dials, prefix=40), runtime.feed(text[50:], dials)]
        np.testing.assert_allclose(np.concatenate([f.logits for f in fed]), expected.logits, atol=1e-4)
        with pytest.raises(UserError, match=r"^prefix: 65 tokens are more than the 64 that one call of "):
            runtime.reset()
            runtime.feed(text, dials, prefix=65)
    runtime.close()


def test_a_text_longer_than_a_page(core: Core, dense: tuple[Any, Path], tmp_path: Path) -> None:
    """What is appended grows in the middle of a call; behind a session, too."""
    model, package = dense
    runtime, text, dials = CoreRuntime(core, package, tmp_path), sample(PAGE + 44), load_checkpoint(DENSE).config.dials
    logits, depth = whole(model, text, dials)
    begun = runtime.ask("reset")["state_bytes"]
    fed = [runtime.feed(text[: PAGE - 6], dials), runtime.feed(text[PAGE - 6 : PAGE + 20], dials)]
    assert runtime.ask("save", path=str(tmp_path / "s"), chat="")["state_bytes"] > 1.9 * begun
    runtime.reset()
    assert runtime.ask("restore", path=str(tmp_path / "s"))["position"] == PAGE + 20
    fed.append(runtime.feed(text[PAGE + 20 :], dials))
    assert np.array_equal(np.concatenate([f.depth for f in fed]), depth)
    np.testing.assert_allclose(np.concatenate([f.logits for f in fed]), logits, atol=1e-4)
    runtime.close()


# ------------------------------------------------------------------------------------------------ as rmse-run writes

TEXT_FLAGS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "greedy": ({"temperature": 0.0}, {}),
    "a seed": ({"seed": 1}, {}),
    "a large seed": ({"seed": 2**63 + 11, "temperature": 1.3}, {}),
    "top-k, top-p": ({"seed": 4, "top_k": 20, "top_p": 0.9}, {}),
    "two loops": ({"seed": 2}, {"max_loops": 2}),
    "no exits": ({"seed": 3}, {"exit_threshold": 1.0}),
    "another rule": ({"seed": 3}, {"exit_epsilon": 0.2, "min_loops": 2}),
}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@pytest.mark.parametrize(("options", "dials"), TEXT_FLAGS.values(), ids=TEXT_FLAGS)
def test_texts_are_those_of_rmse_run(
    run: CoreRuntime,
    shipped_int4: tuple[Any, Path],
    options: dict[str, Any],
    dials: dict[str, float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tokens, depths and statistics; 200 tokens, over three writes of the memory and a wrapped ring."""
    flags = [str(word) for name, value in (options | dials).items() for word in (flag(name), value)]
    assert rmse_run([str(shipped_int4[1]), "-p", PROMPT, "-n", "200", "-t", "1", "-o", "json", *flags]) == 0
    expected, found = json.loads(capsys.readouterr().out), run.generate(PROMPT, 200, dials, **options)
    same = ["tokens", "depth", "finish_reason", "histogram", "mean_loops", "prompt_mean_loops", "generated_tokens"]
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert "".join(text for text, _ in found["spans"]) == expected["text"].removeprefix(PROMPT)


def test_a_stop_string_ends_a_text(
    run: CoreRuntime, shipped_int4: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-p", PROMPT, "-n", "60", "--temperature", "0", "--stop", "the ", "-t", "1", "-o", "json"]
    assert rmse_run([str(shipped_int4[1]), *flags]) == 0
    expected = json.loads(capsys.readouterr().out)
    found = run.generate(PROMPT, 60, stop=["the "], temperature=0.0)
    assert (found["finish_reason"], found["tokens"]) == ("stop", expected["tokens"])
    text = "".join(text for text, _ in found["spans"])
    assert text == expected["text"].removeprefix(PROMPT) and "the " not in text


def test_dials_act_at_once_and_a_text_can_be_stopped(run: CoreRuntime) -> None:
    """From the token behind the change on; what was stopped goes on as if it had not been."""
    found = run.generate(PROMPT, 30, when={"shallow after": 10}, temperature=0.0)
    assert max(found["depth"][:10]) > 1 and set(found["depth"][10:]) == {1}
    run.ask("new text")
    whole_text = run.generate(PROMPT, 30, temperature=0.0)
    run.ask("new text")
    first = run.generate(PROMPT, 30, when={"stop after": 12}, temperature=0.0)
    assert (first["finish_reason"], len(first["tokens"])) == ("interrupted", 12)
    rest = run.generate("", 18, temperature=0.0)
    assert first["tokens"] + rest["tokens"] == whole_text["tokens"]


def test_what_a_text_cannot_be_is_one_line(run: CoreRuntime) -> None:
    """And the text before it is as it was."""
    run.generate(PROMPT, 5, temperature=0.0)
    position = run.ask("save", path=run.session, chat="")[
        "position"
    ]  # of what was fed: the last token comes with the next
    for prompt, dials, said in (
        ("Ä", {}, "the tokenizer has no token for 'Ä'; it knows "),
        ("a", {"max_loops": 13.0}, "max_loops: got 13, expected 1..12"),
        ("a", {"exit_threshold": 0.0}, "exit_threshold: got 0, expected a positive number"),
        ("a", {"exit_speed": 1.0}, "exit_speed: no dial has this name"),
    ):
        with pytest.raises(UserError, match=said.replace(".", r"\.").replace("(", r"\(")):
            run.generate(prompt, 5, dials, temperature=0.0)
    assert run.ask("save", path=run.session, chat="")["position"] == position
    run.ask("new text")
    with pytest.raises(UserError, match="no tokens to run"):
        run.generate("", 5)


def test_a_full_text_is_a_sentence(core: Core, dense: tuple[Any, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(dense[1], tmp_path / "short.rmse")
    reseal(folder, lambda manifest: manifest["model"]["text"].update(max_seq_len=40))
    runtime = CoreRuntime(core, folder, tmp_path)
    found = runtime.generate("ROMEO:", 100, temperature=0.0)
    assert (found["finish_reason"], len(found["tokens"])) == ("max_seq_len", 35)
    with pytest.raises(UserError, match=r"^41 tokens are more than the 40 this package was exported for"):
        runtime.generate("", 5)
    runtime.ask("new text")
    with pytest.raises(UserError, match=r"^50 tokens are more than the 40 this package was exported for"):
        runtime.generate("R" * 50, 5)
    runtime.close()


# ------------------------------------------------------------------------------------------------------- sessions


def test_sessions_go_from_python_to_the_core_and_back(
    run: CoreRuntime, shipped_int4: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same file, whatever is in its header; both go on with the same tokens."""
    python, dials = runtime_for(Package.open(shipped_int4[1]), threads=1), run.info.dials
    text = sample(140)
    python.feed(text[:130], dials)
    chat = 'it\'s "so"\\ \u00e9\u200b\ud7ff\U0001f600 日本\n'
    save_session(python, tmp_path / "python", chat=chat)  # type: ignore[arg-type]
    assert run.ask("restore", path=str(tmp_path / "python"))["position"] == 130
    a, b = python.feed(text[130:], dials), run.feed(text[130:], dials)
    assert np.array_equal(a.depth, b.depth)
    np.testing.assert_allclose(a.logits, b.logits, atol=1e-4)
    run.ask("save", path=str(tmp_path / "core"), chat=chat)
    assert (tmp_path / "core").stat().st_mode & 0o777 == 0o600
    python.reset()
    assert restore_session(python, tmp_path / "core").chat == chat and python.position == 140  # type: ignore[arg-type]
    # A text that rmse-run began is ended by the core as by rmse-run, the token that nobody fed yet included.
    flags = ["-t", "1", "-o", "json", "--temperature", "0"]
    session = str(tmp_path / "text")
    assert rmse_run([str(shipped_int4[1]), "-p", PROMPT, "-n", "50", *flags, "--save-session", session]) == 0
    capsys.readouterr()
    assert rmse_run([str(shipped_int4[1]), "-p", "Now", "-n", "20", *flags, "--session", session]) == 0
    expected = json.loads(capsys.readouterr().out)
    run.ask("restore text", path=session)
    found = run.generate("Now", 20, temperature=0.0)
    assert (found["tokens"], found["depth"]) == (expected["tokens"], expected["depth"])
    run.ask("save text", path=session)
    assert rmse_run([str(shipped_int4[1]), "-p", "", "-n", "9", *flags, "--session", session]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == run.generate("", 9, temperature=0.0)["tokens"]


def test_a_bad_session_is_refused_and_changes_nothing(
    run: CoreRuntime, core: Core, dense: tuple[Any, Path], tmp_path: Path
) -> None:
    text = sample(20)
    run.feed(text[:10], run.info.dials)
    path = tmp_path / "s"
    run.ask("save", path=str(path), chat="")
    good = path.read_bytes()
    other = CoreRuntime(core, dense[1], tmp_path)
    with pytest.raises(UserError, match="a session of another model"):
        other.ask("restore", path=str(path))
    other.close()
    expected = run.feed(text[10:], run.info.dials).logits
    flipped = bytearray(good)
    flipped[-1] ^= 1
    for content, said in (
        (bytes(flipped), "its SHA-256 does not fit"),
        (good[:-5], "damaged"),
        (good[:100], "damaged"),
        (b"", "damaged"),
        (b"\xff" * 50, "damaged"),
        (good.replace(b'"version":"3"', b'"version":"2"'), "session version 2, and this app reads 3"),
        (good.replace(b"rmse-edge session", b"rmse-edge sessium"), "not a session file"),
        (good.replace(b'"position":"10"', b'"position":"-1"'), "position: got '-1', expected a number of tokens"),
        (good.replace(b'"pending":""', b'"pending":"99"'), "pending: got token 99, expected some below 65"),
    ):
        assert content != good
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            run.ask("restore", path=str(path))
    path.write_bytes(good)
    run.ask("restore", path=str(path))
    assert np.array_equal(run.feed(text[10:], run.info.dials).logits, expected)
    with pytest.raises(UserError, match="cannot be written"):
        run.ask("save", path=str(tmp_path / "none" / "s"), chat="")


# --------------------------------------------------------------------------------------------------------- bench


def test_a_bench_says_what_rmse_bench_says(
    core: Core, shipped_int4: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rows under the same names, the same depths; times are its own."""
    found = core.document("bench", shipped_int4[1], 2)
    assert rmse_bench([str(shipped_int4[1]), "-p", "70", "-n", "20", "-r", "2", "-t", "1", "-o", "json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert list(found) == list(expected)
    assert found["runtime"].startswith("onnxruntime ")
    same = ["model", "quant", "parameters", "package_bytes", "threads", "repetitions", "histogram", "work_skipped"]
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert {n: found["dials"][n] for n in expected["dials"]} == expected["dials"]
    for kind, times in (("rows", "tok_per_s"), ("loop_rows", "ms")):
        for ours, theirs in zip(found[kind], expected[kind], strict=True):
            assert set(ours) == set(theirs)
            assert ours.pop(times).keys() == theirs.pop(times).keys()
            assert [d.pop("gb_per_s", None) is None for d in (ours, theirs)] in ([True, True], [False, False])
            assert ours == theirs
    assert found["loop_time_ratio"].keys() == expected["loop_time_ratio"].keys()
    assert found["adaptive_speedup"].keys() == expected["adaptive_speedup"].keys()


@pytest.mark.parametrize("made", ["shipped_int4", "dense"])
def test_what_generating_takes_is_foreseen(core: Core, made: str, request: pytest.FixtureRequest) -> None:
    """The memory that a package is said to need is not less than it takes, nor three times as much."""
    _, package = request.getfixturevalue(made)
    fresh = core.serve()
    before, after = fresh.ask(["memory", str(package)])
    fresh.close()
    predicted = core.document("open", package)["predicted_bytes"]
    assert after - before <= predicted <= 3 * (after - before)
