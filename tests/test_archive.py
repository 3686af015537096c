"""Archives of packages: one file holds what the folder holds, and nothing false in it reaches the disk."""

from __future__ import annotations

import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_one_line, reseal

from rmse_edge.archive import is_archive, pack, unpacked
from rmse_edge.cli.bench import main as rmse_bench
from rmse_edge.cli.evaluate import main as rmse_eval
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import ExportError, FileError, PackageError, UserError
from rmse_edge.package import MANIFEST, SUMS, Package, seal, writing
from rmse_edge.runtimes import open_runtime


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, empty."""
    monkeypatch.setenv("RMSE_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A package that nothing runs, with a file in a folder of its own, as Core ML's have."""
    with writing(tmp_path / "small.rmse") as part:
        (part / "weights.bin").write_bytes(bytes(range(256)) * 300)
        (part / "inner").mkdir()
        (part / "inner" / "model.spec").write_text("spec")
        seal(part, {"target": "onnx"})
    return tmp_path / "small.rmse"


@pytest.fixture
def archive(folder: Path) -> Path:
    pack(Package.open(folder), folder.with_name("small.rmse.zip"))
    return folder.with_name("small.rmse.zip")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------------------------- whole


def test_an_archive_holds_what_the_folder_holds(archive: Path, folder: Path) -> None:
    """The list and the manifest first, nothing compressed, nothing of when and where it was made."""
    with zipfile.ZipFile(archive) as found:
        entries = found.infolist()
    assert [entry.filename for entry in entries] == [SUMS, MANIFEST, "inner/model.spec", "weights.bin"]
    assert {(e.compress_type, e.date_time, e.external_attr >> 16) for e in entries} == {
        (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0), stat.S_IFREG | 0o644)
    }
    assert contents(unpacked(archive)) == contents(folder)
    assert unpacked(folder) == folder


def test_the_same_package_gives_the_same_archive(archive: Path, folder: Path) -> None:
    before = archive.read_bytes()
    (folder / "weights.bin").touch()
    pack(Package.open(folder), archive, overwrite=True)
    assert archive.read_bytes() == before


def test_an_archive_is_unpacked_once(archive: Path, cache: Path) -> None:
    """Under whatever name it has; what was cleared away or changed in the cache is unpacked again."""
    first = unpacked(archive)
    assert first.is_relative_to(cache)
    made = (first / "weights.bin").stat().st_ino
    assert unpacked(archive.rename(archive.with_name("other.zip"))) == first
    assert (first / "weights.bin").stat().st_ino == made
    for damage in (lambda: (first / "weights.bin").unlink(), lambda: (first / SUMS).write_text("")):
        damage()
        assert unpacked(archive.with_name("other.zip")) == first
        Package.open(first)


def test_several_may_unpack_at_once(archive: Path, cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(unpacked, [archive] * 8))) == 1
    assert sorted(p.suffix for p in (cache / "packages").iterdir()) == [".lock", ".rmse"]


# --------------------------------------------------------------------------------------------------------------- bad


def rezip(path: Path, change: Callable[[dict[str, Any]], object], kind: int = zipfile.ZIP_STORED) -> None:
    """Write an archive anew with other entries: names, or entries of zipfile's, and their bytes."""
    with zipfile.ZipFile(path) as archive:
        entries: dict[Any, bytes] = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def add(name: str, data: bytes = b"x", mode: int = 0) -> Callable[[Path], object]:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    return lambda path: rezip(path, lambda entries: entries.update({entry: data}))


def without(name: str) -> Callable[[Path], object]:
    return lambda path: rezip(path, lambda entries: entries.pop(name))


def twice(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("weights.bin", b"other")


def cut(keep: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def replace(old: bytes, new: bytes) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new))

    return damage


def zeros(path: Path) -> None:
    """What is some kilobytes as a file and claims to be more."""
    rezip(path, lambda entries: entries.update({"weights.bin": bytes(64 << 20)}), zipfile.ZIP_DEFLATED)


def compressed(path: Path) -> None:
    """By a little: it does not claim to be more than the archive."""
    entry = zipfile.ZipInfo("weights.bin")
    entry.compress_type = zipfile.ZIP_DEFLATED
    rezip(path, lambda entries: entries.update({entry: entries.pop("weights.bin")[:600], "other.bin": bytes(9999)}))


