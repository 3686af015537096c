"""A package: the folder `NAME.rmse/` that an export leaves and a runtime loads.

`manifest.json` names every other file with its size and SHA-256, and carries the SHA-256 of its own canonical form. A
loader checks all of it before any runtime sees a byte: some runtimes abort the process on damaged input, others compute
with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import ExportError, PackageError
from .files import check_folder, digest_file, kind_of, new_folder, tidy
from .schema import Digest, Name, Whole, read_json, validated

T = TypeVar("T")

FORMAT = "rmse-edge package"
FORMAT_VERSION = 1
SUFFIX = ".rmse"
MANIFEST = "manifest.json"
AGAIN = "export the package again"


@dataclass(frozen=True)
class Entry:
    """What the manifest says about a file."""

    bytes: Whole
    sha256: Digest


def digest_manifest(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest's canonical JSON: sorted keys, no white space, without its own `sha256`."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Package:
    """A verified package on disk. Make one with `Package.open`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | Path) -> Package:
        """Read and verify a package: format, its own hash, no file missing, changed, or unlisted.

        Raises:
            PackageError: one line saying what is wrong with which file, and what to do.
        """
        folder = Path(folder)
        if not folder.is_dir():
            with suppress(OSError):
                tidy(folder)  # a process may have been killed that was replacing it
        if not folder.is_dir():
            what = f"is {kind_of(folder)}, expected a package folder" if folder.exists() else "no such package folder"
            raise PackageError(f"{folder}: {what}; make one with rmse-export")
        package = cls(folder, _read_manifest(folder))
        package.section(Name, "target")
        listed = package.section(dict[str, Entry], "files")
        present = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()} - {MANIFEST}
        for name in sorted(set(listed) - present):
            raise PackageError(f"{folder / name}: missing from the package; export it again")
        for name in sorted(present - set(listed)):
            raise PackageError(f"{folder / name}: not listed in the package's manifest; remove it or export again")
        for name, entry in listed.items():
            path = folder / name
            size = path.stat().st_size
            if size != entry.bytes:
                how = "truncated" if size < entry.bytes else "written to since"
                raise PackageError(f"{path}: {size} bytes, the manifest says {entry.bytes}; {how}? export again")
            if digest_file(path) != entry.sha256:
                raise PackageError(f"{path}: its SHA-256 is not the manifest's; the file is damaged, export again")
        return package

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
        """Bytes of all files, the manifest included."""
        return sum(f["bytes"] for f in self.manifest["files"].values()) + (self.folder / MANIFEST).stat().st_size

    def path(self, name: str) -> Path:
        """The path of a listed file.

        Raises:
            PackageError: the manifest lists no such file.
        """
        if name not in self.manifest["files"]:
            raise PackageError(
                f"{self.folder}: the package holds no {name}; it has {', '.join(self.manifest['files'])}"
            )
        return self.folder / name

    def folder_of(self, name: str) -> Path:
        """The path of a folder that listed files lie in.

        Raises:
            PackageError: the manifest lists none in such a folder.
        """
        if not any(file.startswith(f"{name}/") for file in self.manifest["files"]):
            raise PackageError(f"{self.folder}: the package holds no folder {name}; {AGAIN}")
        return self.folder / name


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = read_json(path, PackageError, AGAIN)
    except FileNotFoundError:
        raise PackageError(f"{path}: missing; {folder} is not a package") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PackageError(f"{path}: not the manifest of an {FORMAT}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise PackageError(
            f"{path}: format version {manifest.get('format_version')!r}, this rmse-edge reads {FORMAT_VERSION}; "
            "export the package again"
        )
    if not isinstance(manifest.get("files"), dict) or manifest.get("sha256") != digest_manifest(manifest):
        raise PackageError(f"{path}: was edited after the export (its own SHA-256 does not fit); export again")
    return manifest


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
        raise ExportError(f"{destination}: exists and is not a package; choose another -o")
    if destination.exists() and not overwrite:
        raise ExportError(f"{destination}: already exists; remove it, choose another -o, or pass --force")


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


def seal(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Complete `manifest` with every file's size and hash and its own hash, and write it into `folder`."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest_file(path)}
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest, "files": files}
    manifest["sha256"] = digest_manifest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest
