"""The index file of a knowledge base: usearch's HNSW graph over the keys, cosine metric, float32.

The file is what usearch's Swift, Java and C99 bindings map into memory as well. usearch reads damaged files as they are
and may crash the process, so a file's size and SHA-256 are checked first, against the manifest kept in SQLite.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from rmse_edge.files import digest_file, sync_folder

from .base import KnowledgeError
from .graph import check_index

SCRATCH = ".index.part"  # one writer at a time, so one name
REBUILD = "rebuild it with rmse-index --rebuild -o"
EXPANSION = 512  # candidates kept during a search of the graph
EXACT = 131_072  # up to so many keys every one is compared, and nothing is missed; docs/memory.md has times and recall


def new_index(key_dims: int) -> Any:
    """An empty usearch index.

    Raises:
        KnowledgeError: usearch is not installed.
    """
    # usearch 2.26.6 has a libstdc++ of its own inside and offers its symbols to the whole process. An onnxruntime 1.31.1
    # that is imported afterwards takes std::locale's tables from there, and importing it ends the process with a
    # segmentation fault. In the other order both take them from the system's libstdc++.
    if "usearch" not in sys.modules:
        with suppress(ImportError):
            import onnxruntime  # noqa: F401
    try:
        from usearch.index import Index
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "usearch":
            raise
        raise KnowledgeError("usearch is not installed; install it with: pip install 'rmse-edge[knowledge]'") from None
    return Index(ndim=key_dims, metric="cos", dtype="f32", expansion_search=EXPANSION)


def put_in(index: Any, points: Mapping[int, np.ndarray]) -> None:
    """Add those `points` (see `rows.point_of`) that are not there, each with its key (key_dims,)."""
    new = {point: key for point, key in points.items() if point not in index}
    if new:
        index.add(np.array(list(new), np.uint64), np.stack(list(new.values())), threads=1)


def path_of(folder: Path, generation: int) -> Path:
    return folder / f"index-{generation}.usearch"


def read_index(folder: Path, manifest: dict[str, Any], view: bool) -> Any:
    """The verified index that `manifest` names, mapped into memory (`view`) or loaded, to be changed.

    Raises:
        KnowledgeError: the file is missing, damaged, or not this knowledge base's.
    """
    path, entry = path_of(folder, manifest["generation"]), manifest["index"]
    index = new_index(manifest["key_dims"])
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise KnowledgeError(f"{path}: {size} bytes, expected {entry['bytes']}; truncated? {REBUILD} {folder}")
        if digest_file(path) != entry["sha256"]:
            raise KnowledgeError(f"{path}: its SHA-256 is not the recorded one; damaged, {REBUILD} {folder}")
        check_index(path, manifest["keys"], manifest["key_dims"], f"{REBUILD} {folder}")
        (index.view if view else index.load)(str(path))
    except FileNotFoundError:
        raise KnowledgeError(f"{path}: missing; {REBUILD} {folder}") from None
    except OSError as error:
        raise KnowledgeError(f"{path}: cannot be read ({error.strerror}); {REBUILD} {folder}") from None
    except RuntimeError as error:  # whole, but written by a usearch of another format
        raise KnowledgeError(f"{path}: this usearch cannot read it ({error}); {REBUILD} {folder}") from None
    if len(index) != manifest["keys"] or index.ndim != manifest["key_dims"]:
        raise KnowledgeError(
            f"{path}: holds {len(index)} keys of {index.ndim} numbers, expected {manifest['keys']} of "
            f"{manifest['key_dims']}; {REBUILD} {folder}"
        )
    return index


def write_index(index: Any, folder: Path, generation: int) -> dict[str, Any]:
    """Write `index` as the file of `generation`, whole and on the disk when this returns, and say its size and SHA-256.

    Raises:
        KnowledgeError: it cannot be written; the disk is full.
    """
    scratch = folder / SCRATCH
    try:
        index.save(str(scratch))
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        entry = {"bytes": scratch.stat().st_size, "sha256": digest_file(scratch)}
        os.replace(scratch, path_of(folder, generation))
        sync_folder(folder)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            scratch.unlink()
        raise KnowledgeError(
            f"{folder}: its index cannot be written ({error}); is the disk full? The knowledge base is as it was"
        ) from None
    return entry


def remove_others(folder: Path, generation: int) -> None:
    """Remove what killed writers left and the files of other generations. A reader that has one mapped keeps it."""
    for path in (*folder.glob("index-*.usearch"), folder / SCRATCH):
        if path != path_of(folder, generation):
            with suppress(OSError):  # Windows keeps mapped files; the next writer tries again
                path.unlink()


def nearest(index: Any, key: np.ndarray, n: int, exact: bool | None = None) -> list[int]:
    """The `n` points nearest to `key` (key_dims,), best first.

    Args:
        exact: whether every key is compared, instead of those the graph leads to; None: if there are at most `EXACT`.
    """
    if not len(index):
        return []
    exact = len(index) <= EXACT if exact is None else exact
    return index.search(key, min(n, len(index)), exact=exact, threads=1).keys.astype(np.int64).tolist()
