"""Reading what others wrote: bounded JSON, and values checked against the types that Python declares for them.

A dataclass's annotations are its schema: pydantic checks values against them strictly, so that "false" is no truth value
and 3.0 no count, and a value that does not fit becomes one line: where, which field, what it is, what was expected.

    Count = Annotated[int, Field(ge=1, le=65536)]

    @dataclass(frozen=True)
    class Ring:
        rows: Count
        held: tuple[Count, ...] | None = None

    ring = validated(Ring, read_json(path, PackageError), f"{path}: ring", PackageError)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import is_typeddict

from .errors import UserError

T = TypeVar("T")

LARGEST_JSON = 16 << 20  # bytes of a configuration, a manifest, a header: more is not read
DEEPEST = 32  # arrays and objects within each other
LONGEST_GOT = 60  # characters of a value that a message quotes


class Expected(str):
    """In an `Annotated`: how a message says what was expected, in place of what the type itself says."""


# Types of manifests. Sizes beyond these are not to be believed, and nothing is allocated by them.
LARGEST_SIZE = 2**31 - 1
Name = Annotated[str, Field(min_length=1, max_length=200)]
Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
Whole = Annotated[int, Field(ge=0, le=2**53)]  # a number of bytes, tokens or parameters
Shape = Annotated[tuple[Size, ...], Field(max_length=8)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$"), Expected("64 hexadecimal digits")]


# ------------------------------------------------------------------------------------------------------------- JSON


def read_json(path: Path, error: type[UserError], fix: str = "copy it again") -> Any:
    """What a JSON file holds. No more than `LARGEST_JSON` bytes of it are read, whatever its size.

    Raises:
        error: the file cannot be read, is too large, or is not JSON as `parse_json` takes it. A file that is not there is a
            `FileNotFoundError`: the caller knows what was expected.
    """
    return parse_json(read_bytes(path, error, fix), str(path), error, fix)


def read_bytes(path: Path, error: type[UserError], fix: str = "copy it again") -> bytes:
    """The content of a small file, of which no more than `LARGEST_JSON` bytes are read, whatever its size.

    Raises:
        error: it cannot be read, or is larger. A file that is not there is a `FileNotFoundError`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_JSON + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as reason:
        raise error(f"{path}: cannot be read ({reason}); {fix}") from None
    if len(data) > LARGEST_JSON:
        raise error(f"{path}: larger than {LARGEST_JSON >> 20} MiB, which no such file is; {fix}")
    return data


def parse_json(data: bytes | str, where: str, error: type[UserError], fix: str = "copy it again") -> Any:
    """JSON as every reader understands it: UTF-8, every name once per object, finite numbers, not nested without end.

    Raises:
        error: it is something else; one line says what, and where.
    """
    if len(data) > LARGEST_JSON:
        raise error(f"{where}: larger than {LARGEST_JSON >> 20} MiB, which no such file is; {fix}")
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_members, parse_constant=_no_number)
        _check_parts(value)
    except RecursionError:
        raise error(f"{where}: not readable as JSON (nested too deeply); {fix}") from None
    except ValueError as reason:  # of bytes, of syntax, of a number with thousands of digits
        raise error(f"{where}: not readable as JSON ({reason}); {fix}") from None
    return value


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice in one object")
    return members


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number")


def _check_parts(value: Any) -> None:
    """Fail where a value is nested too deeply, or a string has half a surrogate pair, which nothing could print."""
    level: Iterable[Any] = [value]
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for part in level:
            if isinstance(part, str):
                part.encode("utf-8")
            elif isinstance(part, float) and part in (float("inf"), float("-inf")):
                raise ValueError("a number is too large")
            elif isinstance(part, dict):
                below += part.keys()
                below += part.values()
            elif isinstance(part, list):
                below += part
        if not below:
            return
        level = below
    raise ValueError(f"nested more than {DEEPEST} deep")


# ------------------------------------------------------------------------------------------------------ validation


def validated(kind: type[T], values: Any, where: str, error: type[UserError], fix: str = "", name: str = "") -> T:
    """`values`, as JSON has them, as an instance of the type `kind`: a dataclass, or anything that annotations can say.

    Names that `kind` does not know are left out: another version may have written them.

    Args:
        where: what messages begin with, such as the file.
        fix: what they end with.
        name: of `values` themselves, as the fields below it are "NAME.FIELD".
    Raises:
        error: a value is missing or does not fit; names the first one.
    """
    schema: Any = kind
    try:
        return _adapter(schema).validate_json(json.dumps(values), strict=True)
    except ValidationError as found:
        raise error(f"{where}: {_line(kind, found, name)}{'; ' + fix if fix else ''}") from None


def check_fields(instance: Any, error: type[UserError]) -> None:
    """Check a dataclass's fields against their annotations, in its `__post_init__`. Lists become tuples, as from JSON.

    Raises:
        error: naming the first field that does not fit.
    """
    schema: Any = type(instance)
    for name, kind in annotations_of(schema).items():
        object.__setattr__(instance, name, check_value(kind, getattr(instance, name), name, error))


