"""The memory and the retrieval head in a package: where they are in the graphs, and what the parity gate notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_tokens, reference_of, remembered_text, remembering_model
from later import later
from small_models import dials as model_dials
from small_models import whole_sequence

from rmse_edge.arch.common.identity import model_info
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.errors import ParityError, UserError
from rmse_edge.export.gate.compare import (
    LOGITS_TOLERANCE,
    MEMORY_TOLERANCE,
    adaptive_settings,
    compare,
    compare_memory,
    gate,
)
from rmse_edge.export.gate.reference import Reference, made_up_hits
from rmse_edge.export.program import ExportedMethod, LoopProgram, Method, check
from rmse_edge.package import Package
from rmse_edge.runtimes import Dials, LoopRuntime, open_runtime
from rmse_edge.runtimes.engines.torch import TorchMethods, TorchRuntime
from rmse_edge.runtimes.host.base import Arrays, Methods

onnx = later("onnx")
onnxruntime = later("onnxruntime")
onnx_lower = later("rmse_edge.export.onnx.lower")
onnx_passes = later("rmse_edge.export.onnx.passes")

pytestmark = [pytest.mark.onnx, pytest.mark.slow]

DIALS = Dials(4, 1, 0.6)


@pytest.fixture(scope="module")
def model(remembering: Path) -> RMSE:
    return load_checkpoint(remembering)


@pytest.fixture(scope="module")
def reference(model: RMSE) -> Reference:
    return reference_of(model)


@pytest.fixture(scope="module")
def in_torch(model: RMSE) -> TorchRuntime:
    return TorchRuntime(model, "mem")


@pytest.fixture(scope="module")
def opened(remembering_package: Path) -> LoopRuntime:
    runtime = open_runtime(remembering_package, threads=1)
    assert isinstance(runtime, LoopRuntime)
    return runtime


@pytest.fixture
def candidate(opened: LoopRuntime) -> Iterator[LoopRuntime]:
    """The package's runtime, from an empty past, with its true methods again afterwards."""
    true = opened.methods
    opened.reset()
    yield opened
    opened.methods = true
    opened.reset()


# ----------------------------------------------------------------------------------------------------- a good package


def test_the_report_tells_of_the_memory(remembering_package: Path, in_torch: TorchRuntime) -> None:
    report = Package.open(remembering_package).manifest["parity"]
    assert report["rule"] == "exact"
    for kind in ("writes", "after"):
        assert set(report["memory"][kind]) == {*in_torch.memory, "surprise"}
        assert max(report["memory"][kind].values()) <= MEMORY_TOLERANCE[True]
    for name, result in report["settings"].items():
        assert result["max_surprise_difference"] <= MEMORY_TOLERANCE[True]
        assert result["max_logit_difference"] <= LOGITS_TOLERANCE and result["same_depth"] == 1.0, name
    assert {"blank_64", "memorize_64", "embed_segment_64"} <= set(report["methods"])
    assert max(report["methods"].values()) <= LOGITS_TOLERANCE


def test_a_model_without_memory_reports_none(package: Path) -> None:
    report = Package.open(package).manifest["parity"]
    assert "memory" not in report
    assert all("max_surprise_difference" not in result for result in report["settings"].values())


def test_the_loop_reads_the_memory_without_carrying_it(remembering_package: Path, in_torch: TorchRuntime) -> None:
    """What the loop carries is copied every iteration; the memory is an input of the graph that its body looks up."""
    graph = onnx.load(remembering_package / "loop.onnx", load_external_data=False)
    given = {i.name: tuple(d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim) for i in graph.graph.input}
    for name, array in in_torch.memory.items():
        assert given[name] == array.shape
    loop = onnx_passes.find_loop(graph)
    assert loop is not None
    (body,) = onnx_passes.subgraphs(loop)
    assert {"memory_up", "memory_down"} <= onnx_passes.names_read(body)
    assert not set(loop.input) & set(in_torch.memory)
    carried = [tuple(d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim) for i in body.input]
    assert not set(carried) & {array.shape for array in in_torch.memory.values()}
    assert len(loop.input) == 2 + 5  # trip count and condition; k, h, active, depth, log_survival


