"""Files and folders written all or nothing: whatever goes wrong, what stood there before still does.

    with new_file(path) as part: ...         what is written at `part` becomes the file `path`
    with new_folder(path) as part: ...       the folder `part` becomes the folder `path`
    with changed_folder(path) as part: ...   the files in `part` go into the folder `path`, all of them or none

Until it is complete, what is written lies on the same disk in a hidden scratch folder, `.NAME.XXXXXXXX.part`, beside the
path or, for `changed_folder`, inside it:

    lock     held by the process that writes; the system frees it when that process ends, in whatever way
    new/     what is being written
    old      a folder that was moved away to be replaced, where the two could not change places in one step
    ready/   files that are complete and on their way into a folder; `remove` beside it lists those that go

So a failure, a full disk, Ctrl-C or a kill at any moment leaves the old or the new. The next one to write to the same path
finishes or undoes what a process left that died, and never touches the scratch folder of one that lives.

Symbolic links are followed: a link stays, and what it points to is replaced. What is neither a regular file nor a folder (a
FIFO, a device, a socket) is refused.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .errors import FileError, UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

SUFFIX = ".part"
CHANGE = "change"  # in the place of NAME, of the scratch folder of `changed_folder`
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # the disk is full or broken, whatever was being done
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # says a file system without them
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def digest_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_parts(path: Path, sizes: Iterable[int]) -> list[str]:
    """SHA-256 of the parts of a file that have these sizes, in bytes, and lie one behind the other."""
    found = []
    with path.open("rb") as file:
        for left in sizes:
            digest = hashlib.sha256()
            while block := file.read(min(left, 1 << 20)):
                digest.update(block)
                left -= len(block)
            found.append(digest.hexdigest())
    return found


class Digests:
    """SHA-256 of files that are asked for again and again: each is read once, and again where it was written to.

    A clock's tick is some milliseconds: who writes a file twice in one, and asks in between, must `forget` it.
    """

    def __init__(self) -> None:
        # file, wherever it lies -> state, what is known of it: the hash of the whole, and of parts by their sizes
        self._known: dict[tuple[int, int], tuple[tuple[int, int], dict[tuple[int, ...], Any]]] = {}

    def of(self, path: Path) -> str:
        """Hexadecimal, as `digest_file` gives it."""
        known = self._of_file(path)
        if () not in known:
            known[()] = digest_file(path)
        return known[()]

    def of_parts(self, path: Path, sizes: Sequence[int]) -> list[str]:
        """As `digest_parts` gives them."""
        known, key = self._of_file(path), tuple(sizes)
        if key not in known:
            known[key] = digest_parts(path, sizes)
        return known[key]

    def forget(self, path: Path) -> None:
        found = path.stat()
        self._known.pop((found.st_dev, found.st_ino), None)

    def _of_file(self, path: Path) -> dict[tuple[int, ...], Any]:
        found = path.stat()
        file, state = (found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns)
        if self._known.get(file, (None,))[0] != state:
            self._known[file] = state, {}
        return self._known[file][1]


# ----------------------------------------------------------------------------------------------------------- writing


@contextmanager
def new_file(path: str | Path, error: type[UserError] = FileError, mode: int = 0o666) -> Iterator[Path]:
    """A path to write a file at, of the same name, that becomes the file `path` when the block ends well.

    Args:
        error: what to raise.
        mode: permissions, less the umask, of a file that was not there; one that is replaced keeps its own.
    Raises:
        FileError, or `error`: `path` is no regular file, its folder does not exist, or it cannot be written.
    """
    target = _target(Path(path), stat.S_IFREG, error)
    with explained(path, target, error):
        tidy(target)
        with scratch_folder(target.parent, target.name) as scratch:
            part = scratch / "new" / target.name
            with named(part, path):
                yield part
            there = target.exists()
            settle(part, stat.S_IMODE(target.stat().st_mode) if there else mode & usual_mode(scratch))
            os.replace(part, target)
            sync_folder(target.parent)


def write_text(path: str | Path, text: str, error: type[UserError] = FileError) -> None:
    """Write a text file as UTF-8, all or nothing; raises what `new_file` raises."""
    with new_file(path, error) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: str | Path, error: type[UserError] = FileError, replace: bool = True) -> Iterator[Path]:
    """An empty folder of the same name that becomes the folder `path` when the block ends well.

    Args:
        error: what to raise.
        replace: put it in the place of a folder that is there; otherwise only of an empty one.
    Raises:
        FileError, or `error`: `path` is no folder, its parent does not exist, or it cannot be written.
    """
    target = _target(Path(path), stat.S_IFDIR, error)
    with explained(path, target, error):
        tidy(target)
        with scratch_folder(target.parent, target.name) as scratch:
            part = scratch / "new" / target.name
            part.mkdir()
            with named(part, path):
                yield part
            settle_all(part, usual_mode(scratch))
            if not replace or not target.exists():
                os.rename(part, target)
            elif not exchange(part, target):
                move_over(part, target, scratch / "old")
            sync_folder(target.parent)


@contextmanager
def changed_folder(
    path: str | Path, error: type[UserError] = FileError, remove: Iterable[str] = ()
) -> Iterator[Path]:  # fmt: skip
    """An empty folder whose files move into the folder `path` when the block ends well; other files there stay.

    A process that is killed while they move has decided: the next one to write there, or to call `finish_change`, moves
    the rest.

    Args:
        path: made if it is not there, its parents too; they go again if the block fails.
        error: what to raise.
        remove: names of files of `path` that go at the same time.
    Raises:
        FileError, or `error`: `path` is no folder, one of the files to be replaced is no regular file, or it cannot be
            written.
    """
    with _made(Path(os.path.realpath(path)).parent):
        target = _target(Path(path), stat.S_IFDIR, error)
        with explained(path, target, error):
            tidy(target)
        if not target.exists():
            with new_folder(path, error, replace=False) as part:
                yield part
            return
        with explained(path, target, error):
            finish_change(target)
            with scratch_folder(target, CHANGE) as scratch:
                part = scratch / "new"
                with named(part, path):
                    yield part
                for file in part.iterdir():
                    _target(target / file.name, stat.S_IFREG, error)
                settle_all(part, usual_mode(scratch))
                (scratch / "remove").write_text(json.dumps(list(remove)), encoding="utf-8")
                os.rename(part, scratch / "ready")
                try:
                    move_ready(scratch, target)
                except KeyboardInterrupt:
                    move_ready(scratch, target)
                    raise
                except OSError as failure:
                    raise error(
                        f"{failure.filename or path}: cannot be written ({failure.strerror}); {path} is changed in part, and "
                        "the rest follows when it is written to or read again"
                    ) from None


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder and its parents, made where they are not there; if the block fails, those that are new and empty go."""
    missing = [p for p in (folder, *folder.parents) if not os.path.exists(p)]
    try:
        with suppress(OSError):  # what is wrong is said by who writes there
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for made in missing:
            with suppress(OSError):
                made.rmdir()
        raise


