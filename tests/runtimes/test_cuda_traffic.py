"""Bytes that calls read: counted operator by operator, against sums over the model's own tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import mixed_model
from ouro_models import lively_ouro

from rmse_edge.quantize import Scheme
from rmse_edge.quantize.tensors import round_to_nearest
from rmse_edge.runtimes.cuda.traffic import traffic
from rmse_edge.runtimes.engines.cuda import matrices_in


def nbytes(model: Any, pattern: str, leave: tuple[str, ...] = ()) -> int:
    return sum(
        t.nbytes
        for n, t in model.state_dict().items()
        if n.startswith(pattern) and not any(part in n for part in leave)
    )


def test_an_iteration_reads_each_matrix_the_chosen_experts_and_the_past() -> None:
    model = mixed_model()
    c, experts = model.config, model.block.experts
    dense = nbytes(
        model, "block.", ("experts.gate_up_proj", "experts.down_proj", "step_logits", "step_cos", "step_sin", "load")
    )
    table_rows = 4 * c.n_experts + 4 * c.d_model  # a loop's logits and its encoding
    outside = nbytes(model, "norm.") + nbytes(model, "gate.")
    expert = experts.gate_up_proj[0].nbytes + experts.down_proj[0].nbytes
    spec = model.spec(1)
    past = sum(s.row.nbytes for s in spec.rows)
    found = traffic(model)
    # Angles of the loop, where channels are reserved for them, are a few bytes.
    assert found.of_iteration(1) == pytest.approx(dense + table_rows + outside + c.top_k * expert + past, rel=0.01)
    many = found.of_iteration(64) - found.of_iteration(1)
    assert many == (c.n_experts - c.top_k) * expert  # 64 rows choose any of them; the rest is read once for all


def test_prelude_and_head_are_read_once() -> None:
    model = lively_ouro()
    found = traffic(model)
    whole = found.of_call(1, 0)
    matrix = model.lm_head.weight.nbytes
    assert matrix < whole < 1.2 * matrix + 100_000
    steps = [found.of_call(1, n + 1) - found.of_call(1, n) for n in range(model.spec(1).max_loops)]
    assert len(set(steps)) == 1 and steps[0] > 0
    assert found.of_call(1, 1.5) == pytest.approx((found.of_call(1, 1) + found.of_call(1, 2)) / 2)


def test_fewer_bits_are_fewer_bytes() -> None:
    """Of the matrices alone: half in bfloat16, in int4 with groups of 16 a code and an eighth of a scale each."""
    model = lively_ouro()
    rounded = matrices_in(model, torch.bfloat16)
    formats = Scheme("int4", group_size=16, dense_group_size=16).formats(model)
    packed = {n: round_to_nearest(model.get_parameter(n).detach(), f) for n, f in formats.items()}
    full, half, quarter = (traffic(model, held).of_iteration(1) for held in (None, rounded, packed))
    in_loop = sum(model.get_parameter(n).numel() for n in rounded if n.startswith("model.layers"))
    assert full - half == 2 * in_loop
    assert full - quarter == 4 * in_loop - in_loop // 2 - 4 * in_loop // 16  # scales are float32 in a float32 model
