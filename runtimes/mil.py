"""Runs Core ML packages on NumPy, where Core ML does not exist.

    interpreter = Interpreter("model.mlpackage")
    state = interpreter.make_state("step_1")
    outputs = interpreter.predict({"tokens": tokens}, state, "step_1")

A function is prepared on its first call: every operation becomes a closure over numbered places in a list of values,
constants are read once for all functions, and places are emptied after their last use. The first run of every block
compares the shape and type of each result with what the file declares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PackageError, UserError
from . import mil_operators_constant, mil_operators_math, mil_operators_tensor  # noqa: F401  (they fill the table)
from .mil_file import Function, ModelFile, Operation, Signature, TensorType, tensor_type
from .mil_operators import OPERATORS, Call, Operator, OutOfRange, compute_half, held, round_half, to_half

Arrays = dict[str, np.ndarray]
Values = list[Any]  # by place
Step = Callable[["_Run"], None]

CONTROL = {"const", "while_loop", "cond", "read_state", "write_state", "coreml_update_state"}
REUSE = 1 << 14  # elements from which a result is written over an operand that is not needed any more


@dataclass(eq=False)
class _Constant:
    """A constant, read when it is first asked for."""

    key: Any  # what is equal for equal constants, across functions
    load: Callable[[], Any]  # fp16 as the file has it or as float32


@dataclass(eq=False)
class _Name:
    """What a name stands for inside a block."""

    type: TensorType
    slot: int = -1
    constant: _Constant | None = None
    state: str | None = None
    shared: bool = True  # its array may be seen elsewhere: by the caller, a constant, another value


@dataclass(eq=False)
class _Block:
    """Steps of a block, in order."""

    steps: list[Step] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    results: list[list[tuple[int, TensorType]]] = field(default_factory=list)  # of every step, to be checked
    inputs: list[int] = field(default_factory=list)  # -1: nothing asks for it
    outputs: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)  # places of those outputs that nothing outside knows
    checked: bool = False

    def run(self, run: _Run) -> None:
        number = 0
        try:
            if self.checked:
                for number, step in enumerate(self.steps):  # noqa: B007
                    step(run)
            else:
                for number, step in enumerate(self.steps):
                    step(run)
                    self._check(number, run.values)
                self.checked = True
        except OutOfRange as error:
            raise UserError(f"{self.places[number]}: {error}") from None
        except UserError:
            raise
        except (ValueError, IndexError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise PackageError(f"{self.places[number]}: cannot be computed ({reason})") from error

    def begin(self, values: Values, given: list[Any]) -> None:
        for slot, value in zip(self.inputs, given):
            if slot >= 0:
                values[slot] = value

    def end(self, values: Values) -> list[Any]:
        """Its results; it keeps none of them."""
        results = [values[s] for s in self.outputs]
        for slot in self.own:
            values[slot] = None
        return results

    def _check(self, number: int, values: Values) -> None:
        for slot, declared in self.results[number]:
            if slot < 0 or values[slot] is None:
                continue
            found = np.asarray(values[slot])
            same = len(found.shape) == len(declared.shape) and all(
                wanted is None or n == wanted for n, wanted in zip(found.shape, declared.shape)
            )
            if not same or found.dtype != held(declared.dtype):
                raise PackageError(
                    f"{self.places[number]}: gives {TensorType(found.shape, str(found.dtype))},"
                    f" the file says {declared}; export the package again"
                )


@dataclass(eq=False)
class _Run:
    """One call of a function."""

    values: Values
    state: Mapping[str, np.ndarray]
    iterations: list[int]


@dataclass(eq=False)
class _Prepared:
    signature: Signature
    block: _Block
    template: Values  # constants in their places
    inputs: list[tuple[str, TensorType, int]]
    outputs: list[tuple[str, TensorType, int, bool]]


class Interpreter:
    """A package, ready to be called."""

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            PackageError: the package lacks a file, or a file is damaged.
        """
        self.file = ModelFile(path)
        self.path = self.file.path
        self.functions = self.file.functions
        self.default_function = self.file.default_function
        self.loop_iterations: list[int] = []  # of the last call: of each `while_loop`, in the order they ended
        self._prepared: dict[str, _Prepared] = {}
        self._signatures: dict[str, Signature] = {}
        self._constants: dict[Any, Any] = {}  # by key

    def signature(self, function: str | None = None) -> Signature:
        """
        Raises:
            UserError: there is no such function.
        """
        name = function or self.default_function
        if name not in self._signatures:
            self._signatures[name] = self.file.function(name).signature
        return self._signatures[name]

    def make_state(self, function: str | None = None) -> Arrays:
        """What a function keeps between calls, zero."""
        states = self.signature(function).states
        return {name: np.zeros([n or 0 for n in t.shape], t.array_dtype) for name, t in states.items()}

    def prepare(self, function: str | None = None) -> None:
        """Do now what the first call of the function would do.

        Raises:
            UserError: there is no such function.
            PackageError: it has an operator that is not known, or a constant that cannot be read.
        """
        name = function or self.default_function
        if name not in self._prepared:
            self.signature(name)
            self._prepared[name] = _Preparation(self.file, self._constants).function(self.file.function(name))

    def predict(
        self,
        feeds: Mapping[str, np.ndarray],
        state: Mapping[str, np.ndarray] | None = None,
        function: str | None = None,
    ) -> Arrays:
        """Call a function.

        Args:
            feeds: its inputs, of the shapes and types its signature says.
            state: what it keeps, written in place; see `make_state`. States of other functions may be in it, too. None:
                zeros, forgotten afterwards.

        Returns:
            its outputs, fp16 as float16.

        Raises:
            UserError: there is no such function, an input or state is missing, unknown or of another shape or type, or
                an index goes out of its tensor's range.
            PackageError: the function cannot be prepared, or an operation does not give what the file declares.
        """
        name = function or self.default_function
        if name not in self._prepared:
            self.prepare(name)
        prepared = self._prepared[name]
        self._check(name, "input", prepared.signature.inputs, feeds)
        for key in feeds:
            if key not in prepared.signature.inputs:
                there = ", ".join(prepared.signature.inputs) or "none"
                raise UserError(f"{self.path}: {name}: has no input {key}; it takes {there}")
        if state is None:
            state = self.make_state(name)
        self._check(name, "state", prepared.signature.states, state)
        values = prepared.template.copy()
        for key, declared, slot in prepared.inputs:
            fed = feeds[key]
            values[slot] = fed.astype(np.float32) if declared.dtype == "float16" else fed
        self.loop_iterations = []
        with np.errstate(all="ignore"):
            prepared.block.run(_Run(values, state, self.loop_iterations))
        outputs = {}
        for key, declared, slot, shared in prepared.outputs:
            if declared.dtype == "float16":
                outputs[key] = to_half(values[slot])
            else:
                outputs[key] = np.array(values[slot]) if shared else np.asarray(values[slot])
        return outputs

    def _check(self, function: str, what: str, declared: Mapping[str, TensorType], given: Mapping[str, Any]) -> None:
        for name, wanted in declared.items():
            if name not in given:
                raise UserError(f"{self.path}: {function}: {what} {name} is missing; it takes {', '.join(declared)}")
            array = given[name]
            if not isinstance(array, np.ndarray):
                raise UserError(f"{self.path}: {function}: {what} {name} is {type(array).__name__}, expected {wanted}")
            same = array.shape == wanted.shape or (
                len(array.shape) == len(wanted.shape)
                and all(n is None or n == got for n, got in zip(wanted.shape, array.shape))
            )
            if not same or array.dtype != wanted.dtype:
                got = TensorType(array.shape, str(array.dtype))
                raise UserError(f"{self.path}: {function}: {what} {name} is {got}, expected {wanted}")


