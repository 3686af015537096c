"""Writing all or nothing: a kill at any line leaves the old or the new, what is dead goes, what lives stays.

The victims are processes of their own: run as a program, this file forks one for every line that a writing visits. It
imports little, so that they start at once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rmse_edge import files
from rmse_edge.errors import FileError, PackageError, UserError

Tree = dict[str, str]
NAMES = ("a.bin", "b.bin", "c.bin")


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder in memory where there is one: a killed process needs no disk, and syncing one is slow."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def tree(place: Path) -> Tree:
    """All files beneath a folder, hidden ones too."""
    return {str(p.relative_to(place)): p.read_text() for p in sorted(place.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------------- what is written


def write_file(place: Path, text: str) -> None:
    files.write_text(place / "file", text)


def write_folder(place: Path, text: str) -> None:
    with files.new_folder(place / "folder") as part:
        for name in NAMES:
            (part / name).write_text(text)


def change_folder(place: Path, text: str) -> None:
    with files.changed_folder(place / "folder", remove=["removed"]) as part:
        for name in NAMES:
            (part / name).write_text(text)


def prepare(place: Path) -> None:
    (place / "file").write_text("old")
    (place / "folder").mkdir()
    for name in (*NAMES, "removed"):
        (place / "folder" / name).write_text("old")


WRITERS: dict[str, Callable[[Path, str], None]] = {
    "file": write_file, "folder": write_folder, "folder in two steps": write_folder, "changed folder": change_folder,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- killed


def traced(action: Callable[[], object], stop: int | None = None) -> list[int]:
    """Run `action`, noting every line of files.py that is reached; at the first visit of the `stop`-th, die."""
    seen: list[int] = []

    def trace(frame, event, _):
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line" and frame.f_lineno not in seen:
            seen.append(frame.f_lineno)
            if len(seen) - 1 == stop:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return seen


def kill_at_every_line(work: Path, name: str) -> dict[str, int]:
    """Run in a process of its own: it forks a victim for every line that a writing visits."""
    if name == "folder in two steps":
        files.exchange = lambda a, b: False
    write, counts = WRITERS[name], {"old": 0, "new": 0, "left": 0}

    def begin(turn: object) -> Path:
        place = work / str(turn)
        place.mkdir()
        prepare(place)
        return place

    place = begin("whole")
    before, lines, after = tree(place), traced(lambda: write(place, "new")), tree(place)
    assert before != after and not any(n.startswith(".") for n in after)
    for stop in range(len(lines)):
        place = begin(stop)
        victim = os.fork()
        if not victim:
            traced(lambda place=place: write(place, "new"), stop)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]) == -signal.SIGKILL
        counts["left"] += len(tree(place)) != len(before)
        files.tidy(place / "file")
        files.tidy(place / "folder")
        files.finish_change(place / "folder")
        found = tree(place)
        assert found in (before, after), (name, lines[stop], found)
        counts["old" if found == before else "new"] += 1
        write(place, "new")
        assert tree(place) == after, (name, lines[stop])
    return counts


def start(*arguments: object) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", WRITERS)
def test_killed_at_every_line(work: Path, name: str) -> None:
    with start("lines", work, name) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    counts = json.loads(out)
    assert counts["old"] > 15 and counts["new"] > 0 and counts["left"] > 10, counts


@pytest.mark.parametrize("name", ["file", "folder", "changed folder"])
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(work: Path, name: str) -> None:
    prepare(work)
    before = tree(work)
    holders = [start("hold", work, name) for _ in range(3)]
    for holder in holders:
        assert holder.stdout and holder.stdout.readline() == "writing\n"
    assert len({n for n in tree(work) if n.endswith("/lock")}) == 3
    for holder in holders[:2]:
        holder.kill()
        holder.communicate()
    WRITERS[name](work, "new")
    left = {n.rpartition("/")[0] for n in tree(work) if n.endswith("/lock")}
    assert len(left) == 1, "that of the living one"
    assert {n: t for n, t in tree(work).items() if "/." not in f"/{n}"} != before
    _, err = holders[2].communicate("go on\n")
    assert holders[2].returncode == 0, err
    assert "held" in tree(work).values() and not any("/." in f"/{n}" for n in tree(work))


def hold(place: Path, name: str) -> None:
    """Write until told to go on."""
    manager = {
        "file": lambda: files.new_file(place / "file"),
        "folder": lambda: files.new_folder(place / "folder"),
        "changed folder": lambda: files.changed_folder(place / "folder"),
    }[name]()
    with manager as part:
        (part if name == "file" else part / "a.bin").write_text("held")
        print("writing", flush=True)
        assert sys.stdin.readline() == "go on\n"


# ------------------------------------------------------------------------------------------------------- special files


def special(path: Path, kind: str) -> Path:
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "device":
        return Path(os.devnull)
    elif kind == "link to a FIFO":
        os.mkfifo(path.with_name("fifo"))
        path.symlink_to("fifo")
    else:
        path.symlink_to(path.name)
    return path


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
@pytest.mark.parametrize(
    ("kind", "said"),
    [("FIFO", "is a FIFO"), ("socket", "is a socket"), ("device", "is a device"), ("link to a FIFO", "is a FIFO"),
     ("link to itself", "cannot be written (Too many levels of symbolic links)")],
)  # fmt: skip
def test_what_is_no_regular_file_is_refused(work: Path, kind: str, said: str) -> None:
    path = special(work / "x", kind)
    before = [(p.name, p.lstat().st_mode) for p in work.iterdir()]
    for write in (files.new_file, files.new_folder, files.changed_folder):
        with pytest.raises(FileError) as caught, write(path):
            raise AssertionError("not reached")
        message = str(caught.value)
        assert message.startswith(f"{path}: {said}") and "\n" not in message
    (work / "folder").mkdir()
    with pytest.raises(FileError, match="is a folder, expected a file"), files.new_file(work / "folder"):
        raise AssertionError("not reached")
    (work / "folder").rmdir()
    assert [(p.name, p.lstat().st_mode) for p in work.iterdir()] == before


CHECKS = (files.check_file, files.check_folder, files.check_changes)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_what_cannot_be_written_is_known_before_the_work(work: Path) -> None:
    path = special(work / "x", "FIFO")
    for check in CHECKS:
        with pytest.raises(FileError, match=r"x: is a FIFO, expected a (file|folder); choose another name"):
            check(path)
        check(work / "new")
        with pytest.raises(UserError, match="there is no folder"):
            check(work / "none" / "new")
    prepare(work)
    files.check_file(work / "file")
    files.check_folder(work / "folder")
    files.check_changes(work / "folder")
    assert set(tree(work).values()) == {"old"} and not any(p.name.startswith(".") for p in work.rglob("*"))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux")
@pytest.mark.parametrize("check", CHECKS)
def test_permissions_do_not_tell_where_nothing_can_be_written(check: Callable[[Path], object]) -> None:
    """Root may write to /proc, they say."""
    with pytest.raises(FileError, match="/proc/x: cannot be written"):
        check(Path("/proc/x"))


@pytest.mark.skipif(not Path("/dev/shm").is_mount(), reason="needs a mount point")
def test_a_mount_point_is_not_replaced() -> None:
    with pytest.raises(FileError, match="/dev/shm: is a mount point"):
        files.check_folder("/dev/shm")
    files.check_changes("/dev/shm")


@pytest.mark.parametrize("writer", [files.new_file, files.new_folder, files.changed_folder])
def test_errors_name_what_was_to_be_written(work: Path, writer: Any) -> None:
    """Not the scratch folder, which nobody has heard of and which is gone by then."""
    (work / "folder").mkdir()
    path = work / ("file" if writer is files.new_file else "folder")
    with pytest.raises(PackageError) as caught, writer(path) as part:
        raise PackageError(f"{part}: methods: got 5; export again")
    assert str(caught.value) == f"{path}: methods: got 5; export again"


@pytest.mark.parametrize("failure", [UserError("no"), ValueError("a defect"), KeyboardInterrupt()], ids=repr)
def test_parents_that_were_made_go_with_what_failed(work: Path, failure: BaseException) -> None:
    (work / "there").mkdir()
    path = work / "there" / "a" / "b" / "c"
    with pytest.raises(type(failure)), files.changed_folder(path) as part:
        (part / "x").write_text("new")
        raise failure
    assert [p.name for p in work.rglob("*")] == ["there"]
    with pytest.raises(UserError), files.changed_folder(path):
        (work / "there" / "a" / "other").write_text("of somebody else")
        raise UserError("no")
    assert tree(work) == {"there/a/other": "of somebody else"} and not (work / "there" / "a" / "b").exists()
    with files.changed_folder(path) as part:
        (part / "x").write_text("new")
    assert tree(work) == {"there/a/b/c/x": "new", "there/a/other": "of somebody else"}


def test_a_file_in_a_folder_that_is_special_is_refused(work: Path) -> None:
    (work / "folder").mkdir()
    (work / "folder" / "b.bin").mkdir()
    with pytest.raises(FileError, match=r"b\.bin: is a folder, expected a file"):
        change_folder(work, "new")
    assert tree(work) == {} and [p.name for p in (work / "folder").iterdir()] == ["b.bin"]


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_a_link_stays_and_its_target_is_replaced(work: Path) -> None:
    (work / "real").mkdir()
    (work / "real" / "file").write_text("old")
    (work / "file").symlink_to("real/file")
    (work / "later").symlink_to("real/later")
    (work / "folder").symlink_to("real/folder")
    write_file(work, "new")
    files.write_text(work / "later", "new")
    for text in ("one", "two"):
        write_folder(work, text)
    links = {p.name: os.readlink(p) for p in work.iterdir() if p.is_symlink()}
    assert links == {"file": "real/file", "later": "real/later", "folder": "real/folder"}
    assert tree(work / "real") == {"file": "new", "later": "new"} | {f"folder/{n}": "two" for n in NAMES}
    (work / "real" / "folder" / "b.bin").unlink()
    (work / "real" / "folder" / "b.bin").symlink_to("../file")
    change_folder(work, "three")
    assert tree(work / "real") == {"file": "three", "later": "new"} | {f"folder/{n}": "three" for n in NAMES}


def test_a_link_to_another_disk_is_followed(work: Path, tmp_path: Path) -> None:
    if work.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    prepare(work)
    (tmp_path / "b.bin").write_text("old")
    (work / "folder" / "b.bin").unlink()
    (work / "folder" / "b.bin").symlink_to(tmp_path / "b.bin")
    change_folder(work, "new")
    assert (work / "folder" / "b.bin").is_symlink() and tree(tmp_path) == {"b.bin": "new"}


# ------------------------------------------------------------------------------------------------------- the rest


def test_permissions(work: Path) -> None:
    """Those that any program's files get; a file that is replaced keeps its own."""
    before = os.umask(0o027)
    try:
        with files.new_file(work / "file") as part:
            part.touch(0o600)
        with files.new_file(work / "secret", mode=0o600) as part:
            part.touch(0o666)
        with files.new_folder(work / "folder") as part:
            (part / "x").touch(0o600)
        modes = [stat.S_IMODE((work / n).stat().st_mode) for n in ("file", "secret", "folder", "folder/x")]
        assert modes == [0o640, 0o600, 0o750, 0o640]
        (work / "file").chmod(0o604)
        write_file(work, "new")
        assert stat.S_IMODE((work / "file").stat().st_mode) == 0o604
    finally:
        os.umask(before)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX permissions")
def test_a_folder_that_cannot_be_written(work: Path) -> None:
    prepare(work)
    before, user = tree(work), os.geteuid()
    for path in (work / "folder", work):
        path.chmod(0o555)
    if user == 0:
        os.seteuid(65534)  # root may write everywhere
    try:
        for write in WRITERS.values():
            with pytest.raises(FileError, match=r"cannot be written \(Permission denied\); nothing was changed"):
                write(work, "new")
        files.finish_change(work / "folder")
    finally:
        os.seteuid(user)
        work.chmod(0o755)
    assert tree(work) == before


def test_other_failures_pass(work: Path) -> None:
    """They are not about the file that is written."""
    for failure in (OSError("x"), RuntimeError("x"), FileNotFoundError(2, "x", "/elsewhere")):
        with pytest.raises(type(failure)), files.new_file(work / "file"):
            raise failure
    assert list(work.iterdir()) == []


if __name__ == "__main__":
    what, folder, kind = sys.argv[1:]
    if what == "lines":
        print(json.dumps(kill_at_every_line(Path(folder), kind)))
    else:
        hold(Path(folder), kind)
