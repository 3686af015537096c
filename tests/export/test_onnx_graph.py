"""What lies in an ONNX package: which operators, which weights, how often, and nothing else."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from later import later
from memo import Memo
from paths import ROOT

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.errors import ExportError
from rmse_edge.export import ExportRequest, export_package
from rmse_edge.export.program import ROWS, SLOTS, ExportedMethod
from rmse_edge.layers.memory.atlas import newton_schulz
from rmse_edge.loop.contract import TensorSpec
from rmse_edge.package import Package
from rmse_edge.runtimes import open_runtime
from rmse_edge.runtimes.engines.onnx import OnnxMethods, OnnxRuntime

onnx = later("onnx")
onnx_reference = later("onnx.reference")
onnxruntime = later("onnxruntime")
helper = later("onnx.helper")
numpy_helper = later("onnx.numpy_helper")
onnx_ops = later("rmse_edge.export.onnx.ops")
onnx_passes = later("rmse_edge.export.onnx.passes")
onnx_weights = later("rmse_edge.export.onnx.weights")

pytestmark = [pytest.mark.onnx, pytest.mark.slow]

METHODS = ["prelude", "loop", "begin", "step", "head", "commit"]
DTYPES = {"FLOAT": "float32", "FLOAT16": "float16", "INT64": "int64", "BOOL": "bool"}


def load(package: Path) -> dict[str, onnx.ModelProto]:
    """Every graph of a package, its weights left in their file."""
    return {p.stem: onnx.load(p, load_external_data=False) for p in sorted(package.glob("*.onnx"))}


def bodies(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    return list(onnx_passes.graphs(model.graph))[1:]


def external(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    """(file, offset, bytes) of a tensor that lies outside its graph."""
    entries = {e.key: e.value for e in tensor.external_data}
    return entries["location"], int(entries["offset"]), int(entries["length"])


def stored(package: Path) -> dict[tuple[str, int, int], set[str]]:
    """Where weights lie -> the names they have in the graphs."""
    found: dict[tuple[str, int, int], set[str]] = {}
    for model in load(package).values():
        for tensor in model.graph.initializer:
            if tensor.external_data:
                found.setdefault(external(tensor), set()).add(tensor.name)
    return found


# ------------------------------------------------------------------------------------------------------- graphs


class Orthogonal(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return newton_schulz(x)


def test_a_matrix_of_zeros_stays_one() -> None:
    """What keeps its norm from 0 is small: the exporter drops sums with constants of less than 1e-8."""
    x = torch.randn(2, 5, 3) * torch.tensor([1.0, 0.0])[:, None, None]
    program = torch.export.export(Orthogonal(), (x,))
    onnx_program = torch.onnx.export(program, opset_version=23, verbose=False)
    assert onnx_program is not None
    session = onnxruntime.InferenceSession(onnx_program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, newton_schulz(x), atol=1e-5)
    assert not found[1].any()


def test_graphs_are_within_what_onnx_runtime_reads(package: Path) -> None:
    """Opset at most 24, IR at most 13, domains of ONNX and ONNX Runtime only, and ONNX's own checker agrees."""
    graphs = load(package)
    assert sorted(graphs) == sorted(METHODS)
    for name, model in graphs.items():
        opsets = {o.domain: o.version for o in model.opset_import}
        assert opsets[""] <= 24 and model.ir_version <= 13
        assert set(opsets) <= {"", "com.microsoft"} and not model.functions
        onnx.checker.check_model(str(package / f"{name}.onnx"), full_check=False)


def test_graphs_take_and_give_what_the_manifest_says(package: Path) -> None:
    """Names, order, shapes and types of every method, as a host in another language would read them.

    A dimension is named "rows" exactly where the manifest has 1 in calls of one row and 64 in calls of 64.
    """
    manifest = Package.open(package).manifest
    graphs = load(package)
    assert manifest["lowering"]["graphs"] == {
        f"{name}_{chunk}": f"{name}.onnx" for name in METHODS for chunk in (1, 64)
    }
    assert set(manifest["methods"]) == set(manifest["lowering"]["graphs"])
    for name, model in graphs.items():
        for side, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
            for chunk in (1, 64):
                found = [
                    {
                        "name": v.name,
                        "shape": [
                            chunk if d.dim_param == "rows" else d.dim_value for d in v.type.tensor_type.shape.dim
                        ],
                        "dtype": DTYPES[onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type)],
                    }
                    for v in values
                ]
                assert found == manifest["methods"][f"{name}_{chunk}"][side], (name, chunk)
            dims = [d for v in values for d in v.type.tensor_type.shape.dim]
            assert {d.dim_param for d in dims if not d.HasField("dim_value")} == {"rows"}, name


