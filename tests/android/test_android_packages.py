"""What the core opens and unpacks: a package as it was exported, and nothing else; one line says what is wrong."""

from __future__ import annotations

import io
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from architectures import CASES, TEXTS
from conftest import made_package
from helpers import reseal
from kotlin_core import Core

from rmse_edge.archive import pack
from rmse_edge.package import MANIFEST, SUMS, Package, write_sums

pytestmark = [pytest.mark.android, pytest.mark.slow]

GIB = 1 << 30


@pytest.fixture
def copied(package: Path, tmp_path: Path) -> Path:
    return shutil.copytree(package, tmp_path / "copy.rmse")


def test_a_package_is_read_as_python_reads_it(core: Core, package: Path) -> None:
    found, python = core.document("open", package), Package.open(package)
    info = python.manifest["model"]
    assert {name: found[name] for name in ("name", "rules")} == {name: info[name] for name in ("name", "rules")}
    assert (found["nbytes"], found["window"], found["longest"]) == (python.nbytes, 64, None)


# ----------------------------------------------------------------------------------------------------------- packages


def change(what: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda folder: reseal(folder, what)


def target(manifest: dict[str, Any]) -> None:
    manifest["target"] = manifest["model"]["target"] = "coreml"


def flip(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


def edit(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text() + " ")


def garble(name: str, text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(text)


def unreadable(folder: Path) -> None:
    (folder / MANIFEST).write_text("[" * 99)
    write_sums(folder)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another target": (change(target), "copy.rmse: made for coreml, and this app runs packages made for onnx"),
    "a newer format": (change(lambda m: m.update(format_version=3)), "format version 3, and this app reads 2"),
    "something else": (
        change(lambda m: m.update(format="zip")),
        "manifest.json: not the manifest of an rmse-edge package",
    ),
    "a flipped bit": (flip("weights.bin"), "weights.bin: its SHA-256 is not that in SHA256SUMS; the file is damaged"),
    "cut short": (garble("weights.bin", b"short"), "weights.bin: 5 bytes, the manifest says "),
    "a missing file": (lambda folder: (folder / "loop.onnx").unlink(), "loop.onnx: missing from the package"),
    "one too many": (lambda folder: (folder / "x").touch(), "x: not listed in the package's SHA256SUMS"),
    "an edited manifest": (edit, "manifest.json: was edited after the export"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json: missing; "),
    "no list": (lambda folder: (folder / SUMS).unlink(), "SHA256SUMS: missing; "),
    "a list of nothing": (garble(SUMS, b"x\n"), "SHA256SUMS: line 1: no hash and name of a file"),
    "a list that is no text": (garble(SUMS, b"\xff"), "SHA256SUMS: not a list of hashes (not UTF-8)"),
    "nested too deeply": (unreadable, "manifest.json: not readable as JSON (nested more than 32 deep)"),
    "an unknown state": (
        change(lambda m: next(iter(m["model"]["state"].values())).update(kind="whirl")),
        'kind: got "whirl", expected one of ring, append, replace, written',
    ),
    "a number that is none": (
        change(lambda m: m["model"].update(width="wide")),
        'manifest.json: model.width: got "wide", expected a whole number from 1 to 65536',
    ),
    "a shape that lies": (
        change(lambda m: m["methods"]["loop_1"]["inputs"][0]["shape"].append(7)),
        "manifest.json: methods.loop_1.inputs.",
    ),
    "a method that is gone": (change(lambda m: m["methods"].pop("head_64")), "expected head_64 among them"),
    "too much state": (
        change(lambda m: next(iter(m["model"]["state"].values())).update(shape=[4, 1 << 20, 1 << 20, 64])),
        "shape: got [4,1048576,1048576,64], expected the shape of a tensor that fits",
    ),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_bad_package_is_refused_in_one_line(
    core: Core, copied: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(copied)
    line = core.refusal("open", copied)
    assert line.startswith(str(copied)) and said in line


def test_a_graph_that_is_not_as_the_manifest_says_is_refused(core: Core, copied: Path) -> None:
    """One that the engine cannot load at all, too."""
    known = (copied / "head.onnx").read_bytes()
    for content, said in (
        (
            (copied / "coda.onnx" if (copied / "coda.onnx").exists() else copied / "prelude.onnx").read_bytes(),
            "as the graph has",
        ),
        (known[: len(known) // 2], "head.onnx: onnxruntime 1."),
    ):
        (copied / "head.onnx").write_bytes(content)
        reseal(copied)
        line = core.refusal("load", copied)
        assert said in line and "export the package again" in line


BOARDS = [case for case in CASES if case not in TEXTS]


@pytest.mark.onnx
@pytest.mark.parametrize("case", BOARDS[:1], ids=lambda case: case.name)
def test_a_package_of_boards_is_refused_in_one_line(
    core: Core, case: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _, folder = made_package(case, "onnx", "fp32", tmp_path_factory)
    assert "model.text: got a board, expected a model of texts" in core.refusal("open", folder)


# ----------------------------------------------------------------------------------------------------------- archives


@pytest.fixture
def archive(package: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.rmse.zip"
    pack(Package.open(package), path)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The folder that an app keeps its packages in."""
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("room", [(), (8 * GIB,)], ids=["file", "stream"])
def test_an_archive_unpacks_to_the_package(
    core: Core, archive: Path, package: Path, store: Path, room: tuple[int, ...]
) -> None:
    """In place of what was there; what a killed process left is cleared away."""
    for _ in range(2):
        found = core.document("unpack", archive, store, "m", *room)
        assert Path(found["folder"]) == store / "m" and contents(store / "m") == contents(package)
        (store / "m" / "old").touch()
    (store / ".unpacking-7" / "files").mkdir(parents=True)
    core.document("unpack", archive, store, "m", *room)
    assert [p.name for p in store.iterdir()] == ["m"]


def rezip(path: Path, edit: Callable[[dict[str, bytes]], object], kind: int = zipfile.ZIP_STORED) -> None:
    """Write an archive anew with other entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    edit(entries)
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data, kind)


def with_entry(name: str, data: bytes = b"x") -> Callable[[Path], object]:
    """Before all others, so that it is there before anything is known."""
    return lambda path: rezip(path, partial(_first, name, data))


def _first(name: str, data: bytes, entries: dict[str, bytes]) -> None:
    others = dict(entries)
    entries.clear()
    entries.update({name: data} | others)


def link(path: Path) -> None:
    """An entry that many programs would make a link of, to a file outside."""
    entry = zipfile.ZipInfo("weights.bin")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist() if name != entry.filename}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        archive.writestr(entry, "/etc/passwd")


def twice(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("Weights.bin", b"other")


def zeros(path: Path) -> None:
    """Ten GB of zeros, deflated to ten MB."""
    piece = zlib.compressobj(9, wbits=-15)
    block = piece.compress(bytes(GIB // 16)) + piece.flush(zlib.Z_FULL_FLUSH)  # which may be repeated
    data = block * 160 + piece.flush()
    name, size = b"weights.bin", 10 * GIB
    extra = struct.pack("<HHQQ", 1, 16, size, len(data))  # zip64
    head = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 45, 0, 8, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), len(extra))
    with path.open("wb") as file:
        file.write(head + name + extra + data)


def stored_zeros(path: Path) -> None:
    """Ten GB of zeros as they are, in a file with a hole."""
    index = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(index) as archive:
        small = {name: archive.read(name) for name in (SUMS, MANIFEST)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in small.items():
            archive.writestr(name, content)
    cut = path.read_bytes()
    cut = cut[: cut.index(b"PK\x01\x02")]
    name, size = b"weights.bin", 10 * GIB
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    head = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), len(extra))
    with path.open("wb") as file:
        file.write(cut + head + name + extra)
        file.truncate(len(cut) + len(head) + len(name) + len(extra) + size)


def claimed_zeros(path: Path) -> None:
    """A manifest that asks for them."""
    with zipfile.ZipFile(path) as archive:
        folder = path.with_name("claims")
        archive.extractall(folder)
    reseal(folder, lambda m: m["sizes"].update({"weights.bin": 10 * GIB}))
    rezip(path, lambda entries: entries.update({name: (folder / name).read_bytes() for name in (SUMS, MANIFEST)}))


def sealed(what: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        folder = path.with_name("changed")
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        reseal(folder, what)
        rezip(path, lambda entries: entries.update({name: (folder / name).read_bytes() for name in (SUMS, MANIFEST)}))

    return edit


def cut(keep: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def damaged(entries: dict[str, bytes]) -> None:
    entries["weights.bin"] = bytes(len(entries["weights.bin"]))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "up": (with_entry("../evil"), "../evil: leaves the folder it is unpacked in"),
    "up from within": (with_entry("a/../../evil"), "leaves the folder"),
    "absolute": (with_entry("/tmp/evil"), "leaves the folder"),
    "a drive": (with_entry("C:evil"), "leaves the folder"),
    "a long name": (with_entry("x" * 300), "no name of a file"),
    "a link": (link, "weights.bin: 11 bytes, the manifest says "),
    "twice": (twice, "Weights.bin: occurs twice"),
    "10 GB, deflated": (zeros, "weights.bin: is compressed, expected stored"),
    "10 GB, stored": (stored_zeros, "weights.bin: larger than the "),
    "10 GB, claimed": (claimed_zeros, f"and {8 * GIB} are free here; free some space"),
    "deflated": (lambda path: rezip(path, lambda _: None, zipfile.ZIP_DEFLATED), "is compressed, expected stored"),
    "cut in half": (cut(0.5), "not a whole zip archive"),
    "cut in its first entry": (cut(0.001), "not a whole zip archive"),
    "empty": (cut(0), "not a zip archive of a package"),
    "no zip": (lambda path: path.write_bytes(b"hello" * 99), "not a zip archive of a package"),
    "no package": (lambda path: rezip(path, lambda entries: entries.pop(MANIFEST)), "not a zip archive of a package"),
    "one file less": (lambda path: rezip(path, lambda entries: entries.pop("loop.onnx")), "loop.onnx: missing"),
    "one too many": (lambda path: rezip(path, lambda e: e.update(x=b"x")), "x: not listed in the package's SHA256SUMS"),
    "other content": (lambda path: rezip(path, damaged), "weights.bin: its SHA-256 is not that in SHA256SUMS"),
    "another target": (sealed(target), "made for coreml, and this app runs packages made for onnx"),
    "a newer format": (sealed(lambda m: m.update(format_version=3)), "format version 3, and this app reads 2"),
}


@pytest.mark.parametrize(("damage", "said"), BAD.values(), ids=BAD)
def test_a_bad_archive_leaves_nothing_behind(
    core: Core, archive: Path, store: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    """And the package that it would have replaced stays."""
    (store / "m").mkdir()
    (store / "m" / "kept").touch()
    damage(archive)
    before = {p for p in tmp_path.rglob("*")}
    line = core.refusal("unpack", archive, store, "m", 8 * GIB)
    assert line.startswith(f"{archive}: ") or line.startswith(f"{archive}/")
    assert said in line
    assert {p for p in tmp_path.rglob("*")} == before and not Path("/tmp/evil").exists()


def test_an_archive_that_does_not_fit_is_refused(core: Core, archive: Path, store: Path) -> None:
    line = core.refusal("unpack", archive, store, "m", 1000)
    assert "free" in line and [*store.iterdir()] == []
    assert core.document("unpack", archive, store, "m")["name"] == Package.open(store / "m").manifest["model"]["name"]
