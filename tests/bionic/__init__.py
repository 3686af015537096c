"""Android's native libraries on Linux, unchanged to the last byte.

They bind to functions of Android's C library (bionic) by name and version, `malloc@LIBC`. Here a library of the names that they ask for
(libc.so, libm.so, liblog.so ...) has these: a jump to glibc's function of the name, or where the two differ, what differs.c says.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

DIFFERS = Path(__file__).with_name("differs.c")
VERSION = "LIBC"  # of bionic's functions
NAMES = ("libc.so", "libm.so", "libdl.so", "liblog.so", "libandroid.so")
JUMP = {"aarch64": "b {}", "x86_64": "jmp {}@PLT"}  # keeps all arguments where they are
SYMBOL = re.compile(rf"^ +\d+: \w+ +\d+ +(\w+) +\w+ +\w+ +UND (\w+)@{VERSION}\b", re.MULTILINE)


def make_libraries(libraries: Iterable[Path], folder: Path, processor: str, prefix: str = "") -> None:
    """Put into `folder` what `libraries` ask for, under all of `NAMES`.

    Args:
        processor: of `JUMP`.
        prefix: of the compiler's tools, as "aarch64-linux-gnu-".
    """
    asked = dict(found for library in libraries for found in _asked(library, f"{prefix}readelf"))
    differ = set(re.findall(r"\bbionic_(\w+)", DIFFERS.read_text()))
    code = folder / "bionic.c"
    lines = "".join(_lines(asked, differ, JUMP[processor]))
    code.write_text(
        f'#include "{DIFFERS}"\n' + "".join(f"__asm__({json.dumps(line)});\n" for line in lines.splitlines())
    )
    versions = folder / "bionic.versions"
    versions.write_text(f"{VERSION} {{ global: __android_log_*; android_set_abort_message; }};\n")
    how = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-fPIC", "-shared"]
    linked = [f"-Wl,-z,defs,-soname,{NAMES[0]},--version-script={versions}", str(code), "-lm"]
    _run([f"{prefix}gcc", *how, "-o", str(folder / NAMES[0]), *linked])
    for name in NAMES[1:]:
        (folder / name).symlink_to(NAMES[0])


def _asked(library: Path, readelf: str) -> Iterator[tuple[str, str]]:
    """Names and kinds (FUNC, OBJECT) of what a library wants of bionic."""
    for kind, name in SYMBOL.findall(_run([readelf, "--wide", "--dyn-syms", str(library)])):
        yield name, kind


def _lines(asked: dict[str, str], differ: set[str], jump: str) -> Iterator[str]:
    """Assembly: every function and object under its name and version, which is said where they are defined."""
    yield ".text\n"
    for name, kind in sorted(asked.items()):
        here = f"bionic_{name}"
        if name not in differ:
            assert kind == "FUNC", f"{name}: an object that differs.c lacks"
            here = f"to_{name}"
            yield f".globl {here}\n.type {here}, %function\n{here}: {jump.format(name)}\n"
        yield f".symver {here}, {name}@{VERSION}\n"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
