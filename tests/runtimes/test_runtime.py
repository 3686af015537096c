"""Runtimes: input may come in any pieces, state is a bounded ring, and an ONNX package does all that PyTorch does."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_one_line, mixed_model, random_tokens
from small_models import dials as model_dials
from small_models import whole_sequence

from rmse_edge.cli import bench, evaluate, run
from rmse_edge.errors import ArgumentError, UserError
from rmse_edge.runtimes import Dials, LoopRuntime, ModelInfo, open_runtime
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.calls import SINGLE_CALLS, plan_calls

COUNT = 140  # crosses 64 twice and wraps a window of 64 twice
SETTINGS = {
    "full": Dials(4),
    "gate": Dials(4, 1, 0.6),
    "gate, 3 loops at most": Dials(3, 2, 0.8),
    "delta": Dials(4, 1, 1.0, 0.5),
}


@pytest.fixture(scope="module")
def runtime() -> TorchRuntime:
    return TorchRuntime(mixed_model(), "tiny")


@pytest.fixture
def tokens() -> np.ndarray:
    return random_tokens(COUNT)


def feed_in(runtime: LoopRuntime, tokens: np.ndarray, dials: Dials, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and depths of all tokens, fed from an empty past in pieces of `sizes`, repeated as needed."""
    runtime.reset()
    logits, depth, done, i = [], [], 0, 0
    while done < len(tokens):
        fed = runtime.feed(tokens[done : done + sizes[i % len(sizes)]], dials)
        logits.append(fed.logits)
        depth.append(fed.depth)
        done, i = done + sizes[i % len(sizes)], i + 1
    assert runtime.position == len(tokens)
    return np.concatenate(logits), np.concatenate(depth)


# --------------------------------------------------------------------------------------------------- pieces and state


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("sizes", [[1], [64], [60, 10], [7, 1, 33, 2, 100]], ids=str)
def test_pieces_say_what_the_whole_says(runtime: TorchRuntime, tokens: np.ndarray, setting: str, sizes: list[int]):
    dials = SETTINGS[setting]
    whole, depth = feed_in(runtime, tokens, dials, [COUNT])
    if setting != "full":
        assert depth.std() > 0.3
    pieces, depth_of_pieces = feed_in(runtime, tokens, dials, sizes)
    assert (depth == depth_of_pieces).all()
    assert np.abs(whole - pieces).max() < 1e-4
    assert depth.max() <= dials.max_loops
    assert depth.min() >= dials.min_loops


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_runtime_says_what_the_model_says(runtime: TorchRuntime, tokens: np.ndarray, setting: str):
    """Against one pass over the whole sequence without calls, ring or commit."""
    dials = SETTINGS[setting]
    expected = whole_sequence(runtime.model, torch.from_numpy(tokens)[None], model_dials(runtime.model, **vars(dials)))
    logits, depth = feed_in(runtime, tokens, dials, [COUNT])
    assert (depth == expected[1][0].numpy()).all()
    assert np.abs(logits - expected[0][0].numpy()).max() < 1e-4


def test_dials_may_change_from_call_to_call(runtime: TorchRuntime, tokens: np.ndarray):
    """Positions of different depths meet in one window; where a call ends still changes nothing."""
    results = []
    for sizes in ([70, 130], [1, 69, 64, 66]):
        runtime.reset()
        done, depth, logits = 0, [], []
        for size in sizes:
            fed = runtime.feed(tokens[done : done + size], SETTINGS["gate"] if done < 70 else SETTINGS["full"])
            done += size
            depth.append(fed.depth)
            logits.append(fed.logits)
        results.append((np.concatenate(logits), np.concatenate(depth)))
    assert (results[0][1] == results[1][1]).all()
    assert np.abs(results[0][0] - results[1][0]).max() < 1e-4


def test_only_the_window_is_remembered(runtime: TorchRuntime):
    """Full depth looks back at most (K - 1) (window - 1) + window positions; what lies before cannot matter."""
    dials, reach = Dials(1), 64
    first, second = random_tokens(256, seed=1), random_tokens(256, seed=2)
    second[-reach:] = first[-reach:]
    runtime.reset()
    one = runtime.feed(first, dials, "last").logits
    runtime.reset()
    assert np.abs(one - runtime.feed(second, dials, "last").logits).max() < 1e-5
    second[-reach] = (second[-reach] + 1) % 65  # the window's oldest position does matter
    runtime.reset()
    assert np.abs(one - runtime.feed(second, dials, "last").logits).max() > 1e-5


