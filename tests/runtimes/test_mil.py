"""Core ML packages without Core ML: files, functions, control flow, states, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from later import later

from rmse_edge.errors import PackageError, UserError, quiet
from rmse_edge.runtimes.mil.file import STORED, ModelFile, TensorType, WeightsFile, operations, unpack
from rmse_edge.runtimes.mil.interpreter import Interpreter
from rmse_edge.runtimes.mil.steps import Run

ct = later("coremltools")
mb = later("coremltools.converters.mil.mil:Builder")
types = later("coremltools.converters.mil.mil.types")
storage = later("coremltools.libmilstoragepython")

pytestmark = [pytest.mark.coreml, pytest.mark.slow]

W = np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32) / 3
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


def save(path: Path, specs: list[Any], build: Any, precision: Any = None) -> Path:
    """A program as it is written; with a precision, through coremltools' passes."""
    with quiet():
        more = {"compute_precision": precision} if precision else {"pass_pipeline": ct.PassPipeline.EMPTY}
        model = ct.convert(
            mb.program(input_specs=specs, opset_version=ct.target.iOS18)(build), source="milinternal",
            convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18, skip_model_load=True, **more,
        )  # fmt: skip
        model.save(str(path))
    return path


def looped(x: Any, limit: Any, kept: Any) -> Any:
    """h += tanh(h W) until `limit` iterations are done, each counted in the state."""

    def going(i, h):
        return mb.less(x=i, y=mb.squeeze(x=limit))

    def body(i, h):
        count = mb.add(x=mb.read_state(input=kept), y=np.float16(1))
        mb.coreml_update_state(state=kept, value=count)
        return mb.add(x=i, y=np.int32(1)), mb.add(x=h, y=mb.tanh(x=mb.linear(x=h, weight=W, name="product")))

    start = mb.sub(x=mb.squeeze(x=limit), y=mb.squeeze(x=limit))
    count, h = mb.while_loop(_cond=going, _body=body, loop_vars=(start, x))
    return mb.identity(x=h, name="h"), mb.identity(x=mb.expand_dims(x=count, axes=[0]), name="count")


def looped_specs() -> list[Any]:
    return [mb.TensorSpec((1, 8)), mb.TensorSpec((1,), types.int32), mb.StateTensorSpec((2, 3), types.fp16)]


def expected(x: np.ndarray, count: int) -> np.ndarray:
    for _ in range(count):
        x = x + np.tanh(x @ W.T)
    return x


@pytest.fixture(scope="module")
def looped_package(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("mil") / "looped.mlpackage", looped_specs(), looped)


@pytest.fixture
def copied(looped_package, tmp_path) -> Path:
    return Path(shutil.copytree(looped_package, tmp_path / "copied.mlpackage"))


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> Path:
    """A package of three functions that share weights: `single`, `double`, `halved`."""
    folder = tmp_path_factory.mktemp("mil")
    large = np.random.default_rng(2).normal(size=(64, 8)).astype(np.float32)
    builds = {
        "single": lambda x: mb.linear(x=x, weight=large, name="y"),
        "double": lambda x: mb.mul(x=mb.linear(x=x, weight=large), y=np.float32(2), name="y"),
        "halved": lambda x: mb.mul(x=mb.linear(x=x, weight=large), y=np.float32(0.5), name="y"),
    }
    described = ct.utils.MultiFunctionDescriptor()
    for name, build in builds.items():
        path = save(folder / f"{name}.mlpackage", [mb.TensorSpec((1, 8))], build)
        described.add_function(str(path), src_function_name="main", target_function_name=name)
    described.default_function_name = "double"
    with quiet():
        ct.utils.save_multifunction(described, str(folder / "all.mlpackage"))
    return folder / "all.mlpackage"


# Files.


