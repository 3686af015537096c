"""The parity gate: a good package passes, and whatever an exporter may get wrong fails the export and leaves nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import decided_text, mixed_model, reference_of
from later import later
from memo import Memo

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.errors import ExportError, ParityError
from rmse_edge.export import ExportRequest, export_package, targets
from rmse_edge.export.gate.compare import LOGITS_TOLERANCE, MARGIN, POSITIONS, compare
from rmse_edge.export.gate.reference import Reference
from rmse_edge.export.program import ExportedMethod
from rmse_edge.loop.dials import Dials
from rmse_edge.package import Package
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.base import Fed

onnx = later("onnx")
helper = later("onnx.helper")
numpy_helper = later("onnx.numpy_helper")
onnx_target = later("rmse_edge.export.onnx.lower")
onnx_passes = later("rmse_edge.export.onnx.passes")

pytestmark = [pytest.mark.onnx, pytest.mark.slow]

# --------------------------------------------------------------------------------------------- a good package


def test_a_good_package_passes_at_full_depth_and_two_adaptive_settings(package: Path) -> None:
    """fp32: 256 positions per setting, logits within 1e-4, every depth equal, and the exits of each setting vary."""
    report = Package.open(package).manifest["parity"]
    assert report["rule"] == "exact"
    assert list(report["settings"]) == ["full depth", "gate", "delta"]
    for name, result in report["settings"].items():
        assert result["positions"] >= 200
        assert result["max_logit_difference"] <= 1e-4
        assert result["same_depth"] == 1.0
        assert result["undecided"] == []
        assert (result["depth_sd"] > 0.3) == (name != "full depth")
    settings = {name: result["dials"] for name, result in report["settings"].items()}
    assert settings["full depth"]["exit_threshold"] == 1.0 and settings["full depth"]["exit_epsilon"] == 0.0
    assert settings["gate"]["exit_threshold"] == pytest.approx(0.6)  # the checkpoint's own
    assert settings["delta"]["exit_epsilon"] > 0
    methods = {f"{m}_{c}" for m in ("prelude", "loop", "begin", "step", "head", "commit") for c in (1, 64)}
    assert set(report["methods"]) == methods and max(report["methods"].values()) <= 1e-4


# ------------------------------------------------------------------------------------------------------ plants


def wrong_weight(name: str) -> Callable[[Path], None]:
    """One number of a tensor in weights.bin is off by 1 % of the tensor's largest."""

    def plant(folder: Path) -> None:
        for file in sorted(folder.glob("*.onnx")):
            for tensor in onnx.load(file, load_external_data=False).graph.initializer:
                if tensor.name == name:
                    entry = {e.key: e.value for e in tensor.external_data}
                    values = np.memmap(
                        folder / entry["location"], np.float32, "r+", int(entry["offset"]), tuple(tensor.dims)
                    )
                    values.flat[7] += np.abs(values).max() * 0.01
                    values.flush()
                    return
        raise AssertionError(f"no tensor {name}")

    return plant


def graphs(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    found = [model.graph]
    for graph in found:
        for node in graph.node:
            found.extend(onnx_passes.subgraphs(node))
    return found


# How a defect is planted: into which graph, of which method, and for calls of how many rows (None: of any number).
Plant = Callable[[Any, ExportedMethod, int | None], None]


def in_calls_of(model: onnx.ModelProto, rows: int) -> str:
    """The name of a flag that the graph is made to compute: is this a call of so many rows?"""
    name, axis = next(
        (value.name, i)
        for value in model.graph.input
        for i, d in enumerate(value.type.tensor_type.shape.dim)
        if d.dim_param == "rows"
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([rows]), "those_rows"))
    for node in (
        helper.make_node("Equal", ["rows_here", "those_rows"], ["of_those_rows"]),
        helper.make_node("Shape", [name], ["rows_here"], start=axis, end=axis + 1),
    ):
        model.graph.node.insert(0, node)
    return "of_those_rows"


