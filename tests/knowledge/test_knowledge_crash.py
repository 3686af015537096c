"""A writer that is killed, at whatever line or time, leaves the old knowledge base or the new one.

The victims are processes of their own: run as a program, this file forks one for every line that a change visits. It
imports little, so that they start at once.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hashed_embedder import files_of, random_entries

from rmse_edge.knowledge import KnowledgeInfo, base

pytest.importorskip("usearch", reason="needs usearch: pip install 'rmse-edge[knowledge]'")

from rmse_edge.knowledge.store import KnowledgeBase

pytestmark = pytest.mark.slow

INFO = KnowledgeInfo(16, 2, 8, "model-1")
ENTRIES = random_entries(INFO, 30)
KEY = ENTRIES[0][1]
NEW = random_entries(INFO, 8, "new.txt", 1)
KEPT = "a.txt", random_entries(INFO, 3, "a.txt", 2)


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder in memory where there is one: a killed process needs no disk, and syncing one is slow."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def made(folder: Path) -> Path:
    with KnowledgeBase.create(folder, INFO) as kb:
        kb.add(ENTRIES)
    return folder


def everything(folder: Path) -> dict[int, tuple]:
    """All that a search can find, read through the public door."""
    with KnowledgeBase.open(folder) as kb:
        hits = kb.search(KEY, 1000)
        assert len(hits) == kb.info.passages == sum(kb.sources().values())
        return {h.id: (h.text, h.source, h.value.tobytes(), round(h.score, 5)) for h in hits}


CHANGES: dict[str, Callable[[KnowledgeBase], object]] = {
    "add": lambda kb: kb.add(NEW),
    "delete": lambda kb: kb.delete("random.txt"),
    "replace": lambda kb: kb.replace("random.txt", [*ENTRIES[:20], *random_entries(INFO, 15, "random.txt", 9)]),
    "rebuild": lambda kb: kb.rebuild(),
}


def traced(action: Callable[[], object], stop: int | None = None) -> list[tuple[str, int]]:
    """Run `action`, noting every line of the package that is reached; at the first visit of the `stop`-th, die."""
    home, seen = str(Path(base.__file__).parent), {}

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(home):
            return None
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            if place not in seen:
                seen[place] = len(seen)
                if len(seen) - 1 == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return list(seen)


def change(folder: Path, name: str, stop: int | None = None) -> list[tuple[str, int]]:
    """Only the change is traced: opening writes nothing."""
    with KnowledgeBase.open(folder) as kb:
        return traced(lambda: CHANGES[name](kb), stop)


def kill_at_every_line(work: Path, name: str) -> dict[str, int]:
    """Run in a process of its own: it forks a victim for every line that a change visits."""
    whole, folder = made(work / "whole.kb"), work / "a.kb"
    before = everything(whole)
    shutil.copytree(whole, folder)
    lines = change(folder, name)
    after, counts = everything(folder), {"old": 0, "new": 0}
    # What the others do, replacing does too; so for them every third line will do.
    for stop in range(0, len(lines), 1 if name == "replace" else 3):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        victim = os.fork()
        if not victim:
            change(folder, name, stop)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]) == -signal.SIGKILL
        left = everything(folder)
        assert left in (before, after), (name, lines[stop])
        counts["old" if left == before else "new"] += 1
        with KnowledgeBase.open(folder) as kb:  # and it goes on from there
            kb.replace(*KEPT)
            assert len(kb.search(KEY, 1000)) == len(left) + len(KEPT[1])
        assert len(files_of(folder)) == 3, "nothing of the killed writer is left"
    return counts


def churn(folder: Path) -> None:
    """Change a knowledge base until killed: each source comes and goes as a whole."""
    turn = 0
    while True:
        turn += 1
        with KnowledgeBase.open(folder) as kb:
            kb.replace("b.txt", random_entries(INFO, 200, "b.txt", turn))
            kb.delete("b.txt")


def start(*arguments: object) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", CHANGES)
def test_killed_at_every_line(work: Path, name: str) -> None:
    with start("lines", work, name) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    counts = json.loads(out)
    assert counts["old"] > 15 and (counts["new"] > 1 or name == "rebuild"), counts


@pytest.mark.slow
def test_killed_at_random_times(work: Path) -> None:
    folder, generator = made(work / "a.kb"), random.Random(11)
    before = everything(folder)
    for _ in range(6):
        with start("churn", folder) as process:
            assert process.stdout and process.stdout.readline() == "started\n"
            time.sleep(generator.uniform(0.0, 0.25))
            process.kill()
        left = everything(folder)
        assert {k: v for k, v in left.items() if not v[1].startswith("b.txt")} == before
        assert len(left) in (30, 230), "all of the source or nothing"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_making_one_is_all_or_nothing(work: Path) -> None:
    with start("create", work) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    counts = json.loads(out)
    assert counts["old"] > 15 and counts["new"] > 0, counts


def kill_while_making(work: Path) -> dict[str, int]:
    folder, counts = work / "a.kb", {"old": 0, "new": 0}
    lines = traced(lambda: KnowledgeBase.create(folder, INFO).close())
    for stop in range(len(lines)):
        shutil.rmtree(folder, ignore_errors=True)
        victim = os.fork()
        if not victim:
            traced(lambda: KnowledgeBase.create(folder, INFO).close(), stop)
            os._exit(0)
        os.waitpid(victim, 0)
        if folder.exists():
            assert everything(folder) == {}
            counts["new"] += 1
        else:
            KnowledgeBase.create(folder, INFO).close()
            assert [p.name for p in work.iterdir()] == ["a.kb"], "nothing of the killed ones is left"
            counts["old"] += 1
    return counts


if __name__ == "__main__":
    kind, place, *rest = sys.argv[1:]
    if kind == "lines":
        print(json.dumps(kill_at_every_line(Path(place), rest[0])))
    elif kind == "create":
        print(json.dumps(kill_while_making(Path(place))))
    else:
        print("started", flush=True)
        churn(Path(place))
