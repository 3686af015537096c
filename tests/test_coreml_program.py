"""Lowering to Core ML, function by function: numbers of every form of weight, and failures that the checks must see.

Converters leave things out and say nothing. Each such failure is planted here in a saved program, and caught.
"""

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
from helpers import mixed_model
from small_models import small_config

pytest.importorskip("coremltools")

from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types

from rmse_edge.errors import ExportError, PackageError, ParityError, quiet
from rmse_edge.export import coreml, coreml_check
from rmse_edge.export.coreml import converted, saved, silenced_bars
from rmse_edge.export.coreml_check import (
    CONSTEXPR,
    Expected,
    check,
    check_integers,
    check_weights,
    expected,
    ideal_bytes,
)
from rmse_edge.export.coreml_functions import OPSET, Assembly, Ring
from rmse_edge.export.coreml_graph import deciding, named_twice, operations_of, read_names
from rmse_edge.export.coreml_ops import prepare
from rmse_edge.export.parity import committed, compare_methods, example_feeds
from rmse_edge.export.pipeline import ExportRequest, as_cached, signatures
from rmse_edge.export.program import ExportedMethod, LoopProgram, Method, _traced, signature, tensors_json, trace
from rmse_edge.export.targets import LowerOptions, get_target
from rmse_edge.loop import TensorSpec
from rmse_edge.model import RMSE
from rmse_edge.package import Package
from rmse_edge.quantize import Quantized, QuantizedTensor, QuantizeRequest, Scheme, quantize
from rmse_edge.runtimes.coreml import CoremlMethods, InterpreterEngine
from rmse_edge.runtimes.mil import Interpreter
from rmse_edge.runtimes.mil_file import ModelFile, operations
from rmse_edge.runtimes.torch import TorchMethods

MODEL = "model.mlpackage"
FULL = {"max_loops": 4, "min_loops": 1, "exit_threshold": 1.0, "exit_epsilon": 0.0}


def traced(model: RMSE, name: str, chunk: int) -> ExportedMethod:
    spec = model.spec(chunk)
    return _traced(Method(model, spec, name, signature(spec, name, True)), (chunk,), lambda _: None)


@dataclasses.dataclass
class Built:
    """One function of a model, saved as "main"."""

    path: Path
    wanted: Expected
    model: RMSE  # as it was traced

    def check(self, tensors: dict[str, QuantizedTensor] | None = None, halves: bool = True) -> dict[str, Any]:
        return check(self.path, {"main": self.wanted}, tensors or {}, self.model, halves)


def built(
    model: RMSE,
    name: str,
    folder: Path,
    chunk: int = 1,
    quant: str = "fp16",
    tensors: dict[str, QuantizedTensor] | None = None,
    compute: str = "cpu",
    halves: bool | None = None,
    states: bool | None = None,
) -> Built:
    """Convert one method and save its function."""
    request = ExportRequest("coreml", quant)
    options = LowerOptions(quant=quant, tensors=tensors or {}, compute=compute)
    ready = prepare(as_cached(model, request), options)
    halves = quant != "fp32" if halves is None else halves
    with quiet(), silenced_bars():
        method = traced(ready, name, chunk)  # type: ignore[arg-type]
        assembly = Assembly(
            ready.spec(chunk),  # type: ignore[operator]
            {name: converted(method, halves, compute)},
            halves if states is None else states,
        )
        path = folder / f"{name}_{chunk}.mlpackage"
        shutil.rmtree(path, ignore_errors=True)
        saved(assembly.program(name), str(path))
    return Built(path, expected(assembly, {name: method}, name), ready)  # type: ignore[arg-type]


def kinds_of(built: Built) -> Counter[str]:
    return Counter(op.kind for op in operations(ModelFile(built.path).function("main")))