class _Preparation:
    """Turns one function into steps."""

    def __init__(self, file: ModelFile, constants: dict[Any, Any]) -> None:
        self.file = file
        self.constants = constants
        self.template: Values = []
        self.opset = 0

    def function(self, function: Function) -> _Prepared:
        digits = "".join(c for c in function.opset if c.isdigit())
        self.opset = int(digits or 8)
        scope: dict[str, _Name] = {}
        inputs = []
        for name, declared in function.inputs.items():
            scope[name] = _Name(declared, self._slot())
            inputs.append((name, declared, scope[name].slot))
        for name, declared in function.states.items():
            scope[name] = _Name(declared, state=name)
        found = [Operation(function.name, str(i), op) for i, op in enumerate(function.block.operations)]
        block = self._block(found, scope, list(function.block.outputs), list(function.inputs))
        outputs = [(n, scope[n].type, self._place(scope[n]), scope[n].shared) for n in function.block.outputs]
        block.outputs = [slot for _, _, slot, _ in outputs]
        return _Prepared(function.signature, block, self.template, inputs, outputs)

    def _slot(self) -> int:
        self.template.append(None)
        return len(self.template) - 1

    def _fetch(self, constant: _Constant, keep: bool = True) -> Any:
        """A constant's value, fp16 as float32, one array for all who ask."""
        if constant.key in self.constants:
            return self.constants[constant.key]
        value = constant.load()
        if isinstance(value, np.ndarray) and value.dtype == np.float16:
            value = value.astype(np.float32)
        if keep:
            self.constants[constant.key] = value
        return value

    def _place(self, name: _Name) -> int:
        """Where a value is found; a constant gets a place when something first asks for it there."""
        if name.slot < 0:
            name.slot = self._slot()
            if name.constant is not None:
                self.template[name.slot] = self._fetch(name.constant)
        return name.slot

    def _block(self, found: list[Operation], scope: dict[str, _Name], results: list[str], inputs: list[str]) -> _Block:
        """Args:
        scope: what the names of the block's inputs and of everything outside stand for; what it makes is added.
        """
        block = _Block()
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
            block.steps.append(_emptying(step, emptied) if emptied else step)
            block.places.append(operation.place)
            block.results.append([(scope[n].slot, t) for n, t in operation.outputs.items()])
        block.own = [made[n] for n in dict.fromkeys(results) if n in made]
        return block

    def _names(self, operation: Operation, scope: dict[str, _Name]) -> dict[str, list[_Name]]:
        """What each of its inputs and attributes stands for."""
        found: dict[str, list[_Name]] = {}
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

    def _written(self, proto: Any) -> _Name:
        """A constant that is written into an operation."""
        declared = tensor_type(proto.type)
        if proto.WhichOneof("value") == "blobFileValue":
            where = proto.blobFileValue
            key: Any = ("blob", where.fileName, where.offset, declared)
        else:
            key = ("value", proto.SerializeToString(deterministic=True))
        return _Name(declared, constant=_Constant(key, lambda: self.file.value(proto)))

    def _constant(self, operation: Operation, scope: dict[str, _Name]) -> None:
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
            scope[name] = _Name(declared, constant=_Constant((operation.kind, i, keys), partial(load, i)))

    def _operator(self, operation: Operation) -> Operator:
        if operation.kind not in OPERATORS:
            raise PackageError(f"{operation.place}: the interpreter does not know the operator {operation.kind}")
        return OPERATORS[operation.kind]

    def _call(self, operation: Operation, names: dict[str, list[_Name]], outputs: list[TensorType]) -> Call:
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

        return self._fetch(_Constant(("transposed", constant.key), turned))

    def _step(self, operation: Operation, scope: dict[str, _Name], free: list[str]) -> Step:
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
            scope[name] = _Name(declared, self._slot())
            targets.append(scope[name].slot)
        if kind == "cond":
            return _branch(self._place(names["pred"][0]), blocks["true"], blocks["false"], targets)
        sources = [self._place(n) for n in names["loop_vars"]]
        return _loop(sources, blocks["condition"], blocks["body"], targets)

    def _nested(self, operation: Operation, called: str, proto: Any, outer: dict[str, _Name]) -> _Block:
        scope = dict(outer)
        for given in proto.inputs:
            scope[given.name] = _Name(tensor_type(given.type), self._slot())
        inputs = [given.name for given in proto.inputs]
        block = self._block(operation.inside(called, proto), scope, list(proto.outputs), inputs)
        missing = [n for n in proto.outputs if n not in scope]
        if missing:
            raise PackageError(f"{operation.place}: its {called} gives {missing[0]}, which nothing in it makes")
        block.outputs = [self._place(scope[n]) for n in proto.outputs]
        return block

    def _state(self, operation: Operation, names: dict[str, list[_Name]], scope: dict[str, _Name]) -> Step:
        key = "state" if operation.kind == "coreml_update_state" else "input"
        which = names[key][0]
        if which.state is None:
            raise PackageError(f"{operation.place}: {key} is no state; export the package again")
        name, half = which.state, which.type.dtype == "float16"
        target = -1
        for made, declared in operation.outputs.items():
            scope[made] = _Name(declared, self._slot(), shared=False)
            target = scope[made].slot
        if operation.kind == "read_state":

            def read(run: _Run) -> None:
                found = run.state[name]
                run.values[target] = found.astype(np.float32) if half else found.copy()

            return read
        source = self._place(names["data" if operation.kind == "write_state" else "value"][0])

        def write(run: _Run) -> None:
            value = run.values[source]
            run.state[name][...] = to_half(value) if half else value
            if target >= 0:
                run.values[target] = np.array(value)

        return write

    def _computed(self, operation: Operation, scope: dict[str, _Name], free: list[str]) -> Step:
        entry = self._operator(operation)
        names = self._names(operation, scope)
        outputs = list(operation.outputs.items())
        call = self._call(operation, names, [t for _, t in outputs])
        compute = entry.make(call)
        taken: list[_Name] = []
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
            scope[name] = _Name(declared, self._slot(), shared=shared)
        targets = [scope[n].slot for n, _ in outputs]
        rounded = [t.dtype == "float16" and not entry.exact for _, t in outputs]
        if len(targets) != 1:
            return _many(compute, sources, targets, rounded)
        declared = outputs[0][1]
        if isinstance(compute, np.ufunc) and compute.signature is None and declared.size >= REUSE:
            old = [scope[n] for n in free if scope[n] in taken and scope[n].type == declared and not scope[n].shared]
            return _large(compute, sources, old[0].slot if old else -1, targets[0], declared, rounded[0])
        return _one(compute, sources, targets[0], rounded[0])


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


