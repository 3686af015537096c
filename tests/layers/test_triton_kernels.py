"""Products with packed weights: on a GPU as compiled kernels, elsewhere in Triton's interpreter, which runs the same source."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from architectures import TEXTS, settings_of, text_of
from torch import Tensor

from rmse_edge.arch.registry import arch_of_model
from rmse_edge.layers import experts, packed
from rmse_edge.layers.experts import NO_CAPS, chosen_by, device_experts, gathered_experts
from rmse_edge.layers.held import Rounded, Stored, with_stored
from rmse_edge.quantize import QuantizedTensor, QuantizeRequest, Scheme, quantize
from rmse_edge.quantize.tensors import Format, round_to_nearest
from rmse_edge.runtimes.engines.cuda import CudaRuntime

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton: pip install 'rmse-edge[cuda]'", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # compiled, where there is one: a part of make gpu


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":  # read when kernels are defined, and when they are called
            patch.setenv("TRITON_INTERPRET", "1")
        from rmse_edge.layers import triton_kernels

        yield triton_kernels


@pytest.fixture
def as_on_gpu(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take the way that they take on a GPU."""
    monkeypatch.setattr(packed, "on_gpu", lambda x: True)


FORMATS = {
    "int4, groups of 16": Format(4, 16),
    "int4, groups of 32, asymmetric": Format(4, 32, False),
    "int4, one group": Format(4),
    "int8": Format(8),
    "int8, asymmetric": Format(8, 32, False),
}


def moved(q: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Its parts as a GPU has them."""
    zeros = None if q.zeros is None else q.zeros.to(DEVICE)
    return q.packed().to(DEVICE), q.scales.to(DEVICE), zeros


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found.cpu().float(), expected.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "many"), [(1, False), (3, False), (9, True), (21, True)])
def test_a_dense_layer(kernels: ModuleType, name: str, rows: int, many: bool) -> None:
    """Sizes that no block divides."""
    generator = torch.Generator().manual_seed(1)
    q = round_to_nearest(torch.randn(37, 96, generator=generator), FORMATS[name])
    x = torch.randn(rows, 96, generator=generator)
    found = kernels.product(x.to(DEVICE), *moved(q), q.format.bits, None, 1, many)
    close(found, x @ q.dequantize().T)


@pytest.mark.parametrize("name", ["int4, groups of 16", "int4, groups of 32, asymmetric", "int8"])
@pytest.mark.parametrize(("rows", "per_row", "many"), [(1, 3, False), (3, 1, False), (5, 3, True), (40, 2, True)])
def test_each_pair_meets_its_own_expert(kernels: ModuleType, name: str, rows: int, per_row: int, many: bool) -> None:
    """Experts that nobody chose, and one with more pairs than a tile has."""
    generator = torch.Generator().manual_seed(2)
    q = round_to_nearest(torch.randn(7, 20, 64, generator=generator), FORMATS[name])
    x = torch.randn(rows, 64, generator=generator)
    whose = torch.randint(0, 5, (rows * per_row,), generator=generator)
    whose[: rows * per_row // 2] = 3
    found = kernels.product(x.to(DEVICE), *moved(q), q.format.bits, whose.to(DEVICE), per_row, many)
    close(found, torch.einsum("pnk,pk->pn", q.dequantize()[whose], x.repeat_interleave(per_row, 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("many", [False, True])
def test_weights_that_are_numbers(kernels: ModuleType, dtype: torch.dtype, many: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 20, 48, generator=generator).to(dtype)
    x = torch.randn(6, 48, generator=generator).to(dtype).float()
    whose = torch.tensor([0, 3, 3, 1, 0, 3])
    found = kernels.product(x.to(DEVICE), weight.to(DEVICE), None, None, 16, whose.to(DEVICE), 1, many, dtype)
    close(found, torch.einsum("pnk,pk->pn", weight[whose].float(), x))


@pytest.mark.parametrize("pairs", [1, 15, 16, 17, 100])
def test_tiles_hold_every_pair_once(kernels: ModuleType, pairs: int) -> None:
    whose = torch.randint(0, 9, (pairs,), generator=torch.Generator().manual_seed(pairs))
    tiles = kernels.tiles_of(whose.to(DEVICE), 11)
    seen = []
    for expert, start, rows in zip(tiles.expert.tolist(), tiles.start.tolist(), tiles.rows.tolist()):
        assert rows <= kernels.TILE
        mine = tiles.order[start : start + rows].tolist()
        assert all(whose[pair] == expert for pair in mine)
        seen += mine
    assert sorted(seen) == list(range(pairs))


@pytest.mark.parametrize("rows", [2, 12])
@pytest.mark.parametrize("held", ["float32", "int4", "bfloat16"])
def test_experts(as_on_gpu: None, monkeypatch: pytest.MonkeyPatch, held: str, rows: int) -> None:
    """The whole of what routed experts make, against fetching their weights; in bfloat16 by grouped_mm as well."""
    generator = torch.Generator().manual_seed(4)
    gate_up, down = torch.randn(6, 32, 64, generator=generator), torch.randn(6, 64, 16, generator=generator)
    x, scores = torch.randn(rows, 64, generator=generator), torch.randn(rows, 6, generator=generator)
    both: list[Any] = [gate_up, down]
    if held == "int4":
        q = [round_to_nearest(w, Format(4, 16)) for w in both]
        both, (gate_up, down) = [Stored("w", t) for t in q], [t.dequantize() for t in q]
    elif held == "bfloat16":
        both = [Rounded("w", w.to(torch.bfloat16)) for w in both]
        gate_up, down = (w().cpu() for w in both)
    expected = gathered_experts(x, chosen_by(scores, scores, 2), gate_up, down)
    routing = chosen_by(scores.to(DEVICE), scores.to(DEVICE), 2)
    for grouped_mm in (True, False):
        monkeypatch.setattr(experts, "GROUPED_MM", grouped_mm)
        found = device_experts(x.to(DEVICE), routing, *(w.to(DEVICE) for w in both), NO_CAPS)
        scale = float(expected.abs().max())
        close(found / scale, expected / scale, 2e-2 if held == "bfloat16" else 1e-5)


@torch.no_grad()
def test_a_model_by_kernels_says_what_it_says_without(as_on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers and experts of a package's integers, in calls of many rows and of one."""
    case = next(c for c in TEXTS if c.name == "toy")
    model = copy.deepcopy(case.quantizable())
    q = quantize(model, QuantizeRequest(Scheme("int4", dense_group_size=16, group_size=16), method="rtn"))
    text, dials = text_of(case)[:10], settings_of(case)["adaptive"]
    packed_model = with_stored(q.model, q.tensors, arch_of_model(model).tied(model.config))
    ran = []
    true = packed.packed_product
    monkeypatch.setattr(packed, "packed_product", lambda *given: ran.append(len(given[0])) or true(*given))
    ours = CudaRuntime(packed_model, case.name, device=DEVICE)
    found = [ours.feed(part, dials) for part in (text[:9], text[9:])]
    assert min(ran) <= packed.FEW_ROWS < max(ran)
    monkeypatch.setattr(packed, "on_gpu", lambda x: False)
    theirs = CudaRuntime(with_stored(q.model, q.tensors, arch_of_model(model).tied(model.config)), "toy", device="cpu")
    for part, ours_of in zip((text[:9], text[9:]), found):
        expected = theirs.feed(part, dials)
        assert (ours_of.depth == expected.depth).all()
        close(torch.from_numpy(ours_of.logits), torch.from_numpy(expected.logits), 1e-4)