def test_reset_forgets_everything(runtime: TorchRuntime, tokens: np.ndarray):
    first = feed_in(runtime, tokens[:70], SETTINGS["gate"], [70])[0]
    runtime.feed(tokens, SETTINGS["full"])
    assert (feed_in(runtime, tokens[:70], SETTINGS["gate"], [70])[0] == first).all()


def test_last_logits_are_the_last_row(runtime: TorchRuntime, tokens: np.ndarray):
    for count in (1, 5, 64, 70):
        every, _ = feed_in(runtime, tokens[:count], SETTINGS["gate"], [count])
        runtime.reset()
        last = runtime.feed(tokens[:count], SETTINGS["gate"], logits="last")
        assert last.logits.shape == (1, 65)
        assert (last.logits[0] == every[-1]).all()
        assert len(last.depth) == count


def test_iterations_are_the_deepest_position_of_each_call(runtime: TorchRuntime, tokens: np.ndarray):
    runtime.reset()
    fed = runtime.feed(tokens[:130], SETTINGS["gate"])
    calls = plan_calls(0, 130, runtime.info.chunks)
    assert fed.chunks == [rows for rows, _ in calls]
    ends = np.cumsum([n for _, n in calls])
    assert fed.iterations == [part.max() for part in np.split(fed.depth, ends[:-1])]


def test_state_is_as_large_as_it_says_and_does_not_grow(runtime: TorchRuntime, tokens: np.ndarray):
    loops, keys_and_values, groups, window, dims, float32 = 4, 2, 2, 64, 16, 4
    expected = loops * keys_and_values * groups * window * dims * float32
    assert runtime.state_bytes() == expected
    runtime.feed(tokens, SETTINGS["full"])
    assert runtime.state_bytes() == expected


# ------------------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("chunks", [(1, 64), (1, 16, 64), (1,)], ids=str)
def test_calls_cover_the_tokens_and_end_with_each_segment(chunks: tuple[int, ...]):
    for position in (0, 1, 58, 59, 63, 64, 127, 1000):
        for count in (0, 1, 5, SINGLE_CALLS, SINGLE_CALLS + 1, 63, 64, 65, 200):
            calls, at = plan_calls(position, count, chunks), position
            for rows, n in calls:
                assert rows in chunks and 1 <= n <= rows
                assert at // 64 == (at + n - 1) // 64, "crosses a multiple of 64"
                at += n
            assert at == position + count


def test_a_handful_of_tokens_is_not_padded():
    assert plan_calls(0, SINGLE_CALLS, (1, 64)) == [(1, 1)] * SINGLE_CALLS
    assert plan_calls(0, SINGLE_CALLS + 1, (1, 64)) == [(64, SINGLE_CALLS + 1)]


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("tokens", "said"),
    [([], "at least one token"), ([[1, 2]], "at least one token"), ([0, 65], "token 65"), ([-1], "token -1")],
)
def test_tokens_that_cannot_be_fed(runtime: TorchRuntime, tokens: list, said: str):
    with pytest.raises(UserError) as caught:
        runtime.feed(tokens, SETTINGS["full"])
    assert_one_line(str(caught.value), said)


@pytest.mark.parametrize(
    ("dials", "name"),
    [(Dials(5), "max_loops"), (Dials(0), "max_loops"), (Dials(4, 5), "min_loops"), (Dials(4, 0), "min_loops"),
     (Dials(4, 1, 0.0), "exit_threshold"), (Dials(4, 1, float("nan")), "exit_threshold"),
     (Dials(4, 1, 1.0, -1.0), "exit_epsilon"), (Dials(4, 1, 1.0, 0.0, float("nan")), "exit_entropy")],
)  # fmt: skip
def test_dials_out_of_range_are_named(runtime: TorchRuntime, dials: Dials, name: str):
    with pytest.raises(ArgumentError) as caught:
        runtime.feed([1], dials)
    assert caught.value.name == name and str(caught.value).startswith(f"{name}: got ")
    assert_one_line(str(caught.value))


