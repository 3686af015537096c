"""ExecuTorch: the host owns the loop, and with it the KV ring, which every `step` reads where it lies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from rmse_edge.errors import ArgumentError, PackageError
from rmse_edge.files import digest_file
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.steps import carried_and_emitted, drive_steps
from rmse_edge.package import AGAIN, Package
from rmse_edge.runtimes.host.base import Arrays
from rmse_edge.runtimes.host.calls import Opened
from rmse_edge.runtimes.host.plan import Outputs, PlannedLoop
from rmse_edge.runtimes.host.signatures import check_engine, check_methods, read_methods, read_model, refusal
from rmse_edge.runtimes.host.text import LoopRuntime
from rmse_edge.schema import Name

from .kernels import bindings, load_kernels
from .offload import Offload
from .release import DONTNEED, release_mapped

MOST_THREADS = 256
# The engine's numbers of types.
TYPES = {0: "uint8", 1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 11: "bool", 15: "bfloat16"}
MAGIC = b"ET12"  # at byte 4 of a program; the runtime ends the process over other bytes


def start_engine() -> None:
    """Load the runtime and the kernels, so that what the engine itself takes is in memory."""
    load_kernels()


def load_program(path: Path, profile: bool = False) -> Any:
    """The engine's program for a file whose hash was verified.

    Raises:
        PackageError: it is no program of this runtime.
    """
    with path.open("rb") as file:
        if file.read(8)[4:] != MAGIC:
            raise PackageError(f"{path}: is not an ExecuTorch program ({MAGIC.decode()}); export the package again")
    engine = bindings()
    strict = engine.Verification.InternalConsistency
    load = partial(engine._load_program, str(path), enable_etdump=profile, program_verification=strict)
    return _ask(path, "load it", load)


def _ask(path: Path, what: str, ask: Callable[[], Any]) -> Any:
    """What the engine answers; its complaint in one line where it refuses.

    Raises:
        PackageError: naming the file and what was asked of it.
    """
    kernels = load_kernels()
    kernels.rmse_clear_error()
    try:
        return ask()
    except RuntimeError as error:
        reason = " ".join((kernels.rmse_last_error().decode(errors="replace") or str(error)).split())
        raise PackageError(f"{path}: executorch cannot {what} ({reason}); export the package again") from None


class ExecutorchMethods:
    """`Methods` over a program. `loop` is `begin`, then `step` until nothing is active."""

    _sharing: ClassVar[str | None] = None  # digest of the program whose packed weights this process shares

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, Any],
        max_loops: int,
        profile: bool = False,
        digest: str | None = None,
        per_loop: Collection[str] = (),
        layers: int = 0,
    ) -> None:
        """
        Args:
            tensors: the manifest's "methods": what each takes and gives, in order.
            per_loop: the state of which iteration k reads row k.
            layers: of a planned loop; 0: it is none.
            profile: keep the time of every operator; see `write_profile`.
            digest: SHA-256 of the program, where it is known already.
        """
        self.path = path
        self.tensors = tensors
        self.max_loops = max_loops
        self.per_loop = frozenset(per_loop)
        self.planned: PlannedLoop | None = None  # None: `step` is iterated
        if layers:
            self.planned = PlannedLoop(self.run, self._of_layers, layers, max_loops, per_loop)
        # Methods of both sizes share one packed copy of a weight. The engine knows it by its codes, whatever their scales,
        # and keeps it for the whole process: a second program must not find the weights of the first.
        digest = digest or digest_file(path)
        ExecutorchMethods._sharing = ExecutorchMethods._sharing or digest
        self._shares = ExecutorchMethods._sharing == digest
        self._program = load_program(path, profile)
        self._known = {self._program.get_method_name(i) for i in range(self._program.num_methods())}
        self._methods: dict[str, Any] = {}
        self._stacks: dict[int, dict[str, Tensor]] = {}  # chunk -> the emits of all iterations
        self.offload: Offload | None = None  # None: experts are read where they are mapped

    def load(self, name: str) -> Any:
        """The engine's method METHOD_ROWS.

        Raises:
            PackageError: the package has no such method, the engine cannot load it, or it takes other tensors than the
                manifest says.
        """
        if name not in self._methods:
            method, _, rows = name.rpartition("_")
            if name not in self.tensors or name not in self._known:
                there = ", ".join(known for known in self.tensors if known in self._known)
                raise PackageError(f"{self.path}: holds no {method} for {rows} rows; it has {there}")
            load_kernels().rmse_share_packed_weights(int(self._shares))
            loaded = _ask(self.path, f"load {name}", partial(self._program.load_method, name))
            meta = loaded.method_meta()
            for side, count, of in (
                ("inputs", meta.num_inputs(), meta.input_tensor_meta),
                ("outputs", meta.num_outputs(), meta.output_tensor_meta),
            ):
                found = [(None, (tuple(of(i).sizes()), TYPES.get(of(i).dtype(), "another type"))) for i in range(count)]
                check_engine(name, side, self.tensors[name][side], found, self._refuse)
            self._methods[name] = loaded
        return self._methods[name]

    def _refuse(self, field: str, got: object, expected: str) -> NoReturn:
        raise PackageError(f"{self.path}: the manifest's {field}: got {got}, expected {expected}; {AGAIN}")

    def run(self, method: str, chunk: int, feeds: Arrays) -> Arrays:
        if method == "loop":
            return self._loop(chunk, feeds) if self.planned is None else self.planned.run(chunk, feeds)
        name = f"{method}_{chunk}"
        given = self._given(name, feeds)
        return {key: value.numpy() for key, value in self._call(name, given).items()}

    def _of_layers(self, chunk: int) -> Outputs:
        """What the method of each layer gives."""
        return [(t["name"], tuple(t["shape"]), t["dtype"]) for t in self.tensors[f"step0_{chunk}"]["outputs"]]

    def write_profile(self, path: Path) -> None:
        """Write the times of all calls so far as an ETDump."""
        self._program.write_etdump_result_to_file(str(path), str(path.with_suffix(".debug")))

    def _given(self, name: str, feeds: Mapping[str, np.ndarray | Tensor]) -> dict[str, Tensor]:
        self.load(name)
        given = {}
        for t in self.tensors[name]["inputs"]:
            value = feeds[t["name"]]
            tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value, order="C"))
            shape, axis = list(t["shape"]), t.get("slots_axis")
            if axis is not None and tensor.dim() == len(shape):
                shape[axis] = min(shape[axis], tensor.shape[axis])
            if list(tensor.shape) != shape or str(tensor.dtype) != f"torch.{t['dtype']}":
                got = f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")
                raise ValueError(f"{t['name']}: got {got}, expected {tuple(shape)} {t['dtype']}")
            given[t["name"]] = tensor
        return given

    def _call(self, name: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run METHOD_ROWS on checked tensors."""
        inputs = [given[t["name"]] for t in self.tensors[name]["inputs"]]
        try:
            outputs = _ask(self.path, f"run {name}", partial(self.load(name), inputs))
        except PackageError:
            if self.offload is not None and (problem := self.offload.problem()):
                raise PackageError(problem) from None
            raise
        return dict(zip((t["name"] for t in self.tensors[name]["outputs"]), outputs))

    def _loop(self, chunk: int, feeds: Arrays) -> Arrays:
        """`begin`, then `step` until nothing is active."""
        name = f"step_{chunk}"
        begun = self._call(f"begin_{chunk}", self._given(f"begin_{chunk}", feeds))
        carried, _ = carried_and_emitted(t["name"] for t in self.tensors[name]["outputs"])
        first = {c: begun.pop(f"first_{c}") for c in carried if c != "depth"}
        first["depth"] = torch.zeros(first["active"].shape, dtype=torch.int64)
        taken = {t["name"] for t in self.tensors[name]["inputs"]}
        rows = {n: torch.from_numpy(feeds[n]) for n in self.per_loop if n in taken}
        start = {n: row[0] for n, row in rows.items()} | {"k": torch.tensor(0)}
        given = self._given(name, feeds | begun | first | start)

        def step(tensors: dict[str, Tensor], k: int) -> dict[str, Tensor]:
            if self.offload is not None:
                self.offload.loop(k)
            return self._call(name, given | tensors | {"k": torch.tensor(k)})

        stacks = self._stack(chunk)
        carry, k = drive_steps(step, first, rows, stacks, int(feeds["max_loops"]))
        if self.offload is not None:
            self.offload.loop(-1)
        result = {"h": carry["h"], "depth": carry["depth"], "iterations": torch.tensor(k)} | stacks
        return {n: value.numpy() for n, value in result.items()}

    def _stack(self, chunk: int) -> dict[str, Tensor]:
        if chunk not in self._stacks:
            outputs = self.tensors[f"step_{chunk}"]["outputs"]
            emits = [t for t in outputs if not t["name"].startswith("next_") and t["name"] != "any_active"]
            self._stacks[chunk] = {
                t["name"]: torch.zeros(self.max_loops, *t["shape"], dtype=getattr(torch, t["dtype"])) for t in emits
            }
        return self._stacks[chunk]


