"""The files that contestants open, made when they are first asked for and kept in a cache folder.

A package's name has a digest of its configuration and of the project's own source, so that one made by other code is
never timed. What could not be made is not tried again.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np

from rmse_edge.errors import UserError, first_line, quiet

from . import llama
from .child import ROOT
from .shapes import HrmText, Looped, Twin

T = TypeVar("T")
SOURCES = ("rmse_edge/**/*.py", "export/**/*.py", "quantize/**/*.py", "runtimes/**/*.py", "runtimes/native/kernels/*")
RANDOM = ROOT / "docs" / "experiments" / "random_checkpoint.py"
POSITIONS = 4096  # of a text of a large model, at most
RUNNER = ROOT / "build" / "native" / "rmse-runner"


class Missing(Exception):
    """A contestant cannot take part: one line says what is missing."""


class Artifacts:
    def __init__(self, folder: Path, llama_python: Path | None, runner: Path, say: Callable[[str], object]) -> None:
        """
        Args:
            folder: the cache.
            llama_python: of an environment that has llama-cpp-python; None: one is made.
            say: takes a line about what is being made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.say = folder, say
        self._llama, self._runner = llama_python, runner
        self._failures: dict[str, str] = {}

    def llama(self) -> Path:
        """The Python of llama.cpp's environment."""
        return self._once("llama.cpp", lambda: llama.llama_python(self._llama, self.folder, self.say))

    def gguf(self, twin: Twin | HrmText) -> Path:
        """What llama.cpp runs."""
        shape, module = twin.shape(), "twin_gguf" if isinstance(twin, Twin) else "hrm_text_gguf"
        made_by = (source(str(ROOT / "benchmarks" / f"{name}.py")) for name in dict.fromkeys(("twin_gguf", module)))
        path = self.folder / f"{twin.name}-{digest(json.dumps(shape), *made_by)}.gguf"
        if not path.is_file():
            python = self.llama()
            self._once(path.name, lambda: llama.write_gguf(python, module, shape, path))
        return path

    def runner(self) -> Path:
        if not self._runner.is_file():
            raise Missing("not built: make runner")
        return self._runner

    def config(self, model: Looped) -> Path:
        return self._written(model.name, model.config)

    def package(self, model: Looped, target: str) -> Path:
        """In int4: of random weights, or of the checkpoint, calibrated with its own sample and through the parity gate."""
        if model.shape is not None:
            return self._of_shape(model, model.shape, target)
        if model.checkpoint is None:
            return self._random(model.name, self.config(model), target)
        made_of = digest(source(str(model.checkpoint / "model.safetensors")), project())
        path = self.folder / f"{model.name}-{target}-{made_of}.rmse"
        quantised = self.folder / f"{model.name}-int4-{made_of}"
        sample = model.checkpoint / "sample.txt"

        def make() -> None:
            if not quantised.is_dir():
                self._verb(
                    "quantize", "-m", model.checkpoint, "-o", quantised, "--quant", "int4", "--calibrate", sample
                )
            self._verb("export", "-m", quantised, "-o", path, "--target", target)

        return self._made(path, make)

    def _of_shape(self, model: Looped, shape: str, target: str) -> Path:
        """Of a model that is too large to be made as floats, but on disk."""
        made_of = digest(source(str(RANDOM)), project())
        path = self.folder / f"{model.name}-{target}-{made_of}.rmse"
        quantised = self.folder / f"{model.name}-int4-{made_of}"

        def make() -> None:
            if not quantised.is_dir():
                with TemporaryDirectory(dir=self.folder) as folder:
                    floats = Path(folder) / model.name
                    self._run(RANDOM, floats, "--shape", shape)
                    self._verb("quantize", "-m", floats, "-o", quantised, "--quant", "int4", "--method", "rtn")
            self._aside(export_integers, quantised, path, target)

        return self._made(path, make)

    def unrolled(self, twin: Twin) -> Path:
        name = f"{twin.name}-unrolled"
        return self._random(name, self._written(name, twin.unrolled()), "onnx")

    def ids(self, vocabulary: int, count: int) -> Path:
        """Random tokens, for models of random weights."""
        path = self.folder / f"ids-{vocabulary}-{count}.npy"
        if not path.is_file():
            np.save(path, np.random.default_rng(0).integers(0, vocabulary, count))
        return path

    def _written(self, name: str, config: dict[str, object]) -> Path:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(config, indent=2) + "\n")
        return path

    def _random(self, name: str, config: Path, target: str) -> Path:
        path = self.folder / f"{name}-{target}-{digest(config.read_text(), project())}.rmse"

        return self._made(path, lambda: self._aside(export_quietly, config, path, target))

    def _aside(self, work: Callable[[Path, Path, str], None], *arguments: Path | str) -> None:
        """In a process of its own: exporting leaves a large heap behind."""
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(work, *arguments).result()

    def _made(self, path: Path, make: Callable[[], object]) -> Path:
        if not path.is_dir():
            self.say(f"making {path.name}")
            self._once(path.name, make)
        return path

    def _verb(self, verb: str, *arguments: str | Path) -> None:
        self._run("-m", f"rmse_edge.cli.{verb}", *arguments)

    def _run(self, *arguments: str | Path) -> None:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(done.stderr.strip().splitlines()[-1])

    def _once(self, name: str, make: Callable[[], T]) -> T:
        """
        Raises:
            Missing: it cannot be made, or could not before.
        """
        if name in self._failures:
            raise Missing(self._failures[name])
        try:
            return make()
        except Exception as error:
            self._failures[name] = f"not built: {first_line(error)}"
            raise Missing(self._failures[name]) from error


def export_quietly(config: Path, path: Path, target: str) -> None:
    """`export_random` in int4; what PyTorch warns about models of few parts is its own business."""
    from rmse_edge.cli.bench import export_random

    with quiet():
        export_random(config, path, "int4", target)


def export_integers(folder: Path, path: Path, target: str) -> None:
    """A quantised checkpoint of random weights, unchecked: there is nothing to be right about but the time."""
    from rmse_edge.export.pipeline import ExportRequest, export_package
    from rmse_edge.quantize import load_quantized

    with quiet():
        quantized = load_quantized(folder)
        request = ExportRequest(target, quantized.quant, max_seq_len=POSITIONS, check=False)
        export_package(quantized.model, path, request, quantized=quantized)


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@cache
def source(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@cache
def project() -> str:
    """A digest of the code that makes packages."""
    files = sorted(file for pattern in SOURCES for file in ROOT.glob(pattern) if file.is_file())
    return digest(*(source(str(file)) for file in files))
