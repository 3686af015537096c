"""Every architecture of tests/architectures.py as packages of every target, fp32 and int4, made and proved by `rmse-export`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import (
    CASES,
    TARGETS,
    TEXTS,
    Case,
    argmax_of_whole_text,
    flags_of,
    greedy,
    settings_of,
    text_of,
    whole,
)
from conftest import made_package
from helpers import assert_one_line, require_executorch, reseal
from native_runner import Runner

from rmse_edge.arch.common.identity import model_info
from rmse_edge.cli.bench import main as rmse_bench
from rmse_edge.cli.evaluate import main as rmse_eval
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import ArgumentError, PackageError, ParityError, UserError
from rmse_edge.export.gate.compare import compare
from rmse_edge.export.gate.reference import Reference
from rmse_edge.info import PAGE
from rmse_edge.loop.dials import Dials
from rmse_edge.package import MANIFEST, Package
from rmse_edge.puzzles.sets import made as made_boards
from rmse_edge.puzzles.sets import write_boards
from rmse_edge.puzzles.sudoku import Sudoku, solved
from rmse_edge.quantize import load_quantized
from rmse_edge.runtimes import BoardRuntime, LoopRuntime, board_for, runtime_for
from rmse_edge.runtimes.engines.torch import TorchMethods, TorchRuntime
from rmse_edge.runtimes.host.calls import Calls
from rmse_edge.runtimes.host.session import restore_session, save_session
from rmse_edge.runtimes.text.speculation import Speculation

pytestmark = [pytest.mark.packages, pytest.mark.slow]


def one(case: Case, target: str, quant: str) -> Any:
    marks = [getattr(pytest.mark, target), *([pytest.mark.nightly] if case.is_nightly(target, quant) else [])]
    return pytest.param((case, target, quant), id=f"{case.name}-{target}-{quant}", marks=marks)


def packages(cases: tuple[Case, ...], *quants: str) -> Any:
    """One of `cases`, made for every target."""
    return pytest.mark.parametrize(
        "made",
        [one(case, target, quant) for target in TARGETS for case in cases for quant in quants or case.quants],
        indirect=True,
    )


class Made:
    """A package, and what it was made of."""

    def __init__(self, case: Case, target: str, quant: str, folder: Path, source: Path) -> None:
        self.case, self.target, self.quant, self.folder = case, target, quant, folder
        self.model = case.model() if quant == "fp32" else load_quantized(source).model


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A package through `rmse-quantize` and `rmse-export`, the parity gate included. Read only: copy it to change it."""
    case, target, quant = request.param
    if target == "executorch":
        require_executorch()
    pytest.importorskip({"onnx": "onnxruntime", "coreml": "coremltools"}.get(target, target))
    if (fixture := case.made.get((target, quant))) is not None:
        return Made(case, target, quant, request.getfixturevalue(fixture), Path())
    source, folder = made_package(case, target, quant, tmp_path_factory)
    return Made(case, target, quant, folder, source)


