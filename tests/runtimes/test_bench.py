"""rmse-bench: what is run and how it is reported. No test asserts a time."""

from __future__ import annotations

import csv
import io
import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ALPHABET, TINY, assert_one_line, mixed_model, random_tokens, tiny_config, write_checkpoint

from rmse_edge import runtimes
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.checkpoint import save_checkpoint
from rmse_edge.cli.bench import main
from rmse_edge.errors import UserError
from rmse_edge.runtimes import Dials
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.measure import bench as bench_module
from rmse_edge.runtimes.measure import machine
from rmse_edge.runtimes.measure.bench import (
    Bench,
    BenchSettings,
    default_depths,
    weight_bytes_per_token,
)

SMALL = ("-p", "64", "-n", "2", "-r", "2")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop rows of one call, and a bandwidth of small arrays."""
    monkeypatch.setattr(bench_module, "LOOP_SECONDS", 1e-6)
    copy = machine.copy_bandwidth
    monkeypatch.setattr(machine, "copy_bandwidth", lambda threads: copy(threads, 1 << 20, 2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(mixed_model(), tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(scope="module")
def runtime() -> TorchRuntime:
    return TorchRuntime(mixed_model(), "tiny")


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


# ------------------------------------------------------------------------------------------------------- what is timed


def test_rows_take_turns_after_a_warm_up(runtime: TorchRuntime):
    """Round robin: between two runs of one row every other row runs once."""
    bench = Bench(runtime, random_tokens(80), BenchSettings(64, 2, (4, 2), Dials(4, 1, 0.6), repetitions=3))
    order: list[int] = []
    rows = [*bench.rows, *bench.loop_rows]
    for i, row in enumerate(rows):

        def work(timed: Any, i: int = i, work: Callable[[Any], float] = row.work) -> float:
            order.append(i)
            return float(len(order))

        row.work = work
    told: list[int] = []
    bench.run(told.append)
    assert order == list(range(len(rows))) * 4
    assert rows[0].speeds == [1.0 + len(rows) * k for k in (1, 2, 3)], "the first round is the warm-up"
    assert sum(told) == bench.passes == len(order)


def test_rows_feed_the_text_and_nothing_else(runtime: TorchRuntime, monkeypatch: pytest.MonkeyPatch):
    ids = random_tokens(200)
    fed: list[tuple[int, list[int], Dials]] = []
    feed = TorchRuntime.feed

    def record(self: TorchRuntime, tokens: np.ndarray, dials: Dials, logits: str = "all") -> Any:
        fed.append((self.position, list(tokens), dials))
        return feed(self, tokens, dials, logits)

    monkeypatch.setattr(TorchRuntime, "feed", record)
    adaptive = Dials(4, 1, 0.6)
    bench = Bench(runtime, ids, BenchSettings(70, 3, (2,), adaptive, repetitions=1))
    for row in bench.rows:
        row.work(row)
    expected = []
    for dials in (Dials(2), adaptive):
        expected.append((0, list(ids[:70]), dials))
    for dials in (Dials(2), adaptive):
        expected.append((0, list(ids[:64]), dials))
        expected += [(64 + i, [ids[64 + i]], dials) for i in range(3)]
    assert fed == expected


def test_depths_reported_are_those_of_the_timed_positions(runtime: TorchRuntime):
    ids = random_tokens(200)
    adaptive = Dials(4, 1, 0.6)
    bench = Bench(runtime, ids, BenchSettings(128, 10, (), adaptive, repetitions=1))
    bench.run()
    runtime.reset()
    depth = runtime.feed(ids[:128], adaptive).depth
    rows = {(r["test"], r["mode"], r["max_loops"]): r for r in bench.summary()["rows"]}
    assert rows["pp128", "adaptive", 4]["mean_loops"] == pytest.approx(depth.mean())
    assert rows["tg10", "adaptive", 4]["mean_loops"] == pytest.approx(depth[64:74].mean())
    assert rows["tg10", "adaptive", 4]["mean_iterations"] == pytest.approx(depth[64:74].mean())
    assert rows["pp128", "adaptive", 4]["mean_iterations"] == np.mean([depth[:64].max(), depth[64:].max()])
    assert [rows["tg10", "fixed", d]["mean_loops"] for d in (4, 2, 1)] == [4.0, 2.0, 1.0]
    assert bench.summary()["histogram"] == np.bincount(depth, minlength=5)[1:].tolist()
    assert bench.summary()["work_skipped"] == pytest.approx(1 - depth.mean() / 4)


def test_speculation_is_timed_beside_plain_decoding_of_the_same_text(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    argv = (checkpoint, "-p", 0, "-n", 6, "-r", 1, "--ids", checkpoint.parent / "ids.npy", "--exit-threshold", 0.6)
    np.save(checkpoint.parent / "ids.npy", random_tokens(80))
    code, out, _ = call(capsys, *argv, "--speculate", 1, "--draft-tokens", 2, "-o", "json")
    found = json.loads(out)
    rows = {(row["test"], row["mode"]): row for row in found["rows"] if row["max_loops"] == 4}
    assert code == 0 and {test for test, _ in rows} == {"tg6", "gen6", "spec6"}
    for mode in ("fixed", "adaptive"):
        plain, fast = rows["gen6", mode], rows["spec6", mode]
        assert fast["mean_loops"] == plain["mean_loops"] and fast["speculation"]["draft_tokens"] == 2
        expected = fast["tok_per_s"]["median"] / plain["tok_per_s"]["median"]
        assert found["speculative_speedup"][mode] == pytest.approx(expected)
    assert rows["spec6", "adaptive"]["mean_iterations"] >= rows["spec6", "adaptive"]["mean_loops"]
    code, out, err = call(capsys, checkpoint, "--stream", 9, "--draft-tokens", 2)
    assert code == 2 and not out
    assert_one_line(err, "leave out --draft-tokens")


def test_the_loop_alone_is_called_at_fixed_depths(runtime: TorchRuntime, monkeypatch: pytest.MonkeyPatch):
    """Every position of a loop row runs exactly the row's depth, in calls of 1 and of 64 rows."""
    results: list[tuple[str, int, list[int]]] = []
    run = runtime.methods.run

    def record(method: str, chunk: int, feeds: dict[str, np.ndarray]) -> Any:
        out = run(method, chunk, feeds)
        if method == "loop":
            results.append((method, chunk, sorted(set(out["depth"].ravel().tolist()))))
        return out

    monkeypatch.setattr(runtime.methods, "run", record)
    bench = Bench(runtime, random_tokens(80), BenchSettings(0, 0, (3,), None, repetitions=1))
    assert bench.rows == []
    for row in bench.loop_rows:
        row.work(row)
    assert results == [("loop", chunk, [depth]) for chunk in (1, 64) for depth in (4, 3, 1)]


