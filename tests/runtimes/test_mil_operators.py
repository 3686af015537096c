"""Every MIL operator on NumPy against PyTorch's or coremltools' own answer, in fp32 and fp16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from later import later
from mil_cases import CASES, INPUTS, RNG, Names

from rmse_edge.errors import PackageError, UserError, quiet
from rmse_edge.runtimes.mil import operators as mil_operators
from rmse_edge.runtimes.mil.interpreter import Interpreter
from rmse_edge.runtimes.mil.operators import OPERATORS, PIECE, compute_half, operator, round_half, to_half

ct = later("coremltools")
mb = later("coremltools.converters.mil.mil:Builder")
types = later("coremltools.converters.mil.mil.types")
old_constants = later("coremltools.converters.mil.mil.ops.defs.iOS16.constexpr_ops")
constants = later("coremltools.converters.mil.mil.ops.defs.iOS18.compression")

pytestmark = [pytest.mark.coreml, pytest.mark.slow]


class Answers(Names):
    """What the expressions are expected to give: float32 tensors, rounded where the program is fp16."""

    def half(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float16 if self.dtype == np.float16 else torch.float32).float()

    @staticmethod
    def updated(x: torch.Tensor, where: Any, value: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[where] = value
        return x


def convert(path: Any, specs: dict[str, Any], build: Callable[..., Any]) -> Interpreter:
    """A program as it is written, without coremltools' passes."""
    with quiet():
        program = mb.program(input_specs=list(specs.values()), opset_version=ct.target.iOS18)(build)
        model = ct.convert(
            program, source="milinternal", convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18,
            pass_pipeline=ct.PassPipeline.EMPTY, skip_model_load=True,
        )  # fmt: skip
        model.save(str(path))
    return Interpreter(path)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def results(request, tmp_path_factory) -> Any:
    """All cases as one program: name -> outputs, and the answers they should give."""
    kind, dtype = (types.fp32, np.float32) if request.param == "fp32" else (types.fp16, np.float16)
    feeds = {k: v if v.dtype == np.int32 else v.astype(dtype) for k, v in INPUTS.items()}
    specs = {k: mb.TensorSpec(v.shape, types.int32 if v.dtype == np.int32 else kind) for k, v in feeds.items()}
    counts: dict[str, int] = {}

    def build(x, y, image, query, keys, n, m, at, large):
        given = dict(x=x, y=y, image=image, query=query, keys=keys, n=n, m=m, at=at, large=large)
        outputs: list[Any] = []
        for name, case in CASES.items():
            made = _as_tuple(case.build(Names(given, dtype)))
            counts[name] = len(made)
            outputs += made
        return tuple(outputs)

    interpreter = convert(tmp_path_factory.mktemp("mil") / "operators.mlpackage", specs, build)
    interpreter.predict(feeds)
    outputs = list(interpreter.predict(feeds).values())  # the second call: no shapes are compared any more
    found = {name: [outputs.pop(0) for _ in range(count)] for name, count in counts.items()}
    tensors = {k: torch.from_numpy(v.astype(np.float32) if v.dtype != np.int32 else v) for k, v in feeds.items()}
    return found, Answers(tensors, dtype)


