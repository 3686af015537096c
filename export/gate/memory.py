"""The part of the parity gate that compares neural memories, write by write and after many writes, and passages."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rmse_edge.errors import ParityError
from rmse_edge.info import ModelInfo
from rmse_edge.runtimes.host.base import Arrays, Methods
from rmse_edge.runtimes.host.text import LoopRuntime

from .reference import MARGIN, Reference

MEMORY_SEGMENTS = 32  # written one after the other, before the memories are compared
PASSAGE = 50  # tokens
MEMORY_TOLERANCE = {True: 1e-4, False: 1e-2}  # relative; by rule: exact, rounded


def memory_tokens(info: ModelInfo) -> np.ndarray:
    """The text whose exit states the memories are taught."""
    assert info.segment is not None
    return np.random.default_rng(1).integers(0, info.vocab_size, MEMORY_SEGMENTS * info.segment)


def compare_memory(reference: Reference, candidate: Methods, exact: bool) -> dict[str, Any]:
    """Both write the same 32 segments of exit states: each write by itself, and one after the other from a blank memory.

    A memory may amplify what rounding does: 32 writes later a change of one millionth can have grown a thousandfold.
    How much is measured on the reference, with segments changed by 1e-7 relative; ten times that is allowed where it is
    more than the rule's own tolerance.

    Returns:
        The largest difference of every memory tensor and of the surprise, relative to the tensor's largest value: of
        single writes ("writes"), after all of them ("after"), and what is allowed then.
    Raises:
        ParityError: naming the tensor.
    """
    tolerance = MEMORY_TOLERANCE[exact]
    segments = reference.segments(memory_tokens(reference.info))
    ours = written(reference.methods, segments)
    singly = [written(candidate, [n], start)[0] for n, start in zip(segments, [None, *ours])]
    draw = np.random.default_rng(2)
    changed = [n * (1 + 1e-7 * draw.standard_normal(n.shape)).astype(np.float32) for n in segments]
    drift = apart([ours[-1]], [written(reference.methods, changed)[-1]])
    allowed = {name: max(tolerance, 10 * value) for name, value in drift.items()}
    report = {
        "writes": apart(ours, singly),
        "after": apart([ours[-1]], [written(candidate, segments)[-1]]),
        "allowed": allowed,
    }
    for kind, limits in (("writes", dict.fromkeys(allowed, tolerance)), ("after", allowed)):
        for name, value in report[kind].items():
            if not value <= limits[name]:
                when = "in one write" if kind == "writes" else f"after {len(segments)} segments"
                raise ParityError(f"memory: {name} differs by {value:.1e} relative {when} (allowed {limits[name]:.0e})")
    return report


def compare_passage(reference: Reference, candidate: LoopRuntime, tokens: np.ndarray) -> dict[str, float]:
    """A passage as a knowledge base holds it and as it is searched for: hosts read these in a way of their own.

    By the exact rule, at the checkpoint's own dials, up to the first position at which the reference is undecided.

    Returns:
        The largest difference of key, query and value, relative to the largest value; nothing where there is no such
        passage.
    Raises:
        ParityError: naming the vector.
    """
    found = reference.model.whole_text(torch.from_numpy(tokens[:PASSAGE]), reference.scalars(reference.info.dials))
    undecided = np.flatnonzero(found.margin.numpy() < MARGIN)
    count = int(undecided[0]) if len(undecided) else len(found.margin)
    if count == 0:
        return {}
    rows = reference.info.segment
    assert rows is not None
    segment = np.zeros((1, rows, found.h.shape[1]), np.float32)
    segment[0, :count] = found.h[:count].numpy()
    given: Arrays = {"segment": segment, "n_valid": np.array([count], np.int64)}
    ours = {name: array[0] for name, array in reference.methods.run("embed_segment", rows, given).items()}
    key, value = candidate.embed(tokens[:count])
    report = apart([ours], [{"key": key, "value": value, "query": candidate.embed_query(tokens[:count])}])
    for name, difference in report.items():
        if not difference <= MEMORY_TOLERANCE[True]:
            raise ParityError(
                f"passage: {name} differs by {difference:.1e} relative (allowed {MEMORY_TOLERANCE[True]:.0e})"
            )
    return report


def written(methods: Methods, segments: list[np.ndarray], start: Arrays | None = None) -> list[Arrays]:
    """The memory and its surprise after each of the segments, (1, 64, d), from a blank memory or from `start`."""
    rows = segments[0].shape[1]
    memory = {name: array.copy() for name, array in (start or methods.run("blank", rows, {})).items()}
    memory.pop("surprise", None)
    states = []
    for segment in segments:
        given = {"segment": segment, "n_valid": np.array([rows], np.int64)} | memory
        out = methods.run("memorize", rows, given)
        memory = {name: out[f"next_{name}"].copy() for name in memory}
        states.append(memory | {"surprise": out["surprise"].copy()})
    return states


def apart(ours: list[Arrays], theirs: list[Arrays]) -> dict[str, float]:
    """The largest difference of each tensor over a list of states, relative to its largest value; NaN where there is one."""
    found = {}
    for name in ours[0]:
        sizes = [np.abs(a[name] - b[name]).max() / max(1e-3, np.abs(a[name]).max()) for a, b in zip(ours, theirs)]
        found[name] = float(np.max(sizes))
    return found