@contextmanager
def named(part: Path, path: str | Path) -> Iterator[None]:
    """Errors that name the scratch file or folder `part`, which is going away, name what was to become of it: `path`."""
    try:
        yield
    except UserError as error:
        error.args = tuple(str(said).replace(str(part), str(path)) for said in error.args)
        raise


# ------------------------------------------------------------------------------------------------- before long work


def check_file(path: str | Path, error: type[UserError] = FileError) -> Path:
    """Whether `new_file` could write to `path`, before the work that makes what is written; returns the path of it, all
    links followed.

    Raises:
        FileError, or `error`: something else than a regular file is there, there is no folder to put it into, or nothing
            can be written in that folder.
    """
    target = _target(Path(path), stat.S_IFREG, error)
    _try(target.parent, path, target, error)
    return target


def check_folder(path: str | Path, error: type[UserError] = FileError) -> Path:
    """As `check_file`, for `new_folder`."""
    target = _target(Path(path), stat.S_IFDIR, error)
    if target.is_mount():
        raise error(f"{path}: is a mount point, in whose place nothing can be put; choose a folder inside it")
    _try(target.parent, path, target, error)
    return target


def check_changes(path: str | Path, error: type[UserError] = FileError) -> Path:
    """As `check_file`, for `changed_folder`, where the folder above `path` is there."""
    target = _target(Path(path), stat.S_IFDIR, error)
    _try(target if target.exists() else target.parent, path, target, error)
    return target


def _try(folder: Path, path: str | Path, target: Path, error: type[UserError]) -> None:
    """Write something in `folder`. Permissions do not tell: of /proc they say that root may."""
    with explained(path, target, error), scratch_folder(folder, target.name):
        pass


def kind_of(path: str | Path) -> str:
    """What is at a path where something is: "a folder", "a file", "a FIFO"."""
    return KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "of a strange kind")


def _target(path: Path, kind: int, error: type[UserError]) -> Path:
    target = Path(os.path.realpath(path))
    try:
        found = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        found = kind
    except OSError as failure:
        raise error(f"{path}: cannot be written ({failure.strerror})") from None
    if found != kind:
        raise error(f"{path}: is {kind_of(path)}, expected {KINDS[kind]}; choose another name")
    if not target.parent.is_dir():
        raise error(f"{path}: cannot be written (there is no folder {target.parent})")
    return target


