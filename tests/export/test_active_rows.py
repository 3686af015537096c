"""Rows that are computed for nothing are found, and only those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import require_executorch
from later import later
from torch import Tensor

operators = later("rmse_edge.export.executorch.operators")
passes = later("rmse_edge.export.executorch.passes")
attend = later("rmse_edge.layers.attend")

pytestmark = [pytest.mark.executorch, pytest.mark.slow]

require_executorch()

ROWS, WIDTH = 6, 8
TOLD = {"rms_norm": 3, "float_linear": 3, "attention": 10}  # and which argument says what is active


class Computed(torch.nn.Module):
    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.compute = compute
        self.weight = torch.nn.Buffer(torch.linspace(-1, 1, WIDTH * WIDTH).reshape(WIDTH, WIDTH))
        self.scale = torch.nn.Buffer(torch.linspace(0.5, 1, WIDTH))

    def forward(self, x: Tensor, old: Tensor, active: Tensor) -> Any:
        return self.compute(self, x, old, active)

    def linear(self, x: Tensor) -> Tensor:
        return operators.float_linear(x, self.weight, None, None)

    def norm(self, x: Tensor) -> Tensor:
        return operators.rms_norm(x, self.scale, 1e-6, None)

    def attention(self, query: Tensor, keys: Tensor) -> Tensor:
        mask = torch.zeros(1, 1, ROWS, ROWS)
        return attend.attention(query, keys, keys, mask, None, None, None, None, None, None, None, 0)


def heads(x: Tensor) -> Tensor:
    """(1, C, d) -> (1, 2, C, d / 2)."""
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def one_layer(m: Computed, x: Tensor, old: Tensor, active: Tensor) -> Tensor:
    return torch.where(active[..., None], x + m.norm(m.linear(x) * 2), old)


def layers(m: Computed, x: Tensor, old: Tensor, active: Tensor) -> Tensor:
    """Keys are read by every query; in between there are views and permutations."""
    seen = m.attention(heads(m.linear(x)), heads(m.norm(x)))
    seen = m.linear(seen.transpose(1, 2).flatten(2).reshape(ROWS, WIDTH)).reshape(1, ROWS, WIDTH)
    return torch.where(active[..., None], seen.sigmoid(), old)


def read_elsewhere(m: Computed, x: Tensor, old: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    y = m.linear(x)
    return torch.where(active[..., None], m.norm(y), old), y


def mixed(m: Computed, x: Tensor, old: Tensor, active: Tensor) -> Tensor:
    """Every row is made of all."""
    y = m.linear(x)
    return torch.where(active[..., None], y + y.mean(1, keepdim=True), old)


def two_conditions(m: Computed, x: Tensor, old: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    y = m.linear(x)
    return torch.where(active[..., None], y, old), torch.where(active[..., None], old, y)


def others(m: Computed, x: Tensor, old: Tensor, active: Tensor) -> Tensor:
    """What loops lack: the flags are made after it, and it is the rows without one that are read."""
    y = m.norm(m.linear(x))
    ran = torch.arange(ROWS) < active.sum()
    return torch.where(ran[None, :, None], old, y)


def decided(m: Computed, x: Tensor, old: Tensor, active: Tensor) -> Tensor:
    """Whether a row goes on is asked of all, and counts where it was active."""
    return active & ((m.norm(x) - old).square().sum(-1) < 0.5)


CASES: dict[Callable[..., Any], list[str]] = {
    one_layer: ["float_linear", "rms_norm"],
    layers: ["float_linear", "attention", "float_linear"],  # the query's, not the norm of the keys
    read_elsewhere: ["rms_norm"],
    mixed: [],
    two_conditions: [],
    others: ["float_linear", "rms_norm"],
    decided: ["rms_norm"],
}


@pytest.mark.parametrize("compute", CASES)
def test_rows_that_nobody_reads_are_left_out(compute: Callable[..., Any]) -> None:
    from executorch.exir import EdgeCompileConfig, to_edge

    draw = torch.Generator().manual_seed(3)
    x, old = (torch.randn(1, ROWS, WIDTH, generator=draw) for _ in range(2))
    active = torch.tensor([[True, False, False, True, True, False]])
    module = Computed(compute).eval()
    config = EdgeCompileConfig(_check_ir_validity=False)
    edge = to_edge(torch.export.export(module, (x, old, active), strict=False), compile_config=config)
    program = edge.transform(passes.EDGE_PASSES).exported_program()
    told = []
    for node in program.graph.nodes:
        name = str(getattr(node.target, "_schema", node.target)).split("(")[0].split("::")[-1]
        if name in TOLD and node.args[TOLD[name]] is not None:
            told.append(name)
    assert told == CASES[compute]
    found, expected = program.module()(x, old, active), module(x, old, active)
    torch.testing.assert_close(found, expected)
