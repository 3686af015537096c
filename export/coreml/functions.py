"""Converted methods -> the functions of a Core ML program, with the types and states that Core ML knows.

A method comes from the converter as it was traced: 64-bit integers have become 32-bit ones, scalars have one element,
flags are bool. Here it gets a function of its own: flags as int32, results with the names of the spec, rings of keys and
values as states where the package has them. `loop` is built from two methods, `begin` and `step`, around a `while_loop`.

Constants are emitted at the top of a function, also those that are read inside the loop: coremltools finds weights that
functions share at the top level only, and would store the loop's once more.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, Var, types

from rmse_edge.export.program import LOOP_INDEX, Signature, method_names, signature
from rmse_edge.loop import contract
from rmse_edge.loop.contract import LoopSpec, StateSpec, TensorSpec

OPSET = ct.target.iOS18
SLOTTED = (contract.Ring, contract.Append)  # the updates of states that Core ML may keep: positions in slots
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
    """A state of slots (K, ..., W, hd) of a spec as a Core ML state (K, G, W', hd'), with W' and hd' multiples of 32.

    The axes between are folded into G: Core ML's tensors have five axes at most, and blocks of several layers have one
    more. A state that is not per loop has K = 1.
    """

    name: str
    source: str  # what fills it
    held: tuple[int, ...]  # the part of it that is used, in the spec's shape
    per_loop: bool

    @classmethod
    def of(cls, s: StateSpec) -> Ring:
        assert isinstance(s.update, SLOTTED)
        return cls(s.name, s.update.source, s.shape, s.per_loop)

    @property
    def loops(self) -> int:
        return self.held[0] if self.per_loop else 1

    @property
    def groups(self) -> int:
        return math.prod(self.held[:-2]) // self.loops

    @property
    def window(self) -> int:
        return self.held[-2]

    @property
    def dims(self) -> int:
        return self.held[-1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.loops, self.groups, tiled(self.window), tiled(self.dims))

    def row(self, held: Var, k: Var) -> Var:
        """What loop k (1,) reads of the whole state, in the spec's shape; float16. Of one that is not per loop all."""
        row = mb.gather(x=held, indices=k, axis=0, validate_indices=False) if self.per_loop else held
        if self.shape[2:] != (self.window, self.dims):
            row = mb.slice_by_size(x=row, begin=[0, 0, 0, 0], size=[1, self.groups, self.window, self.dims])
        wanted = self.held[1:] if self.per_loop else self.held
        return row if tuple(row.shape) == wanted else mb.reshape(x=row, shape=wanted)

    def all(self, held: Var) -> Var:
        """The whole state in the spec's shape, float16."""
        if self.shape[2:] != (self.window, self.dims):
            size = [self.loops, self.groups, self.window, self.dims]
            held = mb.slice_by_size(x=held, begin=[0, 0, 0, 0], size=size)
        return mb.reshape(x=held, shape=self.held)

    def write(self, state: Var, new: Var, position: Var, n_valid: Var) -> None:
        """Put the valid rows of `new` (K, ..., C, hd) into their slots."""
        count = new.shape[-2]
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
            if count > self.window:  # of several rows for one slot, the last that is valid
                behind = mb.sub(x=mb.sub(x=n_valid, y=np.int32(1)), y=row)
                turns = mb.maximum(x=mb.floor_div(x=behind, y=np.int32(self.window)), y=np.int32(0))
                row = mb.add(x=row, y=mb.mul(x=turns, y=np.int32(self.window)))
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
        # coremltools numbers constants that it names itself while it goes through a set, in another order each time.
        # Counted anew, the same model gives the same file.
        numbers = itertools.count()
        for op in self.function.operations:
            if op.op_type == "const":
                name = f"const_{next(numbers)}" if re.fullmatch(r"const_\d+", op.name) else op.name
                consts[id(op.outputs[0])] = mb.const(val=op.outputs[0].val, name=self.prefix + name)
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
    held = {s.name for s in spec.state if isinstance(s.update, SLOTTED)} if states else set()
    filled = {s.update.source for s in spec.state if isinstance(s.update, SLOTTED)} if states else set()
    found: dict[str, Signature] = {}
    names = [
        n for name in method_names(spec, host_loop=True) for n in (("step", "loop") if name == "step" else (name,))
    ]
    for name in names:
        takes, gives = signature(spec, name, host_loop=name != "loop")
        takes = tuple(t for t in takes if t.name not in held)
        if filled and name == "commit":
            gives = (COMMITTED, *(t for t in gives if t.name not in filled))
        found[name] = (takes or (SCALE,), gives)
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
        self.rings = [Ring.of(s) for s in spec.state if isinstance(s.update, SLOTTED)] if states else []
        self.signatures = signatures(spec, states)

    def states(self, name: str) -> list[Ring]:
        """The states that a function reads or writes."""
        if name == "commit":
            return self.rings
        names = {s.name for s in self.spec.read_by("loop" if name == "step" else name)}
        return [ring for ring in self.rings if ring.name in names]

    def program(self, name: str) -> Program:
        """One function as a program of its own, which is called "main" there."""
        takes, gives = self.signatures[name]
        inputs = {t.name: mb.TensorSpec(_at_least_one(t.shape), TYPES[t.dtype]) for t in takes}
        inputs |= {ring.name: mb.StateTensorSpec(ring.shape, types.fp16) for ring in self.states(name)}
        with Function(inputs, opset_version=OPSET) as function:
            given = {t.name: self._taken(function.inputs[t.name], t) for t in takes}
            held = {ring.name: function.inputs[ring.name] for ring in self.states(name)}
            build: Callable[[Vars, Vars], Vars] | None = getattr(self, f"_{name}", None)
            results = build(given, held) if build else self._method(name, given | self._read(name, held))
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

    def _read(self, name: str, held: Vars, k: Var | None = None) -> Vars:
        """What a function is given of its states: all of them, or of those that are per loop row `k`."""
        found = {}
        for ring in self.states(name):
            state = mb.read_state(input=held[ring.name])
            whole = k is None and ring.per_loop  # outside the loop nobody asks for a row
            found[ring.name] = ring.all(state) if whole else ring.row(state, k)
        return found

    def _step(self, given: Vars, held: Vars) -> Vars:
        return self._method("step", given | self._read("step", held, given["k"]))

    def _commit(self, given: Vars, held: Vars) -> Vars:
        known = {s.name for s in self.spec.read_by("commit")}
        read = {ring.name: ring.all(mb.read_state(input=held[ring.name])) for ring in self.rings if ring.name in known}
        results = self._method("commit", given | read)
        if not self.rings:
            return results
        for ring in self.rings:
            ring.write(held[ring.name], (given | results)[ring.source], given["position"], given["n_valid"])
        return results | {COMMITTED.name: mb.add(x=given["position"], y=given["n_valid"])}

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
        rings = {ring.name: mb.read_state(input=held[ring.name]) for ring in self.states("loop")}
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
            rows = {ring.name: ring.row(rings[ring.name], at) for ring in self.states("loop")}
            rows |= {t.name: _row(given[t.name], at) for t in spec.rows if t.name not in rows}
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
    found = mb.identity(x=new)
    if found.val is None:
        # Of what joins a few numbers coremltools makes up symbols for each, others in every loop, and then misses the last ones.
        found._sym_val = None
    return found


def _replaced(stack: Var, row: Var, k: Var) -> Var:
    """(K, ...) with row k (1,) replaced."""
    begin = mb.concat(values=[k, np.zeros(len(row.shape), np.int32)], axis=0)
    ends = [mb.add(x=k, y=np.int32(1)), np.array(row.shape, np.int32)]
    update = mb.expand_dims(x=row, axes=[0])
    if update.dtype != stack.dtype:
        update = mb.cast(x=update, dtype=types.builtin_to_string(stack.dtype))
    return mb.slice_update(x=stack, update=update, begin=begin, end=mb.concat(values=ends, axis=0))
