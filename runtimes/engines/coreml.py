"""Core ML packages: run by Core ML on macOS, and elsewhere by the interpreter of runtimes/mil/interpreter.py.

Both are an `Engine`: functions on arrays, and states. What a function takes and gives is the LoopProgram's, in Core ML's
types: 64-bit integers and flags are int32, scalars have one element.
"""

from __future__ import annotations

import dataclasses
import platform
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from rmse_edge.errors import ArgumentError, PackageError, UserError, quiet
from rmse_edge.info import Form, ModelInfo
from rmse_edge.loop.steps import carried_and_emitted, drive_steps
from rmse_edge.package import Package
from rmse_edge.runtimes.host.base import Arrays
from rmse_edge.runtimes.host.calls import Calls, Opened
from rmse_edge.runtimes.host.signatures import (
    Method,
    Refuse,
    Tensor,
    check_engine,
    check_methods,
    read_methods,
    read_model,
    refusal,
)
from rmse_edge.runtimes.host.text import LoopRuntime
from rmse_edge.schema import Name, Shape

SCALE = "scale"  # the input of `blank`, of which Core ML wants one: 1 for the memory as it was trained


class Engine(Protocol):
    """What runs the functions of a `.mlpackage`."""

    def predict(self, function: str, feeds: Arrays) -> Arrays:
        """Call a function; states are read and written where they are."""

    def read(self, state: str) -> np.ndarray:
        """What a state holds, float16. May be a view."""

    def write(self, state: str, value: np.ndarray) -> None:
        """Put a value into a state."""


def start_engine() -> None:
    """Load what reads packages, so that what it takes itself is in memory.

    Raises:
        UserError: coremltools is not installed.
    """
    from rmse_edge.runtimes.mil.file import protocol

    protocol()


class InterpreterEngine:
    """The saved program on NumPy."""

    def __init__(self, path: Path) -> None:
        from rmse_edge.runtimes.mil.interpreter import Interpreter

        self.interpreter = Interpreter(path)
        self._states: Arrays = {}
        for function in self.interpreter.functions:
            for name, array in self.interpreter.make_state(function).items():
                self._states.setdefault(name, array)

    def predict(self, function: str, feeds: Arrays) -> Arrays:
        return self.interpreter.predict(feeds, self._states, function)

    def read(self, state: str) -> np.ndarray:
        return self._states[state]

    def write(self, state: str, value: np.ndarray) -> None:
        np.copyto(self._states[state], value)


class CoreMLEngine:
    """Core ML itself. The package is compiled once; its functions are loaded when they are first called."""

    def __init__(self, path: Path, compute: str, stateful: Collection[str] = ()) -> None:
        """
        Args:
            compute: cpu, gpu or ane: where Core ML may place operators, always with the CPU beside it.
            stateful: the functions that have states, of the same names and shapes in all of them: they share one set.
        Raises:
            UserError: this is not macOS 15 or later.
            PackageError: Core ML does not compile the package.
        """
        system = platform.mac_ver()[0]
        if platform.system() != "Darwin" or int(system.partition(".")[0] or 0) < 15:
            raise UserError("Core ML runs these packages on macOS 15 or later; elsewhere use the interpreter")
        self.path = path
        self._stateful = frozenset(stateful)
        self._scratch = tempfile.TemporaryDirectory()  # goes when the engine goes
        with quiet():
            import coremltools as ct
        units = {"cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ane": "CPU_AND_NE"}
        self._units = ct.ComputeUnit[units[compute]]
        self._load = ct.models.CompiledMLModel
        self._compiled = f"{self._scratch.name}/model.mlmodelc"
        self._ask("compile it", lambda: ct.models.utils.compile_model(str(path), self._compiled))
        self._functions: dict[str, Any] = {}
        self._state: Any = None

    def _ask(self, what: str, ask: Callable[[], Any]) -> Any:
        """What Core ML answers; its complaint in one line where it refuses: what it raises is not documented.

        Raises:
            PackageError: naming the package and what was asked.
        """
        try:
            return ask()
        except Exception as error:
            reason = " ".join(str(error).split())
            raise PackageError(f"{self.path}: Core ML cannot {what} ({reason}); export the package again") from None

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            load = partial(self._load, self._compiled, compute_units=self._units, function_name=name)
            self._functions[name] = self._ask(f"load {name}", load)
        return self._functions[name]

    def _states(self) -> Any:
        if self._state is None:
            first = min(self._stateful)
            self._state = self._ask(f"make the states of {first}", self._function(first).make_state)
        return self._state

    def predict(self, function: str, feeds: Arrays) -> Arrays:
        loaded = self._function(function)
        state = self._states() if function in self._stateful else None
        return self._ask(f"run {function}", lambda: loaded.predict(feeds, state=state))

    def read(self, state: str) -> np.ndarray:
        return self._ask(f"read {state}", lambda: self._states().read_state(state))

    def write(self, state: str, value: np.ndarray) -> None:
        self._ask(f"write {state}", lambda: self._states().write_state(state, value))


