"""LoopProgram -> Core ML: one multifunction `.mlpackage` with a function for every METHOD_ROWS, whose weights it holds once.

Core ML runs control flow on the CPU, so there are two ways to loop: `step`, driven by the host, has none and may be placed
on the GPU or the Neural Engine; `loop` is the whole loop in the graph, one call for all iterations. Both read the same
weights. Packages in float16 keep the rings of keys and values in states; those in float32 take and return them, because
states are float16.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Program

from rmse_edge.errors import ExportError, UserError, first_line, quiet
from rmse_edge.export.program import ExportedMethod, LoopProgram
from rmse_edge.export.targets import LowerOptions, target
from rmse_edge.loop.contract import LoopSpec, Replace
from rmse_edge.numbers import KvDtype

from .check import Expected, check, decides, expected
from .functions import OPSET, Assembly, Converted, signatures
from .ops import DECOMPOSITIONS, check_format, prepare
from .options import CoremlOptions
from .precision import Halving

MODEL = "model.mlpackage"
# Methods that compute in float32 in every package: masks, and what a text's memory and its passages are made of.
FULL_PRECISION = ("begin", "blank", "memorize", "embed_segment")


def cache_type(quant: str, own: KvDtype) -> KvDtype:
    """Keys and values in float16 where they are kept in states; otherwise in a type that Core ML takes and gives."""
    if keeps_states(quant) or own == "float16":
        return "float16"
    return "float32"


def keeps_states(quant: str) -> bool:
    """Whether packages of this precision keep the rings: Core ML's states are float16."""
    return quant != "fp32"


@target(
    "coreml",
    options=CoremlOptions,
    asymmetric=True,
    host_loop=True,
    halves=("fp16", "int8", "int4"),
    stages=(("converting", 1.0), ("assembling", 1.0), ("joining", 0.1), ("checking", 0.5)),
    positions=512,  # the interpreter is no engine: these take it about a minute
    cache=cache_type,
    signatures=lambda spec, quant: signatures(spec, keeps_states(quant)),
    check_format=check_format,
    prepare=prepare,
)
def lower(program: LoopProgram, folder: Path, options: LowerOptions) -> dict[str, Any]:
    """Write model.mlpackage into `folder`.

    Returns:
        "program": its name; "compute": what it is laid out for; "rings": of every state its shape and the part that is
        used; "structure": what the checks counted; "kept": the type of every state, for the manifest's model.
    Raises:
        ExportError: Core ML has no form for a method, or the saved program fails its checks.
    """
    halves = keeps_states(options.quant)
    own: CoremlOptions = options.own or CoremlOptions()
    compute = own.compute
    with quiet(), refusals("the program"), tempfile.TemporaryDirectory(dir=folder) as scratch:
        described = ct.utils.MultiFunctionDescriptor()
        wanted: dict[str, Expected] = {}
        rings: dict[str, Any] = {}
        for chunk, spec in program.specs.items():
            traced = {method.name: method for method in program.methods if method.chunks == (chunk,)}
            replaced = replaced_by(spec)
            methods = {}
            for name, method in traced.items():
                options.progress(f"converting {method.label}")
                with silenced_bars():
                    methods[name] = converted(method, halves, compute, replaced)
            assembly = Assembly(spec, methods, states=halves)
            rings = {ring.name: {"shape": ring.shape, "held": ring.held} for ring in assembly.rings}
            for name in assembly.signatures:
                label = f"{name}_{chunk}"
                options.progress(f"assembling {label}")
                path = f"{scratch}/{label}.mlpackage"
                with silenced_bars():
                    saved(assembly.program(name), path)
                described.add_function(path, src_function_name="main", target_function_name=label)
                wanted[label] = expected(assembly, traced, name)
        described.default_function_name = f"step_{min(program.specs)}"
        options.progress("joining the functions")
        with silenced_bars():
            ct.utils.save_multifunction(described, str(folder / MODEL))
    options.progress("checking the saved program")
    counted = check(folder / MODEL, wanted, options.tensors, program.model, halves)  # type: ignore[arg-type]
    kept = dict.fromkeys(rings, "float16")
    return {"program": MODEL, "compute": compute, "rings": rings, "structure": counted, "kept": kept}


def replaced_by(spec: LoopSpec) -> frozenset[str]:
    """The results of methods that are states which every call replaces."""
    return frozenset(state.update.source for state in spec.state if isinstance(state.update, Replace))


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """What coremltools refuses of `what` becomes an `ExportError` of one line."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise ExportError(f"Core ML does not take {what}: {first_line(error)}") from error


@contextlib.contextmanager
def silenced_bars() -> Iterator[None]:
    """coremltools draws a progress bar for every pass over every function."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def saved(program: Program, path: str) -> None:
    """Write a program of one function as it is; the one pass tells apart what the builder may have named alike.

    Files know values by their names: of two with one name, a reader takes the wrong one or fails.
    """
    model = ct.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=OPSET,
        compute_precision=ct.precision.FLOAT32,  # what is to be float16 is by now
        pass_pipeline=ct.PassPipeline(["common::dedup_op_and_var_names"], "names only"),
        skip_model_load=True,
    )
    model.save(path)


def converted(method: ExportedMethod, halves: bool, compute: str, replaced: Collection[str] = frozenset()) -> Converted:
    """A traced method as a MIL function.

    Args:
        replaced: results that are states which every call replaces.
    Raises:
        ExportError: the converter refuses it.
    """
    precision: Any = ct.precision.FLOAT32
    if halves and method.name not in FULL_PRECISION:
        decisions = [i for i, t in enumerate(method.gives) if decides(method, t)]
        states = [i for i, t in enumerate(method.gives) if t.name in replaced]
        precision = ct.transform.FP16ComputePrecision(op_selector=Halving(decisions, compute != "ane", states))
    with refusals(method.label):
        program = ct.convert(
            method.program.run_decompositions(DECOMPOSITIONS),
            convert_to="milinternal",
            minimum_deployment_target=OPSET,
            compute_precision=precision,
            # Or float results would be float16: survival, too, which is a sum of many small numbers.
            outputs=[ct.TensorType(dtype=np.float32 if t.dtype.is_floating_point else np.int32) for t in method.gives],
        )
    return Converted(program.functions["main"], method.takes, method.gives, f"{method.name}_")
