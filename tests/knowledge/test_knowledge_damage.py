"""Damage is said in one line with its fix, or does no harm."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hashed_embedder import files_of, random_entries
from helpers import assert_one_line

from rmse_edge.knowledge import KnowledgeError, KnowledgeInfo

pytest.importorskip("usearch", reason="needs usearch: pip install 'rmse-edge[knowledge]'")

from rmse_edge.knowledge.rows import digest_manifest
from rmse_edge.knowledge.store import KnowledgeBase

INFO = KnowledgeInfo(16, 2, 8, "model-1")
ENTRIES = random_entries(INFO, 120)
KEY = ENTRIES[0][1]
NEW = random_entries(INFO, 30, "new.txt", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "a.kb"
    with KnowledgeBase.create(folder, INFO) as kb:
        kb.add(ENTRIES)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "a.kb"))


def everything(folder: Path) -> dict[int, tuple]:
    """All that a search can find, read through the public door."""
    with KnowledgeBase.open(folder) as kb:
        hits = kb.search(KEY, 1000)
        assert len(hits) == kb.info.passages == sum(kb.sources().values())
        return {h.id: (h.text, h.source, h.value.tobytes(), round(h.score, 5)) for h in hits}


def says(message: str, call: Callable, *args: object) -> None:
    with pytest.raises(KnowledgeError) as caught:
        call(*args)
    assert_one_line(str(caught.value), message)


def spoilt(data: bytes, how: str) -> bytes:
    middle = len(data) // 2
    return {
        "empty": b"",
        "cut": data[:middle],
        "one byte short": data[:-1],
        "one byte more": data + b"\0",
        "one bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "noise": np.random.default_rng(0).bytes(len(data)),
    }[how]


@pytest.mark.parametrize("how", ["empty", "cut", "one byte short", "one byte more", "one bit", "noise", "removed"])
def test_a_damaged_index_is_named_and_rebuilt(folder: Path, how: str) -> None:
    before = everything(folder)
    [path] = folder.glob("index-*.usearch")
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(spoilt(path.read_bytes(), how))
    for call in (KnowledgeBase.open, everything):
        says(f"rebuild it with rmse-index --rebuild -o {folder}", call, folder)
        says(str(path), call, folder)
    with KnowledgeBase.open(folder, check=False) as kb:
        says("rebuild it with rmse-index --rebuild", kb.add, NEW)
        kb.rebuild()
    assert everything(folder) == before
    assert sorted(p.name for p in folder.iterdir()) == ["index-2.usearch", "passages.sqlite", "writer.lock"]


@pytest.mark.parametrize("how", ["empty", "cut", "noise"])
def test_damaged_passages_are_named(folder: Path, how: str) -> None:
    path = folder / "passages.sqlite"
    path.write_bytes(spoilt(path.read_bytes(), how))
    says("build it again from the texts with rmse-index", KnowledgeBase.open, folder)
    says(str(path), KnowledgeBase.open, folder)


def test_any_damage_is_noticed_or_harmless(folder: Path) -> None:
    """Flipped bits anywhere in SQLite's file: no wrong passage, no other error, no crash, while reading or writing."""
    path, before, generator, noticed = folder / "passages.sqlite", everything(folder), random.Random(5), 0
    good, index = path.read_bytes(), {n: d for n, d in files_of(folder).items() if n.startswith("index")}
    for turn in range(60):
        data = bytearray(good)
        for _ in range(generator.choice((1, 1, 8))):
            place = generator.randrange(200 if turn % 5 == 0 else len(data))
            data[place] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        try:
            with KnowledgeBase.open(folder) as kb:
                found = {h.id: (h.text, h.source, h.value.tobytes(), round(h.score, 5)) for h in kb.search(KEY, 1000)}
                assert found == before
                kb.add(NEW)
                kb.delete("new.txt")
        except KnowledgeError as error:
            noticed += 1
            assert_one_line(str(error))
        for name, bytes_ in index.items():
            (folder / name).write_bytes(bytes_)
    assert noticed > 30


def edited(folder: Path, **changes: object) -> None:
    """The manifest with some values changed, and its hash made to fit."""
    with sqlite3.connect(folder / "passages.sqlite") as db:
        manifest = json.loads(db.execute("SELECT json FROM manifest").fetchone()[0]) | changes
        manifest["sha256"] = digest_manifest(manifest) if "sha256" not in changes else changes["sha256"]
        db.execute("UPDATE manifest SET json = ?", (json.dumps(manifest),))
    db.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "format version 1, this rmse-edge reads 2; build it again from the texts"),
        ({"format": "a diary"}, "not the passages of an rmse-edge knowledge base"),
        ({"sha256": "0"}, "its manifest is damaged (its SHA-256 does not fit)"),
        ({"keys": 7}, "holds 120 keys of 16 numbers, expected 7 of 16; rebuild it"),
        ({"key_dims": 17}, "holds 120 keys of 16 numbers, expected 120 of 17; rebuild it"),
    ],
)
def test_another_version_is_refused(folder: Path, changes: dict, message: str) -> None:
    edited(folder, **changes)
    says(message, KnowledgeBase.open, folder)


def test_values_of_another_shape_are_noticed(folder: Path) -> None:
    edited(folder, slots=3)
    with KnowledgeBase.open(folder) as kb:
        says("is damaged (its CRC-32 or its size does not fit)", kb.search, KEY, 1)


def test_another_database_is_refused(folder: Path) -> None:
    (folder / "passages.sqlite").unlink()
    db = sqlite3.connect(folder / "passages.sqlite")
    db.execute("CREATE TABLE t (x)")
    db.commit()
    db.close()
    says("damaged (no such table: manifest)", KnowledgeBase.open, folder)


def test_a_missing_or_altered_passage_is_noticed(folder: Path) -> None:
    with sqlite3.connect(folder / "passages.sqlite") as db:
        db.execute("UPDATE passages SET text = 'lies' WHERE id = ?", (ENTRIES[3][0].id,))
        db.execute("DELETE FROM passages WHERE id = ?", (ENTRIES[4][0].id,))
    db.close()
    with KnowledgeBase.open(folder) as kb:
        says(
            f"passage {ENTRIES[3][0].id} is damaged (its CRC-32 or its size does not fit)", kb.search, ENTRIES[3][1], 1
        )
        says("the passages of an index entry are missing; build it again from the texts", kb.search, ENTRIES[4][1], 1)
        says("is damaged (its CRC-32 or its size does not fit); build it again from the texts", kb.rebuild)
        assert kb.search(ENTRIES[5][1], 1)[0].id == ENTRIES[5][0].id


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX permissions")
def test_a_folder_that_cannot_be_written_can_be_searched(whole: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(whole, Path(place) / "a.kb"))
        for path, mode in ((Path(place), 0o755), *((p, 0o444) for p in folder.iterdir()), (folder, 0o555)):
            path.chmod(mode)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write everywhere
        try:
            with KnowledgeBase.open(folder) as kb:
                assert kb.search(KEY, 1)[0].id == ENTRIES[0][0].id
                says("permissions", kb.add, NEW)
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