def test_the_types_of_stored_entries_are_coremltools_own(tmp_path) -> None:
    path = tmp_path / "weight.bin"
    rng = np.random.default_rng(4)
    known = {
        "float16": ("fp16", np.uint16), "float32": ("float", np.float32), "uint8": ("uint8", np.uint8),
        "int8": ("int8", np.int8), "int16": ("int16", np.int16), "uint16": ("uint16", np.uint16),
        "int32": ("int32", np.int32), "uint32": ("uint32", np.uint32), "int4": ("int4", np.int8),
        **{f"uint{n}": (f"uint{n}", np.uint8) for n in (1, 2, 3, 4, 6)},
    }  # fmt: skip
    values, offsets = {}, {}
    writer = storage._BlobStorageWriter(str(path))
    for dtype, (called, array) in known.items():
        low, high = (-8, 8) if dtype == "int4" else (0, 1 << min(int(dtype.removeprefix("u").removeprefix("int")), 7)) \
            if dtype.startswith(("int", "uint")) else (0, 99)  # fmt: skip
        values[dtype] = rng.integers(low, high, 21).astype(array)
        offsets[dtype] = getattr(writer, f"write_{called}_data")(values[dtype])
    del writer
    file, reader = WeightsFile(path), storage._BlobStorageReader(str(path))
    assert set(known) == set(STORED.values()) - {"bfloat16"}
    for dtype, (called, array) in known.items():
        stored, _, nbytes, _ = file.entry(offsets[dtype])
        found = file.read(offsets[dtype], TensorType((3, 7), dtype))
        assert stored == dtype
        assert found.shape == (3, 7) and not found.flags.writeable
        np.testing.assert_array_equal(found.reshape(-1).view(array), values[dtype])
        np.testing.assert_array_equal(
            found.reshape(-1).view(array), np.asarray(getattr(reader, f"read_{called}_data")(offsets[dtype]))
        )
        if nbytes >= 21:  # no copy of what takes whole bytes
            assert np.shares_memory(found, file._bytes)


def test_unpacking_goes_across_bytes() -> None:
    np.testing.assert_array_equal(unpack(np.uint8([0b11_010_001, 0b1]), "uint3", 3), [1, 2, 7])
    np.testing.assert_array_equal(unpack(np.uint8([0x8F, 0x07]), "int4", 3), [-1, -8, 7])


def test_blobs_of_a_function(looped_package) -> None:
    file = ModelFile(looped_package)
    blobs = {blob.name: blob for blob in file.blobs(file.function("main"))}
    (product,) = (b for name, b in blobs.items() if name.startswith("product_weight"))
    assert product.type == TensorType((8, 8), "float32") and product.dtype == "float32" and product.nbytes == 256
    assert product.file == "weights/weight.bin" and product.place.startswith("main, operation ")
    raw = (looped_package / WEIGHTS).read_bytes()[product.data : product.data + 256]
    np.testing.assert_array_equal(np.frombuffer(raw, np.float32).reshape(8, 8), W)


def test_places_of_operations(looped_package) -> None:
    function = ModelFile(looped_package).function("main")
    found = list(operations(function))
    for operation in found:
        assert operation.place == f"main, operation {operation.number} ({operation.kind})"
        block: Any = function.block  # the number leads to the operation
        *path, last = operation.number.split(".")
        for index, called in zip(path[::2], path[1::2]):
            outer = block.operations[int(index)]
            block = outer.blocks[("condition", "body").index(called)]
        assert block.operations[int(last)] is operation.proto or block.operations[int(last)] == operation.proto
    kinds = {o.kind: o.number for o in found}
    loop = kinds["while_loop"]
    assert "." not in loop
    assert kinds["less"].startswith(f"{loop}.condition.") and kinds["write_state"].startswith(f"{loop}.body.")
    (write,) = (o for o in found if o.kind == "write_state")
    assert write.inputs["input"] == ["kept"] and not write.outputs


def damage_manifest(path: Path) -> None:
    (path / "Manifest.json").unlink()


def empty_manifest(path: Path) -> None:
    (path / "Manifest.json").write_text(json.dumps({"itemInfoEntries": {}}))


def no_model(path: Path) -> None:
    (path / MODEL).unlink()


