"""What a prepared function consists of: steps over numbered places in a list of values.

A step computes one operation; a `Block` is a list of them. Which places there are, and when they are emptied, is decided in
prepare.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rmse_edge.errors import PackageError, UserError

from .file import TensorType
from .operators import OutOfRange, compute_half, held, round_half

Values = list[Any]  # by place
Step = Callable[["Run"], None]


@dataclass(eq=False)
class Block:
    """Steps of a block, in order."""

    steps: list[Step] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    results: list[list[tuple[int, TensorType]]] = field(default_factory=list)  # of every step, to be checked
    inputs: list[int] = field(default_factory=list)  # -1: nothing asks for it
    outputs: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)  # places of those outputs that nothing outside knows
    checked: bool = False

    def run(self, run: Run) -> None:
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
class Run:
    """One call of a function."""

    values: Values
    state: Mapping[str, np.ndarray]
    iterations: list[int]


def one(compute: Callable[..., Any], sources: list[int], target: int, rounded: bool) -> Step:
    if -1 in sources:
        compute, sources = _with_gaps(compute, sources)
    if len(sources) == 1:
        (only,) = sources
        if rounded:

            def step(run: Run) -> None:
                values = run.values
                values[target] = round_half(compute(values[only]))
        else:

            def step(run: Run) -> None:
                values = run.values
                values[target] = compute(values[only])

    elif len(sources) == 2:
        first, second = sources
        if rounded:

            def step(run: Run) -> None:
                values = run.values
                values[target] = round_half(compute(values[first], values[second]))
        else:

            def step(run: Run) -> None:
                values = run.values
                values[target] = compute(values[first], values[second])
    else:

        def step(run: Run) -> None:
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


def large(compute: np.ufunc, sources: list[int], old: int, target: int, declared: TensorType, rounded: bool) -> Step:
    """Like `_one`, for large arrays: the result goes over an operand that is not needed any more, if there is one, for
    memory that is there costs less than new memory."""
    dtype = held(declared.dtype)

    def step(run: Run) -> None:
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


def many(compute: Callable[..., Any], sources: list[int], targets: list[int], rounded: list[bool]) -> Step:
    pairs = list(zip(targets, rounded))
    if -1 in sources:
        compute, sources = _with_gaps(compute, sources)

    def step(run: Run) -> None:
        values = run.values
        for (target, half), result in zip(pairs, compute(*[values[s] for s in sources])):
            values[target] = round_half(result) if half else result

    return step


def emptying(step: Step, emptied: list[int]) -> Step:
    def emptying(run: Run) -> None:
        step(run)
        values = run.values
        for slot in emptied:
            values[slot] = None

    return emptying


def branch(pred: int, true: Block, false: Block, targets: list[int]) -> Step:
    def step(run: Run) -> None:
        values = run.values
        block = true if np.any(values[pred]) else false
        block.run(run)
        for target, value in zip(targets, block.end(values)):
            values[target] = value

    return step


def loop(sources: list[int], condition: Block, body: Block, targets: list[int]) -> Step:
    def step(run: Run) -> None:
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
