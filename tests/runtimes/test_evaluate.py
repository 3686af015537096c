"""rmse-eval: losses against PyTorch's own, error bars against known sequences, the sweep against known curves."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import small_huginn
from helpers import ALPHABET, assert_one_line, mixed_model, random_tokens, write_checkpoint

from rmse_edge import runtimes
from rmse_edge.arch.common.recurrent import UNTRAINED
from rmse_edge.cli.evaluate import main
from rmse_edge.errors import UserError
from rmse_edge.runtimes import Dials
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.measure.evaluate import Evaluation, cross_entropy, evaluate, pieces
from rmse_edge.runtimes.measure.sweep import Sweep, passes, sweep

GATE = Dials(4, 1, 0.6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(mixed_model(), tmp_path_factory.mktemp("eval") / "tiny")


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> TorchRuntime:
    return TorchRuntime.open(checkpoint)


def torch_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none"
    ).numpy()


def evaluation(losses: np.ndarray, block: int = 0) -> Evaluation:
    depth = np.ones(len(losses), np.int64)
    return Evaluation(Dials(4), 4, losses, depth, depth, block, 1.0)


# ------------------------------------------------------------------------------------------------------------ the loss


def test_one_stream_scores_every_token_but_the_first(runtime: TorchRuntime):
    ids = random_tokens(131)
    result = evaluate(runtime, ids, GATE)
    runtime.reset()
    fed = runtime.feed(ids[:-1], GATE)
    assert np.abs(result.losses - torch_losses(fed.logits, ids[1:])).max() < 1e-5
    assert (result.depth == fed.depth).all()
    assert result.iterations.tolist() == fed.iterations
    summary = result.summary()
    assert summary["tokens"] == 130 == sum(summary["histogram"])
    assert summary["mean_loops"] == pytest.approx(fed.depth.mean())
    assert summary["depth_sd"] == pytest.approx(fed.depth.std()) and summary["depth_sd"] > 0.3
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))


def test_blocks_are_scored_alone(runtime: TorchRuntime):
    ids = random_tokens(231)
    result = evaluate(runtime, ids, GATE, block=100)
    assert len(result.losses) == 200, "what fills no block is left out"
    for block in (0, 1):
        part = ids[100 * block : 100 * block + 101]
        runtime.reset()
        fed = runtime.feed(part[:-1], GATE)
        assert np.abs(result.losses[100 * block :][:100] - torch_losses(fed.logits, part[1:])).max() < 1e-5
        assert (result.depth[100 * block :][:100] == fed.depth).all()


def test_progress_is_told_every_token(runtime: TorchRuntime):
    for block, expected in ((0, 149), (64, 128)):
        told: list[int] = []
        evaluate(runtime, random_tokens(150), Dials(1), block, told.append)
        assert sum(told) == expected and len(told) > 1


@pytest.mark.parametrize(("targets", "block"), [(1, 0), (64, 0), (65, 0), (200, 64), (200, 100), (63, 1)])
def test_pieces_cover_each_target_once_and_never_cross_a_segment(targets: int, block: int):
    position, covered = 0, []
    for first, last, fresh in pieces(targets, block):
        position = 0 if fresh else position
        assert position % 64 + last - first <= 64
        position += last - first
        assert not block or position <= block
        covered += range(first, last)
    assert covered == list(range(targets if not block else targets // block * block))


def test_cross_entropy_of_extreme_logits():
    logits = np.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], np.float32)
    assert cross_entropy(logits, np.array([2, 1])) == pytest.approx([2e4, math.log(3)])
    with pytest.raises(UserError, match="not numbers"):
        cross_entropy(np.array([[np.nan, 0.0]]), np.array([1]))


# -------------------------------------------------------------------------------------------------------- error bars


def test_the_error_of_independent_losses_is_the_textbook_one():
    losses = np.random.default_rng(0).normal(2.0, 1.0, 256 * 400)
    assert evaluation(losses).loss_se() == pytest.approx(1 / math.sqrt(len(losses)), rel=0.15)


def test_the_error_of_correlated_losses_is_larger():
    """x_t = 0.95 x_(t-1) + noise: the variance of the mean is (1 + 0.95) / (1 - 0.95) = 39 times that of a sample."""
    chance = np.random.default_rng(0).normal(size=256 * 400)
    losses = np.empty_like(chance)
    x = 0.0
    for i, noise in enumerate(chance):
        x = 0.95 * x + noise
        losses[i] = x
    textbook = losses.std() / math.sqrt(len(losses))
    assert evaluation(losses).loss_se() == pytest.approx(textbook * math.sqrt(39), rel=0.25)


def test_perplexity_takes_the_error_along():
    summary = evaluation(np.random.default_rng(0).normal(2.0, 1.0, 5000)).summary()
    assert summary["perplexity_se"] == pytest.approx(summary["perplexity"] * summary["loss_se"])


def test_too_few_tokens_have_no_error():
    assert evaluation(np.ones(15)).loss_se() is None
    assert evaluation(np.arange(16.0)).loss_se() > 0


# ------------------------------------------------------------------------------------------------------------- sweep

DEPTH = 12


def measured(dials: Dials) -> Evaluation:
    """A made-up model: a threshold t gives the mean depth 1 + 11 t^20, a depth d the loss 1.5 + 0.5 / d."""
    threshold = dials.exit_threshold
    mean = dials.max_loops if threshold >= 1 else 1 + (dials.max_loops - 1) * threshold**20
    low = math.floor(mean)
    depth = np.where(np.arange(1000) < 1000 * (mean - low), low + 1, low)
    adaptive = 0.99 if threshold < 1 else 1.0
    return Evaluation(dials, DEPTH, np.full(1000, adaptive * (1.5 + 0.5 / mean)), depth, depth, 0, 1.0)


def test_a_sweep_spreads_its_thresholds_over_the_depths():
    result = sweep(measured, DEPTH, Dials(DEPTH), points=10, refine=0)
    assert [p.max_loops for p in result.fixed] == list(range(1, 13))
    assert len(result.adaptive) == 10
    loops = [p.mean_loops for p in result.adaptive]
    assert loops == sorted(loops) and len({p.value for p in result.adaptive}) == 10
    assert max(np.diff(loops)) < 3.0, "of 11 loops in 9 steps"


def test_the_proposal_is_the_fewest_loops_within_the_budget():
    for budget in (1.0, 5.0):
        result = sweep(measured, DEPTH, Dials(DEPTH), budget)
        chosen = result.proposal
        assert chosen is not None
        limit = (1 + budget / 100) * (1.5 + 0.5 / 12)
        assert chosen.loss <= limit
        best = 0.5 / (limit / 0.99 - 1.5)  # the mean depth that just meets the budget
        assert best <= chosen.mean_loops < best + 0.7
        assert all(p.loss > limit for p in result.adaptive if p.mean_loops < chosen.mean_loops)


def changes(dials: Dials) -> Evaluation:
    """The same model, whose predictions change by 1 / d nats in loop d."""
    mean = min(DEPTH, 1 / max(dials.exit_kl, 1e-9))
    depth = np.full(1000, min(dials.max_loops, max(1, math.ceil(mean))))
    return Evaluation(dials, DEPTH, np.full(1000, 1.5 + 0.5 / depth.mean()), depth, depth, 0, 1.0)


def test_a_dial_of_changes_is_swept_from_large_ones_to_small_ones():
    result = sweep(changes, DEPTH, Dials(DEPTH), budget=5.0, points=20, rule="exit_kl")
    values, loops = [p.value for p in result.adaptive], [p.mean_loops for p in result.adaptive]
    assert values == sorted(values, reverse=True) and loops == sorted(loops)
    assert {p.value for p in result.fixed} == {None}
    assert set(loops) >= {1, 2, 3, 4, 5, 6, DEPTH} and result.proposal is not None
    assert result.proposal.mean_loops == 5, "where 0.5 / d is 5 % of the loss over 0.5 / 12"
    row = result.summary()["proposal"]
    assert row["exit_kl"] == result.proposal.value and "exit_threshold" not in row


def test_a_dial_that_counts_loops_has_whole_values():
    for points, expected in ((10, [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]), (3, [1, 6, 11]), (99, [*range(1, 12)])):
        settings: list[Dials] = []

        def seen(dials: Dials, settings: list[Dials] = settings) -> Evaluation:
            settings.append(dials)
            return measured(dials)

        sweep(seen, DEPTH, Dials(DEPTH), points=points, rule="exit_steady")
        assert [d.exit_steady for d in settings[DEPTH:]] == expected
        assert len(settings) == passes(DEPTH, points, rule="exit_steady")


def test_values_that_were_given_are_measured_and_no_others():
    result = sweep(changes, DEPTH, Dials(DEPTH), rule="exit_kl", values=(0.1, 1.0, 0.3))
    assert [p.value for p in result.adaptive] == [1.0, 0.3, 0.1]
    assert [p.value for p in sweep(measured, DEPTH, Dials(DEPTH), values=(0.9, 0.5)).adaptive] == [0.5, 0.9]
    assert passes(DEPTH, 10, values=(0.9, 0.5)) == DEPTH + 2


def test_no_proposal_where_no_threshold_meets_the_budget():
    def bad(dials: Dials) -> Evaluation:
        return dataclasses.replace(measured(dials), losses=np.full(1000, 2.0 - dials.exit_threshold / 10))

    result = sweep(bad, DEPTH, Dials(DEPTH), budget=0.0)
    assert result.proposal is None
    assert result.summary()["proposal"] is None


def test_a_sweep_ends_early_where_thresholds_change_nothing():
    def same(dials: Dials) -> Evaluation:
        return dataclasses.replace(measured(dials), depth=np.full(1000, 4))

    assert len(sweep(same, DEPTH, Dials(DEPTH)).adaptive) == 2


def test_a_sweep_makes_as_many_passes_as_it_says():
    count = 0

    def counted(dials: Dials) -> Evaluation:
        nonlocal count
        count += 1
        return measured(dials)

    sweep(counted, DEPTH, Dials(DEPTH), points=5)
    assert DEPTH + 5 <= count <= passes(DEPTH, 5)


def test_rows_compare_with_the_fixed_depth_of_the_same_mean():
    result: Sweep = sweep(measured, DEPTH, Dials(DEPTH))
    for row in result.summary()["adaptive"]:
        low, high = (1.5 + 0.5 / d for d in (math.ceil(row["mean_loops"]), max(1, math.floor(row["mean_loops"]))))
        assert low - 1e-9 <= row["fixed_loss_at_mean"] <= high + 1e-9
        assert row["loss"] < row["fixed_loss_at_mean"]
        assert row["iterations_saved"] == pytest.approx(1 - row["mean_loops"] / 12)


# --------------------------------------------------------------------------------------------------------- the command


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def test_json_names(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    code, out, err = call(capsys, checkpoint, "--max-tokens", 200, "-o", "json")
    assert (code, err) == (0, "")
    kinds = {
        "model": str, "runtime": str, "text": str, "split": str, "block": int, "dials": dict, "memory": bool,
        "state_bytes": int,
        "tokens": int, "loss": float, "loss_se": float, "perplexity": float, "perplexity_se": float,
        "mean_loops": float, "depth_sd": float, "iterations_saved": float, "mean_iterations": float, "histogram": list, "seconds": float,
        "tokens_per_s": float,
    }  # fmt: skip
    document = json.loads(out)
    assert {name: type(value) for name, value in document.items()} == kinds
    assert (document["tokens"], sum(document["histogram"])) == (200, 200)


def test_table(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = call(capsys, checkpoint, "--max-tokens", 100)
    assert code == 0
    for part in ("perplexity", "±", "mean loops", "torch", "bytes", "█"):
        assert part in out


@pytest.mark.slow
def test_splits_and_limits(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    text = tmp_path / "text.txt"
    text.write_text("".join(ALPHABET[i] for i in random_tokens(300)))
    for flags, expected in (
        (["--split", "train"], 269), (["--split", "validation"], 29), ([], 299), (["--max-tokens", "50"], 50),
        (["--block", "64"], 256), (["--block", "64", "--max-tokens", "130"], 128),
    ):  # fmt: skip
        document = json.loads(call(capsys, checkpoint, "--text", text, "--max-loops", 1, "-o", "json", *flags)[1])
        assert document["tokens"] == expected, flags


@pytest.mark.slow
def test_sweep_prints_and_draws(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "frontier.png"
    flags = (checkpoint, "--max-tokens", 64, "--sweep", "--points", 3, "--budget", 50)
    code, out, _ = call(capsys, *flags, "--plot", plot)
    assert code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "depth 4" in out and "--exit-threshold" in out
    document = json.loads(call(capsys, *flags, "-o", "json")[1])
    assert [p["max_loops"] for p in document["fixed"]] == [1, 2, 3, 4]
    assert document["tokens"] == 64
    assert document["proposal"] in document["adaptive"]
    assert {"loss", "mean_loops", "depth_sd", "exit_threshold", "over_full_percent"} <= document["proposal"].keys()


@pytest.fixture(scope="module")
def huginn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(small_huginn(UNTRAINED).eval(), tmp_path_factory.mktemp("eval") / "huginn")


def test_a_model_without_a_gate_is_swept_over_a_rule_that_it_has(huginn: Path, capsys: pytest.CaptureFixture[str]):
    flags = (huginn, "--max-tokens", 32, "--sweep", "-o", "json")
    document = json.loads(call(capsys, *flags, "--points", 2)[1])
    assert document["rule"] == "exit_epsilon" and {p["exit_epsilon"] for p in document["fixed"]} == {None}
    document = json.loads(call(capsys, *flags, "--rule", "exit-kl=0.3,1")[1])
    assert [p["exit_kl"] for p in document["adaptive"]] == [1, 0.3]
    assert document["adaptive"][0]["mean_loops"] < document["adaptive"][1]["mean_loops"]
    document = json.loads(call(capsys, *flags, "--rule", "exit_steady")[1])
    assert [p["exit_steady"] for p in document["adaptive"]] == [1, 2]  # of three trained loops, and one beyond
    table = call(capsys, *flags[:-2], "--rule", "exit-kl=0.3,1", "--budget", 900)[1]
    assert "kl 0.3" in table and "--exit-kl 1 " in table


def test_a_rule_that_the_model_lacks(huginn: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    for folder, rule in ((huginn, "exit-threshold"), (checkpoint, "exit-kl")):
        code, _, err = call(capsys, folder, "--sweep", "--rule", rule)
        assert code == 2
        assert_one_line(err, f"--rule {rule}: ", "has no such rule; it has exit-")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rule", "exit-threshold"], ["--rule", "add --sweep"]),
        (["--sweep", "--rule", "exit-towel"], ["--rule", "'exit-towel'", "exit-threshold, exit-epsilon"]),
        (["--sweep", "--rule", "max-loops"], ["--rule", "'max-loops'"]),
        (["--sweep", "--rule", "exit-threshold=0"], ["--rule", "got 0, expected a positive number"]),
        (["--sweep", "--rule", "exit-steady=1.5"], ["--rule", "got 1.5, expected 0 (off) or a whole number"]),
        (["--sweep", "--rule", "exit-epsilon=0.1,x"], ["--rule", "'x'"]),
        (["--sweep", "--rule", "exit-epsilon=0.1", "--points", "4"], ["--points", "--rule"]),
        (["--text", "none.txt"], ["none.txt"]),
        (["--text", "."], ["folder"]),
        (["--split", "test"], ["--split", "validation"]),
        (["--max-tokens", "0"], ["--max-tokens"]),
        (["--block", "-1"], ["--block"]),
        (["--max-loops", "5"], ["--max-loops", "1..4"]),
        (["--max-tokens", "10", "--block", "64"], ["11 tokens", "65"]),
        (["--runtime", "onnx"], ["onnx"]),
        (["--plot", "x.png"], ["--sweep"]),
        (["--sweep", "--plot", "x.doc"], ["x.doc", ".png"]),
        (["--sweep", "--budget", "-1"], ["--budget"]),
    ],
    ids=lambda v: " ".join(v) if v and v[0].startswith("--") else "",
)
def test_bad_flags(checkpoint: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: list[str]):
    code, out, err = call(capsys, checkpoint, *flags)
    assert (code, out) == (2, "")
    assert_one_line(err, "rmse-eval: error:", *said)


@pytest.mark.parametrize(
    ("raw", "said"),
    [(b"", "empty"), (b"ABC\xff", "UTF-8 at byte 3"), ("AB\u00e9".encode(), "'é'"), (b"A", "1 tokens")],
    ids=["empty", "not UTF-8", "unknown character", "one character"],
)
def test_bad_texts(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], raw: bytes, said: str):
    text = tmp_path / "text.txt"
    text.write_bytes(raw)
    code, out, err = call(capsys, checkpoint, "--text", text)
    assert (code, out) == (2, "")
    assert_one_line(err, said)


def test_a_model_without_a_sample_needs_a_text(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    code, _, err = call(capsys, tmp_path)
    assert code == 2
    assert_one_line(err, "sample.txt", "--text")


def test_a_text_beyond_the_package(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    limited = TorchRuntime.open(checkpoint)
    limited.info = limited.info.with_limit(70)
    monkeypatch.setattr(runtimes, "open_runtime", lambda *_: limited)
    code, _, err = call(capsys, checkpoint)
    assert code == 2
    assert_one_line(err, "70", "--block", "--max-tokens")
    assert call(capsys, checkpoint, "--max-tokens", 70, "--max-loops", 1)[0] == 0
    assert call(capsys, checkpoint, "--max-tokens", 140, "--block", 70, "--max-loops", 1)[0] == 0


def test_plot_without_matplotlib(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call(capsys, checkpoint, "--sweep", "--plot", tmp_path / "x.png")
    assert code == 2
    assert_one_line(err, "matplotlib", "pip install")
