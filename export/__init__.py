"""Export: model -> LoopProgram -> lowered files -> parity gate -> package. One folder and one decorator per target."""

from __future__ import annotations

from .coreml.options import CoremlOptions
from .executorch.options import ExecutorchOptions
from .onnx.options import OnnxOptions
from .pipeline import ExportRequest, describe, export_package
from .program import LoopProgram, trace
from .targets import target_names

__all__ = [
    "CoremlOptions",
    "ExecutorchOptions",
    "ExportRequest",
    "LoopProgram",
    "OnnxOptions",
    "describe",
    "export_package",
    "target_names",
    "trace",
]
