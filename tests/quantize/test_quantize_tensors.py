"""Codes, scales and GPTQ on single weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rmse_edge.errors import UserError
from rmse_edge.layers.held import unpacked
from rmse_edge.quantize import Format, QuantizedTensor
from rmse_edge.quantize.gptq import DAMP, best_scales, gptq
from rmse_edge.quantize.tensors import encode, full_range, grouped, round_to_nearest

FORMATS = [Format(4, 32), Format(4, 64), Format(4, 16, symmetric=False), Format(8), Format(8, 32)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rounding_errs_by_at_most_half_a_step(fmt: Format) -> None:
    """Within the range of a group; scales are bfloat16 numbers, so a rounded-down one may clip the extremes a little."""
    weight = draw(24, 128)
    q = round_to_nearest(weight, fmt)
    step = q.scales.repeat_interleave(128 // q.scales.shape[-1], -1)
    error = (q.dequantize() - weight).abs()
    clipped = (q.codes == 0) | (q.codes == fmt.largest)
    assert bool((error <= 0.501 * step)[~clipped].all())
    assert bool((error <= 0.55 * step + 2**-7 * weight.abs()).all())
    assert torch.equal(q.scales, q.scales.bfloat16().float())
    assert q.codes.dtype == torch.uint8 and int(q.codes.max()) <= fmt.largest
    assert (q.zeros is None) == fmt.symmetric


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_what_codes_stand_for_is_exact_in_float32(fmt: Format) -> None:
    """(code - zero) * scale needs no more than 16 bits of mantissa: float32 and float64 agree to the bit."""
    q = round_to_nearest(draw(8, 64), fmt)
    zero = fmt.middle if q.zeros is None else q.zeros.double().unsqueeze(-1)
    exact = ((grouped(q.codes.double(), fmt) - zero) * q.scales.double().unsqueeze(-1)).flatten(-2)
    assert torch.equal(q.dequantize().double(), exact)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_quantised_weight_survives_another_rounding(fmt: Format) -> None:
    """Codes from what the codes stand for are the same codes: nothing is lost by going through float32."""
    q = round_to_nearest(draw(8, 64), fmt)
    again = encode(grouped(q.dequantize(), fmt), q.scales, q.zeros, fmt).flatten(-2)
    assert torch.equal(again.to(torch.uint8), q.codes)


def test_packing() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 2)
    q = QuantizedTensor(Format(4, 16), codes, torch.ones(2, 2))
    assert q.packed()[0, :3].tolist() == [0x10, 0x32, 0x54]  # the first code in the low half
    assert torch.equal(unpacked(q.packed(), 4), codes)
    assert q.nbytes == codes.numel() // 2 + 2 * 4


def test_zero_groups_and_outliers() -> None:
    """A group of zeros stays zero, and an outlier coarsens its own group only."""
    weight = draw(1, 96)
    weight[:, :32] = 0
    weight[:, 32] = 1000
    for symmetric in (True, False):
        q = round_to_nearest(weight, Format(4, 32, symmetric))
        assert not q.dequantize()[:, :32].any()
        assert (q.dequantize() - weight)[:, 64:].abs().max() < 0.3 < (q.dequantize() - weight)[:, 33:64].abs().max()


def test_asymmetric_codes_fit_lopsided_weights_better() -> None:
    weight = draw(16, 64).abs()
    errors = [(round_to_nearest(weight, Format(4, 32, s)).dequantize() - weight).norm() for s in (True, False)]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Format(5), "bits: got 5, expected 4 or 8"),
        (lambda: Format(4, 48), "group size: got 48, expected 16, 32, 64, 128 or 256"),
        (lambda: Format(4, 64).groups(96), "group size 64 does not divide 96 inputs"),
    ],
)
def test_formats_that_do_not_exist(make, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == message


# ------------------------------------------------------------------------------------------------------------- gptq


def correlated(rows: int, inputs: int, seed: int = 1) -> Tensor:
    """Inputs of which a few directions hold most of the energy, as those of trained layers."""
    mix = draw(inputs, inputs, seed=seed) * torch.linspace(3, 0.1, inputs)[:, None]
    return draw(rows, inputs, seed=seed + 1) @ mix


def output_error(q: QuantizedTensor, weight: Tensor, x: Tensor) -> float:
    return float(((q.dequantize() - weight) @ x.T).square().sum())


def by_the_book(weight: Tensor, hessian: Tensor, fmt: Format) -> Tensor:
    """Algorithm 1 of the paper with its full inverse, updated by elimination after every column, in float64. Codes."""
    scales, zeros = best_scales(weight, hessian.diagonal(), fmt)
    count = weight.shape[1]
    h = hessian.double() + DAMP * hessian.double().diagonal().mean() * torch.eye(count, dtype=torch.float64)
    inverse, w = torch.linalg.inv(h), weight.double().clone()
    order = hessian.diagonal().argsort(descending=True).tolist()
    codes = torch.zeros_like(weight)
    for i in order:
        group = i // (fmt.group or count)
        scale, zero = scales[:, group].double(), fmt.middle if zeros is None else zeros[:, group].double()
        codes[:, i] = (w[:, i] / scale + zero).round().clamp(0, fmt.largest).float()
        error = (w[:, i] - (codes[:, i] - zero) * scale) / inverse[i, i]
        w -= error[:, None] * inverse[i][None]
        inverse = inverse - inverse[:, i, None] @ inverse[None, i] / inverse[i, i]
    return codes


@pytest.mark.parametrize("fmt", [Format(4, 32), Format(4, 32, symmetric=False), Format(8)], ids=str)
def test_gptq_is_the_paper_s_algorithm(fmt: Format) -> None:
    """96 inputs, more than one block: the Cholesky form against elimination of the whole inverse."""
    weight, x = draw(16, 96), correlated(400, 96)
    hessian = x.T @ x
    found, expected = gptq(weight, hessian, fmt).codes.float(), by_the_book(weight, hessian, fmt)
    assert (found == expected).float().mean() > 0.995  # float32 against float64: ties may fall otherwise
    assert (found - expected).abs().max() <= 1


@pytest.mark.parametrize("fmt", [Format(4, 32), Format(4, 32, symmetric=False)], ids=str)
def test_gptq_keeps_outputs_better_than_rounding(fmt: Format) -> None:
    weight, x = draw(32, 64), correlated(500, 64)
    rounded = output_error(round_to_nearest(weight, fmt), weight, x)
    assert output_error(gptq(weight, x.T @ x, fmt), weight, x) < 0.5 * rounded


def test_a_stack_is_solved_matrix_by_matrix() -> None:
    weights, xs = draw(40, 8, 32), [correlated(100, 32, seed=i) for i in range(40)]
    hessians = torch.stack([x.T @ x for x in xs])
    stacked = gptq(weights, hessians, Format(4, 32))
    for i in (0, 31, 32, 39):
        alone = gptq(weights[i], hessians[i], Format(4, 32))
        assert torch.equal(stacked.codes[i], alone.codes) and torch.equal(stacked.scales[i], alone.scales)


def test_gptq_with_hardly_any_rows() -> None:
    """Fewer rows than inputs, one row, none at all: damped, and never worse than nonsense."""
    weight = draw(8, 64)
    for rows in (10, 1, 0):
        x = correlated(max(rows, 1), 64)[:rows]
        q = gptq(weight, x.T @ x, Format(4, 32))
        assert (q.dequantize() - weight).norm() / weight.norm() < 0.35


def test_scales_favour_inputs_that_count() -> None:
    """With all weight on the small half of a group, its range shrinks to fit that half."""
    weight = draw(4, 32)
    weight[:, 16:] *= 1.4
    importance = torch.ones(32)
    importance[16:] = 1e-6
    scales, _ = best_scales(weight, importance, Format(4, 32))
    assert bool((scales <= full_range(weight, Format(4, 32))[0]).all()) and bool(
        (scales < 0.95 * full_range(weight, Format(4, 32))[0]).any()
    )
