"""Failures that converters make and say nothing of, planted in saved Core ML programs: the checks must see each."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_builds import FULL, MODEL, built
from helpers import mixed_model
from later import later

from rmse_edge.errors import ExportError, PackageError, ParityError, quiet
from rmse_edge.export.gate.methods import compare_methods
from rmse_edge.export.pipeline import ExportRequest, as_cached
from rmse_edge.export.program import LoopProgram
from rmse_edge.export.targets import LowerOptions
from rmse_edge.package import Package
from rmse_edge.quantize import Quantized, QuantizedTensor, QuantizeRequest, Scheme, quantize
from rmse_edge.runtimes.engines.coreml import CoremlMethods, InterpreterEngine
from rmse_edge.runtimes.mil.file import ModelFile, operations
from rmse_edge.runtimes.mil.interpreter import Interpreter

mb = later("coremltools.converters.mil.mil:Builder")
mil = later("coremltools.converters.mil.mil")
types = later("coremltools.converters.mil.mil.types")
coreml = later("rmse_edge.export.coreml.lower")
coreml_check = later("rmse_edge.export.coreml.check")
coreml_functions = later("rmse_edge.export.coreml.functions")
coreml_graph = later("rmse_edge.export.coreml.graph")
coreml_lower = later("rmse_edge.export.coreml.lower")
coreml_ops = later("rmse_edge.export.coreml.ops")

pytestmark = [pytest.mark.coreml, pytest.mark.slow]


def test_a_dropped_state_write_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing complains when a write to a state is left out: the program runs, and forgets."""
    monkeypatch.setattr(coreml_functions.Ring, "write", lambda self, state, *_: mb.read_state(input=state))
    commit = built(mixed_model(), "commit", tmp_path)
    with pytest.raises(ExportError, match="writes no state, expected past_keys, past_values"):
        commit.check()


def without_a_write(block: Any) -> None:
    del next(op for op in block.operations if op.type == "write_state").inputs["data"].arguments[:]
    rest = [op for op in block.operations if not (op.type == "write_state" and not op.inputs["data"].arguments)]
    kept = [type(op).FromString(op.SerializeToString()) for op in rest]
    del block.operations[:]
    block.operations.extend(kept)


def at_a_fixed_position(block: Any) -> None:
    """The slot is that of another number than the position, whatever the host says."""
    slot = next(op for op in block.operations if op.type == "mod")
    slot.inputs["x"].arguments[0].name = "n_valid"


@pytest.mark.parametrize("plant", [without_a_write, at_a_fixed_position])
def test_a_wrong_commit_fails_the_gate_by_its_numbers(
    plant: Callable[[Any], None], coreml_int4: Path, calm: Quantized, tmp_path: Path
) -> None:
    """Also where a program looks right: the rings after a call are compared with what PyTorch would have left."""
    copy = tmp_path / MODEL
    shutil.copytree(coreml_int4 / MODEL, copy)
    file = ModelFile(copy)
    for name in ("commit_1", "commit_64"):
        plant(file.function(name).block)
    file.model_path.write_bytes(file.spec.SerializeToString())
    model = as_cached(calm.model, ExportRequest("coreml", "int4"))
    manifest = Package.open(coreml_int4).manifest
    program = LoopProgram(model, {rows: model.spec(rows) for rows in (1, 64)}, ())
    rings = manifest["lowering"]["rings"]
    good = CoremlMethods(InterpreterEngine(coreml_int4 / MODEL), manifest["methods"], rings)
    compare_methods(program, good, FULL, 0.1, mean_square=True)
    bad = CoremlMethods(InterpreterEngine(copy), manifest["methods"], rings)
    with pytest.raises(ParityError, match="commit_1: past_"):
        compare_methods(program, bad, FULL, 0.1, mean_square=True)