def check_value(kind: Any, value: Any, name: str, error: type[UserError], where: str = "", fix: str = "") -> Any:
    """`value` if it fits the annotation `kind`, whole numbers as floats where these are wanted. Of Python, not of JSON.

    Raises:
        error: it does not; names it as `name`.
    """
    try:
        return _adapter(kind).validate_python(_as_tuples(value), strict=True)
    except ValidationError as found:
        raise error(f"{where}{where and ': '}{_line(kind, found, name)}{'; ' + fix if fix else ''}") from None


def _adapter(kind: Any) -> TypeAdapter[Any]:
    return _adapters(kind)


_adapters = functools.cache(TypeAdapter)  # made once: that takes milliseconds


def annotations_of(kind: Any) -> dict[str, Any]:
    """Of every field of a dataclass or typed dictionary, its annotation."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else hints


def _has_fields(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or is_typeddict(kind)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _as_lists(value: Any) -> Any:
    return list(map(_as_lists, value)) if isinstance(value, tuple) else value


# --------------------------------------------------------------------------------------------------------- messages


def _line(kind: Any, found: ValidationError, name: str = "") -> str:
    """The first complaint: "methods.loop_1.inputs[0].dtype: got 5, expected one of float32, int64"."""
    complaint = found.errors(include_url=False)[0]
    loc = list(complaint["loc"])
    if complaint["type"] == "missing":  # an object's field, or an item of a list
        return f"{_follow(kind, loc, name)[1]}: is missing"
    if complaint["type"] == "extra_forbidden":
        return f"{'.'.join(map(str, [name, *loc] if name else loc))}: unknown field"
    if loc and loc[-1] == KEY:
        kind, path = _follow(kind, loc[:-2], name)
        return f"{path or 'it'}: got the name {_shortened(complaint['input'])}, expected {describe(get_args(_bare(kind))[0])}"
    kind, path = _follow(kind, loc, name)
    return f"{path or 'it'}: got {_shortened(complaint['input'])}, expected {describe(kind)}"


def _follow(kind: Any, loc: list[Any], path: str) -> tuple[Any, str]:
    """The annotation that a location leads to, and its name. Inside a union of several types it ends at the union."""
    for step in loc:
        base = _bare(kind)
        origin, args = get_origin(base), get_args(base)
        if _has_fields(base) and step in annotations_of(base):
            kind = annotations_of(base)[step]
        elif origin is tuple:
            kind = args[0] if len(args) == 2 and args[1] is Ellipsis else args[step]
        elif origin is dict:
            kind = args[1]
        else:
            break
        path = f"{path}[{step}]" if isinstance(step, int) else f"{path}.{step}" if path else str(step)
    return kind, path


def _bare(kind: Any) -> Any:
    """An annotation without its metadata, and without None where it is optional."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        others = [arg for arg in get_args(kind) if arg is not types.NoneType]
        return _bare(others[0]) if len(others) == 1 else kind
    return kind


def _shortened(value: Any) -> str:
    # repr of a number with thousands of digits fails
    text = repr(_as_lists(value)) if not isinstance(value, int) or abs(value) < 1 << 200 else "an enormous number"
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_GOT else f"{text[:LONGEST_GOT]}…"


KEY = "[key]"  # in pydantic's locations: the name before it is wrong, not its value
PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


def describe(kind: Any) -> str:
    """What an annotation asks for, in words.

    >>> describe(Annotated[int, Field(ge=1, le=64)] | None)
    'a whole number from 1 to 64, or null'
    """
    if get_origin(kind) is Annotated:
        base, *metadata = get_args(kind)
        said = [m for m in metadata if isinstance(m, Expected)]
        return str(said[-1]) if said else describe(base) + _bounds(base, metadata)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return ", or ".join(map(describe, args))
    if origin is Literal:
        return f"{'one of ' if len(args) > 1 else ''}{', '.join(map(str, args))}"
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list in which each is {describe(args[0])}"
        return f"a list of {len(args)}: {'; '.join(map(describe, args))}"
    if origin is dict or kind is dict or _has_fields(kind):
        return "an object"
    return PLAIN.get(kind, str(kind))


def _bounds(kind: Any, metadata: Iterable[Any]) -> str:
    found: dict[type, Any] = {}
    for item in metadata:
        for bound in getattr(item, "metadata", [item]):
            found[type(bound)] = bound
    low = found[Ge].ge if Ge in found else found[Gt].gt if Gt in found else None
    high = found[Le].le if Le in found else found[Lt].lt if Lt in found else None
    words = ""
    if Ge in found and Le in found:
        words = f" from {low} to {high}"
    elif low is not None or high is not None:
        below = f" {'at most' if Le in found else 'below'} {high}" if high is not None else ""
        above = f" {'of at least' if Ge in found else 'above'} {low}" if low is not None else ""
        words = above + (" and" if above and below else "") + below
    if MinLen in found or MaxLen in found:
        least, most = found.get(MinLen), found.get(MaxLen)
        things = "characters" if kind is str else "items"
        words += f" ({least.min_length if least else 0} to {most.max_length if most else 'any number of'} {things})"
    return words


def first_of(values: Mapping[str, Any], known: Iterable[str]) -> str | None:
    """The first name, in alphabetical order, that is not among the known ones."""
    return next(iter(sorted(set(values) - set(known))), None)