def test_the_loop_is_in_the_graph_and_carries_nothing_large(package: Path, tiny: RMSE) -> None:
    """One `Loop`, whose carry is h, active, depth and survival; the ring is read from outer scope, K and V are scanned."""
    graphs = load(package)
    loop = onnx_passes.find_loop(graphs["loop"])
    assert loop is not None
    spec = tiny.spec(64)
    body = next(onnx_passes.subgraphs(loop))
    carried = body.input[2:]
    assert len(carried) == 1 + len(spec.carried)  # and the iteration count
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in carried]
    for chunk in (1, 64):
        elements = [int(np.prod([chunk if d == "rows" else d for d in shape])) for shape in shapes]
        assert max(elements) == chunk * tiny.config.d_model and min(elements) > 0
    assert len(loop.output) == len(carried) + len(spec.emits)
    scanned = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in body.output[-2:]]
    assert scanned == [[1, 2, "rows", 16]] * 2
    assert {"past_keys", "past_values"} <= onnx_passes.names_read(body)
    assert all(onnx_passes.find_loop(model) is None for name, model in graphs.items() if name != "loop")


def test_no_loop_body_holds_weights(package: Path) -> None:
    """Neither as initializers nor as constants: what a body holds is kept two to three times in memory."""
    for name, model in load(package).items():
        for body in bodies(model):
            for tensor in body.initializer:
                assert np.prod(tensor.dims) <= 64, (name, tensor.name)
            for node in body.node:
                for attribute in node.attribute:
                    assert np.prod(attribute.t.dims) <= 64, (name, node.name)


def test_no_trace_of_the_exporting_machine(package: Path, checkpoint: Path) -> None:
    """No file holds a path, a user's or a machine's name, or a line of the exporter's stack."""
    secrets = {
        str(ROOT),
        str(checkpoint.parent),
        str(package.parent),
        tempfile.gettempdir(),
        str(Path.home()),
        sys.prefix,
    }
    secrets |= {"site-packages", "/rmse_edge/", "export.py", "stack_trace", socket.gethostname()}
    for path in package.iterdir():
        data = path.read_bytes()
        for secret in secrets - {"", "/"}:
            if len(secret) > 3:
                assert secret.encode() not in data, (path.name, secret)


def test_calls_of_one_row_and_of_many_share_a_session(package: Path) -> None:
    """One copy of the prepacked weights; each size has buffers of its own, so that neither call spoils the other's."""
    runtime = open_runtime(package)
    assert isinstance(runtime, OnnxRuntime)
    methods = runtime.methods
    assert isinstance(methods, OnnxMethods)
    for name in METHODS:
        one, many = methods.session(name, 1), methods.session(name, 64)
        assert one.session is many.session and one is not many, name
        assert one is methods.session(name, 1)
        assert not any(np.shares_memory(one.outputs[n], many.outputs[n]) for n in one.outputs), name
    tokens = np.arange(64)[None]
    many = methods.run("prelude", 64, {"tokens": tokens})["x0"]
    one = methods.run("prelude", 1, {"tokens": tokens[:, 5:6]})["x0"]
    assert many.shape[1] == 64 and np.array_equal(one, many[:, 5:6])
    sessions = {id(methods.session(name, chunk).session) for name in METHODS for chunk in (1, 64)}
    assert len(sessions) == len(METHODS)
    with pytest.raises(ValueError, match=r"tokens: got \(1, 2\) int64, expected \(1, 1\) int64"):
        methods.run("prelude", 1, {"tokens": tokens[:, :2]})


# ------------------------------------------------------------------------------------------------------ weights


