"""The int8 KV cache: scales, chunking, gradients, and what counts as the same model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from helpers import QUICK_CALIBRATION, calibration_text, mixed_model, random_tokens
from small_models import RingHost, dials, lively_model, small_config, small_recipe, whole_sequence

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.arch.rmse.reading import deployed_exit
from rmse_edge.errors import ConfigError
from rmse_edge.numbers import SEGMENT
from rmse_edge.quantize import QuantizeRequest, Scheme, quantize
from rmse_edge.quantize.kv_scales import kv_scales
from rmse_edge.runtimes import Dials
from rmse_edge.runtimes.engines.torch import TorchRuntime


@pytest.fixture(scope="module")
def model() -> RMSE:
    return mixed_model()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["learned", "temporal_rope"])
def test_an_int8_cache_reads_the_same_in_every_chunking(encoding: str) -> None:
    """150 positions, a window of 64, positions that stop: chunks of any size against the whole sequence at once."""
    plain = lively_model(small_config(step_encoding=encoding))
    request = QuantizeRequest(Scheme("int8"), kv="int8", calibration_tokens=512, evaluation_tokens=0)
    model = quantize(plain, request, random_tokens(2000, 1, vocab=37)).model
    assert model.config.kv_dtype == "int8" and model.block.attention.kv_scales.shape == (2, 5, 2)
    tokens = torch.from_numpy(random_tokens(150, 3, vocab=37))[None]
    dial = dials(model, exit_threshold=0.6)
    expected, depth = whole_sequence(model, tokens, dial)
    assert depth.float().std() > 0.3
    plain_cache = load_with(model, kv_dtype="float32")
    rounding = (
        whole_sequence(plain_cache, tokens, dials(plain_cache))[0] - whole_sequence(model, tokens, dials(model))[0]
    ).abs()
    for sizes in ([1], [64], [7, 1, 30]):
        host = RingHost(model)
        logits, host_depth = host.feed(tokens, dial, sizes)
        assert host.state["past_keys"].dtype == torch.int8
        assert (host_depth == depth).float().mean() > 0.97
        # Noise of 1e-7 rarely crosses a rounding boundary; where it does, one number moves by a step of 1/127.
        error = (logits - expected).abs().amax(-1)
        assert error.median() <= 1e-4 and error.max() <= 0.5 * rounding.max(), (error.max(), rounding.max())


def test_int8_scales_reach_what_calibration_saw(model: RMSE) -> None:
    """Keys and values of every loop on the calibration text, at full depth and where positions stop, whose last state
    supplies the deeper loops; and not much more than that."""
    blocks = torch.from_numpy(random_tokens(8 * SEGMENT, 2).reshape(8, SEGMENT))
    reach = kv_scales(model, blocks)["block.attention"] * 127
    largest = torch.zeros(2, 4, 2)
    hook = model.block.register_forward_hook(
        lambda _, args, out: (
            [
                largest[i, args[1]].copy_(torch.maximum(largest[i, args[1]], x.abs().amax((0, 2, 3))))
                for i, x in enumerate(out[1:])
            ]
            and None
        )
    )
    with torch.no_grad():
        model.trajectory(blocks)
        only_full = largest.clone()
        model.trajectory(blocks, stop=deployed_exit(model))
    hook.remove()
    assert bool((largest > only_full).any())  # so that leaving the exits out would show
    assert bool((largest <= reach).all()) and bool((reach <= 1.1 * largest).all())


def test_an_int8_cache_takes_a_byte_a_number(model: RMSE) -> None:
    request = QuantizeRequest(Scheme("int8"), kv="int8", **QUICK_CALIBRATION)
    runtime = TorchRuntime(quantize(model, request, calibration_text()).model, "x")
    assert np.isfinite(runtime.feed(random_tokens(100), Dials(4)).logits).all()
    assert runtime.state_bytes() == 2 * 4 * 2 * 64 * 16  # keys and values, loops, heads, window, channels


def test_gradients_pass_an_int8_cache(model: RMSE) -> None:
    """Rounding has no slope of its own: without the straight path nothing would teach the keys."""
    request = QuantizeRequest(Scheme("int8"), kv="int8", calibration_tokens=512, evaluation_tokens=0)
    work = quantize(model, request, calibration_text()).model
    states, _, _ = work.trajectory(torch.from_numpy(random_tokens(64))[None])
    states[-1].square().sum().backward()
    gradient = work.block.attention.kv_proj.weight.grad
    assert gradient is not None and gradient.norm() > 1e-3
    with pytest.raises(ConfigError, match="kv_dtype: int8 needs scales"):
        small_recipe(model={"kv_dtype": "int8"}).model_config()


def test_caches_of_other_scales_are_other_models(model: RMSE) -> None:
    """A session of one must not be read with the scales of the other."""
    request = QuantizeRequest(Scheme("int8"), method="rtn", kv="int8", calibration_tokens=512, evaluation_tokens=0)
    found = [quantize(model, request, calibration_text(seed=s), "f").model for s in (1, 2)]
    prints = [TorchRuntime(m, "x", source="f").info.fingerprint for m in found]
    assert prints[0] != prints[1] and "f" not in prints
    assert TorchRuntime(model, "x", source="f").info.fingerprint == "f"


def load_with(model: RMSE, **changes: Any) -> RMSE:
    """The same weights under another configuration."""
    other = RMSE(dataclasses.replace(model.config, **changes)).eval()
    other.load_state_dict({n: t for n, t in model.state_dict().items() if n in other.state_dict()})
    return other