def _one(compute: Callable[..., Any], sources: list[int], target: int, rounded: bool) -> Step:
    if -1 in sources:
        compute, sources = _with_gaps(compute, sources)
    if len(sources) == 1:
        (only,) = sources
        if rounded:

            def step(run: _Run) -> None:
                values = run.values
                values[target] = round_half(compute(values[only]))
        else:

            def step(run: _Run) -> None:
                values = run.values
                values[target] = compute(values[only])

    elif len(sources) == 2:
        first, second = sources
        if rounded:

            def step(run: _Run) -> None:
                values = run.values
                values[target] = round_half(compute(values[first], values[second]))
        else:

            def step(run: _Run) -> None:
                values = run.values
                values[target] = compute(values[first], values[second])
    else:

        def step(run: _Run) -> None:
            values = run.values
            result = compute(*[values[s] for s in sources])
            values[target] = round_half(result) if rounded else result

    return step


def _with_gaps(compute: Callable[..., Any], sources: list[int]) -> tuple[Callable[..., Any], list[int]]:
    """For a function of fewer values: those that were not given are None."""
    order = [i for i, s in enumerate(sources) if s >= 0]
    count = len(sources)

    def filled(*given: Any) -> Any:
        full: list[Any] = [None] * count
        for i, value in zip(order, given):
            full[i] = value
        return compute(*full)

    return filled, [sources[i] for i in order]


