"""The parent's end of a contestant's process: a question, an answer, a time limit, and one line of what went wrong."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Failed(Exception):
    """A contestant, or one measurement of it, failed: one line."""


class Child:
    """A contestant that is open and waits to be asked.

    Raises:
        Failed: here and in `ask`: it says so, it ended, or it did not answer in time.
    """

    def __init__(
        self, command: Sequence[str | Path], log: Path, limit: float, environment: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            command: the program and its arguments; it runs in the folder of the project.
            log: takes what it prints besides its answers.
            limit: seconds that an answer may take.
        """
        self.log, self.limit = log, limit
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
            )
        self._read = b""
        try:
            self.facts: dict[str, Any] = self._answer().get("ready", {})
        except Failed:
            self.close()
            raise

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._answer()

    def peak_bytes(self) -> int | None:
        """The most memory it has had resident so far; None where the system does not tell."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return None
        return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)

    def close(self) -> None:
        """End it: closing the pipe asks it to, and what does not end by that is killed."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        end = monotonic() + self.limit
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._read:
                if not waiting.select(max(0.0, end - monotonic())):
                    self.process.kill()
                    raise Failed(f"no answer within {self.limit:g} s")
                part = os.read(self.process.stdout.fileno(), 1 << 16)
                if not part:
                    raise self._ended()
                self._read += part
        line, _, self._read = self._read.partition(b"\n")
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def _ended(self) -> Failed:
        code = self.process.wait()
        said = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return Failed(f"its process ended with code {code}" + (f": {said[-1]}" if said else ""))
