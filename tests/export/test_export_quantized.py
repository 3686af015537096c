"""int8 and int4 in ONNX packages: the operators, the numbers, the size, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    ALPHABET,
    assert_one_line,
    decisive_model,
    mixed_model,
    random_tokens,
    remembering_model,
    tiny_config,
)
from later import later
from memo import Memo

from rmse_edge import files
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.bench import main as bench
from rmse_edge.cli.export import main as export
from rmse_edge.errors import ExportError, ParityError, UserError
from rmse_edge.export import ExportRequest, OnnxOptions, export_package
from rmse_edge.export import targets as registry
from rmse_edge.export.gate.methods import example_feeds
from rmse_edge.export.program import ExportedMethod, Method
from rmse_edge.export.targets import LowerOptions, get_target, target
from rmse_edge.layers.held import weights_of_codes
from rmse_edge.package import Package
from rmse_edge.quantize import Format, Quantized, QuantizedTensor, QuantizeRequest, Scheme, quantize, save_quantized
from rmse_edge.quantize.tensors import round_to_nearest
from rmse_edge.runtimes import Dials, open_runtime
from rmse_edge.runtimes.engines.onnx import SMALLEST, OnnxRuntime
from rmse_edge.runtimes.engines.torch import TorchMethods
from rmse_edge.runtimes.host.base import Arrays

onnx = later("onnx")
onnxruntime = later("onnxruntime")
TensorProto = later("onnx:TensorProto")
helper = later("onnx.helper")
numpy_helper = later("onnx.numpy_helper")
onnx_lower = later("rmse_edge.export.onnx.lower")
onnx_ops = later("rmse_edge.export.onnx.ops")
onnx_passes = later("rmse_edge.export.onnx.passes")
onnx_quantize = later("rmse_edge.export.onnx.quantize")
onnx_weights = later("rmse_edge.export.onnx.weights")

pytestmark = [pytest.mark.onnx, pytest.mark.slow]


def rounded(model: RMSE, **scheme: Any) -> Quantized:
    return quantize(model, QuantizeRequest(Scheme(**scheme), method="rtn"))


def calibrated(checkpoint: Path) -> Quantized:
    """The model of the package `int4`: equal texts and flags make equal integers, and the traced program is reused."""
    request = QuantizeRequest(calibration_tokens=512, evaluation_tokens=128)
    return quantize(load_checkpoint(checkpoint), request, random_tokens(4000, 5), "f")


def text_file(folder: Path) -> Path:
    path = folder / "calibrate.txt"
    path.write_text("".join(ALPHABET[i] for i in random_tokens(4000, 5)))
    return path


@pytest.fixture(scope="module")
def int4(checkpoint: Path, memo: Memo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`rmse-export --quant int4 --calibrate FILE` in one go, activations in float32, the parity gate included."""
    folder = tmp_path_factory.mktemp("int4")
    flags = ["--calibration-tokens", "512", "--evaluation-tokens", "128", "--accuracy-level", "0"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        memo.install(monkeypatch)
        argv = [
            "-m",
            str(checkpoint),
            "-o",
            str(folder / "q.rmse"),
            "--quant",
            "int4",
            "--calibrate",
            str(text_file(folder)),
        ]
        assert export([*argv, *flags]) == 0
    return folder / "q.rmse"


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in onnx_passes.subgraphs(node):
            yield from nodes(inner)


# -------------------------------------------------------------------------------------------------------- the package


def test_the_gate_passes_exactly_where_activations_are_float(int4: Path, checkpoint: Path) -> None:
    """Against PyTorch with the dequantised weights an int4 package is as exact as an fp32 one."""
    manifest = Package.open(int4).manifest
    assert manifest["parity"]["rule"] == "exact"
    assert all(s["max_logit_difference"] <= 1e-4 for s in manifest["parity"]["settings"].values())
    assert manifest["model"]["quant"] == "int4"
    assert manifest["model"]["fingerprint"] == open_runtime(checkpoint).info.fingerprint  # type: ignore[union-attr]
    stored = manifest["quantization"]
    assert (stored["weights"], stored["accuracy_level"]) == ("int4", 0)
    assert stored["tensors"]["block.experts.down_proj"]["group"] == 32
    assert stored["evaluation"]["full_depth"]["kl"] > 0


def test_integers_are_read_by_the_operators_for_them(int4: Path) -> None:
    """Five MatMulNBits and one QMoE in the loop's body, the embedding gathered by blocks, scales in float32, and no float
    form of a quantised weight anywhere."""
    graphs = {p.stem: onnx.load(p, load_external_data=False) for p in int4.glob("*.onnx")}
    ops = {name: Counter(n.op_type for n in nodes(m.graph)) for name, m in graphs.items()}
    assert ops["loop"]["QMoE"] == ops["step"]["QMoE"] == 1 and not ops["loop"]["MoE"]
    assert ops["loop"]["MatMulNBits"] == 5  # q, kv, o and the shared expert's two
    assert ops["prelude"]["GatherBlockQuantized"] == 1 and ops["prelude"]["MatMulNBits"] == 1
    assert ops["head"]["MatMulNBits"] == 1 and ops["commit"]["MatMulNBits"] == 1
    quantised = Package.open(int4).manifest["quantization"]["tensors"]
    for name, model in graphs.items():
        for tensor in model.graph.initializer:
            base = tensor.name.removesuffix(".T")
            assert base not in quantised, (name, tensor.name)
            if base.rsplit(".", 1)[0] in quantised and tensor.name.endswith("scales"):
                assert tensor.data_type == TensorProto.FLOAT


def test_size_is_what_the_formats_say(int4: Path, package: Path, checkpoint: Path) -> None:
    """One copy of codes and float32 scales; --dry-run says so before."""
    runtime = open_runtime(int4)
    weights = (int4 / "weights.bin").stat().st_size
    model = load_checkpoint(checkpoint)
    stored = Package.open(int4).manifest["quantization"]["tensors"]
    integers = sum(t["bytes"] for t in stored.values())
    scales = sum(
        2 * int(np.prod(t["shape"])) // t["group"] for t in stored.values()
    )  # two more bytes each than reported
    rest = sum(4 * p.numel() for name, p in model.state_dict().items() if name not in stored)
    assert weights < 1.05 * (integers + scales + rest) + 40 * 4096  # each tensor begins on a page of its own
    assert runtime.info.nbytes < 0.4 * Package.open(package).nbytes


def test_dry_run_counts_integers(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for quant in ("fp32", "int8", "int4"):
        flags = [] if quant == "fp32" else ["--method", "rtn"]
        argv = ["-m", str(checkpoint), "--quant", quant, "--dry-run", "--format", "json", *flags]
        assert export(argv) == 0
        sizes[quant] = json.loads(capsys.readouterr().out)["weight_bytes"]
    assert sizes["int4"] < 0.65 * sizes["int8"] < 0.3 * sizes["fp32"]
    argv = ["-m", str(checkpoint), "--quant", "int8", "--kv", "int8", "--calibrate", str(text_file(tmp_path))]
    assert export([*argv, "--dry-run", "--format", "json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["methods"]["loop_64"]["inputs"]["past_keys"] == [[4, 1, 2, 64, 16], "int8"]


def test_the_same_package_with_rounded_activations(
    int4: Path, checkpoint: Path, quick_export: Memo, tmp_path: Path
) -> None:
    """Accuracy level 4 is another number in the same graphs; the text still comes out as PyTorch says, statistically.

    Random weights decide less clearly than trained ones, so the whole gate is left to the shipped model.
    """
    folder = tmp_path
    quantized = calibrated(checkpoint)
    request = ExportRequest(quant="int4", check=False)
    export_package(quantized.model, folder / "q4.rmse", request, checkpoint, quantized=quantized)
    levels = {
        a.i
        for p in (folder / "q4.rmse").glob("*.onnx")
        for n in nodes(onnx.load(p, load_external_data=False).graph)
        for a in n.attribute
        if a.name == "accuracy_level"
    }
    assert levels == {4}
    ids, dials = random_tokens(200, 3), Dials(4)
    exact, coarse = (open_runtime(p).feed(ids, dials).logits for p in (int4, folder / "q4.rmse"))
    error = np.sqrt(np.square(exact - coarse).mean() / np.square(exact).mean())
    assert 1e-4 < error < 0.25
    assert (exact.argmax(-1) == coarse.argmax(-1)).mean() > 0.8


def test_the_integers_are_proved_before_activations_are_rounded(
    quick_export: Memo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At level 4 the gate runs the same integers with float activations first, by the exact rule: a single wrong code of
    one expert, far below what rounded activations excuse, fails the export."""
    quantized = rounded(decisive_model())
    read, true_digest = [], files.digest_file
    monkeypatch.setattr(files, "digest_file", lambda path: read.append(path.name) or true_digest(path))
    package = export_package(quantized.model, tmp_path / "p.rmse", ExportRequest(quant="int4"), quantized=quantized)
    assert Counter(read)["weights.bin"] == Counter(read)["loop.onnx"] == 1  # of three packages in the making
    parity = package.manifest["parity"]
    assert (parity["rule"], parity["integers"]["rule"]) == ("rounded", "exact")
    assert parity["settings"]["full depth"]["positions"] == 2000
    assert parity["settings"]["full depth"]["max_logit_difference"] > 1e-3
    assert parity["integers"]["settings"]["full depth"]["max_logit_difference"] < 1e-4
    assert not list(package.folder.glob("exact-*"))

    true = QuantizedTensor.packed

    def planted(q: QuantizedTensor) -> torch.Tensor:
        packed = true(q).clone()
        if packed.dim() == 3 and packed.shape[1] == 64:  # down_proj
            packed[2, 5, 3] ^= 4
        return packed

    monkeypatch.setattr(QuantizedTensor, "packed", planted)
    with pytest.raises(ParityError, match=r"^parity failed at full depth: position \d+") as caught:
        export_package(quantized.model, tmp_path / "wrong.rmse", ExportRequest(quant="int4"), quantized=quantized)
    assert "accuracy_level" not in str(caught.value)  # which would not help
    assert [p.name for p in tmp_path.iterdir()] == ["p.rmse"]


def test_what_only_the_rounding_of_activations_fails_names_the_way_out(
    int4: Path, checkpoint: Path, quick_export: Memo, tmp_path: Path
) -> None:
    """The integers of `int4`, which passed the gate at accuracy level 0, do not pass it at level 4."""
    quantized = calibrated(checkpoint)
    with pytest.raises(ParityError) as caught:
        export_package(
            quantized.model, tmp_path / "p.rmse", ExportRequest(quant="int4"), checkpoint, quantized=quantized
        )
    assert_one_line(str(caught.value), "parity failed at", "the same integers pass", "accuracy_level=0")
    manifest = Package.open(int4).manifest
    assert manifest["quantization"]["accuracy_level"] == 0 and manifest["parity"]["rule"] == "exact"
    assert not list(tmp_path.iterdir())


def test_a_quantised_checkpoint_exports_as_it_is(
    int4: Path, checkpoint: Path, quick_export: Memo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The integers are the checkpoint's: the weights file equals that of quantising and exporting in one go."""
    quantized = calibrated(checkpoint)
    save_quantized(quantized, tmp_path / "q", checkpoint)
    assert export(["-m", str(tmp_path / "q"), "-o", str(tmp_path / "p.rmse"), "--accuracy-level", "0"]) == 0
    assert (tmp_path / "p.rmse" / "weights.bin").read_bytes() == (int4 / "weights.bin").read_bytes()
    assert "parity at full depth" in capsys.readouterr().out
    for flags, parts in (
        (("--quant", "int8"), ("--quant int8", "int4", "leave it out")),
        (("--quant", "fp32"), ("--quant fp32", "quantised")),
        (("--calibrate", str(text_file(tmp_path))), ("--calibrate", "quantised already")),
    ):
        assert export(["-m", str(tmp_path / "q"), "-o", str(tmp_path / "r.rmse"), *flags]) == 2
        assert_one_line(capsys.readouterr().err, *parts)
        assert not (tmp_path / "r.rmse").exists()


def test_calls_of_any_size_share_the_packed_weights(int4: Path) -> None:
    runtime = open_runtime(int4)
    assert isinstance(runtime, OnnxRuntime)
    assert runtime.methods.session("loop", 1).session is runtime.methods.session("loop", 64).session  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------- other formats, by method


def on_onnx(
    quantized: Quantized, method: str, chunk: int, accuracy_level: int, twin: bool = False
) -> tuple[Arrays, Arrays]:
    """What one method gives in PyTorch and as an ONNX graph in memory, on made-up inputs; with `twin` in float activations."""
    model = quantized.model
    spec, reference = model.spec(chunk), TorchMethods(model)
    traced: Any = onnx_quantize.prepare(model, LowerOptions(tensors=quantized.tensors))
    module = Method(traced, spec, method)
    with torch.no_grad():
        program = torch.export.export(module, module.example(), strict=False)
    exported = ExportedMethod(method, (chunk,), module.takes, module.gives, program)
    graph = onnx_lower.to_onnx(exported, compact=True)
    names = {f"{onnx_weights.MODEL}{codes}": name for codes, name in weights_of_codes(traced).items()}
    onnx_quantize.use_integers(graph, quantized.tensors, names, accuracy_level)
    if twin:
        onnx_quantize.with_float_activations(graph)
    onnx.checker.check_model(graph)
    assert {o.domain for o in graph.opset_import} <= {"", "com.microsoft"}
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    feeds = example_feeds(spec, reference) | Dials(4, 1, 0.6).arrays()
    feeds |= {"h": feeds["x0"]}
    found = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
    return reference.run(method, chunk, feeds), dict(zip([o.name for o in session.get_outputs()], found))


FORMS: dict[str, tuple[RMSE, dict[str, Any], tuple[str, ...]]] = {
    "asymmetric, with a memory": (
        remembering_model(), {"symmetric": False, "dense_group_size": 32}, ("prelude", "head", "loop"),
    ),
    "tied": (mixed_model(tie_embeddings=True), {}, ("prelude", "head")),
    "int8, elementwise gate": (mixed_model(attention_gate="elementwise"), {"quant": "int8"}, ("prelude", "head", "loop")),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_other_forms_are_exact(form: str) -> None:
    """Zero points, one table for embedding and head, one scale per channel: each equals the dequantised model."""
    model, scheme, methods = FORMS[form]
    quantized = rounded(model, **scheme)
    for method in methods:
        check_exact(method, *on_onnx(quantized, method, 64, accuracy_level=0))


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_the_twin_of_a_graph_that_rounds_activations_is_exact(quant: str) -> None:
    """It is the same graph, of the same integers: of int8, experts are read otherwise than in blocks."""
    check_exact("loop", *on_onnx(rounded(mixed_model(), quant=quant), "loop", 64, accuracy_level=4, twin=True))


def check_exact(method: str, ours: Arrays, theirs: Arrays) -> None:
    iterations = slice(int(ours.get("iterations", 0)))
    for name, a in ours.items():
        rows = iterations if name.startswith("new_") else slice(None)
        a, b = (np.atleast_1d(x)[rows] for x in (a, theirs[name]))
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * max(1.0, np.abs(a).max()), err_msg=f"{method} {name}")


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_rounded_activations_are_within_their_own_error(quant: str) -> None:
    """At accuracy level 4 a product differs from the float one, by no more than int8 activations explain."""
    ours, theirs = on_onnx(rounded(mixed_model(), quant=quant), "head", 64, accuracy_level=4)
    error = np.linalg.norm(ours["logits"] - theirs["logits"]) / np.linalg.norm(ours["logits"])
    assert 1e-5 < error < 0.02


@pytest.mark.slow
def test_an_int8_cache_in_a_package(quick_export: Memo, tmp_path: Path) -> None:
    """The ring is int8, the gate passes by the rounded rule, and chunks agree with single tokens."""
    request = QuantizeRequest(Scheme("int8"), method="rtn", kv="int8", calibration_tokens=512, evaluation_tokens=0)
    quantized = quantize(mixed_model(), request, random_tokens(4000, 5))
    package = export_package(
        quantized.model,
        tmp_path / "kv.rmse",
        ExportRequest("onnx", "int8", OnnxOptions(accuracy_level=0)),
        quantized=quantized,
    )
    assert package.manifest["parity"]["rule"] == "rounded"
    assert package.manifest["methods"]["commit_64"]["outputs"][0]["dtype"] == "int8"
    runtime = open_runtime(package.folder)
    assert isinstance(runtime, OnnxRuntime)
    assert {a.dtype for a in runtime.state.values()} == {np.dtype(np.int8)}
    ids, dials = random_tokens(150, 7), Dials(4)
    whole = runtime.feed(ids, dials).logits.copy()
    runtime.reset()
    single = np.concatenate([runtime.feed(ids[i : i + 1], dials).logits.copy() for i in range(150)])
    error = np.abs(whole - single).max(-1)  # where noise crosses a rounding boundary, a number moves by 1/127
    assert np.median(error) < 1e-3 and np.quantile(error, 0.95) < 0.1 * np.abs(whole).max()


# ---------------------------------------------------------------------------------------------------------- refusals


def graph_of(nodes: list[onnx.NodeProto], q: QuantizedTensor, columns: int) -> onnx.ModelProto:
    """Nodes that read "w", a weight given by its integers, and "x"."""
    info = helper.make_tensor_value_info
    stored = helper.make_node(
        onnx_ops.STORED_WEIGHT, ["codes", "scales"], ["w"], domain=onnx_ops.OWN, bits=q.format.bits
    )
    kept = [numpy_helper.from_array(t.numpy(), name) for name, t in (("codes", q.codes), ("scales", q.scales))]
    graph = helper.make_graph(
        [stored, *nodes], "g", [info("x", 1, [3, q.shape[0]])], [info("y", 1, [3, columns])], kept
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def test_a_reader_without_a_form_for_integers_fails_the_export() -> None:
    """Never a silent fallback to floating point: the tensor and the operator are named."""
    q = round_to_nearest(torch.randn(64, 64), Format(4, 32))
    model = graph_of([helper.make_node("Mul", ["x", "w"], ["y"])], q, 64)
    with pytest.raises(ExportError) as caught:
        onnx_quantize.use_integers(model, {"inject.weight": q}, {"codes": "inject.weight"}, 4)
    assert_one_line(str(caught.value), "inject.weight", "Mul", "quant=fp32")


@pytest.mark.parametrize(
    "ways",  # whether a linear layer turns it or the model, from which name to which
    [
        [(True, "w", "t")],
        [(False, "w", "t")],
        [(True, "w", "u"), (False, "u", "v"), (True, "v", "t")],
    ],
    ids=["by a linear layer", "by the model", "there and back"],
)
def test_a_weight_is_read_through_whatever_transposes_it(ways: list[tuple[bool, str, str]]) -> None:
    """A product wants it once transposed: a square one read as it is would be another matrix."""
    turns = [
        helper.make_node(onnx_ops.TRANSPOSED, [before], [after], domain=onnx_ops.OWN)
        if by_layer
        else helper.make_node("Transpose", [before], [after], perm=[1, 0])
        for by_layer, before, after in ways
    ]
    q = round_to_nearest(torch.randn(32, 32), Format(4, 32))
    model = graph_of([*turns, helper.make_node("MatMul", ["x", "t"], ["y"])], q, 32)
    assert onnx_quantize.use_integers(model, {"inject.weight": q}, {"codes": "inject.weight"}, 0) == {"inject.weight"}
    assert [n.op_type for n in model.graph.node] == ["MatMulNBits"]
    assert {t.name for t in model.graph.initializer} == set(model.graph.node[0].input[1:])
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(y, x @ q.dequantize().numpy().T, atol=1e-5)
    with pytest.raises(ExportError, match=r"^inject\.weight: .* MatMul reads it"):
        onnx_quantize.use_integers(
            graph_of([helper.make_node("MatMul", ["x", "w"], ["y"])], q, 32),
            {"inject.weight": q},
            {"codes": "inject.weight"},
            0,
        )


def test_a_weight_that_no_graph_reads_as_integers_fails_the_export(
    tiny: RMSE, quick_export: Memo, tmp_path: Path
) -> None:
    """Such as one of a program that was traced with floats: it would ship as floating point."""
    program = quick_export.trace(tiny, tiny.call_sizes(), lambda _: None, True, False, True, None, True)
    q = round_to_nearest(tiny.inject.weight.detach(), Format(8))
    with pytest.raises(ExportError, match=r"^inject\.weight: is quantised, but no graph reads it as integers"):
        get_target("onnx").lower(program, tmp_path, LowerOptions("int8", {"inject.weight": q}))


def test_inputs_that_make_no_whole_blocks_are_named() -> None:
    q = round_to_nearest(torch.randn(40, 72), Format(8))
    model = graph_of([helper.make_node("Gather", ["w", "x"], ["y"])], q, 72)
    with pytest.raises(ExportError) as caught:
        onnx_quantize.use_integers(model, {"embed.weight": q}, {"codes": "embed.weight"}, 4)
    assert_one_line(str(caught.value), "embed.weight", "72 inputs", "blocks of 16", "quant=fp32")


def test_a_target_without_zero_points_refuses_them_by_name(
    tiny: RMSE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_TARGETS", dict(registry._TARGETS))
    target("symmetric-only")(lambda *_: {})
    quantized = rounded(tiny, symmetric=False)
    with pytest.raises(UserError) as caught:
        export_package(
            quantized.model, tmp_path / "p.rmse", ExportRequest("symmetric-only", "int4"), quantized=quantized
        )
    assert_one_line(str(caught.value), "embed.weight", "asymmetric", "symmetric-only", "without symmetric=False")
    assert not (tmp_path / "p.rmse").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--quant", "int4"], ("--quant int4", "--calibrate FILE", "--method rtn")),
        (["--quant", "int5"], ("--quant", "int5", "fp32, fp16, int8, int4")),
        (["--calibrate", "TEXT"], ("--calibrate", "fp32")),
        (["--quant", "fp16", "--kv", "int8"], ("--kv", "fp16")),
        (["--quant", "int4", "--accuracy-level", "3"], ("--accuracy-level", "3")),
        (["--quant", "int4", "--calibrate", "TEXT", "--group-size", "64"], ("block.experts.down_proj", "64")),
        (["--quant", "int4", "--calibrate", "missing.txt"], ("missing.txt",)),
        (["--quant", "int8", "--method", "rtn", "--kv", "int8"], ("--calibrate FILE", "--kv int8")),
    ],
    ids=str,
)
def test_flags_that_do_not_go_together(
    flags: list[str], parts: tuple[str, ...], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(text_file(tmp_path)) if f == "TEXT" else f for f in flags]
    assert export(["-m", str(checkpoint), "-o", str(tmp_path / "p.rmse"), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, "rmse-export: error:", *parts)
    assert not (tmp_path / "p.rmse").exists()


# ------------------------------------------------------------------------------------------------------------- bench


@pytest.mark.slow
def test_bench_compares_packages_side_by_side(
    package: Path, int4: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["-p", "64", "-n", "2", "-r", "1", "-d", "4"]
    assert bench([str(package), str(int4), *small, "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [m["quant"] for m in document["models"]] == ["fp32", "int4"]
    assert all(m["rss_bytes"] is None for m in document["models"])  # of both together it says nothing
    (speedup,) = document["speedups"]
    for row in speedup["rows"]:
        kind = "loop_rows" if row["test"].startswith("loop") else "rows"
        unit = "ms" if kind == "loop_rows" else "tok_per_s"
        key = (row["test"], row["mode"], row["max_loops"])
        a, b = (
            next(r[unit]["median"] for r in m[kind] if (r["test"], r["mode"], r["max_loops"]) == key)
            for m in document["models"]
        )
        assert row["speedup"] == pytest.approx(a / b if unit == "ms" else b / a)
    assert bench([str(package), str(int4), *small]) == 0
    printed = capsys.readouterr().out
    assert "As fast as" in printed and "(int4)" in printed and "artifact of" in printed
    assert bench([str(int4), *small, "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["baseline_rss_bytes"] > 0 and document["peak_rss_bytes"] >= document["rss_bytes"] > 0
    assert bench([str(package), str(int4), "--stream", "64"]) == 2
    assert_one_line(capsys.readouterr().err, "--stream")
    assert bench([str(package), "--quant", "int4"]) == 2
    assert_one_line(capsys.readouterr().err, "--quant")


def test_the_smallest_graph_is_one() -> None:
    """The bytes that stand for the engine without a model are a graph that onnx knows."""
    model = onnx.ModelProto.FromString(SMALLEST)
    onnx.checker.check_model(model)
    assert [n.op_type for n in model.graph.node] == ["Identity"] and not model.graph.initializer


def test_random_weights_are_quantised_without_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(dataclasses.asdict(mixed_model().config)))
    assert export(["--config", str(config), "--quant", "int4", "--calibrate", str(text_file(tmp_path))]) == 2
    assert_one_line(capsys.readouterr().err, "random weights", "--method rtn")
    assert export(["--config", str(config), "--quant", "int4", "--dry-run"]) == 2
    assert_one_line(capsys.readouterr().err, "random weights", "--method rtn")
    assert export(["--config", str(config), "--quant", "int4", "--method", "rtn", "--dry-run"]) == 0


# ------------------------------------------------------------------------------------------------------------- widths


@pytest.mark.parametrize("width", [33, 40, 48])
@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("target", ["onnx", "executorch", "coreml"])
def test_what_a_refused_width_is_told_to_do_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, quant: str, width: int
) -> None:
    """At the first try: no hint leads to another refusal."""
    pytest.importorskip({"coreml": "coremltools"}.get(target, target))
    config = tmp_path / "config.json"
    config.write_text(tiny_config(d_model=width).to_json())
    command = ["--config", str(config), "--target", target, "--dry-run"]
    if export([*command, "--quant", quant, "--method", "rtn"]) == 0:
        return
    line = capsys.readouterr().err
    assert_one_line(line, "block.experts.gate_up_proj" if target != "coreml" or width > 40 else "embed.weight")
    if hint := re.search(r"(--group-size \d+)", line):
        flags = ["--quant", quant, "--method", "rtn", *hint[1].split()]
    elif hint := re.search(r"--quant (\w+)", line):
        flags = ["--quant", hint[1], *(["--method", "rtn"] if hint[1] == "int8" else [])]
    assert hint and export([*command, *flags]) == 0, line


def test_groups_are_proposed_that_all_weights_of_the_flag_have() -> None:
    """Of the embedding alone, 64 would do as well."""
    model = RMSE(tiny_config(n_heads=3, n_kv_heads=1))  # the output projection has 48 inputs
    with pytest.raises(UserError) as caught:
        Scheme("int4", dense_group_size=128).formats(model)
    assert_one_line(str(caught.value), "embed.weight", "pass dense_group_size=16")
    assert str(caught.value).endswith("16")
    assert Scheme("int4", dense_group_size=16).formats(model)