def cut_model(path: Path) -> None:
    data = (path / MODEL).read_bytes()
    (path / MODEL).write_bytes(data[: len(data) * 2 // 3])


def other_model(path: Path) -> None:
    (path / MODEL).write_bytes(b"")


def no_weights(path: Path) -> None:
    (path / WEIGHTS).unlink()


def cut_weights(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[:200])


def shorter_weights(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[:100])


def no_sentinel(path: Path) -> None:
    data = bytearray((path / WEIGHTS).read_bytes())
    data[64:68] = b"\0\0\0\0"
    (path / WEIGHTS).write_bytes(data)


def another_type(path: Path) -> None:
    data = bytearray((path / WEIGHTS).read_bytes())
    data[68] = 1
    (path / WEIGHTS).write_bytes(data)


def unknown_type(path: Path) -> None:
    data = bytearray((path / WEIGHTS).read_bytes())
    data[68] = 99
    (path / WEIGHTS).write_bytes(data)


def another_version(path: Path) -> None:
    data = bytearray((path / WEIGHTS).read_bytes())
    data[4] = 3
    (path / WEIGHTS).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_manifest, "Manifest.json: is missing; .* is no Core ML package"),
        (empty_manifest, "Manifest.json: does not say where the model is; export the package again"),
        (no_model, "model.mlmodel: is missing or unreadable; export the package again"),
        (cut_model, "model.mlmodel: is damaged or cut off; export the package again"),
        (other_model, "model.mlmodel: holds no ML Program; export the package again"),
        (no_weights, "weight.bin: the weights' file is missing or empty; export the package again"),
        (cut_weights, "weight.bin: ends at 200 bytes, the entry at 64 needs 384"),
        (shorter_weights, "weight.bin: ends at 100 bytes, an entry at 64 is cut off; export the package again"),
        (no_sentinel, "weight.bin: no entry begins at 64: the file is damaged or another model's"),
        (another_type, r"weight.bin: the entry at 64 is 256 bytes of float16, the program says float32 \(8, 8\)"),
        (unknown_type, "weight.bin: the entry at 64 is of type 99, which is not known"),
        (another_version, "weight.bin: storage version is 3, expected 2; export it again"),
    ],
)
def test_damage_is_named(copied, damage, message: str) -> None:
    damage(copied)
    with pytest.raises(PackageError, match=rf"^{copied}.*{message}$") as caught:
        Interpreter(copied).prepare()
    assert "\n" not in str(caught.value)


def test_weights_from_outside_the_package(copied) -> None:
    interpreter = Interpreter(copied)
    for operation in operations(interpreter.file.function("main")):
        for _, value in operation.values():
            if value.WhichOneof("value") == "blobFileValue":
                value.blobFileValue.fileName = "@model_path/../../../weight.bin"
    with pytest.raises(PackageError, match=r"takes weights from .*, which is outside the package$"):
        interpreter.prepare()


# Functions.


def test_functions_of_a_package(functions) -> None:
    interpreter = Interpreter(functions)
    assert sorted(interpreter.functions) == ["double", "halved", "single"]
    assert interpreter.default_function == "double"
    x = np.random.default_rng(5).normal(size=(1, 8)).astype(np.float32)
    single = interpreter.predict({"x": x}, function="single")["y"]
    np.testing.assert_array_equal(interpreter.predict({"x": x})["y"], single * 2)
    np.testing.assert_array_equal(interpreter.predict({"x": x}, function="halved")["y"], single / 2)


def test_weights_of_all_functions_are_in_memory_once(functions) -> None:
    interpreter = Interpreter(functions)
    for name in interpreter.functions:
        interpreter.prepare(name)
    held = [v for v in interpreter._constants.values() if isinstance(v, np.ndarray) and v.size == 64 * 8]
    assert len(held) == 1


def test_signature(looped_package) -> None:
    interpreter = Interpreter(looped_package)
    signature = interpreter.signature("main")
    assert signature.inputs == {"x": TensorType((1, 8), "float32"), "limit": TensorType((1,), "int32")}
    assert signature.outputs == {"h": TensorType((1, 8), "float32"), "count": TensorType((1,), "int32")}
    assert signature.states == {"kept": TensorType((2, 3), "float16")}
    assert signature == interpreter.signature()


X = np.random.default_rng(6).normal(size=(1, 8)).astype(np.float32)
FEEDS = {"x": X, "limit": np.array([3], np.int32)}


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": X}, "main: input limit is missing; it takes x, limit"),
        (FEEDS | {"z": X}, "main: has no input z; it takes x, limit"),
        (FEEDS | {"x": X[0]}, r"main: input x is float32 \(8\), expected float32 \(1, 8\)"),
        (FEEDS | {"x": X[:, :7]}, r"main: input x is float32 \(1, 7\), expected float32 \(1, 8\)"),
        (FEEDS | {"x": X.astype(np.float16)}, r"main: input x is float16 \(1, 8\), expected float32 \(1, 8\)"),
        (FEEDS | {"limit": np.array([3])}, r"main: input limit is int64 \(1\), expected int32 \(1\)"),
        (FEEDS | {"limit": 3}, r"main: input limit is int, expected int32 \(1\)"),
    ],
)
def test_wrong_inputs_are_named(looped_package, feeds, message: str) -> None:
    with pytest.raises(UserError, match=rf"^{looped_package}: {message}$"):
        Interpreter(looped_package).predict(feeds)


