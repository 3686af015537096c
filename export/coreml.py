"""LoopProgram -> Core ML: one multifunction `.mlpackage` with a function for every METHOD_ROWS, whose weights it holds once.

Core ML runs control flow on the CPU, so there are two ways to loop: `step`, driven by the host, has none and may be placed
on the GPU or the Neural Engine; `loop` is the whole loop in the graph, one call for all iterations. Both read the same
weights. Packages in float16 keep the rings of keys and values in states; those in float32 take and return them, because
states are float16.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import torch

from ..errors import ExportError, quiet
from .coreml_check import Expected, check, expected
from .coreml_functions import OPSET, Assembly, Converted
from .coreml_ops import DECOMPOSITIONS, check_format, prepare
from .coreml_precision import Halving
from .program import ExportedMethod, LoopProgram, tensors_json
from .targets import LowerOptions, target

MODEL = "model.mlpackage"
# Methods that compute in float32 in every package: masks, and what a text's memory and its passages are made of.
FULL_PRECISION = ("begin", "blank", "memorize", "embed_segment")


def cache_type(quant: str, own: str) -> str:
    """Keys and values in float16 where they are kept in states; otherwise in a type that Core ML takes and gives."""
    if quant != "fp32" or own == "float16":
        return "float16"
    return "float32"


@target(
    "coreml",
    accuracy_levels=(0,),
    asymmetric=True,
    host_loop=True,
    halves=("fp16", "int8", "int4"),
    computes=("cpu", "gpu", "ane"),
    positions=512,  # the interpreter is no engine: these take it about a minute
    cache=cache_type,
    check_format=check_format,
    prepare=prepare,
)
def lower(program: LoopProgram, folder: Path, options: LowerOptions) -> dict[str, Any]:
    """Write model.mlpackage into `folder`.

    Returns:
        "program": its name; "compute": what it is laid out for; "rings": of every state its shape and the part that is
        used; "signatures": what every function takes and gives beside states, for the manifest.
    Raises:
        ExportError: Core ML has no form for a method, or the saved program fails its checks.
    """
    halves = options.quant != "fp32"
    compute = options.compute or "cpu"
    with quiet(), tempfile.TemporaryDirectory(dir=folder) as scratch:
        described = ct.utils.MultiFunctionDescriptor()
        signatures: dict[str, Any] = {}
        wanted: dict[str, Expected] = {}
        rings: dict[str, Any] = {}
        for chunk, spec in program.specs.items():
            traced = {method.name: method for method in program.methods if method.chunks == (chunk,)}
            methods = {}
            for name, method in traced.items():
                options.progress(f"converting {method.label}")
                methods[name] = converted(method, halves, compute)
            assembly = Assembly(spec, methods, states=halves)
            rings = {ring.name: {"shape": ring.shape, "held": ring.held} for ring in assembly.rings}
            for name in assembly.names():
                label = f"{name}_{chunk}"
                options.progress(f"assembling {label}")
                path = f"{scratch}/{label}.mlpackage"
                single = ct.convert(
                    assembly.program(name),
                    source="milinternal",
                    convert_to="mlprogram",
                    minimum_deployment_target=OPSET,
                    compute_precision=ct.precision.FLOAT32,  # what is to be float16 is by now
                    pass_pipeline=ct.PassPipeline.EMPTY,
                    skip_model_load=True,
                )
                single.save(path)
                described.add_function(path, src_function_name="main", target_function_name=label)
                wanted[label] = expected(assembly, traced, name)
                takes, gives = assembly.signature(name)
                signatures[label] = {"inputs": tensors_json(takes), "outputs": tensors_json(gives)}
        described.default_function_name = f"step_{min(program.specs)}"
        options.progress("joining the functions")
        ct.utils.save_multifunction(described, str(folder / MODEL))
    options.progress("checking the saved program")
    counted = check(folder / MODEL, wanted, options.tensors, program.model, halves)
    return {"program": MODEL, "compute": compute, "rings": rings, "structure": counted, "signatures": signatures}


def converted(method: ExportedMethod, halves: bool, compute: str) -> Converted:
    """A traced method as a MIL function.

    Raises:
        ExportError: the converter refuses it.
    """
    precision: Any = ct.precision.FLOAT32
    if halves and method.name not in FULL_PRECISION:
        decisions = [i for i, t in enumerate(method.gives) if decides(method, t.name)]
        precision = ct.transform.FP16ComputePrecision(op_selector=Halving(decisions, compute != "ane"))
    try:
        program = ct.convert(
            method.program.run_decompositions(DECOMPOSITIONS),
            convert_to="milinternal",
            minimum_deployment_target=OPSET,
            compute_precision=precision,
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"Core ML does not take {method.label}: {reason}") from error
    return Converted(program.functions["main"], method.takes, method.gives)


def decides(method: ExportedMethod, name: str) -> bool:
    """Whether a result of `step` only says how to go on: whatever it carries beside the state."""
    state = method.gives[0].name  # next_h
    return method.name == "step" and (name == "any_active" or (name.startswith("next_") and name != state))
