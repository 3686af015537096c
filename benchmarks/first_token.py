"""Time to the first token from a cold and from a warm start, of rmse-runner and of llama.cpp on the twin.

Of the runner that is from the start of its process, hashing the package included, to its end after one token; of
llama.cpp from opening the model (contestants/llama_first_token.py). Cold: the model's files, and no others, were dropped
from the system's cache of files before.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from .artifacts import Artifacts, Missing
from .child import ROOT, Failed
from .field import BASELINE
from .shapes import Looped

PROMPT = 16  # tokens that are read first
LEFT = 0.1  # part of a file that may stay in memory in a start called cold


@dataclass
class FirstToken:
    """Of one contestant, cold or warm."""

    model: str
    threads: int
    contestant: str
    cold: bool
    seconds: list[float] = field(default_factory=list)
    failed: str | None = None

    def summary(self) -> dict[str, Any]:
        return asdict(self) | {"median": median(self.seconds) if self.seconds else None}


def first_tokens(model: Looped, threads: int, names: list[str], repeats: int, files: Artifacts, limit: float) -> list:
    """`repeats` starts of each kind, in turns: warm after cold. Nothing else may have the files open."""
    found = []
    starts: list[tuple[FirstToken, Callable[[], float]]] = []
    for name in names:
        for cold in (True, False):
            row = FirstToken(model.name, threads, name, cold)
            found.append(row)
            try:
                start, path = start_of(name, model, threads, files, limit)
                starts.append((row, cold_start(path, start) if cold else start))
            except Missing as missing:
                row.failed = str(missing)
    for _ in range(repeats):
        for row, once in starts:
            if row.failed is None:
                try:
                    row.seconds.append(once())
                except (Failed, OSError) as error:
                    row.failed = str(error)
    return found


def start_of(
    name: str, model: Looped, threads: int, files: Artifacts, limit: float
) -> tuple[Callable[[], float], Path]:
    """What gives the seconds of one start, and the file or folder that it reads."""
    if name == BASELINE:
        twin = files.gguf(model.twin)
        module = "benchmarks.contestants.llama_first_token"
        command = [str(files.llama()), "-m", module, str(twin), str(threads), str(PROMPT)]
        return lambda: float(run(command, limit)), twin
    package = files.package(model, "executorch")
    ids = ",".join(str(n) for n in range(1, PROMPT + 1))
    said = ["--prompt-tokens", ids, "-n", "1", "--temperature", "0", "--ignore-eos", "-t", str(threads)]
    command = [str(files.runner()), str(package), *said]

    def once() -> float:
        start = perf_counter()
        run(command, limit)
        return perf_counter() - start

    return once, package


def cold_start(path: Path, start: Callable[[], float]) -> Callable[[], float]:
    def once() -> float:
        drop_cached(path)
        return start()

    return once


def run(command: list[str], limit: float) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise Failed(f"no token within {limit:g} s") from None
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1])
    return done.stdout


def files_of(path: Path) -> Iterator[Path]:
    yield from (file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def drop_cached(path: Path) -> None:
    """Have the system forget what it holds of a file, or of all files of a folder.

    Raises:
        Failed: it keeps them, as it may: a start would be called cold that is not.
    """
    if not hasattr(os, "posix_fadvise"):
        raise Failed("this system cannot be asked to forget a file: no cold start")
    for file in files_of(path):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # what is not yet written cannot be forgotten
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
        if (part := cached_part(file)) > LEFT:
            raise Failed(f"the system keeps {part:.0%} of {file.name} in memory: no cold start")


def cached_part(file: Path) -> float:
    """Of a file's pages, the part that is in memory; mincore(2)."""
    size = file.stat().st_size
    if size == 0:
        return 0.0
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m,
    ):
        pages = -(-size // mmap.PAGESIZE)
        there = (ctypes.c_ubyte * pages)()
        start = ctypes.addressof(ctypes.c_char.from_buffer(m))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), there):
            raise OSError(ctypes.get_errno(), f"mincore of {file.name}")
        return sum(page & 1 for page in there) / pages