def test_an_unknown_function_is_named(looped_package, functions) -> None:
    with pytest.raises(UserError, match=r"has no function step; it has main$"):
        Interpreter(looped_package).predict(FEEDS, function="step")
    with pytest.raises(UserError, match=r"has no function main; it has \w+, \w+, \w+$"):
        Interpreter(functions).signature("main")


def test_an_unknown_operator_is_found_before_anything_runs(looped_package) -> None:
    interpreter = Interpreter(looped_package)
    tanh = next(o for o in operations(interpreter.file.function("main")) if o.kind == "tanh")
    tanh.proto.type = "foo"
    place = rf"main, operation {tanh.number} \(foo\)".replace(".", r"\.")
    with pytest.raises(PackageError, match=rf"^{place}: the interpreter does not know the operator foo$"):
        interpreter.prepare("main")


def test_a_result_of_another_shape_than_declared(looped_package) -> None:
    interpreter = Interpreter(looped_package)
    tanh = next(o for o in operations(interpreter.file.function("main")) if o.kind == "tanh")
    tanh.proto.outputs[0].type.tensorType.dimensions[1].constant.size = 9
    with pytest.raises(PackageError, match=r"\(tanh\): gives float32 \(1, 8\), the file says float32 \(1, 9\); export"):
        interpreter.predict(FEEDS)


def test_a_name_that_nothing_makes(looped_package) -> None:
    interpreter = Interpreter(looped_package)
    tanh = next(o for o in operations(interpreter.file.function("main")) if o.kind == "tanh")
    tanh.proto.inputs["x"].arguments[0].name = "nowhere"
    with pytest.raises(PackageError, match=r"\(tanh\): takes nowhere, which nothing before it makes$"):
        interpreter.prepare()


# Control flow and states.


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_while_loop(looped_package, limit: int) -> None:
    interpreter = Interpreter(looped_package)
    state = interpreter.make_state("main")
    feeds = FEEDS | {"limit": np.array([limit], np.int32)}
    outputs = interpreter.predict(feeds, state, "main")
    assert interpreter.loop_iterations == [limit] and outputs["count"] == [limit]
    np.testing.assert_allclose(outputs["h"], expected(X, limit), rtol=1e-5, atol=1e-5)
    assert (state["kept"] == limit).all()
    outputs["h"][:] = 0
    np.testing.assert_allclose(interpreter.predict(feeds)["h"], expected(X, limit), rtol=1e-5, atol=1e-5)


def test_states_are_written_in_place(looped_package) -> None:
    interpreter = Interpreter(looped_package)
    state = interpreter.make_state()
    view = state["kept"][1:]
    for calls in (1, 2):
        interpreter.predict(FEEDS, state)
        assert (view == 3 * calls).all() and view.dtype == np.float16
    interpreter.predict(FEEDS)  # without a state: one of its own
    assert (view == 6).all()
    with pytest.raises(UserError, match=r"main: state kept is missing; it takes kept$"):
        interpreter.predict(FEEDS, {})
    with pytest.raises(UserError, match=r"main: state kept is float32 \(2, 3\), expected float16 \(2, 3\)$"):
        interpreter.predict(FEEDS, {"kept": np.zeros((2, 3), np.float32)})


def test_what_was_read_from_a_state_stays_when_it_is_written(tmp_path) -> None:
    def build(x, kept):
        before = mb.read_state(input=kept)
        after = mb.coreml_update_state(state=kept, value=mb.add(x=before, y=x))
        return mb.identity(x=before, name="before"), mb.identity(x=after, name="after")

    specs = [mb.TensorSpec((3,), types.fp16), mb.StateTensorSpec((3,), types.fp16)]
    interpreter = Interpreter(save(tmp_path / "m.mlpackage", specs, build))
    state = {"kept": np.float16([1, 2, 3]), "of another function": np.zeros(1)}
    outputs = interpreter.predict({"x": np.float16([10, 10, 10])}, state)
    np.testing.assert_array_equal(outputs["before"], [1, 2, 3])
    np.testing.assert_array_equal(outputs["after"], [11, 12, 13])
    np.testing.assert_array_equal(state["kept"], [11, 12, 13])
    state["kept"][:] = 0
    np.testing.assert_array_equal(outputs["after"], [11, 12, 13])