def test_a_position_that_became_a_constant_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracer that saw one position may write into its slot for ever."""
    whole = coreml_functions.Assembly._commit

    def traced_once(self: coreml_functions.Assembly, given: Any, held: Any) -> Any:
        return whole(self, given | {"position": mb.const(val=np.zeros(1, np.int32))}, held)

    monkeypatch.setattr(coreml_functions.Assembly, "_commit", traced_once)
    commit = built(mixed_model(), "commit", tmp_path)
    with pytest.raises(ExportError, match="does not read position: the converter made it a constant"):
        commit.check()


@pytest.fixture(scope="module")
def int4() -> Quantized:
    return quantize(mixed_model(), QuantizeRequest(Scheme("int4"), method="rtn"))


def block_of(int4: Quantized) -> dict[str, QuantizedTensor]:
    return {name: q for name, q in int4.tensors.items() if name.startswith("block.attention.kv")}


def test_a_weight_that_was_not_quantised_is_seen(int4: Quantized, tmp_path: Path) -> None:
    """Floats that were never packed: the integers are not in the file."""
    left = {name: q for name, q in int4.tensors.items() if name not in block_of(int4)}
    commit = built(int4.model, "commit", tmp_path, quant="int4", tensors=left)
    with pytest.raises(ExportError, match=r"block\.attention\.kv_proj\.weight: the saved program does not hold"):
        commit.check(block_of(int4))


def test_a_weight_that_was_unpacked_on_the_way_is_seen(
    int4: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traced program uses integers, and the saved one does not."""
    plain = mb.constexpr_blockwise_shift_scale

    def folded(**kwargs: Any) -> Any:
        with mil.Function({}, opset_version=coreml_functions.OPSET):
            values = plain(**{k: v for k, v in kwargs.items() if k != "name"}).op.materialized_val_inference()
        return mb.const(val=values, name=kwargs["name"])

    monkeypatch.setattr(mb, "constexpr_blockwise_shift_scale", folded)
    commit = built(int4.model, "commit", tmp_path, quant="int4", tensors=int4.tensors)
    with pytest.raises(ExportError, match="stores 0 weights packed, expected 1"):
        commit.check(block_of(int4))


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_other_integers_or_scales_are_seen(int4: Quantized, part: str, tmp_path: Path) -> None:
    """One code or one scale of one weight is another."""
    (name, q), *_ = block_of(int4).items()
    tensor = getattr(q, part).clone()
    tensor.view(-1)[5] = tensor.view(-1)[5] ^ 1 if part == "codes" else tensor.view(-1)[5] * 2
    commit = built(int4.model, "commit", tmp_path, quant="int4", tensors=int4.tensors)
    commit.check({name: q})
    with pytest.raises(ExportError, match="does not hold its integers and scales"):
        commit.check({name: dataclasses.replace(q, **{part: tensor})})