@contextmanager
def explained(path: str | Path, target: Path, error: type[UserError]) -> Iterator[None]:
    """Failures to write `target` as one line; others pass."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as failure:
        reason = write_failure(failure, target)
        if reason is None:
            raise
        raise error(f"{path}: cannot be written ({reason}); nothing was changed") from None


def write_failure(failure: BaseException | None, target: Path) -> str | None:
    """Why `target` could not be written, if that is what `failure` says.

    safetensors has an error of its own for it; torch.save raises a RuntimeError about positions, over the true one.
    """
    if isinstance(failure, SafetensorError):
        return " ".join(str(failure).split())
    if isinstance(failure, RuntimeError):
        return write_failure(failure.__context__, target)
    if not isinstance(failure, OSError):
        return None
    places = [os.path.realpath(p) for p in (failure.filename, failure.filename2) if isinstance(p, (str, os.PathLike))]
    beneath = (f"{target}{os.sep}", f"{target.parent}{os.sep}.{target.name}.")
    ours = any(p in (str(target), str(target.parent)) or p.startswith(beneath) for p in places)
    return (failure.strerror or "disk full") if ours or failure.errno in DISK else None


# --------------------------------------------------------------------------------------------------- scratch folders


@contextmanager
def scratch_folder(folder: Path, name: str) -> Iterator[Path]:
    """A new scratch folder in `folder` that this process holds; it goes with what is left in it."""
    lock = None
    while lock is None:  # until it is locked, it may be taken for one of the dead
        path = Path(tempfile.mkdtemp(SUFFIX, f".{name}.", folder))
        try:
            lock = lock_of(path)
        except OSError as failure:
            if failure.errno not in NO_LOCKS:
                shutil.rmtree(path, ignore_errors=True)
                raise
            break  # what is left here by a kill stays: nobody can tell that it is dead
    try:
        (path / "new").mkdir()
        yield path
    finally:
        if not (path / "ready").exists():
            discard(path, lock)
        elif lock is not None:  # to be finished later
            lock.release()


def lock_of(scratch: Path) -> BaseFileLock | None:
    """The lock of a scratch folder, taken; None if another process, or another part of this one, holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(scratch / "lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except (Timeout, FileNotFoundError):
        return None
    return lock


def discard(scratch: Path, lock: BaseFileLock | None) -> None:
    """Remove a scratch folder while its lock is held: nobody else may take it for abandoned."""
    shutil.rmtree(scratch, ignore_errors=True)
    if lock is not None:
        lock.release()
    if os.name == "nt":  # where no file is removed that is in use
        shutil.rmtree(scratch, ignore_errors=True)


def abandoned(folder: Path, name: str) -> Iterator[Path]:
    """The scratch folders for `name` whose processes died, each held while it is looked at and removed afterwards."""
    pattern = re.compile(rf"\.{re.escape(name)}\.[^.]+{re.escape(SUFFIX)}")
    for path in sorted(p for p in folder.iterdir() if pattern.fullmatch(p.name)):
        try:
            lock = lock_of(path)
        except OSError:  # another user's
            continue
        if lock is not None:
            try:
                yield path
            except BaseException:
                lock.release()
                raise
            discard(path, lock)


def tidy(path: str | Path) -> None:
    """Undo what processes that died left of writing the file or folder `path`: it stands there again as it did before.

    Raises:
        OSError: it cannot be put back.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        return
    for scratch in abandoned(target.parent, target.name):
        restore(scratch / "old", target)


def finish_change(folder: Path) -> None:
    """Finish the changes of the files of `folder` that processes had decided on when they died; undo the others.

    Raises:
        OSError: they cannot be finished.
    """
    for scratch in abandoned(folder, CHANGE):
        if (scratch / "ready").exists():
            move_ready(scratch, folder)


def restore(old: Path, target: Path) -> None:
    """Move `old` back if nothing has taken its place."""
    if os.path.lexists(old) and not os.path.lexists(target):
        os.rename(old, target)


def move_over(part: Path, target: Path, old: Path) -> None:
    """Put the folder `part` in the place of the folder `target`, which goes to `old`."""
    try:
        os.rename(target, old)
        os.rename(part, target)
    finally:
        restore(old, target)


def move_ready(scratch: Path, folder: Path) -> None:
    """Move the complete files of `scratch` into `folder`. Begun and broken off, it can be called again."""
    ready = scratch / "ready"
    for file in sorted(ready.iterdir()):
        target = _target(folder / file.name, stat.S_IFREG, FileError)
        try:
            os.replace(file, target)
        except OSError as failure:
            if failure.errno != errno.EXDEV:
                raise
            with new_file(target) as part:  # a link led to another disk
                shutil.copyfile(file, part)
            file.unlink()
    for name in json.loads((scratch / "remove").read_text(encoding="utf-8")):
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
    ready.rmdir()


def exchange(a: Path, b: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system has no such step."""
    try:
        system = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return system.renamex_np(os.fsencode(a), os.fsencode(b), 2) == 0  # RENAME_SWAP
        here = -100  # AT_FDCWD
        return system.renameat2(here, os.fsencode(a), here, os.fsencode(b), 2) == 0  # RENAME_EXCHANGE
    except (AttributeError, OSError, TypeError):
        return False


# ------------------------------------------------------------------------------------------------ permissions, disks


def usual_mode(scratch: Path) -> int:
    """The permissions that files get in this place: 0666 less the umask."""
    return stat.S_IMODE((scratch / "new").stat().st_mode) & 0o666


def settle(file: Path, mode: int) -> None:
    """Give a complete file its permissions and have it on the disk, where some disks only now say that they are full."""
    file.chmod(mode)  # safetensors writes files that only their owner can read
    handle = os.open(file, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle_all(folder: Path, mode: int) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            settle(Path(place, name), mode)
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut. Windows has no such call, and does not need it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