def test_ratios_compare_with_full_depth(runtime: TorchRuntime):
    bench = Bench(runtime, random_tokens(80), BenchSettings(64, 2, (), Dials(4, 1, 0.6), repetitions=1))
    for row in (*bench.rows, *bench.loop_rows):
        row.work(row)
        row.speeds = [100.0 / row.dials.max_loops if row.mode == "fixed" else 60.0]
        if row in bench.loop_rows:
            row.speeds = [float(row.dials.max_loops)]
    summary = bench.summary()
    assert summary["adaptive_speedup"] == {"pp64": 2.4, "tg2": 2.4}
    assert summary["loop_time_ratio"] == {"max_loops": 1, "of": 4, "loop1": 0.25, "loop64": 0.25}


def test_default_depths_are_full_half_and_a_third():
    assert default_depths(12) == [12, 6, 4]
    assert default_depths(2) == [2, 1]
    assert default_depths(1) == [1]


@pytest.mark.parametrize(
    ("dials", "disabled"),
    [(Dials(4), True), (Dials(4, 1, 0.9), False), (Dials(4, 1, 1.0, 0.1), False), (Dials(4, 1, 1.0, 0.0, 0.5), False)],
)
def test_exits_disabled(dials: Dials, disabled: bool):
    assert dials.exits is not disabled


def test_a_text_that_is_too_short(runtime: TorchRuntime):
    with pytest.raises(UserError) as caught:
        Bench(runtime, random_tokens(100), BenchSettings(64, 64))
    assert_one_line(str(caught.value), "100 tokens", "128")


