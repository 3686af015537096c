"""Expressions in MIL, every operator among them, and the same in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from later import later
from torch.nn import functional as F

mb = later("coremltools.converters.mil.mil:Builder")

RNG = np.random.default_rng(3)
X = RNG.normal(size=(2, 3, 4)).astype(np.float32) * 2
INPUTS = {
    "x": X,  # with ties along its last axis
    "y": RNG.uniform(0.5, 2, (3, 4)).astype(np.float32),
    "image": RNG.normal(size=(2, 4, 7, 6)).astype(np.float32),
    "query": RNG.normal(size=(2, 3, 5, 8)).astype(np.float32),
    "keys": RNG.normal(size=(2, 3, 6, 8)).astype(np.float32),
    "n": RNG.integers(-7, 8, (2, 3, 4)).astype(np.int32),
    "m": np.array([3, -2, 5, 1], np.int32),
    "at": np.array([[2, 0, 2], [1, 1, 0]], np.int32),
    "large": RNG.normal(size=(16, 2048)).astype(np.float32),
}
X[0, 0] = [1.5, -2.5, 1.5, 0.5]


class Case:
    """An expression in MIL and the same in PyTorch or NumPy."""

    def __init__(self, build: Callable[[Any], Any], expect: Callable[[Any], Any], exact: bool = False) -> None:
        self.build, self.expect, self.exact = build, expect, exact


class Names:
    """The inputs as attributes, and constants of the program's own precision."""

    def __init__(self, values: dict[str, Any], dtype: Any) -> None:
        vars(self).update(values)
        self.dtype = dtype

    def const(self, value: Any) -> np.ndarray:
        return np.asarray(value, self.dtype)


def _np(f: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda t: f(t.x.numpy())


W = RNG.normal(size=(5, 4)).astype(np.float16)
B = RNG.normal(size=5).astype(np.float16)
K2 = RNG.normal(size=(6, 2, 3, 2)).astype(np.float16)
K1 = RNG.normal(size=(6, 3, 3)).astype(np.float16)
CHANNELS = [RNG.uniform(0.5, 2, 4).astype(np.float16) for _ in range(4)]


def _unary(kind: str, expect: Callable[[torch.Tensor], torch.Tensor], inside: float = 0) -> Case:
    """`inside`: squeezed into (-inside, inside) first, for functions that are defined only there."""

    def build(v: Any) -> Any:
        return getattr(mb, kind)(x=mb.mul(x=mb.tanh(x=v.x), y=v.const(inside)) if inside else v.x)

    def squeezed(t: Any) -> torch.Tensor:
        rounded = t.half(torch.tensor(inside))
        return t.half(t.half(torch.tanh(t.x)) * rounded) if inside else t.x

    return Case(build, lambda t: expect(squeezed(t)))


def _positive(kind: str, expect: Callable[[torch.Tensor], torch.Tensor], **more: Any) -> Case:
    return Case(lambda v: getattr(mb, kind)(x=v.y, **more), lambda t: expect(t.y))


def _reduction(kind: str, expect: Callable[[torch.Tensor], torch.Tensor], **more: Any) -> Case:
    return Case(lambda v: getattr(mb, kind)(x=v.x, **more), lambda t: expect(t.x))


def _parametric(kind: str, expect: Callable[[torch.Tensor], torch.Tensor], **more: float) -> Case:
    return Case(lambda v: getattr(mb, kind)(x=v.x, **{k: v.const(n) for k, n in more.items()}), lambda t: expect(t.x))


def _conv(n: int, expect: Callable[[torch.Tensor], torch.Tensor], **more: Any) -> Case:
    kernel = K1 if n == 1 else K2
    groups = 4 // kernel.shape[1] if n == 2 else 1

    def build(v: Any) -> Any:
        x = (
            v.image
            if n == 2
            else mb.slice_by_size(x=mb.reshape(x=v.image, shape=[2, 4, 42]), begin=[0] * 3, size=[2, 3, 42])
        )
        return mb.conv(x=x, weight=v.const(kernel), groups=groups, **more)

    def given(t: Any) -> torch.Tensor:
        return expect(t.image if n == 2 else t.image.reshape(2, 4, 42)[:, :3])

    return Case(build, given)


def _last_first(x: torch.Tensor, dim: int, descending: bool) -> list[torch.Tensor]:
    """Sorted values and their indices; of equal values the last comes first, which no other rule here would give."""
    values, indices = x.flip(dim).sort(dim=dim, descending=descending, stable=True)
    return [values, x.shape[dim] - 1 - indices]


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x).astype(np.float32))


