"""The CUDA engine on the CPU, where the same code runs without recordings: it says what the PyTorch model says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CASES, TEXTS, Case, settings_of, text_of, whole
from helpers import ALPHABET, assert_one_line, fed_in

from rmse_edge.cli.bench import main as rmse_bench
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import ArgumentError
from rmse_edge.quantize import Scheme, load_quantized
from rmse_edge.quantize.tensors import round_to_nearest
from rmse_edge.runtimes import Dials, open_runtime
from rmse_edge.runtimes.cuda.dry import dry_run
from rmse_edge.runtimes.engines.cuda import DTYPES, CudaMethods, CudaRuntime, matrices_in
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.measure.profile import profile_torch

# Of models with many layers the nightly run says it again.
texts = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.nightly] if c.slow else [], id=c.name) for c in TEXTS]
)
LENGTH = 70  # tokens: every window is shorter, and so is a segment of a memory


def methods_of(runtime: CudaRuntime) -> CudaMethods:
    assert isinstance(runtime.methods, CudaMethods)
    return runtime.methods


@texts
def test_it_says_what_the_model_says(case: Case) -> None:
    """Of a text cut anyhow, however many iterations are launched ahead: stopped positions do not change in them."""
    text, settings = text_of(case)[:LENGTH], settings_of(case)
    runtime = CudaRuntime(case.model(), case.name, device="cpu")
    for setting, sizes in (("adaptive", (16, 1, 1, 9)), ("shallow", (7, 31)), ("full depth", (30, 1))):
        logits, depth = whole(case.model(), text, settings[setting])
        for ahead in (1, 2, 4) if setting == "adaptive" else (2,):
            methods_of(runtime).ahead = ahead
            methods_of(runtime).loops.clear()
            ours, our_depth = fed_in(runtime, text, settings[setting], sizes)
            assert np.array_equal(our_depth, depth), (setting, ahead)
            np.testing.assert_allclose(ours, logits, atol=3e-5, err_msg=f"{setting}, {ahead} ahead")


@texts
def test_it_leaves_what_the_torch_engine_leaves(case: Case) -> None:
    """State and iterations, too: a text may begin on the one and go on upon the other."""
    text, dials = text_of(case), settings_of(case)["adaptive"]
    ours, theirs = CudaRuntime(case.model(), case.name, device="cpu"), TorchRuntime(case.model(), case.name)
    methods_of(ours).ahead = 3
    for part in (text[:20], text[20:21], text[21:50]):
        a, b = ours.feed(part, dials), theirs.feed(part, dials)
        assert a.iterations == b.iterations
    left, right = ours.tensors(), theirs.tensors()
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name].astype(float), right[name].astype(float), atol=2e-4, err_msg=name)


def test_tensors_keep_their_place(tiny: Any) -> None:
    """What is recorded once stays valid: later calls of a size make no new loop, and find the numbers of theirs."""
    runtime = CudaRuntime(tiny, "tiny", device="cpu")
    dials, tokens = Dials(4, 1, 0.6), np.arange(12) % 65
    runtime.feed(tokens[:1], dials)
    loop = methods_of(runtime).loops[1]
    for token in tokens[1:]:
        runtime.feed(np.array([token]), Dials(4, 1, 0.8))
    assert methods_of(runtime).loops[1] is loop
    again = TorchRuntime(tiny, "tiny")
    again.feed(tokens[:1], dials)
    for token in tokens[1:]:
        expected = again.feed(np.array([token]), Dials(4, 1, 0.8))
    runtime.reset()
    runtime.feed(tokens[:1], dials)
    for token in tokens[1:]:
        found = runtime.feed(np.array([token]), Dials(4, 1, 0.8))
    assert np.array_equal(found.depth, expected.depth)
    np.testing.assert_allclose(found.logits, expected.logits, atol=3e-5)


def test_no_more_is_launched_than_is_said(tiny: Any) -> None:
    """m - 1 iterations at most that nobody needed, and never more than the dial allows."""
    text = np.arange(16) % 65
    for ahead in (1, 2, 4):
        runtime = CudaRuntime(tiny, "tiny", device="cpu", ahead=ahead)
        spent = []
        for token in text:
            fed = runtime.feed(np.array([token]), Dials(4, 1, 0.6))
            spent.append((methods_of(runtime).loops[1].launched, fed.iterations[0]))
        assert all(needed <= launched <= min(4, needed + ahead - 1) for launched, needed in spent)
        assert (ahead == 1) == all(launched == needed for launched, needed in spent)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounded_weights_are_those_of_the_rounded_model(dtype: str) -> None:
    """Matrices in 16 bits: against the model whose weights were rounded alike, and closer to it than to the other."""
    case = next(c for c in TEXTS if c.name == "toy_recurrent")
    text, dials = text_of(case)[:LENGTH], settings_of(case)["full depth"]
    rounded = copy.deepcopy(case.quantizable())
    weights = matrices_in(rounded, DTYPES[dtype])
    assert weights
    with torch.no_grad():
        for name, weight in weights.items():
            rounded.get_parameter(name).copy_(weight.float())
    runtime = CudaRuntime(case.quantizable(), case.name, device="cpu", dtype=dtype)
    assert runtime.info.quant == dtype
    logits, _ = fed_in(runtime, text, dials, (16, 1, 7))
    expected, _ = whole(rounded, text, dials)
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() >= 0.98


@pytest.mark.parametrize("name", ["toy_recurrent", pytest.param("inkling2_loop_text", marks=pytest.mark.nightly)])
def test_integers_stay_packed(name: str, tmp_path: Path) -> None:
    """An int4 checkpoint: no float copy of a weight that has integers, and the numbers of the decoded model."""
    case, folder = next(c for c in TEXTS if c.name == name), tmp_path / "q"
    case.stored(folder, "int4")
    runtime = CudaRuntime.open(folder, device="cpu")
    quantized = load_quantized(folder, lean=False)
    assert runtime.info.quant == "int4" and not set(quantized.tensors) & set(dict(runtime.model.named_parameters()))
    text, dials = text_of(case), settings_of(case)["full depth"]
    logits, _ = fed_in(runtime, text[:40], dials, (16, 1, 7))
    expected, _ = whole(quantized.model, text[:40], dials)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_what_it_is_asked_for_has_to_be_there(checkpoint: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ArgumentError, match=r"^device=cuda: PyTorch sees no CUDA device here; use device=cpu$"):
            open_runtime(checkpoint, "cuda")
    with pytest.raises(ArgumentError, match=r"^dtype=bf16: is of the cuda runtime"):
        open_runtime(checkpoint, "torch", dtype="bf16")
    runtime = open_runtime(checkpoint, "cuda", "cpu", dtype="bf16")
    assert runtime.info.target == "cuda" and runtime.info.quant == "bf16"


@texts
def test_the_device_may_decide(case: Case) -> None:
    """Iterations within conditions, one inside the other, in place of flags that the host reads."""
    text, settings = text_of(case)[:LENGTH], settings_of(case)
    runtime = CudaRuntime(case.model(), case.name, device="cpu", exits="cond")
    for setting in ("adaptive", "shallow"):
        logits, depth = whole(case.model(), text, settings[setting])
        ours, our_depth = fed_in(runtime, text, settings[setting], (16, 1, 1, 20))
        assert np.array_equal(our_depth, depth)
        np.testing.assert_allclose(ours, logits, atol=3e-5)


# Some models of the tests make tensors on the CPU, whatever their own place: no GPU runs them.
ON_CPU = ("tower", "toy_recurrent", "toy")


@pytest.mark.parametrize(
    ("case", "held"),
    [
        pytest.param(
            c,
            held,
            marks=[] if c.name == "rmse" or (c.name, held) == ("ouro", "int4") else [pytest.mark.nightly],
            id=f"{c.name}-{held}",
        )
        for c in CASES
        if c.name not in ON_CPU
        for held in ("fp32", "bf16", "int4")
    ],
)
def test_every_recording_can_be_built_without_a_gpu(case: Case, held: str) -> None:
    """No layer looks at a tensor, and every operator of a kernel says what it gives."""
    model, weights = case.quantizable(), {}
    if held == "bf16":
        weights = dict(matrices_in(model, torch.bfloat16))
    elif held == "int4":
        formats = Scheme("int4", group_size=16, dense_group_size=16).formats(model)
        assert formats
        weights = {n: round_to_nearest(model.get_parameter(n).detach(), f) for n, f in formats.items()}
    built = dry_run(model, weights)
    for chunk in model.call_sizes():
        spec = model.spec(chunk)
        names = [graph.name for graph in built if graph.chunk == chunk]
        assert names[: spec.max_loops + 2] == ["prelude", "begin", *(f"step {k}" for k in range(spec.max_loops))]
        assert names[spec.max_loops + 2 :] == [n for n in ("coda", "head", "commit") if n in spec.methods]
        given = {name: shape for graph in built if graph.chunk == chunk for name, shape in graph.gives.items()}
        for t in (*spec.prelude, *spec.carried, *spec.coda, *spec.head, *spec.commit):
            assert given[t.name] == t.shape, t.name


def test_a_layer_that_looks_is_found_by_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would have a GPU's host wait, and no recording hold."""
    case = next(c for c in CASES if c.name == "rmse")
    monkeypatch.setattr("rmse_edge.layers.experts.is_fixed", lambda: False)
    with pytest.raises(RuntimeError, match=r"^Tensor\.item\(\) cannot be called on meta tensors$"):
        dry_run(case.model())


