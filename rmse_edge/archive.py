"""A package as one file, `NAME.rmse.zip`, for phones and downloads: a zip of the files of `NAME.rmse/`.

    SHA256SUMS, manifest.json, then the others by name; stored, not compressed; the same bytes for the same package

Whoever reads it from its beginning knows by the first two entries what has to follow. Weights hardly compress, and since
nothing is compressed, no archive unpacks to more bytes than it has itself.

Python unpacks an archive once, into the user's cache folder, under the hash of its SHA256SUMS, which stands for all of it:

    folder = unpacked("NAME.rmse.zip")
    runtime = open_runtime(folder)  # or open_runtime("NAME.rmse.zip")
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from .cache import one_at_a_time, unpacked_packages
from .errors import ExportError, FileError, PackageError
from .files import check_file, named, new_file, new_folder
from .package import MANIFEST, SUMS, Package
from .schema import LARGEST_JSON

SUFFIX = ".rmse.zip"
SIGNATURE = b"PK\x03\x04"  # of the first entry of a zip
ENCRYPTED = 1  # bit of an entry's flags
LONGEST_NAME = 200  # characters
COPIED = 1 << 20  # bytes at a time
AGAIN = "copy it again, or make it with rmse-export"
# What zipfile raises of a file that is not as it should be.
DAMAGED = (BadZipFile, EOFError, NotImplementedError, ValueError, struct.error)


def is_archive(path: str | Path) -> bool:
    """Whether there is a file that begins as a zip does, whatever the rest of it."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


# ----------------------------------------------------------------------------------------------------------- packing


def check_archive(path: Path, overwrite: bool) -> None:
    """Fail unless an archive may be written to `path`; before the work that makes what is in it.

    Raises:
        ExportError: something is in the way that is no archive, or may not be replaced, or nothing can be written there.
    """
    if not path.name.endswith(SUFFIX):
        raise ExportError(f"{path}: got this name for an archive, expected NAME{SUFFIX}")
    check_file(path, ExportError)
    if path.exists() and not is_archive(path):
        raise ExportError(f"{path}: exists and is not an archive; choose another place")
    if path.exists() and not overwrite:
        raise ExportError(f"{path}: already exists; remove it, choose another place, or pass overwrite=True")


def pack(package: Package, path: str | Path, overwrite: bool = False) -> None:
    """Write a verified package as the archive `path`, all or nothing.

    Raises:
        ExportError: see `check_archive`.
    """
    check_archive(Path(path), overwrite)
    with new_file(path, ExportError) as part:
        write_entries(package, part)


def write_entries(package: Package, path: Path) -> None:
    """Write the zip of a package at `path`, where nothing is."""
    others = sorted(package.digests.keys() - {MANIFEST})
    with ZipFile(path, "x", ZIP_STORED) as archive:
        for name in (SUMS, MANIFEST, *others):
            entry = ZipInfo(name)  # of 1980, and of nobody
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            entry.file_size = (package.folder / name).stat().st_size
            with (package.folder / name).open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, COPIED)


# --------------------------------------------------------------------------------------------------------- unpacking


def unpacked(path: str | Path) -> Path:
    """The folder of a model: `path` as it is, or of an archive the folder in the cache that holds its files.

    Raises:
        PackageError: the archive is damaged, holds no package, or something that would not stay in its folder; nothing is
            left of it.
        FileError: the cache folder cannot be written.
    """
    path = Path(path)
    if not is_archive(path):
        if path.name.endswith(SUFFIX) and path.is_file():
            raise PackageError(f"{path}: not a whole zip archive (it does not begin as one); {AGAIN}")
        return path
    with path.open("rb") as file:
        try:
            with ZipFile(file) as archive:
                entries = checked(archive, path)
                sums = archive.read(entries[SUMS])
                folder = unpacked_packages() / f"{hashlib.sha256(sums).hexdigest()}.rmse"
                _unpack_once(archive, entries, sums, folder, path)
        except DAMAGED as reason:
            raise PackageError(f"{path}: not a whole zip archive ({reason}); {AGAIN}") from None
    return folder


def _unpack_once(archive: ZipFile, entries: dict[str, ZipInfo], sums: bytes, folder: Path, path: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder):
            if _is_there(folder, entries, sums):
                return
            with new_folder(folder) as part, named(part, path):
                for name, entry in entries.items():
                    (part / name).parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(entry) as source, (part / name).open("xb") as target:
                        shutil.copyfileobj(source, target, COPIED)
                Package.open(part)
    except (OSError, FileError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"{folder.parent}: cannot be written ({reason}); set RMSE_EDGE_CACHE to a folder") from None


def _is_there(folder: Path, entries: dict[str, ZipInfo], sums: bytes) -> bool:
    """Whether an archive was unpacked and nobody has cleared away or changed a part of it. Whoever opens the package reads
    every byte.
    """
    there = {name: folder / name for name in entries}
    sizes = all(file.is_file() and file.stat().st_size == entries[name].file_size for name, file in there.items())
    return sizes and (folder / SUMS).read_bytes() == sums


def checked(archive: ZipFile, path: Path) -> dict[str, ZipInfo]:
    """The files of an archive by their names, none of which has been read yet.

    Raises:
        PackageError: an entry is not what a package has.
    """
    if (count := sum(entry.file_size for entry in archive.infolist())) > path.stat().st_size:
        raise PackageError(f"{path}: its entries claim {count} bytes, more than it has itself; {AGAIN}")
    found: dict[str, ZipInfo] = {}
    folded: set[str] = set()  # some file systems take "A" for "a"
    for entry in archive.infolist():
        name = entry.filename.casefold()
        wrong = _wrong_with(entry) or ("occurs twice" if name in folded else "")
        if wrong:
            raise PackageError(f"{path}: {entry.orig_filename!r}: {wrong}; {AGAIN}")
        folded.add(name)
        if not entry.is_dir():
            found[entry.filename] = entry
    for name in (SUMS, MANIFEST):
        if name not in found:
            raise PackageError(f"{path}: holds no {name}, so it is no archive of a package; {AGAIN}")
        if found[name].file_size > LARGEST_JSON:
            raise PackageError(f"{path}: {name}: larger than {LARGEST_JSON >> 20} MiB, which no such file is; {AGAIN}")
    for name in _folders_of(found) & found.keys():
        raise PackageError(f"{path}: {name!r}: is a file and a folder; {AGAIN}")
    return found


def _folders_of(names: Iterable[str]) -> set[str]:
    return {parent.as_posix() for name in names for parent in Path(name).parents}


def _wrong_with(entry: ZipInfo) -> str:
    """Why an entry is none of a package; nothing: it may be."""
    name = entry.orig_filename
    parts = name.removesuffix("/").split("/")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if len(name) > LONGEST_NAME or not name.isprintable():
        return "no name of a file"
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or ":" in name:
        return "leaves the folder it is unpacked in"
    if kind not in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG):
        return "is neither a file nor a folder"
    if entry.flag_bits & ENCRYPTED:
        return "is encrypted"
    if entry.compress_type != ZIP_STORED or entry.compress_size != entry.file_size:
        return "is compressed, expected stored (zip -0)"
    if entry.is_dir() and entry.file_size:
        return "is a folder with content"
    return ""