@dataclass(frozen=True)
class Lowering:
    """The manifest's "lowering", as far as it is read here."""

    program: Name


def opened(package: Package, threads: int | None = None, profile: bool = False) -> Opened:
    """A package exported with `--target executorch`, its methods loaded by the wheel's runtime.

    Raises:
        PackageError: the manifest and the program do not fit.
    """
    info, tables = read_model(package), read_methods(package)
    name = package.section(Lowering, "lowering").program
    path = package.path(name)
    check_methods(info, tables, in_graph=False, refuse=refusal(package))
    set_threads(threads)
    manifest = package.manifest
    layers = 0 if info.plan is None else info.plan.layers
    rows = [state for state, kept in info.state.items() if kept.per_loop]
    methods = ExecutorchMethods(path, manifest["methods"], info.max_loops, profile, package.digests[name], rows, layers)
    for method in manifest["methods"]:  # now, so that the first token does not wait for it
        methods.load(method)
    release_mapped(path, DONTNEED)  # XNNPACK's weights are packed by now; those of experts come back when read
    return Opened(info, methods)


class ExecutorchRuntime(LoopRuntime):
    """A model of texts exported with `--target executorch`."""

    def __init__(
        self, package: Package, threads: int | None = None, profile: bool = False, expert_ram: str | None = None
    ) -> None:
        """
        Args:
            expert_ram: memory that experts may take, see `Offload.begin`; None: as much as the system leaves mapped.
        """
        self.package = package
        super().__init__(*opened(package, threads, profile))
        self._offload: Offload | None = None
        if expert_ram is not None:
            assert isinstance(self.methods, ExecutorchMethods)
            self._offload = self.methods.offload = Offload(self.methods.path)
            self.feed([0], self.info.check(Dials(1)), logits="last")  # says where the experts are
            self.reset()
            self._offload.begin(expert_ram)

    def expert_figures(self, tokens: int) -> dict[str, Any] | None:
        return None if self._offload is None else self._offload.figures(tokens)

    def clear_expert_figures(self) -> None:
        if self._offload is not None:
            self._offload.clear()


def set_threads(threads: int | None) -> None:
    """Set the engine's threads for the whole process.

    Raises:
        UserError: these are more than it should be asked for: it starts them all, whatever the machine has.
    """
    if threads is None:
        return
    if threads > MOST_THREADS:
        raise ArgumentError("threads", f"got {threads}, expected at most {MOST_THREADS}")
    bindings()._unsafe_reset_threadpool(threads)