def constant_instead_of(name: str, value: Any) -> Plant:
    """An input is not read: a constant takes its place."""

    def plant(model: onnx.ModelProto, method: ExportedMethod, rows: int | None) -> None:
        shape = [d.dim_value for t in model.graph.input if t.name == name for d in t.type.tensor_type.shape.dim]
        model.graph.initializer.append(numpy_helper.from_array(np.array(value).reshape(shape), "baked_in"))
        for graph in graphs(model):
            for node in graph.node:
                for i, given in enumerate(node.input):
                    if given == name:
                        node.input[i] = "read_instead"
        if rows is None:
            instead = [helper.make_node("Identity", ["baked_in"], ["read_instead"])]
        else:
            condition = in_calls_of(model, rows)
            instead = list(model.graph.node[:2])
            del model.graph.node[:2]
            # The flag has one element, and so has the input: what comes out has the input's shape.
            model.graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), "true_shape"))
            instead += [
                helper.make_node("Where", [condition, "baked_in", name], ["either"]),
                helper.make_node("Reshape", ["either", "true_shape"], ["read_instead"]),
            ]
        for node in reversed(instead):
            model.graph.node.insert(0, node)

    return plant


def output_becomes(name: str, op: str, operand: Callable[[ExportedMethod], Any]) -> Plant:
    """An output leaves the graph as op(output, operand)."""

    def plant(model: onnx.ModelProto, method: ExportedMethod, rows: int | None) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                for i, given in enumerate(names):
                    if given == name:
                        names[i] = f"true_{name}"
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(operand(method)), "operand"))
        wrong = name if rows is None else f"wrong_{name}"
        model.graph.node.append(helper.make_node(op, [f"true_{name}", "operand"], [wrong]))
        if rows is not None:
            condition = in_calls_of(model, rows)
            model.graph.node.append(helper.make_node("Where", [condition, wrong, f"true_{name}"], [name]))

    return plant


def wrong_only_when(name: str, given: str, value: int) -> Plant:
    """An output is 1 % too large, but only in calls where the input `given` has this value."""

    def plant(model: onnx.ModelProto, method: ExportedMethod, rows: int | None) -> None:
        output_becomes(name, "Mul", lambda _: np.float32(1.01))(model, method, None)
        model.graph.node[-1].output[0] = "too_large"
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), "that_value"))
        model.graph.node.append(helper.make_node("Equal", [given, "that_value"], ["that_call"]))
        when = "that_call"
        if rows is not None:
            model.graph.node.append(helper.make_node("And", [when, in_calls_of(model, rows)], ["that_call_and_rows"]))
            when = "that_call_and_rows"
        model.graph.node.append(helper.make_node("Where", [when, "too_large", f"true_{name}"], [name]))

    return plant


def all_but_loop(k: int) -> Callable[[ExportedMethod], np.ndarray]:
    def operand(method: ExportedMethod) -> np.ndarray:
        loops = next(t.shape[0] for t in method.gives if t.name in ("new_keys", "keys"))
        return (np.arange(loops) != k).astype(np.float32).reshape(-1, 1, 1, 1, 1)

    return operand


def no_balance_bias(model: onnx.ModelProto, method: ExportedMethod, rows: int | None) -> None:
    """Experts are selected by the logits alone."""
    dropped = 0
    for graph in graphs(model):
        for node in graph.node:
            if node.op_type == "Add" and any(name.endswith("balance_bias") for name in node.input):
                kept = [name for name in node.input if not name.endswith("balance_bias")]
                node.CopyFrom(helper.make_node("Identity", kept, list(node.output)))
                dropped += 1
    assert dropped == 1 and rows is None


def no_propagation(model: onnx.ModelProto, method: ExportedMethod, rows: int | None) -> None:
    """commit hands on what the loop emitted, also for loops that never ran."""
    assert rows is not None
    for i, node in enumerate(model.graph.node):
        if node.op_type == "Where" and "new_keys" in node.input:
            model.graph.node.insert(i, helper.make_node("Or", [node.input[0], "of_those_rows"], ["taken"]))
            model.graph.node[i + 1].input[0] = "taken"
            in_calls_of(model, rows)
            return
    raise AssertionError("commit does not choose between emitted and propagated keys")