@pytest.mark.parametrize("sizes", [[64], [60, 10], [1, 33, 2, 100]], ids=str)
def test_chunks_on_onnx_are_the_full_forward(model: RMSE, candidate: LoopRuntime, sizes: list[int]) -> None:
    """Five segments: four writes, each of them read by the ones after it."""
    text = remembered_text(260)
    dials = model_dials(model, exit_threshold=DIALS.exit_threshold)
    logits, depth = whole_sequence(model, torch.from_numpy(text)[None], dials)
    done, i, got, got_depth, surprises = 0, 0, [], [], []
    while done < len(text):
        fed = candidate.feed(text[done : done + sizes[i % len(sizes)]], DIALS)
        got.append(fed.logits)
        got_depth.append(fed.depth)
        surprises += fed.surprises
        done, i = done + len(fed.depth), i + 1
    assert np.array_equal(np.concatenate(got_depth), depth[0].numpy())
    assert np.abs(np.concatenate(got) - logits[0].numpy()).max() < 1e-4
    assert [s.position for s in surprises] == [64, 128, 192, 256]


def test_embed_peek_and_query_agree(in_torch: TorchRuntime, candidate: LoopRuntime) -> None:
    text = remembered_text(200)
    for count in (1, 30, 64):
        found = [runtime.embed(text[:count]) for runtime in (in_torch, candidate)]
        for ours, theirs in zip(*found):
            assert np.abs(ours - theirs).max() < 1e-4
        assert found[0][0].shape == (16,) and found[0][1].shape == (2, 64)
        assert np.linalg.norm(found[0][0]) == pytest.approx(1, abs=1e-4)
    for at in (1, 40, 64, 100, 128):
        told = []
        for runtime in (in_torch, candidate):
            runtime.reset()
            runtime.feed(text[:at], DIALS, "last")
            told.append((runtime.peek(), runtime.query()))
        (ours, query), (theirs, other) = told
        assert np.abs(query - other).max() < 1e-4
        if at % 64 == 0:
            assert ours is None and theirs is None
        else:
            assert ours is not None and theirs is not None
            assert vars(theirs) == pytest.approx(vars(ours), abs=1e-4)


@pytest.mark.parametrize("name", ["in_torch", "candidate"])
def test_looking_changes_nothing(name: str, request: pytest.FixtureRequest) -> None:
    """`peek`, `query` and `embed` in the middle of a segment with hits: state, position and what follows stay."""
    runtime: LoopRuntime = request.getfixturevalue(name)
    text = remembered_text(200)
    results = []
    for look in (False, True):
        runtime.reset()
        runtime.feed(text[:90], DIALS, "last")
        runtime.inject(*made_up_hits(runtime.info))
        runtime.feed(text[90:100], DIALS, "last")
        before = {k: v.copy() for k, v in runtime.tensors().items()}
        if look:
            first = runtime.peek()
            runtime.embed(text[:50])
            runtime.query()
            assert runtime.peek() == first
        assert runtime.position == 100
        for key, array in runtime.tensors().items():
            assert np.array_equal(array, before[key]), key
        results.append(runtime.feed(text[100:], DIALS).logits)
    assert np.array_equal(*results)


def test_embedding_needs_a_passage_of_at_most_one_segment(candidate: LoopRuntime) -> None:
    for tokens, said in (([], "at least one token"), (random_tokens(65), "65 tokens"), ([65], "token 65")):
        with pytest.raises(UserError, match=said):
            candidate.embed(tokens)


# ------------------------------------------------------------------------------------------------------ planted faults

Fault = Callable[[str, int, Arrays, Callable[[Arrays], Arrays]], Arrays]  # method, rows, inputs, what really runs


class Faulty:
    """`Methods` with a defect that an exporter, an engine or a host might have."""

    def __init__(self, true: Methods, fault: Fault) -> None:
        self.true, self.fault = true, fault

    def run(self, method: str, chunk: int, feeds: Arrays) -> Arrays:
        return dict(self.fault(method, chunk, feeds, lambda given: self.true.run(method, chunk, given)))


def blanked(methods: set[str], *names: str, chunks: tuple[int, ...] = (1, 64)) -> Fault:
    """Inputs are taken for zeros."""

    def fault(method: str, chunk: int, feeds: Arrays, run: Callable[[Arrays], Arrays]) -> Arrays:
        lost = {n: np.zeros_like(feeds[n]) for n in names} if method in methods and chunk in chunks else {}
        return run(feeds | lost)

    return fault


def stale(*names: str) -> Fault:
    """Tensors come out of a write as they went in."""

    def fault(method: str, chunk: int, feeds: Arrays, run: Callable[[Arrays], Arrays]) -> Arrays:
        out = run(feeds)
        return {**out, **{f"next_{n}": feeds[n] for n in names}} if method == "memorize" else out

    return fault