def test_nested_blocks_see_what_is_outside(tmp_path) -> None:
    """sum over i < rows of sum over j < columns of (j + 1 if i is even, else x), with the branches' own constants."""

    def build(x, rows, columns):
        rows, columns = mb.squeeze(x=rows), mb.squeeze(x=columns)
        zero = mb.sub(x=rows, y=rows)

        def row(i, total):
            def column(j, sub):
                even = mb.equal(x=mb.mod(x=i, y=np.int32(2)), y=np.int32(0))
                term = mb.cond(
                    pred=even,
                    _true_fn=lambda: mb.add(
                        x=mb.mul(x=x, y=np.float32(0)), y=mb.add(x=mb.cast(x=j, dtype="fp32"), y=np.float32(1))
                    ),
                    _false_fn=lambda: mb.mul(x=x, y=np.float32(1)),
                )
                return mb.add(x=j, y=np.int32(1)), mb.add(x=sub, y=term)

            # of its own: two loops that begin with one value have one name for two variables in coremltools' files
            first = mb.sub(x=columns, y=columns)
            start = mb.mul(x=x, y=np.float32(0))
            _, sub = mb.while_loop(_cond=lambda j, s: mb.less(x=j, y=columns), _body=column, loop_vars=(first, start))
            return mb.add(x=i, y=np.int32(1)), mb.add(x=total, y=sub)

        _, total = mb.while_loop(
            _cond=lambda i, t: mb.less(x=i, y=rows), _body=row, loop_vars=(zero, mb.mul(x=x, y=np.float32(0)))
        )
        return mb.identity(x=total, name="total")

    specs = [mb.TensorSpec((2,)), mb.TensorSpec((1,), types.int32), mb.TensorSpec((1,), types.int32)]
    interpreter = Interpreter(save(tmp_path / "m.mlpackage", specs, build))
    for _ in range(2):
        x = np.float32([0.5, 20])
        outputs = interpreter.predict({"x": x, "rows": np.int32([3]), "columns": np.int32([2])})
        np.testing.assert_array_equal(outputs["total"], 2 * (1 + 2) + 2 * x)
        assert interpreter.loop_iterations == [2, 2, 2, 3]  # inner loops end first
    numbers = [o.number for o in operations(interpreter.file.function("main")) if ".true." in o.number]
    assert numbers and all(".body." in n for n in numbers)


def test_intermediate_values_are_dropped(looped_package) -> None:
    interpreter = Interpreter(looped_package)
    interpreter.predict(FEEDS)
    prepared = interpreter._prepared["main"]
    values = prepared.template.copy()
    fed = {name: FEEDS[name] for name in prepared.signature.inputs}
    for name, _, slot in prepared.inputs:
        values[slot] = fed[name]
    prepared.block.run(Run(values, interpreter.make_state(), []))
    constants = {i for i, v in enumerate(prepared.template) if v is not None}
    left = {i for i, v in enumerate(values) if v is not None} - constants
    assert left == {slot for _, _, slot, _ in prepared.outputs}


def test_fp16_through_coremltools_passes(tmp_path) -> None:
    path = save(tmp_path / "m.mlpackage", looped_specs(), looped, ct.precision.FLOAT16)
    interpreter = Interpreter(path)
    h = X.astype(np.float16).astype(np.float32)
    half = W.astype(np.float16).astype(np.float32)
    for _ in range(3):  # one rounding per operation
        product = (h @ half.T).astype(np.float16).astype(np.float32)
        h = (h + np.tanh(product).astype(np.float16).astype(np.float32)).astype(np.float16).astype(np.float32)
    outputs = interpreter.predict(FEEDS)
    assert outputs["h"].dtype == np.float32
    np.testing.assert_allclose(outputs["h"], h, rtol=2**-9)


def test_fp16_inputs_and_outputs(tmp_path) -> None:
    path = save(
        tmp_path / "m.mlpackage", [mb.TensorSpec((3,), types.fp16)], lambda x: mb.mul(x=x, y=np.float16(0.1), name="y")
    )
    x = np.float16([1, 3, 60000])
    outputs = Interpreter(path).predict({"x": x})
    assert outputs["y"].dtype == np.float16
    np.testing.assert_array_equal(outputs["y"], x * np.float16(0.1))