def run(
    built: Built, feeds: dict[str, np.ndarray], state: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Call a saved function on tensors of the LoopProgram."""
    interpreter = Interpreter(built.path)
    takes = interpreter.signature().inputs
    given = {name: np.asarray(feeds[name], t.array_dtype).reshape(t.shape) for name, t in takes.items()}  # type: ignore[arg-type]
    return interpreter.predict(given, state)


def feeds_of(model: RMSE, chunk: int) -> dict[str, Any]:
    """Made-up inputs of every method; of step those of iteration 1."""
    spec, methods = model.spec(chunk), TorchMethods(model)
    feeds = example_feeds(spec, methods)
    with torch.no_grad():
        carry, fixed = model.begin({k: torch.from_numpy(np.asarray(v)) for k, v in feeds.items()})
    carry["depth"] = torch.zeros(carry["active"].shape, dtype=torch.int64)
    rows = {t.name: feeds[t.name][1] for t in spec.state}
    values = feeds | {k: v.numpy() for k, v in (carry | fixed).items()} | rows | FULL | {"k": np.array(1)}
    return {k: np.asarray(v) for k, v in values.items()}


def torch_results(model: RMSE, name: str, chunk: int, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    spec = model.spec(chunk)
    method = Method(model, spec, name, signature(spec, name, True))
    dtypes = {t.name: t.dtype for t in method.takes}
    with torch.no_grad():
        out = method(*(torch.from_numpy(np.asarray(feeds[n])).to(d) for n, d in dtypes.items()))
    return {t.name: v.numpy() for t, v in zip(method.gives, out)}


# ---------------------------------------------------------------------------------------------------- every form


USED = {"prelude": ("embed", "inject"), "head": ("head_proj",)}
FORMS: dict[str, dict[str, Any]] = {
    "int4 rows": {"scheme": Scheme("int4"), "compute": "cpu"},
    "int4 rows with zeros": {"scheme": Scheme("int4", symmetric=False), "compute": "gpu"},
    "int4 dense with zeros": {"scheme": Scheme("int4", symmetric=False), "compute": "ane"},
    "int8 rows": {"scheme": Scheme("int8"), "compute": "cpu"},
    "int8 dense": {"scheme": Scheme("int8"), "compute": "ane"},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_step_on_integers_computes_what_they_stand_for(form: str, tmp_path: Path) -> None:
    """In float32, so that nothing but the integers can be wrong; and all of them are found in the file."""
    how = FORMS[form]
    made = quantize(mixed_model(), QuantizeRequest(how["scheme"], method="rtn"))
    step = built(made.model, "step", tmp_path, 1, made.quant, made.tensors, how["compute"], halves=False, states=False)
    used = {name: q for name, q in made.tensors.items() if name.startswith("block.")}
    check_integers(ModelFile(step.path), used)
    assert step.wanted.packed == kinds_of(step)[CONSTEXPR] == (7 if how["compute"] == "ane" else 5)
    model = as_cached(made.model, ExportRequest("coreml", made.quant))
    feeds = feeds_of(model, 1)
    found, wanted = run(step, feeds), torch_results(model, "step", 1, feeds)
    for name in ("next_h", "new_keys", "new_values", "next_log_survival"):
        size = np.abs(wanted[name]).max()
        np.testing.assert_allclose(found[name], wanted[name], atol=2e-5 * size, err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_embedding_and_head(tied: bool, quant: str, tmp_path: Path) -> None:
    """A table of which rows are fetched and a matrix; where they are the same weights, the matrix only."""
    torch.manual_seed(0)
    model = RMSE(small_config(tie_embeddings=tied, vocab_size=40)).eval()
    made = quantize(model, QuantizeRequest(Scheme(quant), method="rtn"))
    reference = as_cached(made.model, ExportRequest("coreml", quant))
    feeds = feeds_of(reference, 64)
    for name, packed in (("prelude", 2 if tied else 1), ("head", 1)):
        one = built(made.model, name, tmp_path, 64, quant, made.tensors, halves=False)
        check_integers(ModelFile(one.path), {k: q for k, q in made.tensors.items() if k.split(".")[0] in USED[name]})
        assert one.wanted.packed == kinds_of(one)[CONSTEXPR] == packed
        for key, wanted in torch_results(reference, name, 64, feeds).items():
            np.testing.assert_allclose(run(one, feeds)[key], wanted, atol=1e-4)


def test_float_experts_computed_as_one_product(tmp_path: Path) -> None:
    """On the Neural Engine, all experts of all rows; in float16, with a router and a gate in float32."""
    model = as_cached(mixed_model(), ExportRequest("coreml", "fp16"))
    step = built(mixed_model(), "step", tmp_path, 64, "fp16", compute="ane")
    assert "gather" not in {op.kind for op in operations(ModelFile(step.path).function("main")) if "proj" in op.place}
    feeds = feeds_of(model, 64)
    state = Interpreter(step.path).make_state()
    for name in state:  # loop 1 reads what `feeds` has for it
        row = feeds[name]
        state[name][1, :, : row.shape[2], : row.shape[3]] = row[0]
    found, wanted = run(step, feeds, state), torch_results(model, "step", 64, feeds)
    live = feeds["active"][0].astype(bool)
    error = (found["next_h"] - wanted["next_h"])[0, live]
    assert np.sqrt((error**2).mean()) < 0.02 * np.sqrt((wanted["next_h"][0, live] ** 2).mean())


@pytest.mark.parametrize(("chunk", "n_valid", "position"), [(64, 50, 75), (64, 64, 128), (1, 1, 159), (1, 1, 80)])
def test_commit_writes_the_valid_rows_into_their_slots(chunk: int, n_valid: int, position: int, tmp_path: Path) -> None:
    """A window that is no multiple of 32, heads of 24 channels, over the ring's end; nothing else changes."""
    model = RMSE(small_config(window=80, n_heads=2, n_kv_heads=2, head_dim=24)).eval()
    model = as_cached(model, ExportRequest("coreml", "fp16"))
    commit = built(model, "commit", tmp_path, chunk)
    assert commit.check()["state_writes"] == 2
    feeds = example_feeds(model.spec(chunk), TorchMethods(model))
    feeds |= {"position": np.array([position]), "n_valid": np.array([n_valid])}
    feeds |= TorchMethods(model).run("loop", chunk, feeds | {k: np.asarray(v) for k, v in FULL.items()})
    feeds["iterations"] = np.array(3)
    kept = TorchMethods(model).run("commit", chunk, feeds)
    state = Interpreter(commit.path).make_state()
    assert {array.shape for array in state.values()} == {(5, 2, 96, 32)}
    for name, array in state.items():
        array[:] = 7
        array[:, :, :80, :24] = feeds[name][:, 0]
    out = run(commit, feeds, state)
    assert out["committed"].tolist() == [position + n_valid]
    for name, wanted in committed(model.spec(chunk), feeds, kept).items():
        np.testing.assert_allclose(state[name][:, None, :, :80, :24], wanted, atol=2e-2, err_msg=name)
        assert (state[name][:, :, 80:] == 7).all()


def test_a_loop_put_together_from_two_methods_computes_what_they_do(tmp_path: Path) -> None:
    """A model whose step has values of the names of others in `begin` and around it (temporal_rope)."""
    model = mixed_model(step_encoding="temporal_rope", step_dims=4)
    ready = prepare(model, LowerOptions(compute="cpu"))
    with quiet(), silenced_bars():
        methods = {name: traced(ready, name, 1) for name in ("begin", "step")}  # type: ignore[arg-type]
        assembly = Assembly(
            model.spec(1), {name: converted(m, False, "cpu") for name, m in methods.items()}, states=False
        )
        path = tmp_path / "loop.mlpackage"
        saved(assembly.program("loop"), str(path))
    one = Built(path, expected(assembly, methods, "loop"), ready)  # type: ignore[arg-type]
    one.check(halves=False)
    feeds = example_feeds(model.spec(1), TorchMethods(model)) | {k: np.asarray(v) for k, v in FULL.items()}
    for depth in (4, 2):
        feeds["max_loops"] = np.array(depth)
        found, wanted = run(one, feeds), TorchMethods(model).run("loop", 1, feeds)
        assert found["iterations"].tolist() == [depth] and found["depth"].tolist() == wanted["depth"].tolist()
        np.testing.assert_allclose(found["h"], wanted["h"], atol=1e-4)
        np.testing.assert_allclose(found["new_keys"][:depth], wanted["new_keys"][:depth], atol=1e-4)


def twice(folder: Path, function: str) -> str | None:
    return named_twice(ModelFile(folder / MODEL).function(function))


@pytest.mark.parametrize("quant", ["fp32", "fp16"])
def test_a_puzzle_solver_is_lowered_too(quant: str, tmp_path: Path) -> None:
    """No context, no state, nothing emitted, no commit: nothing here is about text."""
    from puzzle import CELLS, Puzzle

    torch.manual_seed(0)
    model = Puzzle().eval()
    target = get_target("coreml")
    options = LowerOptions(quant=quant, compute="cpu")
    program = trace(target.prepare(model, options), (CELLS,), host_loop=True)  # type: ignore[misc, arg-type]
    made = target.lower(program, tmp_path, options)
    tables = {
        name: {"inputs": tensors_json(takes), "outputs": tensors_json(gives)}
        for name, (takes, gives) in signatures(program.specs, target, quant).items()
    }
    assert not [name for f in ModelFile(tmp_path / MODEL).functions if (name := twice(tmp_path, f))]
    assert list(tables) == ["prelude_16", "begin_16", "step_16", "loop_16", "head_16"]
    methods = CoremlMethods(InterpreterEngine(tmp_path / made["program"]), tables, made["rings"])
    dials = {"max_loops": 8, "min_loops": 1, "exit_threshold": 0.5}
    tolerance = 1e-5 if quant == "fp32" else 0.05
    worst = compare_methods(program, methods, dials, tolerance, quant == "fp16")
    assert set(worst) == set(tables)


# ---------------------------------------------------------------------------------------------- planted failures


def test_a_dropped_state_write_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing complains when a write to a state is left out: the program runs, and forgets."""
    monkeypatch.setattr(Ring, "write", lambda self, state, *_: mb.read_state(input=state))
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
    whole = Assembly._commit

    def traced_once(self: Assembly, given: Any, held: Any) -> Any:
        return whole(self, given | {"position": mb.const(val=np.zeros(1, np.int32))}, held)

    monkeypatch.setattr(Assembly, "_commit", traced_once)
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
        with Function({}, opset_version=OPSET):
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
    found = deciding(operations_of(function), function.block.outputs, step.wanted.decisions)
    kinds = Counter(op.kind for op in found)
    assert kinds["linear"] == 2 and kinds["topk"] == 1 and kinds["softplus"] == 1 and kinds["exp"] == 1
    products = [op for op in operations(function) if op.kind == "linear"]
    head = [op for op in products if next(iter(op.outputs.values())).shape[-1] == model.config.vocab_size]
    assert [t.dtype for op in head for t in op.outputs.values()] == ["float16"]


def program_of(inputs: dict[str, Any], body: Callable[..., Any], opset: Any = OPSET) -> Program:
    with Function(inputs, opset_version=opset) as function:
        made = body(**function.inputs)
        function.set_outputs(list(made) if isinstance(made, tuple) else [made])
    program = Program()
    program.add_function("main", function)
    return program


def save(program: Program, folder: Path) -> Path:
    path = folder / "p.mlpackage"
    with quiet(), silenced_bars():
        saved(program, str(path))
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
        check(path, {"main": Expected(frozenset("x"), frozenset({"kept"}), 0)}, {}, torch.nn.Linear(99, 99), True)


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
        check(path, {"main": Expected(frozenset("x"), frozenset({"kept"}), 0)}, {}, torch.nn.Linear(99, 99), True)


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
    assert read_names(operations_of(function), function.block.outputs) & set("xyz") == {"x", "z"}
    carried = next(op for op in operations(function) if op.kind == "while_loop").proto.outputs[2].name
    assert read_names(operations_of(function), [carried]) & set("xyz") == {"x", "y", "z"}


def test_a_name_of_two_values_is_seen(tmp_path: Path) -> None:
    """At one level, and where a nested block gives a name again that is known outside."""

    def body(x: Any, z: Any) -> Any:
        y = mb.mul(x=x, y=np.float32(2), name="y")
        more = lambda k, a: mb.squeeze(x=mb.less(x=k, y=z))  # noqa: E731
        again = lambda k, a: (mb.add(x=k, y=np.int32(1)), mb.add(x=a, y=y, name="inner"))  # noqa: E731
        return mb.while_loop(_cond=more, _body=again, loop_vars=(mb.mul(x=z, y=np.int32(0)), mb.add(x=x, y=y)))[1]

    inputs = {"x": mb.TensorSpec((4,), types.fp32), "z": mb.TensorSpec((1,), types.int32)}
    path = save(program_of(inputs, body), tmp_path)
    wanted = {"main": Expected(frozenset("xz"), frozenset(), 0)}
    check(path, wanted, {}, torch.nn.Linear(9, 9), False)
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
        check(path, wanted, {}, torch.nn.Linear(9, 9), False)
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
        check(path, {"main": Expected(frozenset("x"), frozenset({"kept"}), 0)}, {}, torch.nn.Linear(99, 99), True)


def test_weights_that_are_stored_twice_or_too_large_are_seen(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)

    def twice(x: Any) -> Any:
        return mb.linear(x=mb.linear(x=x, weight=weight), weight=weight.copy())

    path = save(program_of({"x": mb.TensorSpec((1, 128), types.fp32)}, twice), tmp_path)
    with pytest.raises(ExportError, match="again"):
        check_weights(ModelFile(path), 10**6)
    shutil.rmtree(path)
    path = save(
        program_of({"x": mb.TensorSpec((1, 128), types.fp32)}, lambda x: mb.linear(x=x, weight=weight)), tmp_path
    )
    assert check_weights(ModelFile(path), weight.nbytes)["weight_bytes"] >= weight.nbytes
    with pytest.raises(ExportError, match="some are stored twice or were not quantised"):
        check_weights(ModelFile(path), weight.nbytes // 2)


def test_a_program_of_another_system_is_seen(tmp_path: Path) -> None:
    body = lambda x: mb.mul(x=x, y=np.float32(2))  # noqa: E731
    path = save(program_of({"x": mb.TensorSpec((1, 64), types.fp32)}, body), tmp_path)
    wanted = {"main": Expected(frozenset("x"), frozenset(), 0)}
    assert check(path, wanted, {}, torch.nn.Linear(9, 9), False)["operators"] == 1
    file = ModelFile(path)
    file.spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations[-1].type = "rotary"
    file.model_path.write_bytes(file.spec.SerializeToString())
    with pytest.raises(ExportError, match=r"main, operation \d+ \(rotary\): iOS 18 has no such operator"):
        check(path, wanted, {}, torch.nn.Linear(9, 9), False)
    with pytest.raises(ExportError, match="step_1 is not in the saved program; it has main"):
        check(path, {"step_1": wanted["main"]}, {}, torch.nn.Linear(9, 9), False)


def test_scales_beyond_float16_are_refused(int4: Quantized) -> None:
    name, q = next(iter(int4.tensors.items()))
    huge = {name: dataclasses.replace(q, scales=q.scales * 1e9)}
    with pytest.raises(ExportError, match=f"{name}: has scales beyond float16's range"):
        prepare(int4.model, LowerOptions(quant="int4", tensors=huge, compute="cpu"))


def test_preparing_leaves_the_model_alone() -> None:
    model = mixed_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    assert prepare(model, LowerOptions(compute="ane", quant="fp16")) is not model
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert ideal_bytes(model, {}, False) == 4 * sum(p.numel() for p in model.parameters())
    assert coreml_check.SLACK == 1.05
    assert TensorSpec("x", ()).shape == ()
