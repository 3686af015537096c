"""Turns what `signatures.py` read into classes, and puts them into a jar."""

from __future__ import annotations

import ast
import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from . import classfile as cf
from .signatures import Class, Field, Method, Type, TypeParameter, read_signatures

PRIMITIVES = {
    "void": "V", "boolean": "Z", "byte": "B", "char": "C", "short": "S", "int": "I", "long": "J", "float": "F", "double": "D",
}  # fmt: skip
FLAGS = {
    "public": cf.PUBLIC, "private": cf.PRIVATE, "protected": cf.PROTECTED, "static": cf.STATIC, "final": cf.FINAL,
    "abstract": cf.ABSTRACT, "volatile": 0x40, "transient": 0x80,
}  # fmt: skip
OBJECT = Type("java.lang.Object")
Erasures = Mapping[str, str]  # type variable -> descriptor of what stands for it


def write_jar(listed: str, path: Path) -> int:
    """Write stubs of all classes of an API to `path`; the same bytes for the same list. Returns how many there are."""
    library = Library(list(read_signatures(listed)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as jar:
        for cls in library.classes.values():
            entry = zipfile.ZipInfo(f"{library.internal[cls.full_name]}.class", (1980, 1, 1, 0, 0, 0))
            jar.writestr(entry, library.compiled(cls).to_bytes(), zipfile.ZIP_DEFLATED)
    return len(library.classes)


class Library:
    """All classes of an API, which speak of each other."""

    def __init__(self, classes: Sequence[Class]) -> None:
        self.classes = {cls.full_name: cls for cls in classes}
        self.internal = {
            name: f"{cls.package.replace('.', '/')}/{cls.name.replace('.', '$')}" for name, cls in self.classes.items()
        }
        self._by_internal = {internal: self.classes[name] for name, internal in self.internal.items()}
        self._erasures: dict[str, Erasures] = {}

    # ------------------------------------------------------------------------------------------------------- types

    def class_name(self, name: str) -> str:
        """The internal name of a class as the list names it; that of Object where it names a variable of a constructor's
        own, which the list does not declare.
        """
        return self.internal.get(name) or self.internal.get(f"java.lang.{name}") or self._undeclared(name)

    @staticmethod
    def _undeclared(name: str) -> str:
        if re.fullmatch(r"[A-Z]\d?", name):
            return "java/lang/Object"
        raise ValueError(f"{name}: is not in the list")

    def descriptor(self, kind: Type, erasures: Erasures) -> str:
        """JVMS 4.3: the type without its arguments."""
        name = f"{kind.name}.{kind.inner.name}" if kind.inner else kind.name
        return "[" * kind.dimensions + (PRIMITIVES.get(name) or erasures.get(name) or f"L{self.class_name(name)};")

    def signature(self, kind: Type, erasures: Erasures) -> str:
        """JVMS 4.7.9.1: the type with its arguments."""
        if kind.bound == "?":
            return "*"
        arrays = kind.bound + "[" * kind.dimensions
        if kind.name in PRIMITIVES:
            return arrays + PRIMITIVES[kind.name]
        if kind.name in erasures:
            return f"{arrays}T{kind.name};"
        text = self.class_name(kind.name) + self._arguments(kind, erasures)
        if kind.inner:
            text += f".{kind.inner.name}{self._arguments(kind.inner, erasures)}"
        return f"{arrays}L{text};"

    def _arguments(self, kind: Type, erasures: Erasures) -> str:
        return f"<{''.join(self.signature(a, erasures) for a in kind.arguments)}>" if kind.arguments else ""

    def with_parameters(self, parameters: Sequence[TypeParameter], outer: Erasures) -> Erasures:
        """The erasures that hold where type parameters were declared. They may speak of each other."""
        found = dict(outer) | {parameter.name: "Ljava/lang/Object;" for parameter in parameters}
        for _ in parameters:
            for parameter in parameters:
                if parameter.bounds:
                    found[parameter.name] = self.descriptor(parameter.bounds[0], found)
        return found

    def parameters_signature(self, parameters: Sequence[TypeParameter], erasures: Erasures) -> str:
        if not parameters:
            return ""
        text = ""
        for parameter in parameters:
            text += parameter.name
            for i, bound in enumerate(parameter.bounds or (OBJECT,)):
                first_is_interface = i == 0 and bound.name not in erasures and self._is_interface(bound)
                text += ("::" if first_is_interface else ":") + self.signature(bound, erasures)
        return f"<{text}>"

    def _is_interface(self, kind: Type) -> bool:
        return "interface" in self._by_internal[self.class_name(kind.name)].kind

    # ----------------------------------------------------------------------------------------------------- classes

    def erasures_of(self, cls: Class) -> Erasures:
        """Of a class's type parameters, and of those around it where it is not static."""
        if cls.full_name not in self._erasures:
            around = self._around(cls)
            outer = {} if around is None or "static" in cls.modifiers else self.erasures_of(around)
            self._erasures[cls.full_name] = self.with_parameters(cls.type_parameters, outer)
        return self._erasures[cls.full_name]

    def _around(self, cls: Class) -> Class | None:
        return self.classes.get(f"{cls.package}.{cls.name.rpartition('.')[0]}")

    def compiled(self, cls: Class) -> cf.ClassFile:
        erasures = self.erasures_of(cls)
        parent, interfaces = self._parents(cls)
        name = self.internal[cls.full_name]
        found = cf.ClassFile(
            name,
            flags_of_class(cls),
            None if name == "java/lang/Object" else self.descriptor(parent, erasures)[1:-1],
            [self.descriptor(i, erasures)[1:-1] for i in interfaces],
        )
        found.fields = [self._field(f, erasures, found.constants) for f in cls.fields]
        methods = (*cls.methods, *self._left_out(cls))
        found.methods = [self._method(m, cls, erasures, found.constants) for m in methods]
        generic = self.parameters_signature(cls.type_parameters, erasures)
        generic += "".join(self.signature(t, erasures) for t in (parent, *interfaces))
        if "<" in generic and found.parent:
            found.attributes.append(cf.signature(generic, found.constants))
        if inner := self._inner_classes(name):
            found.attributes.append(cf.inner_classes(inner, found.constants))
        return found

    def _parents(self, cls: Class) -> tuple[Type, tuple[Type, ...]]:
        if cls.kind == "interface":
            return OBJECT, cls.extends
        if cls.kind == "@interface":
            return OBJECT, (Type("java.lang.annotation.Annotation"),)
        if cls.kind == "enum":
            return Type("java.lang.Enum", (Type(cls.full_name),)), cls.implements
        return (cls.extends or (OBJECT,))[0], cls.implements

    def _left_out(self, cls: Class) -> Iterable[Method]:
        """What a class has of the abstract methods of those above it: the list leaves out what overrides and is called alike."""
        if "abstract" in cls.modifiers or "interface" in cls.kind:
            return
        known = {(m.name, m.parameters) for m in cls.methods}
        above = self._above(cls)
        while above is not None:
            for method in above.methods:
                if (method.name, method.parameters) not in known and "abstract" in method.modifiers:
                    yield replace(method, modifiers=method.modifiers - {"abstract"})
                known.add((method.name, method.parameters))
            above = self._above(above)

    def _above(self, cls: Class) -> Class | None:
        """The class that one extends, where it takes no arguments: methods of others speak of types that are called otherwise
        below them.
        """
        parent, _ = self._parents(cls)
        return (
            None
            if parent.arguments or cls.full_name == OBJECT.name
            else self._by_internal[self.class_name(parent.name)]
        )

    def _inner_classes(self, name: str) -> list[tuple[str, int]]:
        """Those around a class and right within it, the outer ones first."""
        around = ["$".join(name.split("$")[:n]) for n in range(2, name.count("$") + 2)]
        within = [i for i in self._by_internal if i.rpartition("$")[0] == name]
        return [(i, flags_of_inner(self._by_internal[i])) for i in (*around, *within)]

    def _field(self, field: Field, erasures: Erasures, constants: cf.Constants) -> cf.Member:
        descriptor, generic = self.descriptor(field.type, erasures), self.signature(field.type, erasures)
        attributes = [] if generic == descriptor else [cf.signature(generic, constants)]
        if field.value is not None and not field.is_constant_of_enum:
            attributes.append(cf.constant_value(constant(field.value, descriptor, constants)))
        flags = flags_of(field.modifiers) | (cf.ENUM | cf.STATIC | cf.FINAL if field.is_constant_of_enum else 0)
        return cf.Member(flags, field.name, descriptor, attributes)

    def _method(self, method: Method, cls: Class, outer: Erasures, constants: cf.Constants) -> cf.Member:
        erasures = self.with_parameters(method.type_parameters, outer)
        parameters = [with_array(p) if last and method.variable else p for p, last in marked(method.parameters)]
        returns = method.returns or Type("void")
        taken = [self.descriptor(p, erasures) for p in parameters]
        generic = self.parameters_signature(method.type_parameters, erasures)
        generic += f"({''.join(self.signature(p, erasures) for p in parameters)}){self.signature(returns, erasures)}"
        hidden = self._hidden_parameter(cls) if method.returns is None else []
        descriptor = f"({''.join(hidden + taken)}){self.descriptor(returns, erasures)}"
        flags = flags_of(method.modifiers) | (cf.VARARGS if method.variable else 0)
        if "interface" in cls.kind and not method.modifiers & {"static", "default"}:
            flags |= cf.ABSTRACT
        attributes = [] if generic == descriptor or hidden else [cf.signature(generic, constants)]
        if not flags & cf.ABSTRACT:
            words = sum(2 if d in "JD" else 1 for d in hidden + taken) + (0 if flags & cf.STATIC else 1)
            attributes.append(cf.code(words))
        if method.throws:
            names = [self.descriptor(t, erasures)[1:-1] for t in method.throws]
            attributes.append(cf.exceptions(names, constants))
        return cf.Member(flags, "<init>" if method.returns is None else method.name, descriptor, attributes)

    def _hidden_parameter(self, cls: Class) -> list[str]:
        """The object around one of an inner class, which its constructors take first."""
        around = self._around(cls)
        inner = around is not None and cls.kind == "class" and around.kind == "class" and "static" not in cls.modifiers
        return [f"L{self.internal[around.full_name]};"] if inner and around else []


def marked(parameters: Sequence[Type]) -> Iterable[tuple[Type, bool]]:
    """Parameters, and whether each is the last one."""
    return ((parameter, i == len(parameters) - 1) for i, parameter in enumerate(parameters))


def with_array(kind: Type) -> Type:
    return Type(kind.name, kind.arguments, kind.dimensions + 1, kind.bound, kind.inner)


def flags_of(modifiers: Iterable[str]) -> int:
    return sum(FLAGS.get(modifier, 0) for modifier in modifiers)


def flags_of_class(cls: Class) -> int:
    """Of the class itself: what a class within another is to others, only `flags_of_inner` says."""
    flags = flags_of_inner(cls) & ~cf.STATIC & ~cf.PRIVATE
    if flags & cf.PROTECTED:
        flags = flags & ~cf.PROTECTED | cf.PUBLIC
    return flags if flags & cf.INTERFACE else flags | cf.SUPER


def flags_of_inner(cls: Class) -> int:
    flags = flags_of(cls.modifiers)
    if "interface" in cls.kind:
        flags |= cf.INTERFACE | cf.ABSTRACT | (cf.STATIC if "." in cls.name else 0)
    if cls.kind == "@interface":
        flags |= cf.ANNOTATION
    if cls.kind == "enum":
        flags |= cf.ENUM | cf.FINAL
    return flags


def constant(text: str, descriptor: str, constants: cf.Constants) -> int:
    """The constant that a field's value stands for."""
    if descriptor == "Ljava/lang/String;":
        return constants.string(ast.literal_eval(text))
    if descriptor == "Z":
        return constants.number(text == "true", descriptor)
    if descriptor in "FD":
        return constants.number(floating(text), descriptor)
    if text.startswith("'"):
        return constants.number(ord(ast.literal_eval(text)), descriptor)
    return constants.number(int(text.rstrip("Ll"), 0), descriptor)


def floating(text: str) -> float:
    """A number of Java's; those that are none are written as divisions by zero."""
    zero = re.fullmatch(r"\((-?[01])\.0f?/0\.0f?\)", text)
    if zero:
        return {"1": math.inf, "-1": -math.inf, "0": math.nan}[zero[1]]
    return float(text.rstrip("fFdD"))