@packages(CASES)
def test_a_package_is_proved_whole_and_refused_when_damaged(made: Made, tmp_path: Path) -> None:
    package = Package.open(made.folder)
    parity = package.manifest["parity"]
    info = model_info(made.case.model(), made.case.name, 0)
    assert parity["rule"] == ("exact" if made.quant == "fp32" else "rounded") and len(parity["settings"]) > 1
    if info.text is not None:
        assert all(setting["undecided"] == [] for setting in parity["settings"].values() if made.quant == "fp32")
        kinds = {name: s["kind"] for name, s in package.manifest["model"]["state"].items()}
        assert kinds == {name: s.kind for name, s in info.state.items()}
        if info.capacity is None:  # no layer attends beyond a window
            runtime = runtime_for(package)
            kept, text = runtime.info.kept_bytes, text_of(made.case)
            runtime.feed(text, settings_of(made.case)["adaptive"])
            there = runtime.tensors()  # type: ignore[attr-defined]
            held = sum(there[name].nbytes for name in runtime.info.state)
            assert held == kept(len(text)) == kept(1_000) == kept(100_000) > 0
    damaged = shutil.copytree(made.folder, tmp_path / "p.rmse")
    largest = max((f for f in damaged.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(PackageError, match=largest.name) as caught:
        Package.open(damaged)
    assert_one_line(str(caught.value))


@packages(TEXTS)
def test_a_package_goes_on_from_a_session_of_pytorch_s(made: Made, tmp_path: Path) -> None:
    """And says what the model says, by itself and behind the session."""
    text, dials = text_of(made.case), settings_of(made.case)["adaptive"]
    half = len(text) // 2
    package = Package.open(made.folder)
    ours, theirs, before = TorchRuntime(made.model, made.case.name), runtime_for(package), runtime_for(package)
    before.feed(text[:half], dials)
    ours.feed(text[:half], dials)
    ours.info = theirs.info  # a session belongs to a model, and an integer model is named by the float one
    alike = [{name: a.dtype for name, a in r.tensors().items()} for r in (ours, theirs)]  # type: ignore[attr-defined]
    kept = theirs.tensors()  # type: ignore[attr-defined]
    assert {name: kept[name].dtype for name in theirs.info.state} == {n: s.dtype for n, s in theirs.info.state.items()}
    # Core ML's integer packages keep rings in float16, and go on from sessions of their own.
    save_session(ours if alike[0] == alike[1] else before, tmp_path / "s")  # type: ignore[arg-type]
    restore_session(theirs, tmp_path / "s")  # type: ignore[arg-type]
    a, b = (runtime.feed(text[half:], dials) for runtime in (ours, theirs))
    assert alike[0] == alike[1] or (made.target, made.quant) == ("coreml", "int4")
    if made.quant == "fp32":
        assert np.array_equal(a.depth, b.depth)
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-4)
    else:
        assert (a.depth == b.depth).mean() > 0.9 and (a.logits.argmax(-1) == b.logits.argmax(-1)).mean() > 0.9


@packages(tuple(case for case in TEXTS if case.name == "tower"), "fp32")
def test_a_text_longer_than_a_page(made: Made, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The appended state grows in the middle of it; where an engine cannot do that, all of it is there from the start."""
    text, dials = np.resize(text_of(made.case), PAGE + 40), settings_of(made.case)["adaptive"]
    runtime = runtime_for(Package.open(made.folder))
    fed = runtime.feed(text, dials)
    logits, depth = whole(made.model, text, dials)
    assert np.array_equal(fed.depth, depth)
    np.testing.assert_allclose(fed.logits, logits, atol=1e-4)
    assert isinstance(runtime, LoopRuntime) and runtime.calls.slots == 2 * PAGE == runtime.info.capacity
    runtime.reset()
    assert runtime.calls.slots == (PAGE if made.target != "coreml" else 2 * PAGE)
    if made.target == "executorch":
        flags = flags_of(dials)
        logits, depth = Runner([request.getfixturevalue("runner")], made.folder).feed(text, tmp_path / "logits", *flags)
        assert np.array_equal(fed.depth, depth)
        np.testing.assert_allclose(fed.logits, logits, atol=1e-4)


@packages(TEXTS, "fp32")
def test_a_package_generates_what_the_whole_text_says(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the runtime, `rmse-run` and `rmse-eval`; saved in the middle, too. And it is timed."""
    prompt, dials = text_of(made.case)[:20], settings_of(made.case)["adaptive"]
    runtime = runtime_for(Package.open(made.folder))
    tokens = greedy(runtime, prompt, dials)
    assert tokens == argmax_of_whole_text(made.model, prompt, tokens, dials)
    runtime.reset()
    assert greedy(runtime, prompt, dials, speculation=Speculation(1)) == tokens
    flags = [*flags_of(dials), "-o", "json"]
    session = str(tmp_path / "s")
    said = []
    for more in (
        ["--prompt-tokens", ",".join(map(str, prompt)), "-n", "7", "--save-session", session],
        ["--prompt-tokens", str(text_of(made.case)[20]), "-n", "5", "--session", session],
    ):
        assert rmse_run([str(made.folder), *more, "--temperature", "0", *flags, *made.case.run_flags]) == 0
        said.append(json.loads(capsys.readouterr().out)["tokens"])
    assert said[0] == tokens[:7]
    behind = np.array([*prompt, *said[0], text_of(made.case)[20]])
    assert said[1] == argmax_of_whole_text(made.model, behind, said[1], dials)
    ids = text_of(made.case)[:40]
    (tmp_path / "ids.txt").write_text(" ".join(map(str, ids)))
    assert rmse_eval([str(made.folder), "--ids", str(tmp_path / "ids.txt"), *flags]) == 0
    loss = json.loads(capsys.readouterr().out)["loss"]
    logits, _ = whole(made.model, ids[:-1], dials)
    log_p = torch.log_softmax(torch.from_numpy(logits), -1)[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])]
    assert abs(loss + float(log_p.mean())) < 1e-4
    threads = [] if made.target == "coreml" else ["-t", "1"]  # Core ML takes no number of them
    small = ["-p", "16", "-n", "4", "-r", "1", "-d", "1", *threads]
    (tmp_path / "long.txt").write_text(" ".join(map(str, np.resize(ids, 100))))
    assert rmse_bench([str(made.folder), "--ids", str(tmp_path / "long.txt"), *small, *flags]) == 0
    assert {row["test"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"pp16", "tg4"}


PREFIXED = tuple(c for c in TEXTS if (text := model_info(c.model(), c.name, 0).text) is not None and text.prefix)


@packages(PREFIXED, "fp32")
@pytest.mark.parametrize(("prefix", "parts"), [(40, (50, 100)), (5, (5, 145)), (64, (150,))], ids=str)
def test_a_package_reads_a_prefix(
    made: Made, prefix: int, parts: tuple[int, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Within the first call, as few tokens as are otherwise read one by one, and a whole call; the C++ runner, too."""
    text, dials = text_of(made.case), settings_of(made.case)["adaptive"]
    scalars = {name: torch.from_numpy(value) for name, value in dials.arrays().items()}
    expected = made.model.whole_text(torch.from_numpy(text), scalars, prefix=prefix)
    runtime = runtime_for(Package.open(made.folder))
    fed = [runtime.feed(text[: parts[0]], dials, prefix=prefix)]
    fed += [runtime.feed(part, dials) for part in (text[parts[0] :],) if len(part)]
    assert np.array_equal(np.concatenate([f.depth for f in fed]), expected.depth)
    np.testing.assert_allclose(np.concatenate([f.logits for f in fed]), expected.logits, atol=1e-4)
    causal = whole(made.model, text, dials)[0]
    assert np.abs(causal[: prefix - 1] - expected.logits[: prefix - 1].numpy()).max() > 1e-2
    with pytest.raises(ArgumentError, match=r"^prefix: 65 tokens are more than the 64 that one call of "):
        runtime.reset()
        runtime.feed(text, dials, prefix=65)
    if made.target != "executorch" or prefix != parts[0]:  # to the runner the first part is the prefix
        return
    native, flags = Runner([request.getfixturevalue("runner")], made.folder), flags_of(dials)
    cut = ["--prefix", "all", "--parts", ",".join(map(str, parts))]
    logits, depth = native.feed(text, tmp_path / "logits", *cut, *flags)
    assert np.array_equal(depth, expected.depth)
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
    ids = ",".join(map(str, text[:20]))
    prompt = ("--prompt-tokens", ids, "-n", "6", "--temperature", "0", *flags)
    tokens = native.document(*prompt)["tokens"]  # a prompt is a prefix
    behind = torch.from_numpy(np.array([*text[:20], *tokens]))
    said = made.model.whole_text(behind, scalars, prefix=20).logits
    assert tokens == said[19:-1].argmax(-1).tolist() == native.document(*prompt, "--prefix", "all")["tokens"]
    assert "--prefix: 70 tokens are more than the 64" in native.refusal(
        "--prompt-tokens", ",".join(["1"] * 70), "-n", "1"
    )


@packages(TEXTS, "fp32")
def test_a_wrong_rule_of_a_package_s_host_is_caught(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_for(Package.open(made.folder))
    reference, dials = Reference(made.model, runtime.info), settings_of(made.case)["full depth"]
    text = text_of(made.case)
    assert compare(reference, runtime, text, dials, exact=True)["same_depth"] == 1  # type: ignore[arg-type]
    true, name = Calls.update, next(iter(runtime.info.state))

    def wrong(self: Calls, found: Any, position: int, n: int) -> None:
        before = np.array(self.state[name])
        true(self, found, position, n)
        self.state[name][tuple(map(slice, before.shape))] = before  # it may have grown

    monkeypatch.setattr(Calls, "update", wrong)
    with pytest.raises(ParityError, match=r"^position \d+: logits differ"):
        compare(reference, runtime, text, dials, exact=True)  # type: ignore[arg-type]


@packages(TEXTS, "fp32")
def test_an_unknown_kind_of_state_is_refused(made: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(made.folder, tmp_path / "p.rmse")
    name = next(iter(json.loads((folder / MANIFEST).read_text())["model"]["state"]))
    reseal(folder, lambda m: m["model"]["state"][name].update(kind="whirl"))
    with pytest.raises(PackageError, match=rf"model\.state\.{name}\.kind: got 'whirl', expected one of ring, append"):
        runtime_for(Package.open(folder))


@packages(tuple(case for case in CASES if case not in TEXTS))
def test_a_package_solves_boards_as_the_model_does(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    package = Package.open(made.folder)
    runtime = board_for(package)
    own = BoardRuntime(model_info(made.model, made.case.name, 0), TorchMethods(made.model))
    assert runtime.info.board is not None
    assert (runtime.largest_batch is None) == (made.target == "onnx")
    size = (4, runtime.info.board.cells)
    boards, dials = (
        np.random.default_rng(1).integers(0, runtime.info.board.symbols, size),
        settings_of(made.case)["adaptive"],
    )
    for board, together in zip(boards, runtime.solve_batch(boards, dials)):
        a, b = (r.solve(board, dials) for r in (runtime, own))
        for found in (a, together):
            assert np.array_equal(found.depth, b.depth) and (found.cells == b.cells).mean() > 0.95
    with pytest.raises(UserError, match="fills in boards and reads no text"):
        runtime_for(package)
    assert rmse_run([str(made.folder), "--prompt-tokens", "1"]) == 2
    assert_one_line(capsys.readouterr().err, "fills in boards and reads no text")


def unsolvable(game: Sudoku) -> np.ndarray:
    """A digit twice in its row."""
    return game.read("11" + "." * (game.size**2 - 2), "text")[0]


def ambiguous(game: Sudoku, given: np.ndarray) -> np.ndarray:
    """The board with clues taken away until it has a second solution."""
    board = given.copy()
    for cell in np.flatnonzero(given > 1):
        board[cell] = 1
        if len(solved(board, game.size)[0]) > 1:
            return board
    raise AssertionError("it has one solution without a clue")


@packages(tuple(case for case in CASES if case.name in ("trm", "hrm")))
def test_the_verbs_take_boards_to_a_package(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Solved, shown step by step, evaluated and timed; what is no board is one line, and every answer is checked."""
    game, threads = Sudoku(4), [] if made.target == "coreml" else ["-t", "1"]  # Core ML takes no number of them
    boards, _ = made_boards(game, 32, 1, 0)
    write_boards(tmp_path / "b.csv", game, boards, "test")
    runtime = board_for(Package.open(made.folder))
    given = [boards.given[0], unsolvable(game), ambiguous(game, boards.given[0])]
    (tmp_path / "b.txt").write_text("\n".join(map(game.show, given)))
    flags = [str(made.folder), *threads, *flags_of(settings_of(made.case)["adaptive"])]
    assert rmse_run([*flags, "--board", str(tmp_path / "b.txt"), "-o", "json", "--show-steps"]) == 0
    said = json.loads(capsys.readouterr().out)["solutions"]
    assert said[1]["broken"] and not said[1]["solved"]
    for board, found in zip(given, said):
        own = runtime.solve(board, settings_of(made.case)["adaptive"])
        assert (found["answer"], found["steps"]) == (game.line(own.cells), own.iterations)
        assert len(found["boards"]) == own.iterations and found["boards"][-1] == found["answer"]
        assert found["broken"] == game.broken(board, own.cells) and found["solved"] == (found["broken"] is None)
    for text, line in (("", "holds no board"), ("5" * 16, "5 is no digit of a 4x4 Sudoku"), ("1" * 15, "15 cells")):
        (tmp_path / "bad.txt").write_text(text)
        assert rmse_run([*flags, "--board", str(tmp_path / "bad.txt")]) == 2
        assert_one_line(capsys.readouterr().err, line)
        (tmp_path / "bad.csv").write_text(text and f"source,question,answer,rating\na,{text},{text},0\n")
        assert rmse_eval([*flags, "--boards", str(tmp_path / "bad.csv")]) == 2
        assert_one_line(capsys.readouterr().err, line if text else "expected a CSV")
    assert (
        rmse_eval(
            [*flags, "--boards", str(tmp_path / "b.csv"), "--sweep", "--rule", "exit-threshold=0.5", "-o", "json"]
        )
        == 0
    )
    half, off = json.loads(capsys.readouterr().out)["sweep"]
    assert half["boards"] == 32 and half["mean_steps"] < off["mean_steps"]
    assert sum(s * n for s, n in enumerate(half["histogram"], 1)) == pytest.approx(32 * half["mean_steps"])
    assert rmse_bench([*flags, "--boards", str(tmp_path / "b.csv"), "-r", "1", "-o", "json"]) == 0
    timed = json.loads(capsys.readouterr().out)
    batches = {row["batch"] for row in timed["rows"]}
    assert batches == ({1, 32} if made.target == "onnx" else {1}) and bool(timed["notes"]) == (made.target != "onnx")
    assert len({row["setting"] for row in timed["rows"]}) == 2 and all(r["boards_per_s"] > 0 for r in timed["rows"])


@pytest.mark.native
@pytest.mark.parametrize(
    "made",
    [one(case, "executorch", quant) for case in CASES for quant in case.quants],
    indirect=True,
)
def test_the_runner_says_what_python_says(made: Made, runner: Path, tmp_path: Path) -> None:
    """The same logits and depths, the same greedy tokens; a board is refused."""
    native = Runner([runner], made.folder)
    if made.case not in TEXTS:
        assert native.refusal("--prompt-tokens", "1", "-n", "1")
        return
    text, dials = text_of(made.case), settings_of(made.case)["adaptive"]
    flags = flags_of(dials)
    python = runtime_for(Package.open(made.folder), threads=1)
    expected = python.feed(text, dials)
    logits, depth = native.feed(text, tmp_path / "logits", *flags)
    if made.quant == "fp32":
        assert np.array_equal(depth, expected.depth)
        np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
    else:
        assert (depth == expected.depth).mean() > 0.97 and (
            logits.argmax(-1) == expected.logits.argmax(-1)
        ).mean() > 0.97
    if made.quant == "fp32":
        for setting in (
            Package.open(made.folder).manifest["parity"]["settings"].values()
        ):  # one for each of its exit rules
            dials = Dials(**setting["dials"])
            python.reset()
            _, depth = native.feed(text, tmp_path / "logits", *flags_of(dials))
            assert np.array_equal(depth, python.feed(text, dials).depth)
        dials = settings_of(made.case)["adaptive"]
        prompt = ",".join(map(str, text[:20]))
        flags = [*flags, *made.case.run_flags]
        tokens = native.document("--prompt-tokens", prompt, "-n", "12", "--temperature", "0", *flags)["tokens"]
        assert tokens == argmax_of_whole_text(made.model, text[:20], tokens, dials)