def scaled(method_name: str, name: str, factor: float) -> Fault:
    """An output is a little off."""

    def fault(method: str, chunk: int, feeds: Arrays, run: Callable[[Arrays], Arrays]) -> Arrays:
        out = run(feeds)
        return {**out, name: out[name] * np.float32(factor)} if method == method_name else out

    return fault


def baked_in(method_name: str, name: str, value: int) -> Fault:
    """An input is not read: a constant takes its place."""

    def fault(method: str, chunk: int, feeds: Arrays, run: Callable[[Arrays], Arrays]) -> Arrays:
        return run(feeds | {name: np.full_like(feeds[name], value)} if method == method_name else feeds)

    return fault


def segment_before(method: str, chunk: int, feeds: Arrays, run: Callable[[Arrays], Arrays]) -> Arrays:
    """The states are a row late: the write is taught the 64 positions that end one before the boundary."""
    return run(feeds | {"segment": np.roll(feeds["segment"], 1, 1)} if method == "memorize" else feeds)


def twice(method: str, chunk: int, feeds: Arrays, run: Callable[[Arrays], Arrays]) -> Arrays:
    """Every segment is learned two times over."""
    out = {k: np.array(v) for k, v in run(feeds).items()}
    if method != "memorize":
        return out
    again = run(feeds | {k.removeprefix("next_"): v for k, v in out.items() if k.startswith("next_")})
    return {**again, "surprise": out["surprise"]}


AT_A_SETTING = "parity failed at full depth: position "
FAULTS: dict[str, tuple[Fault, str]] = {
    "momentum not carried": (blanked({"memorize"}, "momentum_up", "momentum_down"), AT_A_SETTING),
    "one momentum not carried": (stale("momentum_down"), AT_A_SETTING),
    "key_tail dropped": (blanked({"memorize"}, "key_tail"), AT_A_SETTING),
    "a memory tensor stale": (stale("memory_down"), AT_A_SETTING),
    "nothing written": (stale("memory_up", "memory_down", "momentum_up", "momentum_down"), AT_A_SETTING),
    "statistics stale": (stale("surprise_stats"), "memorize_64: next_surprise_stats differs"),
    "surprise a little off": (scaled("memorize", "surprise", 1.001), AT_A_SETTING),
    "a write of the wrong 64 states": (segment_before, AT_A_SETTING),
    "a write made twice": (twice, AT_A_SETTING),
    "a part of a segment counted whole": (
        baked_in("memorize", "n_valid", 64),
        "memorize_64: next_surprise_stats differs",
    ),
    "prefill deaf to the memory": (blanked({"loop"}, "memory_down", chunks=(64,)), AT_A_SETTING + "0:"),
    "decode deaf to the memory": (blanked({"loop"}, "memory_down", chunks=(1,)), AT_A_SETTING),
    "step deaf to the memory": (blanked({"step"}, "memory_down"), "step_1: h differs"),
    "a blank that knows nothing": (scaled("blank", "memory_down", 0.0), "blank_64: memory_down differs"),
    "hits ignored": (blanked({"prelude"}, "retrieved_valid"), AT_A_SETTING),
    "hits ignored in prefill": (blanked({"prelude"}, "retrieved_valid", chunks=(64,)), "prelude_64: x0 differs"),
    "scores of hits ignored": (blanked({"prelude"}, "retrieved_scores"), AT_A_SETTING),
    "hits that are not there read": (baked_in("prelude", "retrieved_valid", 1), AT_A_SETTING),
    "padding pooled": (baked_in("embed_segment", "n_valid", 64), "embed_segment_64: key differs"),
    "query for key": (scaled("embed_segment", "query", -1.0), "embed_segment_64: query differs"),
}


@pytest.fixture(scope="module")
def program(model: RMSE) -> LoopProgram:
    """What the gate asks of a program: the model and its specs. The traced methods are in the package."""
    return LoopProgram(model, {chunk: model.spec(chunk) for chunk in model.call_sizes()}, ())