def test_bytes_of_weights_are_those_of_all_matrices_when_every_expert_is_active():
    """One loop with all experts active multiplies with every weight once; of the embedding it reads a row."""
    config = tiny_config(n_experts=4, top_k=4, max_loops=3)
    weights = sum(p.numel() for name, p in RMSE(config).named_parameters() if p.dim() > 1 and "embed" not in name)
    weights -= config.max_loops * (config.d_model + config.n_experts)  # step encodings and step logits are added
    attention = config.d_model * 2 * config.n_kv_heads * config.head_dim  # keys and values: once more, in commit
    info = TorchRuntime(RMSE(config), "all").info
    assert weight_bytes_per_token(info, 1) == 4 * (weights + attention)
    two, three = (weight_bytes_per_token(info, loops) for loops in (2, 3))
    assert three > two and three - two == two - weight_bytes_per_token(info, 1)


# ---------------------------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize("threads", [1, 2])
def test_bandwidth_is_a_speed(threads: int):
    assert 1e6 < machine.copy_bandwidth(threads) < 1e14


def test_resident_memory():
    now, peak = machine.resident_bytes()
    if now is not None and peak is not None:
        ballast = mmap.mmap(-1, 64 << 20)  # pages of its own: an array might be given some that were freed before
        ballast.write(b"1" * (64 << 20))
        after, _ = machine.resident_bytes()
        assert after is not None and after - now > 32 << 20 and ballast[0]
        assert peak >= now > 1 << 20


# --------------------------------------------------------------------------------------------------------- the command