def overlapping(path: Path) -> None:
    """Two names for the same bytes, in the list at the archive's end."""
    with zipfile.ZipFile(path, "a") as archive:
        twin = zipfile.ZipInfo("twin.bin")
        first = archive.getinfo("weights.bin")
        for name in ("CRC", "compress_size", "file_size", "header_offset", "external_attr"):
            setattr(twin, name, getattr(first, name))
        archive.filelist.append(twin)
        archive._didModify = True  # type: ignore[attr-defined]


def claims_more(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        entry = archive.getinfo("weights.bin")
        entry.file_size = entry.compress_size = 10 << 30
        archive._didModify = True  # type: ignore[attr-defined]


BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "cut in its entries": (cut(0.5), ["not a whole zip archive"]),
    "cut in its list": (cut(0.999), ["not a whole zip archive"]),
    "cut after the first bytes": (lambda p: p.write_bytes(p.read_bytes()[:40]), ["not a whole zip archive"]),
    "a flipped bit": (replace(b"\x10\x11\x12", b"\x10\x11\x13"), ["not a whole zip archive", "weights.bin"]),
    "no list of hashes": (without(SUMS), ["holds no SHA256SUMS"]),
    "no manifest": (without(MANIFEST), ["holds no manifest.json"]),
    "another archive": (lambda p: rezip(p, lambda e: (e.clear(), e.update(a=b"x"))), ["no archive of a package"]),
    "a file missing": (without("weights.bin"), ["weights.bin: missing"]),
    "a file more": (add("notes.txt"), ["notes.txt: not listed"]),
    "another file": (lambda p: rezip(p, lambda e: e.update({"weights.bin": b"x"})), ["weights.bin: 1 bytes"]),
    "a file above": (add("../outside"), ["'../outside': leaves the folder"]),
    "a file far above": (add("a/../../outside"), ["leaves the folder"]),
    "an absolute name": (add("/tmp/outside"), ["leaves the folder"]),
    "a name of Windows": (add("..\\outside"), ["leaves the folder"]),
    "a drive of Windows": (add("c:outside"), ["leaves the folder"]),
    "a name that commands terminals": (add("\x1b[31m"), ["no name of a file"]),
    "a long name": (add("n" * 300), ["no name of a file"]),
    "a link": (add("link", b"/etc/passwd", stat.S_IFLNK | 0o777), ["'link': is neither a file nor a folder"]),
    "a device": (add("zero", b"", stat.S_IFCHR | 0o666), ["'zero': is neither a file nor a folder"]),
    "a name twice": (twice, ["'weights.bin': occurs twice"]),
    "a name twice where case does not count": (add("Weights.bin"), ["'Weights.bin': occurs twice"]),
    "a file that is a folder": (add("weights.bin/more"), ["'weights.bin': is a file and a folder"]),
    "compressed": (compressed, ["'weights.bin': is compressed, expected stored"]),
    "64 MiB of zeros": (zeros, ["more than it has itself"]),
    "the same bytes twice": (overlapping, ["more than it has itself"]),
    "10 GB of nothing": (claims_more, ["claim 107374", "more than it has itself"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_archive_is_one_line_and_leaves_nothing(case: str, archive: Path, cache: Path, tmp_path: Path) -> None:
    damage, said = BAD[case]
    damage(archive)
    before = contents(tmp_path)
    for read in (unpacked, open_runtime):
        with pytest.raises(PackageError) as caught:
            read(archive)
        assert_one_line(str(caught.value), str(archive), *said)
    assert {name for name in contents(tmp_path) if not name.endswith(".lock")} == before.keys()


@pytest.mark.parametrize("content", ["", "not a zip"])
def test_what_begins_as_no_archive_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.rmse.zip").write_text(content)
    assert not is_archive(tmp_path / "a.rmse.zip")
    with pytest.raises(UserError) as caught:
        open_runtime(tmp_path / "a.rmse.zip")
    assert_one_line(str(caught.value), "a.rmse.zip: not a whole zip archive")


def test_a_file_damaged_in_the_cache_is_unpacked_again_once_it_is_removed(archive: Path, cache: Path) -> None:
    folder = unpacked(archive)
    content = bytearray((folder / "weights.bin").read_bytes())
    content[7] ^= 1
    (folder / "weights.bin").write_bytes(content)
    with pytest.raises(PackageError) as caught:
        Package.open(unpacked(archive))
    assert_one_line(str(caught.value), f"remove {folder}, and the archive is unpacked again")
    shutil.rmtree(folder)
    Package.open(unpacked(archive))


def test_a_cache_that_cannot_be_written_is_one_line(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RMSE_EDGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(FileError) as caught:
        unpacked(archive)
    assert_one_line(str(caught.value), "cannot be written", "set RMSE_EDGE_CACHE")


def test_only_an_archive_is_replaced(archive: Path, folder: Path, tmp_path: Path) -> None:
    package = Package.open(folder)
    with pytest.raises(ExportError, match="already exists"):
        pack(package, archive)
    (tmp_path / "photo.rmse.zip").write_text("a photo")
    for path, said in (
        (tmp_path / "photo.rmse.zip", "is not an archive"),
        (tmp_path / "small.rmse", "expected NAME.rmse.zip"),
    ):
        with pytest.raises(ExportError, match=said):
            pack(package, path, overwrite=True)


# ---------------------------------------------------------------------------------------------------- real packages


@pytest.mark.parametrize(
    "fixture",
    [
        "package",
        pytest.param("executorch_package", marks=pytest.mark.executorch),  # which others have made there
        pytest.param("coreml_package", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.slow
def test_packages_of_every_target_survive(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(fixture)
    pack(Package.open(folder), tmp_path / "p.rmse.zip")
    assert contents(unpacked(tmp_path / "p.rmse.zip")) == contents(folder)


def test_commands_take_archives(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "tiny.rmse.zip"
    pack(Package.open(package), archive)
    said = []
    for model in (package, archive):
        assert rmse_run([str(model), "-p", "HELLO", "-n", "9", "--seed", "1", "-o", "json"]) == 0
        run = json.loads(capsys.readouterr().out)
        assert rmse_eval([str(model), "--max-tokens", "64", "-o", "json"]) == 0
        evaluated = json.loads(capsys.readouterr().out)
        said.append((run["model"], run["tokens"], run["depth"], evaluated["loss"]))
    assert said[0] == said[1]
    assert rmse_bench([str(archive), "-p", "8", "-n", "4", "-r", "1", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]
    assert rmse_eval([str(archive), "--sweep", "--store"]) == 2
    assert_one_line(capsys.readouterr().err, "--store", "is an archive")


def test_a_false_package_in_a_whole_archive_is_refused(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its hashes fit; what the manifest says does not."""
    false = shutil.copytree(package, tmp_path / "false.rmse")
    reseal(false, lambda manifest: manifest.update(target="litert"))
    pack(Package.open(false), tmp_path / "false.rmse.zip")
    assert rmse_run([str(tmp_path / "false.rmse.zip"), "-p", "A"]) == 2
    assert_one_line(capsys.readouterr().err, "made for litert")


@pytest.mark.onnx
@pytest.mark.slow
def test_export_writes_archives(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file, and nothing beside it; refused before anything is computed where something is in the way."""
    archive = tmp_path / "tiny.rmse.zip"
    command = ["-m", str(checkpoint), "-o", str(archive), "--archive"]
    assert rmse_export(command) == 0
    assert f"{archive}: {archive.stat().st_size:,} bytes" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["tiny.rmse.zip"]
    runtime = open_runtime(archive)
    assert runtime.info.name == "tiny" and len(runtime.feed([1, 2, 3], runtime.info.dials).depth) == 3
    for flags, said in (
        (command, "already exists; remove it, choose another place, or pass --force"),
        ([*command[:3], str(tmp_path / "tiny.rmse"), "--archive"], "expected NAME.rmse.zip"),
        ([*command[:3], str(archive)], "add --archive"),
    ):
        assert rmse_export(flags) == 2
        assert_one_line(capsys.readouterr().err, said)
