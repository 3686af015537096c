"""rmse-data: a whole, verified file or one line that says why not."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

from rmse_edge.cli.data import main
from rmse_edge.train import download
from rmse_edge.train.download import TEXTS, Text


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address it is served at."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that has read enough hangs up
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Stand-in contents under the name "shakespeare"."""
    content = b"First Citizen:\n" * 20_000
    text = Text("http://127.0.0.1:9/nothing", hashlib.sha256(content).hexdigest(), len(content))
    monkeypatch.setitem(TEXTS, "shakespeare", text)
    return content


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rmse-data")]
    assert len(err) == 1
    return err[0]


def test_the_known_file_is_the_one_that_the_shipped_model_read() -> None:
    """As its model card says. The file itself is not in the repository."""
    text, card = TEXTS["shakespeare"], (ROOT / "models" / "rmse-shakespeare" / "README.md").read_text()
    assert f"({text.bytes:,} bytes, SHA-256\n`{text.sha256}`)" in card


def test_a_download_and_the_second_time(served: tuple[Path, str], known: bytes, tmp_path: Path, capsys) -> None:
    folder, url = served
    (folder / "input.txt").write_bytes(known)
    out = tmp_path / "text.txt"
    assert main(["shakespeare", "-o", str(out), "--url", f"{url}/input.txt"]) == 0
    assert out.read_bytes() == known and "written" in capsys.readouterr().out
    assert main(["shakespeare", "-o", str(out), "--url", f"{url}/gone"]) == 0
    assert "already there" in capsys.readouterr().out
    assert [p.name for p in tmp_path.glob("text*")] == ["text.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 300_000, "not the expected file (its SHA-256 differs); nothing was written"),
        (b"x" * 9_000_000, "not the expected file (its SHA-256 differs); nothing was written"),
        (b"short", "ended after 5 of 300,000 bytes; try again"),
        (None, "the server answered 404"),
    ],
)
def test_something_else_is_not_kept(
    served: tuple[Path, str], known: bytes, tmp_path: Path, capsys, content: bytes | None, message: str
) -> None:
    folder, url = served
    if content is not None:
        (folder / "input.txt").write_bytes(content)
    out = tmp_path / "text.txt"
    assert main(["shakespeare", "-o", str(out), "--url", f"{url}/input.txt"]) == 2
    line = one_line(capsys)
    assert message in line and f"{url}/input.txt" in line
    assert not list(tmp_path.glob("text*")), "nothing is left behind"


def test_no_network_and_other_mistakes(known: bytes, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 5)
    out = tmp_path / "text.txt"
    for argv, message in (
        (["shakespeare", "-o", str(out)], "cannot be fetched"),
        (["shakespeare", "-o", str(out), "--url", "ftp://x/y"], "expected an http or https address"),
        (["shakespeare", "-o", str(tmp_path / "no" / "text.txt")], "does not exist; create it first"),
        (["hamlet", "-o", str(out)], "invalid choice: 'hamlet'"),
        ([], "missing name"),
    ):
        assert main(argv) == 2
        assert message in one_line(capsys)
    assert not out.exists()
    out.write_text("mine")
    assert main(["shakespeare", "-o", str(out)]) == 2
    assert "exists and is not the text 'shakespeare'; remove it or choose another file" in one_line(capsys)
    assert out.read_text() == "mine"
    assert main(["shakespeare", "-o", os.devnull]) == 2
    assert "is a device, expected a file; choose another name" in one_line(capsys)
