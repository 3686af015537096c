"""MIL operators that compute: element by element, reductions, products, normalisation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from rmse_edge.errors import PackageError

from .operators import Call, Compute, computes, operator, round_half

INT_BOUNDS = {"int8": (-128, 127), "uint8": (0, 255)}


def _floats(call: Call) -> bool:
    return call.out.kind == "f"


# Element by element, two inputs.

_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "pow": np.power,
    "floor_div": np.floor_divide,
    "mod": np.mod,  # takes the sign of y
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}
for _kind, _ufunc in _BINARY.items():
    operator(_kind, takes="x y")(computes(_ufunc))
operator("maximum", takes="x y", exact=True)(computes(np.maximum))
operator("minimum", takes="x y", exact=True)(computes(np.minimum))


@operator("real_div", takes="x y")
def _real_div(call: Call) -> Compute:
    if _floats(call):
        return np.divide
    return lambda x, y: np.trunc(np.divide(x, y)).astype(call.out)


# Element by element, one input.


_ERF_SERIES = [2 / math.sqrt(math.pi) * (-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(14)]


def _erf(x: np.ndarray) -> np.ndarray:
    """erf to float32's precision: its power series below 1, the complement's rational approximation above."""
    z = np.abs(np.asarray(x, np.float64))
    squared = np.minimum(z, 1) ** 2
    near = np.zeros_like(z)
    for factor in reversed(_ERF_SERIES):
        near *= squared
        near += factor
    t = 1 / (1 + z / 2)  # erfc of Numerical Recipes, 1.2e-7 of its value
    series = -1.13520398 + t * (1.48851587 + t * (-0.82215223 + t * 0.17087277))
    series = 0.09678418 + t * (-0.18628806 + t * (0.27886807 + t * series))
    tail = t * np.exp(-z * z - 1.26551223 + t * (1.00002368 + t * (0.37409196 + t * series)))
    return np.copysign(np.where(z < 1, near * z, 1 - tail), x).astype(np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    y = np.exp(np.negative(x))
    y += 1
    return np.reciprocal(y)


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


_UNARY: dict[str, Any] = {
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "atanh": np.arctanh,
    "cos": np.cos,
    "cosh": np.cosh,
    "erf": _erf,
    "exp": np.exp,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "sin": np.sin,
    "sinh": np.sinh,
    "softplus": _softplus,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "sqrt": np.sqrt,
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
}
for _kind, _ufunc in _UNARY.items():
    operator(_kind)(computes(_ufunc))
_EXACT_UNARY: dict[str, Any] = {
    "abs": np.abs,
    "ceil": np.ceil,
    "floor": np.floor,
    "logical_not": np.logical_not,
    "relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "relu6": lambda x: np.clip(x, x.dtype.type(0), x.dtype.type(6)),
    "round": np.rint,  # halves to even
    "sign": np.sign,
}
for _kind, _ufunc in _EXACT_UNARY.items():
    operator(_kind, exact=True)(computes(_ufunc))


@operator("exp2")
def _exp2(call: Call) -> Compute:
    return np.exp2 if _floats(call) else lambda x: np.exp2(x.astype(np.float64)).astype(call.out)


@operator("rsqrt")
def _rsqrt(call: Call) -> Compute:
    epsilon = np.float32(call.number("epsilon", 1e-12))

    def compute(x: np.ndarray) -> np.ndarray:
        y = np.add(x, epsilon)
        return np.divide(np.float32(1), np.sqrt(y))

    return compute


@operator("log")
def _log(call: Call) -> Compute:
    epsilon = np.float32(call.number("epsilon", 1e-45))
    return lambda x: np.log(x + epsilon)


@operator("inverse")
def _inverse(call: Call) -> Compute:
    epsilon = np.float32(call.number("epsilon", 1e-4))
    return lambda x: np.float32(1) / (x + epsilon)


@operator("clip")
def _clip(call: Call) -> Compute:
    # not `exact`: the bounds may be fp32 where the values are fp16
    low, high = np.float32(call.number("alpha")), np.float32(call.number("beta"))
    return lambda x: np.minimum(np.maximum(x, low), high)


@operator("threshold")
def _threshold(call: Call) -> Compute:
    alpha = call.out.type(call.number("alpha"))
    return lambda x: np.maximum(x, alpha)


@operator("cast", exact=True, views=True)
def _cast(call: Call) -> Compute:
    source, target = call.dtype("x"), call.outputs[0].dtype
    dtype = call.out
    if source == target or (source, target) == ("float16", "float32"):
        return lambda x: x
    if target == "float16" and source not in ("int8", "uint8", "bool"):
        return lambda x: round_half(np.array(x, np.float32))
    if target == "bool":
        return lambda x: x != 0
    if source in ("float16", "float32") and np.dtype(dtype).kind in "iu" and dtype.itemsize < 4:
        return lambda x: x.astype(np.int32).astype(dtype)  # by way of int32, so that -1.0 wraps around everywhere
    return lambda x: x.astype(dtype)


@operator("gelu")
def _gelu(call: Call) -> Compute:
    mode = call.number("mode", "EXACT")
    if mode == "TANH_APPROXIMATION":
        root = np.float32(math.sqrt(2 / math.pi))
        return lambda x: np.float32(0.5) * x * (1 + np.tanh(root * (x + np.float32(0.044715) * x * x * x)))
    if mode == "SIGMOID_APPROXIMATION":
        return lambda x: x * _sigmoid(np.float32(1.702) * x)
    if mode != "EXACT":
        raise PackageError(f"{call.place}: mode is {mode}, which is not known")
    root = np.float32(1 / math.sqrt(2))
    return lambda x: np.float32(0.5) * x * (1 + _erf(x * root))


@operator(
    "leaky_relu",
    "elu",
    "sigmoid_hard",
    "scaled_tanh",
    "linear_activation",
    "clamped_relu",
    "thresholded_relu",
    "softplus_parametric",
    "prelu",
)
def _parametric(call: Call) -> Compute:
    a = np.asarray(call.fixed("alpha"), np.float32)
    b = np.asarray(call.fixed("beta", 0), np.float32)
    if call.kind in ("softplus_parametric", "prelu"):  # one per channel
        ones = (1,) * (len(call.type("x").shape) - 2)
        a, b = a.reshape(-1, *ones), (b.reshape(-1, *ones) if b.ndim else b)
    functions: dict[str, Compute] = {
        "leaky_relu": lambda x: np.where(x < 0, a * x, x),
        "prelu": lambda x: np.where(x < 0, a * x, x),
        "elu": lambda x: np.where(x < 0, a * np.expm1(np.minimum(x, 0)), x),
        "sigmoid_hard": lambda x: np.clip(a * x + b, np.float32(0), np.float32(1)),
        "scaled_tanh": lambda x: a * np.tanh(b * x),
        "linear_activation": lambda x: a * x + b,
        "clamped_relu": lambda x: np.minimum(b, np.where(x >= 0, x, a * x)),
        "thresholded_relu": lambda x: np.where(x >= a, x, np.float32(0)),
        "softplus_parametric": lambda x: a * _softplus(b * x),
    }
    return functions[call.kind]


# Reductions.


def _axes(call: Call) -> tuple[int, ...] | None:
    return call.numbers("axes")


def _reduce_mean(x: np.ndarray, axis: Any, keepdims: bool) -> Any:
    return np.mean(x, axis, keepdims=keepdims)


def _log_sum_exp(x: np.ndarray, axis: Any, keepdims: bool) -> Any:
    top = np.max(x, axis, keepdims=True)
    found = np.log(np.sum(np.exp(x - top), axis, keepdims=True)) + top
    return found if keepdims else found.reshape(np.max(x, axis).shape)


_REDUCTIONS: dict[str, tuple[Compute, bool]] = {  # and whether the result is one of the values
    "reduce_mean": (_reduce_mean, False),
    "reduce_sum": (lambda x, axis, keepdims: np.add.reduce(x, axis, keepdims=keepdims), False),
    "reduce_prod": (lambda x, axis, keepdims: np.multiply.reduce(x, axis, keepdims=keepdims), False),
    "reduce_max": (lambda x, axis, keepdims: np.maximum.reduce(x, axis, keepdims=keepdims), True),
    "reduce_min": (lambda x, axis, keepdims: np.minimum.reduce(x, axis, keepdims=keepdims), True),
    "reduce_sum_square": (lambda x, axis, keepdims: np.sum(np.square(x), axis, keepdims=keepdims), False),
    "reduce_l1_norm": (lambda x, axis, keepdims: np.sum(np.abs(x), axis, keepdims=keepdims), False),
    "reduce_l2_norm": (lambda x, axis, keepdims: np.sqrt(np.sum(np.square(x), axis, keepdims=keepdims)), False),
    "reduce_log_sum": (lambda x, axis, keepdims: np.log(np.sum(x, axis, keepdims=keepdims)), False),
    "reduce_log_sum_exp": (_log_sum_exp, False),
}


def _reduction(call: Call) -> Compute:
    reduce, axes, dtype = _REDUCTIONS[call.kind][0], _axes(call), call.out
    keepdims = bool(call.number("keep_dims", False))
    if dtype.kind == "f":
        return lambda x: reduce(x, axes, keepdims)
    return lambda x: np.asarray(reduce(x, axes, keepdims)).astype(dtype)  # NumPy sums int32 in int64


for _kind, (_, _exact) in _REDUCTIONS.items():
    operator(_kind, exact=_exact)(_reduction)


@operator("reduce_argmax", "reduce_argmin")
def _reduce_arg(call: Call) -> Compute:
    find = np.argmax if call.kind == "reduce_argmax" else np.argmin
    axis, keepdims = call.number("axis", -1), bool(call.number("keep_dims", False))
    dtype = call.out
    return lambda x: np.asarray(find(x, axis, keepdims=keepdims)).astype(dtype)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    """In float32; `x` is left as it is."""
    y = x - np.maximum.reduce(x, axis, keepdims=True)
    np.exp(y, y)
    y /= np.add.reduce(y, axis, keepdims=True)
    return y


@operator("softmax")
def _softmax(call: Call) -> Compute:
    return partial(softmax, axis=call.number("axis", -1))


@operator("cumsum")
def _cumsum(call: Call) -> Compute:
    axis, dtype = call.number("axis", 0), call.out
    exclusive, reverse = bool(call.number("exclusive", False)), bool(call.number("reverse", False))

    def compute(x: np.ndarray) -> np.ndarray:
        given = np.flip(x, axis) if reverse else x
        total = np.cumsum(given, axis, dtype=dtype)
        if exclusive:
            total = total - given if dtype.kind != "f" else _shifted(total, axis)
        return np.flip(total, axis) if reverse else total

    return compute


def _shifted(total: np.ndarray, axis: int) -> np.ndarray:
    """One later along an axis, zero first."""
    moved = np.zeros_like(total)
    np.moveaxis(moved, axis, 0)[1:] = np.moveaxis(total, axis, 0)[:-1]
    return moved


# Products.


@operator("linear")
def _linear(call: Call) -> Compute:
    weight = call.fixed("weight", transposed=True)  # BLAS is up to a fifth faster than on a transposed view
    bias = call.fixed("bias")
    if bias is None or not np.any(bias):
        return lambda x: np.matmul(x, weight)

    def compute(x: np.ndarray) -> np.ndarray:
        y = np.matmul(x, weight)
        y += bias
        return y

    return compute


@operator("matmul", takes="x y")
def _matmul(call: Call) -> Compute:
    flip_x = bool(call.number("transpose_x", False)) and len(call.type("x").shape) > 1
    flip_y = bool(call.number("transpose_y", False)) and len(call.type("y").shape) > 1
    if not flip_x and not flip_y:
        return np.matmul
    if not flip_x:
        return lambda x, y: np.matmul(x, y.swapaxes(-1, -2))
    if not flip_y:
        return lambda x, y: np.matmul(x.swapaxes(-1, -2), y)
    return lambda x, y: np.matmul(x.swapaxes(-1, -2), y.swapaxes(-1, -2))


@operator("einsum", takes="*values")
def _einsum(call: Call) -> Compute:
    # "nchw,nwhu->nchu" and "chw,whr->chr" are all there are: a product over the third axis from the end, per -2
    def compute(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        product = np.matmul(x.swapaxes(-3, -2), y.swapaxes(-3, -2))
        return np.ascontiguousarray(product.swapaxes(-3, -2))

    return compute


@operator("scaled_dot_product_attention", takes="query key value attn_mask")
def _attention(call: Call) -> Compute:
    width = call.type("query").shape[-1]
    scale = np.float32(1 / math.sqrt(width)) if width else None
    boolean = call.has("attn_mask") and call.dtype("attn_mask") == "bool"

    def compute(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        weights = np.matmul(query, key.swapaxes(-1, -2))
        weights *= scale or np.float32(1 / math.sqrt(query.shape[-1]))
        if boolean:
            weights[np.broadcast_to(~np.asarray(mask), weights.shape)] = -np.inf
        elif mask is not None:
            weights = weights + mask
        return np.matmul(softmax(weights, -1), value)

    return compute


@operator("conv", takes="x weight bias")
def _conv(call: Call) -> Compute:
    n = len(call.type("x").shape) - 2
    strides = call.numbers("strides", (1,) * n)
    dilations = call.numbers("dilations", (1,) * n)
    groups = call.number("groups", 1)
    mode = call.number("pad_type", "valid")
    given = call.numbers("pad", (0,) * (2 * n))

    def padding(extents: tuple[int, ...], spans: list[int]) -> list[tuple[int, int]]:
        if mode == "custom":
            return [(given[2 * i], given[2 * i + 1]) for i in range(n)]
        if mode == "valid":
            return [(0, 0)] * n
        total = [max(0, (-(-e // s) - 1) * s + k - e) for e, s, k in zip(extents, strides, spans)]
        return [(t // 2, t - t // 2) if mode == "same" else (t - t // 2, t // 2) for t in total]

    def compute(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        kernel = weight.shape[2:]
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations)]
        pads = padding(x.shape[2:], spans)
        if any(a or b for a, b in pads):
            x = np.pad(x, [(0, 0), (0, 0), *pads])
        windows = np.lib.stride_tricks.sliding_window_view(x, spans, tuple(range(2, 2 + n)))
        every = tuple(slice(None, None, s) for s in strides) + tuple(slice(None, None, d) for d in dilations)
        windows = windows[(slice(None), slice(None), *every)]  # (b, c, *out, *kernel)
        batch, out = x.shape[0], windows.shape[2 : 2 + n]
        columns = np.moveaxis(windows, 1, 1 + n).reshape(batch, math.prod(out), groups, -1)  # (b, out, g, c/g * k)
        filters = weight.reshape(groups, weight.shape[0] // groups, -1)  # (g, o/g, c/g * k)
        product = np.matmul(filters, columns.transpose(0, 2, 3, 1))  # (b, g, o/g, out)
        result = product.reshape(batch, weight.shape[0], *out)
        if bias is not None:
            result += bias.reshape(-1, *(1,) * n)
        return result

    return compute


# Normalisation.


@operator("layer_norm", takes="x")
def _layer_norm(call: Call) -> Compute:
    shape = call.type("x").shape
    rank = len(shape)
    axes = tuple(sorted(a % rank for a in call.numbers("axes", tuple(range(rank)))))
    epsilon = np.float32(call.number("epsilon", 1e-5))
    gamma, beta = call.fixed("gamma"), call.fixed("beta")

    def compute(x: np.ndarray) -> np.ndarray:
        kept = tuple(n if i in axes else 1 for i, n in enumerate(x.shape))
        y = x - np.mean(x, axes, keepdims=True)
        y /= np.sqrt(np.mean(np.square(y), axes, keepdims=True) + epsilon)
        if gamma is not None:
            y *= gamma.reshape(kept)
        if beta is not None:
            y += beta.reshape(kept)
        return y

    return compute


@operator("l2_norm")
def _l2_norm(call: Call) -> Compute:
    epsilon = np.float32(call.number("epsilon", 1e-6))
    return lambda x: x / np.sqrt(np.sum(np.square(x), (-3, -2, -1), keepdims=True) + epsilon)


@operator("batch_norm")
def _batch_norm(call: Call) -> Compute:
    ones = (1,) * (len(call.type("x").shape) - 2)
    scale = 1 / np.sqrt(call.fixed("variance") + np.float32(call.number("epsilon", 1e-5)))
    gamma, beta = call.fixed("gamma"), call.fixed("beta")
    scale = scale if gamma is None else scale * gamma
    shift = -call.fixed("mean") * scale + (0 if beta is None else beta)
    scale, shift = scale.reshape(-1, *ones), shift.reshape(-1, *ones)
    return lambda x: x * scale + shift


@operator("instance_norm")
def _instance_norm(call: Call) -> Compute:
    ones = (1,) * (len(call.type("x").shape) - 2)
    axes = tuple(range(2, len(ones) + 2))
    epsilon = np.float32(call.number("epsilon", 1e-5))
    gamma = np.asarray(call.fixed("gamma", np.ones(1, np.float32))).reshape(-1, *ones)
    beta = np.asarray(call.fixed("beta", np.zeros(1, np.float32))).reshape(-1, *ones)

    def compute(x: np.ndarray) -> np.ndarray:
        y = x - np.mean(x, axes, keepdims=True)
        return y / np.sqrt(np.mean(np.square(y), axes, keepdims=True) + epsilon) * gamma + beta

    return compute


# Quantisation at run time.


def _per_axis(call: Call, name: str) -> np.ndarray:
    value = np.asarray(call.fixed(name, 0), np.float32)
    if not value.ndim:
        return value
    shape = [1] * len(call.type("input").shape)
    shape[call.number("axis")] = -1
    return value.reshape(shape)


@operator("quantize", takes="input")
def _quantize(call: Call) -> Compute:
    scale, zero = _per_axis(call, "scale"), _per_axis(call, "zero_point")
    low, high = INT_BOUNDS[call.outputs[0].dtype]
    return lambda x: np.clip(np.rint(x / scale) + zero, low, high).astype(call.out)


@operator("dequantize", takes="input")
def _dequantize(call: Call) -> Compute:
    scale, zero = _per_axis(call, "scale"), _per_axis(call, "zero_point")
    return lambda x: (x.astype(np.float32) - zero) * scale
