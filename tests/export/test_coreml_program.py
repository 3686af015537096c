"""Lowering to Core ML, function by function: the numbers of every form of weight, and of what is put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_builds import FULL, MODEL, Built, built, feeds_of, kinds_of, run, torch_results, traced
from helpers import mixed_model
from later import later
from small_models import small_config

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.errors import quiet
from rmse_edge.export.coreml.options import CoremlOptions
from rmse_edge.export.gate.methods import committed, compare_methods, example_feeds
from rmse_edge.export.pipeline import ExportRequest, as_cached, signatures
from rmse_edge.export.program import tensors_json, trace
from rmse_edge.export.targets import LowerOptions, get_target
from rmse_edge.layers.memory.atlas import newton_schulz
from rmse_edge.quantize import QuantizeRequest, Scheme, quantize
from rmse_edge.runtimes.engines.coreml import CoremlMethods, InterpreterEngine
from rmse_edge.runtimes.engines.torch import TorchMethods
from rmse_edge.runtimes.mil.file import ModelFile, WeightsFile, operations
from rmse_edge.runtimes.mil.interpreter import Interpreter

coreml_check = later("rmse_edge.export.coreml.check")
coreml_functions = later("rmse_edge.export.coreml.functions")
coreml_graph = later("rmse_edge.export.coreml.graph")
coreml_lower = later("rmse_edge.export.coreml.lower")
coreml_ops = later("rmse_edge.export.coreml.ops")

pytestmark = [pytest.mark.coreml, pytest.mark.slow]

USED = {"prelude": ("embed", "inject"), "head": ("head_proj",)}
FORMS: dict[str, dict[str, Any]] = {
    "int4 rows": {"scheme": Scheme("int4"), "compute": "cpu"},
    "int4 rows with zeros": {"scheme": Scheme("int4", symmetric=False), "compute": "gpu"},
    "int4 dense with zeros": {"scheme": Scheme("int4", symmetric=False), "compute": "ane"},
    "int8 rows": {"scheme": Scheme("int8"), "compute": "cpu"},
    "int8 dense": {"scheme": Scheme("int8"), "compute": "ane"},
}


def test_every_constant_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = quantize(mixed_model(), QuantizeRequest(Scheme("int4"), method="rtn"))
    step = built(made.model, "step", tmp_path, 1, made.quant, made.tensors, "cpu")
    read: list[int] = []
    true = WeightsFile.read
    monkeypatch.setattr(
        WeightsFile, "read", lambda self, offset, *rest: read.append(offset) or true(self, offset, *rest)
    )
    step.check({name: q for name, q in made.tensors.items() if name.startswith("block.")})
    assert len(read) == len(set(read)) > 10


@pytest.mark.parametrize("form", FORMS)
def test_a_step_on_integers_computes_what_they_stand_for(form: str, tmp_path: Path) -> None:
    """In float32, so that nothing but the integers can be wrong; and all of them are found in the file."""
    how = FORMS[form]
    made = quantize(mixed_model(), QuantizeRequest(how["scheme"], method="rtn"))
    step = built(made.model, "step", tmp_path, 1, made.quant, made.tensors, how["compute"], halves=False, states=False)
    used = {name: q for name, q in made.tensors.items() if name.startswith("block.")}
    coreml_check.check_integers(ModelFile(step.path), used)
    assert step.wanted.packed == kinds_of(step)[coreml_check.CONSTEXPR] == (7 if how["compute"] == "ane" else 5)
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
        coreml_check.check_integers(
            ModelFile(one.path), {k: q for k, q in made.tensors.items() if k.split(".")[0] in USED[name]}
        )
        assert one.wanted.packed == kinds_of(one)[coreml_check.CONSTEXPR] == packed
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
    for name, wanted in committed(model.spec(chunk), feeds | kept).items():
        np.testing.assert_allclose(state[name][:, None, :, :80, :24], wanted, atol=2e-2, err_msg=name)
        assert (state[name][:, :, 80:] == 7).all()


def test_a_loop_put_together_from_two_methods_computes_what_they_do(tmp_path: Path) -> None:
    """A model whose step has values of the names of others in `begin` and around it (temporal_rope)."""
    model = mixed_model(step_encoding="temporal_rope", step_dims=4)
    ready = coreml_ops.prepare(model, LowerOptions())
    with quiet(), coreml_lower.silenced_bars():
        methods = {name: traced(ready, name, 1) for name in ("begin", "step")}  # type: ignore[arg-type]
        assembly = coreml_functions.Assembly(
            model.spec(1), {name: coreml_lower.converted(m, False, "cpu") for name, m in methods.items()}, states=False
        )
        path = tmp_path / "loop.mlpackage"
        coreml_lower.saved(assembly.program("loop"), str(path))
    one = Built(path, coreml_check.expected(assembly, methods, "loop"), ready)  # type: ignore[arg-type]
    one.check(halves=False)
    feeds = example_feeds(model.spec(1), TorchMethods(model)) | {k: np.asarray(v) for k, v in FULL.items()}
    for depth in (4, 2):
        feeds["max_loops"] = np.array(depth)
        found, wanted = run(one, feeds), TorchMethods(model).run("loop", 1, feeds)
        assert found["iterations"].tolist() == [depth] and found["depth"].tolist() == wanted["depth"].tolist()
        np.testing.assert_allclose(found["h"], wanted["h"], atol=1e-4)
        np.testing.assert_allclose(found["new_keys"][:depth], wanted["new_keys"][:depth], atol=1e-4)


def twice(folder: Path, function: str) -> str | None:
    return coreml_graph.named_twice(ModelFile(folder / MODEL).function(function))


@pytest.mark.parametrize("quant", ["fp32", pytest.param("fp16", marks=pytest.mark.nightly)])
def test_a_puzzle_solver_is_lowered_too(quant: str, tmp_path: Path) -> None:
    """No context, no state, nothing emitted, no commit: nothing here is about text."""
    from puzzle import CELLS, Puzzle

    torch.manual_seed(0)
    model = Puzzle().eval()
    target = get_target("coreml")
    options = LowerOptions(quant=quant)
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


def convert(module: torch.nn.Module, x: torch.Tensor, precision: Any, path: Path) -> torch.export.ExportedProgram:
    """Save a module of one input as Core ML's converter makes it; the traced program that it was given.

    Args:
        precision: the name of one, or which operators are float16.
    """
    ct = later("coremltools")
    with quiet(), coreml_lower.silenced_bars():
        program = torch.export.export(module, (x,)).run_decompositions(coreml_ops.DECOMPOSITIONS)
        ct.convert(
            program,
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=getattr(ct.precision, precision)
            if isinstance(precision, str)
            else ct.transform.FP16ComputePrecision(op_selector=precision),
            skip_model_load=True,
        ).save(str(path))
    return program


class LogSoftmax(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(x, -1)


def test_unlikely_tokens_keep_their_log_probability_in_half_precision(tmp_path: Path) -> None:
    """e^-25 is no float16: its logarithm is wanted all the same, by exit rules that compare predictions."""
    logits = torch.tensor([[0.0, -1.0, -17.0, -25.0]])
    convert(LogSoftmax(), logits, "FLOAT16", tmp_path / MODEL)
    kinds = {op.kind for op in operations(ModelFile(tmp_path / MODEL).function("main"))}
    assert "softmax" not in kinds and "exp" in kinds
    interpreter = Interpreter(tmp_path / MODEL)
    (found,) = interpreter.predict({"x": logits.numpy()}).values()
    np.testing.assert_allclose(found, torch.log_softmax(logits, -1), rtol=2e-3)


class Learns(torch.nn.Module):
    """What a call reads, and what it leaves."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + 1, newton_schulz(x) - x