CASES: dict[str, Case] = {
    # element by element
    "abs": _unary("abs", torch.abs),
    "abs_int": Case(lambda v: mb.abs(x=v.n), lambda t: t.n.abs()),
    "acos": _unary("acos", torch.acos, 0.9),
    "asin": _unary("asin", torch.asin, 0.9),
    "atan": _unary("atan", torch.atan),
    "atanh": _unary("atanh", torch.atanh, 0.9),
    "ceil": _unary("ceil", torch.ceil),
    "cos": _unary("cos", torch.cos),
    "cosh": _unary("cosh", torch.cosh),
    "erf": _unary("erf", torch.erf),
    "exp": _unary("exp", torch.exp),
    "exp2": _unary("exp2", torch.exp2),
    "floor": _unary("floor", torch.floor),
    "round": _unary("round", torch.round),
    "sigmoid": _unary("sigmoid", torch.sigmoid),
    "sign": _unary("sign", torch.sign),
    "silu": _unary("silu", F.silu),
    "sin": _unary("sin", torch.sin),
    "sinh": _unary("sinh", torch.sinh),
    "softplus": _unary("softplus", F.softplus),
    "softsign": _unary("softsign", F.softsign),
    "square": _unary("square", torch.square),
    "square_int": Case(lambda v: mb.square(x=v.n), lambda t: t.n * t.n),
    "tan": _unary("tan", torch.tan, 0.9),
    "tanh": _unary("tanh", torch.tanh),
    "relu": _unary("relu", F.relu),
    "relu6": _unary("relu6", F.relu6),
    "sqrt": _positive("sqrt", torch.sqrt),
    "rsqrt": _positive("rsqrt", torch.rsqrt),
    "log": _positive("log", torch.log),
    "inverse": Case(lambda v: mb.inverse(x=v.y, epsilon=v.const(0.5)), lambda t: 1 / (t.y + 0.5)),
    "rsqrt_epsilon": Case(lambda v: mb.rsqrt(x=v.y, epsilon=v.const(0.25)), lambda t: (t.y + 0.25) ** -0.5),
    "clip": Case(lambda v: mb.clip(x=v.x, alpha=v.const(-1), beta=v.const(0.5)), lambda t: t.x.clip(-1, 0.5)),
    "threshold": Case(lambda v: mb.threshold(x=v.x, alpha=v.const(0.5)), lambda t: t.x.clip(0.5)),
    "gelu": _reduction("gelu", F.gelu),
    "gelu_tanh": _reduction("gelu", lambda x: F.gelu(x, approximate="tanh"), mode="TANH_APPROXIMATION"),
    "gelu_sigmoid": _reduction("gelu", lambda x: x * torch.sigmoid(1.702 * x), mode="SIGMOID_APPROXIMATION"),
    "leaky_relu": _parametric("leaky_relu", lambda x: F.leaky_relu(x, 0.25), alpha=0.25),
    "elu": _parametric("elu", lambda x: F.elu(x, 0.5), alpha=0.5),
    "sigmoid_hard": _parametric("sigmoid_hard", lambda x: (x * 0.25 + 0.5).clip(0, 1), alpha=0.25, beta=0.5),
    "scaled_tanh": _parametric("scaled_tanh", lambda x: 0.5 * torch.tanh(2 * x), alpha=0.5, beta=2),
    "linear_activation": _parametric("linear_activation", lambda x: 0.5 * x + 2, alpha=0.5, beta=2),
    "thresholded_relu": _parametric("thresholded_relu", lambda x: torch.where(x >= 1, x, 0), alpha=1),
    "clamped_relu": _parametric(
        "clamped_relu", lambda x: torch.where(x >= 0, x, 0.5 * x).clip(max=1), alpha=0.5, beta=1
    ),
    "prelu": Case(
        lambda v: mb.prelu(x=v.image, alpha=v.const(CHANNELS[0])), lambda t: F.prelu(t.image, _tensor(CHANNELS[0]))
    ),
    "softplus_parametric": Case(
        lambda v: mb.softplus_parametric(x=v.image, alpha=v.const(CHANNELS[0]), beta=v.const(CHANNELS[1])),
        lambda t: (
            _tensor(CHANNELS[0]).reshape(4, 1, 1)
            * torch.log1p(torch.exp(_tensor(CHANNELS[1]).reshape(4, 1, 1) * t.image))
        ),
    ),
    "add": Case(lambda v: mb.add(x=v.x, y=v.y), lambda t: t.x + t.y),
    "sub": Case(lambda v: mb.sub(x=v.x, y=v.y), lambda t: t.x - t.y),
    "mul": Case(lambda v: mb.mul(x=v.x, y=v.y), lambda t: t.x * t.y),
    "real_div": Case(lambda v: mb.real_div(x=v.x, y=v.y), lambda t: t.x / t.y),
    "real_div_int": Case(lambda v: mb.real_div(x=v.n, y=v.m), lambda t: torch.div(t.n, t.m, rounding_mode="trunc")),
    "pow": Case(lambda v: mb.pow(x=v.y, y=v.x), lambda t: t.y**t.x),
    "pow_int": Case(lambda v: mb.pow(x=v.n, y=np.int32(3)), lambda t: t.n**3),
    "floor_div": Case(lambda v: mb.floor_div(x=v.x, y=v.y), lambda t: torch.div(t.x, t.y, rounding_mode="floor")),
    "floor_div_int": Case(lambda v: mb.floor_div(x=v.n, y=v.m), lambda t: torch.div(t.n, t.m, rounding_mode="floor")),
    "mod": Case(lambda v: mb.mod(x=v.x, y=v.y), lambda t: torch.remainder(t.x, t.y)),
    "mod_int": Case(lambda v: mb.mod(x=v.n, y=v.m), lambda t: torch.remainder(t.n, t.m)),
    "maximum": Case(lambda v: mb.maximum(x=v.x, y=v.y), lambda t: torch.maximum(t.x, t.y)),
    "minimum": Case(lambda v: mb.minimum(x=v.x, y=v.y), lambda t: torch.minimum(t.x, t.y)),
    "equal": Case(lambda v: mb.equal(x=v.n, y=v.m), lambda t: t.n == t.m),
    "not_equal": Case(lambda v: mb.not_equal(x=v.n, y=v.m), lambda t: t.n != t.m),
    "greater": Case(lambda v: mb.greater(x=v.n, y=v.m), lambda t: t.n > t.m),
    "greater_equal": Case(lambda v: mb.greater_equal(x=v.n, y=v.m), lambda t: t.n >= t.m),
    "less": Case(lambda v: mb.less(x=v.n, y=v.m), lambda t: t.n < t.m),
    "less_equal": Case(lambda v: mb.less_equal(x=v.n, y=v.m), lambda t: t.n <= t.m),
    **{
        f"logical_{kind}": Case(
            lambda v, kind=kind: getattr(mb, f"logical_{kind}")(
                x=mb.greater(x=v.n, y=np.int32(0)), y=mb.less(x=v.m, y=np.int32(2))
            ),
            lambda t, kind=kind: getattr(torch, f"logical_{kind}")(t.n > 0, t.m < 2),
        )
        for kind in ("and", "or", "xor")
    },
    "logical_not": Case(lambda v: mb.logical_not(x=mb.greater(x=v.n, y=np.int32(0))), lambda t: t.n <= 0),
    # casts
    "cast_int": Case(lambda v: mb.cast(x=v.x, dtype="int32"), lambda t: t.x.int()),
    "cast_int8": Case(lambda v: mb.cast(x=v.x, dtype="int8"), lambda t: t.x.int()),
    "cast_uint8": Case(lambda v: mb.cast(x=v.n, dtype="uint8"), lambda t: t.n % 256),
    "cast_bool": Case(lambda v: mb.cast(x=v.n, dtype="bool"), lambda t: t.n != 0),
    "cast_fp16": Case(lambda v: mb.cast(x=v.x, dtype="fp16"), lambda t: t.x.half()),
    "cast_fp32": Case(lambda v: mb.cast(x=mb.mul(x=v.x, y=v.y), dtype="fp32"), lambda t: t.half(t.x * t.y)),
    "cast_large_int": Case(
        lambda v: mb.cast(x=mb.mul(x=v.n, y=np.int32(1001)), dtype="fp16"), lambda t: (t.n * 1001).half()
    ),
    # reductions
    "reduce_mean": _reduction("reduce_mean", lambda x: x.mean((0, 2)), axes=[0, -1]),
    "reduce_sum": _reduction("reduce_sum", lambda x: x.sum(1, keepdim=True), axes=[1], keep_dims=True),
    "reduce_sum_int": Case(lambda v: mb.reduce_sum(x=v.n, axes=[0, 1]), lambda t: t.n.sum((0, 1))),
    "reduce_prod": _reduction("reduce_prod", lambda x: x.prod(-1), axes=[-1]),
    "reduce_max": _reduction("reduce_max", lambda x: x.amax((1, 2)), axes=[1, 2]),
    "reduce_min": _reduction("reduce_min", lambda x: x.amin((0, 1, 2), keepdim=True), keep_dims=True),
    "reduce_l1_norm": _reduction("reduce_l1_norm", lambda x: x.abs().sum(1), axes=[1]),
    "reduce_l2_norm": _reduction("reduce_l2_norm", lambda x: x.norm(dim=1), axes=[1]),
    "reduce_log_sum": Case(lambda v: mb.reduce_log_sum(x=v.y, axes=[1]), lambda t: t.y.sum(1).log()),
    "reduce_log_sum_exp": _reduction("reduce_log_sum_exp", lambda x: x.logsumexp((0, 1)), axes=[0, 1]),
    "reduce_sum_square": _reduction(
        "reduce_sum_square", lambda x: (x * x).sum(2, keepdim=True), axes=[2], keep_dims=True
    ),
    "reduce_argmax": _reduction("reduce_argmax", lambda x: x.argmax(1), axis=1),
    "reduce_argmin": _reduction("reduce_argmin", lambda x: x.argmin(0, keepdim=True), axis=0, keep_dims=True),
    "softmax": _reduction("softmax", lambda x: x.softmax(1), axis=1),
    "cumsum": _reduction("cumsum", lambda x: x.cumsum(2), axis=2),
    "cumsum_int": Case(lambda v: mb.cumsum(x=v.n, axis=0, exclusive=True), lambda t: t.n.cumsum(0) - t.n),
    "cumsum_exclusive": _reduction(
        "cumsum", lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1].cumsum(1), axis=1, exclusive=True
    ),
    "cumsum_reverse": _reduction("cumsum", lambda x: x.flip(1).cumsum(1).flip(1), axis=1, reverse=True),
    "cumsum_both": _reduction(
        "cumsum",
        lambda x: F.pad(x, (0, 0, 0, 1))[:, 1:].flip(1).cumsum(1).flip(1),
        axis=1,
        exclusive=True,
        reverse=True,
    ),
    # products
    "linear": Case(lambda v: mb.linear(x=v.x, weight=v.const(W)), lambda t: F.linear(t.x, _tensor(W))),
    "linear_bias": Case(
        lambda v: mb.linear(x=v.x, weight=v.const(W), bias=v.const(B)), lambda t: F.linear(t.x, _tensor(W), _tensor(B))
    ),
    "matmul": Case(lambda v: mb.matmul(x=v.x, y=v.y, transpose_y=True), lambda t: t.x @ t.y.T),
    "matmul_batched": Case(lambda v: mb.matmul(x=v.query, y=v.keys, transpose_y=True), lambda t: t.query @ t.keys.mT),
    "matmul_transposed": Case(lambda v: mb.matmul(x=v.x, y=v.x, transpose_x=True), lambda t: t.x.mT @ t.x),
    "matmul_both": Case(
        lambda v: mb.matmul(x=v.image, y=v.const(np.ones((5, 7))), transpose_x=True, transpose_y=True),
        lambda t: t.image.mT @ torch.ones(7, 5),
    ),
    "matmul_int": Case(lambda v: mb.matmul(x=v.n, y=v.n, transpose_y=True), lambda t: t.n @ t.n.mT),
    "einsum": Case(
        lambda v: mb.einsum(values=(v.query, mb.reshape(x=v.query, shape=[2, 8, 5, 3])), equation="nchw,nwhu->nchu"),
        lambda t: torch.einsum("nchw,nwhu->nchu", t.query, t.query.reshape(2, 8, 5, 3)),
    ),
    "attention": Case(
        lambda v: mb.scaled_dot_product_attention(query=v.query, key=v.keys, value=v.keys),
        lambda t: F.scaled_dot_product_attention(t.query, t.keys, t.keys),
    ),
    "attention_mask": Case(
        lambda v: mb.scaled_dot_product_attention(
            query=v.query, key=v.keys, value=v.keys, attn_mask=np.tri(5, 6, 1, dtype=bool)
        ),
        lambda t: F.scaled_dot_product_attention(t.query, t.keys, t.keys, torch.ones(5, 6).tril(1).bool()),
    ),
    "attention_bias": Case(
        lambda v: mb.scaled_dot_product_attention(
            query=v.query, key=v.keys, value=v.keys, attn_mask=v.const(np.arange(6) / 2)
        ),
        lambda t: F.scaled_dot_product_attention(t.query, t.keys, t.keys, (torch.arange(6) / 2).expand(5, 6)),
    ),
    "conv1d": _conv(1, lambda x: F.conv1d(x, _tensor(K1)), pad_type="valid"),
    "conv1d_custom": _conv(
        1,
        lambda x: F.conv1d(F.pad(x, (3, 1)), _tensor(K1), stride=2, dilation=2),
        pad_type="custom",
        pad=[3, 1],
        strides=[2],
        dilations=[2],
    ),
    "conv2d_groups": _conv(2, lambda x: F.conv2d(x, _tensor(K2), groups=2), pad_type="valid"),
    "conv2d_same": _conv(
        2, lambda x: F.conv2d(F.pad(x, (0, 0, 1, 1)), _tensor(K2), stride=2, groups=2), pad_type="same", strides=[2, 2]
    ),
    "conv2d_same_lower": _conv(
        2, lambda x: F.conv2d(F.pad(x, (1, 0, 1, 1)), _tensor(K2), groups=2), pad_type="same_lower"
    ),
    "conv2d_same_odd": _conv(2, lambda x: F.conv2d(F.pad(x, (0, 1, 1, 1)), _tensor(K2), groups=2), pad_type="same"),
    # normalisation
    "layer_norm": Case(
        lambda v: mb.layer_norm(x=v.x, axes=[-1], gamma=v.const(W[0]), beta=v.const(W[1]), epsilon=v.const(1e-3)),
        lambda t: F.layer_norm(t.x, (4,), _tensor(W[0]), _tensor(W[1]), float(t.const(1e-3))),
    ),
    "layer_norm_axes": Case(
        lambda v: mb.layer_norm(x=v.x, axes=[1, 2], epsilon=v.const(1e-3)),
        lambda t: F.layer_norm(t.x, (3, 4), eps=float(t.const(1e-3))),
    ),
    "l2_norm": Case(
        lambda v: mb.l2_norm(x=v.image, epsilon=v.const(1e-3)),
        lambda t: t.image / torch.sqrt(t.image.square().sum((1, 2, 3), keepdim=True) + 1e-3),
    ),
    "batch_norm": Case(
        lambda v: mb.batch_norm(
            x=v.image,
            epsilon=v.const(1e-3),
            **{k: v.const(c) for k, c in zip(("mean", "variance", "gamma", "beta"), CHANNELS)},
        ),
        lambda t: F.batch_norm(t.image, *(_tensor(c) for c in CHANNELS), eps=float(t.const(1e-3))),
    ),
    "instance_norm": Case(
        lambda v: mb.instance_norm(
            x=v.image, gamma=v.const(CHANNELS[0]), beta=v.const(CHANNELS[1]), epsilon=v.const(1e-3)
        ),
        lambda t: F.instance_norm(
            t.image, weight=_tensor(CHANNELS[0]), bias=_tensor(CHANNELS[1]), eps=float(t.const(1e-3))
        ),
    ),
    # quantisation
    "quantize": Case(
        lambda v: mb.quantize(
            input=v.x, scale=v.const([0.5, 0.25, 0.125]), zero_point=np.int8([1, 2, -3]), axis=1, output_dtype="int8"
        ),
        lambda t: (
            torch.round(t.x / torch.tensor([0.5, 0.25, 0.125]).reshape(3, 1)) + torch.tensor([1, 2, -3]).reshape(3, 1)
        ),
    ),
    "quantize_saturates": Case(
        lambda v: mb.quantize(input=v.x, scale=v.const(0.0009765625), output_dtype="uint8"),
        lambda t: torch.round(t.x * 1024).clip(0, 255),
    ),
    "dequantize": Case(
        lambda v: mb.dequantize(
            input=mb.cast(x=v.n, dtype="int8"), scale=v.const([0.3, 0.2]), zero_point=np.int8([1, -2]), axis=0
        ),
        lambda t: (t.n - torch.tensor([1, -2]).reshape(2, 1, 1)) * _tensor(t.const([0.3, 0.2])).reshape(2, 1, 1),
    ),
    # shapes
    "reshape": Case(lambda v: mb.reshape(x=v.x, shape=[4, -1]), lambda t: t.x.reshape(4, 6)),
    "reshape_zero": Case(lambda v: mb.reshape(x=v.y, shape=[1, 0, -1, 0]), lambda t: t.y.reshape(1, 1, 3, 4)),
    "reshape_computed": Case(
        lambda v: mb.reshape(
            x=v.x, shape=mb.concat(values=[mb.slice_by_size(x=v.m, begin=[0], size=[1]), np.int32([8])], axis=0)
        ),
        lambda t: t.x.reshape(3, 8),
    ),
    "transpose": Case(lambda v: mb.transpose(x=v.x, perm=[2, 0, 1]), lambda t: t.x.permute(2, 0, 1)),
    "expand_dims": Case(lambda v: mb.expand_dims(x=v.x, axes=[0, -1]), lambda t: t.x[None, ..., None]),
    "squeeze": Case(lambda v: mb.squeeze(x=mb.expand_dims(x=v.x, axes=[0, 2]), axes=[2]), lambda t: t.x[None]),
    "flatten2d": Case(lambda v: mb.flatten2d(x=v.x, axis=2), lambda t: t.x.reshape(6, 4)),
    "shape": Case(lambda v: mb.shape(x=mb.gather(x=v.x, indices=v.at, axis=1)), lambda t: torch.tensor([2, 2, 3, 4])),
    "tile": Case(lambda v: mb.tile(x=v.y, reps=[2, 3]), lambda t: t.y.tile(2, 3)),
    "reverse": Case(lambda v: mb.reverse(x=v.x, axes=[0, -1]), lambda t: t.x.flip(0, 2)),
    "reverse_all": Case(lambda v: mb.reverse(x=v.x), lambda t: t.x.flip(0, 1, 2)),
    "reverse_sequence": Case(
        lambda v: mb.reverse_sequence(x=v.x, lengths=np.int32([2, 3]), seq_axis=1, batch_axis=0),
        lambda t: torch.stack([t.x[0][[1, 0, 2]], t.x[1].flip(0)]),
    ),
    "sliding_windows": Case(
        lambda v: mb.sliding_windows(x=v.image, axis=2, size=3, stride=2),
        lambda t: t.image.unfold(2, 3, 2).movedim(-1, 3),
    ),
    "concat": Case(lambda v: mb.concat(values=(v.x, v.x, v.x), axis=-1), lambda t: torch.cat([t.x] * 3, -1)),
    "concat_interleave": Case(
        lambda v: mb.concat(values=(v.x, mb.abs(x=v.x)), axis=1, interleave=True),
        lambda t: torch.stack([t.x, t.x.abs()], 2).reshape(2, 6, 4),
    ),
    "stack": Case(lambda v: mb.stack(values=(v.x, v.x), axis=-2), lambda t: torch.stack([t.x, t.x], -2)),
    "split": Case(lambda v: mb.split(x=v.x, num_splits=2, axis=2), lambda t: t.x.split(2, 2)),
    "split_sizes": Case(lambda v: mb.split(x=v.x, split_sizes=[1, 3], axis=-1), lambda t: t.x.split([1, 3], 2)),
    "pad": Case(
        lambda v: mb.pad(x=v.x, pad=[1, 2, 0, 1], mode="constant", constant_val=v.const(-3)),
        lambda t: F.pad(t.x, (0, 1, 1, 2), value=-3),
    ),
    "pad_reflect": Case(
        lambda v: mb.pad(x=v.image, pad=[2, 1, 3, 0], mode="reflect"),
        lambda t: F.pad(t.image, (3, 0, 2, 1), mode="reflect"),
    ),
    "pad_replicate": Case(
        lambda v: mb.pad(x=v.image, pad=[2, 1, 3, 0], mode="replicate"),
        lambda t: F.pad(t.image, (3, 0, 2, 1), mode="replicate"),
    ),
    # slices
    "slice": Case(
        lambda v: mb.slice_by_index(x=v.image, begin=[0, 1, -6, 0], end=[2, -1, 6, 5], stride=[1, 1, 2, 3]),
        lambda t: t.image[0:2, 1:-1, -6:6:2, 0:5:3],
    ),
    "slice_masks": Case(
        lambda v: mb.slice_by_index(
            x=v.image,
            begin=[1, 2, 3, 1],
            end=[9, 9, 4, 3],
            begin_mask=[False, False, True, False],
            end_mask=[False, False, False, True],
            squeeze_mask=[True, True, False, False],
        ),
        lambda t: t.image[1, 2, :4, 1:],
    ),
    "slice_backwards": Case(
        lambda v: mb.slice_by_index(
            x=v.x,
            begin=[0, 2, -1],
            end=[0, 0, 0],
            stride=[-1, -2, -1],
            begin_mask=[True, False, False],
            end_mask=[True, True, False],
        ),
        lambda t: t.x.flip(0)[:, [2, 0]][..., [3, 2, 1]],
    ),
    "slice_computed": Case(
        lambda v: mb.slice_by_index(
            x=v.x,
            begin=mb.slice_by_size(x=mb.mod(x=v.m, y=np.int32(2)), begin=[1], size=[3]),
            end=[2, 3, 4],
        ),
        lambda t: t.x[0:, 1:, 1:],
    ),
    "slice_by_size": Case(
        lambda v: mb.slice_by_size(x=v.x, begin=[1, 0, -3], size=[1, -1, 2]), lambda t: t.x[1:2, :, 1:3]
    ),
    "slice_update": Case(
        lambda v: mb.slice_update(
            x=v.image, update=v.x, begin=[0, 2, 1, 0], end=[2, 3, 4, 4], squeeze_mask=[False, True, False, False]
        ),
        lambda t: t.updated(t.image, (slice(None), 2, slice(1, 4), slice(0, 4)), t.x),
    ),
    "slice_update_strided": Case(
        lambda v: mb.slice_update(
            x=v.image,
            update=v.x,
            begin=[0, 1, 0, 0],
            end=[2, 4, 1, 4],
            squeeze_mask=[False, False, True, False],
            stride=[-1, 1, 1, 1],
            begin_mask=[True] + [False] * 3,
            end_mask=[True] + [False] * 3,
        ),
        lambda t: t.updated(t.image, (slice(None), slice(1, 4), 0, slice(0, 4)), t.x.flip(0)),
    ),
    # indices
    "gather": Case(lambda v: mb.gather(x=v.x, indices=v.at, axis=1), lambda t: t.x[:, t.at.long()]),
    "gather_uint8": Case(
        lambda v: mb.gather(x=mb.cast(x=v.n, dtype="uint8"), indices=mb.cast(x=v.at, dtype="uint16"), axis=-1),
        lambda t: (t.n % 256)[:, :, t.at.long()],
    ),
    "gather_batched": Case(
        lambda v: mb.gather(x=v.x, indices=v.at, axis=1, batch_dims=1),
        lambda t: torch.stack([a[i.long()] for a, i in zip(t.x, t.at)]),
    ),
    "gather_batched_later": Case(
        lambda v: mb.gather(x=v.x, indices=v.at, axis=2, batch_dims=1),
        lambda t: torch.stack([a[:, i.long()] for a, i in zip(t.x, t.at)]),
    ),
    "gather_along_axis": Case(
        lambda v: mb.gather_along_axis(x=mb.reshape(x=v.y, shape=[2, 6]), indices=v.at, axis=1),
        lambda t: t.y.reshape(2, 6).gather(1, t.at.long()),
    ),
    "gather_nd": Case(
        lambda v: mb.gather_nd(x=v.x, indices=mb.minimum(x=v.at, y=np.int32([1, 2, 3]))),
        lambda t: t.x[(1, 1), (0, 1), (2, 0)],
    ),
    "gather_nd_batched": Case(
        lambda v: mb.gather_nd(x=v.x, indices=mb.reshape(x=v.at, shape=[2, 3, 1]), batch_dims=1),
        lambda t: torch.stack([a[i.long()] for a, i in zip(t.x, t.at)]),
    ),
    "scatter": Case(
        lambda v: mb.scatter(
            data=v.x,
            indices=np.int32([2, 2]),
            updates=mb.slice_by_size(x=v.x, begin=[0] * 3, size=[2, 2, 4]),
            axis=1,
            mode="add",
        ),
        lambda t: t.x.index_add(1, torch.tensor([2, 2]), t.x[:, :2]),
    ),
    **{
        f"scatter_along_axis_{mode}": Case(
            lambda v, mode=mode: mb.scatter_along_axis(
                data=v.x,
                indices=np.int32([[[1] * 4, [0] * 4]] * 2),
                mode=mode,
                axis=1,
                updates=mb.slice_by_size(x=mb.add(x=mb.square(x=v.x), y=v.const(1)), begin=[0] * 3, size=[2, 2, 4]),
            ),
            lambda t, f=f: torch.stack(
                [
                    f(t.x[:, 0], t.half(t.half(t.x * t.x) + 1)[:, 1]),
                    f(t.x[:, 1], t.half(t.half(t.x * t.x) + 1)[:, 0]),
                    t.x[:, 2],
                ],
                1,
            ),
        )
        for mode, f in {
            "update": lambda a, b: b,
            "add": torch.add,
            "sub": torch.sub,
            "mul": torch.mul,
            "div": torch.div,
            "max": torch.maximum,
            "min": torch.minimum,
        }.items()
    },
    "scatter_nd": Case(
        lambda v: mb.scatter_nd(
            data=v.y, indices=np.int32([[0, 1], [2, 3], [0, 1]]), updates=v.const([1, 2, 4]), mode="add"
        ),
        lambda t: t.updated(t.y, ([0, 2], [1, 3]), t.y[[0, 2], [1, 3]] + torch.tensor([5.0, 2.0])),
    ),
    "select": Case(
        lambda v: mb.select(cond=mb.greater(x=v.n, y=np.int32(0)), a=v.x, b=v.y),
        lambda t: torch.where(t.n > 0, t.x, t.y),
    ),
    "non_zero": Case(lambda v: mb.non_zero(x=v.n), lambda t: t.n.nonzero()),
    "one_hot": Case(
        lambda v: mb.one_hot(indices=v.at, one_hot_vector_size=4, on_value=v.const(2), off_value=v.const(-1)),
        lambda t: F.one_hot(t.at.long(), 4) * 3.0 - 1,
    ),
    "one_hot_axis": Case(
        lambda v: mb.one_hot(indices=v.at, one_hot_vector_size=4, axis=0, on_value=np.int32(1), off_value=np.int32(0)),
        lambda t: F.one_hot(t.at.long(), 4).movedim(-1, 0),
    ),
    # sorting
    "argsort": Case(lambda v: mb.argsort(x=v.x, axis=1), lambda t: t.x.sort(dim=1, descending=True, stable=True)[1]),
    "argsort_up": Case(lambda v: mb.argsort(x=v.n, ascending=True), lambda t: t.n.sort(stable=True)[1]),
    "topk": Case(
        lambda v: mb.topk(x=v.x, k=3, axis=-1), lambda t: [part[..., :3] for part in _last_first(t.x, -1, True)]
    ),
    "topk_up": Case(lambda v: mb.topk(x=v.n, k=2, axis=0, ascending=True), lambda t: _last_first(t.n, 0, False)),
    "topk_uint8": Case(
        lambda v: mb.topk(x=mb.cast(x=v.n, dtype="uint8"), k=2, return_indices=False),
        lambda t: (t.n % 256).topk(2)[0],
    ),
    # made from nothing
    "range_1d": Case(
        lambda v: mb.range_1d(
            start=mb.squeeze(x=mb.slice_by_size(x=v.m, begin=[3], size=[1])), end=np.int32(9), step=np.int32(3)
        ),
        lambda t: torch.tensor([1, 4, 7]),
    ),
    "fill": Case(lambda v: mb.fill(shape=mb.shape(x=v.y), value=v.const(2.5)), lambda t: torch.full((3, 4), 2.5)),
    "fill_like": Case(lambda v: mb.fill_like(ref_tensor=v.y, value=np.int32(7)), lambda t: torch.full((3, 4), 7)),
    "band_part": Case(lambda v: mb.band_part(x=v.x, lower=-1, upper=1), lambda t: t.x.tril(1)),
    "band_part_lower": Case(lambda v: mb.band_part(x=v.x, lower=1, upper=0), lambda t: t.x.tril(0).triu(-1)),
    # arrays that are written over where they are not needed any more
    "large": Case(
        lambda v: mb.sub(x=mb.mul(x=mb.add(x=v.large, y=v.const(1)), y=v.large), y=v.const(np.arange(2048) / 1024)),
        lambda t: t.half(t.half(t.half(t.large + 1) * t.large) - torch.arange(2048) / 1024),
    ),
    "large_viewed": Case(lambda v: _viewed(v), lambda t: _viewed_torch(t)),
}


def _viewed(v: Any) -> Any:
    """A value with a view of it still to be read must not be written over, nor one that is returned."""
    doubled = mb.mul(x=v.large, y=v.const(2))
    view = mb.transpose(x=doubled, perm=[1, 0])
    more = mb.add(x=doubled, y=v.const(1))
    last = mb.mul(x=more, y=v.const(3))
    return more, last, mb.add(x=view, y=v.const(0.5))


def _viewed_torch(t: Any) -> Any:
    more = t.half(2 * t.large + 1)
    return more, t.half(more * 3), t.half(t.large.T * 2 + 0.5)
