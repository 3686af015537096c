"""The SQLite file of a knowledge base: the passages, and the manifest that says which index file belongs to them.

The journal is a rollback journal (journal_mode DELETE): between transactions a knowledge base is plain files that can
be copied. Every row carries a CRC-32, checked whenever the row is read, so that no damaged passage reaches the model;
the manifest carries the SHA-256 of its own canonical form.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmse_edge.numbers import Count
from rmse_edge.schema import Digest, Name, Whole, parse_json, validated

from .base import KnowledgeError, Passage

FORMAT = "rmse-edge knowledge base"
FORMAT_VERSION = 2  # 2: one index entry for all passages of equal keys
BUSY_S = 10.0  # how long to wait for another process's commit or search
LARGEST_MANIFEST = 1 << 16  # characters
BATCH = 512  # ids of one query; SQLite allows at least 999
AGAIN = "build it again from the texts with rmse-index"
SCHEMA = """
CREATE TABLE manifest (json TEXT NOT NULL);
CREATE TABLE passages (
    id INTEGER PRIMARY KEY, source TEXT NOT NULL, line INTEGER NOT NULL, text TEXT NOT NULL,
    key BLOB NOT NULL, value BLOB NOT NULL, point INTEGER NOT NULL, crc INTEGER NOT NULL
);
CREATE INDEX passages_by_point ON passages (point, id);
CREATE INDEX passages_by_source ON passages (source);
"""


GRID = 2.0**13  # cells per unit of each number of a key


@dataclass(frozen=True)
class Entry:
    """What the manifest says about a file."""

    bytes: Whole
    sha256: Digest


@dataclass(frozen=True)
class Manifest:
    """What the manifest holds."""

    key_dims: Count
    slots: Count
    d_model: Count
    model: Name  # fingerprint
    passages: Whole
    keys: Whole  # different ones: entries of the index
    generation: Whole
    index: Entry


def digest_manifest(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest's canonical JSON: sorted keys, no white space, without its own `sha256`."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Row:
    id: int
    passage: Passage
    key: np.ndarray  # (key_dims,) float32, length 1
    value: np.ndarray  # (slots, d_model) float16
    point: int  # the index entry of its key


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """SQLite's errors as a `KnowledgeError` that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            message = f"{path}: in use by another process; try again when it has finished"
        elif name.startswith("SQLITE_FULL"):
            message = f"{path}: the disk is full; what was committed before stays, free some space"
        elif name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_IOERR")):
            message = f"{path}: cannot be read or written ({error}); check the disk and the folder's permissions"
        else:
            message = f"{path}: damaged ({error}); {AGAIN}"
        raise KnowledgeError(message) from None


@contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """Hold the right to write to a knowledge base; the system takes it back from a process that dies.

    It is SQLite's lock on an empty file, the one lock that every platform's SQLite has.

    Raises:
        KnowledgeError: another writer holds it, or the folder is read-only.
    """
    path = folder / "writer.lock"
    with one_line(path):
        lock = sqlite3.connect(path, timeout=0, isolation_level=None)
    with closing(lock):
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname.startswith("SQLITE_BUSY"):
                raise KnowledgeError(
                    f"{folder}: another process is writing to it; wait until it has finished"
                ) from None
            raise KnowledgeError(f"{folder}: cannot be written ({error}); check its permissions") from None
        yield


