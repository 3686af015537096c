"""ONNX Runtime's JNI library of the Android archive (AAR) on desktop Linux.

It asks nothing of Android's C library that glibc lacks, but binds to it by Android's names and versions. What is made here is a
copy without versions, beside ONNX Runtime for Linux and links by the names that it asks for.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

# Of ELF-64 (System V ABI, "Object Files" and "Dynamic Linking").
LOAD, DYNAMIC = 1, 2  # kinds of program headers
END, STRINGS, SYMBOLS = 0, 5, 6  # tags of the dynamic section
VERSIONS = {0x6FFFFFF0, 0x6FFFFFFE, 0x6FFFFFFF}  # VERSYM, VERNEED, VERNEEDNUM
IGNORED = 0x6000000F  # a tag between DT_LOOS and DT_HIOS that no loader reads
SYMBOL = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size
WEAK = 2  # binding: null where nobody defines it
NNAPI = b"OrtSessionOptionsAppendExecutionProvider_Nnapi"  # only Android has that
C_LIBRARIES = ("libc", "libm", "libdl")
JNI = "libonnxruntime4j_jni.so"
RUNTIME = "libonnxruntime.so"


def make_libraries(jni: bytes, runtime: Path, system: Path, folder: Path) -> None:
    """Put into `folder` what `-Donnxruntime.native.path=FOLDER` and `LD_LIBRARY_PATH=FOLDER` want.

    Args:
        jni: the AAR's library for this processor.
        runtime: libonnxruntime.so for Linux, of the same version.
        system: the folder of libc.so.6.
    """
    shutil.copyfile(runtime, folder / RUNTIME)
    (folder / JNI).write_bytes(without_versions(jni))
    for name in C_LIBRARIES:
        found = next(iter(sorted(system.glob(f"{name}.so.[0-9]"))))
        (folder / f"{name}.so").symlink_to(found)


def without_versions(library: bytes) -> bytes:
    """The same library with symbols of no version, and the one that only Android has not required."""
    image = bytearray(library)
    segments = [*_segments(image)]
    at = {
        tag: value for tag, value, place in _dynamic(image, segments) if not (tag in VERSIONS and _ignore(image, place))
    }
    symbols, strings = (_offset(segments, at[tag]) for tag in (SYMBOLS, STRINGS))
    for place in range(symbols, strings, SYMBOL.size):
        name, info, *_ = SYMBOL.unpack_from(image, place)
        if image[strings + name :].startswith(NNAPI + b"\0"):
            struct.pack_into("<B", image, place + 4, WEAK << 4 | info & 15)
            return bytes(image)
    raise ValueError(f"no symbol {NNAPI.decode()}: is this the JNI library of ONNX Runtime for Android?")


def _segments(image: bytearray) -> Iterator[tuple[int, int, int, int]]:
    """Kind, offset in the file, address, and size in the file of every program header."""
    (first,), (count,) = struct.unpack_from("<Q", image, 32), struct.unpack_from("<H", image, 56)
    for place in range(first, first + 56 * count, 56):
        kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", image, place)
        yield kind, offset, address, size


def _dynamic(image: bytearray, segments: list[tuple[int, int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Tag, value and place of every entry of the dynamic section."""
    place = next(offset for kind, offset, _, _ in segments if kind == DYNAMIC)
    while (entry := struct.unpack_from("<QQ", image, place))[0] != END:
        yield (*entry, place)
        place += 16


def _ignore(image: bytearray, place: int) -> bool:
    struct.pack_into("<Q", image, place, IGNORED)
    return True


def _offset(segments: list[tuple[int, int, int, int]], address: int) -> int:
    """Where the file has what is at an address."""
    return next(o + address - a for kind, o, a, size in segments if kind == LOAD and a <= address < a + size)
