"""Converted methods -> the functions of a Core ML program, with the types and states that Core ML knows.

A method comes from the converter as it was traced: 64-bit integers have become 32-bit ones, scalars have one element,
flags are bool. Here it gets a function of its own: flags as int32, results with the names of the spec, rings of keys and
values as states where the package has them. `loop` is built from two methods, `begin` and `step`, around a `while_loop`.

Constants are emitted at the top of a function, also those that are read inside the loop: coremltools finds weights that
functions share at the top level only, and would store the loop's once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, Var, types

from rmse_edge.export.program import LOOP_INDEX, Signature, signature
from rmse_edge.loop.contract import LoopSpec, TensorSpec

OPSET = ct.target.iOS18
TILE = 32  # sizes that the Neural Engine takes for the last two axes of a state
COMMITTED = TensorSpec("committed", (1,), torch.int64)  # what `commit` gives where the rings are states
SCALE = TensorSpec("scale", (1,))  # what `blank` is given: Core ML has no functions without inputs
TYPES = {
    torch.float32: types.fp32,
    torch.float16: types.fp16,
    torch.int64: types.int32,
    torch.bool: types.int32,  # Core ML gives and takes no flags
}

Vars = dict[str, Var]


@dataclass(frozen=True)
class Ring:
    """A state tensor (K, 1, G, W, hd) of a spec as a Core ML state (K, G, W', hd'), with W' and hd' multiples of 32."""

    name: str
    loops: int
    groups: int
    window: int
    dims: int

    @classmethod
    def of(cls, t: TensorSpec) -> Ring:
        loops, _, groups, window, dims = t.shape
        return cls(t.name, loops, groups, window, dims)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.loops, self.groups, tiled(self.window), tiled(self.dims))

    @property
    def held(self) -> tuple[int, int, int, int, int]:
        """The part of it that is used, in the spec's shape."""
        return (self.loops, 1, self.groups, self.window, self.dims)

    def row(self, held: Var, k: Var) -> Var:
        """What loop k (1,) reads of the whole state: (1, G, W, hd) float16."""
        row = mb.gather(x=held, indices=k, axis=0, validate_indices=False)
        if self.shape[2:] == (self.window, self.dims):
            return row
        return mb.slice_by_size(x=row, begin=[0, 0, 0, 0], size=[1, self.groups, self.window, self.dims])

    def write(self, state: Var, new: Var, position: Var, n_valid: Var) -> None:
        """Put the valid rows of `new` (K, 1, G, C, hd) into their slots."""
        count = new.shape[3]
        rows = mb.cast(x=mb.reshape(x=new, shape=(self.loops, self.groups, count, self.dims)), dtype="fp16")
        if self.shape[3] != self.dims:
            pad = [0] * 7 + [self.shape[3] - self.dims]
            rows = mb.pad(x=rows, pad=pad, mode="constant", constant_val=np.float16(0))
        held = mb.read_state(input=state)
        slot = mb.mod(x=position, y=np.int32(self.window))  # (1,) of the first row
        if count == 1:
            zero = np.array([0, 0], np.int32)
            begin = mb.concat(values=[zero, slot, zero[:1]], axis=0)
            after = mb.add(x=slot, y=np.int32(1))
            ends = [np.array(self.shape[:2], np.int32), after, np.array(self.shape[3:], np.int32)]
            updated = mb.slice_update(x=held, update=rows, begin=begin, end=mb.concat(values=ends, axis=0))
        else:
            # Row of the call that each slot gets; those that get none keep what they hold.
            slots = np.arange(self.window, dtype=np.int32) + np.int32(self.window)
            row = mb.mod(x=mb.sub(x=slots, y=slot), y=np.int32(self.window))  # (W,)
            row = self._padded(row)
            taken = mb.reshape(x=mb.less(x=row, y=n_valid), shape=(1, 1, self.shape[2], 1))
            source = mb.minimum(x=row, y=np.int32(count - 1))
            placed = mb.gather(x=rows, indices=source, axis=2, validate_indices=False)
            updated = mb.select(cond=mb.tile(x=taken, reps=[*self.shape[:2], 1, self.shape[3]]), a=placed, b=held)
        mb.coreml_update_state(state=state, value=updated)

    def _padded(self, row: Var) -> Var:
        """Slots beyond the window get no row: a number that is never below `n_valid`."""
        beyond = self.shape[2] - self.window
        return mb.concat(values=[row, np.full(beyond, 2**20, np.int32)], axis=0) if beyond else row


def tiled(size: int) -> int:
    return math.ceil(size / TILE) * TILE