def test_every_weight_is_stored_once(package: Path, tiny: RMSE) -> None:
    """All methods share one file: regions do not overlap, no content occurs twice, every large parameter is there."""
    regions = stored(package)
    assert {file for file, _, _ in regions} == {"weights.bin"}
    data = (package / "weights.bin").read_bytes()
    end = 0
    hashes = set()
    for _, offset, length in sorted(regions):
        assert offset >= end, "two tensors overlap"
        assert offset % (4096 if length >= 4096 else 64) == 0
        end = offset + length
        hashes.add(hashlib.sha256(data[offset:end]).hexdigest())
    assert end == len(data) and len(hashes) == len(regions)
    for name, p in tiny.named_parameters():
        if p.numel() * 4 >= onnx_weights.WeightFile.INLINE_BELOW:
            layouts = {p.detach().numpy().tobytes()} | (
                {p.detach().T.contiguous().numpy().tobytes()} if p.dim() == 2 else set()
            )
            assert len(hashes & {hashlib.sha256(x).hexdigest() for x in layouts}) == 1, name


def test_methods_share_their_weights(package: Path) -> None:
    """The experts, 80 % of the model, are read by two graphs from one place, under the model's own name."""
    shared = {names.pop(): place for place, names in stored(package).items() if len(names) == 1}
    for name in ("block.experts.gate_up_proj", "block.experts.down_proj"):
        readers = [m for m, g in load(package).items() if name in {t.name for t in g.graph.initializer}]
        assert readers == ["loop", "step"] and name in shared


# ------------------------------------------------------------------------------------------------- fp16 storage


@pytest.fixture(scope="module")
def half(tiny: RMSE, checkpoint: Path, package: Path, memo: Memo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with fp16 storage; its parity gate has passed."""
    folder = tmp_path_factory.mktemp("half") / "half.rmse"
    with pytest.MonkeyPatch.context() as monkeypatch:
        memo.install(monkeypatch)
        export_package(tiny, folder, ExportRequest(quant="fp16"), checkpoint)
    return folder


def test_fp16_storage_halves_the_weights(half: Path, package: Path) -> None:
    """weights.bin is half as large, and the gate measured it by the rounded rule against equally rounded weights."""
    assert (half / "weights.bin").stat().st_size / (package / "weights.bin").stat().st_size == pytest.approx(
        0.5, abs=0.02
    )
    manifest = Package.open(half).manifest
    assert manifest["quantization"] == {"weights": "fp16"}
    report = manifest["parity"]
    assert report["rule"] == "rounded"
    for name, result in report["settings"].items():
        assert result["same_top_token"] >= 0.98 and result["same_depth"] >= 0.97 and result["kl"] <= 5e-3, name
        assert result["mean_depth"][1] == pytest.approx(result["mean_depth"][0], rel=0.02)


def test_fp16_weights_are_cast_outside_the_loop(half: Path) -> None:
    """Every stored weight has one reader, a Cast to float32 in the outer graph; the body sees float32 only."""
    casts = 0
    for name, model in load(half).items():
        stored_half = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
        assert all(t.data_type != onnx.TensorProto.FLOAT for t in model.graph.initializer if t.external_data), name
        for node in model.graph.node:
            reads = stored_half & set(node.input)
            assert not reads or node.op_type == "Cast"
            casts += len(reads)
        for body in bodies(model):
            assert not stored_half & onnx_passes.names_read(body), name
            assert not [t for t in body.initializer if t.data_type == onnx.TensorProto.FLOAT16], name
    assert casts > 20


@pytest.mark.parametrize("graph", ["loop", "step", "head", "commit"])
def test_fp16_weights_are_converted_once_at_load(graph: str, half: Path, tmp_path: Path) -> None:
    """The graph as ONNX Runtime runs it holds the weights in float32: no Cast of a weight is left to do in a call."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(half / f"{graph}.onnx"), options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    for inner in onnx_passes.graphs(loaded.graph):
        assert not [
            t.name for t in inner.initializer if t.data_type == onnx.TensorProto.FLOAT16 and np.prod(t.dims) > 64
        ]
    weights = {t.name for t in loaded.graph.initializer if np.prod(t.dims) >= 256}
    assert weights
    for inner in onnx_passes.graphs(loaded.graph):
        assert not [n.name for n in inner.node if n.op_type == "Cast" and weights & set(n.input)]


# ---------------------------------------------------------------------------------------------- work is really saved


def test_a_stopped_loop_does_no_more_work(package: Path, tmp_path: Path) -> None:
    """Counted by ONNX Runtime's profiler: the experts ran as often as the deepest position was deep, not max_loops times."""
    runtime = open_runtime(package)
    assert isinstance(runtime, OnnxRuntime)
    ran = {}
    for threshold in (1.0, 0.3):
        runtime.reset()
        dials = runtime.info.dials_with(exit_threshold=threshold)
        runtime.feed([5, 6, 7], dials)
        feeds: dict[str, Any] = runtime.state | dials.arrays()
        feeds |= runtime.methods.run("prelude", 1, {"tokens": np.array([[8]])})
        half_dims = runtime.info.language.rotary_dims // 2
        feeds |= {"cos": np.ones((1, 1, half_dims), np.float32), "sin": np.zeros((1, 1, half_dims), np.float32)}
        feeds |= {"position": np.array([3]), "n_valid": np.array([1])}
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / f"at_{threshold}")
        session = onnxruntime.InferenceSession(str(package / "loop.onnx"), options, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in session.get_inputs()}
        iterations = session.run(["iterations"], {k: v for k, v in feeds.items() if k in wanted})[0]
        events = json.loads(Path(session.end_profiling()).read_text())
        moe = [e for e in events if e.get("cat") == "Node" and e.get("args", {}).get("op_name") == "MoE"]
        assert len(moe) == int(iterations)
        ran[threshold] = len(moe)
    assert ran[1.0] == runtime.info.max_loops and ran[0.3] < ran[1.0]


