"""Runs Core ML packages on NumPy, where Core ML does not exist.

    interpreter = Interpreter("model.mlpackage")
    state = interpreter.make_state("step_1")
    outputs = interpreter.predict({"tokens": tokens}, state, "step_1")

A function is prepared on its first call: every operation becomes a closure over numbered places in a list of values,
constants are read once for all functions, and places are emptied after their last use. The first run of every block
compares the shape and type of each result with what the file declares.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmse_edge.errors import UserError

from .file import ModelFile, Signature, TensorType
from .operators import to_half
from .prepare import Preparation, Prepared
from .steps import Run

Arrays = dict[str, np.ndarray]


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
        self._prepared: dict[str, Prepared] = {}
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
            self._prepared[name] = Preparation(self.file, self._constants).function(self.file.function(name))

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
            prepared.block.run(Run(values, state, self.loop_iterations))
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