def test_json_names(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    code, out, err = call(capsys, checkpoint, *SMALL, "-o", "json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    kinds = {
        "model": str, "runtime": str, "quant": str, "parameters": int, "package_bytes": int, "state_bytes": int,
        "peak_rss_bytes": int, "rss_bytes": int, "memory_gb_per_s": float, "memory_threads": int, "dials": dict, "repetitions": int,
        "rows": list, "loop_rows": list, "loop_time_ratio": dict, "adaptive_speedup": dict, "histogram": list, "work_skipped": float,
        "notes": list,
    }  # fmt: skip
    assert document.pop("threads") is None and document.pop("baseline_rss_bytes") is None  # a checkpoint is no package
    assert {name: type(value) for name, value in document.items()} == kinds
    assert document["package_bytes"] == (checkpoint / "model.safetensors").stat().st_size
    expected = [
        (t, m, d) for t in ("pp64", "tg2") for m, d in (("fixed", 4), ("fixed", 2), ("fixed", 1), ("adaptive", 4))
    ]
    assert [(r["test"], r["mode"], r["max_loops"]) for r in document["rows"]] == expected
    for row in document["rows"]:
        assert set(row["tok_per_s"]) == {"mean", "sd", "median"} and row["tok_per_s"]["median"] > 0
        assert 1 <= row["mean_loops"] <= row["max_loops"]
        assert (row["gb_per_s"] is not None) == (row["test"] == "tg2")
    assert [(r["test"], r["max_loops"]) for r in document["loop_rows"]] == [
        (f"loop{c}", d) for c in (1, 64) for d in (4, 2, 1)
    ]
    assert set(document["loop_time_ratio"]) == {"max_loops", "of", "loop1", "loop64"}


def test_table(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = call(capsys, checkpoint, *SMALL, "-d", "4,3")
    assert code == 0
    for part in ("pp64", "tg2", "loop64", "adaptive", "±", "median", "GB/s", "artifact", "skips", "█", "of full depth"):
        assert part in out


def test_csv(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = call(capsys, checkpoint, *SMALL, "-o", "csv", "-d", "2")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(r["test"], r["mode"], r["max_loops"], r["unit"]) for r in rows] == [
        ("pp64", "fixed", "2", "tok/s"), ("pp64", "adaptive", "4", "tok/s"), ("tg2", "fixed", "2", "tok/s"),
        ("tg2", "adaptive", "4", "tok/s"), *((f"loop{c}", "fixed", d, "ms") for c in (1, 64) for d in ("4", "2", "1")),
    ]  # fmt: skip
    assert all(float(r["median"]) > 0 for r in rows)


def test_random_weights_have_fixed_rows_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    code, out, err = call(capsys, "--config", config, "--runtime", "torch", *SMALL, "-o", "json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert {row["mode"] for row in document["rows"]} == {"fixed"}
    assert document["histogram"] is None and document["package_bytes"] is None
    assert "random weights" in document["notes"][0]


def test_a_checkpoint_that_never_exits_has_no_adaptive_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_checkpoint(RMSE(tiny_config(exit_threshold=1.0)), tmp_path / "patient")
    code, out, _ = call(capsys, folder, *SMALL, "-d", "1")
    assert code == 0
    assert "adaptive, at most" not in out
    assert "note: the checkpoint's own settings disable every exit rule" in out
    document = json.loads(call(capsys, folder, *SMALL, "-d", "1", "-o", "json", "--exit-threshold", "0.5")[1])
    assert {row["mode"] for row in document["rows"]} == {"fixed", "adaptive"}
    assert document["notes"] == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-d", "5"], ["1..4"]),
        (["-d", "2,x"], ["-d", "x"]),
        (["-r", "0"], ["-r"]),
        (["-p", "3000"], ["2000 tokens", "3000"]),
        (["--max-loops", "9"], ["--max-loops", "1..4"]),
        (["-o", "xml"], ["xml", "json"]),
        (["--text", "none.txt"], ["none.txt"]),
        (["--config", __file__], ["--config"]),
    ],
    ids=lambda v: " ".join(v[:2]) if v and v[0].startswith("-") else "",
)
def test_bad_flags(checkpoint: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: list[str]):
    code, out, err = call(capsys, checkpoint, *flags)
    assert (code, out) == (2, "")
    assert_one_line(err, "rmse-bench: error:", *said)


def test_bad_inputs(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "bad.json").write_text('{"d_modell": 64}')
    save_checkpoint(mixed_model(), tmp_path / "mute")
    for argv, said in (
        ([], ["--config"]),
        ([tmp_path / "none"], ["none"]),
        (["--config", tmp_path / "bad.json", "--runtime", "torch"], ["d_modell"]),
        ([tmp_path / "mute", *SMALL], ["sample.txt", "--text"]),
    ):
        code, out, err = call(capsys, *argv)
        assert (code, out) == (2, ""), argv
        assert_one_line(err, *said)


def test_a_prompt_beyond_the_package(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    limited = TorchRuntime.open(checkpoint)
    limited.info = limited.info.with_limit(100)
    monkeypatch.setattr(runtimes, "open_runtime", lambda *_: limited)
    code, _, err = call(capsys, checkpoint, "-p", "128", "-n", "2", "-r", "1")
    assert code == 2
    assert_one_line(err, "100", "--max-seq-len")


def test_a_bench_fits_the_room_there_is() -> None:
    """Decoding keeps its tokens as far as half the room goes; the ids that are given must be enough for the rest."""
    asked = BenchSettings()
    assert asked.fitting(None) == asked == asked.fitting(512)
    for room, prompt, generate, context in ((100, 100, 50, 50), (48, 48, 24, 24), (1, 1, 1, 0), (300, 300, 128, 64)):
        fit = asked.fitting(room)
        assert (fit.prompt, fit.generate, fit.context) == (prompt, generate, context)
    fit = BenchSettings(16, 4).fitting(48)
    assert (fit.prompt, fit.generate, fit.context) == (16, 4, 44)


def test_token_ids_instead_of_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(mixed_model(), tmp_path / "mute")
    (tmp_path / "ids.txt").write_text("1 2 3 " * 40)
    few = ["-p", "16", "-n", "4", "-r", "1", "-d", "1", "-t", "1"]
    assert main([str(tmp_path / "mute"), "--ids", str(tmp_path / "ids.txt"), *few]) == 0
    assert "pp16" in capsys.readouterr().out
    assert main([str(tmp_path / "mute"), "--ids", str(tmp_path / "ids.txt"), "--text", str(tmp_path / "ids.txt")]) == 2
    assert_one_line(capsys.readouterr().err, "--ids", "--text")
    (tmp_path / "ids.txt").write_text("1 2 65")
    assert main([str(tmp_path / "mute"), "--ids", str(tmp_path / "ids.txt"), *few]) == 2
    assert_one_line(capsys.readouterr().err, "65")
    (tmp_path / "ids.txt").write_text(" , ")
    assert main([str(tmp_path / "mute"), "--ids", str(tmp_path / "ids.txt"), *few]) == 2
    assert_one_line(capsys.readouterr().err, "ids.txt: holds no token ids")


def test_too_few_tokens_are_said_of_the_flag_that_gave_them(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.txt").write_text("1 2 3")
    (tmp_path / "text.txt").write_text(ALPHABET[:3])
    for flag, name in (("--ids", "ids.txt"), ("--text", "text.txt")):
        code, _, err = call(
            capsys, checkpoint, "--runtime", "cuda", "--device", "cpu", "--profile", flag, tmp_path / name
        )
        assert code == 2
        assert_one_line(err, f"error: {flag}: the text has 3 tokens")
