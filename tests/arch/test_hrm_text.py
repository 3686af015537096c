"""HRM-Text against the numbers that its published code gave; tests/data/hrm_text/README.md says what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_one_line, random_tokens
from paths import ROOT
from published_code import assert_close, assert_refused, fed, whole
from safetensors.torch import load_file
from torch import Tensor

from rmse_edge.arch.common.recurrent import UNTRAINED
from rmse_edge.arch.hrm_text.config import HrmTextConfig
from rmse_edge.arch.hrm_text.entry import parameters
from rmse_edge.arch.hrm_text.model import HrmText
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.errors import ArgumentError, CheckpointError, ConfigError
from rmse_edge.layers.cache import caches_of, with_cache_dtype
from rmse_edge.loop.contract import check_spec
from rmse_edge.loop.dials import Dials
from rmse_edge.quantize.kv_scales import with_int8_cache
from rmse_edge.runtimes.engines.torch import TorchRuntime

pytestmark = pytest.mark.slow  # many layers; of its kind, make quick has Ouro

GOLDEN = ROOT / "tests" / "data" / "hrm_text"
MODELS = ("released", "within", "causal")
PREFIXED = MODELS[:2]
CUTS = {"whole": (14,), "prompt": (6, *[1] * 8), "chunks": (5, 4, 5), "tokens": (1,) * 14}
# How long a prefix is, and the calls behind it.
PREFIXES = {"all_of_prompt": (6, CUTS["prompt"]), "part_of_prompt": (4, (9, 5)), "whole": (14, (14,))}


def known(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "outputs.safetensors")


def golden(name: str, **changes: Any) -> HrmText:
    """A model of the numbers, with other settings."""
    config = HrmTextConfig.from_dict(json.loads((GOLDEN / name / "config.json").read_text()) | changes)
    model = HrmText(config).eval()
    model.load_state_dict(load_checkpoint(GOLDEN / name).state_dict(), strict=False)
    return model


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("name", "prefix"), [*((name, "") for name in MODELS), *((name, "prefix.") for name in PREFIXED)]
)
@torch.no_grad()
def test_every_cycle_gives_the_published_states(name: str, prefix: str) -> None:
    """z_H and z_L after every iteration, of two texts as a batch, the second with the same prefix or none."""
    model, expected = golden(name), known(name)
    c, tokens = model.config, expected["input_ids"]
    batch, count = tokens.shape
    spec = model.spec(count)
    given = {n: t.expand(batch, -1, -1) for n, t in model.angles_of(count).items()}
    given |= {"tokens": tokens, "slots": torch.arange(1), "position": torch.zeros(batch, dtype=torch.int64)}
    given |= {"n_valid": torch.full((batch,), count)} | ({"prefix": torch.full((batch,), 6)} if prefix else {})
    given |= {s.name: torch.zeros(s.of_slots(1).of_batch(batch)) for s in spec.state}
    given |= model.prelude(given)
    carry, masks = model.begin(given)
    off = {n: torch.tensor(value) for n, value in vars(c.dials).items() if n in spec.dials}
    high, low = expected[f"{prefix}high"], expected[f"{prefix}low"]
    assert len(low) == len(high) * c.L_cycles
    for k in range(c.H_cycles):
        past = {s.name: given[s.name][k] for s in spec.rows}
        carry, _ = model.step(torch.tensor(k), carry, past, given | masks, off)
        assert_close(carry["h"], high[k])
        assert_close(carry["low"], low[(k + 1) * c.L_cycles - 1])
    if not prefix:
        np.testing.assert_allclose(model.head(carry["h"])["logits"], expected["logits"][0], atol=1e-4)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_text_in_calls(name: str, cut: str) -> None:
    """The published code with the same cut, and without token_type_ids."""
    model, expected = golden(name), known(name)
    for tokens, logits in zip(expected["input_ids"].numpy(), expected["logits"][list(CUTS).index(cut)]):
        np.testing.assert_allclose(fed(model, tokens, CUTS[cut])[0], logits, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_text_at_once(name: str) -> None:
    model, expected = golden(name), known(name)
    for row, tokens in enumerate(expected["input_ids"]):
        found = whole(model, tokens, model.config.dials)
        np.testing.assert_allclose(found.logits, expected["logits"][0][row], atol=1e-4)
        assert_close(found.h, expected["high"][-1][row])


@pytest.mark.parametrize("text", PREFIXES)
@pytest.mark.parametrize("name", PREFIXED)
def test_logits_of_a_text_with_a_prefix(name: str, text: str) -> None:
    """Of a prefix that is the prompt, a part of the first call, the whole text; which is felt."""
    model, expected = golden(name), known(name)
    prefix, cut = PREFIXES[text]
    for row, tokens in enumerate(expected["input_ids"]):
        logits = expected[f"prefix.{text}"][row]
        assert float((logits - expected["logits"][0][row]).abs().max()) > 0.1
        np.testing.assert_allclose(fed(model, tokens.numpy(), cut, prefix=prefix)[0], logits, atol=1e-4)
        np.testing.assert_allclose(whole(model, tokens, model.config.dials, prefix=prefix).logits, logits, atol=1e-4)


@pytest.mark.parametrize("prefix", [0, 6])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens(name: str, prefix: int) -> None:
    """Those of transformers' `generate`, whose prompt is a prefix where token_type_ids say so."""
    model, expected = golden(name), known(name)
    if prefix and not model.config.prefix_lm:
        return
    for row, tokens in enumerate(expected["input_ids"].tolist()):
        runtime, said = TorchRuntime(model, "hrm"), []
        dials = runtime.info.dials
        logits = runtime.feed(tokens[:6], dials, prefix=prefix).logits[-1]
        while len(said) < 8:
            said.append(int(logits.argmax()))
            logits = runtime.feed(said[-1:], dials).logits[-1]
        assert said == expected["prefix.greedy" if prefix else "greedy"][row].tolist()


