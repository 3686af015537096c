"""The whole packages, checkpoints and knowledge bases that cases are made from, made once and kept in a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from . import subjects
from .subjects import Subject

ROOT = Path(__file__).resolve().parent.parent.parent
RUNNER = ROOT / "build" / "native" / "rmse-runner"
# In a process of its own: what exports start does not live through a fork.
EXPORT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers import calm_quantized, remembering_model, write_checkpoint
from rmse_edge.export import ExportRequest, export_package
from rmse_edge.quantize.store import save_quantized
what, folder = sys.argv[2], Path(sys.argv[3])
if what == "checkpoint":
    write_checkpoint(remembering_model(), folder)
elif what == "quantized":
    save_quantized(calm_quantized(), folder)
else:
    export_package(remembering_model(), folder, ExportRequest(what, check=False))
"""


def made(what: str, cache: Path) -> Path:
    """A tiny model with a memory and a retrieval head, as a checkpoint or a package."""
    folder = cache / (what if what in ("checkpoint", "quantized") else f"{what}.rmse")
    if not folder.exists():
        subprocess.run([sys.executable, "-c", EXPORT, str(ROOT / "tests"), what, str(folder)], check=True)
    return folder


def subject(name: str, cache: Path) -> Subject:
    cache = cache.resolve()
    if name == "runner":
        if not RUNNER.is_file():
            raise SystemExit(f"{RUNNER}: not there; build it with: make runner")
        return subjects.runner(made("executorch", cache), RUNNER)
    if name == "session":
        return subjects.session(made("onnx", cache))
    if name == "knowledge":
        return subjects.knowledge(cache)
    if name == "config":
        return subjects.config(made("checkpoint", cache))
    if name == "quantized":
        return subjects.quantized(made("quantized", cache))
    return subjects.package(made(name, cache), name)
