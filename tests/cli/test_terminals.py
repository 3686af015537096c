"""Output that cannot hold every character: Windows code pages, the C locale. Nothing printed ends a command for that."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import mixed_model, write_checkpoint
from small_tokenizers import byte_level

from rmse_edge.cli.common import every_character
from rmse_edge.cli.display import bars, paint, plain, table

pytestmark = pytest.mark.slow

VERBS = ("bench", "data", "evaluate", "export", "index", "quantize", "run", "train")
ODD = "no-日×…–é"  # é and × are in cp1252, nothing of it in ASCII


class Narrow:
    """stdout and stderr with a small character set, as Python opens them there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str) -> None:
        self.out, self.err = (io.TextIOWrapper(io.BytesIO(), encoding, errors) for _ in range(2))
        monkeypatch.setattr(sys, "stdout", self.out)
        monkeypatch.setattr(sys, "stderr", self.err)

    def read(self) -> tuple[str, str]:
        texts = []
        for stream in (self.out, self.err):
            stream.flush()
            assert isinstance(stream.buffer, io.BytesIO)
            texts.append(stream.buffer.getvalue().decode(stream.encoding))
        return texts[0], texts[1]


@pytest.fixture(params=[("cp1252", "strict"), ("ascii", "strict"), ("ascii", "surrogateescape")], ids=" ".join)
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Narrow]:
    """To be called in the test itself: pytest has streams of its own for every phase."""
    return lambda: Narrow(monkeypatch, *request.param)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_names_what_it_cannot_find(verb: str, narrow: Callable[[], Narrow], tmp_path: Path):
    streams, path = narrow(), tmp_path / ODD / "file"
    argv = {
        "data": ["shakespeare", "-o", str(path)], "export": ["-m", str(path)], "quantize": ["-m", str(path)],
        "index": [str(path), "x", "-o", "y"], "train": ["--text", str(path), "-o", "x"],
    }.get(verb, [str(path)])  # fmt: skip
    assert importlib.import_module(f"rmse_edge.cli.{verb}").main(argv) == 2
    out, err = streams.read()
    assert out == "" and "no-\\u65e5" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, narrow: Callable[[], Narrow]):
    streams = narrow()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"rmse_edge.cli.{verb}").main(["--help"])
    assert ended.value.code == 0 and "usage" in streams.read()[0]


def test_measurements_are_printed(checkpoint: Path, narrow: Callable[[], Narrow]):
    from rmse_edge.cli.evaluate import main

    streams = narrow()
    assert main([str(checkpoint), "--max-tokens", "600"]) == 0
    out, _ = streams.read()
    assert "tokens/s" in out and "loops" in out and "###" in out and "\\" not in out


def test_our_own_signs(narrow: Callable[[], Narrow]):
    streams = narrow()
    with every_character():
        print(table(("model", "loss"), [("tiny", "1.5 ± 0.25"), ("other", "1.75")]), *bars([1, 2]), sep="\n")
        print(paint("a\n", 1, 2), plain("2.0 ×, 3 µs"))
        print(plain("1 ± 2", sys.stderr), file=sys.stderr)
    out, err = streams.read()
    sign = "±" if streams.out.encoding == "cp1252" else "+-"
    assert "\\u" not in out and "\\x" not in out + err and "#" * 40 in out and f"1 {sign} 2" in err
    assert f"1.5 {sign} 0.25 |" in out and len({len(line) for line in out.splitlines()[:4]}) == 1  # still aligned
    assert ("2.0 ×, 3 µs" if sign == "±" else "2.0 x, 3 us") in out


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says every byte."""
    folder = write_checkpoint(mixed_model(vocab_size=320), tmp_path_factory.mktemp("wide") / "wide")
    byte_level().save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("flags", [(), ("--show-depth",), ("--show-depth", "--color", "always"), ("-o", "json")])
def test_text_is_printed(wide: Path, narrow: Callable[[], Narrow], flags: tuple[str, ...]):
    from rmse_edge.cli.run import main

    streams = narrow()
    assert main([str(wide), "-p", "日本", "--show-prompt", "-n", "60", *flags]) == 0
    out, err = streams.read()
    if flags == ("-o", "json"):
        assert json.loads(out)["prompt"] == "日本" and err == ""
    else:
        assert "generated 60 tokens" in err
        assert "\\u65e5" in out and "\\ufffd" in out


def test_a_terminal_in_another_encoding(wide: Path):
    """As a whole, with what Python itself makes of the environment."""
    command = [sys.executable, "-m", "rmse_edge.cli.run", str(wide), "-p", "日é", "--show-prompt", "-n", "3"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"\\u65e5\xe9") and b"Traceback" not in done.stderr


def test_streams_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch):
    streams = Narrow(monkeypatch, "ascii", "strict")
    with every_character():
        print(ODD)
    assert streams.out.errors == "strict" and streams.read()[0].startswith("no-\\u65e5\\xd7")