# ------------------------------------------------------------------------------------------------------------ prefixes


def test_a_prefix_that_cannot_be_read_is_one_line() -> None:
    runtime, text = TorchRuntime(golden("released"), "hrm"), np.arange(33).repeat(2)[:64]
    dials = runtime.info.dials
    for tokens, prefix, message in (
        (text[:5], 6, "prefix: got 6, expected 0..5, of the tokens that are fed"),
        (text[:5], -1, "prefix: got -1, expected 0..5, of the tokens that are fed"),
    ):
        with pytest.raises(ArgumentError) as caught:
            runtime.feed(tokens, dials, prefix=prefix)
        assert str(caught.value) == message
    runtime.feed(text[:5], dials, prefix=5)
    with pytest.raises(ArgumentError, match=r"^prefix: is the beginning of a text, and 5 tokens were fed before"):
        runtime.feed(text[:5], dials, prefix=5)
    plain = TorchRuntime(golden("causal"), "plain")
    with pytest.raises(ArgumentError, match=r"^prefix: plain has none: each of its positions sees those before it"):
        plain.feed(text[:5], plain.info.dials, prefix=5)
    assert plain.position == 0


def test_a_prefix_longer_than_a_call_is_refused_until_there_is_a_longer_call() -> None:
    """A prompt of two calls would be two prefixes, of which the first does not see the second."""
    changes = {"max_position_embeddings": 128}
    text = torch.from_numpy(np.random.default_rng(1).integers(0, 33, 100))
    runtime = TorchRuntime(golden("released", **changes), "hrm")
    with pytest.raises(ArgumentError) as caught:
        runtime.feed(text.numpy(), runtime.info.dials, prefix=90)
    assert str(caught.value) == (
        "prefix: 90 tokens are more than the 64 that one call of hrm has, and a prefix must be in one; shorten it, leave it "
        "out, or raise longest_prefix in config.json"
    )
    longer = golden("released", **changes, longest_prefix=96)
    assert (
        longer.call_sizes() == (1, 64, 96) and TorchRuntime(longer, "hrm").info.fingerprint == runtime.info.fingerprint
    )
    logits = whole(longer, text, longer.config.dials, prefix=90).logits
    np.testing.assert_allclose(fed(longer, text.numpy(), (95, 5), prefix=90)[0], logits, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- exits

EXITS = {"exit_epsilon": 0.7, "exit_cosine": 0.25, "exit_kl": 0.2, "exit_entropy_change": 0.15, "exit_steady": 1}


@pytest.mark.parametrize("dial", EXITS)
@pytest.mark.parametrize("policy", ["repeat", "propagate", "all"])
@pytest.mark.parametrize("prefix", [0, 5])
def test_exits_do_not_depend_on_how_a_text_is_cut(policy: str, dial: str, prefix: int) -> None:
    model = golden("within", exit_rules=UNTRAINED, kv_policy=policy, untrained_loops=1)
    dials = Dials(model.config.max_loops, **{dial: EXITS[dial]})
    depths: set[int] = set()
    for tokens in known("within")["input_ids"]:
        expected = whole(model, tokens, dials, prefix=prefix)
        depths |= set(expected.depth.tolist())
        for cut in ((14,), (6, *[1] * 8), (5, 9)):
            logits, depth = fed(model, tokens.numpy(), cut, dials, prefix)
            assert np.array_equal(depth, expected.depth)
            np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
    assert len(depths) > 1


@pytest.mark.parametrize("policy", ["propagate", "all"])
def test_the_other_policies_differ_only_where_loops_were_not_run(policy: str) -> None:
    model, expected = golden("released", kv_policy=policy), known("released")
    for row, tokens in enumerate(expected["input_ids"].numpy()):
        np.testing.assert_allclose(fed(model, tokens, (6, 8))[0], expected["logits"][0][row], atol=1e-4)


def test_what_is_propagated_is_exact_in_the_first_layer() -> None:
    """Of a position that stopped, the first call's first layer has in a deeper loop what it would have had itself."""
    tokens = known("released")["input_ids"][0].numpy()
    runtimes = [TorchRuntime(golden("released", kv_policy=policy), "hrm") for policy in ("propagate", "all")]
    for runtime in runtimes:
        runtime.feed(tokens, Dials(1))
    shallow, full = (r.tensors()["past_keys"] for r in runtimes)
    np.testing.assert_allclose(shallow[0], full[0], atol=1e-6)
    heads = slice(0, 2)
    deep = TorchRuntime(golden("released", kv_policy="all"), "hrm")
    deep.feed(tokens, Dials(2))
    np.testing.assert_allclose(shallow[1][:, heads], deep.tensors()["past_keys"][1][:, heads], atol=1e-5)
    assert np.abs(shallow[1][:, 2:] - deep.tensors()["past_keys"][1][:, 2:]).max() > 1e-2


def test_a_float16_cache_holds_what_was_rounded_before_use() -> None:
    model = with_cache_dtype(golden("released"), "float16")
    for tokens in known("released")["input_ids"]:
        expected = whole(model, tokens, model.config.dials).logits
        assert float((expected - whole(golden("released"), tokens, model.config.dials).logits).abs().max()) > 1e-5
        # What is a millionth apart is here and there rounded to another float16.
        np.testing.assert_allclose(fed(model, tokens.numpy(), CUTS["prompt"])[0], expected, atol=5e-3)


@pytest.mark.parametrize("policy", ["repeat", "propagate"])
def test_an_int8_cache_has_scales_of_every_call(policy: str) -> None:
    model, texts = golden("released", kv_policy=policy), torch.from_numpy(random_tokens(256, vocab=33)).view(4, 64)
    changed = with_int8_cache(model, texts)
    (cache,) = caches_of(changed).values()
    assert cache.kv_scales.shape == (2, 2, (3 + 1) * 2 * 2)  # of keys and values; loops; calls, layers, heads
    assert float(cache.kv_scales.amin()) > 1e-4
    calls = cache.kv_scales.unflatten(-1, (4, 4))
    assert bool((calls[:, 1, 0] != calls[:, 1, 1]).all())  # each call's own
    tokens = known("released")["input_ids"][0]
    rounded = whole(changed, tokens, changed.config.dials).logits
    np.testing.assert_allclose(fed(changed, tokens.numpy(), CUTS["prompt"])[0], rounded, atol=0.1)
    exact = whole(model, tokens, model.config.dials).logits
    assert 1e-3 < float((rounded - exact).abs().max()) < 0.5


# -------------------------------------------------------------------------------------------------------------- shapes


def test_the_published_model() -> None:
    """Of the size that its name says; nothing is allocated for all positions of all calls."""
    with torch.device("meta"):
        model = HrmText(HrmTextConfig(num_hidden_layers=16, vocab_size=65_536))
    assert sum(p.numel() for p in model.parameters()) == parameters(model.config)
    assert abs(parameters(model.config) / 1.15e9 - 1) < 0.1
    spec = model.spec(1)
    check_spec(spec)
    assert spec.max_loops == 2 and spec.capacity == 2048 and model.config.num_hidden_layers == 128
    assert sum(t.of_slots(256).nbytes for t in spec.state) == 128 * 256 * 2 * 12 * 128 * 4


# ---------------------------------------------------------------------------------------------- checkpoints, bad input


@pytest.mark.parametrize("name", MODELS)
def test_each_tensor_of_a_checkpoint_is_used_once(name: str) -> None:
    """Together they have as many numbers as the model; a tied head is none."""
    tensors, model = load_file(GOLDEN / name / "model.safetensors"), load_checkpoint(GOLDEN / name)
    state = model.state_dict()
    own = {key: t for key, t in state.items() if key != "lm_head.weight" or not model.config.tie_word_embeddings}
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in own.values())
    numbers = [torch.cat([t.float().flatten() for t in side.values()]).sort().values for side in (tensors, own)]
    assert torch.equal(*numbers)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_written_and_read(name: str, tmp_path: Path) -> None:
    model = load_checkpoint(GOLDEN / name)
    save_checkpoint(model, tmp_path / "c", dtype=torch.bfloat16)
    back = load_checkpoint(tmp_path / "c")
    assert back.config == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor)


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, expected = load_checkpoint(GOLDEN / "released"), known("released")
    save_checkpoint(model, tmp_path / "c", dtype=torch.float32)
    theirs = transformers.HrmTextForCausalLM.from_pretrained(tmp_path / "c")
    assert theirs.config.num_layers_per_stack == 2 and theirs.config.num_hidden_layers == 16
    with torch.no_grad():
        np.testing.assert_allclose(theirs(expected["input_ids"]).logits, expected["logits"][0], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 24}, "num_hidden_layers: got 24, expected num_layers_per_stack * H_cycles * (L_cycles + 1) (16)"),
        ({"num_hidden_layers": 2}, "num_hidden_layers: got 2, expected num_layers_per_stack * H_cycles * (L_cycles + 1) (16)"),
        ({"L_cycles": 2}, "num_hidden_layers: got 16, expected num_layers_per_stack * H_cycles * (L_cycles + 1) (12)"),
        ({"num_layers_per_stack": 0}, "num_layers_per_stack: got 0, expected a positive integer"),
        ({"num_key_value_heads": 1}, "num_key_value_heads: got 1, expected num_attention_heads (2)"),
        ({"head_dim": 5}, "head_dim: got 5, expected an even number"),
        ({"hidden_size": 15}, "hidden_size: got 15, expected a multiple of num_attention_heads (2)"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5.0}}, "rope_parameters: got {'rope_theta': 5.0, "),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_parameters: got {'rope_theta': -1.0}, expected rope_type default"),
        ({"rope_theta": 5.0}, "rope_theta: got 5.0, rope_parameters says 10000.0"),
        ({"embedding_scale": 0}, "embedding_scale: got 0, expected a positive number"),
        ({"H_cycles": 0}, "H_cycles: got 0"),
        ({"L_bp_cycles": [0]}, "L_bp_cycles[0]: got 0, expected a positive integer"),
        ({"longest_prefix": 96, "prefix_lm": False}, "longest_prefix: got 96, expected 64, since prefix_lm is off"),
        ({"min_loops": 3}, "min_loops: got 3, expected at most H_cycles (2)"),
        ({"exit_kl": 0.1}, "exit_kl: got 0.1, expected it off, since exit_rules has no 'kl'"),
        ({"hidden_act": "gelu"}, 'hidden_act: got "gelu", expected "silu"'),
        ({"attention_bias": True}, "attention_bias: got true, expected false"),
        ({"mlp_bias": True}, "mlp_bias: got true, expected false"),
        ({"eos_token_id": 33}, "eos_token_id: got 33, expected below vocab_size (33)"),
        ({"H_loops": 4}, "unknown key 'H_loops'"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_one_line(changes: dict[str, Any], message: str) -> None:
    values = json.loads((GOLDEN / "released" / "config.json").read_text()) | changes
    with pytest.raises(ConfigError) as caught:
        HrmTextConfig.from_dict(values)
    assert str(caught.value).startswith("config: " + message)
    assert_one_line(str(caught.value))


def test_a_configuration_is_read_as_it_was_written() -> None:
    for name in MODELS:
        config = load_checkpoint(GOLDEN / name).config
        assert HrmTextConfig.from_dict(json.loads(config.to_json())) == config
    within = load_checkpoint(GOLDEN / "within").config
    assert (within.layers, within.num_hidden_layers, within.embedding_scale) == (1, 6, 3.0)
    assert HrmTextConfig().embedding_scale == 50


LAYER = "model.L_module.layers.1"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.attn.gqkv_proj.weight"), f"tensor {LAYER}.attn.gqkv_proj.weight is missing;"),
        (lambda t: t.pop(f"{LAYER}.mlp.gate_up_proj.weight"), f"tensor {LAYER}.mlp.gate_up_proj.weight is missing;"),
        (lambda t: t.pop("model.z_L_init"), "tensor model.z_L_init is missing;"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is not part of the model;"),
        (lambda t: t.update({"model.norm.weight": torch.ones(16)}), "tensor model.norm.weight is not part of the model;"),
        (lambda t: t.update({f"{LAYER}.attn.gqkv_proj.weight": torch.zeros(60, 16)}), f"{LAYER}.attn.gqkv_proj.weight"),
        (lambda t: t.update({f"{LAYER}.mlp.gate_up_proj.weight": torch.zeros(47, 16)}), f"{LAYER}.mlp.gate_up_proj.weight"),
        (lambda t: t["model.z_L_init"].fill_(float("nan")), "model.z_L_init"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_one_line(
    damage: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    assert_refused(GOLDEN / "released", damage, message, tmp_path / "c")


def test_a_file_that_counts_calls_alone_is_refused(tmp_path: Path) -> None:
    """transformers 5.24.0 makes 16 layers of each stack of it, and says that 14 are newly initialised."""
    shutil.copytree(GOLDEN / "released", tmp_path / "c")
    values = json.loads((tmp_path / "c" / "config.json").read_text())
    del values["num_layers_per_stack"]
    (tmp_path / "c" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "c")
    assert_one_line(str(caught.value), "model.safetensors")


# -------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", MODELS)
def test_transformers_generates_the_published_tokens(name: str) -> None:
    """Through the Auto classes, which have this project's class and not transformers' own, with a prefix and without one."""
    transformers = pytest.importorskip("transformers")
    import rmse_edge.hf

    expected = known(name)
    prompt = expected["input_ids"][:, :6]
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    assert isinstance(model, rmse_edge.hf.LoopedForCausalLM)
    with torch.no_grad():
        np.testing.assert_allclose(model(expected["input_ids"]).logits, expected["logits"][0], atol=1e-4)
    said = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(said[:, 6:], expected["greedy"])
    types = torch.ones_like(prompt)
    if name == "causal":
        with pytest.raises(ArgumentError, match=r"^token_type_ids: hrm_text does not take it"):
            model(prompt, token_type_ids=types)
        return
    said = model.generate(prompt, max_new_tokens=8, do_sample=False, token_type_ids=types)
    assert torch.equal(said[:, 6:], expected["prefix.greedy"])


@torch.no_grad()
def test_prefixes_of_a_batch() -> None:
    """Of other lengths in each row, behind padding; longer than a call of packages has."""
    transformers = pytest.importorskip("transformers")
    import rmse_edge.hf  # noqa: F401

    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "within", max_position_embeddings=128)
    tokens = torch.from_numpy(random_tokens(180, vocab=33)).view(2, 90)
    here = torch.arange(90)
    mask = torch.stack([here >= 20, here >= 0])
    types = torch.stack([(here >= 20) & (here < 50), here < 80]).long()
    logits = model(tokens, attention_mask=mask, token_type_ids=types).logits
    for row, (first, prefix) in enumerate([(20, 30), (0, 80)]):
        alone = whole(model.model, tokens[row, first:], model.model.config.dials, prefix=prefix).logits
        np.testing.assert_allclose(logits[row, first:], alone, atol=1e-4)
    with pytest.raises(ArgumentError, match=r"^token_type_ids: got ones behind other types, expected them at the begi"):
        model(tokens, token_type_ids=1 - types)
    with pytest.raises(ArgumentError, match=r"^token_type_ids: got shape \(2, 89\), expected \(2, 90\)"):
        model(tokens, token_type_ids=types[:, 1:])
