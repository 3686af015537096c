"""An export that does each slow step only once per test session."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from later import later

from rmse_edge.export import pipeline
from rmse_edge.export.program import ExportedMethod, LoopProgram, trace

onnx = later("onnx")
onnx_target = later("rmse_edge.export.onnx.lower")


class Memo:
    """Remembers traced programs and lowered graphs, so that a model that was exported before is exported in no time.

    What is remembered is the result of the real functions; everything after them (weight file, checker, parity gate,
    manifest, renaming into place) runs each time.
    """

    def __init__(self) -> None:
        self.programs: list[tuple[tuple[Any, ...], LoopProgram]] = []  # with the kind of trace
        self.graphs: dict[tuple[int, bool, bool], onnx.ModelProto] = {}
        self._to_onnx = onnx_target.to_onnx

    def trace(
        self,
        model: Any,
        chunks: tuple[int, ...],
        progress: Callable[[str], None] = lambda _: None,
        *kind: Any,
    ) -> LoopProgram:
        for other, known in self.programs:
            if other == kind and tuple(known.specs) == chunks and same_model(known.model, model):
                return dataclasses.replace(known, model=model)
        self.programs.append((kind, trace(model, chunks, progress, *kind)))
        return self.programs[-1][1]

    def to_onnx(self, method: ExportedMethod, compact: bool, gathered: bool = False) -> onnx.ModelProto:
        key = (id(method), compact, gathered)  # `self.programs` keeps the methods alive
        if key not in self.graphs:
            self.graphs[key] = self._to_onnx(method, compact, gathered)
        return copy.deepcopy(self.graphs[key])

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pipeline, "trace", self.trace)
        monkeypatch.setattr(onnx_target, "to_onnx", self.to_onnx)
        # What another process lowers, nobody remembers here.
        monkeypatch.setattr(onnx_target, "aside", lambda work, idle: nullcontext(lambda: None))


def same_model(a: Any, b: Any) -> bool:
    """Equal type, configuration and weights."""
    if type(a) is not type(b) or getattr(a, "config", None) != getattr(b, "config", None):
        return False
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
