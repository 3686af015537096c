"""A planned loop on an engine: the host runs one layer after the other, by the plan of the text (rmse_edge/loop/plan.py)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from rmse_edge.loop.plan import PLAN, drive_plan, plan_of, times
from rmse_edge.loop.steps import carried_and_emitted

from .base import Arrays

Outputs = Sequence[tuple[str, tuple[int, ...], str]]  # name, shape and type of each


class PlannedLoop:
    """`loop` of a package that has `begin`, a `step` for each layer, and `decide`."""

    def __init__(
        self,
        run: Callable[[str, int, Arrays], Arrays],
        outputs: Callable[[int], Outputs],
        layers: int,
        max_loops: int,
        per_loop: Collection[str],
    ) -> None:
        """
        Args:
            run: a method of the package on arrays, as of `Methods`.
            outputs: rows of a call -> what each `step` of that size gives.
            layers: how many there are.
            max_loops: executions of a text at most.
            per_loop: the state of which execution k reads row k.
        """
        self._run, self._outputs, self._layers, self._max_loops = run, outputs, layers, max_loops
        self._per_loop = tuple(per_loop)
        self._stacks: dict[int, Arrays] = {}  # rows of a call -> the emits of all executions
        # Row by row, of the arrays that were last given: an engine that has bound one need not bind it again.
        self._rows: dict[str, tuple[np.ndarray, list[np.ndarray]]] = {}

    def run(self, chunk: int, feeds: Arrays) -> Arrays:
        """One call: h, depth, iterations, and what the executions emitted, stacked."""
        begun = {name: np.array(array) for name, array in self._run("begin", chunk, feeds).items()}
        given = feeds | begun
        carried, _ = carried_and_emitted(name for name, _, _ in self._outputs(chunk))
        first = {name: begun[f"first_{name}"] for name in carried if name != "depth"}
        first["depth"] = np.zeros(first["active"].shape, np.int64)
        rows: dict[str, Any] = {name: self._rows_of(name, feeds[name]) for name in self._per_loop}

        def layer(index: int, arrays: Arrays, k: int) -> Arrays:
            said = self._run(f"step{index}", chunk, given | arrays | {"k": np.array(k, np.int64)})
            return {name: np.array(array) for name, array in said.items()}  # a layer is given what it gave itself

        def decide(index: int, h: np.ndarray) -> int:
            return times(self._run("decide", chunk, given | {"h": h})["chances"][0, index])

        begins = int(feeds["position"][0]) == 0
        plan = None if begins else plan_of(feeds[PLAN])
        stacks, most = self._stack(chunk), int(feeds["max_loops"])
        carry, k = drive_plan(layer, decide, first, rows, stacks, self._layers, most, plan)
        return {"h": carry["h"], "depth": carry["depth"], "iterations": np.array(k, np.int64)} | stacks

    def _rows_of(self, name: str, array: np.ndarray) -> list[np.ndarray]:
        known = self._rows.get(name)
        if known is None or known[0] is not array:
            self._rows[name] = known = (array, list(array))
        return known[1]

    def _stack(self, chunk: int) -> Arrays:
        if chunk not in self._stacks:
            outputs = self._outputs(chunk)
            _, emitted = carried_and_emitted(name for name, _, _ in outputs)
            self._stacks[chunk] = {
                name: np.zeros((self._max_loops, *shape), dtype) for name, shape, dtype in outputs if name in emitted
            }
        return self._stacks[chunk]
