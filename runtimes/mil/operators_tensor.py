"""MIL operators that move values: shapes, slices, indices, sorting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rmse_edge.errors import PackageError

from .operators import Call, Compute, OutOfRange, operator

POSITIVE_INDICES = 7  # the opset (iOS 17) since which a negative index is out of range


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(np.atleast_1d(values).tolist())


# Shapes.


@operator("identity", exact=True, views=True)
def _identity(call: Call) -> Compute:
    return lambda x: x


@operator("reshape", takes="x shape", exact=True, views=True)
def _reshape(call: Call) -> Compute:
    aligned_right = call.opset >= 7  # where 0 keeps an extent, which one: iOS 17 counts from the last

    def resolve(x: np.ndarray, wanted: tuple[int, ...]) -> tuple[int, ...]:
        if 0 not in wanted:
            return wanted
        if not aligned_right:
            return tuple(x.shape[i] if n == 0 else n for i, n in enumerate(wanted))
        behind = len(wanted) - x.ndim
        return tuple((x.shape[i - behind] if i >= behind else 1) if n == 0 else n for i, n in enumerate(wanted))

    if not call.is_fixed("shape"):
        return lambda x, shape: x.reshape(resolve(x, _ints(shape)))
    fixed = call.numbers("shape")
    if 0 in fixed:
        return lambda x, shape: x.reshape(resolve(x, fixed))
    return lambda x, shape: x.reshape(fixed)


@operator("reshape_like", takes="x *ref_tensors", exact=True, views=True)
def _reshape_like(call: Call) -> Compute:
    begins, ends, masks = (_ints(call.fixed(k)) for k in ("begins", "ends", "end_masks"))

    def compute(x: np.ndarray, *references: np.ndarray) -> np.ndarray:
        shape: list[int] = []
        for reference, begin, end, mask in zip(references, begins, ends, masks):
            shape += reference.shape[begin : None if mask else end]
        return x.reshape(shape)

    return compute


@operator("expand_dims", exact=True, views=True)
def _expand_dims(call: Call) -> Compute:
    axes = call.numbers("axes")
    rank = len(call.type("x").shape) + len(axes)
    places = {a % rank for a in axes}
    index = tuple(None if i in places else slice(None) for i in range(rank))
    return lambda x: np.asarray(x)[index]


@operator("squeeze", exact=True, views=True)
def _squeeze(call: Call) -> Compute:
    axes = call.numbers("axes")
    return lambda x: np.squeeze(x, axes)


@operator("flatten2d", exact=True, views=True)
def _flatten2d(call: Call) -> Compute:
    axis = call.number("axis", 1)
    return lambda x: x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("transpose", exact=True, views=True)
def _transpose(call: Call) -> Compute:
    order = call.numbers("perm")
    return lambda x: x.transpose(order)


@operator("shape", exact=True)
def _shape(call: Call) -> Compute:
    return lambda x: np.array(x.shape, call.out)


@operator("tile", takes="x reps", exact=True)
def _tile(call: Call) -> Compute:
    return lambda x, reps: np.tile(x, _ints(reps))


@operator("reverse", exact=True, views=True)
def _reverse(call: Call) -> Compute:
    axes = call.numbers("axes")
    return lambda x: np.flip(x, axes)


@operator("reverse_sequence", takes="x lengths", exact=True)
def _reverse_sequence(call: Call) -> Compute:
    along, batch = call.number("seq_axis", 0), call.number("batch_axis", 0)

    def compute(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        result = x.copy()
        rows, given = np.moveaxis(result, (batch, along), (0, 1)), np.moveaxis(x, (batch, along), (0, 1))
        for i, n in enumerate(_ints(lengths)):
            rows[i, :n] = given[i, :n][::-1]
        return result

    return compute


@operator("sliding_windows", exact=True)
def _sliding_windows(call: Call) -> Compute:
    axis, size, stride = call.number("axis"), call.number("size"), call.number("stride", 1)
    axis %= len(call.type("x").shape)

    def compute(x: np.ndarray) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(x, size, axis)  # the size comes last
        every = (slice(None),) * axis + (slice(None, None, stride),)
        return np.ascontiguousarray(np.moveaxis(windows[every], -1, axis + 1))

    return compute


# Putting together and taking apart.


@operator("concat", takes="*values", exact=True)
def _concat(call: Call) -> Compute:
    axis = call.number("axis")
    if not call.inputs["values"][0].shape:  # scalars make a vector
        return lambda *values: np.array(values).reshape(-1)
    if not call.number("interleave", False):
        return lambda *values: np.concatenate(values, axis)
    rank = len(call.inputs["values"][0].shape)

    def interleaved(*values: np.ndarray) -> np.ndarray:
        stacked = np.stack(values, axis % rank + 1)
        shape = list(values[0].shape)
        shape[axis] *= len(values)
        return stacked.reshape(shape)

    return interleaved


@operator("stack", takes="*values", exact=True)
def _stack(call: Call) -> Compute:
    axis = call.number("axis")
    return lambda *values: np.stack(values, axis)


@operator("split", exact=True, views=True)
def _split(call: Call) -> Compute:
    axis, sizes = call.number("axis"), call.numbers("split_sizes")
    if sizes is None:
        sections: Any = call.number("num_splits")
        return lambda x: np.split(x, sections, axis)
    ends = np.cumsum(sizes)[:-1].tolist()
    return lambda x: np.split(x, ends, axis)


@operator("pad", takes="x", exact=True)
def _pad(call: Call) -> Compute:
    amounts, mode = call.numbers("pad"), call.number("mode", "constant")
    rank = len(call.type("x").shape)
    pairs = list(zip(amounts[::2], amounts[1::2]))
    widths = [(0, 0)] * (rank - len(pairs)) + pairs
    if mode == "constant":
        value = call.out.type(call.number("constant_val", 0))
        return lambda x: np.pad(x, widths, constant_values=value)
    modes: dict[str, Any] = {"reflect": "reflect", "replicate": "edge"}
    if mode not in modes:
        raise PackageError(f"{call.place}: mode is {mode}, which is not known")
    return lambda x: np.pad(x, widths, modes[mode])


# Slices.

Masks = tuple[bool, ...]


def _slices(
    begin: Sequence[int], end: Sequence[int], stride: Sequence[int], from_start: Masks, to_end: Masks, squeeze: Masks
) -> tuple[Any, ...]:
    """What NumPy is indexed with. A negative end counts from the end, also where the stride is negative."""
    found: list[Any] = []
    for i, step in enumerate(stride):
        if squeeze[i]:
            found.append(begin[i])
        else:
            found.append(slice(None if from_start[i] else begin[i], None if to_end[i] else end[i], step))
    return tuple(found)


def _slicer(call: Call) -> Any:
    """A function of (begin, end) to slices, or the slices themselves where both are constant."""
    rank = len(call.type("x").shape)
    stride = call.numbers("stride", (1,) * rank)
    masks = [call.numbers(f"{name}_mask", (False,) * rank) for name in ("begin", "end", "squeeze")]
    if call.is_fixed("begin") and call.is_fixed("end"):
        return _slices(call.numbers("begin"), call.numbers("end"), stride, *masks)
    return lambda begin, end: _slices(_ints(begin), _ints(end), stride, *masks)


@operator("slice_by_index", takes="x begin end", exact=True, views=True)
def _slice_by_index(call: Call) -> Compute:
    where = _slicer(call)
    if isinstance(where, tuple):
        return lambda x, begin, end: x[where]
    return lambda x, begin, end: x[where(begin, end)]


@operator("slice_by_size", takes="x begin size", exact=True, views=True)
def _slice_by_size(call: Call) -> Compute:
    def compute(x: np.ndarray, begin: np.ndarray, size: np.ndarray) -> np.ndarray:
        starts = [b + n if b < 0 else b for b, n in zip(_ints(begin), x.shape)]
        for axis, (start, count, n) in enumerate(zip(starts, _ints(size), x.shape)):
            if not 0 <= start <= start + max(count, 0) <= n:
                raise OutOfRange(f"{count} values from {start} on are outside axis {axis} of {n} values")
        return x[tuple(slice(b, None if s == -1 else b + s) for b, s in zip(starts, _ints(size)))]

    return compute


@operator("slice_update", takes="x update begin end", exact=True)
def _slice_update(call: Call) -> Compute:
    where = _slicer(call)

    def compute(x: np.ndarray, update: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        result = np.array(x)
        place = where if isinstance(where, tuple) else where(begin, end)
        target = result[place]
        if target.shape != update.shape:
            raise OutOfRange(f"the slice is {target.shape}, the update {update.shape}")
        result[place] = update
        return result

    return compute


# Indices.


def _wrap(call: Call, indices: np.ndarray, extent: int, axis: int | str) -> np.ndarray:
    """Indices, checked: negative ones count from the end up to iOS 16 and are out of range since.

    Raises:
        OutOfRange: naming the index and the axis.
    """
    if not indices.size:
        return indices
    least, most = int(indices.min()), int(indices.max())
    if most >= extent or least < (0 if call.opset >= POSITIVE_INDICES else -extent):
        wrong = most if most >= extent else least
        raise OutOfRange(f"index {wrong} is out of range for axis {axis} of {extent} values")
    return np.where(indices < 0, indices + extent, indices) if least < 0 else indices


@operator("gather", takes="x indices", exact=True)
def _gather(call: Call) -> Compute:
    rank = len(call.type("x").shape)
    axis, batch = call.number("axis", 0) % rank, call.number("batch_dims", 0)

    def compute(x: np.ndarray, indices: np.ndarray) -> np.ndarray:
        indices = _wrap(call, np.asarray(indices), x.shape[axis], axis)
        if not batch:
            return x.take(indices, axis)
        # for each batch the same as without: (b, *x) and (b, *indices) -> (b, *)
        flat = x.reshape(-1, *x.shape[batch:])
        rows = indices.reshape(-1, *indices.shape[batch:])
        found = np.stack([a.take(i, axis - batch) for a, i in zip(flat, rows)])
        return found.reshape(*x.shape[:batch], *found.shape[1:])

    return compute


@operator("gather_along_axis", takes="x indices", exact=True)
def _gather_along_axis(call: Call) -> Compute:
    axis = call.number("axis", 0)

    def compute(x: np.ndarray, indices: np.ndarray) -> np.ndarray:
        indices = _wrap(call, indices, x.shape[axis], axis).astype(np.intp)
        return np.take_along_axis(x, indices, axis)

    return compute


def _columns(call: Call, indices: np.ndarray, extents: Sequence[int]) -> tuple[np.ndarray, ...]:
    """The last axis of `indices` as one checked index array per axis it goes over."""
    columns = np.moveaxis(indices, -1, 0)
    return tuple(_wrap(call, c, n, i).astype(np.intp) for i, (c, n) in enumerate(zip(columns, extents)))


@operator("gather_nd", takes="x indices", exact=True)
def _gather_nd(call: Call) -> Compute:
    batch = call.number("batch_dims", 0)

    def compute(x: np.ndarray, indices: np.ndarray) -> np.ndarray:
        columns = _columns(call, indices, x.shape[batch:])
        leading = np.ix_(*map(np.arange, x.shape[:batch])) if batch else ()
        more = indices.ndim - 1 - batch
        return x[tuple(a.reshape(a.shape + (1,) * more) for a in leading) + columns]

    return compute


_MODES: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


def _scatter_into(call: Call, data: np.ndarray, where: Any, updates: np.ndarray) -> np.ndarray:
    """A copy of `data` with `updates` applied one after the other, so that an index may come twice."""
    mode = call.number("mode", "add")
    result = np.array(data)
    if mode == "update":
        result[where] = updates
    elif mode not in _MODES:
        raise PackageError(f"{call.place}: mode is {mode}, which is not known")
    elif mode == "div" and result.dtype.kind != "f":
        ratio = result.astype(np.float64)
        np.divide.at(ratio, where, updates)
        result = np.trunc(ratio).astype(result.dtype)
    else:
        _MODES[mode].at(result, where, updates)
    return result


@operator("scatter", takes="data indices updates")
def _scatter(call: Call) -> Compute:
    axis = call.number("axis", 0) % len(call.type("data").shape)

    def compute(data: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
        rows = _wrap(call, indices, data.shape[axis], axis).astype(np.intp)
        return _scatter_into(call, data, (slice(None),) * axis + (rows,), updates)

    return compute


@operator("scatter_along_axis", takes="data indices updates")
def _scatter_along_axis(call: Call) -> Compute:
    axis = call.number("axis", 0) % len(call.type("data").shape)

    def compute(data: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
        where = list(np.ogrid[tuple(slice(n) for n in indices.shape)])
        where[axis] = _wrap(call, indices, data.shape[axis], axis).astype(np.intp)
        return _scatter_into(call, data, tuple(where), updates)

    return compute


@operator("scatter_nd", takes="data indices updates")
def _scatter_nd(call: Call) -> Compute:
    def compute(data: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
        return _scatter_into(call, data, _columns(call, indices, data.shape), updates)

    return compute


@operator("select", takes="cond a b", exact=True)
def _select(call: Call) -> Compute:
    return np.where


@operator("non_zero", exact=True)
def _non_zero(call: Call) -> Compute:
    return lambda x: np.argwhere(x).astype(call.out)


@operator("one_hot", takes="indices one_hot_vector_size", exact=True)
def _one_hot(call: Call) -> Compute:
    axis = call.number("axis", -1)
    on, off = (call.out.type(call.number(k, default)) for k, default in (("on_value", 1), ("off_value", 0)))

    def compute(indices: np.ndarray, size: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        where = np.expand_dims(indices, axis)
        shape = [1] * where.ndim
        shape[axis] = -1
        return np.where(where == np.arange(int(np.asarray(size).item())).reshape(shape), on, off)

    return compute


# Sorting.


def _order(x: np.ndarray, axis: int, ascending: bool) -> np.ndarray:
    """Indices that sort along an axis; of equal values the first comes first."""
    if ascending:
        return np.argsort(x, axis, kind="stable")
    if x.dtype.kind == "f":
        return np.argsort(-x, axis, kind="stable")
    return np.argsort(-x.astype(np.int64), axis, kind="stable")  # uint8 and the least int have no negative


@operator("argsort", exact=True)
def _argsort(call: Call) -> Compute:
    axis, ascending = call.number("axis", -1), bool(call.number("ascending", False))
    return lambda x: _order(x, axis, ascending).astype(call.out)


@operator("topk", exact=True)
def _topk(call: Call) -> Compute:
    axis, ascending = call.number("axis", -1), bool(call.number("ascending", False))
    k = call.number("k", 1)
    wanted = [np.dtype(t.dtype) for t in call.outputs[1:]]

    def compute(x: np.ndarray) -> Any:
        n = x.shape[axis] if k == -1 else k
        first = [slice(None)] * x.ndim
        first[axis] = slice(n)
        # Core ML has no rule for equal values. The last one comes first here: the model's own rule is the opposite, so a
        # program that leaves a tie to this operator does not agree with it.
        order = (x.shape[axis] - 1 - _order(np.flip(x, axis), axis, ascending))[tuple(first)]
        values = np.take_along_axis(x, order, axis)
        return (values, order.astype(wanted[0])) if wanted else values

    return compute


# Made from nothing.


@operator("range_1d", takes="start end step")
def _range_1d(call: Call) -> Compute:
    return lambda start, end, step: np.arange(start, end, step).astype(call.out)


@operator("fill", takes="shape value", exact=True)
def _fill(call: Call) -> Compute:
    return lambda shape, value=0: np.full(_ints(shape), 0 if value is None else value, call.out)


@operator("fill_like", takes="ref_tensor value", exact=True)
def _fill_like(call: Call) -> Compute:
    return lambda x, value=0: np.full(x.shape, 0 if value is None else value, call.out)


@operator("band_part", exact=True)
def _band_part(call: Call) -> Compute:
    lower, upper = call.number("lower", -1), call.number("upper", -1)

    def compute(x: np.ndarray) -> np.ndarray:
        rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
        inside = ((lower < 0) | (rows - columns <= lower)) & ((upper < 0) | (columns - rows <= upper))
        return np.where(inside, x, x.dtype.type(0))

    return compute