@pytest.mark.parametrize("name", CASES)
def test_operator(results, name: str) -> None:
    found, answers = results
    expected = [torch.as_tensor(e) for e in _as_tuple(CASES[name].expect(answers))]
    assert len(found[name]) == len(expected)
    for array, tensor in zip(found[name], expected):
        assert array.shape == tuple(tensor.shape)
        wanted = tensor.to(torch.float64).numpy()
        if array.dtype == np.float16:  # one step: fp32 sums in another order may fall on the other side
            np.testing.assert_allclose(array.astype(np.float64), wanted.astype(np.float16), rtol=2**-10, atol=2**-22)
        elif array.dtype == np.float32:
            np.testing.assert_allclose(array, wanted, rtol=2e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(array, wanted)


CONSTANT = {kind for kind in OPERATORS if kind.startswith("constexpr_")}
NOT_CONVERTED = {"identity", "reshape_like"}  # tested below


def test_every_operator_is_tested() -> None:
    source = [case.build.__code__.co_names + case.expect.__code__.co_names for case in CASES.values()]
    named = {name for names in source for name in names} | set(CASES)
    for case in CASES.values():
        named |= {
            str(cell.cell_contents) for cell in case.build.__closure__ or () if isinstance(cell.cell_contents, str)
        }
    tested = {kind for kind in OPERATORS if kind in named or any(n.startswith(f"{kind}_") for n in CASES)}
    assert set(OPERATORS) - tested - CONSTANT - NOT_CONVERTED - {"conv", "scaled_dot_product_attention"} == set()


def _int(name: str, values: Any) -> np.ndarray:
    return np.asarray(values).astype(types.nptype_from_builtin(types.string_to_builtin(name)))


HALF = RNG.normal(size=(4, 6)).astype(np.float16)
CODES = RNG.integers(0, 16, (4, 6))
COMPRESSED: dict[str, tuple[Callable[[], Any], Callable[[], np.ndarray]]] = {
    "int4 in blocks": (
        lambda: mb.constexpr_blockwise_shift_scale(
            data=_int("int4", CODES - 8), scale=HALF[:, :3], offset=_int("int4", CODES[:, :3] - 8)
        ),
        lambda: constants.constexpr_blockwise_shift_scale.decompress(
            CODES - 8.0, HALF[:, :3].astype(np.float64), CODES[:, :3] - 8.0
        ),
    ),
    "uint4 without offset": (
        lambda: mb.constexpr_blockwise_shift_scale(data=_int("uint4", CODES), scale=HALF[:, :1].astype(np.float32)),
        lambda: CODES * HALF[:, :1].astype(np.float32),
    ),
    "int8 of rank 3": (
        lambda: mb.constexpr_blockwise_shift_scale(
            data=(CODES - 9).astype(np.int8).reshape(2, 2, 6), scale=HALF[:2, :3].reshape(2, 1, 3)
        ),
        lambda: (CODES - 9).reshape(2, 2, 6) * HALF[:2, :3].astype(np.float64).reshape(2, 1, 3).repeat(2, axis=2),
    ),
    "fp16 offset": (
        lambda: mb.constexpr_blockwise_shift_scale(
            data=CODES.astype(np.uint8), scale=HALF[:, :2], offset=np.float16(CODES[:, :2] + 0.5)
        ),
        lambda: constants.constexpr_blockwise_shift_scale.decompress(
            CODES.astype(np.float64), HALF[:, :2].astype(np.float64), CODES[:, :2] + 0.5
        ),
    ),
    "affine": (
        lambda: mb.constexpr_affine_dequantize(
            quantized_data=CODES.astype(np.uint8), zero_point=np.uint8([1, 2, 3, 4]), scale=HALF[:, 0], axis=0
        ),
        lambda: (CODES - np.array([[1], [2], [3], [4]])) * HALF[:, :1].astype(np.float64),
    ),
    "tables of groups": (
        lambda: mb.constexpr_lut_to_dense(
            indices=_int("uint3", CODES % 8), lut=HALF.reshape(-1)[:16].reshape(2, 1, 8, 1)
        ),
        lambda: np.concatenate([HALF.reshape(-1)[:8][CODES[:2] % 8], HALF.reshape(-1)[8:16][CODES[2:] % 8]]),
    ),
    "table of vectors": (
        lambda: mb.constexpr_lut_to_dense(
            indices=_int("uint2", CODES % 4), lut=HALF.reshape(-1)[:8].reshape(1, 1, 4, 2), vector_axis=0
        ),
        lambda: constants.constexpr_lut_to_dense.decompress(CODES % 4, HALF.reshape(-1)[:8].reshape(1, 1, 4, 2), 0),
    ),
    "sparse": (
        lambda: mb.constexpr_sparse_to_dense(
            nonzero_data=HALF[CODES > 7], mask=_int("uint1", (CODES > 7).astype(np.uint8))
        ),
        lambda: np.where(CODES > 7, HALF, 0),
    ),
    "sparse table": (
        lambda: _dense(
            mb.constexpr_lut_to_sparse(
                indices_mask=_int("uint1", (CODES > 7).astype(np.uint8)),
                indices_nonzero_data=_int("uint3", CODES[CODES > 7] % 8),
                lut=HALF.reshape(-1)[:8].reshape(1, 1, 8, 1),
            )
        ),
        lambda: np.where(CODES > 7, HALF.reshape(-1)[CODES % 8], 0),
    ),
    "sparse blocks": (
        lambda: _dense(
            mb.constexpr_sparse_blockwise_shift_scale(
                data_mask=_int("uint1", (CODES > 7).astype(np.uint8)),
                nonzero_data=_int("int4", CODES[CODES > 7] - 8),
                scale=HALF[:, :3],
            )
        ),
        lambda: np.where(CODES > 7, (CODES - 8) * HALF[:, :3].astype(np.float64).repeat(2, axis=1), 0),
    ),
    "cast": (lambda: mb.constexpr_cast(source_val=HALF, output_dtype="fp32"), lambda: HALF),
    "integers of six bits": (
        lambda: mb.constexpr_lut_to_dense(
            indices=_int("uint6", CODES * 4), lut=np.arange(64, dtype=np.float16).reshape(1, 1, 64, 1)
        ),
        lambda: CODES * 4.0,
    ),
}


def _dense(sparse: Any) -> Any:
    mask, nonzero = sparse
    return mb.constexpr_sparse_to_dense(nonzero_data=nonzero, mask=mask)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> dict[str, np.ndarray]:
    def build(x):
        made = [case() for case, _ in COMPRESSED.values()]
        return tuple(mb.add(x=w, y=mb.cast(x=x, dtype="fp16" if w.dtype == types.fp16 else "fp32")) for w in made)

    path = tmp_path_factory.mktemp("mil") / "compressed.mlpackage"
    interpreter = convert(path, {"x": mb.TensorSpec((1,), types.fp32)}, build)
    return dict(zip(COMPRESSED, interpreter.predict({"x": np.zeros(1, np.float32)}).values()))


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_constant(unpacked, name: str) -> None:
    wanted = np.asarray(COMPRESSED[name][1]())
    assert np.abs(wanted).max() > 0
    np.testing.assert_array_equal(unpacked[name], wanted.astype(unpacked[name].dtype))


def test_compressed_constants_of_older_systems() -> None:
    call: Any = mil_operators.Call("", "", 6, {}, {}, [], lambda c, t: c)
    packed = np.packbits(np.arange(12) % 4 // np.array([1, 2] * 6) % 2, bitorder="little")
    table = np.float32([3, 5, 7, 9])
    dense = OPERATORS["constexpr_lut_to_dense"].make(call)(packed, table, None, np.uint32([2, 3]))
    np.testing.assert_array_equal(
        dense, old_constants.constexpr_lut_to_dense.decompress(table, packed, np.uint32([2, 3]))
    )
    mask, values = np.uint8([0b10110]), np.float32([1, 2, 3])
    dense = OPERATORS["constexpr_sparse_to_dense"].make(call)(values, mask, np.uint32([5]))
    np.testing.assert_array_equal(dense, [0, 1, 2, 0, 3])


TINY = [
    0,
    -0.0,
    1e-9,
    -1e-9,
    2**-25,
    -(2**-25),
    3 * 2**-25,
    2**-24,
    1.5 * 2**-24,
    2.5 * 2**-24,
    2**-14,
    2**-14 - 2**-25,
]
TIES = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20, 2049, 2051, 4098, 4102, -2049]
HUGE = [65504, 65519.99, 65520, -65520, 1e30, np.inf, -np.inf, np.nan]
EDGES = np.float32([*TINY, *TIES, *HUGE])


@pytest.mark.parametrize("kind", ["any bits", "ordinary", "with an infinity", "subnormal", "edges"])
@pytest.mark.parametrize("size", [1, 7, 4096, PIECE + 5])
def test_rounding_is_that_of_a_cast(kind: str, size: int) -> None:
    rng = np.random.default_rng(size)
    values = rng.normal(size=size).astype(np.float32) * np.exp(rng.normal(size=size)).astype(np.float32)
    if kind == "any bits":
        values = rng.integers(0, 2**32, size, dtype=np.uint64).astype(np.uint32).view(np.float32)
    elif kind == "with an infinity":
        values[size // 2] = -np.inf
    elif kind == "subnormal":
        values *= np.float32(2**-20)
    elif kind == "edges":
        values = np.resize(EDGES[np.abs(EDGES) < 30000] if size > len(EDGES) else EDGES, size)
    with np.errstate(all="ignore"):
        half = values.astype(np.float16)
        wanted = half.astype(np.float32)
        found = round_half(values.copy())
        product = compute_half(np.multiply, [values, np.float32([[2]])], np.empty_like(values))
        doubled = (values * np.float32(2)).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))
    np.testing.assert_array_equal(product.view(np.uint32), doubled.view(np.uint32))
    np.testing.assert_array_equal(to_half(found).view(np.uint16), half.view(np.uint16))


