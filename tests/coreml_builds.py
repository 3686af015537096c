"""One function of a model at a time: converted, saved and run."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from later import later

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.errors import quiet
from rmse_edge.export.coreml.options import CoremlOptions
from rmse_edge.export.gate.methods import example_feeds
from rmse_edge.export.pipeline import ExportRequest, as_cached
from rmse_edge.export.program import ExportedMethod, Method, _traced, signature
from rmse_edge.export.targets import LowerOptions
from rmse_edge.quantize import QuantizedTensor
from rmse_edge.runtimes.engines.torch import TorchMethods
from rmse_edge.runtimes.mil.file import ModelFile, operations
from rmse_edge.runtimes.mil.interpreter import Interpreter

coreml_check = later("rmse_edge.export.coreml.check")
coreml_functions = later("rmse_edge.export.coreml.functions")
coreml_lower = later("rmse_edge.export.coreml.lower")
coreml_ops = later("rmse_edge.export.coreml.ops")

MODEL = "model.mlpackage"
FULL = {"max_loops": 4, "min_loops": 1, "exit_threshold": 1.0, "exit_epsilon": 0.0}


def traced(model: RMSE, name: str, chunk: int) -> ExportedMethod:
    spec = model.spec(chunk)
    return _traced(Method(model, spec, name, signature(spec, name, True)), (chunk,), lambda _: None)


@dataclasses.dataclass
class Built:
    """One function of a model, saved as "main"."""

    path: Path
    wanted: coreml_check.Expected
    model: RMSE  # as it was traced

    def check(self, tensors: dict[str, QuantizedTensor] | None = None, halves: bool = True) -> dict[str, Any]:
        return coreml_check.check(self.path, {"main": self.wanted}, tensors or {}, self.model, halves)


def built(
    model: RMSE,
    name: str,
    folder: Path,
    chunk: int = 1,
    quant: str = "fp16",
    tensors: dict[str, QuantizedTensor] | None = None,
    compute: str = "cpu",
    halves: bool | None = None,
    states: bool | None = None,
) -> Built:
    """Convert one method and save its function."""
    request = ExportRequest("coreml", quant)
    options = LowerOptions(quant, tensors or {}, CoremlOptions(compute=compute))
    ready = coreml_ops.prepare(as_cached(model, request), options)
    halves = quant != "fp32" if halves is None else halves
    with quiet(), coreml_lower.silenced_bars():
        method = traced(ready, name, chunk)  # type: ignore[arg-type]
        spec = ready.spec(chunk)  # type: ignore[operator]
        assembly = coreml_functions.Assembly(
            spec,
            {name: coreml_lower.converted(method, halves, compute, coreml_lower.replaced_by(spec))},
            halves if states is None else states,
        )
        path = folder / f"{name}_{chunk}.mlpackage"
        shutil.rmtree(path, ignore_errors=True)
        coreml_lower.saved(assembly.program(name), str(path))
    return Built(path, coreml_check.expected(assembly, {name: method}, name), ready)  # type: ignore[arg-type]


def kinds_of(built: Built) -> Counter[str]:
    return Counter(op.kind for op in operations(ModelFile(built.path).function("main")))


def run(
    built: Built, feeds: dict[str, np.ndarray], state: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Call a saved function on tensors of the LoopProgram."""
    interpreter = Interpreter(built.path)
    takes = interpreter.signature().inputs
    given = {name: np.asarray(feeds[name], t.array_dtype).reshape(t.shape) for name, t in takes.items()}  # type: ignore[arg-type]
    return interpreter.predict(given, state)


def feeds_of(model: RMSE, chunk: int) -> dict[str, Any]:
    """Made-up inputs of every method; of step those of iteration 1."""
    spec, methods = model.spec(chunk), TorchMethods(model)
    feeds = example_feeds(spec, methods)
    with torch.no_grad():
        carry, fixed = model.begin({k: torch.from_numpy(np.asarray(v)) for k, v in feeds.items()})
    carry["depth"] = torch.zeros(carry["active"].shape, dtype=torch.int64)
    rows = {t.name: feeds[t.name][1] for t in spec.state}
    values = feeds | {k: v.numpy() for k, v in (carry | fixed).items()} | rows | FULL | {"k": np.array(1)}
    return {k: np.asarray(v) for k, v in values.items()}


def torch_results(model: RMSE, name: str, chunk: int, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    spec = model.spec(chunk)
    method = Method(model, spec, name, signature(spec, name, True))
    dtypes = {t.name: t.dtype for t in method.takes}
    with torch.no_grad():
        out = method(*(torch.from_numpy(np.asarray(feeds[n])).to(d) for n, d in dtypes.items()))
    return {t.name: v.numpy() for t, v in zip(method.gives, out)}
