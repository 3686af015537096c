"""ONNX Runtime: the loop runs inside the graph, the KV ring is bound in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmse_edge.errors import PackageError, UserError
from rmse_edge.info import ModelInfo
from rmse_edge.numbers import BOARDS, ROWS, SLOTS
from rmse_edge.package import Package
from rmse_edge.runtimes.host.base import Arrays, Methods
from rmse_edge.runtimes.host.board import BATCHED
from rmse_edge.runtimes.host.calls import Calls, Opened
from rmse_edge.runtimes.host.plan import Outputs, PlannedLoop
from rmse_edge.runtimes.host.signatures import (
    Form,
    Method,
    Refuse,
    check_engine,
    check_methods,
    read_methods,
    read_model,
    refusal,
)
from rmse_edge.runtimes.host.text import LoopRuntime
from rmse_edge.schema import Name

from .release import release_mapped

# Arrays up to this many bytes are copied into a buffer that stays bound; binding costs more than the copy.
COPY_BELOW = 16384
TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int8)": "int8",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


def _import_onnxruntime():
    try:
        import onnxruntime
    except ImportError:
        raise UserError("onnxruntime is not installed; install it with: pip install 'rmse-edge[onnx]'") from None
    return onnxruntime


# The smallest graph there is, as onnx writes it: y = Identity(x), one float.
SMALLEST = (
    b'\x08\n:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b\x0f'
    b"\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x17"
)


def start_engine() -> None:
    """Load and run a graph without weights, so that what the engine itself takes is in memory."""
    session = _import_onnxruntime().InferenceSession(SMALLEST, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.zeros(1, np.float32)})


def load_graph(path: Path, threads: int | None, run: bool = True) -> Any:
    """The engine's session for a graph.

    Args:
        run: without it, only what the graph takes and gives will be asked: that costs some ms and no memory.
    Raises:
        PackageError: the engine cannot load it.
    """
    ort = _import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Several sessions live in one process: idle threads that spin would take cores from the one at work.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Measured with one small call after the other: 10 % faster decoding and less memory with plain malloc.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    if not run:
        threads, options.graph_optimization_level = 1, ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class of its own
        reason = " ".join(str(error).split())
        raise PackageError(f"{path}: onnxruntime cannot load it ({reason}); export the package again") from None


class BoundSession:
    """A graph as calls of one size run it: every input and output is bound once, a call moves only what changed.

    Calls of other sizes share the session, which owns the weights, and have bindings of their own. A batch of boards, whose
    size changes from iteration to iteration, goes without.
    """

    def __init__(self, session: Any, rows: int) -> None:
        """
        Args:
            session: an `onnxruntime.InferenceSession`.
            rows: what the dimensions named `ROWS` are in these calls.
        """
        self.session = session
        self._ort = ort = _import_onnxruntime()
        self._binding = self.session.io_binding()
        # Inputs that grow with the appended state have no buffer here: they are bound where the host has them.
        self._growing = {i.name: i for i in self.session.get_inputs() if SLOTS in i.shape}
        self._inputs = {i.name: _array(i, rows) for i in self.session.get_inputs() if i.name not in self._growing}
        self._bound: dict[str, np.ndarray] = {}
        self.outputs = {}
        for name, array in self._inputs.items():
            self._bind(name, array)
        for output in self.session.get_outputs():
            self.outputs[output.name] = array = _array(output, rows)
            self._binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(array))
        self.rows = rows
        self._boards = next((i.name for i in self.session.get_inputs() if BOARDS in i.shape), None)

    def _bind(self, name: str, array: np.ndarray) -> None:
        self._binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))
        self._bound[name] = array  # keeps the memory alive: the binding does not own it

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        if self._boards is not None and len(feeds[self._boards]) > 1:
            together = {name: feeds[name] for name in self._inputs}
            return dict(zip(self.outputs, self.session.run(None, together)))
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
        for name, value in self._growing.items():
            given = feeds[name]
            if self._bound.get(name) is given:
                continue
            shape, dtype = _form(value, self.rows, given.shape[value.shape.index(SLOTS)])
            if given.shape != shape or given.dtype != dtype:
                raise ValueError(f"{name}: got {given.shape} {given.dtype}, expected {shape} {dtype}")
            self._bind(name, np.ascontiguousarray(given))
        self.session.run_with_iobinding(self._binding)
        return self.outputs


def _form(value: Any, rows: int, slots: int | None = None) -> Form:
    """Shape and type of a graph's input or output in calls of so many rows, with so many slots of the appended state, of one
    board.
    """
    sizes = {ROWS: rows, SLOTS: slots, BOARDS: 1}
    return tuple(sizes.get(d, d) for d in value.shape), TYPES.get(value.type, value.type)


def _array(value: Any, rows: int) -> np.ndarray:
    """A zeroed array of that shape and type."""
    return np.zeros(*_form(value, rows))


class OnnxMethods:
    """`Methods` over the graphs of a package. A graph is loaded when it is first called, once for calls of all sizes.

    A session lays out the weights anew for its operators: a second one would hold them twice in memory.
    """

    def __init__(
        self,
        folder: Path,
        graphs: Mapping[str, str],
        threads: int | None = None,
        manifest: tuple[Mapping[str, Method], Refuse] | None = None,
        capacity: int | None = None,
        info: ModelInfo | None = None,
    ) -> None:
        """
        Args:
            capacity: slots that the appended state has at most.
            info: of a model whose loop is a planned one.
            manifest: what each METHOD_ROWS takes and gives by the manifest, and what to do where its graph says otherwise.
        """
        self.folder = folder
        self.manifest, self.capacity = manifest, capacity
        self.graphs = graphs
        self.threads = threads
        self._loaded: dict[str, Any] = {}  # file -> session
        self._sessions: dict[tuple[str, int], BoundSession] = {}
        self.planned: PlannedLoop | None = None  # None: the loop is in the graph
        if info is not None and info.plan is not None:
            per_loop = [name for name, kept in info.state.items() if kept.per_loop]
            self.planned = PlannedLoop(self.run, self._of_layers, info.plan.layers, info.max_loops, per_loop)
        self.batches = False  # whether the methods of a batch take any number of boards; `check_others` finds out

    def session(self, method: str, chunk: int) -> BoundSession:
        key = (method, chunk)
        if key not in self._sessions:
            known = f"{method}_{chunk}" in self.graphs
            file = self.graphs[f"{method}_{chunk}"] if known else self.of_any_rows(method)
            if file is None:
                raise PackageError(
                    f"{self.folder}: holds no {method} for {chunk} rows; it has {', '.join(self.graphs)}"
                )
            if file not in self._loaded:
                self._loaded[file] = load_graph(self.folder / file, self.threads)
            if known:
                self._check(f"{method}_{chunk}", self._loaded[file], chunk)
            self._sessions[key] = BoundSession(self._loaded[file], chunk)
        return self._sessions[key]

    def of_any_rows(self, method: str) -> str | None:
        """The file of a method whose graph takes any number of rows; None: there is none."""
        files = [file for name, file in self.graphs.items() if name.rpartition("_")[0] == method]
        return files[0] if len(files) > 1 and len(set(files)) == 1 else None

    def check_others(self, chunks: Collection[int]) -> None:
        """Hold the graphs that nothing has called yet, and those that only other hosts call, against the manifest, too."""
        assert self.manifest is not None
        tables, refuse = self.manifest
        if tables.keys() != self.graphs.keys():
            refuse("methods", ", ".join(tables), f"{', '.join(self.graphs)}, as lowering.graphs says")
        sessions = dict(self._loaded)
        for name, file in self.graphs.items():
            method, _, rows = name.rpartition("_")
            if rows not in map(str, chunks):
                refuse("lowering.graphs", name, " or ".join(f"METHOD_{n}" for n in chunks))
            if (method, int(rows)) not in self._sessions:
                if file not in sessions:
                    sessions[file] = load_graph(self.folder / file, None, run=False)
                self._check(name, sessions[file], int(rows))
        taken = {name: [i.shape for i in sessions[file].get_inputs()] for name, file in self.graphs.items()}
        wide = {name for name, shapes in taken.items() if any(BOARDS in shape for shape in shapes)}
        self.batches = {f"{method}_{rows}" for method in BATCHED for rows in chunks} <= wide

    def _check(self, name: str, session: Any, chunk: int) -> None:
        """Hold a graph against the manifest, before buffers are made."""
        if self.manifest is None:
            return
        tables, refuse = self.manifest
        if name not in tables:
            refuse("methods", ", ".join(tables), f"{name} among them, which lowering.graphs has")
        for side, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            found = [(value.name, _form(value, chunk, self.capacity)) for value in values]
            check_engine(name, side, getattr(tables[name], side), found, refuse)

    def _of_layers(self, chunk: int) -> Outputs:
        """What the graph of each layer gives."""
        outputs = self.session("step0", chunk).outputs
        return [(name, array.shape, str(array.dtype)) for name, array in outputs.items()]

    def run(self, method: str, chunk: int, feeds: Arrays) -> Arrays:
        if method == "loop" and self.planned is not None:
            return self.planned.run(chunk, feeds)
        return self.session(method, chunk).run(feeds)


@dataclass(frozen=True)
class Lowering:
    """The manifest's "lowering", as far as it is read here."""

    graphs: dict[Name, Name]  # METHOD_ROWS -> file
    weights: Name


