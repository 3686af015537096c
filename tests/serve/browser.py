"""Chromium without a window, driven over its own protocol through two pipes: no driver, no further package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-extensions",
    "--disable-background-networking", "--disable-dev-shm-usage", "--window-size=1200,900",
)  # fmt: skip
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}

# Of the pages of rmse-serve and of web_demo/, which are one: whether it can be used, and its tokens with their depths.
READY = "document.body?.dataset?.ready !== undefined"
TOKENS = "[...document.querySelectorAll('#text .token')].map(t => [t.textContent, parseInt(t.title)])"


def found() -> str | None:
    """Where Chromium is, if it is here."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """A tab."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, os.fdopen(back, "rb", buffering=0)
        self._rest, self._count, self._session = b"", 0, ""
        self.logged: list[str] = []  # what the page complained of
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.logged.append(answer["params"]["entry"]["text"])
            if answer.get("method") == "Runtime.exceptionThrown":
                self.logged.append(json.dumps(answer["params"]["exceptionDetails"]))

    call = _call

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = self._back.read(1 << 20)
            if not data:
                raise RuntimeError("Chromium has ended")
            self._rest += data
        one, _, self._rest = self._rest.partition(b"\0")
        return json.loads(one)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What JavaScript says, a promise awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> Any:
        """Wait until it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.value(expression):
                return value
            time.sleep(0.05)
        raise AssertionError(f"not true after {seconds} s: {expression}; the page said {self.logged}")

    def press(self, key: str, control: bool = False) -> None:
        code = {"windowsVirtualKeyCode": KEYS[key], "key": key, "code": "Space" if key == " " else key}
        text = {"text": {"Enter": "\r", " ": " "}[key]} if key in ("Enter", " ") and not control else {}
        for kind in ("keyDown", "keyUp"):
            given = text if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, modifiers=2 if control else 0, **code, **given)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def dark(self, dark: bool) -> None:
        value = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(*flags: str) -> Iterator[Page]:
    """A tab of a browser of its own, which is ended afterwards."""
    program = found()
    assert program is not None
    (to_read, to_write), (back_read, back_write) = os.pipe(), os.pipe()

    def descriptors() -> None:  # Chromium reads 3 and writes 4
        os.dup2(to_read, 13)
        os.dup2(back_write, 14)
        os.dup2(13, 3)
        os.dup2(14, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # its sandbox refuses root
        process = subprocess.Popen(
            [program, *FLAGS, *root, *flags, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=descriptors, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(back_write)
        try:
            yield Page(to_write, back_read)
        finally:
            process.kill()
            process.wait()
            os.close(to_write)