def test_the_verbs(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """rmse-run and rmse-eval say what they say on the torch runtime; rmse-bench compares what is read with the bandwidth."""
    written = []
    for runtime in ("torch", "cuda"):
        place = ["--runtime", runtime, "--device", "cpu"]
        assert (
            rmse_run([str(checkpoint), *place, "--prompt", ALPHABET[:3], "-n", "6", "--temperature", "0", "-o", "json"])
            == 0
        )
        written.append(json.loads(capsys.readouterr().out)["tokens"])
    assert written[0] == written[1]
    few = ["-p", "8", "-n", "2", "-d", "4", "-r", "1", "-t", "1", "--ids"]
    (ids := checkpoint.parent / "ids.txt").write_text("1 2 3 " * 40)
    assert rmse_bench([str(checkpoint), *place, "--dtype", "bf16", *few, str(ids), "-o", "json"]) == 0
    d = json.loads(capsys.readouterr().out)
    decoding = next(row for row in d["rows"] if row["test"] == "tg2" and row["mode"] == "fixed")
    assert d["runtime"] == "cuda" and d["quant"] == "bf16"
    assert decoding["roofline"] == pytest.approx(decoding["gb_per_s"] / d["memory_gb_per_s"])
    assert rmse_run([str(checkpoint), "--dtype", "bf16", "--prompt", ALPHABET[:3]]) == 2
    assert_one_line(capsys.readouterr().err, "error: --dtype bf16: is of the cuda runtime (--runtime cuda)")


def test_a_profile_is_of_every_operator(tiny: Any) -> None:
    runtime = CudaRuntime(tiny, "tiny", device="cpu")
    rows = profile_torch(runtime, np.arange(256) % 65, Dials(1))
    assert {row.test for row in rows} == {"pp256", "tg32"}
    assert sum(row.share for row in rows if row.test == "tg32") == pytest.approx(1)
    assert any("mm" in row.operator for row in rows)