# What is planted: (in which calls of which methods, how, what the message must say).
GRAPH_PLANTS: dict[str, tuple[set[str], Plant, str]] = {
    "balance_bias dropped": ({"loop_1", "loop_64", "step_1", "step_64"}, no_balance_bias, "full depth"),
    "depth off by one": (
        {"loop_1", "loop_64"},
        output_becomes("depth", "Add", lambda _: np.int64(1)),
        "parity failed at full depth: position 0: ",
    ),
    # One loop's keys are lost on the way to the cache: the call itself is right, whoever reads the cache is not.
    "keys of one loop zeroed": ({"loop_64"}, output_becomes("new_keys", "Mul", all_but_loop(2)), "position 64: "),
    "values of one loop zeroed": ({"loop_64"}, output_becomes("new_values", "Mul", all_but_loop(0)), "position 64: "),
    "a position baked in": ({"loop_1", "loop_64"}, constant_instead_of("position", [0]), "position 64: "),
    "decode writes no keys": (
        {"loop_1"},
        output_becomes("new_keys", "Mul", all_but_loop(3)),
        "parity failed at full depth",
    ),
    "decode at a baked in position": (
        {"loop_1"},
        constant_instead_of("position", [191]),
        "parity failed at full depth",
    ),
    "padding is not told": ({"loop_64"}, constant_instead_of("n_valid", [61]), "parity failed at "),
    "the threshold is not read": (
        {"loop_1", "loop_64"},
        constant_instead_of("exit_threshold", np.float32(1)),
        "parity failed at gate",
    ),
    "the epsilon is not read": (
        {"loop_1", "loop_64"},
        constant_instead_of("exit_epsilon", np.float32(0)),
        "parity failed at delta",
    ),
    "NaN": ({"head_64"}, output_becomes("logits", "Add", lambda _: np.float32("nan")), "full depth: position 0"),
    "only step is wrong": (
        {"step_1"},
        output_becomes("next_h", "Mul", lambda _: np.float32(1.01)),
        "step_1: h differs",
    ),
    "step emits wrong values": (
        {"step_64"},
        output_becomes("new_values", "Mul", lambda _: np.float32(0.99)),
        "step_64: new_values differs",
    ),
    "step is wrong in the deepest loop": (
        {"step_1"},
        wrong_only_when("new_values", "k", 3),
        "step_1: new_values differs",
    ),
    "commit is wrong at half the depth": (
        {"commit_64"},
        wrong_only_when("keys", "iterations", 2),
        "commit_64: keys differs",
    ),
    "commit does not propagate (decode)": ({"commit_1"}, no_propagation, "parity failed at gate"),
    "commit does not propagate (prefill)": ({"commit_64"}, no_propagation, "commit_64: keys differs"),
}