class Rows:
    """One connection to `passages.sqlite`."""

    def __init__(self, path: Path, create: bool = False) -> None:
        self.path = path
        uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
        with one_line(path):
            self._db = sqlite3.connect(uri, BUSY_S, isolation_level=None, check_same_thread=False, uri=True)
            try:
                # EXTRA: a commit must be on the disk before the old index file is removed.
                for pragma in ("synchronous=EXTRA", "secure_delete=ON", "cell_size_check=ON", "trusted_schema=OFF"):
                    self._db.execute(f"PRAGMA {pragma}")
                if create:
                    self._db.executescript(SCHEMA)
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self, write: bool = False) -> Iterator[None]:
        """All that happens in the block, or nothing. While one reads, no other process commits."""
        with one_line(self.path):
            self._db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def check(self) -> None:
        """Read the whole file's structure: a writer would spread damage.

        Raises:
            KnowledgeError: the file is damaged.
        """
        with one_line(self.path):
            found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise KnowledgeError(f"{self.path}: damaged ({' '.join(found.split())}); {AGAIN}")

    def shrink(self) -> None:
        """Give the space of deleted passages back."""
        with one_line(self.path):
            self._db.execute("VACUUM")

    # ---------------------------------------------------------------------------------------------------- manifest

    def manifest(self) -> dict[str, Any]:
        """The verified manifest.

        Raises:
            KnowledgeError: not a knowledge base, of another version, or damaged.
        """
        with one_line(self.path):
            # Bounded: what is larger is not read.
            found = self._db.execute(
                "SELECT json FROM manifest WHERE typeof(json) = 'text' AND length(json) < ? LIMIT 2",
                (LARGEST_MANIFEST,),
            ).fetchall()
        manifest = parse_json(found[0][0], str(self.path), KnowledgeError, AGAIN) if len(found) == 1 else None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "format_version" not in manifest:
            raise KnowledgeError(f"{self.path}: damaged, or not the passages of an {FORMAT}; {AGAIN}")
        if manifest["format_version"] != FORMAT_VERSION:
            raise KnowledgeError(
                f"{self.path}: format version {manifest['format_version']!r}, this rmse-edge reads {FORMAT_VERSION}; {AGAIN}"
            )
        if manifest.get("sha256") != digest_manifest(manifest):
            raise KnowledgeError(f"{self.path}: its manifest is damaged (its SHA-256 does not fit); {AGAIN}")
        validated(Manifest, manifest, f"{self.path}: its manifest", KnowledgeError, AGAIN)
        return manifest

    def put_manifest(self, manifest: dict[str, Any]) -> None:
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest}
        manifest["sha256"] = digest_manifest(manifest)
        self._db.execute("DELETE FROM manifest")
        self._db.execute("INSERT INTO manifest VALUES (?)", (json.dumps(manifest),))

    # ---------------------------------------------------------------------------------------------------- passages

    def insert(self, entries: Iterable[tuple[Passage, np.ndarray, np.ndarray]]) -> tuple[int, dict[int, np.ndarray]]:
        """Put in passages with checked keys and values.

        Returns:
            (number of passages that were not there, their points with the key of each point's first passage).
        """
        added = 0
        points: dict[int, np.ndarray] = {}
        for passage, key, value in entries:
            blobs = (key.astype("<f4").tobytes(), value.astype("<f2").tobytes())
            row = (passage.id, passage.source, passage.line, passage.text, *blobs)
            point = point_of(key)
            values = (*row, point, crc(*row))
            if self._db.execute("INSERT OR IGNORE INTO passages VALUES (?,?,?,?,?,?,?,?)", values).rowcount:
                added += 1
                points.setdefault(point, key)
        return added, points

    def delete(self, ids: Sequence[int]) -> tuple[int, list[int]]:
        """Remove passages; returns how many there were, and the points that have no passage any more."""
        removed, touched = 0, set()
        for number in ids:
            row = self._db.execute("DELETE FROM passages WHERE id = ? RETURNING point", (number,)).fetchone()
            if row is not None:
                removed += 1
                touched.add(row[0])
        return removed, sorted(point for point in touched if not self.at_point(point, 1))

    def at_point(self, point: int, n: int) -> list[int]:
        """Ids of the passages whose key is at `point`: the `n` lowest."""
        found = self._db.execute("SELECT id FROM passages WHERE point = ? ORDER BY id LIMIT ?", (point, n))
        return [number for (number,) in found]

    def at_points(self, points: Sequence[int], n: int) -> list[int]:
        """Ids of the first `n` passages of `points`, in that order and those of one point in order of their ids.

        Raises:
            KnowledgeError: a point has no passages.
        """
        ids: list[int] = []
        with one_line(self.path):
            for point in points:
                found = self.at_point(point, n - len(ids))
                if not found:
                    raise KnowledgeError(f"{self.path}: the passages of an index entry are missing; {AGAIN}")
                ids += found
                if len(ids) == n:
                    break
        return ids

    def ids_of(self, source: str) -> list[int]:
        with one_line(self.path):
            return [i for (i,) in self._db.execute("SELECT id FROM passages WHERE source = ?", (source,))]

    def known(self, ids: Sequence[int]) -> set[int]:
        found: set[int] = set()
        with one_line(self.path):
            for some in (ids[i : i + BATCH] for i in range(0, len(ids), BATCH)):
                marks = ",".join("?" * len(some))
                found.update(i for (i,) in self._db.execute(f"SELECT id FROM passages WHERE id IN ({marks})", some))
        return found

    def sources(self) -> dict[str, int]:
        with one_line(self.path):
            return dict(self._db.execute("SELECT source, COUNT(*) FROM passages GROUP BY source ORDER BY source"))

    def read(self, shape: tuple[int, int, int], ids: Sequence[int] | None = None) -> Iterator[Row]:
        """The passages `ids`, or all of them, each checked.

        Args:
            shape: (key_dims, slots, d_model).
        Raises:
            KnowledgeError: a passage is damaged or missing.
        """
        columns = "SELECT id, source, line, text, key, value, point, crc FROM passages"
        with one_line(self.path):
            if ids is None:
                for row in self._db.execute(f"{columns} ORDER BY id"):
                    yield self._checked(row, shape, row[0])
                return
            for number in ids:
                yield self._checked(self._db.execute(f"{columns} WHERE id = ?", (number,)).fetchone(), shape, number)

    def _checked(self, row: tuple[Any, ...] | None, shape: tuple[int, int, int], number: int) -> Row:
        kinds = (int, str, int, str, bytes, bytes, int, int)
        whole = row is not None and row[0] == number and all(isinstance(v, k) for v, k in zip(row, kinds))
        sizes = [4 * shape[0], 2 * shape[1] * shape[2]]
        if row is None or not whole or crc(*row[:6]) != row[7] or [len(v) for v in row[4:6]] != sizes:
            what = "missing" if row is None else "damaged (its CRC-32 or its size does not fit)"
            raise KnowledgeError(f"{self.path}: passage {number} is {what}; {AGAIN}")
        _, source, line, text, key_bytes, value, point, _ = row
        key, halves = np.frombuffer(key_bytes, "<f4"), np.frombuffer(value, "<f2")
        if not (np.isfinite(key).all() and np.isfinite(halves).all()):
            raise KnowledgeError(f"{self.path}: passage {number} holds numbers that are not finite; {AGAIN}")
        if point != point_of(key):
            raise KnowledgeError(f"{self.path}: passage {number} is damaged (its point is not its key's); {AGAIN}")
        return Row(number, Passage(text, source, line), key, halves.reshape(shape[1:]), point)


def point_of(key: np.ndarray) -> int:
    """63 bits that stand for all keys equal to `key` (key_dims,), or nearly so: of the same cell of a grid.

    An index entry is kept for each of them, not for each passage. Entries with equal keys would fill each other's links
    in the graph, and searches would no longer reach the others. Keys of one text differ by rounding, some 1e-7, between
    runtimes and machines; a cell is a thousand times as wide, so they seldom fall into two, and never into many.
    """
    with np.errstate(invalid="ignore"):  # numbers that no key of length 1 has
        cell = np.rint(key.astype(np.float64) * GRID).astype("<i4")
    return int.from_bytes(hashlib.sha256(cell.tobytes()).digest()[:8], "little") >> 1


def crc(number: int, source: str, line: int, text: str, key: bytes, value: bytes) -> int:
    """CRC-32 of a row: id, line and the three lengths little-endian, then source, text, key and value."""
    name, words = source.encode(), text.encode()
    head = struct.pack("<qqIII", number, line, len(name), len(words), len(key))
    return zlib.crc32(b"".join((head, name, words, key, value)))