@dataclass(frozen=True)
class Converted:
    """A method as the converter left it: its MIL function, and the tensors it takes and gives."""

    function: Function
    takes: tuple[TensorSpec, ...]
    gives: tuple[TensorSpec, ...]
    prefix: str  # of the names of its values, so that two methods in one function do not share any

    def constants(self) -> dict[int, Var]:
        """Emit all its constants here, weights that are stored packed among them: what each is now, by its id."""
        consts: dict[int, Var] = {}
        for op in self.function.operations:
            if op.op_type == "const":
                consts[id(op.outputs[0])] = mb.const(val=op.outputs[0].val, name=self.prefix + op.name)
            elif op.op_type.startswith("constexpr_"):
                consts[id(op.outputs[0])] = _again(op, {}, consts, self.prefix)[0]
        return consts

    def call(self, given: Mapping[str, Var], consts: dict[int, Var]) -> Vars:
        """Emit the method here, once per function, on values by name; `consts` are those of `constants`."""
        feeds = dict(zip(self.function.inputs.values(), (given[t.name] for t in self.takes), strict=True))
        return dict(zip((t.name for t in self.gives), inline(self.function, feeds, consts, self.prefix), strict=True))


def inline(function: Function, feeds: Mapping[Var, Var], consts: dict[int, Var], prefix: str) -> list[Var]:
    """Emit the operators of `function` here, but for its constants. Returns its outputs."""
    known = {id(inside): outside for inside, outside in feeds.items()}
    for inside, outside in feeds.items():
        if inside.dtype != outside.dtype:
            known[id(inside)] = mb.cast(x=outside, dtype=types.builtin_to_string(inside.dtype))
    for op in function.operations:
        if id(op.outputs[0]) not in consts:
            for old, new in zip(op.outputs, _again(op, known, consts, prefix)):
                known[id(old)] = new
    return [known.get(id(var)) or consts[id(var)] for var in function.outputs]


