"""The server-backed knowledge base, on the real engine: a local table, S3's protocol, and servers that do not answer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hashed_embedder import HashedEmbedder, random_entries
from helpers import assert_one_line
from later import later, needs

from rmse_edge.knowledge import KnowledgeError, KnowledgeInfo, Passage, is_server, open_retriever, server
from rmse_edge.knowledge.server import ServerKnowledge, translated, within

lancedb = later("lancedb")
pa = later("pyarrow")

pytestmark = [pytest.mark.slow, needs("lancedb", "lancedb")]

INFO = KnowledgeInfo(24, 2, 8, "model-1")
KEYS = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "aws_region": "us-east-1", "allow_http": "true"}


@pytest.fixture
def embedder() -> HashedEmbedder:
    return HashedEmbedder()


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """A server of S3's protocol with a bucket "kbase"; its storage options."""
    moto = pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[server]'")
    boto3 = pytest.importorskip("boto3")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    endpoint = f"http://127.0.0.1:{running.get_host_and_port()[1]}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    )
    client.create_bucket(Bucket="kbase")
    yield KEYS | {"endpoint": endpoint}
    running.stop()


def fails(message: str, call, *args, **kwargs) -> float:
    """Seconds it took to fail."""
    start = time.perf_counter()
    with pytest.raises(KnowledgeError) as caught:
        call(*args, **kwargs)
    assert_one_line(str(caught.value), message)
    assert len(str(caught.value)) < 350
    return time.perf_counter() - start


def whole_life(location: str, options: dict[str, str] | None, embedder: HashedEmbedder) -> None:
    """Make, add, search, replace, delete; and again through `open_retriever`."""
    kb = ServerKnowledge.open(location, options=options, create=embedder.info)
    counts: list[int] = []
    assert kb.search(embedder.key("x"), 3) == []
    assert kb.add(iter(embedder.entries()), counts.append) == 7 and counts == [7]
    assert kb.add(embedder.entries()) == 0 and kb.info.passages == 7
    assert kb.add([*embedder.entries(source="it's.txt"), *embedder.entries(source="it's.txt")]) == 7
    assert kb.sources() == {"facts.txt": 7, "it's.txt": 7}

    hits = kb.search(embedder.key("the capital of Italy"), 5)
    assert [h.source for h in hits[:4]] == [f"{n}:{i}" for i in (2, 1) for n in ("facts.txt", "it's.txt")] or {
        h.source for h in hits[:2]
    } == {"facts.txt:2", "it's.txt:2"}
    assert all(-1 <= h.score <= 1 for h in hits) and hits[0].score >= hits[1].score >= hits[4].score
    for passage, key, value in embedder.entries():
        [hit] = [h for h in kb.search(key, 2) if h.id == passage.id]
        assert hit.text == passage.text and hit.score == pytest.approx(1, abs=1e-6)
        assert hit.value.dtype == np.float32 and np.array_equal(hit.value, value.astype(np.float16).astype(np.float32))

    new = embedder.entries("Paris is the capital of France.\nLisbon is the capital of Portugal.", "it's.txt")
    assert kb.replace("it's.txt", new) == (2, 7)
    reader = open_retriever(location, options=options)
    assert reader.info == KnowledgeInfo(48, 2, 16, "hashed-letters-1", 9)
    assert reader.search(embedder.key("Lisbon, Portugal"), 1)[0].source == "it's.txt:2"
    reader.close()
    ids = [p.id for p, _, _ in new]
    assert kb.known([*ids, 5]) == set(ids)
    assert kb.delete(ids=[*ids, 5]) == 2 and kb.delete("none.txt") == 0 and kb.delete() == 0
    assert kb.delete("facts.txt") == 7 and kb.info.passages == 0 and kb.search(embedder.key("x"), 3) == []
    kb.close()


