"""Ouro says what the published code says, and stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import argmax_of_whole_text, greedy, whole
from helpers import ONNX_ALWAYS, assert_one_line, random_tokens
from ouro_models import GOLDEN, POLICIES, golden, lively_ouro, published, published_folder
from safetensors.torch import load_file, save_file

from rmse_edge.arch.ouro.config import OuroConfig
from rmse_edge.arch.ouro.model import Ouro
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import ArgumentError, CheckpointError, ConfigError
from rmse_edge.loop.dials import Dials
from rmse_edge.quantize import QuantizeRequest, Scheme, quantize
from rmse_edge.quantize.kv_scales import with_int8_cache
from rmse_edge.runtimes import open_runtime
from rmse_edge.runtimes.engines.torch import TorchRuntime

THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 1.0)
RELATIVE, LOGITS = 1e-5, 1e-4
GOLD = golden()
IDS = GOLD["input_ids"]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


# ------------------------------------------------------------------------------------------------- the published numbers


def test_every_loop_is_the_published_one() -> None:
    with torch.no_grad():
        states, gates, _ = published().trajectory(IDS)
    for k, state in enumerate(states):
        assert relative(state, GOLD["hidden"][k]) < RELATIVE
        assert relative(gates[k], GOLD["gate_logit"][k]) < RELATIVE
        assert (published().lm_head(state) - GOLD["logits_per_loop"][k]).abs().max() < LOGITS


def test_every_layer_is_the_published_one() -> None:
    model, seen = published(), []
    handles = [
        layer.register_forward_hook(lambda module, args, result: seen.append(result)) for layer in model.model.layers
    ]
    model.trajectory(IDS)
    for handle in handles:
        handle.remove()
    assert relative(torch.stack(seen).unflatten(0, (4, 3)), GOLD["layer_out"]) < RELATIVE


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_positions_stop_where_the_published_code_picks_their_state(threshold: float) -> None:
    model = published(kv_policy="all")
    for row, ids in enumerate(IDS.numpy()):
        logits, depth = whole(model, ids, Dials(4, exit_threshold=threshold))
        np.testing.assert_array_equal(depth - 1, GOLD[f"threshold_{threshold}.exit_step"][row])
        assert np.abs(logits - GOLD[f"threshold_{threshold}.logits"][row].numpy()).max() < LOGITS


@pytest.mark.parametrize(("name", "threshold"), [("all_loops", 1.0), ("thr0.5", 0.5)])
def test_decode_says_what_the_published_cache_gives(name: str, threshold: float) -> None:
    runtime, dials = TorchRuntime(published(kv_policy="all"), "ouro"), Dials(4, exit_threshold=threshold)
    for row, ids in enumerate(IDS.numpy()):
        runtime.reset()
        logits = [runtime.feed(ids[:9], dials).logits]
        cache = runtime.calls.tensors(9)
        for which, tensor in (("k", cache["past_keys"]), ("v", cache["past_values"])):
            slots = (
                torch.from_numpy(tensor).squeeze(1).unflatten(1, (3, 4)).flatten(0, 1)
            )  # (loops * layers, heads, 9, hd)
            assert relative(slots, GOLD[f"cache.prefill.{which}"][:, row]) < RELATIVE
        logits += [runtime.feed(ids[i : i + 1], dials).logits for i in range(9, 14)]
        assert np.abs(np.concatenate(logits) - GOLD[f"cached.{name}.logits"][row].numpy()).max() < LOGITS
        runtime.reset()
        assert greedy(runtime, ids[:9], dials, 16) == GOLD[f"greedy.{name}.tokens"][row].tolist()


@pytest.mark.packages
@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("target", ONNX_ALWAYS)
def test_packages_say_what_the_published_code_says(target: str, tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "ouro", kv_policy="all")
    package = tmp_path / "ouro.rmse"
    assert rmse_export(["-m", str(folder), "--target", target, "-o", str(package), "--max-seq-len", "128"]) == 0
    runtime = open_runtime(package)
    for name, threshold in (("all_loops", 1.0), ("thr0.5", 0.5)):
        dials = Dials(4, exit_threshold=threshold)
        for row, ids in enumerate(IDS.numpy()):
            runtime.reset()
            fed = runtime.feed(ids, dials)
            assert np.abs(fed.logits - GOLD[f"cached.{name}.logits"][row].numpy()).max() < LOGITS
            if threshold < 1:
                np.testing.assert_array_equal(fed.depth - 1, GOLD["threshold_0.5.exit_step"][row])
            runtime.reset()
            assert greedy(runtime, ids[:9], dials, 16) == GOLD[f"greedy.{name}.tokens"][row].tolist()


# ----------------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_text_may_be_cut_in_any_way_under_every_policy(policy: str, kv_dtype: str) -> None:
    model: Any = lively_ouro(kv_policy=policy, kv_dtype="float32" if kv_dtype == "int8" else kv_dtype)
    text = random_tokens(90)
    if kv_dtype == "int8":
        request = QuantizeRequest(Scheme("int8"), method="rtn", kv="int8", calibration_tokens=512, evaluation_tokens=0)
        model = quantize(model, request, random_tokens(2048)).model
    dials = Dials(3, exit_threshold=0.6)
    expected, depth = whole(model, text, dials)
    assert len(set(depth.tolist())) == 3
    for sizes in ((1,), (64,), (7, 40, 3)):
        runtime, found, done = TorchRuntime(model, "ouro"), [], 0
        while done < len(text):
            size = sizes[len(found) % len(sizes)]
            found.append(runtime.feed(text[done : done + size], dials))
            done += size
        np.testing.assert_array_equal(np.concatenate([f.depth for f in found]), depth)
        assert np.abs(np.concatenate([f.logits for f in found]) - expected).max() < 1e-4


def test_policies_agree_where_nothing_stops_and_differ_where_something_does() -> None:
    text = random_tokens(60)
    at = {
        p: [whole(lively_ouro(kv_policy=p), text, Dials(3, exit_threshold=t))[0] for t in (1.0, 0.6)] for p in POLICIES
    }
    for policy in POLICIES[1:]:
        assert np.abs(at[policy][0] - at["propagate"][0]).max() < 1e-5
        assert np.abs(at[policy][1] - at["propagate"][1]).max() > 1e-2


def test_propagated_keys_of_the_first_layer_are_exact() -> None:
    """A loop that was not run would begin with the state that the position stopped with: that is what layer 0 projects."""
    model = lively_ouro(kv_policy="propagate")
    runtime = TorchRuntime(model, "ouro")
    runtime.feed(random_tokens(5), Dials(1))
    keys = torch.from_numpy(runtime.calls.tensors(5)["past_keys"])[:, 0]  # (loops, layers * groups, 5, hd)
    states, _, _ = model.trajectory(torch.from_numpy(random_tokens(5))[None], loops=1)
    layer = model.model.layers[0]
    cos, sin = (torch.from_numpy(a)[None] for a in angles(model.config, 5))
    expected, _ = layer.keys_values(layer.enter(states[0]), cos, sin)
    assert (keys[1, :2] - expected[0]).abs().max() < 1e-6
    assert torch.equal(keys[1], keys[2])
    assert (keys[0, :2] - expected[0]).abs().max() > 1e-2


def angles(config: OuroConfig, count: int) -> tuple[np.ndarray, np.ndarray]:
    from rmse_edge.layers.rope import rotary_angles

    return rotary_angles(np.arange(count), config.head_width, config.rope_theta)


@pytest.mark.parametrize("policy", POLICIES)
def test_loops_are_run_until_the_last_position_has_stopped(policy: str) -> None:
    """Under "all" every loop runs; otherwise as many as the deepest position asks for."""
    model, calls = lively_ouro(kv_policy=policy), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    fed = TorchRuntime(model, "ouro").feed(random_tokens(1), Dials(3, exit_threshold=0.05))
    assert fed.depth.tolist() == [1]
    assert len(calls) == (3 if policy == "all" else 1)


# -------------------------------------------------------------------------------------------------------------- files


def test_a_checkpoint_is_written_by_the_published_names(tmp_path: Path) -> None:
    save_checkpoint(published(), tmp_path / "ouro", dtype=torch.float32)
    written, own = load_file(tmp_path / "ouro" / "model.safetensors"), load_file(GOLDEN / "model.safetensors")
    assert written.keys() == own.keys()
    assert all(torch.equal(written[name], own[name]) for name in own)
    stated = json.loads((tmp_path / "ouro" / "config.json").read_text())
    for key, value in json.loads((GOLDEN / "config.json").read_text()).items():
        if key in stated:
            assert stated[key] == value, key


def test_shards_of_bfloat16_with_a_chat_template_and_a_table_of_angles(tmp_path: Path) -> None:
    folder = published_folder(
        tmp_path / "ouro", torch_dtype="bfloat16", auto_map={"AutoModel": "modeling_ouro.OuroModel"}
    )
    own = {name: tensor.bfloat16() for name, tensor in load_file(GOLDEN / "model.safetensors").items()}
    own["model.rotary_emb.inv_freq"] = torch.ones(6)
    names = sorted(own)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: own[name] for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    model = load_checkpoint(folder)
    assert torch.equal(model.lm_head.weight, own["lm_head.weight"].float())


def test_a_tied_head_is_not_stored(tmp_path: Path) -> None:
    model = lively_ouro(tie_word_embeddings=True)
    save_checkpoint(model, tmp_path / "tied", dtype=torch.float32)
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert load_checkpoint(tmp_path / "tied").lm_head.weight.data_ptr() != 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act: got "gelu", expected "silu"'),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding_window: got 64, expected null"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: got"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters: got"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            "rope_theta: got 1000000.0, rope_parameters says 5.0",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types: got 1 layers, num_hidden_layers says 3"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types: got ["),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor of num_attention_heads (4)"),
        ({"head_dim": 11}, "head_dim: got 11, expected an even number"),
        (
            {"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5},
            "hidden_size: got 48, expected a multiple",
        ),
        ({"eos_token_id": 128}, "eos_token_id: got 128, expected below vocab_size (128)"),
        ({"total_ut_steps": 0}, "total_ut_steps: got 0"),
        ({"early_exit_threshold": 0}, "early_exit_threshold: got 0"),
        ({"loops": 4}, "unknown key 'loops'"),
        ({"hidden_size": 64, "head_dim": 12}, "model.safetensors: tensor"),
        ({"num_hidden_layers": 2, "layer_types": None}, "model.layers.2."),
        ({"num_hidden_layers": 4, "layer_types": None}, "model.layers.3."),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_is_one_line(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published_folder(tmp_path / "ouro", **change)
    assert rmse_run([str(folder), "--prompt-tokens", "1,2"]) == 2
    assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize("damage", ["missing", "extra", "misshaped"])
def test_a_tensor_that_does_not_fit_is_one_line(damage: str, tmp_path: Path) -> None:
    folder, name = published_folder(tmp_path / "ouro"), "model.layers.1.mlp.up_proj.weight"
    own = load_file(folder / "model.safetensors")
    if damage == "missing":
        del own[name]
    elif damage == "extra":
        name = "model.layers.1.mlp.bias"
        own[name] = torch.zeros(3)
    else:
        own[name] = own[name][:-1].contiguous()
    save_file(own, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as found:
        load_checkpoint(folder)
    assert "\n" not in str(found.value)


def test_more_loops_than_were_trained_are_refused_unless_asked_for_by_name() -> None:
    with pytest.raises(
        ArgumentError, match=r"max_loops.*1\.\.4 \(the depth the model was trained to; untrained_loops in"
    ):
        TorchRuntime(published(), "ouro").feed(IDS[0].numpy(), Dials(5))
    deeper = TorchRuntime(published(untrained_loops=2), "ouro")
    assert deeper.info.dials.max_loops == 4
    own = TorchRuntime(published(), "ouro").feed(IDS[0].numpy(), Dials(4)).logits
    np.testing.assert_allclose(deeper.feed(IDS[0].numpy(), deeper.info.dials).logits, own, atol=1e-5)
    deeper.reset()
    fed = deeper.feed(IDS[0].numpy(), Dials(6))
    assert set(fed.depth) == {6} and np.abs(fed.logits - own).max() > 1e-2
    with pytest.raises(ArgumentError, match=r"max_loops.*1\.\.6 \(2 of them beyond the depth the model was trained to"):
        deeper.feed(IDS[0].numpy(), Dials(7))
    with pytest.raises(ConfigError, match="untrained_loops: got 61, expected at most 60, 64 loops in all"):
        OuroConfig(untrained_loops=61)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_int8_cache_has_scales_for_every_loop_that_may_be_asked_for(policy: str) -> None:
    model = lively_ouro(untrained_loops=1, kv_policy=policy)
    scales = with_int8_cache(model, torch.from_numpy(random_tokens(64))[None]).model.cache.kv_scales
    assert scales.shape[1] == 4 and float(scales.amin()) > 1e-4


def test_keys_of_a_loop_stay_themselves_where_a_deeper_one_has_a_smaller_range() -> None:
    """A short call under "all" leaves those of its last loop to loops that it did not ask for, in scales of their own."""
    model = lively_ouro(kv_policy="all")
    request = QuantizeRequest(Scheme("int8"), method="rtn", kv="int8", calibration_tokens=512, evaluation_tokens=0)
    model = quantize(model, request, random_tokens(2048)).model
    runtime = TorchRuntime(model, "ouro")
    runtime.feed(random_tokens(200), Dials(1))
    for which, name in enumerate(("past_keys", "past_values")):
        kept = torch.from_numpy(runtime.tensors()[name])[:, 0]  # (K, L * G, S, hd)
        scales = model.model.cache.kv_scales[which][:, :, None, None]
        given = (kept[0] * scales[0]).clamp(-127 * scales, 127 * scales)
        assert bool(((kept * scales - given).abs() <= scales).all())


def test_greedy_text_is_that_of_the_whole_text() -> None:
    model, prompt = lively_ouro(), random_tokens(20)
    dials = Dials(3, exit_threshold=0.6)
    tokens = greedy(TorchRuntime(model, "ouro"), prompt, dials)
    assert tokens == argmax_of_whole_text(model, prompt, tokens, dials)


def test_the_defaults_are_those_of_the_published_1_4b_model() -> None:
    """1.4 billion parameters, counted without making any."""
    from rmse_edge.arch.ouro.entry import parameters

    with torch.device("meta"):
        model = Ouro(OuroConfig())
    assert sum(p.numel() for p in model.parameters()) == parameters(OuroConfig()) == 1_434_652_673