# ------------------------------------------------------------------------------------------------------- passes


def model_of(
    nodes: list[onnx.NodeProto], initializers: dict[str, np.ndarray], outputs: dict[str, list[int]]
) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [],
            [helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, v) for k, v in outputs.items()],
            [numpy_helper.from_array(v, k) for k, v in initializers.items()],
        )
    )


def test_dead_nodes_go_and_living_ones_stay() -> None:
    """A chain nobody reads disappears with its weights; what an output or a body reads is kept."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["outer"], ["r"])], "b", [], [helper.make_tensor_value_info("r", 1, [1])]
    )
    model = model_of(
        [
            helper.make_node("Neg", ["w"], ["a"]),
            helper.make_node("Neg", ["a"], ["unread"]),
            helper.make_node("Neg", ["x"], ["outer"]),
            helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body),
        ],
        {"w": np.ones(1, np.float32), "x": np.ones(1, np.float32), "c": np.array(True)},
        {"y": [1]},
    )
    onnx_passes.remove_dead_nodes(model)
    assert [n.op_type for n in model.graph.node] == ["Neg", "If"]
    assert {t.name for t in model.graph.initializer} == {"x", "c"}


def test_a_weight_in_a_body_fails_the_export() -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["r"])],
        "b",
        [],
        [helper.make_tensor_value_info("r", 1, [100])],
        [numpy_helper.from_array(np.ones(100, np.float32), "w")],
    )
    model = model_of(
        [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)], {"c": np.array(True)}, {"y": [100]}
    )
    with pytest.raises(ExportError, match=r"the loop body holds w \[100\]"):
        onnx_passes.weights_in_outer_scope(model)


def test_sizes_that_vary_have_one_name_everywhere() -> None:
    """The tracer's symbols become "rows" and "slots" in the graph and in bodies; any other size that is no number is an error."""
    info = helper.make_tensor_value_info
    body = helper.make_graph([helper.make_node("Neg", ["x"], ["r"])], "b", [], [info("r", 1, ["s7", 3])])
    branch = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    takes = [TensorSpec("c", (), torch.bool), TensorSpec("x", (ROWS, 3)), TensorSpec("past", (1, SLOTS))]

    def model(output: list[int | str | None]) -> onnx.ModelProto:
        inputs = [info("c", onnx.TensorProto.BOOL, []), info("x", 1, ["s7", 3]), info("past", 1, [1, "s9"])]
        return helper.make_model(helper.make_graph([branch], "g", inputs, [info("y", 1, output)]))

    named = model(["s7", 3])
    onnx_passes.name_sizes(named, takes)
    wanted = {"c": [], "past": [1, "slots"]}
    for graph in onnx_passes.graphs(named.graph):
        for value in (*graph.input, *graph.output):
            shape = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            assert shape == wanted.get(value.name, ["rows", 3]), value.name
    with pytest.raises(ExportError, match=r"y has a dimension 3\*s7"):
        onnx_passes.name_sizes(model(["3*s7", 3]), takes)
    with pytest.raises(ExportError, match="y has a dimension of unknown size"):
        onnx_passes.name_sizes(model(["s7", None]), takes)


