"""Wrong values for JSON documents and for bytes, drawn from a seeded generator."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

Json = Any
Path = tuple[str | int, ...]

NUMBERS: list[Json] = [0, 1, -1, 2, 3, 63, 65, 255, 4096, 2**16, 2**24, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 10**30, -(2**31),
                       -(2**63), 0.5, -0.0, 1.5, 1e-30, 1e30, 1e308, -1e308, math.nan, math.inf, -math.inf]  # fmt: skip
STRINGS: list[Json] = ["", " ", "x", "0", "1", "true", "null", "float32", "float16", "int64", "bool", "../x", "/etc/passwd", "a\nb", "a\0b",
                       "\x1b[31m", "\ud800", "😀", "é" * 300, "x" * 100_000, "%s%n", "NaN", "{}",
                       "loop", "prelude", "ring", "append", "replace", "written"]  # fmt: skip


def deep(depth: int) -> Json:
    value: Json = []
    for _ in range(depth):
        value = [value]
    return value


def any_value(rng: random.Random) -> Json:
    """A value of any type, well-meant or not."""
    return rng.choice(
        [
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(STRINGS),
            lambda: rng.choice([None, True, False, [], {}, [[]], [{}], {"": None}, {"a": 1}, [1, 2, 3], [-1], ["x"]]),
            lambda: deep(rng.choice([2, 20, 40, 200])),
            lambda: [rng.choice(NUMBERS)] * rng.choice([1, 5, 100]),
        ]
    )()


def paths(document: Json, prefix: Path = ()) -> list[Path]:
    """The places of all values within a document."""
    found: list[Path] = []
    items: Any = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        found += [(*prefix, key), *paths(value, (*prefix, key))]
    return found


def choose(rng: random.Random, document: Json) -> Path:
    """A place: each part of the document, however large, is as likely as the others."""
    place: Path = ()
    value = document
    while isinstance(value, dict | list) and value and (not place or rng.random() < 0.85):
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        place, value = (*place, key), value[key]
    return place


def at(document: Json, place: Path) -> Json:
    for key in place:
        document = document[key]
    return document


def changed(rng: random.Random, document: Json, count: int | None = None) -> Json:
    """A copy with one change, sometimes two or three."""
    document = copy.deepcopy(document)
    for _ in range(count or rng.choice([1, 1, 1, 2, 3])):
        place = choose(rng, document)
        if not place:
            return any_value(rng)
        rng.choice(CHANGES)(rng, at(document, place[:-1]), place[-1])
    return document


def replace(rng: random.Random, parent: Json, key: str | int) -> None:
    parent[key] = any_value(rng)


def remove(rng: random.Random, parent: Json, key: str | int) -> None:
    del parent[key]


def add(rng: random.Random, parent: Json, key: str | int) -> None:
    if isinstance(parent, dict):
        parent[rng.choice([*map(str, STRINGS[:14]), "extra"])] = any_value(rng)
    else:
        parent.insert(
            rng.randrange(len(parent) + 1), any_value(rng) if rng.random() < 0.5 else copy.deepcopy(parent[key])
        )


def swap(rng: random.Random, parent: Json, key: str | int) -> None:
    other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    parent[key], parent[other] = parent[other], parent[key]


def rename(rng: random.Random, parent: Json, key: str | int) -> None:
    if isinstance(parent, dict):
        parent[rng.choice([f"{key}x", str(key)[:-1], str(key).upper(), "a\nb", ""])] = parent.pop(str(key))
    else:
        parent.reverse()


def nudge(rng: random.Random, parent: Json, key: str | int) -> None:
    """A number that could be right, or text that nearly is."""
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = rng.choice([not value, int(value), str(value).lower()])
    elif isinstance(value, int | float):
        how: list[Callable[[], Json]] = [
            lambda: value + 1, lambda: value - 1, lambda: -value, lambda: value * 2, lambda: value * 1000, lambda: value // 2,
            lambda: float(value), lambda: str(value), lambda: [value],
        ]  # fmt: skip
        parent[key] = rng.choice(how)()
    elif isinstance(value, str):
        parent[key] = rng.choice([value[:-1], value + "x", value.upper(), value * 2, "", value[::-1]])
    else:
        parent[key] = rng.choice([None, str(value)[:50], [value], {"value": value}, [*(value or ())]])


CHANGES: list[Callable[[random.Random, Json, str | int], None]] = [
    replace,
    replace,
    nudge,
    nudge,
    nudge,
    remove,
    add,
    swap,
    rename,
]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes with a few flipped bits, cut, grown, or with a run of something else."""
    spoilt, how = bytearray(data), rng.randrange(5)
    if how == 0:
        return bytes(spoilt[: rng.randrange(len(spoilt) + 1)])
    if how == 1:
        return bytes(spoilt) + rng.randbytes(rng.choice([1, 8, 4096]))
    if how == 2:
        start, size = rng.randrange(len(spoilt)), rng.choice([1, 4, 8, 64])
        spoilt[start : start + size] = rng.choice([b"\xff", b"\0", b"\x7f"]) * min(size, len(spoilt) - start)
        return bytes(spoilt)
    for _ in range(rng.choice([1, 1, 8, 64])):
        place = rng.randrange(min(len(spoilt), 512) if rng.random() < 0.3 else len(spoilt))
        spoilt[place] ^= 1 << rng.randrange(8)
    return bytes(spoilt)
