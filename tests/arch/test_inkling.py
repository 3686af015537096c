"""Inkling 2 against the numbers that its published code gave; tests/data/inkling2_loop/README.md says what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import decided_inkling
from helpers import assert_one_line, random_tokens
from paths import ROOT
from published_code import assert_close, assert_refused, fed, whole
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmse_edge.arch.common.identity import fingerprint
from rmse_edge.arch.common.recurrent import UNTRAINED
from rmse_edge.arch.inkling2_loop_text.config import InklingConfig
from rmse_edge.arch.inkling2_loop_text.entry import parameters
from rmse_edge.arch.inkling2_loop_text.model import Inkling
from rmse_edge.arch.registry import read_config
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.errors import ConfigError
from rmse_edge.layers.cache import caches_of, with_cache_dtype
from rmse_edge.layers.experts import SparseExperts
from rmse_edge.layers.norm import rms
from rmse_edge.loop.contract import Append, Ring, check_spec
from rmse_edge.loop.dials import Dials
from rmse_edge.quantize import QuantizeRequest, Scheme, load_quantized, quantize, save_quantized
from rmse_edge.quantize.kv_scales import with_int8_cache
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.train.recipe import Recipe

pytestmark = pytest.mark.slow  # many layers; of its kind, make quick has Ouro

GOLDEN = ROOT / "tests" / "data" / "inkling2_loop"
MODELS = ("grouped", "long", "once", "deep")
CUTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "grouped": ((6, *[1] * 8), (5, 4, 5), (1,) * 14),
    "long": ((64, 16), (64, *[1] * 16), (1,) * 80),
    "once": ((6, *[1] * 8), (14,)),
    "deep": ((6, *[1] * 8), (5, 4, 5), (1,) * 14),
}


def known(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "outputs.safetensors")


def golden(name: str, **changes: Any) -> Inkling:
    """A model of the numbers, with other settings."""
    config = InklingConfig.from_dict(json.loads((GOLDEN / name / "config.json").read_text()) | changes)
    model = Inkling(config).eval()
    model.load_state_dict(load_checkpoint(GOLDEN / name).state_dict(), strict=False)
    return model


def normed(blocks: Tensor, width: int) -> Tensor:
    """Blocks side by side, each normed: as all that reads them has them."""
    return rms(blocks.unflatten(-1, (-1, width))).flatten(-2)


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_pass_gives_the_published_states(name: str) -> None:
    model, expected = golden(name), known(name)
    c, tokens = model.config, expected["input_ids"]
    batch, count = tokens.shape
    given = {"tokens": tokens, "slots": torch.arange(1), "position": torch.zeros(batch, dtype=torch.int64)}
    given |= {"n_valid": torch.full((batch,), count)}
    spec = model.spec(count)
    given |= {s.name: torch.zeros(s.of_slots(1).of_batch(batch)) for s in spec.state}
    given |= model.prelude(given)
    assert_close(given["x0"], normed(expected["input_out"], c.hidden_size))
    carry, masks = model.begin(given)
    off = {name: torch.tensor(value) for name, value in vars(c.dials).items() if name in spec.dials}
    assert len(expected["loop_out"]) == c.loop_num_passes
    for k, blocks in enumerate(expected["loop_out"]):
        past = {s.name: given[s.name][k] for s in spec.rows}
        carry, _ = model.step(torch.tensor(k), carry, past, given | masks, off)
        assert_close(carry["h"], normed(blocks, c.hidden_size))
    final = model.coda(given | carry)["y"]
    assert_close(final, expected["final"])
    np.testing.assert_allclose(model.head(final)["logits"], expected["logits"][0], atol=1e-4)


@pytest.mark.parametrize(("name", "which"), [(name, i) for name, cuts in CUTS.items() for i in range(len(cuts))])
def test_logits_of_a_text_in_calls(name: str, which: int) -> None:
    """The published code with the same cut, chunks of 64 among them."""
    model, expected = golden(name), known(name)
    for tokens, logits in zip(expected["input_ids"].numpy(), expected["logits"][1 + which]):
        np.testing.assert_allclose(fed(model, tokens, CUTS[name][which])[0], logits, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_text_at_once(name: str) -> None:
    model, expected = golden(name), known(name)
    for row, tokens in enumerate(expected["input_ids"]):
        found = whole(model, tokens, model.config.dials)
        np.testing.assert_allclose(found.logits, expected["logits"][0][row], atol=1e-4)
        assert_close(found.h, normed(expected["loop_out"][-1][row], model.config.hidden_size))
        assert bool((found.margin < 1).all()) and float(found.margin.min()) > 0  # of the routers


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens(name: str) -> None:
    model, expected = golden(name), known(name)
    for row, tokens in enumerate(expected["input_ids"].tolist()):
        runtime, said = TorchRuntime(model, "inkling2_loop_text"), []
        dials = runtime.info.dials
        logits = runtime.feed(tokens[:6], dials).logits[-1]
        while len(said) < 8:
            said.append(int(logits.argmax()))
            logits = runtime.feed(said[-1:], dials).logits[-1]
        assert said == expected["greedy"][row].tolist()


def test_running_every_pass_differs_from_stopping_in_nothing_where_none_stops() -> None:
    model, expected = golden("deep", kv_policy="all"), known("deep")
    for row, tokens in enumerate(expected["input_ids"].numpy()):
        np.testing.assert_allclose(fed(model, tokens, (6, 8))[0], expected["logits"][0][row], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("grouped", {"sliding_window_size": 4}),
        ("grouped", {"log_scaling_alpha": 0.2}),
        ("grouped", {"log_scaling_n_floor": 6}),
        ("long", {"qk_l2_clip_threshold": 1.0}),
        ("long", {"rel_l2_clip_threshold": 0.5}),
        ("once", {"mlp_gate_softcap": 1.0}),
        ("once", {"mlp_up_softcap": 1.0}),
        ("once", {"route_scale": 2.0}),
        ("deep", {"loop_num_passes": 4}),
        ("deep", {"num_experts_per_tok": 2}),
        ("deep", {"final_logit_softcapping": 3.0}),
    ],
)
def test_every_number_of_the_configuration_is_felt(name: str, changes: dict[str, Any]) -> None:
    expected, model = known(name), golden(name, **changes) if "sliding_window_size" not in changes else None
    if model is None:  # profiles of the bias are as many as the window has positions
        stored = load_checkpoint(GOLDEN / name).state_dict()
        model = golden_without_profiles(name, stored, changes)
    tokens = expected["input_ids"][0]
    assert (whole(model, tokens, model.config.dials).logits - expected["logits"][0][0]).abs().max() > 1e-3


def golden_without_profiles(name: str, stored: dict[str, Tensor], changes: dict[str, Any]) -> Inkling:
    """A model of the numbers with a longer window, whose further distances have no bias."""
    config = InklingConfig.from_dict(json.loads((GOLDEN / name / "config.json").read_text()) | changes)
    model = Inkling(config).eval()
    own = model.state_dict()
    for key, tensor in stored.items():
        missing = own[key].shape[-1] - tensor.shape[-1] if own[key].dim() else 0
        own[key].copy_(torch.nn.functional.pad(tensor, (0, missing)))
    return model


# --------------------------------------------------------------------------------------------------------------- exits

EXITS = {
    "exit_threshold": 0.6,
    "exit_epsilon": 0.25,
    "exit_cosine": 0.03,
    "exit_kl": 0.005,
    "exit_entropy_change": 0.02,
    "exit_steady": 1,
}


FIRST = ("exit_epsilon",)  # of the model with a long text, whose every case takes seconds


@pytest.mark.parametrize(
    ("name", "policy", "dial"),
    [
        pytest.param(name, policy, dial, marks=[] if name == "deep" or dial in FIRST else pytest.mark.nightly)
        for name in ("deep", "long")
        for policy in ("repeat", "all")
        for dial in EXITS
        if name == "deep" or dial != "exit_threshold"  # the gate reads the state alone, which others have read
    ],
)
def test_exits_do_not_depend_on_how_a_text_is_cut(name: str, policy: str, dial: str) -> None:
    model = golden(name, exit_rules=("gate", *UNTRAINED), kv_policy=policy)
    torch.nn.init.normal_(model.exit_gate.weight, std=0.5)
    dials = Dials(model.config.max_loops, **{dial: EXITS[dial]})
    depths: set[int] = set()
    for tokens in known(name)["input_ids"]:
        expected = whole(model, tokens, dials)
        depths |= set(expected.depth.tolist())
        n = len(tokens)
        for cut in ((n,), (6, *[1] * (n - 6)), (5, n - 5)):
            logits, depth = fed(model, tokens.numpy(), cut, dials)
            assert np.array_equal(depth, expected.depth)
            np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
    assert len(depths) > 1


def test_more_passes_than_trained_are_those_of_a_model_of_that_many() -> None:
    model = golden("grouped", untrained_loops=2)
    assert model.config.max_loops == 4
    tokens = known("grouped")["input_ids"][0]
    for passes in (1, 3, 4):
        other = golden("grouped", loop_num_passes=passes)
        found = whole(model, tokens, Dials(passes)).logits
        np.testing.assert_allclose(found, whole(other, tokens, other.config.dials).logits, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- state


def test_what_is_kept_between_calls() -> None:
    """Windows and convolutions lie in rings, for each pass; what sees everything is appended."""
    model = golden("long")
    spec = model.spec(64)
    check_spec(spec)
    state = {s.name: s for s in spec.state}
    shapes = {name.removeprefix("past_"): s.shape for name, s in state.items() if s.per_loop}
    assert shapes == {
        "keys_full": (3, 1, 2, 96, 6),
        "values_full": (3, 1, 2, 96, 6),
        "inputs_full": (3, 1, 4, 2, 6),
        "keys_sliding": (3, 1, 2, 24, 4),
        "values_sliding": (3, 1, 2, 24, 4),
        "inputs_sliding": (3, 1, 4, 2, 4),
        "convolved": (3, 1, 6, 2, 16),
    }
    assert isinstance(state["past_keys_sliding"].update, Ring) and isinstance(state["past_keys_full"].update, Append)
    assert golden("deep").spec(1).capacity is None


def test_a_float16_cache_holds_what_was_rounded_before_use() -> None:
    model = with_cache_dtype(golden("long"), "float16")
    for tokens in known("long")["input_ids"]:
        expected = whole(model, tokens, model.config.dials).logits
        assert float((expected - whole(golden("long"), tokens, model.config.dials).logits).abs().max()) > 1e-5
        # What is a millionth apart is here and there rounded to another float16.
        np.testing.assert_allclose(fed(model, tokens.numpy(), (64, 16))[0], expected, atol=5e-3)


def test_an_int8_cache_has_scales_of_all_that_is_kept() -> None:
    """Of every stack and kind of layers; passes share them, since one may be given what another has rounded."""
    model, texts = golden("long"), torch.from_numpy(random_tokens(256, vocab=33)).view(4, 64)
    changed = with_int8_cache(model, texts)
    scales = {path: cache.kv_scales for path, cache in caches_of(changed).items()}
    shapes = {path.removeprefix("model.").replace(".rows.caches", ""): tuple(s.shape) for path, s in scales.items()}
    assert shapes == {
        "prelude.sliding": (2, 1, 2),
        "core.full": (2, 3, 2),
        "core.sliding": (2, 3, 2),
        "coda.sliding": (2, 1, 2),
    }
    assert all(float(s.amin()) > 1e-4 for s in scales.values())
    assert all(torch.equal(s[:, :1].expand_as(s), s) for s in scales.values())
    tokens = known("long")["input_ids"][0]
    rounded = whole(changed, tokens, changed.config.dials).logits
    np.testing.assert_allclose(fed(changed, tokens.numpy(), (64, 16))[0], rounded, atol=0.1)
    exact = whole(model, tokens, model.config.dials).logits
    off = (rounded - exact).abs()  # of a position here and there, another expert is chosen
    assert 1e-4 < float(off.median()) < float(off.mean()) < 0.05


def test_an_int8_cache_of_a_quantised_model_reads_a_text_alike_however_it_is_cut(tmp_path: Path) -> None:
    """Stored and read again. Keys and values take a byte, in rings and appended; inputs of convolutions stay float32."""
    floats = decided_inkling().eval()
    request = QuantizeRequest(Scheme("int8"), method="rtn", kv="int8", calibration_tokens=512, evaluation_tokens=0)
    save_quantized(quantize(floats, request, random_tokens(2048), fingerprint(floats)), tmp_path)
    model, text = load_quantized(tmp_path).model, random_tokens(80)
    for dials in (Dials(2), Dials(2, exit_threshold=0.6)):
        expected = whole(model, torch.from_numpy(text), dials)
        assert (len(set(expected.depth.tolist())) > 1) == dials.exits
        for sizes in ((1,), (64,), (30, 41, 1)):
            runtime, found = TorchRuntime(model, "inkling2_loop_text"), []
            while (done := sum(len(f.depth) for f in found)) < len(text):
                found.append(runtime.feed(text[done : done + sizes[len(found) % len(sizes)]], dials))
            kept = {name: str(a.dtype) for name, a in runtime.tensors().items()}
            assert kept == {n: "int8" if "keys" in n or "values" in n else "float32" for n in kept}
            assert len(set(kept.values())) == 2
            assert (np.concatenate([f.depth for f in found]) == expected.depth.numpy()).mean() > 0.95
            # What is a millionth apart is now and then rounded to another integer, and by another expert computed.
            off = np.abs(np.concatenate([f.logits for f in found]) - expected.logits.numpy()).max(-1)
            assert np.median(off) < 1e-3 and off.mean() < 0.05


# -------------------------------------------------------------------------------------------------------------- shapes


def test_the_published_model() -> None:
    """Of the size that the defaults say; nothing is allocated for all positions of all passes."""
    config = InklingConfig()
    with torch.device("meta"):
        model = Inkling(config)
    assert sum(p.numel() for p in model.parameters()) == parameters(config)
    spec = model.spec(1)
    check_spec(spec)
    assert spec.max_loops == 3 and spec.capacity == 2**20 and config.blocks == (2, 2)
    # One full layer before the loop, two in each of three passes, one behind; a window of all others.
    token = 2 * 8 * 128 * 4
    full, windows = 1 + 3 * 2 + 1, 5 + 3 * 10 + 5
    inputs = (full + windows) * 3 * (token + 2 * 2304 * 4)
    assert sum(t.of_slots(256).nbytes for t in spec.state) == (full * 256 + windows * 1024) * token + inputs


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted(name: str) -> None:
    model = golden(name)
    assert sum(p.numel() for p in model.parameters()) == parameters(model.config)


# ---------------------------------------------------------------------------------------------- checkpoints, bad input


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_written_and_read(name: str, tmp_path: Path) -> None:
    model = load_checkpoint(GOLDEN / name)
    save_checkpoint(model, tmp_path / "c", dtype=torch.bfloat16)
    back = load_checkpoint(tmp_path / "c")
    assert back.config == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor)


def seeing(folder: Path) -> Path:
    """`long` as a checkpoint of a model that also sees."""
    folder.mkdir()
    text = json.loads((GOLDEN / "long" / "config.json").read_text())
    values = {"model_type": "inkling2_loop", "text_config": text, "vision_config": {"depth": 2}, "image_token_id": 7}
    (folder / "config.json").write_text(json.dumps(values))
    tensors = load_file(GOLDEN / "long" / "model.safetensors")
    tensors = {name.replace("model.", "model.language_model.", 1): t for name, t in tensors.items()}
    save_file(tensors | {"model.vision_tower.embeddings.weight": torch.zeros(3)}, folder / "model.safetensors")
    return folder


def test_the_text_model_of_one_that_also_sees(tmp_path: Path) -> None:
    """A gate is trained for that, too."""
    model, text = load_checkpoint(seeing(tmp_path / "c")), load_checkpoint(GOLDEN / "long")
    recipe = Recipe.of_gate(tmp_path / "c")
    assert recipe.architecture == "inkling2_loop_text" and recipe.model_config().gated
    assert model.config == text.config and model.config.model_type == "inkling2_loop_text"
    assert all(torch.equal(tensor, text.state_dict()[name]) for name, tensor in model.state_dict().items())
    save_checkpoint(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "inkling2_loop_text"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "text_config: got None, expected an object"),
        (
            {"text_config": {"model_type": "inkling"}},
            "text_config.model_type: got 'inkling', expected 'inkling2_loop_text'",
        ),
        ({"audio_config": {}}, "unknown key 'audio_config' beside text_config"),
        ({"eos_token_id": 5, "text_config": {"eos_token_id": 6}}, "eos_token_id: got 5, but text_config says 6"),
        ({"text_config": {"hidden_size": 0}}, "text_config: hidden_size: got 0"),
    ],
)
def test_a_wrong_configuration_of_a_model_that_sees_is_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "inkling2_loop", "text_config": {}} | changes))
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "config.json")
    assert f"config.json: {message}" in str(caught.value)
    assert_one_line(str(caught.value))


def test_keys_by_their_other_names() -> None:
    values = json.loads((GOLDEN / "grouped" / "config.json").read_text())
    config = InklingConfig.from_dict(values)
    for key in ("loop_layer_index_start", "loop_layer_index_end", "loop_num_passes", "loop_gate_rank"):
        del values[key]
    loop = {"core_start": 2, "core_end": 6, "num_passes": 2, "gate_rank": 5}
    other = {"sliding_window": values.pop("sliding_window_size"), "num_local_experts": values.pop("n_routed_experts")}
    assert InklingConfig.from_dict(values | other | {"loop_config": loop}) == config
    assert InklingConfig.from_dict(json.loads(config.to_json())) == config
    assert InklingConfig().layer_types == (*["hybrid_sliding"] * 5, "hybrid") * 4


def test_a_smaller_vocabulary_has_no_rows_to_leave_out() -> None:
    values = json.loads((GOLDEN / "grouped" / "config.json").read_text())
    values.pop("unpadded_vocab_size", None)
    assert InklingConfig.from_dict(values).unpadded_vocab_size == values["vocab_size"]
    assert InklingConfig.from_dict({}).unpadded_vocab_size == InklingConfig.unpadded_vocab_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor of num_attention_heads (4)"),
        ({"swa_num_key_value_heads": 3}, "swa_num_key_value_heads: got 3, expected a divisor of swa_num_attention_heads"),
        ({"unpadded_vocab_size": 41}, "unpadded_vocab_size: got 41, expected at most vocab_size (40)"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok: got 6, expected at most n_routed_experts (5)"),
        ({"conv_kernel_size": 1}, "conv_kernel_size: got 1, expected at least 2"),
        ({"num_hidden_layers": 10}, "layer_types: got 8 layers, expected num_hidden_layers (10)"),
        ({"layer_types": ["full_attention"] * 8}, "layer_types[0]: got 'full_attention', expected one of"),
        ({"loop_layer_index_start": 0}, "loop_layer_index_start: got 0, expected a positive integer"),
        ({"loop_layer_index_start": 3}, "loop_layer_index_start: got 3, expected a multiple of n_layers_per_attn_res_"),
        ({"loop_layer_index_end": 5}, "loop_layer_index_end: got 5, expected a multiple of n_layers_per_attn_res_block"),
        ({"loop_layer_index_end": 2}, "loop_layer_index_end: got 2, expected above loop_layer_index_start (2) and at "),
        ({"loop_layer_index_end": 10}, "loop_layer_index_end: got 10, expected above loop_layer_index_start (2) and at "),
        ({"loop_num_passes": 0}, "loop_num_passes: got 0"),
        ({"loop_config": {"num_passes": 3}}, "loop_config.num_passes: got 3, but loop_num_passes is 2; keep one of them"),
        ({"loop_config": {"passes": 3}}, 'loop_config: got {"passes": 3}, expected an object with some of core_start'),
        ({"sliding_window": 8}, "sliding_window: got 8, but sliding_window_size is 3; keep one of them"),
        ({"kv_policy": "propagate"}, "kv_policy: got 'propagate', expected \"repeat\" or \"all\""),
        ({"min_loops": 3}, "min_loops: got 3, expected at most loop_num_passes (2)"),
        ({"untrained_loops": 63}, "untrained_loops: got 63, expected at most 62, 64 loops in all"),
        ({"exit_kl": 0.1}, "exit_kl: got 0.1, expected it off, since exit_rules has no 'kl'"),
        ({"hidden_act": "gelu"}, 'hidden_act: got "gelu", expected "silu"'),
        ({"scoring_func": "softmax"}, 'scoring_func: got "softmax", expected "sigmoid"'),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: got true, expected false"),
        ({"route_scale": -1.0}, "route_scale: got -1.0, expected a positive number"),
        ({"eos_token_id": 40}, "eos_token_id: got 40, expected below vocab_size (40)"),
        ({"n_loops": 4}, "unknown key 'n_loops'"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_one_line(changes: dict[str, Any], message: str) -> None:
    values = json.loads((GOLDEN / "grouped" / "config.json").read_text()) | changes
    with pytest.raises(ConfigError) as caught:
        InklingConfig.from_dict(values)
    assert str(caught.value).startswith("config: " + message)
    assert_one_line(str(caught.value))


LAYER = "model.llm.layers.3"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.attn.wr_du.weight"), f"tensor {LAYER}.attn.wr_du.weight is missing;"),
        (lambda t: t.pop(f"{LAYER}.controllers.k.gain_weight"), f"tensor {LAYER}.controllers.k.gain_weight is missing;"),
        (lambda t: t.pop("model.llm.attn_res.attn_queries.6"), "tensor model.llm.attn_res.attn_queries.6 is missing;"),
        (lambda t: t.pop("model.llm.middle_cycle_cross_pass_kv_queries"), "cross_pass_kv_queries is missing;"),
        (lambda t: t.update({"model.llm.layers.9.mlp_norm.weight": torch.zeros(16)}), "layers.9.mlp_norm.weight is not part"),
        (lambda t: t.update({f"{LAYER}.mlp.gate.bias": torch.zeros(4)}), f"{LAYER}.mlp.gate.bias has shape (4,)"),
        (lambda t: t.update({f"{LAYER}.mlp.experts.w13_weight": torch.zeros(5, 8, 16)}), "w13_weight has shape (5, 8, 16)"),
        (lambda t: t.update({"model.llm.unembed.weight": torch.zeros(30, 16)}), "unembed.weight (30, 16) gives no lm_head"),
        (lambda t: t.update({f"{LAYER}.mlp.experts.w2_weight": torch.zeros(5, 16, 8, dtype=torch.uint8)}), "type torch.uint8"),
        (lambda t: t[f"{LAYER}.mlp_norm.weight"].fill_(float("nan")), f"{LAYER}.mlp_norm.weight holds NaN"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_one_line(
    damage: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    assert_refused(GOLDEN / "grouped", damage, message, tmp_path / "c")


def test_experts_are_stacked_one_by_one() -> None:
    """So that a runtime may keep, quantise or page each by itself."""
    for module in golden("grouped").modules():
        if isinstance(module, SparseExperts):
            assert module.gate_up_proj.shape == (5, 16, 16) and module.gate_up_proj.is_contiguous()
            assert not module.tells_loops and not module.shares


@pytest.mark.parametrize("name", MODELS)
def test_transformers_generates_the_published_tokens(name: str) -> None:
    """Through the Auto classes, from the published files."""
    transformers = pytest.importorskip("transformers")
    import rmse_edge.hf  # noqa: F401

    expected = known(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
        said = model.generate(expected["input_ids"][:, :6], max_new_tokens=8, do_sample=False)
    np.testing.assert_allclose(logits, expected["logits"][0], atol=1e-4)
    assert torch.equal(said[:, 6:], expected["greedy"])
