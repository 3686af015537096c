"""What the machine gives and what the process takes: memory bandwidth and resident memory."""

from __future__ import annotations

import ctypes
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

# Advice of madvise(2). PAGEOUT never drops what was written, but reads the file again when a page is wanted back; DONTNEED
# leaves the pages in the system's cache, for mappings that nobody writes to.
DONTNEED, PAGEOUT = 4, 21
BUFFER = 128 << 20  # bytes of each of two arrays: far beyond the caches of phones and most desktops


def copy_bandwidth(threads: int = 1, nbytes: int = BUFFER, repeats: int = 5) -> float:
    """Bytes per second that `threads` threads read and write together while copying arrays, the median of `repeats`."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads)))
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):  # the first one warms up: pages are mapped, threads start
            start = perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), parts))  # NumPy lets go of the GIL while copying
            seconds.append(perf_counter() - start)
    return 2 * nbytes / median(seconds[1:])


def release_mapped(path: Path, advice: int = PAGEOUT) -> None:
    """Give the pages of a file that this process has mapped back to the system.

    They come back by themselves when they are read. For files that were read once, to be packed into memory: their pages
    would otherwise count as resident until memory runs short. Linux 5.4 and later, Android; elsewhere nothing happens.
    """
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    name = str(path.resolve())
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == name:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            libc.munlock(start, end - start)  # ExecuTorch locks what it maps
            libc.madvise(start, end - start, advice)  # a refusal costs nothing but memory


def release_freed() -> None:
    """Give back what this process has freed. The C library keeps pages between others that are still taken: after a large model
    was traced, or an engine has let go of its weights, gigabytes. With glibc; elsewhere objects are collected, and no more.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def resident_bytes() -> tuple[int | None, int | None]:
    """(now, at most so far) resident memory of this process; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: on Linux a new process inherits the maximum of the one that started it.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    try:
        import resource
    except ImportError:  # Windows
        return None, None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None, peak if sys.platform == "darwin" else peak * 1024
