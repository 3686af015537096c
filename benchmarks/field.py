"""Who takes part, and how each one's process is started."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .artifacts import Artifacts, Missing
from .shapes import Looped, Twin

BASELINE = "llama.cpp"
# Name -> what it runs. The first two run what stands beside the looped model: a dense twin, or llama.cpp the model itself.
CONTESTANTS = {
    BASELINE: "llama.cpp, Q4_0",
    "unrolled": "ONNX Runtime, dense twin unrolled, int4",
    "rmse-runner": "rmse-runner, ExecuTorch package, int4",
    "onnx": "ONNX Runtime from Python, int4",
    "executorch": "ExecuTorch from Python, int4",
    "eager": "PyTorch eager, fp32",
    "compiled": "PyTorch torch.compile, fp32",
}
TWINS = (BASELINE, "unrolled")
MOST = 1_000_000_000  # parameters of a twin that is exported


@dataclass(frozen=True)
class Timed:
    """What is timed."""

    prompt: int = 512  # tokens of pp; 0: not timed
    generate: int = 128  # tokens of tg, behind 64 others; 0: not timed

    def named(self) -> list[tuple[str, int]]:
        return [(kind, count) for kind, count in (("pp", self.prompt), ("tg", self.generate)) if count]

    @property
    def positions(self) -> int:
        """Of the longest text."""
        return max(self.prompt, self.generate + 64 if self.generate else 0)


@dataclass(frozen=True)
class Start:
    """How a contestant's process is started."""

    command: list[str]
    file_bytes: int | None  # of what it opens; None: nothing, it makes its weights


def depths_of(name: str, model: Looped) -> tuple[int | None, ...]:
    """A contestant's rows: loops; None: the model stops by itself, or has no loop."""
    return {BASELINE: (None,), "unrolled": (1,)}.get(name) or model.depths()


def start_of(name: str, model: Looped, threads: int, tests: Timed, files: Artifacts) -> Start:
    """
    Raises:
        Missing: what it runs is not there; one line says why.
    """
    if name == BASELINE:
        twin = files.gguf(model.twin)
        given: dict[str, Any] = {"model": str(twin), "threads": threads, "positions": rounded(tests.positions)}
        if not isinstance(model.twin, Twin):  # whose weights are read several times
            given["reads"] = model.twin.reads
        return Start(child(files.llama(), "llama_cpp", given), twin.stat().st_size)
    if name == "unrolled":
        if not isinstance(model.twin, Twin):
            raise Missing("there is no dense twin: llama.cpp runs the model itself")
        if model.twin.parameters > MOST:
            raise Missing(f"the twin's graph is made of floats, {4 * model.twin.parameters / 1e9:.0f} GB of them")
        package = files.unrolled(model.twin)
        arguments = [str(package), "--ids", str(files.ids(model.twin.vocab, tests.positions))]
        return in_python(arguments, depths_of(name, model), threads, tests, size_of(package))
    if name == "rmse-runner":
        runner, package = files.runner(), files.package(model, "executorch")
        given = {"runner": str(runner), "package": str(package), "threads": threads}
        return Start(child(sys.executable, "native", given), size_of(package))
    if name in ("onnx", "executorch"):
        package = files.package(model, name)
        ids = [] if model.checkpoint else ["--ids", str(files.ids(model.config["vocab_size"], tests.positions))]
        return in_python([str(package), *ids], depths_of(name, model), threads, tests, size_of(package))
    if name in ("eager", "compiled"):
        if model.checkpoint:
            arguments, size = [str(model.checkpoint)], size_of(model.checkpoint, "*.safetensors")
        else:
            arguments, size = ["--config", str(files.config(model)), "--runtime", "torch"], None
        return in_python(arguments, depths_of(name, model), threads, tests, size, name == "compiled")
    raise Missing(f"no contestant {name}")


def in_python(
    arguments: list[str],
    depths: tuple[int | None, ...],
    threads: int,
    tests: Timed,
    size: int | None,
    compiled: bool = False,
) -> Start:
    fixed = ",".join(str(depth) for depth in depths if depth)
    sizes = ["-p", str(tests.prompt), "-n", str(tests.generate), "-d", fixed, "-t", str(threads)]
    given = {"arguments": [*arguments, *sizes], "compiled": compiled}
    return Start(child(sys.executable, "in_python", given), size)


def child(python: str | Path, module: str, given: dict[str, Any]) -> list[str]:
    return [str(python), "-m", f"benchmarks.contestants.{module}", json.dumps(given)]


def rounded(positions: int) -> int:
    """Up to a multiple of 256, as llama.cpp lays its cache out."""
    return -(-positions // 256) * 256


def size_of(folder: Path, files: str = "*") -> int:
    return sum(file.stat().st_size for file in folder.rglob(files) if file.is_file())
