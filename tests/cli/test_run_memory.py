"""rmse-run with a memory: sessions that go on, knowledge bases that are asked, and one line where something is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers import ALPHABET, assert_one_line

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.arch.rmse.costs import macs_per_token
from rmse_edge.cli.bench import main as bench
from rmse_edge.cli.evaluate import main as evaluate
from rmse_edge.cli.index import main as index
from rmse_edge.cli.run import main

pytestmark = pytest.mark.slow

PROMPT = "".join(ALPHABET[1 + i % 60] for i in range(70))


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def generated(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    code, out, err = call(capsys, *argv, "--temperature", 0, "-o", "json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def kb(remembering: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("usearch")
    folder = tmp_path_factory.mktemp("kb")
    lines = ["".join(ALPHABET[1 + (7 * i + j * j) % 60] for j in range(20)) for i in range(30)]
    (folder / "notes.txt").write_text("\n".join(lines), encoding="utf-8")
    assert index([str(remembering), str(folder / "notes.txt"), "-o", str(folder / "my.kb")]) == 0
    return folder / "my.kb"


def test_a_saved_text_goes_on_as_if_it_had_never_stopped(
    remembering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = generated(capsys, remembering, "-p", PROMPT, "-n", 40)
    file = tmp_path / "talk.session"
    first = generated(capsys, remembering, "-p", PROMPT, "-n", 25, "--save-session", file)
    second = generated(capsys, remembering, "-p", "", "-n", 15, "--session", file)
    assert first["tokens"] + second["tokens"] == whole["tokens"]
    assert first["depth"] + second["depth"] == whole["depth"]
    # a session can also be given more to read, and saved over itself
    more = generated(capsys, remembering, "-p", PROMPT[:9], "-n", 5, "--session", file, "--save-session", file)
    again = generated(capsys, remembering, "-p", "", "-n", 5, "--session", file)
    one_go = generated(capsys, remembering, "-p", PROMPT + first["text"] + PROMPT[:9], "-n", 10)
    assert more["tokens"] + again["tokens"] == one_go["tokens"]


def test_session_errors_are_one_line(remembering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, remembering, "-p", "!", "--session", tmp_path / "none.session")
    assert code == 2 and out == ""
    assert_one_line(err, "none.session: no such session file")
    code, out, err = call(capsys, remembering, "-p", "!", "--save-session", tmp_path / "no" / "a.session")
    assert code == 2 and out == ""
    assert_one_line(err, "--save-session", "there is no folder")


def test_the_knowledge_base_is_asked_and_told_about(
    remembering: Path, kb: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = generated(capsys, remembering, "-p", PROMPT, "-n", 12)
    asked = generated(capsys, remembering, "-p", PROMPT, "-n", 12, "--kb", kb, "--gamma", -1e6, "--kb-hits", 1)
    assert "consultations" not in plain
    assert [c["position"] for c in asked["consultations"]] == [64, 69] and asked["surprises_heard"] == 2
    hit = asked["consultations"][0]["hits"]
    assert len(hit) == 1 and "notes.txt:" in hit[0]["source"] and -1 <= hit[0]["score"] <= 1
    quiet = generated(capsys, remembering, "-p", PROMPT, "-n", 12, "--kb", kb, "--gamma", 1e6)
    assert quiet["tokens"] == plain["tokens"] and quiet["consultations"] == []
    code, _, err = call(capsys, remembering, "-p", PROMPT, "-n", 2, "--kb", kb, "--gamma", -1e6)
    assert code == 0 and "asked the knowledge base 2 times at 2 chances" in err and "at token 64: surprise" in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gamma", "1"], "--gamma: needs a knowledge base (--kb)"),
        (["--kb-optional"], "--kb-optional: needs a knowledge base (--kb)"),
        (["--kb", "none.kb"], "none.kb"),
        (["--no-memory", "--kb", "x.kb"], "leave out --no-memory"),
        (["--gamma", "0"], "--gamma: needs a knowledge base (--kb)"),
        (["--gamma", "nan", "--kb", "x.kb"], "--gamma: got 'nan', expected a number"),
        (["--no-memory", "--session", "x.session"], "--no-memory: the session brings its own memory"),
        (["--save-session", os.devnull], f"--save-session: {os.devnull}: is a device, expected a file"),
        (["--save-session", "."], "--save-session: .: is a folder, expected a file"),
    ],
)
def test_flags_that_cannot_be_followed(
    remembering: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, remembering, "-p", "!", *flags)
    assert code == 2 and out == ""
    assert_one_line(err, said)


def test_a_missing_knowledge_base_may_be_optional(remembering: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("usearch")
    code, out, err = call(capsys, remembering, "-p", "!", "-n", 3, "--kb", "none.kb", "--kb-optional")
    assert code == 0 and out.strip() and "going on without retrieval: none.kb" in err


def test_a_model_without_memory_says_so(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, checkpoint, "-p", "!", "--no-memory")
    assert code == 2
    assert_one_line(err, "--no-memory: tiny has no memory")


def test_the_bench_times_a_model_with_a_memory(remembering: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench([str(remembering), "-p", "70", "-n", "4", "-r", "1", "-d", "4", "-o", "json"]) == 0
    d = json.loads(capsys.readouterr().out)
    assert {row["test"] for row in d["rows"]} == {"pp70", "tg4"} and {"loop1", "loop64"} <= d["loop_time_ratio"].keys()


def test_the_memory_is_in_the_costs() -> None:
    plain, titans, atlas = (macs_per_token(RMSEConfig(memory=kind), 100) for kind in ("none", "titans", "atlas"))
    read = 192 * 64 + 64 * 256 + 256 * 64 + 64 * 192 + 192
    assert titans["loop_total"] - plain["loop_total"] == read == titans["loop"]["memory_read"]
    assert atlas["loop"]["memory_read"] == 192 * 16 + (16 + 136) * 256 + 256 * 64 + 64 * 192 + 192
    assert titans["once"]["memory_write"] == 192 * (64 + 64 + 3) + 3 * 64 * 256 + 5 * 256 * 64


def test_evaluation_with_and_without_the_memory(remembering: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for flags in ([], ["--no-memory"]):
        assert evaluate([str(remembering), "--max-tokens", "200", "-o", "json", *flags]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert [r["memory"] for r in results] == [True, False]
    assert results[0]["loss"] != results[1]["loss"] and results[0]["tokens"] == results[1]["tokens"]
