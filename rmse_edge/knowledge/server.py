"""The server-backed knowledge base, for what is larger than a device: a LanceDB table on object storage.

    s3://BUCKET/PATH, gs://..., az://...   object storage, with the credentials of its own tools
    db://NAME                              LanceDB Cloud
    lance:FOLDER                           the same table on a disk

Passages have the same ids, keys and values as in a folder. Every change is one commit of LanceDB, so readers see the old
table or the new one. No call waits longer than its time limit, whatever the network does.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from .base import (
    BATCH,
    TIMEOUT_S,
    Entry,
    Hit,
    KnowledgeError,
    KnowledgeInfo,
    Passage,
    checked_count,
    checked_entry,
    checked_key,
)

TABLE = "passages"
FORMAT_VERSION = 1
INDEXED_FROM = 16_384  # rows; below, a search reads every key
PROBES = 32  # partitions of the index that a search reads
WRITE_FACTOR = 6  # a batch that is written may take so many times the limit of a search
FRESH_S = 5  # how old a reader's view of the table may be
COLUMNS = ("id", "source", "line", "text", "value", "_distance")

T = TypeVar("T")

# What LanceDB's errors contain -> what it means. Checked in this order.
MEANINGS = (
    ("nosuchbucket", "no such bucket; check the name, or create it"),
    ("bucket does not exist", "no such bucket; check the name, or create it"),
    (
        "failed to get aws credentials",
        "no credentials; set them up as for the storage's own tools (aws configure, ...)",
    ),
    ("failed to resolve region", "no such bucket, or no way to it; check the name and the network, or give aws_region"),
    ("credential", "the credentials are missing or not accepted; set them up as for the storage's own tools"),
    ("api_key", "LanceDB Cloud needs a key; set LANCEDB_API_KEY"),
    ("accessdenied", "access denied; check the credentials and their rights"),
    ("forbidden", "access denied; check the credentials and their rights"),
    ("signaturedoesnotmatch", "access denied; check the credentials and their rights"),
    ("unauthorized", "access denied; check the credentials and their rights"),
    ("error sending request", "the server does not answer; check the address and the network"),
    ("connect", "the server does not answer; check the address and the network"),
    ("timed out", "the server does not answer in time; check the address and the network"),
)


class ServerKnowledge:
    """An open table. Make one with `ServerKnowledge.open`."""

    def __init__(self, location: str, timeout_s: float, table: Any) -> None:
        self.location = location
        self.timeout_s = timeout_s
        self._table = table
        self._info = self._read_info()

    @classmethod
    def open(
        cls, location: str, timeout_s: float = TIMEOUT_S, options: Mapping[str, str] | None = None,
        create: KnowledgeInfo | None = None,
    ) -> ServerKnowledge:  # fmt: skip
        """Connect to a table.

        Args:
            timeout_s: the most that a call may take, in seconds; six times that for one that writes.
            options: LanceDB's storage options ("aws_region", "endpoint", "allow_http", ...).
            create: make an empty table of this shape if there is none.
        Raises:
            KnowledgeError: no such table or bucket, no credentials, no answer in time, or another kind of table.
        """
        try:
            import lancedb
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("lancedb", "pyarrow"):
                raise
            raise KnowledgeError(
                "lancedb is not installed; install it with: pip install 'rmse-edge[lancedb]'"
            ) from None
        # The storage's own limits, tighter than LanceDB's; ours is kept by `within`, as its retries add up.
        tight = {
            "timeout": f"{1000 * timeout_s:.0f}ms", "connect_timeout": f"{500 * timeout_s:.0f}ms", "client_max_retries": "1",
            "client_retry_timeout": str(max(1, round(timeout_s))),
        }  # fmt: skip
        local = location.startswith("lance:")
        uri = location.removeprefix("lance:")

        def connect() -> Any:
            storage = None if local else {**tight, **(options or {})}
            fresh = timedelta(seconds=0 if local else FRESH_S)
            database = lancedb.connect(uri, storage_options=storage, read_consistency_interval=fresh)
            try:
                return database.open_table(TABLE)
            except (ValueError, FileNotFoundError) as error:
                if "was not found" not in str(error):
                    raise
            return None if create is None else database.create_table(TABLE, schema=schema(create), exist_ok=True)

        table = within(timeout_s, location, connect)
        if table is None:
            raise KnowledgeError(
                f"{location}: no knowledge base there; make one with rmse-index MODEL TEXT... -o {location}"
            )
        return cls(location, timeout_s, table)

    def _read_info(self) -> KnowledgeInfo:
        found, rows = self._call(lambda: (self._table.schema, self._table.count_rows()))
        try:
            values = json.loads((found.metadata or {})[b"rmse-edge"])
            version = values.pop("format_version")
            info = KnowledgeInfo(**values, passages=rows)
        except (KeyError, TypeError, ValueError, KnowledgeError):
            raise KnowledgeError(
                f"{self.location}: its table {TABLE!r} was not made by rmse-index; choose another place"
            ) from None
        if version != FORMAT_VERSION:
            raise KnowledgeError(
                f"{self.location}: format version {version!r}, this rmse-edge reads {FORMAT_VERSION}; "
                "build it again from the texts with rmse-index"
            )
        for column in schema(info):
            if column.name not in found.names or found.field(column.name).type != column.type:
                raise KnowledgeError(
                    f"{self.location}: its table {TABLE!r} has no column {column.name} of type {column.type}; "
                    "build it again elsewhere with rmse-index"
                )
        return info

    @property
    def info(self) -> KnowledgeInfo:
        """As of opening, or of the last change here."""
        return self._info

    def close(self) -> None:
        self._table = None

    def nbytes(self) -> int | None:
        return None

    # ------------------------------------------------------------------------------------------------------ reading

    def search(self, key: np.ndarray, n: int) -> list[Hit]:
        """The `n` passages nearest to `key` (key_dims,), best first; see `Retriever`."""
        key = checked_key(self.info, key, "search")
        limit = checked_count(n)

        def look() -> list[dict[str, Any]]:
            query = self._table.search(key, vector_column_name="key").distance_type("cosine").nprobes(PROBES)
            return query.limit(limit).select(list(COLUMNS)).to_arrow().to_pylist()

        shape = (self.info.slots, self.info.d_model)
        hits = []
        for row in self._call(look):
            value = np.frombuffer(row["value"], "<f2")
            if value.size != shape[0] * shape[1]:
                raise KnowledgeError(f"{self.location}: passage {row['id']} is damaged; build it again with rmse-index")
            place = Passage(row["text"], row["source"], row["line"]).place
            score = min(1.0, max(-1.0, 1.0 - row["_distance"]))
            hits.append(Hit(row["id"], row["text"], place, score, value.reshape(shape).astype(np.float32)))
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))

    def known(self, ids: Sequence[int]) -> set[int]:
        found: set[int] = set()
        for some in (ids[i : i + BATCH] for i in range(0, len(ids), BATCH)):
            found.update(self._ids(f"id IN ({', '.join(map(str, some))})"))
        return found

    def sources(self) -> dict[str, int]:
        names = self._call(lambda: self._table.search().select(["source"]).to_arrow()["source"].value_counts())
        return dict(sorted((entry["values"].as_py(), entry["counts"].as_py()) for entry in names))

    def _ids(self, where: str) -> list[int]:
        return self._call(lambda: self._table.search().where(where).select(["id"]).to_arrow()["id"].to_pylist())

    # ------------------------------------------------------------------------------------------------------ writing

    def add(self, entries: Iterable[Entry], progress: Callable[[int], object] = lambda _: None) -> int:
        """Put in the passages that are not there yet, one commit per batch; see `Store`."""
        waiting, added = iter(entries), 0
        while batch := list(islice(waiting, BATCH)):
            rows = self._rows(batch)
            merge = self._table.merge_insert("id").when_not_matched_insert_all()
            added += self._write(partial(merge.execute, rows)).num_inserted_rows
            progress(len(batch))
        self._optimize()
        return added

    def replace(self, source: str, entries: Iterable[Entry]) -> tuple[int, int]:
        """Put `entries` in the place of all passages of `source`, in one commit; see `Store`."""
        rows = self._rows(list(entries))
        before = self._write(lambda: self._table.count_rows(f"source = {quoted(source)}"))
        merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        merge = merge.when_not_matched_by_source_delete(f"source = {quoted(source)}")
        self._write(partial(merge.execute, rows))
        self._optimize()
        return rows.num_rows, before

    def delete(self, source: str | None = None, ids: Sequence[int] = ()) -> int:
        """Take out all passages of `source` and those with `ids`, in one commit; returns how many."""
        parts = [] if source is None else [f"source = {quoted(source)}"]
        if ids:
            parts.append(f"id IN ({', '.join(str(int(i)) for i in ids)})")
        if not parts:
            return 0
        removed = self._write(lambda: self._table.delete(" OR ".join(parts))).num_deleted_rows
        self._info = self._read_info()
        return removed

    def _rows(self, entries: Sequence[Entry]) -> Any:
        """Checked entries as an Arrow table, each passage once."""
        import pyarrow as pa

        checked = {entry[0].id: checked_entry(self.info, entry) for entry in reversed(entries)}
        passages = [passage for passage, _, _ in checked.values()]
        columns = {
            "id": list(checked),
            "source": [p.source for p in passages],
            "line": [p.line for p in passages],
            "text": [p.text for p in passages],
            "key": [key for _, key, _ in checked.values()],
            "value": [value.astype("<f2").tobytes() for _, _, value in checked.values()],
        }
        return pa.table(columns, schema=schema(self.info))

    def _optimize(self) -> None:
        """Put new rows into the index, or make it once the table is large."""
        from lancedb.index import BTree, IvfFlat

        self._info = self._read_info()
        if self.info.passages < INDEXED_FROM:
            return
        if not self._call(self._table.list_indices):
            self._write(lambda: self._table.create_index("key", config=IvfFlat(distance_type="cosine")))
            self._write(lambda: self._table.create_index("id", config=BTree()))
        self._write(self._table.optimize)

    def _call(self, call: Callable[[], T]) -> T:
        return within(self.timeout_s, self.location, call)

    def _write(self, call: Callable[[], T]) -> T:
        return within(self.timeout_s * WRITE_FACTOR, self.location, call)


def schema(info: KnowledgeInfo) -> Any:
    """The table's columns; its metadata says the shapes, the model and the version."""
    import pyarrow as pa

    head = {name: getattr(info, name) for name in ("key_dims", "slots", "d_model", "model")}
    columns = [
        pa.field("id", pa.int64()),
        pa.field("source", pa.utf8()),
        pa.field("line", pa.int32()),
        pa.field("text", pa.utf8()),
        pa.field("key", pa.list_(pa.float32(), info.key_dims)),
        pa.field("value", pa.binary()),
    ]
    return pa.schema(columns, metadata={"rmse-edge": json.dumps({"format_version": FORMAT_VERSION, **head})})


