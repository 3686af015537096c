"""rmse-runner, built and started."""

from __future__ import annotations

import json
import subprocess
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from helpers import assert_one_line
from paths import NATIVE, ROOT


def build_folder(executorch: Path) -> Path:
    """Where what is built against this ExecuTorch is kept."""
    return ROOT / "build" / f"native-{zlib.crc32(str(executorch).encode()):08x}"


def make(executorch: Path, build: Path, *variables: str) -> Path:
    """What is up to date is kept from one run of the tests to the next."""
    run_make(NATIVE, executorch, build, *variables)
    return build / "rmse-runner"


def make_library(executorch: Path, build: Path, *variables: str) -> Path:
    """The runner as the Android app loads it, of the same objects."""
    run_make(ROOT / "android_demo" / "native", executorch, build, *variables)
    return build / "librmse-runner.so"


def run_make(folder: Path, executorch: Path, build: Path, *variables: str) -> None:
    command = ["make", "-C", str(folder), f"EXECUTORCH={executorch}", f"BUILD={build}", *variables]
    build.parent.mkdir(exist_ok=True)
    with FileLock(f"{build}.lock"):  # several files of tests, and so processes, need it
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Runner:
    """A command that starts the runner on one package."""

    def __init__(self, command: Sequence[str | Path], package: Path) -> None:
        self.command = [*map(str, command), str(package)]

    def __call__(self, *flags: str, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*self.command, "-t", "1", *flags], capture_output=True, text=True, **options)
        assert done.returncode == code, done.stderr
        return done

    def refusal(self, *flags: str, **options: Any) -> str:
        """The line that says why this is not possible: all there is."""
        done = self(*flags, code=2, **options)
        assert done.stdout == "" and done.stderr.startswith("rmse-runner: error: ")
        assert_one_line(done.stderr)
        return done.stderr

    def document(self, *flags: str) -> dict[str, Any]:
        return json.loads(self(*flags, "-o", "json").stdout)

    def feed(self, tokens: np.ndarray, file: Path, *flags: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Logits and depths of all tokens."""
        ids = ",".join(map(str, tokens))
        depth = self("--prompt-tokens", ids, "--logits", str(file), *flags, **options).stdout.split()
        return np.fromfile(file, np.float32).reshape(len(tokens), -1), np.array(depth, np.int64)


def flip(at: float) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(at * (len(content) - 1))] ^= 1
        file.write_bytes(content)

    return change