def test_a_sequence_limit_holds_across_calls():
    limited = TorchRuntime(mixed_model(), "tiny")
    limited.info = limited.info.with_limit(10)
    limited.feed(random_tokens(8), SETTINGS["full"])
    with pytest.raises(UserError) as caught:
        limited.feed(random_tokens(3), SETTINGS["full"])
    assert_one_line(str(caught.value), "11 tokens", "10")
    assert limited.feed(random_tokens(2), SETTINGS["full"]).depth.tolist() == [4, 4], (
        "nothing was fed by the refused call"
    )


def test_fewer_loops_lower_the_smallest_depth_too(runtime: TorchRuntime):
    info = dataclasses.replace(runtime.info, dials=Dials(4, 3, 0.5))
    assert info.dials_with(max_loops=2) == Dials(2, 2, 0.5)
    assert info.dials_with(max_loops=None, exit_threshold=0.9) == Dials(4, 3, 0.9)
    with pytest.raises(UserError, match=r"^min_loops: "):
        info.dials_with(max_loops=2, min_loops=3)


def test_model_info_survives_a_manifest(runtime: TorchRuntime):
    text = json.dumps(runtime.info.to_json())
    assert ModelInfo.from_json(json.loads(text), runtime.info.nbytes) == runtime.info


# ------------------------------------------------------------------------------------------------------------- ONNX

VERBS_WITHOUT_TORCH = """
import sys
from rmse_edge.cli import bench, evaluate, run
package = sys.argv[1]
for main, flags in (
    (run.main, ["-p", "!#$%&()*+,", "-n", "3"]),
    (evaluate.main, ["--max-tokens", "70"]),
    (bench.main, ["-p", "64", "-n", "1", "-r", "1"]),
):
    assert main([package, *flags]) == 0, flags
assert "torch" not in sys.modules, "a verb imported torch"
"""


@pytest.fixture(scope="module")
def folders(checkpoint: Path, package: Path) -> tuple[Path, Path]:
    """(checkpoint, ONNX package) of one model."""
    return checkpoint, package


class TestOnnx:
    """The package says what the checkpoint says, through the same code."""

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_feed(self, folders: tuple[Path, Path], tokens: np.ndarray, setting: str):
        results = [feed_in(open_runtime(f, threads=1), tokens, SETTINGS[setting], [70, 1, 33]) for f in folders]
        assert (results[0][1] == results[1][1]).all()
        assert np.abs(results[0][0] - results[1][0]).max() < 1e-4

    def test_run(self, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
        documents = []
        for folder in folders:
            for flags in (["--temperature", "0"], ["--seed", "3"]):
                assert run.main([str(folder), "-p", "ABCDEFGH", "-n", "80", "-o", "json", *flags]) == 0
                documents.append(json.loads(capsys.readouterr().out))
        for ours, theirs in zip(documents[:2], documents[2:]):
            for name in ("text", "tokens", "depth", "mean_loops", "histogram", "state_bytes"):
                assert ours[name] == theirs[name], name
        assert [d["runtime"] for d in documents] == ["torch", "torch", "onnx", "onnx"]

    def test_eval(self, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
        documents = []
        for folder in folders:
            assert evaluate.main([str(folder), "--max-tokens", "300", "-o", "json"]) == 0
            documents.append(json.loads(capsys.readouterr().out))
        ours, theirs = documents
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["histogram"] == theirs["histogram"]

    def test_bench(self, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
        assert bench.main([str(folders[1]), "-p", "64", "-n", "2", "-r", "1", "-o", "json"]) == 0
        document = json.loads(capsys.readouterr().out)
        size = sum(f.stat().st_size for f in folders[1].iterdir())
        assert document["package_bytes"] == size
        assert {row["mode"] for row in document["rows"]} == {"fixed", "adaptive"}

    def test_verbs_do_without_torch(self, folders: tuple[Path, Path]):
        command = [sys.executable, "-P", "-c", VERBS_WITHOUT_TORCH, str(folders[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("flags", [["--runtime", "torch"], ["--device", "cuda"]], ids=str)
    def test_a_package_runs_on_its_own_runtime(
        self, folders: tuple[Path, Path], flags: list[str], capsys: pytest.CaptureFixture[str]
    ):
        assert run.main([str(folders[1]), "-p", "A", *flags]) == 2
        assert_one_line(capsys.readouterr().err, "onnx")