class CoremlMethods:
    """`Methods` over an engine, and one more: `host_loop` is `loop` as `begin` and single steps."""

    def __init__(
        self, engine: Engine, functions: Mapping[str, Any], rings: Mapping[str, Any], per_loop: Collection[str] = ()
    ) -> None:
        """
        Args:
            per_loop: the state of which iteration k reads row k.
            functions: the manifest's "methods": what each takes and gives, as the LoopProgram has it.
            rings: the manifest's "rings": of every state its Core ML shape (K, G, W', hd') and, under "held", the part of
                it that is used, in the spec's shape. Empty: rings are given and returned.
        """
        self.engine, self.functions, self.rings = engine, functions, rings
        self.per_loop = frozenset(per_loop)
        self._stacks: dict[int, Arrays] = {}

    def run(self, method: str, chunk: int, feeds: Arrays) -> Arrays:
        for name in self.rings:
            if name in feeds:  # only in comparisons: hosts leave the rings where they are
                self._put(name, feeds[name], feeds.get("k"))
        if method == "host_loop":
            return self._host_loop(chunk, feeds)
        return self.call(f"{method}_{chunk}", feeds)

    def call(self, function: str, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """One function, in the LoopProgram's types.

        Raises:
            PackageError: the package has no such function.
            ValueError: a tensor has another shape.
        """
        if function not in self.functions:
            method, _, rows = function.rpartition("_")
            raise PackageError(f"the package has no {method} for {rows} rows; it has {', '.join(self.functions)}")
        table = self.functions[function]
        feeds = {SCALE: np.ones(1, np.float32), **feeds}
        given = {t["name"]: _to_core_ml(feeds[t["name"]], t) for t in table["inputs"]}
        results = self.engine.predict(function, given)
        return {t["name"]: _from_core_ml(results[t["name"]], t) for t in table["outputs"]}

    def _host_loop(self, chunk: int, feeds: Arrays) -> Arrays:
        """`begin`, then `step` until nothing is active."""
        name = f"step_{chunk}"
        begun = self.call(f"begin_{chunk}", feeds)
        table = self.functions[name]
        carried, emitted = carried_and_emitted(t["name"] for t in table["outputs"])
        first = {c: begun.pop(f"first_{c}") for c in carried if c != "depth"}
        first["depth"] = np.zeros(first["active"].shape, np.int64)
        taken = {t["name"] for t in table["inputs"]}
        rows = {n: feeds[n] for n in self.per_loop if n in taken}
        fixed = feeds | begun

        def step(arrays: Arrays, k: int) -> Arrays:
            return self.call(name, fixed | arrays | {"k": np.array(k)})

        if chunk not in self._stacks:
            outputs = {t["name"]: t for t in self.functions[f"loop_{chunk}"]["outputs"]}
            self._stacks[chunk] = {n: np.zeros(outputs[n]["shape"], outputs[n]["dtype"]) for n in emitted}
        stacks = self._stacks[chunk]
        carry, k = drive_steps(step, first, rows, stacks, int(feeds["max_loops"]))
        return {"h": carry["h"], "depth": carry["depth"], "iterations": np.array(k)} | stacks

    # ------------------------------------------------------------------------------------------------- states

    def read_states(self) -> Arrays:
        """What the rings hold, in the spec's shape."""
        return {name: self._used(name, self.engine.read(name)) for name in self.rings}

    def write_states(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Fill the rings with `tensors`, in the spec's shape."""
        for name, value in tensors.items():
            self._put(name, value, None)

    def _used(self, name: str, whole: np.ndarray) -> np.ndarray:
        """The part of a state that is used, in the spec's shape."""
        held = self.rings[name]["held"]
        return whole[:, :, : held[-2], : held[-1]].reshape(held)

    def _put(self, name: str, value: np.ndarray, k: np.ndarray | None) -> None:
        """Put all of a ring in place, or the row of loop `k` where `value` is that."""
        whole = np.array(self.engine.read(name))
        held = tuple(self.rings[name]["held"])
        used = whole[:, :, : held[-2], : held[-1]]
        if value.shape == held:
            used[:] = value.reshape(used.shape)
        elif k is not None and value.shape == held[1:]:
            used[int(np.asarray(k).reshape(()))] = value.reshape(used.shape[1:])
        else:
            raise ValueError(f"{name}: got {value.shape}, expected {held} or a row of it")
        self.engine.write(name, whole)


def _to_core_ml(value: np.ndarray, t: Mapping[str, Any]) -> np.ndarray:
    if list(np.shape(value)) != t["shape"]:
        raise ValueError(f"{t['name']}: got {np.shape(value)}, expected {tuple(t['shape'])}")
    shape, dtype = _core_ml_form((tuple(t["shape"]), t["dtype"]))
    return np.ascontiguousarray(np.asarray(value, dtype).reshape(shape))


def _core_ml_form(form: Form) -> Form:
    """What Core ML has for a tensor of the LoopProgram."""
    shape, dtype = form
    return shape or (1,), "int32" if dtype in ("int64", "bool") else dtype


def _from_core_ml(value: np.ndarray, t: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(value, t["dtype"]).reshape(t["shape"])


class Ring(TypedDict):
    """A ring that is a state: Core ML's shape, and the part of it that is used."""

    shape: Annotated[Shape, Field(min_length=4, max_length=4)]
    held: Annotated[Shape, Field(min_length=3)]


@dataclass(frozen=True)
class Lowering:
    """The manifest's "lowering", as far as it is read here."""

    program: Name
    compute: Literal["cpu", "gpu", "ane"]
    rings: dict[Name, Ring]


class CoremlCalls(Calls):
    """Calls whose rings are the engine's, where the package keeps them in states."""

    methods: CoremlMethods

    def kept_by_engine(self) -> frozenset[str]:
        return frozenset(self.methods.rings)

    def read_engine(self) -> Arrays:
        return self.methods.read_states()

    def write_engine(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.methods.write_states(tensors)


def opened(
    package: Package, engine: str | None = None, threads: int | None = None, compute: str | None = None
) -> Opened:
    """A package exported with `--target coreml`.

    Args:
        engine: "coreml" (macOS only) or "interpreter"; by default the first where it exists.
        compute: "cpu", "gpu" or "ane", for Core ML; by default what the package is laid out for.
    Raises:
        ArgumentError: a number of threads is given.
        PackageError: the manifest and the program do not fit.
    """
    if threads is not None:
        raise ArgumentError("threads", "neither Core ML nor its interpreter takes a number of threads; leave it out")
    info, tables, refuse = read_model(package), read_methods(package), refusal(package)
    lowering = package.section(Lowering, "lowering")
    check_rings(info, lowering.rings, refuse)
    for in_graph in (True, False):  # functions for either are there
        check_methods(info, tables, in_graph, refuse, engine_keeps=bool(lowering.rings))
    path = package.folder_of(lowering.program)
    check_program(path, tables, lowering.rings, refuse)
    engine = engine or engines()[0]
    compute = compute or lowering.compute
    if engine == "interpreter":  # whoever reads a time must see what took it
        info = dataclasses.replace(info, target="coreml (interpreted)")
    if engine == "coreml":
        running: Engine = CoreMLEngine(path, compute, stateful(info, tables) if lowering.rings else ())
    else:
        running = InterpreterEngine(path)
    rows = [name for name, state in info.state.items() if state.per_loop]
    methods = CoremlMethods(running, package.manifest["methods"], lowering.rings, rows)
    # In the graph, the loop is one call, but nothing but the CPU runs it.
    return Opened(info, methods, CoremlCalls, "loop" if compute == "cpu" else "host_loop")


def stateful(info: ModelInfo, functions: Iterable[str]) -> list[str]:
    """The functions that read or write the rings, where these are states."""
    readers = {reader for ring in info.rings.values() for reader in ring.read_by}
    methods = (readers - {"loop"}) | {"commit"} | ({"loop", "step"} if "loop" in readers else set())
    return [name for name in functions if name.rpartition("_")[0] in methods]


class CoremlRuntime(LoopRuntime):
    """A model of texts exported with `--target coreml`.

    Where it keeps the rings in states, these are read and written by `tensors` and `restore` only.
    """

    methods: CoremlMethods

    def __init__(
        self, package: Package, engine: str | None = None, threads: int | None = None, compute: str | None = None
    ) -> None:
        """Arguments and errors as in `opened`."""
        self.engine = engine or engines()[0]
        super().__init__(*opened(package, engine, threads, compute))


def check_rings(info: ModelInfo, rings: Mapping[str, Ring], refuse: Refuse) -> None:
    """Hold the rings that are states against the model's state."""
    if rings and rings.keys() != info.rings.keys():
        refuse("lowering.rings", ", ".join(rings), f"none, or {', '.join(info.rings)}")
    for name, ring in rings.items():
        loops, groups, window, dims = ring["shape"]
        held = info.state[name].shape
        if ring["held"] != held:
            refuse(f"lowering.rings.{name}.held", list(ring["held"]), f"{list(held)}, as model.state says")
        slots = prod(held[:-2])
        if loops not in (1, held[0]) or loops * groups != slots or window < held[-2] or dims < held[-1]:
            refuse(f"lowering.rings.{name}.shape", list(ring["shape"]), f"room for {list(held)}")


def check_program(path: Path, tables: Mapping[str, Method], rings: Mapping[str, Ring], refuse: Refuse) -> None:
    """Hold the manifest against the functions of the program.

    Raises:
        PackageError: the program cannot be read.
    """
    from rmse_edge.runtimes.mil.file import ModelFile

    file = ModelFile(path)
    for name, method in tables.items():
        if name not in file.functions:
            refuse("methods", name, f"some of {', '.join(file.functions)}")
        function = file.function(name)
        for side, tensors, found in (
            ("inputs", method.inputs, function.inputs),
            ("outputs", method.outputs, function.outputs),
        ):
            said = [Tensor(t.name, *_core_ml_form(t.form)) for t in tensors]
            order = [t.name for t in said if t.name in found] + [n for n in found if n not in {t.name for t in said}]
            check_engine(name, side, said, [(n, (found[n].shape, found[n].dtype)) for n in order], refuse)  # type: ignore[misc]
        for state, found_state in function.states.items():
            if state not in rings or rings[state]["shape"] != found_state.shape:
                refuse(f"lowering.rings.{state}", rings.get(state), f"{list(found_state.shape)}, as the program has it")


def engines() -> tuple[str, ...]:
    """What runs packages here, the one that is used first. The interpreter is everywhere."""
    return ("coreml", "interpreter") if platform.system() == "Darwin" else ("interpreter",)
