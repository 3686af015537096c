"""The browser's page in Chromium: a package by ranges or from the picker, written and steered without a server's help."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from later import later
from web.page_parts import fetched, page_script

from rmse_edge.archive import pack
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.package import Package

listen = later("rmse_edge.serve.listen")
chromium = later("serve.browser")

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.onnx]

PROBLEM = "document.getElementById('problem').textContent"


@contextmanager
def serving(given: Path | None) -> Iterator[str]:
    """The page's address."""
    parts = fetched()
    socket, begun = listen.bind("127.0.0.1", 0), threading.Event()
    running = listen.server(page_script().application(given, parts), None, begun.set)
    thread = threading.Thread(target=lambda: running.run(sockets=[socket]))
    thread.start()
    try:
        assert begun.wait(30)
        yield f"http://localhost:{socket.getsockname()[1]}/"
    finally:
        running.should_exit = True
        thread.join(30)


def write(page: Any, count: int, turn: int) -> list[list[Any]]:
    """What the page writes, token by token."""
    for name, value in (("max_tokens", count), ("seed", 3)):
        page.value(f"document.getElementById('{name}').value = {value}")
    page.value("document.getElementById('write').click()")
    page.until(f"document.body.dataset.written === '{turn}'", 120)
    return page.value(chromium.TOKENS)


def pick(page: Any, name: str, file: Path) -> None:
    """Give a file to one of the page's pickers."""
    document = page.call("DOM.getDocument")["root"]["nodeId"]
    picker = page.call("DOM.querySelector", nodeId=document, selector=f"#{name}")["nodeId"]
    page.call("DOM.setFileInputFiles", files=[str(file)], nodeId=picker)


def expected(package: Path, count: int, capsys: pytest.CaptureFixture[str]) -> list[list[Any]]:
    capsys.readouterr()
    assert rmse_run([str(package), "-p", "ROMEO:", "-n", str(count), "--seed", "3", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return [[text, depth] for text, depth in zip(found["text"], found["depth"])]


def test_a_folder_is_read_by_ranges_and_writes_by_itself(package: Path, page: Any, capsys: pytest.CaptureFixture[str]):
    with serving(package) as address:
        page.open(address)
        page.until(chromium.READY)
        assert page.value("crossOriginIsolated")
        made = write(page, 100, 1)
        assert made == expected(package, 100, capsys) and len({depth for _, depth in made}) > 2
        # A slider acts on what is being written, Escape ends it.
        page.value("document.getElementById('max_tokens').value = 100000")
        page.value("document.getElementById('write').click()")
        page.until("document.querySelectorAll('#text .token').length > 3")
        page.value("(e => { e.value = 1; e.dispatchEvent(new Event('input')); })(document.getElementById('max_loops'))")
        page.until("parseInt([...document.querySelectorAll('#text .token')].at(-1).title) === 1")
        page.press("Escape")
        page.until("document.body.dataset.written === '2'")
        assert page.value(PROBLEM) == ""
        # What the tokenizer does not know is said.
        page.value("document.getElementById('prompt').value = 'é'")
        page.value("document.getElementById('write').click()")
        page.until("document.body.dataset.written === '3'")
        assert page.value(PROBLEM) == 'the tokenizer has no token for "é"'


def test_an_archive_from_the_picker(package: Path, page: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    archive, wrong = tmp_path / "tiny.rmse.zip", tmp_path / "wrong.zip"
    pack(Package.open(package), archive)
    wrong.write_bytes(archive.read_bytes()[:-9])
    with serving(None) as address:
        page.open(address)
        page.until("document.getElementById('file') !== null")
        assert "Choose a package" in page.value(PROBLEM)
        pick(page, "file", wrong)
        page.until(f"{PROBLEM}.includes('not a whole zip archive')")
        pick(page, "file", archive)
        page.until(chromium.READY)
        assert write(page, 20, 1) == expected(package, 20, capsys)


def test_an_archive_behind_an_address(package: Path, page: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    archive = tmp_path / "tiny.rmse.zip"
    pack(Package.open(package), archive)
    with serving(archive) as address:
        page.open(address)
        page.until(chromium.READY)
        assert write(page, 20, 1) == expected(package, 20, capsys)
