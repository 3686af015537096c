"""A package: the folder `NAME.rmse/` that an export leaves and a runtime loads.

`SHA256SUMS` lists every other file of it with its SHA-256, `manifest.json` included, as coreutils writes such lists:
`sha256sum -c SHA256SUMS` in the folder checks a package without this project. A loader checks all of it before any
runtime sees a byte: some runtimes abort the process on damaged input, others compute with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from .cache import unpacked_packages
from .errors import ExportError, PackageError
from .files import Digests, check_folder, kind_of, new_folder, tidy
from .parts import PARTS, Parts, hashed
from .schema import Name, Whole, read_bytes, read_json, validated

T = TypeVar("T")

FORMAT = "rmse-edge package"
FORMAT_VERSION = 2  # 2: SHA256SUMS; in 1 the manifest had the hashes, its own among them
SUFFIX = ".rmse"
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")  # a line of it: hash, mode (text or binary: all the same here), name
AGAIN = "export the package again"


class Package:
    """A verified package on disk. Make one with `Package.open`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], digests: dict[str, str]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.digests = digests  # SHA-256 of every file but SHA256SUMS, by its name

    @classmethod
    def open(cls, folder: str | Path, digests: Digests | None = None) -> Package:
        """Read and verify a package: its format, and that no file is missing, changed, or unlisted.

        Args:
            digests: of whoever writes the package, who need not read again what has not changed.
        Raises:
            PackageError: one line saying what is wrong with which file, and what to do.
        """
        folder, digests = Path(folder), digests or Digests()
        if not folder.is_dir():
            with suppress(OSError):
                tidy(folder)  # a process may have been killed that was replacing it
        if not folder.is_dir():
            what = f"is {kind_of(folder)}, expected a package folder" if folder.exists() else "no such package folder"
            raise PackageError(f"{folder}: {what}; make one with rmse-export")
        manifest = _read_manifest(folder)
        package = cls(folder, manifest, _read_sums(folder))
        if digests.of(folder / MANIFEST) != package.digests[MANIFEST]:
            raise PackageError(
                f"{folder / MANIFEST}: was edited after the export (its SHA-256 is not that in {SUMS}); export again"
            )
        package.section(Name, "target")
        package._check_files(digests)
        return package

    def _check_files(self, digests: Digests) -> None:
        listed, present = self.digests, _files_in(self.folder) - {SUMS}
        for name in sorted(set(listed) - present):
            raise PackageError(f"{self.folder / name}: missing from the package; export it again")
        for name in sorted(present - set(listed)):
            raise PackageError(f"{self.folder / name}: not listed in the package's {SUMS}; remove it or export again")
        sizes = self.section(dict[str, Whole], "sizes")
        parts = self.section(dict[Name, Parts], PARTS) if PARTS in self.manifest else {}
        for name in sorted(set(parts) - set(listed)):
            raise PackageError(
                f"{self.folder / MANIFEST}: {PARTS}.{name}: got a file that is not in the package; {AGAIN}"
            )
        for name, digest in listed.items():
            path = self.folder / name
            if not path.is_file():  # a link to nowhere, a pipe
                raise PackageError(f"{path}: is no file; export the package again")
            size = path.stat().st_size
            if size != sizes.get(name, size):  # known at once, and says more than a hash that differs
                how = "truncated" if size < sizes[name] else "written to since"
                raise PackageError(f"{path}: {size} bytes, the manifest says {sizes[name]}; {how}? {self._mended()}")
            if name in parts and parts[name].nbytes != size:
                got = f"got {parts[name].nbytes} bytes in all, expected {size}"
                raise PackageError(f"{self.folder / MANIFEST}: {PARTS}.{name}.parts: {got}; {AGAIN}")
            if digests.of(path) != digest or (name in parts and parts[name].sha256 != digest):
                raise PackageError(f"{path}: its SHA-256 is not that in {SUMS}; the file is damaged, {self._mended()}")

    def _mended(self) -> str:
        """What to do about a file that is not the one that was exported: an archive that was unpacked is whole itself."""
        if self.folder.absolute().parent == unpacked_packages().absolute():
            return f"remove {self.folder}, and the archive is unpacked again"
        return "export again"

    def section(self, kind: type[T], name: str) -> T:
        """A part of the manifest as an instance of the type `kind`; see `schema.validated`.

        Raises:
            PackageError: it is not there, or a value in it does not fit; names the field.
        """
        where = str(self.folder / MANIFEST)
        if name not in self.manifest:
            raise PackageError(f"{where}: {name}: is missing; {AGAIN}")
        return validated(kind, self.manifest[name], where, PackageError, AGAIN, name)

    @property
    def target(self) -> str:
        return self.manifest["target"]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum((self.folder / name).stat().st_size for name in (*self.digests, SUMS))

    def path(self, name: str) -> Path:
        """The path of a listed file.

        Raises:
            PackageError: the package lists no such file.
        """
        if name not in self.digests:
            raise PackageError(f"{self.folder}: the package holds no {name}; it has {', '.join(self.digests)}")
        return self.folder / name

    def folder_of(self, name: str) -> Path:
        """The path of a folder that listed files lie in.

        Raises:
            PackageError: the package lists none in such a folder.
        """
        if not any(file.startswith(f"{name}/") for file in self.digests):
            raise PackageError(f"{self.folder}: the package holds no folder {name}; {AGAIN}")
        return self.folder / name


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Of any version: an older one had no SHA256SUMS, and is to be refused as what it is."""
    path = folder / MANIFEST
    if not path.is_file():  # nor is a pipe, at which reading would wait
        raise PackageError(f"{path}: missing; {folder} is not a package")
    manifest = read_json(path, PackageError, AGAIN)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PackageError(f"{path}: not the manifest of an {FORMAT}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise PackageError(
            f"{path}: format version {manifest.get('format_version')!r}, this rmse-edge reads {FORMAT_VERSION}; "
            "export the package again with this version"
        )
    return manifest


def _read_sums(folder: Path) -> dict[str, str]:
    """Hashes by the names of their files, which may be any: whoever opens one looks for it in the folder first."""
    path = folder / SUMS
    digests: dict[str, str] = {}
    if not path.is_file():
        raise PackageError(f"{path}: missing from the package; export it again")
    try:
        lines = read_bytes(path, PackageError, AGAIN).decode("utf-8").split("\n")
    except UnicodeDecodeError as reason:
        raise PackageError(f"{path}: not a list of hashes ({reason}); {AGAIN}") from None
    for number, line in enumerate(lines, 1):
        if not line and number == len(lines):
            break
        found = SUM.fullmatch(line)
        if found is None or not found[2].isprintable() or found[2] in digests:
            what = "the same file again" if found and found[2] in digests else "no hash and name of a file"
            raise PackageError(f"{path}: line {number}: {what}; {AGAIN}")
        digests[found[2]] = found[1]
    if MANIFEST not in digests:
        raise PackageError(f"{path}: lists no {MANIFEST}; {AGAIN}")
    return digests


def _files_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


def check_destination(destination: Path, overwrite: bool) -> None:
    """Fail unless a package may be written to `destination`.

    Raises:
        ExportError: it is in the way and is not a package, or may not be replaced, or its parent does not exist.
    """
    if not destination.absolute().parent.is_dir():
        raise ExportError(f"{destination.absolute().parent}: no such folder to write {destination.name} into")
    tidy(destination)
    check_folder(destination, ExportError)
    empty = destination.is_dir() and not any(destination.iterdir())
    if destination.exists() and not empty and not (destination / MANIFEST).is_file():
        raise ExportError(f"{destination}: exists and is not a package; choose another place")
    if destination.exists() and not overwrite:
        raise ExportError(f"{destination}: already exists; remove it, choose another place, or pass overwrite=True")


@contextmanager
def writing(destination: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that becomes the package `destination` when the block ends well, and vanishes when it does not.

    A package that is replaced stays whole until the new one stands in its place; see `files.new_folder`.

    Raises:
        ExportError: `destination` is in the way and is not a package, its parent does not exist, or the disk is full.
    """
    destination = Path(destination)
    check_destination(destination, overwrite)
    with new_folder(destination, ExportError) as folder:
        yield folder


def seal(folder: Path, manifest: dict[str, Any], digests: Digests | None = None) -> dict[str, Any]:
    """Write `manifest` into `folder`, with the format and every file's size, and then `SHA256SUMS`. Returns what it wrote.

    Args:
        manifest: under "parts", how files are cut; their hashes are put in here. A file of another size has no parts any more.
        digests: to be kept where a package is sealed more than once.
    """
    digests = digests or Digests()
    sizes = {name: (folder / name).stat().st_size for name in sorted(_files_in(folder) - {MANIFEST, SUMS})}
    sealed: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION} | manifest | {"sizes": sizes}
    if PARTS in sealed:
        sealed[PARTS] = hashed(folder, sealed[PARTS], digests)
    (folder / MANIFEST).write_text(json.dumps(sealed, indent=2) + "\n", encoding="utf-8")
    digests.forget(folder / MANIFEST)
    write_sums(folder, digests)
    return sealed


def write_sums(folder: Path, digests: Digests | None = None) -> None:
    """List all files that are in `folder` now, with their SHA-256, as coreutils' `sha256sum` does."""
    digests = digests or Digests()
    lines = [f"{digests.of(folder / name)}  {name}\n" for name in sorted(_files_in(folder) - {SUMS})]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
