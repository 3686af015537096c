"""rmse-bench --stream: what is fed, what is counted, and how it is reported. No test asserts a time."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY, assert_one_line, mixed_model, random_tokens, remembering_model, write_checkpoint

from rmse_edge import runtimes
from rmse_edge.cli.bench import main
from rmse_edge.errors import UserError
from rmse_edge.runtimes import Dials
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.measure import stream
from rmse_edge.runtimes.measure.stream import PAIRS, Stream

pytestmark = pytest.mark.slow

DIALS = Dials(4, 1, 0.6)
WARM_UP = 128
COUNT = WARM_UP + 64 * 20 + 10  # two calls a tenth, and a rest that is not timed


@pytest.fixture(scope="module")
def remembers() -> TorchRuntime:
    return TorchRuntime(remembering_model(), "mem")


@pytest.fixture(scope="module")
def streamed(remembers: TorchRuntime) -> Stream:
    one = Stream(remembers, random_tokens(300), DIALS, COUNT, WARM_UP)
    one.run()
    return one


# ------------------------------------------------------------------------------------------------------ what is counted


def test_the_text_is_fed_again_and_again(remembers: TorchRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[tuple[int, list[int], Dials]] = []
    feed = TorchRuntime.feed

    def record(self: TorchRuntime, tokens: np.ndarray, dials: Dials, logits: str = "all") -> Any:
        fed.append((self.position, list(tokens), dials))
        return feed(self, tokens, dials, logits)

    monkeypatch.setattr(TorchRuntime, "feed", record)
    ids, told = random_tokens(300), []
    remembers.feed(ids[:5], DIALS)  # forgotten
    fed.clear()
    Stream(remembers, ids, DIALS, COUNT, WARM_UP).run(told.append)
    text = np.tile(ids, 5)[:COUNT].tolist()
    calls = -(-COUNT // 64)
    assert fed[:calls] == [(i, text[i : i + 64], DIALS) for i in range(0, COUNT, 64)]
    assert sum(told) == COUNT == remembers.position
    pairs = fed[calls:]  # then both states read the same, in turns, at one depth
    early, late = pairs[0::2], pairs[1::2]
    assert len(early) == PAIRS + 1 and [tokens for _, tokens, _ in early] == [tokens for _, tokens, _ in late]
    assert {p for p, _, _ in early} == {WARM_UP} and {p for p, _, _ in late} == {COUNT // 64 * 64}
    assert len({dials for _, _, dials in pairs}) == 1 and pairs[0][2].exit_threshold == 1


def test_tenths_cover_what_comes_after_the_warm_up(streamed: Stream) -> None:
    tenths = streamed.tenths
    assert [(t.first, t.end) for t in tenths] == [(WARM_UP + 128 * i, WARM_UP + 128 * (i + 1)) for i in range(10)]
    uneven = Stream(streamed.runtime, streamed.ids, DIALS, 2000 + 13 * 64)
    assert [len(part) for part in uneven.parts] == [2, 2] + [1] * 8
    assert uneven.parts[0][0] * 64 == 2048  # the call in which the warm-up ends still belongs to it


def test_numbers_are_those_of_one_feed(remembers: TorchRuntime, streamed: Stream) -> None:
    """Calls of 64 from the start are what `feed` makes of a whole text."""
    remembers.reset()
    fed = remembers.feed(np.resize(streamed.ids, COUNT), DIALS, "last")
    surprise = [s.value for s in fed.surprises]
    for i, tenth in enumerate(streamed.tenths):
        assert tenth.mean_loops == pytest.approx(fed.depth[tenth.first : tenth.end].mean())
        assert tenth.mean_surprise == pytest.approx(np.mean(surprise[2 + 2 * i : 4 + 2 * i]))
    assert len({t.mean_surprise for t in streamed.tenths}) == 10


def test_state_has_the_same_size_at_every_position(streamed: Stream) -> None:
    summary = streamed.summary()
    assert summary["state_bytes_early"] == summary["state_bytes"] == streamed.runtime.state_bytes() > 0
    assert summary["finite"] is True
    if summary["rss_bytes"] is not None:
        assert summary["rss_growth_bytes"] == summary["rss_bytes"] - summary["rss_bytes_first_tenth"]
        assert summary["rss_bytes"] > summary["state_bytes"]


def test_speed_is_that_of_the_median_call(streamed: Stream) -> None:
    one = Stream(streamed.runtime, streamed.ids, DIALS, WARM_UP + 64 * 50, WARM_UP)
    one.loops[:] = one.surprise[:] = 1
    one.seconds[:2] = 1e9  # the warm-up is not counted
    one.seconds[2:] = np.repeat(np.linspace(1, 2, 10), 5)
    one.seconds[4::5] = 100  # nor is one slow call of five
    assert [t.tok_per_s for t in one.tenths] == pytest.approx(64 / np.linspace(1, 2, 10))
    assert one.summary()["speed_ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["memory_down", "past_values", "segment"])
def test_a_state_that_is_not_finite_is_told(remembers: TorchRuntime, name: str) -> None:
    one = Stream(remembers, random_tokens(300), DIALS, WARM_UP + 64 * 11, WARM_UP)

    def spoil(_: int) -> None:
        remembers.tensors()[name].flat[-1] = np.inf  # again and again, since rings and segments are overwritten

    one.run(spoil)
    assert one.summary()["finite"] is False


def test_without_memory_there_is_no_surprise() -> None:
    one = Stream(TorchRuntime(mixed_model(), "tiny"), random_tokens(300), DIALS, WARM_UP + 64 * 11, WARM_UP)
    one.run()
    assert {t.mean_surprise for t in one.tenths} == {None}
    assert one.summary()["state_bytes_early"] == one.summary()["state_bytes"]


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stream")
    return {
        "mem": write_checkpoint(remembering_model(), folder / "mem"),
        "tiny": write_checkpoint(mixed_model(), folder / "tiny"),
    }


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def test_json_names(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, folders["mem"], "--stream", 2750, "-o", "json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    kinds = {
        "model": str, "runtime": str, "parameters": int, "package_bytes": int, "dials": dict, "stream_tokens": int,
        "text_tokens": int, "warm_up_tokens": int, "tenths": list, "speed_ratio": float,
        "paired_speed_ratio": float, "paired_calls": int, "paired_loops": int, "rss_bytes_first_tenth": int,
        "rss_bytes": int, "rss_growth_bytes": int, "state_bytes_early": int, "state_bytes": int, "finite": bool, "notes": list,
    }  # fmt: skip
    assert document.pop("threads") is None
    assert {name: type(value) for name, value in document.items()} == kinds
    assert (document["stream_tokens"], document["text_tokens"], document["warm_up_tokens"]) == (2750, 2000, 2048)
    assert len(document["tenths"]) == 10
    for tenth in document["tenths"]:
        assert set(tenth) == {"first", "end", "tok_per_s", "mean_loops", "mean_surprise"}
        assert tenth["tok_per_s"] > 0 and 1 <= tenth["mean_loops"] <= 4 and tenth["mean_surprise"] > 0


@pytest.mark.parametrize("name", ["mem", "tiny"])
def test_table_and_csv(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(stream.Stream.__init__, "__defaults__", (64,))
    code, out, _ = call(capsys, folders[name], "--stream", 64 * 17, "--max-loops", 2)
    assert code == 0
    for part in ("tokens/s", "64 to 192", "speed:", "memory:", "state:", "all of it finite", "1,088 tokens"):
        assert part in out
    assert ("mean surprise" in out) == (name == "mem")
    rows = list(csv.DictReader(io.StringIO(call(capsys, folders[name], "--stream", 64 * 17, "-o", "csv")[1])))
    assert len(rows) == 10 and ("mean_surprise" in rows[0]) == (name == "mem")
    assert all(float(row["tok_per_s"]) > 0 for row in rows)


def test_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY | {"memory": "atlas", "memory_key_dim": 4}))
    code, out, _ = call(capsys, "--config", config, "--runtime", "torch", "--stream", 2750, "-o", "json")
    document = json.loads(out)
    assert code == 0 and "random weights" in document["notes"][0] and document["finite"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stream", "0"], ["--stream", "at least 1"]),
        (["--stream", "2000"], ["--stream", "2000", "2704"]),
        (["--stream", "9000", "-p", "64"], ["--stream", "--prompt"]),
        (["--stream", "9000", "-d", "2"], ["--stream", "--depths"]),
        (["--stream", "9000", "--max-loops", "9"], ["--max-loops", "1..4"]),
    ],
    ids=str,
)
def test_bad_flags(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], flags: list[str], said: list[str]
) -> None:
    code, out, err = call(capsys, folders["tiny"], *flags)
    assert (code, out) == (2, "")
    assert_one_line(err, "rmse-bench: error:", *said)


def test_more_tokens_than_the_package_takes(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = TorchRuntime.open(folders["tiny"])
    limited.info = limited.info.with_limit(5000)
    with pytest.raises(UserError):
        Stream(limited, random_tokens(10), DIALS, 5001)
    monkeypatch.setattr(runtimes, "open_runtime", lambda *_: limited)
    code, _, err = call(capsys, folders["tiny"], "--stream", 9000)
    assert code == 2
    assert_one_line(err, "9000", "5000", "--max-seq-len")
    assert limited.position == 0  # known before anything was fed
