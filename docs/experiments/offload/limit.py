"""Run a command under a hard limit of memory, in a cgroup of its own, v1 or v2: everything counts, cached pages of files too.

    sudo python docs/experiments/offload/limit.py 300M build/native/rmse-runner wide.rmse -p "ROMEO:" --expert-ram 200M

What the system has cached of a file before would not count, since its pages belong to whoever read them first: of a package that the
command names, it is dropped. The last line on stderr says how much the command took at most. Ends as the command does; with 77
where no cgroup can be made here, and says why.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CANNOT = 77
ROOT = Path("/sys/fs/cgroup")


class NoCgroup(Exception):
    """Why none can be made."""


class Limited:
    """A cgroup with a limit; removed at the end of the block, when no process is in it any more."""

    def __init__(self, limit: int) -> None:
        v1, v2 = (
            ROOT / "memory",
            next((p for p in (ROOT, ROOT / "unified") if (p / "cgroup.controllers").is_file()), None),
        )
        self.second = not (v1 / "memory.limit_in_bytes").is_file()
        if self.second:
            if v2 is None or "memory" not in (v2 / "cgroup.controllers").read_text().split():
                raise NoCgroup("no hierarchy of cgroups limits memory here")
            if "memory" not in (v2 / "cgroup.subtree_control").read_text().split():
                raise NoCgroup(f"{v2}/cgroup.subtree_control does not hand memory down")
        self.folder = (v2 if self.second and v2 else within(v1)) / f"rmse-edge-{os.getpid()}"
        try:
            self.folder.mkdir()
            self._write("memory.max" if self.second else "memory.limit_in_bytes", limit)
            if self.second and (self.folder / "memory.swap.max").is_file():
                self._write("memory.swap.max", 0)
        except OSError as error:
            raise NoCgroup(f"{self.folder}: {error.strerror}") from None

    def __enter__(self) -> Limited:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.rmdir()

    def command(self, *words: str) -> list[str]:
        """`words` as a command that enters the cgroup first."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *words]

    def peak(self) -> int:
        """Bytes at most so far."""
        return int((self.folder / ("memory.peak" if self.second else "memory.max_usage_in_bytes")).read_text())

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))


def forget(folder: Path) -> None:
    """Drop what the system has cached of the files of a folder."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def within(v1: Path) -> Path:
    """The cgroup that this process is in, so that what limits it goes on to do so."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") and (v1 / path.lstrip("/")).is_dir():
            return v1 / path.lstrip("/")
    return v1


def size(text: str) -> int:
    """Bytes of 300M, 2G."""
    power = "KMG".find(text[-1]) + 1
    return int(float(text[:-1] if power else text) * 1024**power)


def main() -> int:
    limit, *words = sys.argv[1:]
    for package in (Path(word) for word in words if word.endswith(".rmse")):
        forget(package)
    try:
        with Limited(size(limit)) as group:
            code = subprocess.run(group.command(*words)).returncode
            print(f"at most {group.peak() / 2**20:.1f} of {size(limit) / 2**20:.1f} MiB", file=sys.stderr)
    except NoCgroup as reason:
        print(f"no cgroup: {reason}", file=sys.stderr)
        return CANNOT
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
