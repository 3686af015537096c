"""Qwen3-Next against the numbers of its published code, and against transformers where that is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import greedy
from helpers import assert_one_line
from paths import ROOT
from published_code import assert_close, assert_refused, fed, whole
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmse_edge.arch.common.hybrid_model import HybridModel
from rmse_edge.arch.qwen3_next.config import Qwen3NextConfig
from rmse_edge.arch.registry import read_config
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.errors import CheckpointError, ConfigError
from rmse_edge.loop.dials import Dials
from rmse_edge.package import Package
from rmse_edge.runtimes import runtime_for
from rmse_edge.runtimes.engines.torch import TorchRuntime

GOLDEN = ROOT / "tests" / "data" / "qwen3_next"
# Of whole models: random weights multiply what other sums round otherwise, by as much as the processor's kernels have it. Up to
# 1.3e-5 was seen; single mixers are held to 1e-5 by tests/layers/test_mixers.py.
RELATIVE = 3e-5


@pytest.fixture(scope="module")
def model() -> HybridModel:
    return load_checkpoint(GOLDEN)


@pytest.fixture(scope="module")
def known() -> dict[str, Tensor]:
    return load_file(GOLDEN / "outputs.safetensors") | load_file(GOLDEN / "inputs.safetensors")


@torch.no_grad()
def test_every_layer_gives_the_published_states(model: HybridModel, known: dict[str, Tensor]) -> None:
    heard: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda m, args, out, i=i: heard.update({f"layer{i}": out[0]}))
        for i, layer in enumerate(model.layers)
    ]
    hooks += [
        layer.mixers[0].register_forward_hook(lambda m, args, out, i=i: heard.update({f"mixer{i}": out[0]}))
        for i, layer in enumerate(model.layers)
    ]
    logits = whole(model, known["input_ids"][0], Dials(1)).logits
    for hook in hooks:
        hook.remove()
    assert_close(logits, known["logits"][0], RELATIVE)
    for i in range(4):
        assert_close(heard[f"mixer{i}"], known[f"layer{i}.mixer_out"], RELATIVE)
        if i < 3:  # the last one is recorded behind the norm
            assert_close(heard[f"layer{i}"][0], known["hidden_states"][i + 1, 0], RELATIVE)
    assert_close(model.norm(heard["layer3"])[0], known["hidden_states"][4, 0], RELATIVE)


@pytest.mark.slow
def test_a_text_in_calls_leaves_the_published_cache(model: HybridModel, known: dict[str, Tensor]) -> None:
    """66 tokens in calls of 64, one by one and of other sizes, then four more."""
    tokens = known["input_ids"][0].numpy()
    for cut in ((66, 1, 1, 1, 1), (1,) * 70, (7, 59, 4)):
        runtime, done, found = TorchRuntime(model, "golden"), 0, []
        for count in cut:
            found.append(runtime.feed(tokens[done : done + count], Dials(1)).logits)
            done += count
            if done not in (66, 70):
                continue
            kept, tag = runtime.tensors(), {66: "after_prefill", 70: "after_decode"}[done]
            for i in range(3):
                assert_close(kept[f"past_layer{i}_memory"][0], known[f"{tag}.layer{i}.recurrent_states"], RELATIVE)
                slots = torch.from_numpy(kept[f"past_layer{i}_inputs"][0, 0, 0])  # position p in slot p mod 3
                order = [p % 3 for p in range(done - 3, done)]
                assert_close(slots[order].T, known[f"{tag}.layer{i}.conv_states"][0][:, 1:], RELATIVE)
            for name in ("keys", "values"):
                assert_close(kept[f"past_layer3_{name}"][0, :, :, :done], known[f"{tag}.layer3.{name}"], RELATIVE)
        assert_close(np.concatenate(found), known["logits"][0], RELATIVE)


def test_the_greedy_tokens_are_the_published_ones(model: HybridModel, known: dict[str, Tensor]) -> None:
    runtime = TorchRuntime(model, "golden")
    logits = runtime.feed(known["input_ids"][0, :66].numpy(), Dials(1), logits="last").logits
    found = []
    for _ in range(8):
        found.append(int(logits[-1].argmax()))
        logits = runtime.feed([found[-1]], Dials(1)).logits
    assert found == known["greedy_after_prefill"].flatten().tolist()


@pytest.mark.slow
@pytest.mark.onnx
@pytest.mark.nightly
def test_an_onnx_package_gives_the_published_greedy_tokens(known: dict[str, Tensor], tmp_path: Path) -> None:
    """From the published files to a package, through the parity gate."""
    assert rmse_export(["-m", str(GOLDEN), "-o", str(tmp_path / "p.rmse")]) == 0
    runtime = runtime_for(Package.open(tmp_path / "p.rmse"))
    tokens = greedy(runtime, known["input_ids"][0, :66].numpy(), Dials(1), count=8)
    assert tokens == known["greedy_after_prefill"].flatten().tolist()


@pytest.mark.slow
def test_one_loop_of_some_layers_is_the_plain_stack_bit_for_bit(known: dict[str, Tensor]) -> None:
    plain, tokens = load_checkpoint(GOLDEN), known["input_ids"][0].numpy()
    values = json.loads((GOLDEN / "config.json").read_text())
    for think in ([0, 1], [1, 3], [2, 4], [3, 4]):
        model = HybridModel(Qwen3NextConfig.from_dict(values | {"think": think, "think_loops": 3})).eval()
        model.load_state_dict(plain.state_dict())
        for cut in ((70,), (5, 64, 1)):
            once, _ = fed(model, tokens, cut, Dials(1))
            assert np.array_equal(once, fed(plain, tokens, cut, Dials(1))[0])
        assert np.array_equal(
            whole(model, known["input_ids"][0], Dials(1)).logits, whole(plain, known["input_ids"][0], Dials(1)).logits
        )
        assert not np.array_equal(fed(model, tokens, (70,), Dials(2))[0], once)


def test_a_checkpoint_is_written_and_read_again(model: HybridModel, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path / "c")
    again = load_checkpoint(tmp_path / "c")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_experts_as_transformers_has_them_within(model: HybridModel, tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "model.safetensors")
    for i in range(4):
        path = f"model.layers.{i}.mlp.experts"
        parts = {
            n: torch.stack([tensors.pop(f"{path}.{e}.{n}_proj.weight") for e in range(8)])
            for n in ("gate", "up", "down")
        }
        tensors |= {
            f"{path}.gate_up_proj": torch.cat([parts["gate"], parts["up"]], 1),
            f"{path}.down_proj": parts["down"],
        }
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    for name, tensor in load_checkpoint(tmp_path).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_what_predicts_a_second_token_is_passed_over(model: HybridModel, tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "model.safetensors")
    tensors |= {"mtp.fc.weight": torch.zeros(32, 64), "mtp.layers.0.input_layernorm.weight": torch.zeros(32)}
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load_checkpoint(tmp_path).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "experts.3.up_proj.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "tensor extra is not part of the model"),
        (
            lambda t: t.update({"model.layers.0.linear_attn.in_proj_qkvz.weight": torch.zeros(90, 32)}),
            "in_proj_qkvz.weight (90, 32) gives no layers.0.mixers.0.qkv_proj.weight of shape (64, 32)",
        ),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(damage: Any, message: str, tmp_path: Path) -> None:
    assert_refused(GOLDEN, damage, message, tmp_path / "damaged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act: got "gelu", expected "silu"'),
        ({"norm_topk_prob": False}, "norm_topk_prob: got false, expected true"),
        ({"layer_types": ["full_attention"]}, "layer_types: got 1 layers, expected num_hidden_layers (4)"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor of num_attention_heads (4)"),
        ({"linear_num_key_heads": 3}, "linear_num_key_heads: got 3, expected a divisor of linear_num_value_heads (4)"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: got 9, expected at most num_experts (8)"),
        ({"think": [2, 2]}, "think: got (2, 2), expected 0 <= first < end <= num_hidden_layers (4)"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: got {'rope_type': 'yarn'}, expected"),
        ({"kv_policy": "propagate"}, "kv_policy: got 'propagate', expected"),
        ({"exit_rules": ["kl"]}, "exit_rules: got 'kl', expected some of gate, delta, cosine"),
    ],
)
def test_configurations_that_are_computed_otherwise(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads((GOLDEN / "config.json").read_text()) | changes))
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "config.json")
    assert_one_line(str(caught.value), message)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_model_of_transformers_says_what_it_says_there(seed: int, tmp_path: Path) -> None:
    """Random weights, other sizes than the numbers have, written by `save_pretrained`: logits and greedy tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.Qwen3NextConfig(
        vocab_size=80, hidden_size=48, intermediate_size=40, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, linear_key_head_dim=16,
        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=[2, 6][seed], moe_intermediate_size=16,
        shared_expert_intermediate_size=24, num_experts=6, num_experts_per_tok=3, mlp_only_layers=[[], [1]][seed],
        full_attention_interval=2, tie_word_embeddings=bool(seed), pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    theirs = transformers.Qwen3NextForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.add_(torch.randn_like(p) * (0.1 if "norm" in name else 0.5 * p.shape[-1] ** -0.5))
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)
    tokens = torch.randint(3, 80, (1, 90))
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
    assert_close(whole(ours, tokens[0], Dials(1)).logits, expected, RELATIVE)
    assert_close(fed(ours, tokens[0].numpy(), (70, *[1] * 20), Dials(1))[0], expected, 5e-5)
    greedy = theirs.generate(tokens[:, :60], max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 60:].tolist()
    runtime, found = TorchRuntime(ours, "ours"), []
    logits = runtime.feed(tokens[0, :60].numpy(), Dials(1), logits="last").logits
    for _ in range(12):
        found.append(int(logits[-1].argmax()))
        logits = runtime.feed([found[-1]], Dials(1)).logits
    assert found == greedy


def test_a_folder_without_its_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
