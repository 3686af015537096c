"""The folder: what is put in is found, kept, taken out; one writer, many readers."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hashed_embedder import HashedEmbedder, files_of, random_entries
from helpers import assert_one_line

from rmse_edge.knowledge import KnowledgeError, KnowledgeInfo, Passage, check_fits, open_retriever

pytest.importorskip("usearch", reason="needs usearch: pip install 'rmse-edge[knowledge]'")

from rmse_edge.knowledge import vectors
from rmse_edge.knowledge.store import KnowledgeBase

pytestmark = pytest.mark.slow

INFO = KnowledgeInfo(24, 2, 8, "model-1")


@pytest.fixture
def embedder() -> HashedEmbedder:
    return HashedEmbedder()


@pytest.fixture
def facts(embedder: HashedEmbedder, tmp_path: Path) -> KnowledgeBase:
    base = KnowledgeBase.create(tmp_path / "facts.kb", embedder.info)
    base.add(embedder.entries())
    return base


def fails(message: str, call, *args, **kwargs) -> None:
    with pytest.raises(KnowledgeError) as caught:
        call(*args, **kwargs)
    assert_one_line(str(caught.value), message)


def test_the_nearest_passage_comes_first(facts: KnowledgeBase, embedder: HashedEmbedder) -> None:
    hits = facts.search(embedder.key("the capital of Italy"), 3)
    assert [h.source for h in hits[:2]] == ["facts.txt:2", "facts.txt:1"] and hits[0].text.startswith("Rome is")
    assert 1 >= hits[0].score > hits[1].score > hits[2].score >= -1
    assert facts.search(embedder.key("bees and flowers"), 1)[0].text.startswith("Honey bees")
    for passage, key, value in embedder.entries():
        [hit] = facts.search(key, 1)
        assert hit.id == passage.id and hit.text == passage.text and hit.score == pytest.approx(1, abs=1e-6)
        assert hit.value.dtype == np.float32 and np.array_equal(hit.value, value.astype(np.float16).astype(np.float32))
    assert len(facts.search(embedder.key("x"), 99)) == 7


def test_a_closed_base_opens_again_as_it_was(facts: KnowledgeBase, embedder: HashedEmbedder) -> None:
    before = facts.search(embedder.key("blood"), 7)
    facts.close()
    with KnowledgeBase.open(facts.folder) as again:
        assert again.info == KnowledgeInfo(48, 2, 16, "hashed-letters-1", 7)
        after = again.search(embedder.key("blood"), 7)
        assert [(h.id, h.text, h.source, h.score) for h in after] == [(h.id, h.text, h.source, h.score) for h in before]
        assert again.sources() == {"facts.txt": 7} and again.nbytes() > 0
    retriever = open_retriever(str(facts.folder))
    assert retriever.search(embedder.key("blood"), 1)[0].text.startswith("The heart")
    retriever.close()


def test_passages_are_put_in_once(facts: KnowledgeBase, embedder: HashedEmbedder) -> None:
    before = files_of(facts.folder)
    assert facts.add(embedder.entries()) == 0 and facts.info.passages == 7
    assert files_of(facts.folder) == before, "nothing new, nothing written"
    moved = [(Passage(p.text, p.source, p.line + 10), k, v) for p, k, v in embedder.entries()]
    assert facts.add(moved) == 0, "the same text at another line"
    assert facts.add(embedder.entries(source="copy.txt")) == 7, "the same text in another file"
    assert facts.sources() == {"copy.txt": 7, "facts.txt": 7}
    ids = [p.id for p, _, _ in embedder.entries()]
    assert facts.known([*ids, 5]) == set(ids)


def test_taking_out(facts: KnowledgeBase, embedder: HashedEmbedder) -> None:
    facts.add(embedder.entries(source="copy.txt"))
    assert facts.delete(source="none.txt") == 0 and facts.info.passages == 14
    assert facts.delete(source="facts.txt") == 7 and facts.sources() == {"copy.txt": 7}
    assert {h.source.split(":")[0] for h in facts.search(embedder.key("capital"), 20)} == {"copy.txt"}
    [first, second] = [h.id for h in facts.search(embedder.key("capital of"), 2)]
    assert facts.delete(ids=[first, first, 12345]) == 1
    assert facts.search(embedder.key("capital of"), 1)[0].id == second
    assert facts.add(embedder.entries(source="copy.txt")) == 1 and facts.info.passages == 7
    assert facts.search(embedder.key("capital of"), 1)[0].id == first, "an id comes back with its passage"
    assert facts.delete("copy.txt") == 7 and facts.search(embedder.key("capital"), 3) == []


def test_replacing_a_source_is_one_step(facts: KnowledgeBase, embedder: HashedEmbedder) -> None:
    facts.add(embedder.entries(source="copy.txt"))
    new = embedder.entries("Paris is the capital of France.\nLisbon is the capital of Portugal.")
    assert facts.replace("facts.txt", new) == (2, 7)
    assert facts.sources() == {"copy.txt": 7, "facts.txt": 2}
    assert facts.search(embedder.key("Portugal"), 1)[0].source == "facts.txt:2"
    assert facts.replace("new.txt", embedder.entries("All new.", "new.txt")) == (1, 0)
    bad = [*new, (Passage("bad", "facts.txt"), np.ones(3), np.ones((2, 16)))]
    fails("facts.txt: key of shape (3,), expected (48,)", facts.replace, "facts.txt", bad)
    assert facts.sources()["facts.txt"] == 2


@pytest.mark.parametrize("exact", [0, 10_000])
def test_searches_agree_with_comparing_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: int) -> None:
    """Through puts and takes, in the graph and by comparing every key."""
    monkeypatch.setattr(vectors, "EXACT", exact)
    base, alive = KnowledgeBase.create(tmp_path / "a.kb", INFO), {}
    random = np.random.default_rng(1)
    for step in range(5):
        entries = random_entries(INFO, 400, f"{step}.txt", step)
        base.add(entries)
        alive |= {p.id: k / np.linalg.norm(k) for p, k, _ in entries}
        gone = random.choice(list(alive), 250, replace=False).tolist()
        assert base.delete(ids=gone) == 250
        for number in gone:
            del alive[number]
    ids, keys = np.array(list(alive)), np.stack(list(alive.values()))
    assert base.info.passages == len(alive) == 750
    agreed = 0
    for query in random.standard_normal((50, INFO.key_dims)):
        hits = base.search(query, 10)
        cosines = keys @ (query / np.linalg.norm(query))
        agreed += len({h.id for h in hits} & set(ids[np.argsort(-cosines)[:10]].tolist()))
        for hit in hits:
            assert hit.score == pytest.approx(float(cosines[ids == hit.id][0]), abs=1e-6)
        assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert agreed == 500 if exact else agreed >= 490


@pytest.mark.parametrize("noise", [0, 1e-7])
def test_repeated_sentences_hide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    """Half of the passages have one key, as other machines compute it as well; the graph still leads to all others."""
    monkeypatch.setattr(vectors, "EXACT", 0)
    base, random = KnowledgeBase.create(tmp_path / "a.kb", INFO), np.random.default_rng(3)
    entries = random_entries(INFO, 3000)
    sentence = entries[0][1] / np.linalg.norm(entries[0][1])
    for i in range(0, 3000, 2):
        key = sentence + noise * random.standard_normal(INFO.key_dims)
        entries[i] = (entries[i][0], key, entries[i][2])
    base.add(entries)
    keys = np.stack([key / np.linalg.norm(key) for _, key, _ in entries])
    assert base.info.passages == 3000
    lost = [p.place for p, key, _ in entries[1::2] if base.search(key, 1)[0].id != p.id]
    assert not lost, f"{len(lost)} of 1500 are not found by their own key"
    for query in random.standard_normal((20, INFO.key_dims)):
        hits, best = base.search(query, 10), np.sort(keys @ (query / np.linalg.norm(query)))[::-1][:10]
        assert [h.score for h in hits] == pytest.approx(best.tolist(), abs=1e-4)


def test_passages_of_one_key_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    base, entries = KnowledgeBase.create(tmp_path / "a.kb", INFO), random_entries(INFO, 40)
    key = entries[0][1]
    same = [(p, key, v) for p, _, v in entries[:30]]
    base.add([*reversed(same), *entries[30:]])
    ids = sorted(p.id for p, _, _ in same)
    for count in (1, 7, 30):
        hits = base.search(key, count)
        assert [h.id for h in hits] == ids[:count]
    assert base.delete(ids=ids[:5]) == 5
    assert [h.id for h in base.search(key, 3)] == ids[5:8] and len(base.search(key, 99)) == 35
    assert base.delete(ids=ids[5:]) == 25
    assert {h.source.partition(":")[0] for h in base.search(key, 99)} == {"random.txt"} and base.info.passages == 10
    assert base.add(same) == 30 and [h.id for h in base.search(key, 2)] == ids[:2], "a key comes back with its passages"
    base.rebuild()
    assert [h.id for h in base.search(key, 30)] == ids


def test_usearch_and_onnxruntime_in_one_process(facts: KnowledgeBase) -> None:
    """Whichever is wanted first: imported after usearch, onnxruntime would end the process."""
    pytest.importorskip("onnxruntime")
    code = (
        "import sys; from rmse_edge.knowledge import open_retriever; open_retriever(sys.argv[1])\n"
        "import onnxruntime; print(onnxruntime.get_available_providers())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, str(facts.folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "CPUExecutionProvider" in done.stdout, (done.returncode, done.stderr)


def test_a_large_add_goes_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmse_edge.knowledge.store.BATCH", 100)
    base, batches = KnowledgeBase.create(tmp_path / "a.kb", INFO), []
    entries = random_entries(INFO, 250)
    assert base.add(iter(entries), batches.append) == 250 and batches == [100, 100, 50]
    key = np.full(INFO.key_dims, np.nan)
    with pytest.raises(KnowledgeError, match=r"b.txt:9: the key is NaN or infinite; check the model"):
        base.add([*random_entries(INFO, 150, "b.txt"), (Passage("x", "b.txt", 9), key, entries[0][2])])
    assert base.sources() == {"b.txt": 100, "random.txt": 250}, "the batch before stays, that of the bad key does not"

    def interrupted():
        yield from random_entries(INFO, 120, "c.txt")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.add(interrupted())
    assert base.info.passages == 450 and base.sources()["c.txt"] == 100
    assert base.add(random_entries(INFO, 120, "c.txt")) == 20


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (np.ones(23), np.ones((2, 8)), "a.txt:4: key of shape (23,), expected (24,)"),
        (np.zeros(24), np.ones((2, 8)), "a.txt:4: the key is all zero; check the model"),
        (np.full(24, np.inf), np.ones((2, 8)), "a.txt:4: the key is NaN or infinite; check the model"),
        (np.ones(24), np.ones((8, 2)), "a.txt:4: value of shape (8, 2), expected (2, 8)"),
        (np.ones(24), np.full((2, 8), np.nan), "a.txt:4: its value is NaN, infinite, or beyond float16"),
        (np.ones(24), np.full((2, 8), 7e4), "a.txt:4: its value is NaN, infinite, or beyond float16"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(tmp_path: Path, key: np.ndarray, value: np.ndarray, message: str) -> None:
    base = KnowledgeBase.create(tmp_path / "a.kb", INFO)
    before = files_of(base.folder)
    good = random_entries(INFO, 3)
    fails(message, base.add, [*good, (Passage("bad", "a.txt", 4), key, value)])
    assert {k: v for k, v in files_of(base.folder).items() if k != "writer.lock"} == before


def test_searches_that_do_not_fit_are_refused(facts: KnowledgeBase) -> None:
    fails("search: key of shape (3,), expected (48,)", facts.search, np.ones(3), 1)
    fails("search: the key is NaN or infinite", facts.search, np.full(48, np.nan), 1)
    fails("passages to find: got 0, expected at least 1", facts.search, np.ones(48), 0)


def test_another_models_base_is_refused() -> None:
    check_fits(INFO, 24, 2, 8, "model-1", "a.kb")
    again = "build it again with rmse-index MODEL TEXT..."
    fails(f"a.kb: was built by another model (key_dims 24, this model's is 32); {again}", check_fits, INFO, 32, 2, 8,
          "model-1", "a.kb")  # fmt: skip
    fails("(slots 2, this model's is 4)", check_fits, INFO, 24, 4, 8, "model-1", "a.kb")
    fails("(d_model 8, this model's is 9)", check_fits, INFO, 24, 2, 9, "model-1", "a.kb")
    fails("(fingerprint model-1, this model's is model-2)", check_fits, INFO, 24, 2, 8, "model-2", "a.kb")
    fails("slots: got 0, expected a whole number of at least 1", KnowledgeInfo, 24, 0, 8, "m")


def test_what_is_in_the_way_is_kept(tmp_path: Path) -> None:
    fails("no such knowledge base; make one with rmse-index MODEL TEXT... -o", KnowledgeBase.open, tmp_path / "a.kb")
    KnowledgeBase.create(tmp_path / "a.kb", INFO)
    fails("already exists; remove it, or choose another folder", KnowledgeBase.create, tmp_path / "a.kb", INFO)
    (tmp_path / "file").write_text("mine")
    fails("is a file, expected a folder", KnowledgeBase.create, tmp_path / "file", INFO)
    fails("is a file, expected a knowledge base folder; choose another name", KnowledgeBase.open, tmp_path / "file")
    fails("b.kb: cannot be written (there is no folder", KnowledgeBase.create, tmp_path / "none" / "b.kb", INFO)
    (tmp_path / "empty").mkdir()
    fails("passages.sqlite: missing", KnowledgeBase.open, tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.kb", "empty", "file"]


def test_a_copy_is_a_knowledge_base(facts: KnowledgeBase, embedder: HashedEmbedder, tmp_path: Path) -> None:
    shutil.copytree(facts.folder, tmp_path / "copy")
    facts.delete("facts.txt")
    with KnowledgeBase.open(tmp_path / "copy") as copy:
        assert len(copy.search(embedder.key("x"), 9)) == 7
        assert copy.add(embedder.entries("Something else.", "b.txt")) == 1


def test_a_reader_sees_what_a_writer_commits(facts: KnowledgeBase, embedder: HashedEmbedder) -> None:
    with KnowledgeBase.open(facts.folder) as reader:
        key = embedder.key("Lisbon is the capital of Portugal")
        assert len(reader.search(key, 20)) == 7
        facts.add(embedder.entries("Lisbon is the capital of Portugal.", "b.txt"))
        assert reader.search(key, 1)[0].source == "b.txt:1" and reader.info.passages == 8
        facts.delete("b.txt")
        assert len(reader.search(key, 20)) == 7
        facts.rebuild()
        assert len(reader.search(key, 20)) == 7
    assert len(list(facts.folder.glob("index-*"))) == 1


def test_readers_and_a_writer_at_the_same_time(tmp_path: Path) -> None:
    """Whatever a reader finds is one committed state: passages of a generation are put in and taken out together."""
    base, entries = KnowledgeBase.create(tmp_path / "a.kb", INFO), random_entries(INFO, 60)
    base.add(entries)
    done, seen, errors = threading.Event(), [], []

    def read() -> None:
        try:
            with KnowledgeBase.open(base.folder) as reader:
                while not done.is_set():
                    seen.append(len(reader.search(entries[0][1], 200)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(15):
        base.replace("b.txt", random_entries(INFO, 40 if i % 2 else 20, "b.txt", i))
    done.set()
    for thread in threads:
        thread.join()
    assert not errors and set(seen) <= {60, 80, 100} and len(seen) > 2


def test_one_writer_at_a_time(facts: KnowledgeBase, embedder: HashedEmbedder) -> None:
    with KnowledgeBase.open(facts.folder) as other:

        def entries():
            fails("another process is writing to it; wait until it has finished", other.delete, "facts.txt")
            assert len(other.search(embedder.key("x"), 9)) == 7, "searches go on meanwhile"
            yield from embedder.entries("One more.", "b.txt")

        assert facts.add(entries()) == 1
        assert other.delete("b.txt") == 1


def test_one_writer_at_a_time_among_processes(facts: KnowledgeBase, embedder: HashedEmbedder) -> None:
    code = (
        "import sys; from pathlib import Path; from rmse_edge.knowledge.rows import writer_lock\n"
        "with writer_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, str(facts.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        fails("another process is writing to it", facts.delete, "facts.txt")
        assert len(facts.search(embedder.key("x"), 9)) == 7
        holder.kill()
    assert facts.delete("facts.txt") == 7, "the lock of a killed process is free"


def test_deleted_texts_are_gone_from_the_disk(facts: KnowledgeBase) -> None:
    assert b"Everest" in b"".join(files_of(facts.folder).values())
    facts.delete("facts.txt")
    assert b"Everest" not in b"".join(files_of(facts.folder).values())


def test_rebuilding_gives_space_back(tmp_path: Path) -> None:
    base = KnowledgeBase.create(tmp_path / "a.kb", INFO)
    entries = random_entries(INFO, 600)
    base.add(entries)
    base.delete(ids=[p.id for p, _, _ in entries[100:]])
    large, counts = base.nbytes(), []
    base.rebuild(counts.append)
    assert base.nbytes() < large / 3 and sum(counts) == 100
    assert base.search(entries[5][1], 1)[0].id == entries[5][0].id


def test_without_usearch_it_says_what_to_install(
    facts: KnowledgeBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "usearch", None)
    monkeypatch.delitem(sys.modules, "usearch.index", raising=False)
    with pytest.raises(KnowledgeError, match=r"usearch is not installed; install it with: pip install 'rmse-edge\["):
        KnowledgeBase.create(tmp_path / "b.kb", INFO)
    fails("usearch is not installed", KnowledgeBase.open, facts.folder)


def test_a_full_disk_leaves_the_base_as_it_was(
    facts: KnowledgeBase, embedder: HashedEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    more = embedder.entries("One more.", "b.txt")
    with monkeypatch.context() as patched:
        patched.setattr(vectors.os, "fsync", full)
        fails("is the disk full? The knowledge base is as it was", facts.add, more)
    assert facts.sources() == {"facts.txt": 7} and facts.add(more) == 1

    with monkeypatch.context() as patched:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorname = "SQLITE_FULL"
        patched.setattr(facts._rows, "put_manifest", lambda _: (_ for _ in ()).throw(error))
        fails("the disk is full; what was committed before stays", facts.delete, "b.txt")
    assert facts.info.passages == 8 and facts.delete("b.txt") == 1
    assert len(facts.search(embedder.key("x"), 9)) == 7