def test_a_local_table(tmp_path: Path, embedder: HashedEmbedder) -> None:
    whole_life(f"lance:{tmp_path / 'kb'}", None, embedder)


def test_object_storage(s3: dict[str, str], embedder: HashedEmbedder) -> None:
    whole_life("s3://kbase/a/b", s3, embedder)


def test_the_same_ids_as_in_a_folder(tmp_path: Path, embedder: HashedEmbedder) -> None:
    pytest.importorskip("usearch")
    from rmse_edge.knowledge.store import KnowledgeBase

    folder = KnowledgeBase.create(tmp_path / "a.kb", embedder.info)
    table = ServerKnowledge.open(f"lance:{tmp_path / 'b'}", create=embedder.info)
    for kb in (folder, table):
        kb.add(embedder.entries())
    for text in ("capital", "flowers and bees", "how high is Everest?"):
        ours, theirs = (kb.search(embedder.key(text), 7) for kb in (folder, table))
        assert [(h.id, h.text, h.source) for h in ours] == [(h.id, h.text, h.source) for h in theirs]
        assert np.allclose([h.score for h in ours], [h.score for h in theirs], atol=1e-6)
        assert all(np.array_equal(a.value, b.value) for a, b in zip(ours, theirs))


def test_a_large_table_is_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "INDEXED_FROM", 1500)
    kb = ServerKnowledge.open(f"lance:{tmp_path / 'kb'}", create=INFO)
    entries = random_entries(INFO, 3000)
    assert kb.add(entries[:1000]) == 1000 and not kb._table.list_indices()
    assert kb.add(entries) == 2000 and {i.index_type for i in kb._table.list_indices()} == {"IvfFlat", "BTree"}
    kb.add(random_entries(INFO, 10, "late.txt", 5))
    keys = np.stack([k / np.linalg.norm(k) for _, k, _ in entries])
    agreed = 0
    for query in np.random.default_rng(1).standard_normal((20, INFO.key_dims)).astype(np.float32):
        best = {entries[i][0].id for i in np.argsort(-(keys @ query))[:10]}
        agreed += len(best & {h.id for h in kb.search(query, 10)})
    assert agreed >= 190
    assert kb.search(random_entries(INFO, 10, "late.txt", 5)[3][1], 1)[0].source == "late.txt:4"


def test_vectors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    kb = ServerKnowledge.open(f"lance:{tmp_path / 'kb'}", create=INFO)
    bad = (Passage("bad", "a.txt", 4), np.ones(24), np.full((2, 8), np.nan))
    fails("a.txt:4: its value is NaN, infinite, or beyond float16", kb.add, [*random_entries(INFO, 3), bad])
    fails("a.txt:4: its value is NaN", kb.replace, "a.txt", [bad])
    fails("search: key of shape (3,), expected (24,)", kb.search, np.ones(3), 1)
    fails("passages to find: got 0", kb.search, np.ones(24), 0)
    assert kb.sources() == {}


def test_what_is_not_there_or_something_else(tmp_path: Path) -> None:
    location = f"lance:{tmp_path / 'kb'}"
    fails(f"no knowledge base there; make one with rmse-index MODEL TEXT... -o {location}", open_retriever, location)
    database = lancedb.connect(str(tmp_path / "kb"), read_consistency_interval=timedelta(0))
    database.create_table("passages", data=[{"a": 1}])
    fails("its table 'passages' was not made by rmse-index; choose another place", open_retriever, location)
    fails("was not made by rmse-index", ServerKnowledge.open, location, create=INFO)
    columns = [f for f in server.schema(INFO) if f.name != "value"]
    for extra, message in (
        ([], "has no column value of type binary"),
        ([pa.field("value", pa.utf8())], "has no column value of type binary"),
    ):
        other = pa.schema([*columns, *extra], metadata=server.schema(INFO).metadata)
        database.create_table("passages", schema=other, mode="overwrite")
        fails(message, open_retriever, location)
    later = server.schema(INFO).metadata[b"rmse-edge"].replace(b'"format_version": 1', b'"format_version": 2')
    database.create_table("passages", schema=server.schema(INFO).with_metadata({"rmse-edge": later}), mode="overwrite")
    fails("format version 2, this rmse-edge reads 1", open_retriever, location)


