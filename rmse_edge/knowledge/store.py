"""The embedded knowledge base: a folder `NAME.kb/` with the passages in SQLite and their keys in a usearch index.

    passages.sqlite            texts, sources, keys, values; and the manifest: the generation and hash of the index file
    index-GENERATION.usearch   the keys, searchable; made from those in SQLite, one for all passages of equal keys
    writer.lock                empty; whoever writes holds SQLite's lock on it

A change writes the next generation's index file first and then commits rows and manifest in one transaction, so a
process killed at any moment leaves the old knowledge base or the new one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rmse_edge.files import kind_of, new_folder

from .base import BATCH, Entry, Hit, KnowledgeError, KnowledgeInfo, checked_count, checked_entry, checked_key, cosine
from .rows import AGAIN, Rows, one_line, writer_lock
from .vectors import nearest, new_index, put_in, read_index, remove_others, write_index

PASSAGES = "passages.sqlite"
LARGEST_BATCH = 16_384  # passages of one transaction, at most: they wait in memory


class KnowledgeBase:
    """An open knowledge base. Make one with `KnowledgeBase.create` or `KnowledgeBase.open`.

    Any number of processes may search while one writes; a search sees what the last commit left.
    """

    def __init__(self, folder: Path, rows: Rows) -> None:
        self.folder = folder
        self._rows = rows
        self._manifest: dict[str, Any] = {}
        self._index: Any = None  # mapped, of `_manifest`
        self._editable: Any = None  # the same, loaded to be changed, while the writer's lock is held
        self._mutex = threading.RLock()

    @classmethod
    def create(cls, folder: str | Path, info: KnowledgeInfo) -> KnowledgeBase:
        """Make an empty knowledge base and open it.

        Raises:
            KnowledgeError: the folder exists already, or cannot be made.
        """
        folder = Path(folder)
        if folder.is_dir() and any(folder.iterdir()):
            raise KnowledgeError(f"{folder}: already exists; remove it, or choose another folder")
        shape = {"key_dims": info.key_dims, "slots": info.slots, "d_model": info.d_model, "model": info.model}
        with new_folder(folder, KnowledgeError, replace=False) as scratch:
            entry = write_index(new_index(info.key_dims), scratch, 0)
            rows = Rows(scratch / PASSAGES, create=True)
            with rows.transaction(write=True):
                rows.put_manifest({**shape, "passages": 0, "keys": 0, "generation": 0, "index": entry})
            rows.close()
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path, check: bool = True) -> KnowledgeBase:
        """Open a knowledge base and verify its manifest and index file; passages are verified when they are read.

        Args:
            check: without it the index may be missing or damaged, for `rebuild`.
        Raises:
            KnowledgeError: no knowledge base, of another version, or damaged; names the file and the fix.
        """
        folder = Path(folder)
        if not folder.is_dir():
            if folder.exists():
                raise KnowledgeError(
                    f"{folder}: is {kind_of(folder)}, expected a knowledge base folder; choose another name"
                )
            raise KnowledgeError(
                f"{folder}: no such knowledge base; make one with rmse-index MODEL TEXT... -o {folder}"
            )
        if not (folder / PASSAGES).is_file():
            raise KnowledgeError(f"{folder / PASSAGES}: missing; {folder} is no knowledge base, or in part: {AGAIN}")
        base = cls(folder, Rows(folder / PASSAGES))
        try:
            with base._rows.transaction():
                base._manifest = base._rows.manifest()
                if check:
                    base._index = read_index(folder, base._manifest, view=True)
        except BaseException:
            base.close()
            raise
        return base

    def close(self) -> None:
        self._index = self._editable = None
        self._rows.close()

    def __enter__(self) -> KnowledgeBase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def info(self) -> KnowledgeInfo:
        """As of the last search or change here."""
        m = self._manifest
        return KnowledgeInfo(m["key_dims"], m["slots"], m["d_model"], m["model"], m["passages"])

    def nbytes(self) -> int:
        return sum(p.stat().st_size for p in self.folder.iterdir() if p.is_file())

    # ------------------------------------------------------------------------------------------------------ reading

    def search(self, key: np.ndarray, n: int) -> list[Hit]:
        """The `n` passages nearest to `key` (key_dims,), best first; see `Retriever`.

        Of passages with equal keys those with the lowest ids are found.
        """
        with self._mutex, self._rows.transaction():
            self._refresh()
            key = checked_key(self.info, key, "search")
            points = nearest(self._index, key, checked_count(n))
            found = list(self._rows.read(self._shape, self._rows.at_points(points, n)))
        hits = [
            Hit(r.id, r.passage.text, r.passage.place, cosine(r.key, key), r.value.astype(np.float32)) for r in found
        ]
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))

    def known(self, ids: Sequence[int]) -> set[int]:
        with self._mutex:
            return self._rows.known(ids)

    def sources(self) -> dict[str, int]:
        with self._mutex:
            return self._rows.sources()

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self._manifest["key_dims"], self._manifest["slots"], self._manifest["d_model"]

    def _refresh(self) -> None:
        """See what other writers committed. Called in a transaction: nobody removes the index file meanwhile."""
        manifest = self._rows.manifest()
        if self._index is None or manifest["sha256"] != self._manifest["sha256"]:
            self._index = read_index(self.folder, manifest, view=True)
            self._manifest = manifest

    # ------------------------------------------------------------------------------------------------------ writing

    def add(self, entries: Iterable[Entry], progress: Callable[[int], object] = lambda _: None) -> int:
        """Put in the passages that are not there yet, batch by batch; see `Store`.

        Raises:
            KnowledgeError: a key or value does not fit; the batches before it stay. Or another writer is at work.
        """
        waiting, added = iter(entries), 0
        with self._writing():
            # Each commit writes the whole index, so the larger it is, the rarer.
            while batch := list(islice(waiting, min(max(BATCH, self.info.passages // 16), LARGEST_BATCH))):
                added += self._commit(batch)[0]
                progress(len(batch))
        return added

    def replace(self, source: str, entries: Iterable[Entry]) -> tuple[int, int]:
        """Put `entries` in the place of all passages of `source`, in one transaction; see `Store`."""
        with self._writing():
            return self._commit(list(entries), self._rows.ids_of(source))

    def delete(self, source: str | None = None, ids: Sequence[int] = ()) -> int:
        """Take out all passages of `source` and those with `ids`, in one transaction; returns how many."""
        with self._writing():
            of_source = [] if source is None else self._rows.ids_of(source)
            return self._commit([], sorted({*of_source, *ids}))[1]

    def rebuild(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """Make the index anew from the keys in SQLite, checking every passage, and give back unused space.

        Raises:
            KnowledgeError: a passage is damaged; then only the texts help.
        """
        with self._writing():
            with self._rows.transaction(write=True):
                index, rows, passages = new_index(self.info.key_dims), self._rows.read(self._shape), 0
                while batch := list(islice(rows, BATCH)):
                    put_in(index, {r.point: r.key for r in reversed(batch)})
                    passages += len(batch)
                    progress(len(batch))
                self._next_generation(self._manifest | {"passages": passages}, index)
            self._rows.shrink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the writer's lock, on a knowledge base whose SQLite file is whole, and tidy up afterwards."""
        with self._mutex, writer_lock(self.folder):
            self._rows.check()
            self._manifest = self._rows.manifest()
            try:
                yield
            finally:
                self._editable = None
                self._manifest, self._index = self._rows.manifest(), None
                remove_others(self.folder, self._manifest["generation"])

    def _commit(self, entries: Sequence[Entry], gone: Sequence[int] = ()) -> tuple[int, int]:
        """One transaction: take out the ids `gone`, then put in `entries`; returns (put in, taken out)."""
        checked = [checked_entry(self.info, entry) for entry in entries]
        with self._rows.transaction(write=True):
            manifest = self._rows.manifest()
            index, self._editable = self._editable, None  # half changed by a failure, it is not used again
            if index is None:
                index = read_index(self.folder, manifest, view=False)
            removed, empty = self._rows.delete(gone)
            if empty:
                index.remove(np.array(empty, np.uint64))
            added, points = self._rows.insert(checked)
            put_in(index, points)
            if added or removed:
                self._next_generation(manifest | {"passages": manifest["passages"] + added - removed}, index)
        self._manifest, self._editable = self._rows.manifest(), index
        remove_others(self.folder, self._manifest["generation"])
        return added, removed

    def _next_generation(self, manifest: dict[str, Any], index: Any) -> None:
        """Write `index` and record it, within a transaction."""
        generation = manifest["generation"] + 1
        entry = write_index(index, self.folder, generation)
        with one_line(self._rows.path):
            self._rows.put_manifest(manifest | {"keys": len(index), "generation": generation, "index": entry})
