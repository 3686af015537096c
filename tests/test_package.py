"""Package folders: nothing damaged, edited or foreign reaches a runtime, and nothing half-written takes a package's place."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_one_line, reseal

from rmse_edge import files
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import ExportError, PackageError, UserError
from rmse_edge.package import MANIFEST, SUMS, Package, seal, write_sums, writing
from rmse_edge.runtimes import open_runtime


@pytest.fixture
def copied(package: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(package, tmp_path / "tiny.rmse")
    return tmp_path / "tiny.rmse"


def test_a_whole_package_opens_and_speaks(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The damage below is what makes the difference: untouched, the same copy runs."""
    opened = Package.open(copied)
    assert opened.target == "onnx" and opened.nbytes == sum(p.stat().st_size for p in copied.iterdir())
    assert opened.path("weights.bin").is_file()
    with pytest.raises(PackageError, match="the package holds no other"):
        opened.path("other.bin")
    assert rmse_run([str(copied), "-p", "HELLO", "-n", "3", "-o", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 3


def test_who_writes_a_package_reads_its_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is sealed and opened, and wherever it is moved; a file that is written to is read again."""
    read, true = [], files.digest_file
    monkeypatch.setattr(files, "digest_file", lambda path: read.append(path.name) or true(path))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "weights").write_bytes(bytes(100))
    digests = files.Digests()
    for target in ("here", "hare"):  # manifests of one size, within a tick of the clock
        seal(tmp_path / "new", {"target": target}, digests)
        assert Package.open(tmp_path / "new", digests).target == target
    (tmp_path / "new").rename(tmp_path / "old")
    Package.open(tmp_path / "old", digests)
    assert read == ["manifest.json", "weights", "manifest.json"]
    Package.open(tmp_path / "old")  # as anyone else does
    (tmp_path / "old" / "weights").write_bytes(bytes(99) + b"!")
    with pytest.raises(PackageError, match="weights: its SHA-256"):
        Package.open(tmp_path / "old", digests)


# ------------------------------------------------------------------------------------------------------ damage


def edit(change: Callable[[dict[str, Any]], Any], sign: bool = False) -> Callable[[Path], None]:
    """Change the manifest; `sign` gives it the hash that fits again, as another version of this project would."""

    def damage(folder: Path) -> None:
        sums = (folder / SUMS).read_bytes()
        reseal(folder, change)
        if not sign:
            (folder / SUMS).write_bytes(sums)

    return damage


def edit_sums(change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / SUMS).write_text(change((folder / SUMS).read_text()))


def as_format_1(folder: Path) -> None:
    """As earlier versions of this project made packages: the manifest had the hashes, its own among them."""
    (folder / SUMS).unlink()
    manifest = json.loads((folder / MANIFEST).read_text()) | {"format_version": 1, "sha256": "0" * 64}
    manifest["files"] = {name: {"bytes": size, "sha256": "0" * 64} for name, size in manifest.pop("sizes").items()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def a_link_to_nowhere(folder: Path) -> None:
    (folder / "head.onnx").unlink()
    (folder / "head.onnx").symlink_to("gone.onnx")


def pipe(name: str) -> Callable[[Path], object]:
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def cut(name: str, count: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - count)


def flip(name: str) -> Callable[[Path], None]:
    """One bit of one byte in the middle."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return damage


def a_file_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def a_folder_instead(folder: Path) -> None:
    (folder / "head.onnx").unlink()
    (folder / "head.onnx").mkdir()


def a_random_file(folder: Path) -> None:
    """Random bytes of the right size: some runtimes would abort the process on them."""
    path = folder / "loop.onnx"
    path.write_bytes(os.urandom(path.stat().st_size))


BAD: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a file": (a_file_instead, ["is a file, expected a package folder"]),
    "an empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), ["manifest.json: missing"]),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), ["manifest.json: missing"]),
    "no graph": (lambda f: (f / "loop.onnx").unlink(), ["loop.onnx: missing from the package"]),
    "no weights": (lambda f: (f / "weights.bin").unlink(), ["weights.bin: missing from the package"]),
    "a folder for a file": (a_folder_instead, ["head.onnx: missing from the package"]),
    "truncated weights": (cut("weights.bin", 4096), ["weights.bin", "truncated"]),
    "truncated by a byte": (cut("step.onnx", 1), ["step.onnx", "truncated"]),
    "an empty graph": (lambda f: (f / "prelude.onnx").write_bytes(b""), ["prelude.onnx: 0 bytes"]),
    "one flipped bit": (flip("weights.bin"), ["weights.bin", "SHA-256", "damaged"]),
    "random bytes": (a_random_file, ["loop.onnx", "SHA-256", "damaged"]),
    "an unlisted file": (lambda f: (f / "notes.txt").write_text("x"), ["notes.txt: not listed"]),
    "an unlisted file below": (
        lambda f: ((f / "more").mkdir(), (f / "more" / "lib.so").write_text("x")),
        ["lib.so: not listed"],
    ),
    "an edited dial": (edit(lambda m: m["model"]["dials"].update(exit_threshold=0.1)), ["manifest.json: was edited"]),
    "an edited size": (edit(lambda m: m["sizes"].update({"weights.bin": 1})), ["manifest.json: was edited"]),
    "no sizes": (edit(lambda m: m.pop("sizes"), sign=True), ["manifest.json: sizes: is missing"]),
    "a link to nowhere": (a_link_to_nowhere, ["head.onnx: is no file"]),
    "a pipe": (pipe("head.onnx"), ["head.onnx: is no file"]),
    "a pipe for a manifest": (pipe(MANIFEST), ["manifest.json: missing"]),
    "a pipe for a list": (pipe(SUMS), ["SHA256SUMS: missing from the package"]),
    "no list of hashes": (lambda f: (f / SUMS).unlink(), ["SHA256SUMS: missing from the package"]),
    "an empty list": (edit_sums(lambda s: ""), ["SHA256SUMS: lists no manifest.json"]),
    "a list that is cut": (cut(SUMS, 78), ["weights.bin: not listed in the package's SHA256SUMS"]),
    "a list that ends in a line": (cut(SUMS, 12), ["SHA256SUMS: line 10: no hash and name"]),
    "an edited hash": (edit_sums(lambda s: "0" * 64 + s[64:]), ["its SHA-256 is not that in SHA256SUMS"]),
    "a hash of another kind": (edit_sums(lambda s: s[32:]), ["SHA256SUMS: line 1: no hash and name"]),
    "a file listed twice": (edit_sums(lambda s: s + s.splitlines()[0]), ["SHA256SUMS: line 11: the same file again"]),
    "an empty line": (edit_sums(lambda s: "\n" + s), ["SHA256SUMS: line 1: no hash and name"]),
    "a list that is no text": (lambda f: (f / SUMS).write_bytes(b"\xff\xfe"), ["SHA256SUMS: not a list of hashes"]),
    "a list of itself": (edit_sums(lambda s: f"{s}{'0' * 64}  {SUMS}\n"), ["SHA256SUMS: missing from the package"]),
    "a name that commands terminals": (edit_sums(lambda s: f"{s}{'0' * 64}  \x1b[31m\n"), ["SHA256SUMS: line 11"]),
    "a truncated manifest": (cut(MANIFEST, 30), ["manifest.json: not readable as JSON"]),
    "a manifest of another kind": (lambda f: (f / MANIFEST).write_text("[1, 2]"), ["not the manifest of"]),
    "a manifest that is no text": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), ["not readable as JSON"]),
    "another format": (edit(lambda m: m.update(format="zip"), sign=True), ["not the manifest of"]),
    "format 1": (as_format_1, ["format version 1, this rmse-edge reads 2; export the package again with this version"]),
    "a later version": (edit(lambda m: m.update(format_version=3), sign=True), ["format version 3", "reads 2"]),
    "a file outside": (
        edit_sums(lambda s: f"{s}{'0' * 64}  ../tiny.txt\n"),
        ["tiny.txt: missing from the package"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_package_is_one_line(case: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `Package.open`, by `open_runtime`, and by `rmse-run` with exit code 2 and nothing on stdout."""
    damage, said = BAD[case]
    damage(copied)
    for read in (Package.open, open_runtime):
        with pytest.raises(PackageError) as caught:
            read(copied)
        assert_one_line(str(caught.value), str(copied), *said)
    assert rmse_run([str(copied), "-p", "HELLO", "-n", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, str(copied), *said)


def test_every_file_of_a_package_is_protected(copied: Path) -> None:
    """One flipped bit in any file, graph, weights or text, is noticed and the file named."""
    names = sorted(p.name for p in copied.iterdir() if p.name not in (MANIFEST, SUMS))
    assert len(names) == 9  # six graphs, the weights, the tokenizer, the text sample
    for name in names:
        before = (copied / name).read_bytes()
        flip(name)(copied)
        with pytest.raises(PackageError, match=f"{name}: its SHA-256"):
            Package.open(copied)
        (copied / name).write_bytes(before)
    Package.open(copied)


def test_every_byte_of_the_list_of_hashes_is_protected(copied: Path) -> None:
    """One flipped bit in any of them, and an end anywhere but behind the last line, is noticed on one line."""
    whole = (copied / SUMS).read_bytes()
    changed = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, len(whole), 7)]
    for data in (*changed, *(whole[:count] for count in range(0, len(whole) - 1, 11))):
        (copied / SUMS).write_bytes(data)
        with pytest.raises(PackageError) as caught:
            Package.open(copied)
        assert_one_line(str(caught.value), str(copied))


@pytest.mark.parametrize("text", [lambda m: json.dumps(m), lambda m: json.dumps(m, indent="\t", sort_keys=True)])
def test_a_manifest_may_be_any_json_text(copied: Path, text: Callable[[Any], str]) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(text(manifest))
    write_sums(copied)
    assert Package.open(copied).manifest == manifest


def test_sha256sum_checks_a_package(copied: Path) -> None:
    """coreutils, without this project: all of the package, and what is damaged."""
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    command = ["sha256sum", "--check", "--strict", SUMS]
    done = subprocess.run(command, cwd=copied, capture_output=True, text=True)
    files = {str(p.relative_to(copied)) for p in copied.rglob("*") if p.is_file()} - {SUMS}
    assert done.returncode == 0 and set(done.stdout.splitlines()) == {f"{name}: OK" for name in files}
    flip("weights.bin")(copied)
    done = subprocess.run(command, cwd=copied, capture_output=True, text=True)
    assert done.returncode == 1 and "weights.bin: FAILED" in done.stdout
    # And what coreutils writes is a list as good as ours.
    listed = subprocess.run(["sha256sum", "--binary", *sorted(files)], cwd=copied, capture_output=True, check=True)
    (copied / SUMS).write_bytes(listed.stdout)
    assert set(Package.open(copied).digests) == files


def test_a_package_for_another_engine_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is whole, so it opens, but no runtime is handed what it cannot run."""
    edit(lambda m: m.update(target="litert"), sign=True)(copied)
    assert Package.open(copied).target == "litert"
    with pytest.raises(PackageError) as caught:
        open_runtime(copied)
    assert_one_line(str(caught.value), str(copied), "made for litert", "onnx")
    assert rmse_run([str(copied), "-p", "HELLO"]) == 2
    assert_one_line(capsys.readouterr().err, "made for litert")


def test_a_runtime_that_does_not_fit_is_refused(package: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The package under --runtime torch or a GPU, a checkpoint under --runtime onnx, no folder, an unknown runtime."""
    for path, options, said in (
        (package, {"runtime": "torch"}, "needs a checkpoint folder"),
        (package, {"device": "cuda"}, "runs on the CPU"),
        (package, {"runtime": "tflite"}, "expected one of torch, cuda, onnx"),
        (checkpoint, {"runtime": "onnx"}, "is not a package"),
        (tmp_path / "nowhere.rmse", {}, "no such package"),
        (tmp_path / "nowhere", {}, "no such package or checkpoint folder"),
    ):
        with pytest.raises(UserError) as caught:
            open_runtime(path, **options)
        assert_one_line(str(caught.value), said)


def test_a_graph_that_the_engine_cannot_load_is_one_line(copied: Path) -> None:
    """A package whose hashes fit around a graph that is none: the engine's own error, on one line, with the file."""
    (copied / "loop.onnx").write_bytes(b"\x08\x0d" + b"junk" * 50)
    reseal(copied)
    with pytest.raises(PackageError) as caught:
        runtime = open_runtime(copied)
        runtime.feed([1] * 20, runtime.info.dials)
    assert_one_line(str(caught.value), "loop.onnx: onnxruntime cannot load it")


# ------------------------------------------------------------------------------------------------------- write


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def put(folder: Path, text: str) -> None:
    (folder / "a.bin").write_text(text)
    seal(folder, {"target": "onnx"})


@pytest.mark.parametrize(
    "failure", [RuntimeError("x"), KeyboardInterrupt(), ExportError("x"), OSError(errno.EPERM, "x")]
)
def test_a_failure_leaves_what_was_there(failure: BaseException, tmp_path: Path) -> None:
    """No package where there was none, the old one where there was one, and no scratch folder beside it."""
    with writing(tmp_path / "old.rmse") as folder:
        put(folder, "old")
    before = contents(tmp_path)
    for name in ("new.rmse", "old.rmse"):
        with pytest.raises(type(failure)), writing(tmp_path / name, overwrite=True) as folder:
            put(folder, "half")
            raise failure
        assert contents(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["old.rmse"]


@pytest.mark.parametrize("failure", [OSError(errno.EACCES, "x"), KeyboardInterrupt()])
def test_the_old_package_stands_until_the_new_one_does(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when the last step fails or is interrupted, where two folders cannot change places at once."""
    with writing(tmp_path / "old.rmse") as folder:
        put(folder, "old")
    before = contents(tmp_path)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "old.rmse" and (Path(source) / "a.bin").read_text() == "new":
            raise failure
        rename(source, target)

    monkeypatch.setattr(files, "exchange", lambda a, b: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(type(failure)), writing(tmp_path / "old.rmse", overwrite=True) as folder:
        put(folder, "new")
    assert contents(tmp_path) == before


def test_replacing_a_package_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    with writing(tmp_path / "p.rmse") as folder:
        put(folder, "old")
        (folder / "b.bin").write_text("old only")
        seal(folder, {"target": "onnx"})
    with writing(tmp_path / "p.rmse", overwrite=True) as folder:
        put(folder, "new")
    assert sorted(contents(tmp_path)) == ["p.rmse/SHA256SUMS", "p.rmse/a.bin", "p.rmse/manifest.json"]
    assert (tmp_path / "p.rmse" / "a.bin").read_text() == "new"
    assert (tmp_path / "p.rmse").stat().st_mode & 0o777 == 0o755
    Package.open(tmp_path / "p.rmse")


def test_nothing_but_a_package_is_ever_replaced(tmp_path: Path) -> None:
    """A file, or a folder of something else, stays, whatever was asked for; an empty folder may become a package."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("file", "photos"):
        for overwrite in (False, True):
            with pytest.raises(ExportError) as caught, writing(tmp_path / name, overwrite):
                raise AssertionError("not reached")
            assert_one_line(str(caught.value), name, "is not a package" if name == "photos" else "expected a folder")
    with pytest.raises(ExportError, match="no such folder"), writing(tmp_path / "no" / "p.rmse"):
        raise AssertionError("not reached")
    with writing(tmp_path / "empty", overwrite=True) as folder:
        put(folder, "new")
    Package.open(tmp_path / "empty")
    assert (tmp_path / "file").read_text() == (tmp_path / "photos" / "a.jpg").read_text() == "mine"
