"""`LoopProgram`: a looped model as named methods with static shapes, each traced by `torch.export`.

This is the stage between a model and every target. Its methods and their tensors, in order:

| method  | in                                                        | out                                        |
|---------|-----------------------------------------------------------|--------------------------------------------|
| prelude | inputs                                                    | prelude                                    |
| loop    | prelude, context, state, memory, dials                    | h, depth, iterations, stacked emits        |
| step    | k, carry, prelude, context, row k of state, memory, dials | next_ carry, emits, any_active             |
| head    | h                                                         | head                                       |
| commit  | prelude, context, h, depth, iterations, stacked emits     | commit                                     |

A model may add methods of its own (`LoopSpec.extra`), which hosts call outside the loop.

`loop` holds the loop itself (`torch.while_loop`); `step` is one iteration, for hosts that own the loop. The names are
those of the model's `LoopSpec`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.export import ExportedProgram

from ..errors import ExportError
from ..loop import DIALS, LoopModel, LoopSpec, TensorSpec, run_loop

METHODS = ("prelude", "loop", "step", "head", "commit")
ITERATIONS = TensorSpec("iterations", (), torch.int64)
LOOP_INDEX = TensorSpec("k", (), torch.int64)
ANY_ACTIVE = TensorSpec("any_active", (), torch.bool)


def dial_specs(spec: LoopSpec) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, (), DIALS[name][0]) for name in spec.dials)


def stacked(spec: LoopSpec) -> tuple[TensorSpec, ...]:
    """The emits of all iterations, (K, ...)."""
    return tuple(TensorSpec(t.name, (spec.max_loops, *t.shape), t.dtype) for t in spec.emits)


def next_of(carried: TensorSpec) -> TensorSpec:
    """A carried tensor as `step` returns it: a graph cannot give a name that it takes."""
    return TensorSpec(f"next_{carried.name}", carried.shape, carried.dtype)


def signature(spec: LoopSpec, method: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The tensors a method takes and gives, in order."""
    depth = TensorSpec("depth", spec.active.shape, torch.int64)
    rows = tuple(TensorSpec(t.name, t.shape[1:], t.dtype) for t in spec.state)
    given = (*spec.prelude, *spec.context)
    if method in spec.extra:
        return spec.extra[method]
    return {
        "prelude": (spec.inputs, spec.prelude),
        "loop": ((*given, *spec.state, *spec.memory, *dial_specs(spec)), (spec.h, depth, ITERATIONS, *stacked(spec))),
        "step": (
            (LOOP_INDEX, *spec.carried, *given, *rows, *spec.memory, *dial_specs(spec)),
            (*(next_of(t) for t in spec.carried), *spec.emits, ANY_ACTIVE),
        ),
        "head": ((spec.h,), spec.head),
        "commit": ((*given, spec.h, depth, ITERATIONS, *stacked(spec)), spec.commit),
    }[method]


class Method(nn.Module):
    """One method as a module: tensors in by position, in the order of `signature`, tensors out likewise."""

    def __init__(self, model: LoopModel, spec: LoopSpec, method: str) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.method = method
        self.takes, self.gives = signature(spec, method)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        tensors = {t.name: v for t, v in zip(self.takes, values, strict=True)}
        if self.method in self.spec.extra:
            results = getattr(self.model, self.method)(tensors)
        else:
            results = getattr(self, f"_{self.method}")(tensors)
        return tuple(results[t.name] for t in self.gives)

    def _prelude(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.prelude(tensors)

    def _loop(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return run_loop(self.model, self.spec, tensors, self._dials(tensors), while_loop)

    def _step(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        carry = {t.name: tensors[t.name] for t in self.spec.carried}
        given = {t.name: tensors[t.name] for t in (*self.spec.prelude, *self.spec.context, *self.spec.memory)}
        past = {t.name: tensors[t.name] for t in self.spec.state}
        invariants = self.model.begin(given)[1]
        new, emitted = self.model.step(tensors["k"], carry, past, given | invariants, self._dials(tensors))
        new["depth"] = carry["depth"] + carry["active"].to(torch.int64)
        return {next_of(t).name: new[t.name] for t in self.spec.carried} | emitted | {"any_active": new["active"].any()}

    def _head(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.head(tensors["h"])

    def _commit(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.commit(tensors)

    def _dials(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[name] for name in self.spec.dials}

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace with: zeros, and one of everything where zero would be out of range."""
        ones = {"max_loops", "min_loops", "n_valid", "iterations", "exit_threshold"}
        return tuple(t.zeros() + 1 if t.name in ones else t.zeros() for t in self.takes)


@dataclass(frozen=True)
class ExportedMethod:
    name: str
    chunk: int
    takes: tuple[TensorSpec, ...]
    gives: tuple[TensorSpec, ...]
    program: ExportedProgram


@dataclass(frozen=True)
class LoopProgram:
    """All methods of a model, for every number of rows it is called with."""

    model: LoopModel
    specs: dict[int, LoopSpec]  # chunk -> spec
    methods: tuple[ExportedMethod, ...]

    def method(self, name: str, chunk: int) -> ExportedMethod:
        return next(m for m in self.methods if (m.name, m.chunk) == (name, chunk))


def method_names(spec: LoopSpec) -> tuple[str, ...]:
    return (*(m for m in METHODS if m != "commit" or spec.commit), *spec.extra)


def trace(model: LoopModel, chunks: tuple[int, ...], progress: Callable[[str], None] = lambda _: None) -> LoopProgram:
    """Model -> LoopProgram.

    Args:
        chunks: rows of the calls to trace, such as (1, 64).
        progress: told what is being traced.
    Raises:
        ExportError: a method does not trace, or does not return what its spec says.
    """
    if isinstance(model, nn.Module):
        model.eval()
    specs = {chunk: model.spec(chunk) for chunk in chunks}
    methods = []
    for chunk, spec in specs.items():
        for name in method_names(spec):
            progress(f"tracing {name} ({chunk} rows)")
            module = Method(model, spec, name)
            try:
                with torch.no_grad():
                    program = torch.export.export(module, module.example(), strict=False)
            except Exception as error:
                reason = str(error).strip().splitlines()[0]
                raise ExportError(f"{type(model).__name__}.{name} does not trace: {reason}") from error
            exported = ExportedMethod(name, chunk, module.takes, module.gives, program)
            check(exported)
            methods.append(exported)
    return LoopProgram(model, specs, tuple(methods))


def check(method: ExportedMethod) -> None:
    """Fail unless every output has the name's promised shape and type.

    Raises:
        ExportError: naming the method, the tensor, and both shapes.
    """
    nodes = {n.name: n for n in method.program.graph.nodes}
    for spec, output in zip(method.gives, method.program.graph_signature.user_outputs, strict=True):
        value = nodes[output].meta["val"] if output in nodes else None
        if value is None or tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
            got = "a constant" if value is None else f"{tuple(value.shape)} {value.dtype}"
            raise ExportError(f"{method.name} ({method.chunk} rows): {spec.name} is {got}, its spec says "
                              f"{spec.shape} {spec.dtype}")  # fmt: skip