def test_a_wrong_bucket(s3: dict[str, str]) -> None:
    fails("s3://no-such-bucket/kb: no such bucket; check the name", open_retriever, "s3://no-such-bucket/kb", 20, s3)
    fails("s3://kbase/none: no knowledge base there", open_retriever, "s3://kbase/none", 20, s3)


def test_no_credentials(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {k: v for k, v in s3.items() if not k.startswith("aws_") or k == "aws_region"}
    fails("no credentials; set them up", open_retriever, "s3://kbase/a", 20, options)
    fails("LanceDB Cloud needs a key; set LANCEDB_API_KEY", open_retriever, "db://name", 20)


def test_nobody_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        options = KEYS | {"endpoint": f"http://127.0.0.1:{closed.getsockname()[1]}"}
        assert (
            fails("s3://kbase/a: the server does not answer; check", open_retriever, "s3://kbase/a", 8, options) < 8.5
        )


@pytest.mark.slow
def test_a_server_that_never_answers() -> None:
    """It takes connections and says nothing: an error in time, and a process that still ends."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        options = KEYS | {"endpoint": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        code = (
            "import sys, time, json; from rmse_edge.knowledge import KnowledgeError, open_retriever; start = None\n"
            "import lancedb; start = time.perf_counter()\n"
            "try: open_retriever('s3://kbase/a', 1.5, json.loads(sys.argv[1]))\n"
            "except KnowledgeError as error: print(error); print(time.perf_counter() - start)\n"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-c", code, json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=90)
    message, seconds = done.stdout.splitlines()
    assert "s3://kbase/a: no answer within 1.5 s; check the address and the network" in message and done.returncode == 0
    assert float(seconds) < 5


class Line:
    """A connection to a server that can go silent: it still takes what is said, and passes nothing on."""

    def __init__(self, port: int) -> None:
        self.target, self.silent = port, threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if not self.silent.is_set():
                    sink.sendall(data)


def test_a_table_that_stops_answering(s3: dict[str, str], embedder: HashedEmbedder) -> None:
    """The server goes silent after it was opened: searching and adding fail in time."""
    line = Line(int(s3["endpoint"].rpartition(":")[2]))
    kb = ServerKnowledge.open(
        "s3://kbase/stops", 20.5, s3 | {"endpoint": f"http://127.0.0.1:{line.port}"}, create=embedder.info
    )
    assert kb.add(embedder.entries()) == 7 and len(kb.search(embedder.key("x"), 9)) == 7
    line.silent.set()
    kb.timeout_s = 0.3
    assert fails("no answer within 1.8 s", kb.add, embedder.entries("One more.", "b.txt")) < 5
    assert fails("no answer within 0.3 s", kb.sources) < 3
    line.listener.close()


def test_defects_stay_defects() -> None:
    with pytest.raises(TypeError):
        within(1, "s3://a", lambda: len(3))  # type: ignore[arg-type]
    error = translated("s3://a/b", OSError("line one\n  line two " + "x" * 500))
    assert_one_line(str(error), "s3://a/b: LanceDB says: line one line two xxx")
    assert len(str(error)) < 250


def test_without_lancedb_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    fails("lancedb is not installed; install it with: pip install 'rmse-edge[lancedb]'", open_retriever, "s3://a/b")


def test_which_locations_are_servers() -> None:
    assert all(map(is_server, ("s3://a", "gs://a/b", "az://a", "db://a", "lance:a")))
    assert not any(map(is_server, ("a.kb", "s3", "./s3/a.kb", "/a:b", Path("lance"), "C:\\a.kb")))
