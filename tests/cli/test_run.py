"""rmse-run: what it prints and where, depths in colour, Ctrl-C, and one line for everything that can go wrong."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ALPHABET, assert_one_line, mixed_model, write_checkpoint

from rmse_edge import runtimes
from rmse_edge.cli.display import DepthWriter, bars, paint
from rmse_edge.cli.run import main
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.text.generate import Span

TEXT = "".join(ALPHABET[i] for i in (3, 1, 4, 1, 5, 9, 2, 6))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(mixed_model(), tmp_path_factory.mktemp("run") / "tiny")


# --------------------------------------------------------------------------------------------------------- the command


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def test_text_goes_to_stdout_and_statistics_to_stderr(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    flags = (checkpoint, "--prompt", TEXT, "--max-new-tokens", 30, "--seed", 2)
    code, out, err = call(capsys, *flags)
    assert code == 0
    document = json.loads(call(capsys, *flags, "-o", "json")[1])
    assert out.rstrip("\n") == document["text"].rstrip("\n") and len(document["text"]) == 30
    assert len(err.splitlines()) == 2
    for part in ("tokens/s", "of 4 loops", "first token after", "saved"):
        assert part in err


def test_json_names(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    code, out, err = call(capsys, checkpoint, "-p", TEXT, "-n", 12, "-o", "json", "--show-depth", "--show-prompt")
    document = json.loads(out)
    assert (code, err) == (0, "")
    kinds = {
        "text": str, "tokens": list, "depth": list, "prompt": str, "prompt_tokens": int, "prompt_mean_loops": float,
        "prompt_tokens_per_s": float, "time_to_first_token_s": float, "generated_tokens": int, "tokens_per_s": float,
        "mean_loops": float, "max_loops": int, "iterations_saved": float, "histogram": list, "finish_reason": str,
        "model": str, "runtime": str, "state_bytes": int, "dials": dict, "sampling": dict,
    }  # fmt: skip
    assert {name: type(value) for name, value in document.items()} == kinds
    assert document["prompt"] == TEXT
    assert len(document["tokens"]) == len(document["depth"]) == 12
    assert document["dials"] == {
        "max_loops": 4, "min_loops": 1, "exit_threshold": 0.6, "exit_epsilon": 0.0, "exit_entropy": 0.0, "exit_cosine": 0.0,
        "exit_kl": 0.0, "exit_entropy_change": 0.0, "exit_steady": 0, "exit_gap": 0.0, "route": 0.5,
    }  # fmt: skip


def test_dials_reach_the_model(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    def depths(*flags: object) -> list[int]:
        return json.loads(call(capsys, checkpoint, "-p", TEXT, "-n", 30, "-o", "json", *flags)[1])["depth"]

    assert set(depths("--exit-threshold", 1)) == {4}
    assert set(depths("--max-loops", 2, "--exit-threshold", 1)) == {2}
    assert min(depths("--min-loops", 3)) == 3
    assert set(depths("--exit-threshold", 1, "--exit-epsilon", 1e6)) == {1}
    assert len(set(depths())) > 1


def test_prompt_from_stdin(checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    expected = json.loads(call(capsys, checkpoint, "-p", TEXT + "\n", "-n", 8, "-o", "json")[1])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((TEXT + "\n").encode())))
    document = json.loads(call(capsys, checkpoint, "-n", 8, "-o", "json")[1])
    assert (document["prompt"], document["tokens"]) == (TEXT + "\n", expected["tokens"])


def test_prompt_from_a_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """As it is, the line end at its end too."""
    (tmp_path / "prompt.txt").write_text(TEXT + "\n")
    expected = json.loads(call(capsys, checkpoint, "-p", TEXT + "\n", "-n", 8, "-o", "json")[1])
    document = json.loads(call(capsys, checkpoint, "-f", tmp_path / "prompt.txt", "-n", 8, "-o", "json")[1])
    assert (document["prompt"], document["tokens"]) == (TEXT + "\n", expected["tokens"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((TEXT + "\n").encode("utf-8-sig"))))
    document = json.loads(call(capsys, checkpoint, "--file", "-", "-n", 8, "-o", "json")[1])
    assert document["tokens"] == expected["tokens"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"ab\xff", "not UTF-8 at byte 2"),
    ],
)
def test_bad_prompt_files(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, said: str
):
    if content is not None:
        (tmp_path / "prompt.txt").write_bytes(content)
    code, out, err = call(capsys, checkpoint, "-f", tmp_path / "prompt.txt")
    assert (code, out) == (2, "")
    assert_one_line(err, "rmse-run: error:", "prompt.txt", said)
    code, _, err = call(capsys, checkpoint, "-f", tmp_path / "prompt.txt", "-p", TEXT)
    assert code == 2
    assert_one_line(err, "--prompt", "not allowed with")


def test_stop_flags(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    flags = (checkpoint, "-p", TEXT, "-n", 40)
    free = json.loads(call(capsys, *flags, "-o", "json")[1])["text"]
    stops = [free[9:11], free[5:7]]
    first = min(free.index(stop) for stop in stops)
    code, out, err = call(capsys, *flags, *(f"--stop={stop}" for stop in stops))
    assert code == 0
    assert out.rstrip("\n") == free[:first].rstrip("\n")
    assert "ended at a stop text" in err


def test_ignore_eos(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    free = json.loads(call(capsys, checkpoint, "-p", TEXT, "-n", 20, "-o", "json")[1])["tokens"]
    folder = shutil.copytree(checkpoint, tmp_path / "ends")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": free[6]}))
    document = json.loads(call(capsys, folder, "-p", TEXT, "-n", 20, "-o", "json")[1])
    assert (document["finish_reason"], document["tokens"]) == ("eos", free[: free.index(free[6]) + 1])
    document = json.loads(call(capsys, folder, "-p", TEXT, "-n", 20, "-o", "json", "--ignore-eos")[1])
    assert (document["finish_reason"], document["tokens"]) == ("length", free)


def test_an_empty_prompt_starts_from_the_begin_token(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Wherever nothing comes from."""
    folder = shutil.copytree(checkpoint, tmp_path / "begins")
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    expected = json.loads(call(capsys, folder, "-p", "\n", "-n", 8, "-o", "json")[1])["tokens"]
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    for flags in (("-p", ""), ("-f", os.devnull), ("-f", tmp_path / "mark.txt"), ("-f", "-"), ()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        document = json.loads(call(capsys, folder, *flags, "-n", 8, "-o", "json")[1])
        assert (document["prompt"], document["tokens"]) == ("", expected)


def test_show_depth_in_plain_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    flags = (checkpoint, "-p", TEXT, "-n", 30, "--show-prompt", "--show-depth")
    code, out, err = call(capsys, *flags)
    assert code == 0 and "\x1b" not in out
    document = json.loads(call(capsys, *flags, "-o", "json")[1])
    runs = re.findall(r"\[(.+?)/(\d)\](?=\[|\n\Z)", out, re.DOTALL)
    assert "".join(text for text, _ in runs) == TEXT + document["text"]
    depths = [int(depth) for text, depth in runs for _ in text]
    assert depths[len(TEXT) :] == document["depth"]
    assert "tokens by loops" in err


def test_show_depth_in_colour(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = call(capsys, checkpoint, "-p", TEXT, "-n", 30, "--show-depth", "--color", "always")
    head, body = out.split("\n", 1)
    assert code == 0
    assert re.sub(r"\x1b\[[\d;]*m", "", head) == "loops  1  2  3  4 "
    document = json.loads(call(capsys, checkpoint, "-p", TEXT, "-n", 30, "-o", "json")[1])
    assert re.sub(r"\x1b\[[\d;]*m", "", body).replace("↵\n", "\n").rstrip("\n") == document["text"].rstrip("\n")
    assert "\x1b" not in call(capsys, checkpoint, "-p", TEXT, "--show-depth", "--color", "never", "-n", 3)[1]


def test_colours_end_with_the_text():
    assert paint("a\nb", 4, 4).count("\x1b[0m\n") == 1
    assert paint("a\nb", 4, 4).endswith("\x1b[0m")
    assert paint("a", 1, 4) != paint("a", 4, 4)
    assert paint("a", 1, 1)  # a model of one loop


def test_runs_of_one_depth():
    written: list[str] = []
    writer = DepthWriter(written.append, 4, color=False)
    for text, depth in (("R", 3), ("O", 3), ("M", 1)):
        writer.add(Span(text, depth))
    writer.close()
    assert "".join(written) == "[RO/3][M/1]"


def test_bars_are_as_long_as_their_share():
    lines = bars([10, 5, 0, 0], width=10)
    assert lines == ["  1 loops  66.7% " + "█" * 10, "  2 loops  33.3% " + "█" * 5]
    assert bars([0, 0]) == []


# ------------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.slow
def test_ctrl_c_ends_with_text_and_statistics(checkpoint: Path):
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from rmse_edge.cli.run import main; sys.exit(main())"
    )
    command = [sys.executable, "-P", "-c", code, str(checkpoint), "-p", TEXT, "-n", "10000000", "--show-depth"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            begun = process.stdout.read(20)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert len(begun) == 20 and out.endswith("]\n")
    assert "Traceback" not in err
    assert "interrupted" in err and "tokens/s" in err


@pytest.mark.parametrize(("calls", "made"), [(0, 0), (1, 1), (7, 7)])
def test_ctrl_c_at_any_token(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, calls: int, made: int
):
    feed, count = TorchRuntime.feed, 0

    def feed_until(self: TorchRuntime, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return feed(self, *args, **kwargs)

    monkeypatch.setattr(TorchRuntime, "feed", feed_until)
    code, out, err = call(capsys, checkpoint, "-p", TEXT, "-o", "json")
    document = json.loads(out)
    assert (code, err, document["finish_reason"]) == (130, "", "interrupted")
    assert len(document["tokens"]) == len(document["depth"]) == len(document["text"]) == made
    count = 0
    code, out, err = call(capsys, checkpoint, "-p", TEXT, "--stop", "a text that never comes")
    assert code == 130
    assert out.rstrip("\n") == document["text"].rstrip("\n")
    assert ("stopped before the first new token" if made == 0 else f"generated {made} tokens") in err


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--runtime", "tpu"], ["--runtime", "tpu", "torch, cuda, onnx"]),
        (["--runtime", "onnx"], ["onnx", "rmse-export"]),
        (["--device", "tpu"], ["--device", "cpu", "cuda"]),
        (["--max-loops", "5"], ["--max-loops", "5", "1..4"]),
        (["--max-loops", "0"], ["--max-loops"]),
        (["--min-loops", "3", "--max-loops", "2"], ["--min-loops"]),
        (["--exit-threshold", "0"], ["--exit-threshold"]),
        (["--exit-epsilon", "nan"], ["--exit-epsilon"]),
        (["--exit-entropy", "1"], ["--exit-entropy", "has no such rule"]),
        (["--temperature", "-1"], ["--temperature", "-1"]),
        (["--top-p", "0"], ["--top-p"]),
        (["--top-k", "-3"], ["--top-k"]),
        (["--seed", "-1"], ["--seed"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--stop", ""], ["--stop", "empty"]),
        (["--prompt", "AB\u00e9"], ["'é'"]),
        (["--prompt", ""], ["prompt is empty"]),
        (["--file", os.devnull], ["prompt is empty"]),
        (["--prompt", " ", "--chat"], ["no question"]),
        (["--file", os.devnull, "--chat"], ["no question"]),
        (["--save-session", "/proc/x"], ["--save-session: /proc/x: cannot be written"]),
        (["--colour", "always"], ["--colour", "--color"]),
    ],
    ids=lambda v: " ".join(v) if v and v[0].startswith("--") else "",
)
def test_bad_flags(checkpoint: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: list[str]):
    prompt = [] if "--file" in flags else ["--prompt", TEXT]
    code, out, err = call(capsys, checkpoint, *prompt, *flags)
    assert (code, out) == (2, "")
    assert_one_line(err, "rmse-run: error:", *said)


def test_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = call(capsys, tmp_path / "none.rmse", "-p", TEXT)
    assert code == 2
    assert_one_line(err, "none.rmse")


def test_a_folder_that_is_neither_package_nor_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, said in (("plain", "config.json"), ("broken.rmse", "manifest.json")):
        (tmp_path / name).mkdir()
        code, _, err = call(capsys, tmp_path / name, "-p", TEXT)
        assert code == 2
        assert_one_line(err, name, said)


def test_a_checkpoint_without_tokenizer(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    folder = shutil.copytree(checkpoint, tmp_path / "mute")
    (folder / "tokenizer.json").unlink()
    code, _, err = call(capsys, folder, "-p", TEXT)
    assert code == 2
    assert_one_line(err, "tokenizer.json")


def test_a_tokenizer_that_knows_more_than_the_model(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    folder = shutil.copytree(checkpoint, tmp_path / "wide")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["é"] = 65
    path.write_text(json.dumps(tokenizer))
    code, _, err = call(capsys, folder, "-p", "é")
    assert code == 2
    assert_one_line(err, "66 tokens up to id 65", "vocab_size 65")


@pytest.mark.parametrize(("raw", "said"), [(b"ab\xff", "UTF-8 at byte 2"), (b"", "prompt is empty")])
def test_bad_stdin(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raw: bytes, said: str
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    code, out, err = call(capsys, checkpoint)
    assert (code, out) == (2, "")
    assert_one_line(err, said)


def test_no_prompt_at_a_terminal(checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    code, _, err = call(capsys, checkpoint)
    assert code == 2
    assert_one_line(err, "--prompt")


def test_a_prompt_beyond_the_package(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    limited = TorchRuntime.open(checkpoint)
    limited.info = limited.info.with_limit(20)
    monkeypatch.setattr(runtimes, "open_writer", lambda *_: limited)
    code, out, err = call(capsys, checkpoint, "-p", "A" * 21)
    assert (code, out) == (2, "")
    assert_one_line(err, "21 tokens", "20", "--max-seq-len")