class OnnxCalls(Calls):
    """Calls of any number of rows, where the package's graphs take them."""

    def __init__(self, info: ModelInfo, methods: OnnxMethods) -> None:
        loop = ("loop",) if info.plan is None else ("begin", "decide", *(f"step{i}" for i in range(info.plan.layers)))
        own = (*loop, *(m for m in info.methods if m in ("prelude", "coda", "head", "commit")))
        self.any_rows = all(methods.of_any_rows(method) for method in own)
        super().__init__(info, methods)


def opened(package: Package, threads: int | None = None) -> Opened:
    """A package exported with `--target onnx`, its graphs loaded.

    Raises:
        PackageError: the manifest and the graphs do not fit.
    """
    info, tables, refuse = read_model(package), read_methods(package), refusal(package)
    lowering = package.section(Lowering, "lowering")
    for file in (*lowering.graphs.values(), lowering.weights):
        package.path(file)
    check_methods(info, tables, in_graph=True, refuse=refuse)
    methods = OnnxMethods(package.folder, lowering.graphs, threads, (tables, refuse), info.capacity, info)
    for chunk in info.chunks:  # now, so that the first token does not wait for it
        for method in info.methods:
            if f"{method}_{chunk}" in methods.graphs:
                methods.session(method, chunk)
    methods.check_others(info.chunks)
    if info.quant in ("int8", "int4"):  # packed into memory by now; other weights are used where the file is mapped
        release_mapped(package.path(lowering.weights))
    return Opened(info, methods, OnnxCalls)


def largest_batch(methods: Methods) -> int | None:
    """Boards that an opened package takes at once; None: any number."""
    return None if isinstance(methods, OnnxMethods) and methods.batches else 1


class OnnxRuntime(LoopRuntime):
    """A model of texts exported with `--target onnx`."""

    def __init__(self, package: Package, threads: int | None = None) -> None:
        self.package = package
        super().__init__(*opened(package, threads))
