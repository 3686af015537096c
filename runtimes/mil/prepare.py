"""Turns a function of a file into steps: names become numbered places, constants are read once for all functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rmse_edge.errors import PackageError

from . import operators_constant, operators_math, operators_tensor  # noqa: F401  (they fill the table)
from .file import Function, ModelFile, Operation, Signature, TensorType, tensor_type
from .operators import OPERATORS, Call, Operator, round_half, to_half
from .steps import Block, Run, Step, Values, branch, emptying, large, loop, many, one

CONTROL = {"const", "while_loop", "cond", "read_state", "write_state", "coreml_update_state"}
REUSE = 1 << 14  # elements from which a result is written over an operand that is not needed any more


@dataclass(eq=False)
class Constant:
    """A constant, read when it is first asked for."""

    key: Any  # what is equal for equal constants, across functions
    load: Callable[[], Any]  # fp16 as the file has it or as float32


@dataclass(eq=False)
class Name:
    """What a name stands for inside a block."""

    type: TensorType
    slot: int = -1
    constant: Constant | None = None
    state: str | None = None
    shared: bool = True  # its array may be seen elsewhere: by the caller, a constant, another value


@dataclass(eq=False)
class Prepared:
    signature: Signature
    block: Block
    template: Values  # constants in their places
    inputs: list[tuple[str, TensorType, int]]
    outputs: list[tuple[str, TensorType, int, bool]]


class Preparation:
    """Turns one function into steps."""

    def __init__(self, file: ModelFile, constants: dict[Any, Any]) -> None:
        self.file = file
        self.constants = constants
        self.template: Values = []
        self.opset = 0

    def function(self, function: Function) -> Prepared:
        digits = "".join(c for c in function.opset if c.isdigit())
        self.opset = int(digits or 8)
        scope: dict[str, Name] = {}
        inputs = []
        for name, declared in function.inputs.items():
            scope[name] = Name(declared, self._slot())
            inputs.append((name, declared, scope[name].slot))
        for name, declared in function.states.items():
            scope[name] = Name(declared, state=name)
        found = [Operation(function.name, str(i), op) for i, op in enumerate(function.block.operations)]
        block = self._block(found, scope, list(function.block.outputs), list(function.inputs))
        outputs = [(n, scope[n].type, self._place(scope[n]), scope[n].shared) for n in function.block.outputs]
        block.outputs = [slot for _, _, slot, _ in outputs]
        return Prepared(function.signature, block, self.template, inputs, outputs)

    def _slot(self) -> int:
        self.template.append(None)
        return len(self.template) - 1

    def _fetch(self, constant: Constant, keep: bool = True) -> Any:
        """A constant's value, fp16 as float32, one array for all who ask."""
        if constant.key in self.constants:
            return self.constants[constant.key]
        value = constant.load()
        if isinstance(value, np.ndarray) and value.dtype == np.float16:
            value = value.astype(np.float32)
        if keep:
            self.constants[constant.key] = value
        return value

    def _place(self, name: Name) -> int:
        """Where a value is found; a constant gets a place when something first asks for it there."""
        if name.slot < 0:
            name.slot = self._slot()
            if name.constant is not None:
                self.template[name.slot] = self._fetch(name.constant)
        return name.slot

    def _block(self, found: list[Operation], scope: dict[str, Name], results: list[str], inputs: list[str]) -> Block:
        """Args:
        scope: what the names of the block's inputs and of everything outside stand for; what it makes is added.
        """
        block = Block()
        last, viewed = _uses(found)
        for name in results:
            last[name] = len(found)
            viewed.add(name)
        made = {name: scope[name].slot for name in inputs}  # names whose places this block empties
        block.inputs = [scope[name].slot if name in last else -1 for name in inputs]
        given: set[str] = set(inputs)
        for index, operation in enumerate(found):
            names = [output.name for output in operation.proto.outputs]
            if again := next((name for name in names if name in given), None):
                raise PackageError(
                    f"{operation.place}: gives {again}, a name that has a value; export the package again"
                )
            given |= set(names)
            if operation.kind == "const" or operation.kind.startswith("constexpr_"):
                self._constant(operation, scope)
                continue
            dead = [n for n, i in last.items() if i == index and n in made]
            step = self._step(operation, scope, [n for n in dead if n not in viewed])
            emptied = [made[n] for n in dead]
            for name in operation.outputs:
                made[name] = scope[name].slot
                if name not in last:  # nobody asks for it
                    emptied.append(made[name])
            block.steps.append(emptying(step, emptied) if emptied else step)
            block.places.append(operation.place)
            block.results.append([(scope[n].slot, t) for n, t in operation.outputs.items()])
        block.own = [made[n] for n in dict.fromkeys(results) if n in made]
        return block

    def _names(self, operation: Operation, scope: dict[str, Name]) -> dict[str, list[Name]]:
        """What each of its inputs and attributes stands for."""
        found: dict[str, list[Name]] = {}
        for key, argument in operation.proto.inputs.items():
            found[key] = []
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "value":
                    found[key].append(self._written(binding.value))
                elif binding.name in scope:
                    found[key].append(scope[binding.name])
                else:
                    raise PackageError(f"{operation.place}: takes {binding.name}, which nothing before it makes")
        for key, value in operation.proto.attributes.items():
            if key != "name":
                found[key] = [self._written(value)]
        return found

    def _written(self, proto: Any) -> Name:
        """A constant that is written into an operation."""
        declared = tensor_type(proto.type)
        if proto.WhichOneof("value") == "blobFileValue":
            where = proto.blobFileValue
            key: Any = ("blob", where.fileName, where.offset, declared)
        else:
            key = ("value", proto.SerializeToString(deterministic=True))
        return Name(declared, constant=Constant(key, lambda: self.file.value(proto)))

    def _constant(self, operation: Operation, scope: dict[str, Name]) -> None:
        """Enter what a `const` or `constexpr_*` gives."""
        if operation.kind == "const":
            (output,) = operation.proto.outputs
            scope[output.name] = self._written(operation.proto.attributes["val"])
            return
        entry = self._operator(operation)
        names = self._names(operation, scope)
        if any(n.constant is None for group in names.values() for n in group):
            raise PackageError(f"{operation.place}: takes a value that is computed; export the package again")
        keys = tuple(sorted((k, tuple(n.constant.key for n in group if n.constant)) for k, group in names.items()))
        outputs = list(operation.outputs.items())

        def load(index: int) -> Any:
            call = self._call(operation, names, list(operation.outputs.values()))
            given = [names[k][0].constant if k in names else None for k in entry.takes]
            # not kept: a weight's codes are of no more use once it is unpacked
            with np.errstate(all="ignore"):
                result = entry.make(call)(*(None if c is None else self._fetch(c, keep=False) for c in given))
            value = result[index] if isinstance(result, tuple) else result
            if outputs[index][1].dtype == "float16" and not entry.exact:
                value = round_half(value)
            if value.shape != outputs[index][1].shape:
                raise PackageError(f"{operation.place}: gives {value.shape}, the file says {outputs[index][1]}")
            return value

        for i, (name, declared) in enumerate(outputs):
            scope[name] = Name(declared, constant=Constant((operation.kind, i, keys), partial(load, i)))

    def _operator(self, operation: Operation) -> Operator:
        if operation.kind not in OPERATORS:
            raise PackageError(f"{operation.place}: the interpreter does not know the operator {operation.kind}")
        return OPERATORS[operation.kind]

    def _call(self, operation: Operation, names: dict[str, list[Name]], outputs: list[TensorType]) -> Call:
        constants: dict[str, Any] = {}
        for key, group in names.items():
            if all(n.constant is not None for n in group):
                constants[key] = group[0].constant if len(group) == 1 else tuple(n.constant for n in group)
        inputs = {k: [n.type for n in group] for k, group in names.items()}
        return Call(operation.kind, operation.place, self.opset, constants, inputs, outputs, self._fetch_any)

    def _fetch_any(self, constant: Any, transposed: bool) -> Any:
        if isinstance(constant, tuple):
            return np.array([self._fetch(c) for c in constant])
        if not transposed:
            return self._fetch(constant)

        def turned() -> np.ndarray:
            return np.ascontiguousarray(self._fetch(constant, keep=False).T)

        return self._fetch(Constant(("transposed", constant.key), turned))

    def _step(self, operation: Operation, scope: dict[str, Name], free: list[str]) -> Step:
        """Args:
        free: names that nobody asks for after this operation and that no other value shares memory with.
        """
        kind = operation.kind
        if kind not in CONTROL:
            return self._computed(operation, scope, free)
        names = self._names(operation, scope)
        if kind in ("read_state", "write_state", "coreml_update_state"):
            return self._state(operation, names, scope)
        blocks = {called: self._nested(operation, called, block, scope) for called, block in operation.blocks()}
        targets = []
        for name, declared in operation.outputs.items():
            scope[name] = Name(declared, self._slot())
            targets.append(scope[name].slot)
        if kind == "cond":
            return branch(self._place(names["pred"][0]), blocks["true"], blocks["false"], targets)
        sources = [self._place(n) for n in names["loop_vars"]]
        return loop(sources, blocks["condition"], blocks["body"], targets)

    def _nested(self, operation: Operation, called: str, proto: Any, outer: dict[str, Name]) -> Block:
        scope = dict(outer)
        for given in proto.inputs:
            scope[given.name] = Name(tensor_type(given.type), self._slot())
        inputs = [given.name for given in proto.inputs]
        block = self._block(operation.inside(called, proto), scope, list(proto.outputs), inputs)
        missing = [n for n in proto.outputs if n not in scope]
        if missing:
            raise PackageError(f"{operation.place}: its {called} gives {missing[0]}, which nothing in it makes")
        block.outputs = [self._place(scope[n]) for n in proto.outputs]
        return block

    def _state(self, operation: Operation, names: dict[str, list[Name]], scope: dict[str, Name]) -> Step:
        key = "state" if operation.kind == "coreml_update_state" else "input"
        which = names[key][0]
        if which.state is None:
            raise PackageError(f"{operation.place}: {key} is no state; export the package again")
        name, half = which.state, which.type.dtype == "float16"
        target = -1
        for made, declared in operation.outputs.items():
            scope[made] = Name(declared, self._slot(), shared=False)
            target = scope[made].slot
        if operation.kind == "read_state":

            def read(run: Run) -> None:
                found = run.state[name]
                run.values[target] = found.astype(np.float32) if half else found.copy()

            return read
        source = self._place(names["data" if operation.kind == "write_state" else "value"][0])

        def write(run: Run) -> None:
            value = run.values[source]
            run.state[name][...] = to_half(value) if half else value
            if target >= 0:
                run.values[target] = np.array(value)

        return write

    def _computed(self, operation: Operation, scope: dict[str, Name], free: list[str]) -> Step:
        entry = self._operator(operation)
        names = self._names(operation, scope)
        outputs = list(operation.outputs.items())
        call = self._call(operation, names, [t for _, t in outputs])
        compute = entry.make(call)
        taken: list[Name] = []
        sources: list[int] = []
        for key in entry.takes:
            group = names.get(key.removeprefix("*"), [])
            if not group and not key.startswith("*"):
                sources.append(-1)
            taken += group
            sources += [self._place(n) for n in group]
        while sources and sources[-1] < 0:  # so that a default can be one
            sources.pop()
        # A view may be written over only where what it is a view of is not needed any more.
        dying = [scope[n] for n in free]
        shared = entry.views and any(n.shared or n not in dying for n in taken)
        for name, declared in outputs:
            scope[name] = Name(declared, self._slot(), shared=shared)
        targets = [scope[n].slot for n, _ in outputs]
        rounded = [t.dtype == "float16" and not entry.exact for _, t in outputs]
        if len(targets) != 1:
            return many(compute, sources, targets, rounded)
        declared = outputs[0][1]
        if isinstance(compute, np.ufunc) and compute.signature is None and declared.size >= REUSE:
            old = [scope[n] for n in free if scope[n] in taken and scope[n].type == declared and not scope[n].shared]
            return large(compute, sources, old[0].slot if old else -1, targets[0], declared, rounded[0])
        return one(compute, sources, targets[0], rounded[0])


def _uses(found: list[Operation]) -> tuple[dict[str, int], set[str]]:
    """Of every name that operations take, nested ones included: the index of the last to do so; and the names that
    something may keep sharing memory with, which must not be written over."""
    last: dict[str, int] = {}
    viewed: set[str] = set()
    for index, operation in enumerate(found):
        direct = {n for group in operation.inputs.values() for n in group}
        last |= dict.fromkeys(direct, index)
        entry = OPERATORS.get(operation.kind)
        if entry is None or entry.views:
            viewed |= direct
        nested = {n for called, block in operation.blocks() for n in _taken(operation.inside(called, block), block)}
        last |= dict.fromkeys(nested, index)
        viewed |= nested
    return last, viewed


def _taken(found: list[Operation], proto: Any) -> set[str]:
    """Every name that a nested block may take from outside."""
    last, _ = _uses(found)
    return set(last) | set(proto.outputs)
