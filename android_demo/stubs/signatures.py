"""Reads a list of an API in metalava's signature format 2.0: packages, classes, and what is public in them.

    package android.util {
      public final class Pair<F, S> {
        ctor public Pair(F, S);
        method @NonNull public static <A, B> android.util.Pair<A,B> create(A, B);
        field public final F first;
      }
    }

Names of java.lang stand without their package, annotations are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

TOKEN = re.compile(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|\.\.\.|[\w$]+(?:\.[\w$]+)*|\S")
VALUE = re.compile(r" = (\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|[^;]*);")  # of a field
MODIFIERS = frozenset(
    "public protected private static final abstract synchronized native transient volatile strictfp default deprecated".split()
)
KINDS = ("class", "interface", "enum", "@interface")


@dataclass(frozen=True)
class Type:
    """A type as it is written: "java.util.Map.Entry<K,V>[]". A wildcard has a `bound`, "?", "+" or "-", and but for "?" a
    type.
    """

    name: str  # with dots, whatever they stand for
    arguments: tuple[Type, ...] = ()
    dimensions: int = 0
    bound: str = ""
    inner: Type | None = None  # of Outer<A>.Inner: the part behind the arguments


@dataclass(frozen=True)
class TypeParameter:
    name: str
    bounds: tuple[Type, ...]


@dataclass(frozen=True)
class Field:
    name: str
    modifiers: frozenset[str]
    type: Type
    value: str | None  # as it is written
    is_constant_of_enum: bool


@dataclass(frozen=True)
class Method:
    name: str
    modifiers: frozenset[str]
    type_parameters: tuple[TypeParameter, ...]
    parameters: tuple[Type, ...]
    variable: bool  # the last parameter takes any number of values
    returns: Type | None  # None: it is a constructor
    throws: tuple[Type, ...]


@dataclass(frozen=True)
class Class:
    package: str
    name: str  # with those around it: "Map.Entry"
    kind: str
    modifiers: frozenset[str]
    type_parameters: tuple[TypeParameter, ...]
    extends: tuple[Type, ...]
    implements: tuple[Type, ...]
    fields: tuple[Field, ...]
    methods: tuple[Method, ...]

    @property
    def full_name(self) -> str:
        return f"{self.package}.{self.name}"


def read_signatures(text: str) -> Iterator[Class]:
    """The classes of a list, in its order."""
    package, head, members = "", "", []
    for line in text.splitlines():
        if line.startswith("package "):
            package = line.split()[1]
        elif line == "  }":
            yield read_class(package, head, members)
        elif line.startswith("    "):
            members.append(line.strip())
        elif line.startswith("  "):
            head, members = line.strip(), []


def read_class(package: str, head: str, members: list[str]) -> Class:
    words = Words(head)
    modifiers = words.modifiers()
    kind = words.take()
    if kind == "@":
        kind += words.take()
    name = words.take()
    parameters = words.type_parameters()
    extends = words.types_behind("extends")
    implements = words.types_behind("implements")
    fields, methods = [], []
    for member in members:
        what, rest = member.split(" ", 1)
        if what in ("field", "enum_constant"):
            fields.append(read_field(rest, what == "enum_constant"))
        else:
            methods.append(read_method(rest, constructor=what == "ctor"))
    return Class(package, name, kind, modifiers, parameters, extends, implements, tuple(fields), tuple(methods))


def read_field(text: str, is_constant_of_enum: bool) -> Field:
    words = Words(text)
    modifiers, kind, name = words.modifiers(), words.type(), words.take()
    value = VALUE.search(text)
    return Field(name, modifiers, kind, value and value[1], is_constant_of_enum)


def read_method(text: str, constructor: bool) -> Method:
    words = Words(text)
    modifiers = words.modifiers()
    type_parameters = words.type_parameters()
    modifiers |= words.modifiers()
    returns = None if constructor else words.type()
    name = words.take()
    parameters, variable = [], False
    words.expect("(")
    while not words.have(")"):
        words.modifiers()
        parameters.append(words.type())
        variable = words.have("...")
        words.have(",")
    throws = words.types_behind("throws")
    return Method(name, modifiers, type_parameters, tuple(parameters), variable, returns, throws)


class Words:
    """The words of a line, taken one after the other."""

    def __init__(self, line: str) -> None:
        self._words = TOKEN.findall(line)
        self._at = 0

    def next(self) -> str:
        return self._words[self._at] if self._at < len(self._words) else ""

    def take(self) -> str:
        self._at += 1
        return self._words[self._at - 1]

    def have(self, word: str) -> bool:
        """Take a word if it is the next one."""
        found = self.next() == word
        self._at += found
        return found

    def expect(self, word: str) -> None:
        if not self.have(word):
            raise ValueError(f"got {self.next()!r} in {' '.join(self._words)}, expected {word!r}")

    def modifiers(self) -> frozenset[str]:
        """Those that come next, among annotations, which are left out."""
        found = set()
        while self._skip_annotation() or self.next() in MODIFIERS:
            if self.next() in MODIFIERS:
                found.add(self.take())
        return frozenset(found)

    def _skip_annotation(self) -> bool:
        if self.next() != "@" or self._words[self._at + 1] == "interface":
            return False
        self._at += 2
        if self.have("("):
            depth = 1
            while depth:
                depth += {"(": 1, ")": -1}.get(self.take(), 0)
        return True

    def type_parameters(self) -> tuple[TypeParameter, ...]:
        if not self.have("<"):
            return ()
        found = []
        while not self.have(">"):
            self.modifiers()
            name, bounds = self.take(), []
            if self.have("extends"):
                bounds.append(self.type())
                while self.have("&"):
                    bounds.append(self.type())
            found.append(TypeParameter(name, tuple(bounds)))
            self.have(",")
        return tuple(found)

    def types_behind(self, word: str) -> tuple[Type, ...]:
        """Types with commas or spaces between them, if `word` comes next."""
        found = []
        if self.have(word):
            while self.next() not in ("{", ";", "", "implements", "default"):
                found.append(self.type())
                self.have(",")
        return tuple(found)

    def type(self) -> Type:
        self.modifiers()
        if self.have("?"):
            for word, bound in (("extends", "+"), ("super", "-")):
                if self.have(word):
                    inner = self.type()
                    return Type(inner.name, inner.arguments, inner.dimensions, bound, inner.inner)
            return Type("", bound="?")
        name, arguments, inner = self.take(), self._arguments(), None
        if self.next() == ".":
            self.take()
            inner = Type(self.take(), self._arguments())
        dimensions = 0
        while self.have("["):
            self.expect("]")
            dimensions += 1
        return Type(name, arguments, dimensions, inner=inner)

    def _arguments(self) -> tuple[Type, ...]:
        found = []
        if self.have("<"):
            while not self.have(">"):
                found.append(self.type())
                self.have(",")
        return tuple(found)
