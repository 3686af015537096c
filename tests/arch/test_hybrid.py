"""Hybrids: layers written out or filled by ratios, loops of some of them, and what a configuration may not say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import small_hybrid
from helpers import assert_one_line, random_tokens
from paths import ROOT
from published_code import fed, whole

from rmse_edge.arch.common.hybrid_model import HybridModel
from rmse_edge.arch.hybrid.config import HybridConfig, filled
from rmse_edge.arch.registry import read_config
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint, stored_keys
from rmse_edge.errors import CheckpointError, ConfigError
from rmse_edge.loop.contract import Append, check_spec
from rmse_edge.loop.dials import Dials
from rmse_edge.quantize import QuantizeRequest, Scheme, quantize
from rmse_edge.runtimes.engines.torch import TorchRuntime

MIXERS = ("atlas", "gated_deltanet", "mamba3", "rodimus_plus", "gated_attention")  # all of them
FIGURE = {"atlas": 1, "mamba3": 3.5, "gated_deltanet": 3.5, "gated_attention": 2}


def test_ratios_fill_the_layers() -> None:
    layers = ("atlas", *["mamba3"] * 4, *["gated_deltanet"] * 3, *["gated_attention"] * 2)
    assert filled(FIGURE, 10) == layers
    assert HybridConfig.from_dict({"ratios": FIGURE, "n_layers": 10}).layers == layers
    assert filled(FIGURE, 3) == ("mamba3", "gated_deltanet", "gated_attention")
    assert [len(filled(FIGURE, n)) for n in range(1, 30)] == list(range(1, 30))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": ["mamba3", "mamba4"]}, "layers[1]: got 'mamba4', expected one of gated_deltanet, mamba3"),
        ({"layers": []}, "layers: got [], expected a list of layers"),
        ({"ratios": {"mamba4": 1}, "n_layers": 2}, "layers[0]: got 'mamba4', expected one of"),
        ({"ratios": {"mamba3": 0}, "n_layers": 2}, "ratios: got {'mamba3': 0}, expected an object of positive numbers"),
        ({"ratios": {"mamba3": 1}}, "n_layers: got None, expected 1..1024, which ratios fill"),
        ({"ratios": {"mamba3": 1}, "n_layers": 2, "layers": ["mamba3"]}, "ratios: fill layers, and layers are there"),
        ({"n_layers": 2}, "n_layers: is read with ratios"),
        ({"think": [3, 5]}, "think: got (3, 5), expected 0 <= first < end <= 4 layers"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads: got 3, expected a divisor of n_heads (4)"),
        ({"rotary_dims": 7}, "rotary_dims: got 7, expected an even number, at most head_dim (64)"),
        ({"deltanet_key_heads": 3}, "deltanet_key_heads: got 3, expected a divisor of deltanet_value_heads (4)"),
        ({"mamba_angles": 33}, "mamba_angles: got 33, expected at most half of mamba_state_dim (32)"),
        ({"n_experts": 4}, "top_k: got 10, expected at most n_experts (4)"),
        ({"n_experts": 16, "intermediate_size": 8}, "intermediate_size: got 8, expected 0, since there are experts"),
        ({"mamba_least_step": 0.5}, "mamba_most_step: got 0.1, expected at least mamba_least_step (0.5)"),
        ({"layers": ["rodimus_plus"]}, "intermediate_size: got 0, expected above 0, or n_experts, for rodimus_plus"),
        ({"atlas_degree": 4}, "atlas_degree: got 4, expected 1, 2 or 3"),
        ({"atlas_segment": 65}, "atlas_segment: got 65, expected 2 to 64"),
        ({"exit_rules": ["entropy_change"]}, "exit_rules: got 'entropy_change', expected some of gate, delta, cosine"),
        ({"colour": 1}, "unknown key 'colour'"),
    ],
)
def test_what_a_configuration_may_not_say(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hybrid"} | values))
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "config.json")
    assert_one_line(str(caught.value), message)


@pytest.mark.slow
def test_one_loop_of_every_mixer_is_the_plain_stack_bit_for_bit() -> None:
    looped, text = small_hybrid().eval(), random_tokens(100, vocab=65)
    values = looped.config.to_dict() | {"think": None, "think_loops": 1, "untrained_loops": 0}
    plain = HybridModel(HybridConfig.from_dict(values)).eval()
    plain.load_state_dict(looped.state_dict())
    for cut in ((100,), (33, 1, 66)):
        once, _ = fed(looped, text, cut, Dials(1))
        assert np.array_equal(once, fed(plain, text, cut, Dials(1))[0])
    tokens = torch.from_numpy(text)
    assert torch.equal(whole(looped, tokens, Dials(1)).logits, whole(plain, tokens, Dials(1)).logits)
    assert not np.array_equal(fed(looped, text, (100,), Dials(2))[0], once)


@pytest.mark.slow
def test_the_state_does_not_grow_where_no_layer_attends_beyond_its_window() -> None:
    model = small_hybrid().eval()
    spec = model.spec(1)
    check_spec(spec)
    assert spec.capacity is None and not any(isinstance(s.update, Append) for s in spec.state)
    runtime = TorchRuntime(model, "hybrid")
    runtime.feed(random_tokens(10, vocab=65), Dials(2))
    few = runtime.state_bytes()
    runtime.feed(random_tokens(1000, vocab=65), Dials(1))
    assert runtime.state_bytes() == few == sum(a.nbytes for a in runtime.tensors().values())
    runtime.calls.grow(100_000)  # what a host allocates for a text of this length
    assert runtime.info.kept_bytes(100_000) == few


def test_a_text_has_no_end_where_no_layer_attends_to_all_of_it() -> None:
    """Of others `max_position_embeddings` is the end."""
    sizes = {"vocab_size": 65, "d_model": 32, "max_position_embeddings": 16, "n_heads": 2, "head_dim": 16}
    text = random_tokens(40, vocab=65)
    for window in (8, None):
        model = HybridModel(HybridConfig(layers=("gated_deltanet", "gated_attention"), window=window, **sizes)).eval()
        if window is None:
            with pytest.raises(ConfigError, match=r"chunk: got 40, expected 1\.\.16, the positions of a call"):
                whole(model, torch.from_numpy(text), Dials(1))
        else:
            found = whole(model, torch.from_numpy(text), Dials(1)).logits
            np.testing.assert_allclose(found, fed(model, text, (13, 1, 26), Dials(1))[0], atol=1e-5)


@pytest.mark.slow
def test_all_loops_may_be_computed_for_what_later_positions_read() -> None:
    """With "all" a state takes in what every loop makes of a position; with "repeat" what its last one made."""
    model, text = small_hybrid().eval(), random_tokens(80, vocab=65)
    twin = HybridModel(HybridConfig.from_dict(model.config.to_dict() | {"kv_policy": "all"})).eval()
    twin.load_state_dict(model.state_dict())
    full = Dials(3)
    np.testing.assert_allclose(fed(model, text, (80,), full)[0], fed(twin, text, (80,), full)[0], atol=1e-6)
    stopping = Dials(3, exit_threshold=0.5)
    whole_text = whole(twin, torch.from_numpy(text), stopping)
    for cut in ((80,), (1,) * 80, (30, 50)):
        logits, depth = fed(twin, text, cut, stopping)
        np.testing.assert_allclose(logits, whole_text.logits, atol=2e-5)
        assert np.array_equal(depth, whole_text.depth) and len(set(depth)) > 1
    assert np.abs(fed(model, text, (80,), stopping)[0] - whole_text.logits.numpy()).max() > 1e-3


@pytest.mark.parametrize(("name", "quant"), [("hybrid", "int4"), ("qwen3_next", "int8"), ("rodimus_plus", "int4")])
def test_every_tensor_has_a_line_in_the_quantiser_s_table(name: str, quant: str) -> None:
    """Matrices become integers; what decides, decays or scales stays float."""
    model = small_hybrid() if name == "hybrid" else load_checkpoint(ROOT / "tests" / "data" / name)
    found = quantize(model.eval(), QuantizeRequest(Scheme(quant), method="rtn"), None, "a fingerprint")
    known = {*found.tensors, *found.report["float_tensors"]}
    assert known >= set(stored_keys(model.config, list(model.state_dict())))
    assert not any(part in name for name in found.tensors for part in ("conv1d", "norm", "gates", "A_log", "router"))
    assert {"embed_tokens.weight", "lm_head.weight", "layers.1.mixers.0.out_proj.weight"} <= set(found.tensors)


@pytest.mark.slow
def test_gptq_hears_the_matrices_of_every_mixer_and_says_more_than_rounding() -> None:
    config = replace(
        small_hybrid().config, layers=MIXERS, think=(0, 5), untrained_loops=0, n_experts=0, intermediate_size=32
    )
    torch.manual_seed(9)
    model, text = HybridModel(config).eval(), random_tokens(1100, vocab=65)
    request = QuantizeRequest(
        Scheme("int4", dense_group_size=32),
        in_flow=False,
        calibration_tokens=512,
        evaluation_tokens=100,
        recalibrate_gate=False,
    )
    found = [quantize(model, replace(request, method=method), text, "f") for method in ("rtn", "gptq")]
    nearest, corrected = (q.report["evaluation"] for q in found)
    assert found[0].tensors.keys() == found[1].tensors.keys()
    assert corrected["full_depth"]["kl"] < 0.95 * nearest["full_depth"]["kl"]
    assert all(a < b for a, b in zip(corrected["drift"], nearest["drift"], strict=True))


def test_a_checkpoint_with_other_tensors_is_refused(tmp_path: Path) -> None:
    model = small_hybrid()
    save_checkpoint(model, tmp_path / "c")
    values = json.loads((tmp_path / "c" / "config.json").read_text())
    for change, message in (
        ({"layers": [*values["layers"][:-1], "mamba3"]}, "is missing"),
        ({"atlas_hidden": 6}, "layers.1.mixers.0.up"),
    ):
        (tmp_path / "c" / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path / "c")
        assert_one_line(str(caught.value), message)
