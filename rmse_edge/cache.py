"""Where what was made once is kept for the next time: compiled kernels, unpacked archives. All of it may be removed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from .files import NO_LOCKS


def cache_folder() -> Path:
    """RMSE_EDGE_CACHE, or rmse-edge in the user's cache folder."""
    own = os.environ.get("RMSE_EDGE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rmse-edge"


def unpacked_packages() -> Path:
    """Where archives are unpacked, each under the hash of what it holds."""
    return cache_folder() / "packages"


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Only one process at a time makes `path`; those that wait find it made. The lock, an empty file beside it, stays."""
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire()
    except OSError as failure:
        if failure.errno not in NO_LOCKS:
            raise
        yield  # each makes its own, and the last one stays
        return
    try:
        yield
    finally:
        lock.release()
