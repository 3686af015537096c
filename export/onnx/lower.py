"""LoopProgram -> ONNX: one graph per method for calls of any size, one file of weights for all of them.

The loop is an ONNX `Loop`, with the weights and the KV ring read from outer scope: what an ONNX Runtime `Loop` carries
is copied in every iteration. K and V of the call are a scan output, and leave the graph for the host to commit.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx
from onnxscript import ir
from torch import nn
from torch.onnx._internal.exporter import _core as exporter
from torch.onnx._internal.exporter._registration import ONNXRegistry
from tqdm import tqdm

from rmse_edge.errors import ExportError, quiet
from rmse_edge.export.program import ExportedMethod, LoopProgram
from rmse_edge.export.targets import LowerOptions, target
from rmse_edge.layers.held import weights_of_codes
from rmse_edge.quantize.parallel import aside

from .experts import expand_expert_loops
from .ops import STORED_WEIGHT, translations
from .options import OnnxOptions
from .passes import PASSES, name_sizes
from .quantize import check_format, prepare, use_integers, with_float_activations
from .weights import MODEL, WeightFile, aliases

OPSET = 23
WEIGHTS = "weights.bin"


def graph_file(program: LoopProgram, method: ExportedMethod) -> str:
    """METHOD.onnx; where other graphs of the method serve other calls, METHOD_ROWS.onnx."""
    alone = sum(m.name == method.name for m in program.methods) == 1
    return f"{method.name}.onnx" if alone else f"{method.name}_{method.chunks[0]}.onnx"


@cache
def registry(compact: bool, gathered: bool) -> ONNXRegistry:
    """What `torch.onnx.export` reads its operators' translations from, with ours; see `translations`.

    `torch.onnx.export` makes one in every call, from the source text of some 500 functions: half a second for each method.
    """
    found = ONNXRegistry.from_torchlib(opset_version=OPSET)
    for operator, translation in translations(compact, gathered).items():
        found.register_op(operator, translation)
    return found


@contextlib.contextmanager
def without_monitor() -> Iterator[None]:
    """The exporter's bars, which nobody sees, leave no thread of tqdm's that watches them: `aside` copies no process that
    has several.
    """
    before, tqdm.monitor_interval = tqdm.monitor_interval, 0
    try:
        yield
    finally:
        tqdm.monitor_interval = before


def to_onnx(method: ExportedMethod, compact: bool, gathered: bool = False) -> onnx.ModelProto:
    """One traced method as an ONNX model with its weights inline, after all passes; but for the codes of quantised weights,
    whose initializers have no data.
    """
    # It reports on every optional package it does not find.
    with quiet(), without_monitor(), contextlib.redirect_stdout(io.StringIO()):
        exported = exporter.export(
            method.program,
            opset_version=OPSET,
            input_names=[t.name for t in method.takes],
            output_names=[t.name for t in method.gives],
            registry=registry(compact, gathered),
            verbose=False,
        )
    without_codes(exported.model)
    name_apart(exported.model)
    model = exported.model_proto
    name_sizes(model, method.takes)
    for apply in PASSES:
        apply(model)
    return model


def name_apart(model: ir.Model) -> None:
    """Give values within the graph other names than its inputs and outputs have.

    Given:  inputs theta, cos;  cos = Cos(theta), which the tracer calls by its operator
    Result: inputs theta, cos;  cos_within_0 = Cos(theta)
    """
    ends = [*model.graph.inputs, *model.graph.outputs]
    names, own = {value.name for value in ends}, {id(value) for value in ends}
    within = (value for node in ir.traversal.RecursiveGraphIterator(model.graph) for value in node.outputs)
    for i, value in enumerate(value for value in within if value.name in names and id(value) not in own):
        value.name = f"{value.name}_within_{i}"


def without_codes(model: ir.Model) -> None:
    """Leave out the data of what only `StoredWeight` reads as codes: `use_integers` writes its own, in other layouts.

    They are as large as all other data of a model together, and passes copy what a graph holds.
    """
    nodes = [*ir.traversal.RecursiveGraphIterator(model.graph)]
    codes = {node.inputs[0].name for node in nodes if node.op_type == STORED_WEIGHT and node.inputs[0] is not None}
    for name in codes & set(model.graph.initializers):
        value = model.graph.initializers[name]
        tensor = value.const_value
        assert tensor is not None and name is not None
        value.const_value = ir.ExternalTensor("", None, None, tensor.dtype, shape=tensor.shape, name=name)


def _compact(method: ExportedMethod, own: OnnxOptions) -> bool:
    return own.compact and max(method.chunks) > 1


def _behind_loop(program: LoopProgram) -> tuple[ExportedMethod, ...]:
    """The methods that come after the loop: together about as much work as it."""
    names = [method.name for method in program.methods]
    return program.methods[names.index("loop") + 1 :] if "loop" in names else ()


def _lowered(methods: tuple[ExportedMethod, ...], own: OnnxOptions) -> dict[str, onnx.ModelProto]:
    """By label."""
    return {method.label: to_onnx(method, _compact(method, own), own.gathered) for method in methods}


@target(
    "onnx",
    options=OnnxOptions,
    twins=True,
    any_rows=True,
    grows=True,
    batches=True,
    plans=True,
    drafts=True,
    asymmetric=True,
    scale_bytes=4,
    check_format=check_format,
    prepare=prepare,
)
def lower(program: LoopProgram, folder: Path, options: LowerOptions) -> dict[str, Any]:
    """Write METHOD.onnx and weights.bin into `folder`.

    Returns:
        "graphs": METHOD_ROWS -> the file that serves calls of so many rows; "weights", "opset", "compact"; "experts", where
        they are not fused. With
        `options.exact_twin` also "exact_twin", the same for graphs that read the same integers with float activations.
    Raises:
        ExportError: a graph that ONNX's own checker refuses, or a quantised weight that no graph reads as integers.
    """
    own: OnnxOptions = options.own or OnnxOptions()
    model = program.model
    codes = weights_of_codes(model) if isinstance(model, nn.Module) else {}
    names = {f"{MODEL}{buffer}": name for buffer, name in codes.items()}
    graphs: dict[str, str] = {}
    twins: dict[str, str] = {}
    read: set[str] = set()
    with quiet():
        for compact in {_compact(method, own) for method in program.methods}:
            registry(compact, own.gathered)  # once, not on both cores
    with (
        aside(partial(_lowered, _behind_loop(program), own), options.idle) as ahead,
        WeightFile(folder / WEIGHTS, aliases(model), half=options.quant == "fp16") as weights,
    ):
        known: dict[str, onnx.ModelProto] | None = None
        for method in program.methods:
            options.progress(f"lowering {method.label}")
            if known is None and method in _behind_loop(program):
                known = ahead() or {}
            graph = (known or {}).get(method.label) or to_onnx(method, _compact(method, own), own.gathered)
            if options.tensors:
                read |= use_integers(graph, options.tensors, names, own.level)
            expand_expert_loops(graph)
            weights.take(graph)
            file = graph_file(program, method)
            onnx.save(graph, folder / file)
            graphs |= {f"{method.name}_{chunk}": file for chunk in method.chunks}
            if options.exact_twin:
                with_float_activations(graph)
                onnx.save(graph, folder / f"exact-{file}")
                twins |= {f"{method.name}_{chunk}": f"exact-{file}" for chunk in method.chunks}
    for name in options.tensors:
        if name not in read:
            raise ExportError(
                f"{name}: is quantised, but no graph reads it as integers; export with quant=fp32 or fp16"
            )
    for file in dict.fromkeys(graphs.values()):
        try:
            onnx.checker.check_model(str(folder / file))
        except onnx.checker.ValidationError as error:
            raise ExportError(f"{file}: {str(error).splitlines()[0]}") from error
    found: dict[str, Any] = {"opset": OPSET, "graphs": graphs, "weights": WEIGHTS, "compact": own.compact}
    if own.gathered:
        found["experts"] = own.experts
    if options.tensors:
        found["accuracy_level"] = own.level
    return found | ({"exact_twin": found | {"graphs": twins, "accuracy_level": 0}} if options.exact_twin else {})
