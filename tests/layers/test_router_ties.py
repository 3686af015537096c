"""Equal router scores: the expert with the lower index is selected, exactly `top_k` of them, by every runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import mixed_model, random_tokens
from later import later
from torch import Tensor, nn

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.export import ExportRequest, export_package
from rmse_edge.layers.experts import (
    NO_CAPS,
    Caps,
    SparseExperts,
    best,
    best_partitioned,
    best_portable,
    gathered_experts,
    select,
)
from rmse_edge.layers.held import weights_of_codes, with_stored
from rmse_edge.quantize import Format
from rmse_edge.quantize.tensors import round_to_nearest
from rmse_edge.runtimes import Dials, open_runtime
from rmse_edge.runtimes.engines.torch import TorchRuntime

ort = later("onnxruntime")
onnx_experts = later("rmse_edge.export.onnx.experts")
onnx_lower = later("rmse_edge.export.onnx.lower")
onnx_ops = later("rmse_edge.export.onnx.ops")
onnx_quantize = later("rmse_edge.export.onnx.quantize")

pytestmark = [pytest.mark.onnx, pytest.mark.slow]

EXPERTS, TOP_K, D, WIDTH = 8, 2, 64, 32
# Equal sums of logits and bias, of different logits: the first three; these at zero; three behind the best one.
LOGITS = torch.tensor([[1.0, 2, 3, 0, 0, 0, 0, 0], [-2.0, -1, 0, -3, -3, -3, -3, -3], [9.0, 2, 3, 0, 0, 0, 0, 3]])
BIAS = torch.tensor([2.0, 1, 0, 0, 0, 0, 0, 0])
CHOSEN = [[0, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize("way", [best, best_portable])
def test_the_lower_index_wins_and_never_one_more_is_selected(way: Any) -> None:
    assert way(torch.tensor([[3.0, 3, 3, 0, 0]]), 2).sort().values.tolist() == [[0, 1]]
    assert way(torch.tensor([[0.0, -0.0, 0.0, -1]]), 2).sort().values.tolist() == [[0, 1]]
    draw = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, -1, 0, 1e-42, 1e30, 0.5]).unsqueeze(1)
    for experts in (1, 7, 64, 512):
        scores = torch.randint(-3, 4, (6, experts), generator=draw) * sizes
        for count in {1, min(experts, 10), experts}:
            expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
            found = way(scores, count)
            single = torch.cat([way(row, count) for row in scores.split(1)])
            assert torch.equal(single, found)
            if way is best:
                assert torch.equal(found, expected)  # in this order, too
            assert torch.equal(found.sort().values, expected.sort().values)


def test_many_rows_are_selected_by_partition_where_that_tells_which() -> None:
    scores = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    scores[0, [3, 400]] = 9.0  # equal, and both are selected
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :10]
    found = best_partitioned(scores, 10)
    assert found is not None and torch.equal(found, expected) and torch.equal(best(scores, 10), expected)
    tied = scores.clone()
    tied[7, expected[7, 9]] = 0.0
    tied[7, scores[7].argsort()[-11:-9]] = 2.0  # the last that is selected, and the first that is not
    assert best_partitioned(tied, 10) is None
    assert torch.equal(best(tied, 10), tied.sort(dim=-1, descending=True, stable=True).indices[:, :10])
    tied[7, 0] = torch.nan  # so that there are ten numbers above the least one
    assert best_partitioned(tied, 10) is None
    assert best_partitioned(scores.double(), 10) is None
    assert best_partitioned(scores, 512) is None


class Routed(nn.Module):
    """The operator alone, each expert with weights of its own."""

    def __init__(self, caps: Caps) -> None:
        super().__init__()
        self.caps = caps
        draw = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, D, generator=draw) * D**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, D, WIDTH, generator=draw) * WIDTH**-0.5)

    def forward(self, x: Tensor, logits: Tensor, active: Tensor) -> Tensor:
        return torch.ops.rmse_edge.sparse_experts(
            x, logits, logits + BIAS, active, self.up, self.down, TOP_K, *self.caps
        )


@pytest.mark.parametrize("caps", [NO_CAPS, (0.5, 0.7)], ids=["plain", "capped"])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    ("bits", "level", "experts"),
    [
        *((bits, level, "fused") for bits, level in [(32, 0), (8, 0), (8, 4), (4, 0), (4, 4)]),
        *((bits, 4, "gathered") for bits in (32, 8, 4)),
    ],
)
def test_onnx_experts_are_those_of_pytorch(bits: int, level: int, experts: str, compact: bool, caps: Caps) -> None:
    """`MoE` and `QMoE`, which have a rule of their own, compute the experts that the model selects; so does a loop over them,
    and what multiplies copies of their weights.
    """
    gathered = experts == "gathered"
    model = Routed(caps).eval()
    tensors = {}
    if bits < 32:
        fmt = Format(bits, 32 if bits == 4 else None)
        tensors = {name: round_to_nearest(p.detach(), fmt) for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.data.copy_(tensors[name].dequantize())
    traced = with_stored(model, tensors, {})
    x = torch.randn(len(LOGITS), D, generator=torch.Generator().manual_seed(1))
    given = (x, LOGITS, torch.ones(len(x), dtype=torch.bool))
    graph = torch.onnx.export(
        torch.export.export(traced, given), (), dynamo=True, opset_version=onnx_lower.OPSET, verbose=False,
        custom_translation_table=onnx_ops.translations(compact, gathered), input_names=["x", "logits", "active"],
    ).model_proto  # fmt: skip
    if tensors:
        onnx_quantize.use_integers(graph, tensors, weights_of_codes(traced), level)
    onnx_experts.expand_expert_loops(graph)
    used = {node.op_type for node in graph.graph.node}
    fused, loop = not gathered and caps == NO_CAPS, not gathered and caps != NO_CAPS
    assert (bool({"MoE", "QMoE"} & used), "Loop" in used) == (fused, loop)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, dict(zip(("x", "logits", "active"), (t.numpy() for t in given))))
    routing = select(LOGITS, BIAS, TOP_K)
    assert routing.experts.sort().values.tolist() == CHOSEN
    expected = gathered_experts(x, routing, model.up, model.down, caps).detach()
    error = (torch.from_numpy(found) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < (0.03 if bits < 32 and level and not gathered else 1e-5), error


def tied_model() -> RMSE:
    """64 experts with equal rows in the router, whose logits differ by what the balancing bias makes up for.

    So all scores of an iteration are equal but for those of the first 3 k, which are lower, and selecting other experts
    changes both what is computed and how it is weighed.
    """
    model = mixed_model(n_experts=64, max_loops=3)
    experts = model.block.experts
    assert isinstance(experts, SparseExperts)
    with torch.no_grad():
        experts.router.weight.copy_(experts.router.weight[:1].expand(64, -1))
        experts.balance_bias.zero_()
        experts.step_logits.zero_()
        experts.balance_bias[1::2] = 1
        experts.step_logits[:, ::2] = 1
        for k in range(3):
            experts.step_logits[k, : 3 * k] -= 4
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", ["onnx", *(pytest.param(target, marks=pytest.mark.nightly) for target in ("executorch", "coreml"))]
)
def test_a_router_of_equal_rows_exports_and_agrees(target: str, tmp_path: Path) -> None:
    if target == "executorch":
        from helpers import require_executorch

        require_executorch()
    elif target == "coreml":
        pytest.importorskip("coremltools")
        # The interpreter multiplies with NumPy, whose library has kernels by processor.
        x, row = (np.random.default_rng(n).standard_normal((64, 64)).astype(np.float32) for n in range(2))
        if any(len(np.unique(scores)) > 1 for scores in x @ np.repeat(row[:1], 64, 0).T):
            pytest.skip("NumPy on this processor gives equal rows of a matrix products that differ")
    model = tied_model()
    package = export_package(model, tmp_path / "tied.rmse", ExportRequest(target))
    assert all(not s["undecided"] for s in package.manifest["parity"]["settings"].values())
    tokens = random_tokens(150)
    reference = TorchRuntime(model, "tied")
    chosen: dict[int, set[tuple[int, ...]]] = {k: set() for k in range(3)}
    model.block.experts.observer = lambda k, routing: chosen[k].update(
        tuple(row)
        for row in routing.experts.sort().values.tolist()
        if any(row)  # zeros: padding, not computed
    )
    full = Dials(3)
    expected, found = (runtime.feed(tokens, full) for runtime in (reference, open_runtime(tmp_path / "tied.rmse")))
    assert chosen == {k: {tuple(range(3 * k, 3 * k + 4))} for k in range(3)}
    assert np.abs(found.logits - expected.logits).max() < 1e-4
    assert (found.logits.argmax(-1) == expected.logits.argmax(-1)).all() and (found.depth == expected.depth).all()
