"""Parts of the app: fetched once, unpacked where they belong, and refused where they are not what parts.lock says."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import assert_one_line

from android_demo.parts import LOCK, main, read_lock
from rmse_edge import registries
from rmse_edge.errors import UserError
from rmse_edge.registries import Part, Registry, have, source_stanzas


def tgz(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
    return data.getvalue()


def wheel(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], Part]:
    """Lets a package manager bring these bytes; gives the part."""

    def serve(registry: str, content: bytes) -> Part:
        name = {"npm": "p-1.tgz", "pypi": "p-1.whl"}[registry]

        def fetch(part: Part, folder: Path) -> None:
            (folder / name).write_bytes(content)

        monkeypatch.setitem(registries.REGISTRIES, registry, Registry(fetch, name))
        return Part("p", registry, "p", "1", hashlib.sha256(content).hexdigest(), "lib/*.jar")

    return serve


@pytest.mark.parametrize(("registry", "make", "top"), [("npm", tgz, "package/"), ("pypi", wheel, "")])
def test_what_is_wanted_of_a_part_is_unpacked(
    registry: str, make: Callable[..., bytes], top: str, served: Callable[..., Part], tmp_path: Path
) -> None:
    part = served(registry, make({f"{top}lib/a.jar": b"a", f"{top}lib/a.txt": b"b", f"{top}c.jar": b"c"}))
    folder = have(part, tmp_path)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {"lib/a.jar", ".sha256"}
    served(registry, b"what is there is not fetched again")
    assert have(part, tmp_path) == folder and (folder / "lib/a.jar").read_bytes() == b"a"
    assert registry == "pypi" or (folder / "lib/a.jar").stat().st_mode & 0o100  # programs stay programs


def test_a_part_of_another_version_takes_its_place(served: Callable[..., Part], tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = have(served("npm", tgz({f"package/lib/{name}.jar": b""})), tmp_path)
        assert [p.name for p in folder.rglob("*.jar")] == [f"{name}.jar"]


def test_another_file_than_the_locked_one_is_refused(served: Callable[..., Part], tmp_path: Path) -> None:
    part = replace(served("npm", tgz({"package/lib/a.jar": b"a"})), sha256="0" * 64)
    with pytest.raises(UserError) as caught:
        have(part, tmp_path)
    assert_one_line(str(caught.value), "p 1: its SHA-256 is", "parts.lock says 0000")
    assert [p.name for p in tmp_path.iterdir()] == ["p.lock"]


def test_a_part_cannot_leave_its_folder(served: Callable[..., Part], tmp_path: Path) -> None:
    part = replace(served("npm", tgz({"package/../../../outside.jar": b"a"})), wanted="*")
    with pytest.raises(tarfile.OutsideDestinationError):
        have(part, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["p.lock"]


def test_a_package_manager_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for command, said in (
        (["no-such-command"], "no-such-command: not found"),
        (["sh", "-c", "echo one >&2; echo two >&2; exit 1"], "sh -c: two"),
    ):
        registry = Registry(lambda part, folder, command=command: registries.run(command, folder), "*")  # type: ignore[misc]
        monkeypatch.setitem(registries.REGISTRIES, "npm", registry)
        with pytest.raises(UserError) as caught:
            have(Part("p", "npm", "p", "1", "", "*"), tmp_path)
        assert_one_line(str(caught.value), said)


def test_the_lock_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    locked = read_lock()
    assert {part.registry for part in locked.values()} == set(registries.REGISTRIES)
    assert all(len(part.sha256) == 64 for part in locked.values())
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    assert lines == [part.line() for part in locked.values()]
    assert main(["no-such-part"]) == 2
    assert_one_line(capsys.readouterr().err, "no-such-part: no such part, expected some of kotlin")


def test_sources_are_listed_where_packages_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "list").write_text("deb mirror:/debian bookworm main\ndeb-src x y z\n# deb a b debian\n")
    (tmp_path / "d" / "a.sources").write_text(
        "Types: deb\nURIs: mirror:/debian\nSuites: a b\n\nTypes: deb\nURIs: mirror:/other\nSuites: c\n"
    )
    monkeypatch.setattr(registries, "APT_SOURCES", (tmp_path / "list", tmp_path / "d"))
    first, second = source_stanzas()
    assert first == "Types: deb-src\nURIs: mirror:/debian\nSuites: bookworm\nComponents: main\n"
    assert second == "Types: deb-src\nURIs: mirror:/debian\nSuites: a b\n"
