"""Export: model -> LoopProgram -> lowered files -> parity gate -> package. One file and one decorator per target."""

from __future__ import annotations

from .pipeline import ExportRequest, describe, export_package
from .program import LoopProgram, trace
from .targets import target_names

__all__ = ["ExportRequest", "LoopProgram", "describe", "export_package", "target_names", "trace"]