@pytest.mark.parametrize(
    "full",
    [
        {"topk", "add", "softmax", "gather_along_axis", "softplus", "sub", "select"},  # products in float16, then cast
        {
            "topk",
            "linear",
            "softplus",
            "sub",
            "select",
            "softmax",
            "gather_along_axis",
        },  # the sum with the step's logits
        {"topk", "linear", "add", "softmax", "gather_along_axis", "reduce_sum", "mul"},  # survival
    ],
)
def test_decisions_in_float16_are_seen(full: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a cast to float32 stands before what picks; `full` are the operators that were left alone."""
    monkeypatch.setattr(coreml, "Halving", lambda *_: lambda op: op.op_type not in full)
    step = built(mixed_model(), "step", tmp_path)
    with pytest.raises(ExportError, match="decides in float16, expected float32"):
        step.check()


def test_what_decides_is_float32_and_stays_it_on_the_way_out(tmp_path: Path) -> None:
    """Also with the entropy rule, whose head is float16 as elsewhere: what follows it is not."""
    model = mixed_model(exit_rules=("gate", "delta", "entropy"), exit_entropy=2.0)
    step = built(model, "step", tmp_path)
    assert step.wanted.decisions == {"next_active", "next_depth", "next_log_survival", "any_active"}
    step.check()
    function = ModelFile(step.path).function("main")
    found = coreml_graph.deciding(coreml_graph.operations_of(function), function.block.outputs, step.wanted.decisions)
    kinds = Counter(op.kind for op in found)
    # Two topk: see `best_portable`. Two exp: of the entropy, and of the log-probabilities that it is of.
    assert kinds["linear"] == 2 and kinds["topk"] == 2 and kinds["softplus"] == 1 and kinds["exp"] == 2
    products = [op for op in operations(function) if op.kind == "linear"]
    head = [op for op in products if next(iter(op.outputs.values())).shape[-1] == model.config.vocab_size]
    assert [t.dtype for op in head for t in op.outputs.values()] == ["float16"]


def program_of(inputs: dict[str, Any], body: Callable[..., Any], opset: Any = None) -> mil.Program:
    with mil.Function(inputs, opset_version=opset or coreml_functions.OPSET) as function:
        made = body(**function.inputs)
        function.set_outputs(list(made) if isinstance(made, tuple) else [made])
    program = mil.Program()
    program.add_function("main", function)
    return program


def save(program: mil.Program, folder: Path) -> Path:
    path = folder / "p.mlpackage"
    with quiet(), coreml_lower.silenced_bars():
        coreml_lower.saved(program, str(path))
    return path


def test_a_result_that_is_a_states_new_value_is_seen(tmp_path: Path) -> None:
    """Core ML may hand out the old or the new one."""

    def body(x: Any, kept: Any) -> Any:
        new = mb.add(x=mb.read_state(input=kept), y=mb.cast(x=x, dtype="fp16"))
        mb.coreml_update_state(state=kept, value=new)
        return new

    inputs = {"x": mb.TensorSpec((32, 32), types.fp32), "kept": mb.StateTensorSpec((32, 32), types.fp16)}
    path = save(program_of(inputs, body), tmp_path)
    with pytest.raises(ExportError, match="a result of the function is what is written"):
        coreml_check.check(
            path,
            {"main": coreml_check.Expected(frozenset("x"), frozenset({"kept"}), 0)},
            {},
            torch.nn.Linear(99, 99),
            True,
        )


@pytest.mark.parametrize("moved", [lambda x: mb.identity(x=x), lambda x: mb.reshape(x=x, shape=(32, 32, 1))])
def test_a_result_that_is_a_states_new_value_in_another_form_is_seen(
    moved: Callable[[Any], Any], tmp_path: Path
) -> None:
    def body(x: Any, kept: Any) -> Any:
        new = mb.add(x=mb.read_state(input=kept), y=mb.cast(x=x, dtype="fp16"))
        mb.coreml_update_state(state=kept, value=new)
        return moved(new)

    inputs = {"x": mb.TensorSpec((32, 32), types.fp32), "kept": mb.StateTensorSpec((32, 32), types.fp16)}
    path = save(program_of(inputs, body), tmp_path)
    with pytest.raises(ExportError, match="a result of the function is what is written"):
        coreml_check.check(
            path,
            {"main": coreml_check.Expected(frozenset("x"), frozenset({"kept"}), 0)},
            {},
            torch.nn.Linear(99, 99),
            True,
        )


def test_an_input_that_a_loop_reads_in_vain_is_seen(tmp_path: Path) -> None:
    """The body uses `y` for a value that it carries and nobody asks for, and `z` for how often it runs."""

    def body(x: Any, y: Any, z: Any) -> Any:
        zero = mb.mul(x=z, y=np.int32(0))
        more = lambda k, a, b: mb.squeeze(x=mb.less(x=k, y=z))  # noqa: E731
        again = lambda k, a, b: (mb.add(x=k, y=np.int32(1)), mb.mul(x=a, y=a), mb.add(x=b, y=y))  # noqa: E731
        return mb.while_loop(_cond=more, _body=again, loop_vars=(zero, x, mb.mul(x=x, y=np.float32(2))))[1]

    inputs = {name: mb.TensorSpec((4,), types.fp32) for name in "xy"} | {"z": mb.TensorSpec((1,), types.int32)}
    file = ModelFile(save(program_of(inputs, body), tmp_path))
    function = file.function("main")
    assert coreml_graph.read_names(coreml_graph.operations_of(function), function.block.outputs) & set("xyz") == {
        "x",
        "z",
    }
    carried = next(op for op in operations(function) if op.kind == "while_loop").proto.outputs[2].name
    assert coreml_graph.read_names(coreml_graph.operations_of(function), [carried]) & set("xyz") == {"x", "y", "z"}


def test_a_name_of_two_values_is_seen(tmp_path: Path) -> None:
    """At one level, and where a nested block gives a name again that is known outside."""

    def body(x: Any, z: Any) -> Any:
        y = mb.mul(x=x, y=np.float32(2), name="y")
        more = lambda k, a: mb.squeeze(x=mb.less(x=k, y=z))  # noqa: E731
        again = lambda k, a: (mb.add(x=k, y=np.int32(1)), mb.add(x=a, y=y, name="inner"))  # noqa: E731
        return mb.while_loop(_cond=more, _body=again, loop_vars=(mb.mul(x=z, y=np.int32(0)), mb.add(x=x, y=y)))[1]

    inputs = {"x": mb.TensorSpec((4,), types.fp32), "z": mb.TensorSpec((1,), types.int32)}
    path = save(program_of(inputs, body), tmp_path)
    wanted = {"main": coreml_check.Expected(frozenset("xz"), frozenset(), 0)}
    coreml_check.check(path, wanted, {}, torch.nn.Linear(9, 9), False)
    file = ModelFile(path)
    loop = next(op for op in operations(file.function("main")) if op.kind == "while_loop")
    inner = next(op for op in loop.proto.blocks[1].operations if op.outputs[0].name == "inner")
    inner.outputs[0].name = loop.proto.blocks[1].outputs[1] = "y"
    file.model_path.write_bytes(file.spec.SerializeToString())
    feeds = {"x": np.ones(4, np.float32), "z": np.array([3], np.int32)}
    assert Interpreter(path).predict(feeds)  # an inner value may hide an outer one, as the language has it
    with pytest.raises(
        ExportError, match=r"body\.\d+ \(add\): y is also made by main, operation \d+ \(mul\); names must"
    ):
        coreml_check.check(path, wanted, {}, torch.nn.Linear(9, 9), False)
    other = next(op for op in operations(file.function("main")) if op.kind == "mul" and "y" not in op.outputs)
    other.proto.outputs[0].name = "y"
    file.model_path.write_bytes(file.spec.SerializeToString())
    with pytest.raises(PackageError, match=r"main, operation \d+ \(mul\): gives y, a name that has a value"):
        Interpreter(path).predict(feeds)


def test_a_state_that_the_neural_engine_does_not_take_is_seen(tmp_path: Path) -> None:
    def body(x: Any, kept: Any) -> Any:
        mb.coreml_update_state(state=kept, value=mb.cast(x=x, dtype="fp16"))
        return mb.mul(x=x, y=np.float32(2))

    inputs = {"x": mb.TensorSpec((32, 20), types.fp32), "kept": mb.StateTensorSpec((32, 20), types.fp16)}
    path = save(program_of(inputs, body), tmp_path)
    with pytest.raises(ExportError, match="last two axes must be multiples of 32"):
        coreml_check.check(
            path,
            {"main": coreml_check.Expected(frozenset("x"), frozenset({"kept"}), 0)},
            {},
            torch.nn.Linear(99, 99),
            True,
        )


def test_weights_that_are_stored_twice_or_too_large_are_seen(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)

    def twice(x: Any) -> Any:
        return mb.linear(x=mb.linear(x=x, weight=weight), weight=weight.copy())

    path = save(program_of({"x": mb.TensorSpec((1, 128), types.fp32)}, twice), tmp_path)
    with pytest.raises(ExportError, match="again"):
        coreml_check.check_weights(ModelFile(path), 10**6)
    shutil.rmtree(path)
    path = save(
        program_of({"x": mb.TensorSpec((1, 128), types.fp32)}, lambda x: mb.linear(x=x, weight=weight)), tmp_path
    )
    assert coreml_check.check_weights(ModelFile(path), weight.nbytes)["weight_bytes"] >= weight.nbytes
    with pytest.raises(ExportError, match="some are stored twice or were not quantised"):
        coreml_check.check_weights(ModelFile(path), weight.nbytes // 2)


def test_tables_of_places_are_no_weights(tmp_path: Path) -> None:
    """Of a recurrence in blocks; the weights beside them count as before."""
    weight = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    distance = np.subtract.outer(np.arange(128), np.arange(128))

    def tabled(x: Any) -> Any:
        y = mb.linear(x=mb.mul(x=x, y=distance.astype(np.float32)), weight=weight)
        return mb.select(cond=distance > 0, a=y, b=np.where(distance > 5, np.float32(-1e9), np.float32(0)))

    path = save(program_of({"x": mb.TensorSpec((128, 128), types.fp32)}, tabled), tmp_path)
    found = coreml_check.check_weights(ModelFile(path), weight.nbytes)
    assert found["table_bytes"] >= 2 * 128 * 128 * 4 and found["weight_bytes"] < weight.nbytes + 1024
    with pytest.raises(ExportError, match="some are stored twice or were not quantised"):
        coreml_check.check_weights(ModelFile(path), weight.nbytes // 2)


def test_a_program_of_another_system_is_seen(tmp_path: Path) -> None:
    body = lambda x: mb.mul(x=x, y=np.float32(2))  # noqa: E731
    path = save(program_of({"x": mb.TensorSpec((1, 64), types.fp32)}, body), tmp_path)
    wanted = {"main": coreml_check.Expected(frozenset("x"), frozenset(), 0)}
    assert coreml_check.check(path, wanted, {}, torch.nn.Linear(9, 9), False)["operators"] == 1
    file = ModelFile(path)
    file.spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations[-1].type = "rotary"
    file.model_path.write_bytes(file.spec.SerializeToString())
    with pytest.raises(ExportError, match=r"main, operation \d+ \(rotary\): iOS 18 has no such operator"):
        coreml_check.check(path, wanted, {}, torch.nn.Linear(9, 9), False)
    with pytest.raises(ExportError, match="step_1 is not in the saved program; it has main"):
        coreml_check.check(path, {"step_1": wanted["main"]}, {}, torch.nn.Linear(9, 9), False)


def test_scales_beyond_float16_are_refused(int4: Quantized) -> None:
    name, q = next(iter(int4.tensors.items()))
    huge = {name: dataclasses.replace(q, scales=q.scales * 1e9)}
    with pytest.raises(ExportError, match=f"{name}: has scales beyond float16's range"):
        coreml_ops.prepare(int4.model, LowerOptions("int4", huge))
