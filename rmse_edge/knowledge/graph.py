"""The structure of a usearch index file, checked before usearch reads it: it follows what the file says wherever that leads.

    rows, columns       u32 each; then rows x columns bytes: the keys
    head                64 bytes: "usearch", version, types, counts
    graph               u64 each: nodes, connectivity, connectivity of level 0, highest level, node to start from
    levels              i16 of every node
    nodes               key u64, level i16; then for every level a u32 count and room for that many u32 numbers of neighbours

A file whose hash fits may have been made wrong, or to do harm.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import numpy as np

from .base import KnowledgeError

MAGIC = b"usearch"
TYPES = bytes((ord("c"), 11, 14, 15))  # cosine, float32 keys, u64 ids, u32 numbers of nodes
COUNTS = struct.Struct("<3Q")  # nodes with a key, nodes whose key was taken out, numbers of a key
DELETED = np.uint64(2**64 - 1)  # in place of a key that was taken out
HEAD, GRAPH, NODE = 64, struct.Struct("<5Q"), 10  # bytes of the head, fields of the graph, bytes of a node's own head
MOST_LEVELS, MOST_NEIGHBOURS = 64, 4096
BLOCK = 1 << 12  # nodes whose neighbours are looked at at once: what is held beside the file stays small


def check_index(path: Path, entries: int, key_dims: int, fix: str) -> None:
    """Fail unless the file holds a graph of `entries` nodes that leads nowhere else.

    Raises:
        KnowledgeError: it does not; names the file and the fix.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 8 + HEAD + GRAPH.size:
            raise KnowledgeError(f"{path}: too short for an index; {fix}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            data = np.frombuffer(content, np.uint8)
            try:
                wrong = _wrong(data, entries, key_dims)
            finally:
                del data  # or the map could not be closed
    if wrong:
        raise KnowledgeError(f"{path}: {wrong}; {fix}")


def _wrong(data: np.ndarray, entries: int, key_dims: int) -> str | None:
    """What is wrong with the bytes of a file, if anything is."""
    rows, columns = (int(n) for n in data[:8].view("<u4"))
    at = 8 + rows * columns
    if at + HEAD + GRAPH.size > len(data):
        return "ends before its graph"
    head = data[at : at + HEAD].tobytes()
    if head[:7] != MAGIC or head[13:17] != TYPES:
        return "is no usearch index of cosines in float32"
    present, deleted, dims = COUNTS.unpack_from(head, 17)
    if (present, dims, columns) != (entries, key_dims, 4 * key_dims):
        return f"holds {present} keys of {dims} numbers, expected {entries} of {key_dims}"
    at += HEAD
    count, connectivity, base, top, start = GRAPH.unpack(data[at : at + GRAPH.size].tobytes())
    at += GRAPH.size
    if (
        not count == present + deleted == rows
        or not 1 <= connectivity <= MOST_NEIGHBOURS
        or not 1 <= base <= MOST_NEIGHBOURS
    ):
        return f"has a graph of {count} nodes with {connectivity} and {base} neighbours"
    if not count:
        return None if at == len(data) else "goes on after its graph"
    if at + 2 * count > len(data) or top > MOST_LEVELS or start >= count:
        return "has a graph that does not fit"
    levels = _numbers(data[at : at + 2 * count], "<i2").astype(np.int64)
    if levels.min() < 0 or levels.max() > top or levels[start] != top:
        return "has a node of a level that is not there"
    at += 2 * count
    first, further = 4 + 4 * base, 4 + 4 * connectivity
    sizes = NODE + first + further * levels
    if at + int(sizes.sum()) != len(data):
        return "has nodes that do not fit"
    starts = at + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    if not np.array_equal(_field(data, starts + 8, 2).view("<i2")[:, 0], levels):
        return "has a node that says another level than the graph"
    keys = _field(data, starts, 8).view("<u8")[:, 0]
    keys = np.sort(keys[keys != DELETED])  # several times as fast as np.unique
    if len(keys) != entries or (keys[1:] == keys[:-1]).any():
        return "has two nodes of one key"
    for level in range(int(levels.max()) + 1):
        nodes = starts[levels >= level] + NODE + (first + further * (level - 1) if level else 0)
        room = connectivity if level else base
        for begin in range(0, len(nodes), BLOCK):
            block = nodes[begin : begin + BLOCK]
            fields = _field(data, block, 4 + 4 * room).view("<u4")  # (nodes, 1 + room)
            counts, neighbours = fields[:, :1], fields[:, 1:]
            if counts.max() > room:
                return "has a node of more neighbours than there is room for"
            strange = neighbours >= count  # seldom anything: usearch leaves zeros where there is room
            if strange.any() and (strange & (np.arange(room) < counts)).any():
                return "has a neighbour that is not there"
            if level and (levels[neighbours[np.arange(room) < counts]] < level).any():  # all nodes are on level 0
                return "has a neighbour that is not on its level"
    return None


def _numbers(data: np.ndarray, dtype: str) -> np.ndarray:
    return np.frombuffer(data.tobytes(), dtype)


def _field(data: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
    """The `size` bytes from each start on, (n, size): copied run by run, not byte by byte."""
    return np.lib.stride_tricks.sliding_window_view(data, size)[starts]
