"""ONNX Runtime: the loop runs inside the graph, the KV ring is bound in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import PackageError, UserError
from ..package import Package
from .base import Arrays, ModelInfo
from .host import LoopRuntime

# Arrays up to this many bytes are copied into a buffer that stays bound; binding costs more than the copy.
COPY_BELOW = 16384


def _import_onnxruntime():
    try:
        import onnxruntime
    except ImportError:
        raise UserError("onnxruntime is not installed; install it with: pip install 'rmse-edge[onnx]'") from None
    return onnxruntime


class BoundSession:
    """One graph with every input and output bound once; a call moves only what changed."""

    def __init__(self, path: Path, threads: int | None) -> None:
        ort = _import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Several sessions live in one process: idle threads that spin would take cores from the one at work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class of its own
            reason = " ".join(str(error).split())
            raise PackageError(f"{path}: onnxruntime cannot load it ({reason}); export the package again") from None
        self._ort = ort
        self._binding = self.session.io_binding()
        self._inputs = {i.name: _array(i) for i in self.session.get_inputs()}
        self._bound: dict[str, np.ndarray] = {}
        self.outputs = {}
        for name, array in self._inputs.items():
            self._bind(name, array)
        for output in self.session.get_outputs():
            self.outputs[output.name] = array = _array(output)
            self._binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(array))

    def _bind(self, name: str, array: np.ndarray) -> None:
        self._binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))
        self._bound[name] = array  # keeps the memory alive: the binding does not own it

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        for name, own in self._inputs.items():
            given = feeds[name]
            if self._bound[name] is given:
                continue
            if given.shape != own.shape or given.dtype != own.dtype:
                raise ValueError(f"{name}: got {given.shape} {given.dtype}, expected {own.shape} {own.dtype}")
            if own.nbytes > COPY_BELOW and given.flags.c_contiguous:
                self._bind(name, given)
                continue
            if self._bound[name] is not own:
                self._bind(name, own)
            np.copyto(own, given)
        self.session.run_with_iobinding(self._binding)
        return self.outputs


def _array(value) -> np.ndarray:
    """A zeroed array of a graph input's or output's static shape."""
    dtype = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(bool)": "bool"}
    return np.zeros(value.shape, dtype[value.type])


class OnnxMethods:
    """`Methods` over the graphs of a package. A session is made when its method is first called."""

    def __init__(self, folder: Path, graphs: Mapping[str, str], threads: int | None = None) -> None:
        self.folder = folder
        self.graphs = graphs
        self.threads = threads
        self._sessions: dict[tuple[str, int], BoundSession] = {}

    def session(self, method: str, chunk: int) -> BoundSession:
        key = (method, chunk)
        if key not in self._sessions:
            file = self.graphs.get(f"{method}_{chunk}")
            if file is None:
                raise PackageError(
                    f"{self.folder}: holds no {method} for {chunk} rows; it has {', '.join(self.graphs)}"
                )
            self._sessions[key] = BoundSession(self.folder / file, self.threads)
        return self._sessions[key]

    def run(self, method: str, chunk: int, feeds: Arrays) -> Arrays:
        return self.session(method, chunk).run(feeds)


class OnnxRuntime(LoopRuntime):
    """A package exported with `--target onnx`."""

    def __init__(self, package: Package, threads: int | None = None) -> None:
        manifest = package.manifest
        self.package = package
        info = ModelInfo.from_json(manifest["model"], nbytes=package.nbytes)
        methods = OnnxMethods(package.folder, manifest["lowering"]["graphs"], threads)
        super().__init__(info, methods)
        for chunk in info.chunks:  # now, so that the first token does not wait for it
            for method in ("prelude", "loop", "head", "commit", "memorize", "embed_segment"):
                if f"{method}_{chunk}" in methods.graphs:
                    methods.session(method, chunk)