@pytest.mark.parametrize("case", FAULTS)
def test_the_gate_notices(case: str, program: LoopProgram, reference: Reference, candidate: LoopRuntime) -> None:
    fault, said = FAULTS[case]
    candidate.methods = Faulty(candidate.methods, fault)
    with pytest.raises(ParityError) as caught:
        gate(program, reference, candidate, remembered_text(256), exact=True)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_gate_passes_methods_without_a_fault(
    program: LoopProgram, reference: Reference, candidate: LoopRuntime
) -> None:
    candidate.methods = Faulty(candidate.methods, lambda method, chunk, feeds, run: run(feeds))
    report = gate(program, reference, candidate, remembered_text(256), exact=True)
    assert all(result["undecided"] == [] for name, result in report["settings"].items() if name != "delta")
    assert candidate.position == 0  # and it is left blank


def test_hits_kept_beyond_the_boundary_are_noticed(
    reference: Reference, candidate: LoopRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that forgets to take the hits back: prompts after the boundary still read them."""
    candidate.reset()
    inject = candidate.inject
    monkeypatch.setattr(candidate, "inject", lambda *hits: None if hits[0] is None else inject(*hits))
    with pytest.raises(ParityError, match=r"^position (19[2-9]|2\d\d): "):
        compare(reference, candidate, remembered_text(256), Dials(4), exact=True)


@pytest.mark.parametrize("name", ["memory_up", "memory_down", "momentum_up", "momentum_down", "surprise_stats"])
def test_memories_that_drift_apart_are_noticed(reference: Reference, candidate: LoopRuntime, name: str) -> None:
    """Each write is a little off, in a tensor that the settings and the comparison of methods may hardly feel."""
    candidate.methods = Faulty(candidate.methods, scaled("memorize", f"next_{name}", 1 + 2e-4))
    with pytest.raises(ParityError, match=r"memory: \w+ differs by .* relative in one write \(allowed 1e-04\)"):
        compare_memory(reference, candidate.methods, exact=True)


# --------------------------------------------------------------------------------------------------------------- ATLAS


class SomeOnnx:
    """`Methods` of which some are ONNX graphs in memory and the others PyTorch: lowering all of them takes minutes."""

    def __init__(self, model: RMSE, methods: tuple[str, ...]) -> None:
        self.rest = TorchMethods(model)
        self.graphs = {name: graph_of(model, name) for name in methods}

    def run(self, method: str, chunk: int, feeds: Arrays) -> Arrays:
        if chunk != 64 or method not in self.graphs:
            return self.rest.run(method, chunk, feeds)
        session = self.graphs[method]
        outputs = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
        return dict(zip((o.name for o in session.get_outputs()), outputs))


def graph_of(model: RMSE, method: str) -> onnxruntime.InferenceSession:
    module = Method(model, model.spec(64), method)
    with torch.no_grad():
        program = torch.export.export(module, module.example(), strict=False)
    exported = ExportedMethod(method, (64,), module.takes, module.gives, program)
    check(exported)
    return onnxruntime.InferenceSession(onnx_lower.to_onnx(exported, compact=True).SerializeToString())


@pytest.fixture(scope="module")
def atlas() -> RMSE:
    return remembering_model("atlas")


@pytest.fixture(scope="module")
def lowered(atlas: RMSE) -> SomeOnnx:
    return SomeOnnx(atlas, ("memorize", "loop"))


@pytest.fixture
def atlas_pair(atlas: RMSE, lowered: SomeOnnx) -> tuple[Reference, LoopRuntime]:
    candidate = LoopRuntime(model_info(atlas, "candidate", 0), lowered)
    return reference_of(atlas), candidate


def test_atlas_on_onnx_says_what_pytorch_says(atlas_pair: tuple[Reference, LoopRuntime]) -> None:
    """At every setting of the gate and over 32 writes; its window of two segments is state too."""
    reference, candidate = atlas_pair
    text = remembered_text(256)
    for name, dials in adaptive_settings(reference, text).items():
        result = compare(reference, candidate, text, dials, exact=True)
        assert result["max_surprise_difference"] <= MEMORY_TOLERANCE[True], name
    report = compare_memory(reference, candidate.methods, exact=True)
    assert {"window_keys", "window_values", "window_gates", "memory_up"} <= set(report["after"])


@pytest.mark.parametrize("lost", ["window_keys", "window_values", "window_gates", "momentum_up", "key_tail"])
def test_what_atlas_forgets_is_noticed(atlas_pair: tuple[Reference, LoopRuntime], lost: str) -> None:
    reference, candidate = atlas_pair
    candidate.methods = Faulty(candidate.methods, blanked({"memorize"}, lost))
    with pytest.raises(ParityError, match=r"^memory: "):
        compare_memory(reference, candidate.methods, exact=True)
