"""Writes Java class files without code: what compilers read of a library (The Java Virtual Machine Specification, chapter 4)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

VERSION = 52  # of Java 8
PUBLIC, PRIVATE, PROTECTED, STATIC, FINAL, SUPER = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
VARARGS, INTERFACE, ABSTRACT, ANNOTATION, ENUM = 0x80, 0x200, 0x400, 0x2000, 0x4000
THROWS = b"\x01\xbf"  # aconst_null, athrow: what every method of a stub does

Attribute = tuple[str, bytes]


class Constants:
    """The constant pool: every value once, by its index."""

    def __init__(self) -> None:
        self._indices: dict[tuple[int, object], int] = {}
        self._bytes = bytearray()
        self._next = 1

    def utf8(self, text: str) -> int:
        data = text.encode("utf-8", "surrogatepass").replace(b"\0", b"\xc0\x80")
        return self._add(1, text, struct.pack(">H", len(data)) + data)

    def class_(self, name: str) -> int:
        return self._add(7, name, struct.pack(">H", self.utf8(name)))

    def string(self, text: str) -> int:
        return self._add(8, text, struct.pack(">H", self.utf8(text)))

    def number(self, value: float, descriptor: str) -> int:
        """A constant of a field of this type."""
        tag, form = {"J": (5, ">q"), "F": (4, ">f"), "D": (6, ">d")}.get(descriptor, (3, ">i"))
        data = struct.pack(form, value)
        return self._add(tag, data, data)

    def _add(self, tag: int, key: object, data: bytes) -> int:
        if (tag, key) not in self._indices:
            self._indices[tag, key] = self._next
            self._bytes += bytes([tag]) + data
            self._next += 2 if tag in (5, 6) else 1  # the wide ones take two places
        return self._indices[tag, key]

    def to_bytes(self) -> bytes:
        return struct.pack(">H", self._next) + bytes(self._bytes)


@dataclass(frozen=True)
class Member:
    """A field or a method."""

    flags: int
    name: str
    descriptor: str
    attributes: Sequence[Attribute] = ()

    def to_bytes(self, constants: Constants) -> bytes:
        head = struct.pack(">HHH", self.flags, constants.utf8(self.name), constants.utf8(self.descriptor))
        return head + attributes_bytes(self.attributes, constants)


@dataclass
class ClassFile:
    """A class, by its internal name such as java/util/Map$Entry."""

    name: str
    flags: int
    parent: str | None  # None: java/lang/Object has none
    interfaces: Sequence[str]
    constants: Constants = field(default_factory=Constants)
    fields: list[Member] = field(default_factory=list)
    methods: list[Member] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        own, parent = self.constants.class_(self.name), self.constants.class_(self.parent) if self.parent else 0
        body = struct.pack(">HHHH", self.flags, own, parent, len(self.interfaces))
        body += b"".join(struct.pack(">H", self.constants.class_(name)) for name in self.interfaces)
        for members in (self.fields, self.methods):
            body += struct.pack(">H", len(members)) + b"".join(m.to_bytes(self.constants) for m in members)
        body += attributes_bytes(self.attributes, self.constants)
        return struct.pack(">IHH", 0xCAFEBABE, 0, VERSION) + self.constants.to_bytes() + body


def attributes_bytes(attributes: Sequence[Attribute], constants: Constants) -> bytes:
    parts = [struct.pack(">HI", constants.utf8(name), len(data)) + data for name, data in attributes]
    return struct.pack(">H", len(parts)) + b"".join(parts)


def signature(text: str, constants: Constants) -> Attribute:
    """The type with its arguments, which a descriptor lacks."""
    return "Signature", struct.pack(">H", constants.utf8(text))


def constant_value(index: int) -> Attribute:
    return "ConstantValue", struct.pack(">H", index)


def exceptions(names: Sequence[str], constants: Constants) -> Attribute:
    return "Exceptions", struct.pack(f">H{len(names)}H", len(names), *map(constants.class_, names))


def code(words: int) -> Attribute:
    """Of a method whose arguments, itself included, take so many words."""
    return "Code", struct.pack(">HHI", 1, words, len(THROWS)) + THROWS + struct.pack(">HH", 0, 0)


def inner_classes(entries: Sequence[tuple[str, int]], constants: Constants) -> Attribute:
    """(internal name, flags) of every class with a $ in its name that a class names."""
    data = struct.pack(">H", len(entries))
    for name, flags in entries:
        outer, _, simple = name.rpartition("$")
        indices = constants.class_(name), constants.class_(outer), constants.utf8(simple)
        data += struct.pack(">HHHH", *indices, flags)
    return "InnerClasses", data
