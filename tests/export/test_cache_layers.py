"""Attention reads the cache of all layers where it lies."""

from __future__ import annotations

import pytest
import torch
from helpers import require_executorch
from later import later
from torch import Tensor

passes = later("rmse_edge.export.executorch.passes")
attend = later("rmse_edge.layers.attend")

pytestmark = [pytest.mark.executorch, pytest.mark.slow]

require_executorch()

LAYERS, GROUPS, SLOTS, ROWS, DIMS = 3, 2, 20, 5, 8


class Layers(torch.nn.Module):
    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart  # keys and values of different layers

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        own = query[:, :GROUPS]
        masks = torch.zeros(1, 1, ROWS, SLOTS), torch.zeros(1, 1, ROWS, ROWS)
        past = list(zip(keys.split(GROUPS, 1), values.split(GROUPS, 1)[:: -1 if self.apart else 1]))
        for of_layer in past:
            query = attend.attend(query, (own, own), of_layer, masks, operator=True)
        return query


@pytest.mark.parametrize("apart", [False, True])
def test_the_cache_is_not_cut_apart(apart: bool) -> None:
    from executorch.exir import EdgeCompileConfig, to_edge

    draw = torch.Generator().manual_seed(3)
    query = torch.randn(1, 2 * GROUPS, ROWS, DIMS, generator=draw)
    cached = [torch.randn(1, LAYERS * GROUPS, SLOTS, DIMS, generator=draw) for _ in range(2)]
    module = Layers(apart).eval()
    edge = to_edge(
        torch.export.export(module, (query, *cached), strict=False),
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    program = edge.transform(passes.EDGE_PASSES).exported_program()
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    firsts = [node.args[-1] for node in calls if node.target == passes.ATTENTION]
    # The layer in the middle has keys and values of its own either way.
    assert firsts == ([0, GROUPS, 0] if apart else [0, GROUPS, 2 * GROUPS])
    assert any(node.target == passes.SPLIT for node in calls) == apart
    torch.testing.assert_close(program.module()(query, *cached), module(query, *cached))