def attempt(model: RMSE, destination: Path, checkpoint: Path, **request: Any) -> ParityError:
    """The export that must fail; nothing may be left of it."""
    before = sorted(destination.parent.iterdir())
    with pytest.raises(ParityError) as caught:
        export_package(model, destination, ExportRequest(**request), checkpoint)
    assert sorted(destination.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("case", GRAPH_PLANTS)
def test_a_wrong_graph_fails_the_export(
    case: str,
    tiny: RMSE,
    checkpoint: Path,
    package: Path,
    quick_export: Memo,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Each defect is planted between lowering and writing; the gate then runs the written package as always."""
    where, plant, said = GRAPH_PLANTS[case]
    planted = set()

    def to_onnx(method: ExportedMethod, *form: bool) -> onnx.ModelProto:
        model = quick_export.to_onnx(method, *form)
        calls = {f"{method.name}_{chunk}": chunk for chunk in method.chunks}
        if hit := where & set(calls):
            plant(model, method, None if hit == set(calls) else calls[min(hit)])
            planted.update(hit)
        return model

    monkeypatch.setattr(onnx_target, "to_onnx", to_onnx)
    error = attempt(tiny, tmp_path / "out.rmse", checkpoint)
    assert planted == where
    assert said in str(error)


@pytest.mark.parametrize("name", ["embed.weight", "block.attention.kv_proj.weight.T", "block.experts.down_proj"])
def test_a_changed_weight_fails_the_export(
    name: str,
    tiny: RMSE,
    checkpoint: Path,
    package: Path,
    quick_export: Memo,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """One number of weights.bin changes after lowering: hashes are taken later, so only the comparison can see it."""
    true = targets.get_target("onnx")

    def damaged(program: Any, folder: Path, options: Any) -> dict[str, Any]:
        result = true.lower(program, folder, options)
        wrong_weight(name)(folder)
        return result

    monkeypatch.setitem(targets._TARGETS, "onnx", dataclasses.replace(true, lower=damaged))
    error = attempt(tiny, tmp_path / "out.rmse", checkpoint)
    assert "the reference is decided" in str(error)


# ------------------------------------------------------------------------------------------- undecided positions


TEXT = decided_text(256)


class AtThreshold(TorchRuntime):
    """A candidate that decides as PyTorch does, but at a threshold of its own."""

    def __init__(self, model: RMSE, threshold: float) -> None:
        super().__init__(model, "candidate")
        self.threshold = threshold

    def feed(self, tokens: Any, dials: Dials, logits: str = "all") -> Fed:
        return super().feed(tokens, dataclasses.replace(dials, exit_threshold=self.threshold), logits)


def knife_edge(reference: Reference, tokens: np.ndarray, near: float) -> tuple[int, float]:
    """One of the first 64 positions and the threshold, close to `near`, that is exactly its brake score at some loop."""
    course = reference.course(tokens[:64], dataclasses.replace(reference.info.full_depth, exit_threshold=near))
    brake = course.scores["exit_threshold"]
    running = np.arange(len(brake))[:, None] < course.depth
    brake = np.where(running, brake, np.inf)[:-1]  # the last loop ends all positions anyway
    k, position = np.unravel_index(np.abs(brake - near).argmin(), brake.shape)
    return int(position), float(np.float32(brake[k, position]))


def test_a_decision_on_the_knifes_edge_restarts_the_comparison(tiny: RMSE) -> None:
    """Threshold exactly at one position's brake score, and a candidate that decides the other way there and only there.

    The reference is undecided at that position: the comparison goes on behind it from an empty state, everything else
    agrees, and the position is listed.
    """
    reference, tokens = reference_of(tiny), TEXT
    position, threshold = knife_edge(reference, tokens, 0.6)
    assert 0 < position < 64
    dials = dataclasses.replace(reference.info.full_depth, exit_threshold=threshold)
    depth = reference.course(tokens[:64], dials).depth
    others = [AtThreshold(tiny, threshold + side * 1e-5) for side in (-1, 1)]
    flips = [r.feed(tokens[:64], dials).depth[position] != depth[position] for r in others]
    assert sum(flips) == 1
    result = compare(reference, others[flips.index(True)], tokens, dials, exact=True)
    assert result["undecided"] == [position]
    assert result["same_depth"] == 1.0 and result["max_logit_difference"] <= LOGITS_TOLERANCE
    assert compare(reference, others[flips.index(False)], tokens, dials, exact=True)["undecided"] == []


def test_where_no_rule_is_asked_nothing_is_undecided(tiny: RMSE) -> None:
    """Before min_loops and at the last loop, a brake score at the threshold decides nothing, so it excuses nothing."""
    reference = reference_of(tiny)
    position, threshold = knife_edge(reference, TEXT, 0.6)
    free = dataclasses.replace(reference.info.full_depth, exit_threshold=threshold)
    for dials in (free, dataclasses.replace(free, min_loops=tiny.config.max_loops)):
        margin = reference.course(TEXT, dials).margin
        assert (margin[position] < 1e-6) == (dials is free)
    assert margin.min() > MARGIN


def test_a_decided_position_is_no_excuse(tiny: RMSE) -> None:
    """The same candidate further off decides differently where the reference is decided, and fails."""
    reference, tokens = reference_of(tiny), TEXT
    _, threshold = knife_edge(reference, tokens, 0.6)
    dials = dataclasses.replace(reference.info.full_depth, exit_threshold=threshold)
    with pytest.raises(ParityError, match=r"depth \d instead of \d, .* and the reference is decided"):
        compare(reference, AtThreshold(tiny, threshold + 0.02), tokens, dials, exact=True)


def test_a_router_on_the_knifes_edge_counts_as_undecided(tiny: RMSE) -> None:
    """A position whose last selected expert is tied with the next one: whichever is taken, the rest must agree."""
    reference, tokens = reference_of(tiny), TEXT
    full = reference.info.full_depth
    assert reference.course(tokens, full).margin.min() > MARGIN  # as it is, this model is decided everywhere
    position = 30
    routed: list[np.ndarray] = []
    tiny.block.experts.observer = lambda k, routing: routed.append((routing.logits + bias).numpy())
    bias = tiny.block.experts.balance_bias
    TorchRuntime(tiny, "candidate").feed(tokens[:64], full)
    tiny.block.experts.observer = None
    order = np.argsort(-routed[0][position])
    top_k = tiny.config.top_k
    last, next_one = int(order[top_k - 1]), int(order[top_k])
    gap = float(routed[0][position, last] - routed[0][position, next_one])
    edge, other = mixed_model(), mixed_model()
    for model, nudge in ((edge, -1e-5), (other, 1e-5)):  # the next expert is just below, or just above
        model.block.experts.balance_bias[next_one] += gap + nudge
    reference, candidate = reference_of(edge), TorchRuntime(other, "candidate")
    result = compare(reference, candidate, tokens, full, exact=True)
    assert result["undecided"] == [position] and result["max_logit_difference"] <= LOGITS_TOLERANCE


def test_more_than_one_percent_undecided_fails(tiny: RMSE) -> None:
    """A gate that knows nothing gives every position the same brake score: at that threshold nothing is ever decided."""
    blind = mixed_model()
    with torch.no_grad():
        blind.gate.weight.zero_()
    score = 1 - (1 - torch.sigmoid(blind.gate.bias).item()) ** 2  # after two loops
    reference = reference_of(blind)
    dials = dataclasses.replace(reference.info.full_depth, exit_threshold=score + 1e-5)
    with pytest.raises(ParityError, match=r"more than 1% of 256 positions are undecided: 0, 1, 2$"):
        compare(reference, AtThreshold(blind, score - 1e-5), TEXT, dials, exact=True)


# ------------------------------------------------------------------------------------------------ the rounded rule


class Misreporting(TorchRuntime):
    """A candidate whose depths are off at every `every`-th position."""

    def __init__(self, model: RMSE, every: int, by: int) -> None:
        super().__init__(model, "candidate")
        self.every, self.by = every, by

    def feed(self, tokens: Any, dials: Dials, logits: str = "all") -> Fed:
        fed = super().feed(tokens, dials, logits)
        positions = np.arange(self.position - len(tokens), self.position)
        return dataclasses.replace(fed, depth=fed.depth + self.by * (positions % self.every == 0))


@pytest.mark.slow
def test_the_rounded_rule_forgives_rounding_and_nothing_else(tiny: RMSE) -> None:
    """A millionth of noise on the weights passes; other tokens, other depths, flatter logits or NaN do not."""
    reference = reference_of(tiny)
    dials = dataclasses.replace(reference.info.full_depth, exit_threshold=0.6)

    def changed(change: Callable[[RMSE], Any]) -> TorchRuntime:
        model = mixed_model()
        with torch.no_grad():
            change(model)
        return TorchRuntime(model, "candidate")

    for good in (changed(lambda m: m.embed.weight.mul_(1 + 1e-6)), Misreporting(tiny, every=64, by=1)):
        assert compare(reference, good, TEXT, dials, exact=False)["kl"] < 1e-6
    for bad, said in (
        (changed(lambda m: m.head_proj.weight.copy_(m.head_proj.weight.roll(1, 0))), "same top token .* < 98%"),
        (AtThreshold(tiny, 0.7), "same top token .* < 98%"),
        (Misreporting(tiny, every=20, by=1), "same depth 94.9% < 97%"),
        (Misreporting(tiny, every=40, by=3), "mean depth .* against"),
        (changed(lambda m: m.head_proj.weight.mul_(0.7)), "KL .* > 5e-03"),
        (changed(lambda m: m.head_proj.weight.fill_(float("nan"))), "same top token"),
    ):
        with pytest.raises(ParityError, match=said):
            compare(reference, bad, TEXT, dials, exact=False)


def test_the_gate_reads_the_sample_text(package: Path, checkpoint: Path) -> None:
    """The tokens compared are those of the text inside the package, not random ones."""
    manifest = Package.open(package).manifest
    tokens = parity_tokens(package, manifest)
    text = (checkpoint / "sample.txt").read_text()
    vocab = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(tokens) == POSITIONS[False] and tokens.tolist() == [vocab[c] for c in text[: len(tokens)]]


def parity_tokens(package: Path, manifest: dict[str, Any]) -> np.ndarray:
    from rmse_edge.arch.rmse.config import RMSEConfig
    from rmse_edge.export.pipeline import parity_tokens as chosen

    return chosen(RMSEConfig.from_dict(manifest["model"]["config"]), package, manifest["text"])


def test_a_failed_replacement_keeps_the_old_package(
    tiny: RMSE, checkpoint: Path, package: Path, quick_export: Memo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """--force replaces a package only by one that has passed."""
    destination = tmp_path / "tiny.rmse"
    export_package(tiny, destination, ExportRequest(check=False), checkpoint)
    before = {p.name: p.read_bytes() for p in destination.iterdir()}
    to_onnx = quick_export.to_onnx

    def wrong(method: ExportedMethod, *form: bool) -> onnx.ModelProto:
        model = to_onnx(method, *form)
        if method.name == "loop":
            output_becomes("depth", "Add", lambda _: np.int64(1))(model, method, None)
        return model

    monkeypatch.setattr(onnx_target, "to_onnx", wrong)
    attempt(tiny, destination, checkpoint, overwrite=True)
    assert {p.name: p.read_bytes() for p in destination.iterdir()} == before
    with pytest.raises(ExportError, match="already exists"):
        export_package(tiny, destination, ExportRequest(), checkpoint)