def quoted(text: str) -> str:
    """As an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def within(seconds: float, location: str, call: Callable[[], T]) -> T:
    """`call()`, waited for at most so long; LanceDB's errors as one line.

    The call runs in a thread of its own. One that never returns is left behind: it cannot be stopped, and does not keep
    the process from ending.

    Raises:
        KnowledgeError: no answer in time, or an error of LanceDB.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="knowledge-server")
    thread.start()
    thread.join(seconds)
    if outcome:
        return outcome[0]
    if failure:
        raise translated(location, failure[0]) from None
    raise KnowledgeError(
        f"{location}: no answer within {seconds:g} s; check the address and the network, or wait longer"
    )


def translated(location: str, error: BaseException) -> BaseException:
    """What to raise for an error of LanceDB: a `KnowledgeError`, or the error itself when it is a defect of ours."""
    if isinstance(error, (KnowledgeError, TypeError, AttributeError, NameError, AssertionError)):
        return error
    text = re.sub(r",? /\S+\.rs(:\d+)*", "", " ".join(str(error).split()))  # without the places in LanceDB's own source
    for sign, meaning in MEANINGS:
        if sign in text.lower():
            return KnowledgeError(f"{location}: {meaning}")
    return KnowledgeError(f"{location}: LanceDB says: {text[:200] or type(error).__name__}")
