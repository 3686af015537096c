"""Large files in parts, each with its SHA-256 in the manifest: readers verify them side by side, and weights after the rest.

    "parts": {"program.pte": {"sha256": ..., "parts": [{"bytes": 71296, "sha256": ...}, {"bytes": 4194304, "sha256": ..., "weights": true}]}}

A part begins where the one before ends. Parts marked as weights hold nothing but codes and scales of quantised weights, which
are only multiplied with: any bytes of theirs give numbers, so a reader may begin to compute before they are verified, as long as
nothing leaves it until they are. Everything else may be parsed or indexed by. Readers that do not know of parts verify the whole file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from .files import Digests
from .schema import Digest

PARTS = "parts"  # in a manifest
SMALLEST_FILE = 4 << 20  # bytes: a smaller one is hashed within 3 ms
SMALLEST_WEIGHTS = 1 << 20  # bytes that are worth being verified later
PIECE = 4 << 20  # bytes of a part, or more: of large files there are some hundred parts
MOST_PIECES = 256
GAP = 16  # bytes: less between two weights is padding


@dataclass(frozen=True)
class Part:
    """A piece of a file."""

    bytes: Annotated[int, Field(ge=1, le=2**53)]
    sha256: Digest
    weights: bool = False


@dataclass(frozen=True)
class Parts:
    """All of a file, and the SHA-256 of the whole."""

    sha256: Digest
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.bytes for part in self.parts)


def cut(size: int, weights: Iterable[tuple[int, int]]) -> dict[str, Any] | None:
    """How a file of `size` bytes is cut, for `package.seal` to add the hashes; None where it is too small to be worth it.

    Args:
        weights: (first byte, end) of everything in it that is only multiplied with.
    """
    if size < SMALLEST_FILE:
        return None
    joined: list[tuple[int, int]] = []
    for first, end in sorted(weights):
        if joined and first - joined[-1][1] < GAP:
            before = joined.pop()
            first, end = before[0], max(before[1], end)
        joined.append((first, end))
    piece = max(PIECE, -(-size // MOST_PIECES))
    found: list[dict[str, Any]] = []
    at = 0
    for first, end in [*((f, e) for f, e in joined if e - f >= SMALLEST_WEIGHTS), (size, size)]:
        found += [{"bytes": n} for n in pieces(first - at, piece)]
        found += [{"bytes": n, "weights": True} for n in pieces(end - first, piece)]
        at = end
    return {"parts": found}


def pieces(size: int, piece: int) -> list[int]:
    """`size` in as few numbers as possible that are at most `piece`, all about the same."""
    count = -(-size // piece)
    return [size * (i + 1) // count - size * i // count for i in range(count)]


def hashed(folder: Path, files: Mapping[str, Mapping[str, Any]], digests: Digests) -> dict[str, Any]:
    """ "parts" of a manifest with the hashes of the files as they are now, without those that have another size.

    Args:
        files: by name, as `cut` gives them or as they were before.
    """
    found = {}
    for name, file in files.items():
        path, sizes = folder / name, [part["bytes"] for part in file["parts"]]
        if not path.is_file() or sum(sizes) != path.stat().st_size:
            continue
        parts = [part | {"sha256": digest} for part, digest in zip(file["parts"], digests.of_parts(path, sizes))]
        found[name] = {"sha256": digests.of(path), "parts": parts}
    return found
