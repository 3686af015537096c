"""Java class files as enjarify makes them of a dex, mended so that a Java virtual machine runs them.

The format is that of the Java Virtual Machine Specification, chapter 4.
"""

from __future__ import annotations

import struct

JAVA_8 = struct.pack(">H", 52)  # of a class file: enjarify writes an older version, in which interfaces have no code
UTF8, LONG, DOUBLE, CLASS, METHOD, INTERFACE_METHOD = 1, 5, 6, 7, 10, 11
# Bytes behind the tag of a constant; text has its length before it.
SIZES = {
    3: 4,
    4: 4,
    LONG: 8,
    DOUBLE: 8,
    CLASS: 2,
    8: 2,
    9: 4,
    METHOD: 4,
    INTERFACE_METHOD: 4,
    12: 4,
    15: 3,
    16: 2,
    18: 4,
}
CONSTANTS = 10  # where the constants of a class file begin
INTERFACE = 0x0200  # the flag of access


def constants(content: bytes) -> tuple[dict[int, int], int]:
    """Where the tag of each constant stands, by its number, and where the constants end."""
    (count,) = struct.unpack_from(">H", content, CONSTANTS - 2)
    places, number, at = {}, 1, CONSTANTS
    while number < count:
        places[number] = at
        tag = content[at]
        number += 2 if tag in (LONG, DOUBLE) else 1
        at += 3 + struct.unpack_from(">H", content, at + 1)[0] if tag == UTF8 else 1 + SIZES[tag]
    return places, at


def is_interface(content: bytes) -> bool:
    (flags,) = struct.unpack_from(">H", content, constants(content)[1])
    return bool(flags & INTERFACE)


def for_java(content: bytes, interfaces: set[str]) -> bytes:
    """The class in Java's version 8, in which methods of interfaces are called as such.

    A dex does not tell a static method of an interface from that of a class, so enjarify takes all for those of classes.

    Args:
        interfaces: names of those among the other classes, as in dev/rmseedge/core/host/LoopRuntime.
    """
    places, _ = constants(content)

    def index(at: int) -> int:
        return int(struct.unpack_from(">H", content, at + 1)[0])

    mended = bytearray(content[:6] + JAVA_8 + content[8:])
    for at in places.values():
        if content[at] == METHOD:
            text = places[index(places[index(at)])]
            if content[text + 3 : text + 3 + index(text)].decode() in interfaces:
                mended[at] = INTERFACE_METHOD
    return bytes(mended)