@pytest.mark.parametrize("replaced", [(), (1,)], ids=["nothing", "the second result"])
def test_what_a_layer_learns_is_no_float16(replaced: tuple[int, ...], tmp_path: Path) -> None:
    """Nothing learned has a length of zero, which is 1e-7 at least in float32: in float16 it is no number divided by it."""
    zeros = torch.zeros(1, 4, 6)
    convert(Learns(), zeros, later("rmse_edge.export.coreml.precision").Halving((), True, replaced), tmp_path / MODEL)
    found = list(Interpreter(tmp_path / MODEL).predict({"x": zeros.numpy()}).values())
    assert (found[0] == 1).all() and bool((found[1] == 0).all()) == bool(replaced)


class AllOfAnAxis(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] * 2


def test_all_of_an_axis_is_taken_for_what_it_is(tmp_path: Path) -> None:
    """A slice of a call of one row is an alias in a traced program, which the converter does not know."""
    x = torch.tensor([[[0.5, -2.0]]])
    program = convert(AllOfAnAxis(), x, "FLOAT32", tmp_path / MODEL)
    assert any(node.target == torch.ops.aten.alias.default for node in program.graph.nodes)
    (found,) = Interpreter(tmp_path / MODEL).predict({"x": x.numpy()}).values()
    np.testing.assert_array_equal(found, 2 * x)


def test_a_loop_may_carry_a_few_numbers_that_were_joined() -> None:
    """coremltools gives what a `concat` of few numbers makes a value of symbols, and a loop refuses one that changes."""
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    def build(like: Any) -> None:
        @mb.program(input_specs=[mb.TensorSpec((2,), types.fp32)], opset_version=ct.target.iOS18)
        def looped(x: Any) -> Any:
            def body(k: Any, x: Any) -> Any:
                return mb.add(x=k, y=np.float32(1)), like(mb.concat(values=[mb.mul(x=x, y=np.float32(2))], axis=0), x)

            first = mb.reduce_sum(x=mb.mul(x=x, y=np.float32(0)))
            return mb.while_loop(_cond=lambda k, x: mb.less(x=k, y=np.float32(3)), _body=body, loop_vars=(first, x))[1]

    build(coreml_functions._like)
    with pytest.raises(ValueError, match="after value changes"):  # so this still needs to be seen to
        build(lambda new, old: mb.identity(x=new))


def test_preparing_leaves_the_model_alone() -> None:
    model = mixed_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    assert coreml_ops.prepare(model, LowerOptions("fp16", own=CoremlOptions(compute="ane"))) is not model
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert coreml_check.ideal_bytes(model, {}, False) == 4 * sum(p.numel() for p in model.parameters())
