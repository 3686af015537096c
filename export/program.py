"""`LoopProgram`: a looped model as named methods, each traced by `torch.export`.

This is the stage between a model and every target. Its methods and their tensors, in order:

| method  | in                                                        | out                                        |
|---------|-----------------------------------------------------------|--------------------------------------------|
| prelude | inputs, its state                                         | prelude                                    |
| loop    | prelude, context, its state, dials                        | h, depth, iterations, stacked emits        |
| begin   | prelude, context                                          | first_ carry but depth                     |
| step    | k, carry, prelude, context, row k or all of state, dials  | next_ carry, emits, any_active             |
| coda    | prelude, context, h, depth, its state                     | coda                                       |
| head    | what coda gives first; h without a coda                   | head                                       |
| commit  | all of these, iterations, stacked emits, coda, its state  | commit                                     |

A planned model (rmse_edge/loop/plan.py) has no loop that an engine could own: in place of `loop` and `step` it has a `step` for each of
its layers, `step0`, `step1`, ..., of the same tensors. Each holds the weights of its layer alone, so all of them together hold
every weight once.

A model may add methods of its own (`LoopSpec.extra`), which hosts call outside the loop.

`loop` holds the loop itself (`torch.while_loop`); `begin` and `step`, one iteration, are for hosts that own the loop. The
names are those of the model's `LoopSpec`. Where the engine has no loop, the host always owns it: such programs have no
`loop`, and their `begin` gives the invariants besides, which `step` takes, so that no iteration makes them anew.

A model of boards, which keeps nothing, can be called with several at once. For targets that take such calls all its methods
but `loop` are traced with a symbolic number of boards: the host then owns the loop, and boards that have stopped leave the
batch, which a loop in a graph could not let them do.

Otherwise shapes are static, one program per number of rows, unless a target asks for programs that serve any number of rows. It
does where an engine lays out weights anew for every graph that it loads: ONNX Runtime prepacks them per session, so two
graphs of one method would hold the weights twice in memory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.export import ExportedProgram

from rmse_edge import numbers
from rmse_edge.errors import ExportError, first_line
from rmse_edge.info import dtype_name
from rmse_edge.layers.mtp import MtpHeads
from rmse_edge.loop.contract import LoopModel, LoopSpec, TensorSpec, check_spec
from rmse_edge.loop.dials import DIALS
from rmse_edge.loop.drive import depth_after, run_loop

METHODS = ("prelude", "loop", "begin", "step", "coda", "head", "commit")
HOST_METHODS = tuple(name for name in METHODS if name != "loop")  # of programs whose engine has no loop
ITERATIONS = TensorSpec("iterations", (), torch.int64)
LOOP_INDEX = TensorSpec("k", (), torch.int64)
ANY_ACTIVE = TensorSpec("any_active", (), torch.bool)
ROWS = -1  # in the shapes of a method that serves calls of several sizes: the number of rows of the call
# In the shapes of a method that serves any length of text: the slots that the appended state has just then.
SLOTS = -2
BOARDS = -3  # in the shapes of a method that takes any number of boards at once
MOST_BOARDS = 1024
NAMES = {ROWS: numbers.ROWS, SLOTS: numbers.SLOTS, BOARDS: numbers.BOARDS}

Signature = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]  # the tensors a method takes and gives, in order


def dial_specs(spec: LoopSpec) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, (), getattr(torch, DIALS[name].dtype)) for name in spec.dials)


def stacked(spec: LoopSpec) -> tuple[TensorSpec, ...]:
    """The emits of all iterations, (K, ...)."""
    return tuple(
        dataclasses.replace(
            t, shape=(spec.max_loops, *t.shape), batch_axis=None if t.batch_axis is None else t.batch_axis + 1
        )
        for t in spec.emits
    )


def layer_methods(spec: LoopSpec) -> tuple[str, ...]:
    """The methods that run a layer each, in order; none of a model whose iterations are all alike."""
    return tuple(f"step{index}" for index in range(spec.layers))


def next_of(carried: TensorSpec) -> TensorSpec:
    """A carried tensor as `step` returns it: a graph cannot give a name that it takes."""
    return dataclasses.replace(carried, name=f"next_{carried.name}")


def first_of(carried: TensorSpec) -> TensorSpec:
    """A carried tensor as `begin` returns it."""
    return dataclasses.replace(carried, name=f"first_{carried.name}")


def signature(spec: LoopSpec, method: str, host_loop: bool = False) -> Signature:
    """The tensors a method takes and gives, in order; `host_loop` as in `trace`."""
    if method in spec.extra:
        return spec.extra[method]
    if method in layer_methods(spec):
        method = "step"
    depth = next(t for t in spec.carried if t.name == "depth")
    given = (*spec.prelude, *spec.context)
    fixed = (*given, *spec.invariants) if host_loop else given
    first = tuple(first_of(t) for t in spec.carried if t.name != "depth")
    rows = tuple(s.row for s in spec.rows)
    return {
        "prelude": ((*spec.inputs, *spec.read_by("prelude")), spec.prelude),
        "loop": ((*given, *spec.read_by("loop"), *dial_specs(spec)), (spec.h, depth, ITERATIONS, *stacked(spec))),
        "begin": (given, (*first, *(spec.invariants if host_loop else ()))),
        "step": (
            (LOOP_INDEX, *spec.carried, *fixed, *rows, *spec.whole, *dial_specs(spec)),
            (*(next_of(t) for t in spec.carried), *spec.emits, ANY_ACTIVE),
        ),
        "coda": ((*given, spec.h, depth, *spec.read_by("coda")), spec.coda),
        "head": ((spec.final,), spec.head),
        "commit": (
            (*given, spec.h, depth, ITERATIONS, *stacked(spec), *spec.coda, *spec.read_by("commit")),
            spec.commit,
        ),
    }[method]


def shared_signature(specs: Mapping[int, LoopSpec], method: str) -> Signature | None:
    """The tensors of a method for calls of any size, with `ROWS` where a dimension is the number of rows.

    None where one program cannot serve all of `specs`: there is only one, the method is not in all of them, or its
    tensors differ in more than rows.
    """
    if len(specs) < 2 or any(method not in method_names(spec) for spec in specs.values()):
        return None
    sides: list[tuple[TensorSpec, ...]] = []
    for side in zip(*(signature(spec, method) for spec in specs.values())):
        if len({tuple((t.name, t.dtype, len(t.shape)) for t in tensors) for tensors in side}) > 1:
            return None
        merged = []
        for alike in zip(*side):  # one tensor, as each spec has it
            dims = [ROWS if d == tuple(specs) else d[0] for d in zip(*(t.shape for t in alike))]
            if any(at_rows(dataclasses.replace(t, shape=tuple(dims)), chunk) != t for chunk, t in zip(specs, alike)):
                return None
            merged.append(dataclasses.replace(alike[0], shape=tuple(dims)))
        sides.append(tuple(merged))
    return sides[0], sides[1]


def at_rows(tensor: TensorSpec, rows: int) -> TensorSpec:
    """A tensor of a call with this many rows."""
    return dataclasses.replace(tensor, shape=tuple(rows if d == ROWS else d for d in tensor.shape))


def growing(tensors: Signature) -> Signature:
    """The same with `SLOTS` where the size is the number of slots of the appended state."""
    takes, gives = (tuple(t.of_slots(SLOTS) for t in side) for side in tensors)
    return takes, gives


def of_boards(tensors: Signature) -> Signature:
    """The same with `BOARDS` where the size is the number of boards, in `signature` one."""
    takes, gives = (tuple(dataclasses.replace(t, shape=t.of_batch(BOARDS)) for t in side) for side in tensors)
    return takes, gives


class Method(nn.Module):
    """One method as a module: tensors in by position, in the order of `signature`, tensors out likewise.

    Args:
        spec: of calls of any size that the method serves.
        tensors: what it takes and gives, if other than in `spec`: see `shared_signature`.
        heads: that draft for the model; of these a method holds its weights if it is one of theirs.
    """

    def __init__(
        self,
        model: LoopModel,
        spec: LoopSpec,
        method: str,
        tensors: Signature | None = None,
        heads: MtpHeads | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.heads = heads if heads is not None and method in heads.methods else None
        self.spec = spec
        self.method = method
        self.takes, self.gives = tensors or signature(spec, method)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        tensors = {t.name: v for t, v in zip(self.takes, values, strict=True)}
        if self.heads is not None:
            results = self.heads.draft(self.method, self.model, tensors)
        elif self.method in self.spec.extra:
            results = getattr(self.model, self.method)(tensors)
        elif self.method in (layers := layer_methods(self.spec)):
            results = self._step(tensors, layers.index(self.method))
        else:
            results = getattr(self, f"_{self.method}")(tensors)
        return tuple(results[t.name] for t in self.gives)

    def _prelude(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.prelude(tensors)

    def _loop(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return run_loop(self.model, self._spec_of_call(tensors), tensors, self._dials(tensors), while_loop)

    def _step(self, tensors: dict[str, Tensor], layer: int | None = None) -> dict[str, Tensor]:
        carry = {t.name: tensors[t.name] for t in self.spec.carried}
        given = {t.name: tensors[t.name] for t in (*self.spec.prelude, *self.spec.context, *self.spec.whole)}
        past = {t.name: tensors[t.name] for t in self.spec.rows}
        names = [t.name for t in self.spec.invariants]
        ready = bool(names) and all(name in tensors for name in names)
        invariants = {name: tensors[name] for name in names} if ready else self.model.begin(given)[1]
        rest = (tensors["k"], carry, past, given | invariants, self._dials(tensors))
        if layer is None:
            new, emitted = self.model.step(*rest)
        else:
            new, emitted = cast(Any, self.model).layer(layer, *rest)
        new["depth"] = depth_after(carry, new)
        return {next_of(t).name: new[t.name] for t in self.spec.carried} | emitted | {"any_active": new["active"].any()}

    def _begin(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        carry, invariants = self.model.begin(tensors)
        # A method must not return what it was given: some engines would hand out the same memory twice.
        return {f"first_{name}": value.clone() for name, value in carry.items()} | invariants

    def _coda(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return cast(Any, self.model).coda(tensors)  # spec.coda says that there is one

    def _head(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.head(tensors[self.spec.final.name])

    def _commit(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.commit(tensors)

    def _dials(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[name] for name in self.spec.dials}

    def _spec_of_call(self, tensors: dict[str, Tensor]) -> LoopSpec:
        """The spec, with emits of as many rows as the given tensors have: in a trace that is a symbol, not a number."""
        places = [(t.name, t.shape.index(ROWS)) for t in self.takes if ROWS in t.shape]
        if not places:
            return self.spec
        name, axis = places[0]
        shapes = {t.name: at_rows(t, tensors[name].shape[axis]).shape for t in self.gives}
        emits = tuple(dataclasses.replace(t, shape=shapes[t.name][1:]) for t in self.spec.emits)
        return dataclasses.replace(self.spec, emits=emits)

    def example(
        self, rows: int | None = None, slots: int | None = None, boards: int | None = None
    ) -> tuple[Tensor, ...]:
        """Inputs to trace with: zeros, and one of everything where zero would be out of range.

        Args:
            rows: of the call; needed where the method serves several.
            slots: of the appended state; needed where that grows.
            boards: of the batch; needed where the method takes any number.
        """
        ones = {"max_loops", "min_loops", "n_valid", "iterations", "exit_threshold"}
        takes = self.takes if rows is None else tuple(at_rows(t, rows) for t in self.takes)
        takes = takes if slots is None else tuple(t.of_slots(slots) for t in takes)
        if boards is not None:
            takes = tuple(dataclasses.replace(t, shape=t.of_batch(boards)) for t in takes)
        return tuple(t.zeros() + 1 if t.name in ones else t.zeros() for t in takes)


@dataclass(frozen=True)
class ExportedMethod:
    """A traced method and the calls it serves. Where these are several, its shapes have `ROWS` in them, where the appended
    state grows, `SLOTS`, and where it takes any number of boards, `BOARDS`.
    """

    name: str
    chunks: tuple[int, ...]
    takes: tuple[TensorSpec, ...]
    gives: tuple[TensorSpec, ...]
    program: ExportedProgram  # see also `LoopProgram.without_traces`

    @property
    def label(self) -> str:
        """Its name and the calls it serves, for messages: "loop (1 or 64 rows)"."""
        return f"{self.name} ({rows_text(self.chunks)})"


@dataclass(frozen=True)
class LoopProgram:
    """All methods of a model, for every number of rows it is called with."""

    model: LoopModel
    specs: dict[int, LoopSpec]  # chunk -> spec
    methods: tuple[ExportedMethod, ...]
    grows: bool = False  # the methods take any number of slots of the appended state
    heads: MtpHeads | None = None  # that draft for the model; their methods are among `LoopSpec.extra`

    def without_traces(self, model: LoopModel) -> LoopProgram:
        """What can be asked of it when it has been lowered; the graphs, and the weights that they hold, are gone.

        Args:
            model: that takes the place of the one that was traced, whose weights may be in a form of the target's own.
        """
        bare: Any = None
        methods = tuple(dataclasses.replace(m, program=bare) for m in self.methods)
        return dataclasses.replace(self, model=model, methods=methods)

    def method(self, name: str, chunk: int) -> ExportedMethod:
        return next(m for m in self.methods if m.name == name and chunk in m.chunks)


def method_names(spec: LoopSpec, host_loop: bool = False) -> tuple[str, ...]:
    """The methods that are traced; see `trace`."""
    methods = HOST_METHODS if host_loop or spec.layers else METHODS
    if spec.layers:
        at = methods.index("step")
        methods = (*methods[:at], *layer_methods(spec), *methods[at + 1 :])
    absent = {name for name, there in (("commit", spec.commit), ("coda", spec.coda)) if not there}
    return (*(m for m in methods if m not in absent), *spec.extra)


def specs_of(
    model: LoopModel, chunks: tuple[int, ...], most: int | None, heads: MtpHeads | None
) -> dict[int, LoopSpec]:
    """The specs of the calls that are traced, checked, with the methods of heads among them; arguments as of `trace`."""
    specs = {chunk: model.spec(chunk).of_capacity(most) for chunk in chunks}
    for spec in specs.values():
        check_spec(spec)
    return specs if heads is None else {chunk: heads.added_to(spec) for chunk, spec in specs.items()}


def trace(
    model: LoopModel,
    chunks: tuple[int, ...],
    progress: Callable[[str], None] = lambda _: None,
    any_rows: bool = False,
    host_loop: bool = False,
    grows: bool = False,
    most: int | None = None,
    batches: bool = False,
    heads: MtpHeads | None = None,
) -> LoopProgram:
    """Model -> LoopProgram.

    Args:
        chunks: rows of the calls to trace, such as (1, 64).
        progress: told what is being traced.
        any_rows: trace a method once for all of `chunks`, with a symbolic number of rows, where its tensors differ in
            nothing else. Otherwise every method is traced for each of them, and all shapes are static.
        host_loop: the target has no loop; see the module.
        grows: trace with a symbolic number of slots of the appended state; otherwise there are as many as fit.
        most: positions that a text may have, where that is fewer than the model attends to.
        batches: trace what hosts call of a model of boards with a symbolic number of them; see the module.
        heads: that draft for the model: a method for each of them, for calls of one row.
    Raises:
        ExportError: a method does not trace, or does not return what its spec says.
    """
    if isinstance(model, nn.Module):
        model.eval()
    specs = specs_of(model, chunks, most, heads)
    methods = []
    for chunk, spec in specs.items():
        for name in method_names(spec, host_loop):
            shared = shared_signature(specs, name) if any_rows else None
            if shared is not None and chunk != chunks[0]:
                continue
            tensors = shared or signature(spec, name, host_loop)
            if batches and spec.batches and name != "loop":
                tensors = of_boards(tensors)
            method = Method(model, spec, name, growing(tensors) if grows else tensors, heads)
            methods.append(_traced(method, (chunk,) if shared is None else chunks, progress))
    return LoopProgram(model, specs, tuple(methods), grows, heads)


def tensors_json(specs: Iterable[TensorSpec], grows: bool = False) -> list[dict[str, Any]]:
    """Names, shapes and types, for a manifest; with `grows` also which axis grows with the appended state."""
    return [
        {"name": t.name, "shape": list(t.shape), "dtype": dtype_name(t.dtype)}
        | ({"slots_axis": t.slots_axis} if grows and t.slots_axis is not None else {})
        for t in specs
    ]


def rows_text(chunks: tuple[int, ...]) -> str:
    return f"{' or '.join(str(chunk) for chunk in chunks)} rows"


def _traced(module: Method, chunks: tuple[int, ...], progress: Callable[[str], None]) -> ExportedMethod:
    progress(f"tracing {module.method} ({rows_text(chunks)})")
    sizes: dict[int, int] = {}  # symbol -> the size to trace it with
    options: dict[str, Any] = {}
    symbols = {d: most for t in module.takes for d, most in _symbols(t, max(chunks), module.spec.capacity)}
    if symbols:
        dims = {d: torch.export.Dim(NAMES[d], min=2 if d == SLOTS else 1, max=most) for d, most in symbols.items()}
        for d, most in symbols.items():
            sizes[d] = example_size(module, most, sizes.values())
        axes = tuple({i: dims[d] for i, d in enumerate(t.shape) if d in dims} or None for t in module.takes)
        options = {"dynamic_shapes": (axes,)}
        if symbols.keys() & {ROWS, BOARDS}:
            # A call of one is as good as any: where the tracer would rule it out, let it assume nothing.
            options["prefer_deferred_runtime_asserts_over_guards"] = True
    try:
        with torch.no_grad():
            program = torch.export.export(
                module, module.example(*map(sizes.get, (ROWS, SLOTS, BOARDS))), strict=False, **options
            )
    except Exception as error:
        raise ExportError(
            f"{type(module.model).__name__}.{module.method} does not trace: {first_line(error)}"
        ) from error
    exported = ExportedMethod(module.method, chunks, module.takes, module.gives, program)
    check(exported)
    return exported


def _symbols(tensor: TensorSpec, most_rows: int, capacity: int | None) -> list[tuple[int, int]]:
    """The symbols in a shape, each with the most that it may be."""
    most = {ROWS: most_rows, SLOTS: capacity or 0, BOARDS: MOST_BOARDS}
    return [(d, most[d]) for d in tensor.shape if d in most]


def example_size(module: Method, largest: int, taken: Iterable[int]) -> int:
    """The number to trace for a size that varies: one that `torch.export` takes for nothing else.

    One would be taken for a broadcast, and the size of another dimension, or one in `taken`, for that. Small, because
    examples are made: a slot of a large model takes megabytes.
    """
    sizes = {d for t in (*module.takes, *module.gives) for d in t.shape} | set(taken)
    return next((n for n in range(min(largest, 128) - 1, 1, -1) if n not in sizes), largest)


def check(method: ExportedMethod) -> None:
    """Fail unless every output has the name's promised shape and type, symbolic exactly where it says `ROWS`.

    Raises:
        ExportError: naming the method, the tensor, and both shapes.
    """
    nodes = {n.name: n for n in method.program.graph.nodes}
    signed = method.program.graph_signature
    given = [nodes[name].meta["val"] for name in signed.user_inputs]
    symbols = {
        str(v.shape[t.shape.index(mark)]): name
        for t, v in zip(method.takes, given, strict=True)
        for mark, name in NAMES.items()
        if mark in t.shape
    }

    def written(shape: Iterable[Any]) -> str:
        dims = [NAMES.get(d, str(d)) if isinstance(d, int) else str(d) for d in shape]
        for symbol, name in symbols.items():
            dims = [re.sub(rf"\b{symbol}\b", name, d) for d in dims]
        return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"

    for spec, output in zip(method.gives, signed.user_outputs, strict=True):
        value = nodes[output].meta["val"] if output in nodes else None
        if value is None or written(value.shape) != written(spec.shape) or value.dtype != spec.dtype:
            got = "a constant" if value is None else f"{written(value.shape)} {value.dtype}"
            raise ExportError(f"{method.label}: {spec.name} is {got}, its spec says "
                              f"{written(spec.shape)} {spec.dtype}")  # fmt: skip
