"""Memory that goes back to the system: pages of files that an engine has mapped, and what was freed."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

# Advice of madvise(2). PAGEOUT never drops what was written, but reads the file again when a page is wanted back; DONTNEED
# leaves the pages in the system's cache, for mappings that nobody writes to.
DONTNEED, PAGEOUT = 4, 21


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