def _large(compute: np.ufunc, sources: list[int], old: int, target: int, declared: TensorType, rounded: bool) -> Step:
    """Like `_one`, for large arrays: the result goes over an operand that is not needed any more, if there is one, for
    memory that is there costs less than new memory."""
    dtype = held(declared.dtype)

    def step(run: _Run) -> None:
        values = run.values
        given = [values[s] for s in sources]
        shape = np.broadcast_shapes(*(x.shape for x in given))
        out = values[old] if old >= 0 else np.empty(shape, dtype)
        if not rounded:
            values[target] = compute(*given, out=out)
        elif all((x.shape == shape and x.flags.c_contiguous) or x.size == 1 for x in given) and out.flags.c_contiguous:
            values[target] = compute_half(compute, given, out)
        else:
            values[target] = round_half(compute(*given, out=out))

    return step


def _many(compute: Callable[..., Any], sources: list[int], targets: list[int], rounded: list[bool]) -> Step:
    pairs = list(zip(targets, rounded))
    if -1 in sources:
        compute, sources = _with_gaps(compute, sources)

    def step(run: _Run) -> None:
        values = run.values
        for (target, half), result in zip(pairs, compute(*[values[s] for s in sources])):
            values[target] = round_half(result) if half else result

    return step


def _emptying(step: Step, emptied: list[int]) -> Step:
    def emptying(run: _Run) -> None:
        step(run)
        values = run.values
        for slot in emptied:
            values[slot] = None

    return emptying


def _branch(pred: int, true: _Block, false: _Block, targets: list[int]) -> Step:
    def step(run: _Run) -> None:
        values = run.values
        block = true if np.any(values[pred]) else false
        block.run(run)
        for target, value in zip(targets, block.end(values)):
            values[target] = value

    return step


def _loop(sources: list[int], condition: _Block, body: _Block, targets: list[int]) -> Step:
    def step(run: _Run) -> None:
        values = run.values
        carried = [values[s] for s in sources]
        count = 0
        while True:
            condition.begin(values, carried)
            condition.run(run)
            if not np.any(condition.end(values)[0]):
                break
            body.begin(values, carried)
            carried = []
            body.run(run)
            carried = body.end(values)
            count += 1
        for target, value in zip(targets, carried):
            values[target] = value
        run.iterations.append(count)

    return step
