"""The table of MIL operators, and the rounding of fp16.

An operator is a maker: given a `Call` (the operation with its constants and types) it returns a function of arrays.
Makers run once per operation, the functions thousands of times, so whatever is constant is worked out by the maker.
Operators themselves stand in operators_math.py, operators_tensor.py and operators_constant.py.

Values of fp16 tensors are float32 arrays that hold only what fp16 can hold: operators compute in float32 and the result
is rounded once, by whoever calls them, unless the operator is `exact` (it moves values, or fp16 holds all it can give).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmse_edge.errors import PackageError

from .file import TensorType

Compute = Callable[..., Any]  # arrays -> an array, or as many as the operation has outputs

PIECE = 1 << 16  # elements rounded at a time: few enough for a cache, enough to make the calls cheap
SMALL = 2048  # elements below which NumPy's own casts are faster
EXPONENT, SIGN = np.uint32(0x7F800000), np.uint32(0x80000000)
SAFE = 0x46800000  # bits of 2**14: below 2**15 nothing overflows, and nothing is infinite or NaN
LEAST = np.float32(2.0**-14)  # the smallest normal fp16: below it the step no longer shrinks
SHIFT = np.float32(1.5 * 2**13)
UNBIAS = np.float32(2.0**-112)


def held(dtype: str) -> np.dtype:
    """What an array of such values is made of while a program runs."""
    return np.dtype(np.float32) if dtype == "float16" else TensorType((), dtype).array_dtype


def round_half(x: np.ndarray) -> np.ndarray:
    """Float32 values rounded to fp16, bit for bit `x.astype(np.float16).astype(np.float32)`; `x` may be overwritten.

    Adding and taking away 1.5 * 2**13 times a value's own power of two leaves float32 with the bits fp16 has, ties to
    even. That takes eight passes of vector instructions where the casts take 9 to 18 ns per element.
    """
    if x.size < SMALL:
        return x.astype(np.float16).astype(np.float32)
    if not (x.flags.c_contiguous and x.flags.writeable):
        x = np.array(x, order="C")
    flat = x.reshape(-1)
    scratch = _scratch(x.size)
    for start in range(0, x.size, PIECE):
        _round_piece(flat[start : start + PIECE], scratch)
    return x


def compute_half(compute: np.ufunc, given: Sequence[np.ndarray], out: np.ndarray) -> np.ndarray:
    """An element-by-element function of float32 arrays, rounded to fp16 while each piece is in the cache.

    Args:
        given: arrays like `out`, or of one value.
        out: contiguous; may be one of those given.
    """
    flat, scratch = out.reshape(-1), _scratch(out.size)
    sources = [x.reshape(-1) for x in given]
    for start in range(0, out.size, PIECE):
        piece = flat[start : start + PIECE]
        compute(*(x if x.size == 1 else x[start : start + PIECE] for x in sources), out=piece)
        _round_piece(piece, scratch)
    return out


def _scratch(size: int) -> np.ndarray:
    return np.empty((2, min(size, PIECE)), np.uint32)


def _round_piece(part: np.ndarray, scratch: np.ndarray) -> None:
    bits, sign = scratch[0, : part.size], scratch[1, : part.size]
    step, whole = bits.view(np.float32), part.view(np.uint32)
    np.bitwise_and(whole, EXPONENT, bits)
    if np.maximum.reduce(bits) > SAFE:
        part[:] = part.astype(np.float16)
        return
    np.maximum(step, LEAST, out=step)
    np.multiply(step, SHIFT, step)
    np.bitwise_and(whole, SIGN, sign)
    np.add(part, step, part)
    np.subtract(part, step, part)
    np.bitwise_or(whole, sign, whole)  # what rounds to zero keeps its sign


def to_half(x: np.ndarray) -> np.ndarray:
    """Float32 values that fp16 holds, as a new float16 array."""
    x = np.asarray(x)
    if x.size < SMALL:
        return x.astype(np.float16)
    flat = np.ascontiguousarray(x).reshape(-1)
    result = np.empty(x.size, np.uint16)
    scratch = _scratch(x.size)
    for start in range(0, x.size, PIECE):
        part, target = flat[start : start + PIECE], result[start : start + PIECE]
        bits, sign = scratch[:, : part.size]
        np.bitwise_and(part.view(np.uint32), EXPONENT, bits)
        if np.maximum.reduce(bits) > SAFE:
            target[:] = part.astype(np.float16).view(np.uint16)
            continue
        np.multiply(part, UNBIAS, bits.view(np.float32))  # exponents as fp16 counts them, subnormals included
        np.right_shift(bits, 16, sign)
        np.bitwise_and(sign, 0x8000, sign)
        np.right_shift(bits, 13, bits)
        np.bitwise_and(bits, 0x7FFF, bits)
        np.bitwise_or(bits, sign, bits)
        target[:] = bits
    return result.view(np.float16).reshape(x.shape)


@dataclass(frozen=True)
class Call:
    """An operation as its maker sees it.

    `constants` are its constant inputs and attributes, `inputs` the types of all inputs that were given, a list for
    those that take several.
    """

    kind: str
    place: str
    opset: int  # 8 is iOS 18
    constants: dict[str, Any]
    inputs: dict[str, list[TensorType]]
    outputs: list[TensorType]
    fetch: Callable[[Any, bool], Any]  # of a constant: its value; True: transposed, in one piece

    def has(self, name: str) -> bool:
        return name in self.inputs

    def is_fixed(self, name: str) -> bool:
        """Whether the input is absent or constant."""
        return name in self.constants or name not in self.inputs

    def fixed(self, name: str, default: Any = None, transposed: bool = False) -> Any:
        """The value of a constant input: an array (fp16 as float32), a str, or `default` if it was not given.

        Args:
            transposed: with its axes in reverse, contiguous; kept instead of the value itself.

        Raises:
            PackageError: it is computed, and this operator needs it constant.
        """
        if name in self.constants:
            return self.fetch(self.constants[name], transposed)
        if name in self.inputs:
            raise PackageError(f"{self.place}: {name} is computed, the interpreter needs it constant")
        return default

    def number(self, name: str, default: Any = None) -> Any:
        """A constant scalar as a Python number, bool or str."""
        value = self.fixed(name, default)
        return value.reshape(-1)[0].item() if isinstance(value, np.ndarray | np.generic) else value

    def numbers(self, name: str, default: Any = None) -> Any:
        """A constant vector as a tuple of Python numbers."""
        value = self.fixed(name, default)
        return tuple(np.atleast_1d(value).tolist()) if isinstance(value, np.ndarray | np.generic) else value

    def type(self, name: str) -> TensorType:
        """
        Raises:
            PackageError: the input was not given.
        """
        if name not in self.inputs:
            raise PackageError(f"{self.place}: has no input {name}; export the package again")
        return self.inputs[name][0]

    def dtype(self, name: str) -> str:
        return self.type(name).dtype

    @property
    def out(self) -> np.dtype:
        """What its (first) result is held as."""
        return held(self.outputs[0].dtype)


def computes(function: Compute) -> Callable[[Call], Compute]:
    """The maker of an operator that is the same function wherever it stands."""
    return lambda call: function


@dataclass(frozen=True)
class Operator:
    """An entry of the table."""

    make: Callable[[Call], Compute]
    takes: tuple[str, ...]  # inputs its function is called with, in order; "*values" for one that is a list
    exact: bool  # its results need no rounding
    views: bool  # its results may share memory with its inputs


OPERATORS: dict[str, Operator] = {}


def operator(
    *kinds: str, takes: str = "x", exact: bool = False, views: bool = False
) -> Callable[[Callable[[Call], Compute]], Callable[[Call], Compute]]:
    """Enter a maker for these kinds of operations.

    Raises:
        ValueError: a kind is taken.
    """

    def enter(make: Callable[[Call], Compute]) -> Callable[[Call], Compute]:
        for kind in kinds:
            if kind in OPERATORS:
                raise ValueError(f"{kind}: is in the table already")
            OPERATORS[kind] = Operator(make, tuple(takes.split()), exact, views)
        return make

    return enter


class OutOfRange(Exception):
    """An index points outside its tensor; whoever runs the operation says where."""