def _again(op: Any, known: Mapping[int, Var], consts: Mapping[int, Var], prefix: str) -> Sequence[Var]:
    """Emit one operator here."""

    def found(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [found(v) for v in value]
        return known[id(value)] if id(value) in known else consts[id(value)]

    inputs = {name: found(value) for name, value in op.inputs.items() if value is not None}
    made = getattr(mb, op.op_type)(**inputs, name=prefix + op.name)
    return made if isinstance(made, (list, tuple)) else [made]


def signatures(spec: LoopSpec, states: bool) -> dict[str, Signature]:
    """What the functions of one number of rows take and give, beside states, by name."""
    held = {t.name for t in spec.state} if states else set()
    found: dict[str, Signature] = {}
    for name in ("prelude", "begin", "step", "loop", "head", *(["commit"] if spec.commit else []), *spec.extra):
        takes, gives = signature(spec, name, host_loop=name != "loop")
        if name in ("step", "loop"):
            takes = tuple(t for t in takes if t.name not in held)
        found[name] = (takes or (SCALE,), (COMMITTED,) if held and name == "commit" else gives)
    return found


class Assembly:
    """Builds the functions of one number of rows from its converted methods."""

    def __init__(self, spec: LoopSpec, methods: Mapping[str, Converted], states: bool) -> None:
        """
        Args:
            methods: by name.
            states: keep the spec's state in Core ML states; otherwise it is given and returned.
        """
        self.spec, self.methods = spec, methods
        self.rings = [Ring.of(t) for t in spec.state] if states else []
        self.signatures = signatures(spec, states)

    def states(self, name: str) -> list[Ring]:
        """The states that a function reads or writes."""
        return self.rings if name in ("step", "loop", "commit") else []

    def program(self, name: str) -> Program:
        """One function as a program of its own, which is called "main" there."""
        takes, gives = self.signatures[name]
        inputs = {t.name: mb.TensorSpec(_at_least_one(t.shape), TYPES[t.dtype]) for t in takes}
        inputs |= {ring.name: mb.StateTensorSpec(ring.shape, types.fp16) for ring in self.states(name)}
        with Function(inputs, opset_version=OPSET) as function:
            given = {t.name: self._taken(function.inputs[t.name], t) for t in takes}
            held = {ring.name: function.inputs[ring.name] for ring in self.states(name)}
            build: Callable[[Vars, Vars], Vars] | None = getattr(self, f"_{name}", None)
            results = build(given, held) if build else self._method(name, given)
            function.set_outputs([self._given(results[t.name], t) for t in gives])
        program = Program()
        program.add_function("main", function)
        return program

    @staticmethod
    def _taken(var: Var, t: TensorSpec) -> Var:
        """An input as the methods want it: flags as bool; scalars keep their one element."""
        return mb.cast(x=var, dtype="bool") if t.dtype == torch.bool else var

    @staticmethod
    def _given(var: Var, t: TensorSpec) -> Var:
        """A result as an output of the function, under its own name."""
        if len(var.shape) == 0:
            var = mb.expand_dims(x=var, axes=[0])
        wanted = types.builtin_to_string(TYPES[t.dtype])
        if types.builtin_to_string(var.dtype) != wanted:
            return mb.cast(x=var, dtype=wanted, name=t.name)
        return mb.identity(x=var, name=t.name)

    # ------------------------------------------------------------------------------------------ the functions

    def _method(self, name: str, given: Vars) -> Vars:
        method = self.methods[name]
        return method.call(given, method.constants())

    def _step(self, given: Vars, held: Vars) -> Vars:
        rows = {ring.name: ring.row(mb.read_state(input=held[ring.name]), given["k"]) for ring in self.rings}
        return self._method("step", given | rows)

    def _commit(self, given: Vars, held: Vars) -> Vars:
        results = self._method("commit", given)
        if not self.rings:
            return results
        for ring in self.rings:
            source = self.spec.notes["rings"][ring.name]
            ring.write(held[ring.name], results[source], given["position"], given["n_valid"])
        return {COMMITTED.name: mb.add(x=given["position"], y=given["n_valid"])}

    def _blank(self, given: Vars, held: Vars) -> Vars:
        results = self._method("blank", {})
        # Nothing is not worth storing.
        values = {
            name: mb.fill(shape=value.shape, value=np.float32(0)) if not np.any(value.val) else value
            for name, value in results.items()
        }
        return {name: mb.mul(x=value, y=given[SCALE.name]) for name, value in values.items()}

    def _loop(self, given: Vars, held: Vars) -> Vars:
        """begin, then step while something is active: the whole loop in the graph."""
        spec = self.spec
        begun = self._method("begin", given)
        step = self.methods["step"]
        consts = step.constants()  # here, not in the body
        rings = {ring.name: mb.read_state(input=held[ring.name]) for ring in self.rings}
        fixed = given | {t.name: begun[t.name] for t in spec.invariants}
        carried = [t.name for t in spec.carried]
        emits = list(spec.emits)
        active = mb.identity(x=mb.cast(x=begun["first_active"], dtype="int32"))
        first = {t.name: begun[f"first_{t.name}"] for t in spec.carried if t.name != "depth"}
        first |= {"active": active, "depth": mb.mul(x=active, y=np.int32(0))}
        running = mb.reduce_max(x=active, keep_dims=False)
        zero = mb.mul(x=running, y=np.int32(0))
        stacks = [mb.identity(x=mb.fill(shape=(spec.max_loops, *t.shape), value=np.float32(0))) for t in emits]
        limit = mb.squeeze(x=given["max_loops"])

        def going(k: Var, on: Var, *_: Var) -> Var:
            return mb.logical_and(x=mb.less(x=k, y=limit), y=mb.greater(x=on, y=np.int32(0)))

        def body(k: Var, on: Var, *values: Var) -> tuple[Var, ...]:
            at = mb.expand_dims(x=k, axes=[0])
            carry = dict(zip(carried, values))
            carry["active"] = mb.cast(x=carry["active"], dtype="bool")
            rows = {ring.name: ring.row(rings[ring.name], at) for ring in self.rings}
            if not self.rings:
                rows = {t.name: _row(given[t.name], at) for t in spec.state}
            new = step.call(fixed | carry | rows | {LOOP_INDEX.name: at}, consts)
            moved = [_like(new[f"next_{name}"], old) for name, old in zip(carried, values)]
            filled = [_replaced(stack, new[t.name], at) for t, stack in zip(emits, values[len(carried) :], strict=True)]
            # Not `any_active`, a flag: loops carry numbers.
            still = mb.reduce_max(x=moved[carried.index("active")], keep_dims=False)
            return (mb.add(x=k, y=np.int32(1)), still, *moved, *filled)

        start = (zero, running, *(first[name] for name in carried), *stacks)
        k, _, *values = mb.while_loop(_cond=going, _body=body, loop_vars=start)
        results = dict(zip([*carried, *(t.name for t in emits)], values))
        return results | {"iterations": k}


def _at_least_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Core ML takes and gives no scalars."""
    return shape or (1,)


def _row(stacked: Var, k: Var) -> Var:
    """Row k (1,) of (K, ...)."""
    return mb.squeeze(x=mb.gather(x=stacked, indices=k, axis=0, validate_indices=False), axes=[0])


def _like(new: Var, old: Var) -> Var:
    """A carried value in the type it came in, and never the very one: a body must not return what it was given."""
    if new.dtype != old.dtype:
        return mb.cast(x=new, dtype=types.builtin_to_string(old.dtype))
    return mb.identity(x=new)


def _replaced(stack: Var, row: Var, k: Var) -> Var:
    """(K, ...) with row k (1,) replaced."""
    begin = mb.concat(values=[k, np.zeros(len(row.shape), np.int32)], axis=0)
    ends = [mb.add(x=k, y=np.int32(1)), np.array(row.shape, np.int32)]
    update = mb.expand_dims(x=row, axes=[0])
    if update.dtype != stack.dtype:
        update = mb.cast(x=update, dtype=types.builtin_to_string(stack.dtype))
    return mb.slice_update(x=stack, update=update, begin=begin, end=mb.concat(values=ends, axis=0))