def looped(nodes: list[onnx.NodeProto], result: str) -> onnx.ModelProto:
    """A model whose `Loop` carries x (4,) through `nodes`, with `w` and `v` in outer scope."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), *nodes],
        "body",
        [
            info("i", onnx.TensorProto.INT64, []),
            info("go", onnx.TensorProto.BOOL, []),
            info("x", onnx.TensorProto.FLOAT, [4]),
        ],
        [info("go_on", onnx.TensorProto.BOOL, []), info(result, onnx.TensorProto.FLOAT, [4])],
    )
    values = {"w": np.full(4, 2, np.float32), "v": np.full(4, 3, np.float32), "start": np.ones(4, np.float32)}
    loop = helper.make_node("Loop", ["times", "true", "start"], ["y"], body=body)
    return model_of([loop], values | {"times": np.array(5), "true": np.array(True)}, {"y": [4]})


def test_what_every_iteration_would_compute_alike_is_computed_once() -> None:
    """w + v and its square root leave the body; what reads the carry stays, and so does what the body gives."""
    nodes = [
        helper.make_node("Add", ["w", "v"], ["sum"]),
        helper.make_node("Sqrt", ["sum"], ["root"]),
        helper.make_node("Mul", ["x", "root"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "w"], ["x_next"]),
    ]
    before, after = looped(nodes, "x_next"), looped(nodes, "x_next")
    onnx_passes.hoist_invariants(after)
    loop = onnx_passes.find_loop(after)
    assert loop is not None
    assert [n.op_type for n in after.graph.node] == ["Add", "Sqrt", "Loop"]
    assert [n.op_type for n in next(onnx_passes.subgraphs(loop)).node] == ["Identity", "Mul", "Sub"]
    onnx.checker.check_model(after)
    a, b = (onnx_reference.ReferenceEvaluator(m).run(None, {})[0] for m in (before, after))
    np.testing.assert_array_equal(a, b)


def test_a_result_that_no_carry_enters_stays_in_the_body() -> None:
    """A body must give its outputs itself, even those every iteration computes alike."""
    model = looped([helper.make_node("Add", ["w", "v"], ["x_next"])], "x_next")
    onnx_passes.hoist_invariants(model)
    onnx.checker.check_model(model)
    assert [n.op_type for n in model.graph.node] == ["Loop"]


def test_equal_tensors_share_one_place_in_the_file(tmp_path: Path) -> None:
    """Equal content is stored once whatever its name, graph or shape; small tensors stay in the graph."""
    draw = np.random.default_rng(0)
    table = draw.standard_normal((32, 32)).astype(np.float32)
    arrays = {"model.table": table, "val_1": table.reshape(4, 8, 32), "model.table.T": table.T.copy()}
    places = []
    with onnx_weights.WeightFile(tmp_path / "weights.bin", {}, half=False) as file:
        for given, array in arrays.items():
            model = model_of(
                [helper.make_node("Neg", [given], ["y"]), helper.make_node("Neg", ["small"], ["z"])],
                {given: array, "small": np.ones(3, np.float32)},
                {"y": list(array.shape), "z": [3]},
            )
            file.take(model)
            large, small = model.graph.initializer
            assert model.graph.node[0].input[0] == large.name and not small.external_data
            places.append((large.name, external(large)))
            onnx.save(model, tmp_path / f"{len(places)}.onnx")
    assert places[0][1] == places[1][1] and [name for name, _ in places] == ["table", "val_1", "table.T"]
    assert (tmp_path / "weights.bin").stat().st_size == 2 * table.nbytes
    for i, array in enumerate(arrays.values()):
        read = onnx.load(tmp_path / f"{i + 1}.onnx").graph.initializer[0]
        np.testing.assert_array_equal(numpy_helper.to_array(read), array)


def test_a_tensor_of_the_model_is_stored_once_under_its_first_name(tmp_path: Path) -> None:
    """It is known by its name: another graph's copy is not looked at. The tracer's names say nothing."""
    table, other = (np.full((32, 32), value, np.float32) for value in (1, 2))
    found = []
    with onnx_weights.WeightFile(tmp_path / "weights.bin", {"head.weight": "embed.weight"}, half=True) as file:
        for name, array in (
            ("model.embed.weight", table), ("model.head.weight", table), ("val_0", table), ("val_0", other),
        ):  # fmt: skip
            model = model_of([helper.make_node("Neg", [name], ["y"])], {name: array}, {"y": [32, 32]})
            file.take(model)
            (tensor,) = model.graph.initializer
            found.append((tensor.name, external(tensor)))
        both = {"model.embed.weight": table, "model.head.weight": table}  # in one graph, whose names must differ
        model = model_of([helper.make_node("Add", [*both], ["y"])], both, {"y": [32, 32]})
        file.take(model)
        assert len({t.name for t in model.graph.initializer}) == 2
        assert {external(t) for t in model.graph.initializer} == {found[0][1]}
    assert [name for name, _ in found] == ["embed.weight.fp16", "embed.weight.fp16", "val_0.fp16", "val_0.fp16"]
    assert found[0] == found[1] and found[0][1] == found[2][1] != found[3][1]


def test_weights_of_linear_layers_are_laid_out_for_the_product() -> None:
    """One that is computed is transposed where it is read."""
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    model = model_of(
        [
            helper.make_node("Neg", ["w"], ["v"]),
            helper.make_node(onnx_ops.TRANSPOSED, ["w"], ["a"], domain=onnx_ops.OWN),
            helper.make_node(onnx_ops.TRANSPOSED, ["v"], ["b"], domain=onnx_ops.OWN),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ],
        {"w": w},
        {"y": [3, 2]},
    )
    model.opset_import.append(helper.make_opsetid(onnx_ops.OWN, 1))
    onnx_passes.transpose_weights(model)
    onnx.checker.check_model(model)
    assert [o.domain for o in model.opset_import] == [""]
    assert [n.op_type for n in model.graph.node] == ["Neg", "Transpose", "Add"]
    assert {t.name: t.dims[0] for t in model.graph.initializer} == {"w": 2, "w.T": 3}
    np.testing.assert_array_equal(onnx_reference.ReferenceEvaluator(model).run(None, {})[0], np.zeros((3, 2)))


def test_an_operator_may_be_called_like_a_tensor_of_its_method() -> None:
    """The tracer names results by their operators: cos of an angle is no `cos` that a host gives."""

    class Turned(torch.nn.Module):
        def forward(self, theta: torch.Tensor, cos: torch.Tensor) -> tuple[torch.Tensor]:
            return (theta.cos() * 2 + cos.cos(),)

    lower = later("rmse_edge.export.onnx.lower")
    takes = TensorSpec("theta", (2,)), TensorSpec("cos", (2,))
    program = torch.export.export(Turned(), tuple(t.zeros() for t in takes))
    traced = ExportedMethod("prelude", (1,), takes, (TensorSpec("mul", (2,)),), program)
    model = lower.to_onnx(traced, compact=False)
    onnx.checker.check_model(model)
    given = {"theta": np.array([0.5, 1.0], np.float32), "cos": np.array([2.0, 3.0], np.float32)}
    found = onnx_reference.ReferenceEvaluator(model).run(None, given)[0]
    np.testing.assert_allclose(found, np.cos(given["theta"]) * 2 + np.cos(given["cos"]), rtol=1e-6)