def test_rounding_of_what_is_not_in_one_piece() -> None:
    x = np.linspace(-3, 3, 100 * 80, dtype=np.float32).reshape(80, 100).T
    wanted = x.astype(np.float16)
    np.testing.assert_array_equal(to_half(round_half(x)), wanted)


def test_a_kind_is_entered_once() -> None:
    with pytest.raises(ValueError, match=r"^add: is in the table already$"):
        operator("add")(lambda call: np.add)


OUT_OF_RANGE = {
    "gather": (lambda x, i: mb.gather(x=x, indices=i, axis=1), 3, "index 3 is out of range for axis 1 of 3 values"),
    "gather of a negative index": (
        lambda x, i: mb.gather(x=x, indices=i, axis=0),
        -1,
        "index -1 is out of range for axis 0 of 4 values",
    ),
    "gather_along_axis": (
        lambda x, i: mb.gather_along_axis(x=mb.slice_by_size(x=x, begin=[0, 0], size=[1, 3]), indices=i, axis=1),
        4,
        "index 4 is out of range for axis 1 of 3 values",
    ),
    "gather_nd": (
        lambda x, i: mb.gather_nd(x=x, indices=i),
        9,
        "index 9 is out of range for axis 0 of 4 values",
    ),
    "scatter": (
        lambda x, i: mb.scatter(data=x, indices=mb.reshape(x=i, shape=[2]), updates=np.float32(np.ones((2, 3)))),
        5,
        "index 5 is out of range for axis 0 of 4 values",
    ),
    "slice_by_size": (
        lambda x, i: mb.slice_by_size(x=x, begin=mb.reshape(x=i, shape=[2]), size=[2, 1]),
        3,
        "2 values from 3 on are outside axis 0 of 4 values",
    ),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_an_index_out_of_range_is_named(tmp_path, name: str) -> None:
    build, wrong, message = OUT_OF_RANGE[name]
    specs = {"x": mb.TensorSpec((4, 3)), "i": mb.TensorSpec((1, 2), types.int32)}
    interpreter = convert(tmp_path / "m.mlpackage", specs, lambda x, i: build(x, i))
    feeds = {"x": np.arange(12, dtype=np.float32).reshape(4, 3), "i": np.array([[wrong, 0]], np.int32)}
    with pytest.raises(UserError, match=rf"^main, operation \d+ \({name.split()[0]}\): {message}$"):
        interpreter.predict(feeds)
    interpreter.predict(feeds | {"i": np.array([[1, 0]], np.int32)})


def test_what_a_negative_index_meant_before_ios_17(tmp_path) -> None:
    """Also what 0 in a shape means: the same axis from the left."""
    with quiet():

        def build(x, i):
            return mb.gather(x=x, indices=i, axis=1), mb.reshape(x=x, shape=[0, -1])

        specs = [mb.TensorSpec((4, 3)), mb.TensorSpec((2,), types.int32)]
        model = ct.convert(
            mb.program(input_specs=specs, opset_version=ct.target.iOS16)(build), source="milinternal",
            skip_model_load=True, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS16,
            pass_pipeline=ct.PassPipeline.EMPTY,
        )  # fmt: skip
        model.save(str(tmp_path / "m.mlpackage"))
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    outputs = list(Interpreter(tmp_path / "m.mlpackage").predict({"x": x, "i": np.array([-1, 0], np.int32)}).values())
    np.testing.assert_array_equal(outputs[0], x[:, [-1, 0]])
    assert outputs[1].shape == (4, 3)


def test_what_is_computed_but_must_be_constant(tmp_path) -> None:
    interpreter = convert(
        tmp_path / "m.mlpackage", {"x": mb.TensorSpec((2, 3))}, lambda x: mb.softmax(x=mb.tanh(x=x), axis=0)
    )
    operations = interpreter.file.function("main").block.operations
    (softmax,) = (op for op in operations if op.type == "softmax")
    softmax.inputs["axis"].arguments[0].name = "x"
    with pytest.raises(PackageError, match=r"\(softmax\): axis is computed, the interpreter needs it constant$"):
        interpreter.prepare()
