"""Dory against the numbers that its published code gave; tests/data/dory/README.md says what they are."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmse_edge.arch.common.recurrent import UNTRAINED
from rmse_edge.arch.dory.config import DoryConfig
from rmse_edge.arch.dory.entry import parameters
from rmse_edge.arch.dory.model import Dory
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.errors import CheckpointError, ConfigError
from rmse_edge.export.gate.compare import compare_host
from rmse_edge.layers.cache import caches_of, with_cache_dtype
from rmse_edge.layers.rope import given_angles
from rmse_edge.loop.contract import check_spec
from rmse_edge.loop.dials import Dials
from rmse_edge.quantize.kv_scales import with_int8_cache
from rmse_edge.runtimes import open_runtime
from rmse_edge.runtimes.engines.torch import TorchRuntime

pytestmark = pytest.mark.slow  # many layers; of its kind, make quick has Ouro

GOLDEN = ROOT / "tests" / "data" / "dory"
MODELS = ("grouped", "deep", "once", "shared")
CUTS = {"whole": (14,), "prompt": (6, *[1] * 8), "chunks": (5, 4, 5), "tokens": (1,) * 14}


def known(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "outputs.safetensors")


def golden(name: str, **changes: Any) -> Dory:
    """A model of the numbers, with other settings."""
    config = DoryConfig.from_dict(json.loads((GOLDEN / name / "config.json").read_text()) | changes)
    model = Dory(config).eval()
    model.load_state_dict(load_checkpoint(GOLDEN / name).state_dict())
    return model


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", MODELS[:3])
@torch.no_grad()
def test_every_part_gives_the_published_states(name: str) -> None:
    model, expected = golden(name), known(name)
    c, tokens = model.config, expected["input_ids"]
    batch, count = tokens.shape
    angles = given_angles(np.arange(count), c.head_dim, c.rope_theta, c.further_thetas)
    given = {name: torch.from_numpy(a).expand(batch, -1, -1) for name, a in angles.items()}
    given |= {"tokens": tokens, "slots": torch.arange(1), "position": torch.zeros(batch, dtype=torch.int64)}
    given |= {"n_valid": torch.full((batch,), count)}
    spec = model.spec(count)
    given |= {s.name: torch.zeros(s.of_slots(1).of_batch(batch)) for s in spec.state}
    given |= model.prelude(given)
    assert_close(given["x0"], expected["input_out"])
    carry, masks = model.begin(given)
    off = {name: torch.tensor(value) for name, value in vars(c.dials).items() if name in spec.dials}
    for k in range(c.n_recurrent_loops):
        past = {s.name: given[s.name][k] for s in spec.rows}
        carry, _ = model.step(torch.tensor(k), carry, past, given | masks, off)
        assert_close(carry["h"], expected["loop_out"][k])
    final = model.coda(given | carry)["y"]
    assert_close(final, expected["final"])
    np.testing.assert_allclose(model.head(final)["logits"], expected["logits"][0], atol=1e-4)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_text_in_calls(name: str, cut: str) -> None:
    """The published code with the same cut; of "last_loop" token by token, whatever is given to a runtime at once."""
    model, expected = golden(name), known(name)
    rows = expected["logits"][-1 if name == "shared" else list(CUTS).index(cut)]
    for tokens, logits in zip(expected["input_ids"].numpy(), rows):
        np.testing.assert_allclose(fed(model, tokens, CUTS[cut])[0], logits, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_text_at_once(name: str) -> None:
    model, expected = golden(name), known(name)
    for row, tokens in enumerate(expected["input_ids"]):
        found = whole(model, tokens, model.config.dials)
        np.testing.assert_allclose(found.logits, expected["logits"][-1][row], atol=1e-4)
        assert_close(found.h, expected["loop_out"][-1][row])


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens(name: str) -> None:
    model, expected = golden(name), known(name)
    for row, tokens in enumerate(expected["input_ids"].tolist()):
        runtime, said = TorchRuntime(model, "dory"), []
        dials = runtime.info.dials
        logits = runtime.feed(tokens[:6], dials).logits[-1]
        while len(said) < 8:
            said.append(int(logits.argmax()))
            logits = runtime.feed(said[-1:], dials).logits[-1]
        assert said == expected["greedy"][row].tolist()


@pytest.mark.parametrize("policy", ["propagate", "all"])
def test_the_other_policies_differ_only_where_loops_were_not_run(policy: str) -> None:
    model, expected = golden("deep", kv_policy=policy), known("deep")
    for row, tokens in enumerate(expected["input_ids"].numpy()):
        np.testing.assert_allclose(fed(model, tokens, (6, 8))[0], expected["logits"][0][row], atol=1e-4)


def test_a_window_is_felt() -> None:
    """The numbers would tell: with all positions seen they are others, and so with one angle for both kinds."""
    expected = known("grouped")
    tokens = expected["input_ids"][0]
    rope = {kind: {"rope_theta": 1e7} for kind in ("sliding_attention", "full_attention")}
    for changes in ({"sliding_window": 4}, {"sliding_window": 2}, {"rope_parameters": rope}):
        model = golden("grouped", **changes)
        off = (whole(model, tokens, model.config.dials).logits - expected["logits"][0][0]).abs().max()
        assert off > 1e-2, changes


# --------------------------------------------------------------------------------------------------------------- exits

EXITS = {"exit_epsilon": 0.3, "exit_cosine": 0.05, "exit_kl": 0.2, "exit_entropy_change": 0.1, "exit_steady": 1}


@pytest.mark.parametrize("dial", EXITS)
@pytest.mark.parametrize(
    ("name", "policy"), [("deep", "repeat"), ("deep", "propagate"), ("deep", "all"), ("shared", "repeat")]
)
def test_exits_do_not_depend_on_how_a_text_is_cut(name: str, policy: str, dial: str) -> None:
    model = golden(name, exit_rules=UNTRAINED, kv_policy=policy)
    dials = Dials(model.config.max_loops, **{dial: EXITS[dial]})
    depths: set[int] = set()
    for tokens in known(name)["input_ids"]:
        expected = whole(model, tokens, dials)
        depths |= set(expected.depth.tolist())
        for cut in ((14,), (6, *[1] * 8), (5, 9)):
            logits, depth = fed(model, tokens.numpy(), cut, dials)
            assert np.array_equal(depth, expected.depth)
            np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
    assert len(depths) > 1


def test_one_set_of_slots_for_all_loops() -> None:
    """A position that stopped leaves what its last loop made, and the gate holds a host to it."""
    model = golden("shared", exit_rules=UNTRAINED)
    assert model.call_sizes() == (1,)
    check_spec(model.spec(1))
    assert {s.name: s.shape[0] for s in model.spec(1).state if not s.per_loop} == {
        f"past_{part}{name}": 1 for part in ("prelude_", "", "coda_") for name in ("keys", "values")
    }
    with pytest.raises(ConfigError, match=r"^chunk: got 2, expected 1\.\.1, the positions of a call"):
        model.spec(2)
    assert compare_host(model, np.resize(random_tokens(40, vocab=33), 40))["same_depth"] == 1


def test_a_float16_cache_holds_what_was_rounded_before_use() -> None:
    for name in ("deep", "shared"):
        model = with_cache_dtype(golden(name), "float16")
        for tokens in known(name)["input_ids"]:
            expected = whole(model, tokens, model.config.dials).logits
            assert float((expected - whole(golden(name), tokens, model.config.dials).logits).abs().max()) > 1e-5
            # What is a millionth apart is here and there rounded to another float16.
            np.testing.assert_allclose(fed(model, tokens.numpy(), CUTS["prompt"])[0], expected, atol=5e-3)


@pytest.mark.parametrize("name", ["deep", "shared"])
def test_an_int8_cache_has_scales_of_all_that_is_kept(name: str) -> None:
    """Of every loop; of the one set that all loops share, as large as the last one's keys need."""
    model, texts = golden(name), torch.from_numpy(random_tokens(256, vocab=33)).view(4, 64)
    changed = with_int8_cache(model, texts)
    assert [tuple(c.kv_scales.shape[:2]) for c in caches_of(changed).values()] == [
        (2, n) for n in (1, 4 if name == "deep" else 1, 1)
    ]
    assert all(float(c.kv_scales.amin()) > 1e-4 for c in caches_of(changed).values())
    runtime = TorchRuntime(model, "dory")
    for text in texts.numpy():  # nothing that calibration saw is beyond the scales
        runtime.reset()
        runtime.feed(text, runtime.info.full_depth)
        kept = (
            torch.from_numpy(runtime.tensors()["past_values"]).abs().amax((-1, -2)).view(-1, changed.stacks.core.heads)
        )
        assert bool((kept <= 127 * changed.stacks.core.cache.kv_scales[1]).all())
    tokens = known(name)["input_ids"][0]
    rounded = whole(changed, tokens, changed.config.dials).logits
    np.testing.assert_allclose(fed(changed, tokens.numpy(), CUTS["prompt"])[0], rounded, atol=0.1)
    exact = whole(model, tokens, model.config.dials).logits
    assert 1e-3 < float((rounded - exact).abs().max()) < 0.5


# -------------------------------------------------------------------------------------------------------------- shapes


def test_the_published_model() -> None:
    """Of the size that its name says; nothing is allocated for all positions of all loops."""
    with torch.device("meta"):
        model = Dory(DoryConfig())
    assert sum(p.numel() for p in model.parameters()) == parameters(model.config)
    assert abs(parameters(model.config) / 4e9 - 1) < 0.02
    spec = model.spec(1)
    check_spec(spec)
    assert spec.max_loops == 2 and spec.capacity == 8192 and model.config.sections == (8, 20, 8)
    assert model.config.attention.count("full_attention") == 9
    layers = 8 + 2 * 20 + 8
    assert sum(t.of_slots(256).nbytes for t in spec.state) == layers * 256 * 2 * 4 * 256 * 4


# ---------------------------------------------------------------------------------------------- checkpoints, bad input


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_written_as_released_ones_are(name: str, tmp_path: Path) -> None:
    model = load_checkpoint(GOLDEN / name)
    save_checkpoint(model, tmp_path / "c", dtype=torch.bfloat16)
    back = load_checkpoint(tmp_path / "c")
    assert back.config == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor)
    written, released = load_file(tmp_path / "c" / "model.safetensors"), load_file(GOLDEN / name / "model.safetensors")
    if name in ("grouped", "shared"):
        assert written.keys() == released.keys()
        assert all(torch.equal(tensor, released[key]) for key, tensor in written.items())
    assert {key.split(".")[0] for key in written} <= {"backbone", "lm_head"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor of num_attention_heads (4)"),
        ({"head_dim": 5}, "head_dim: got 5, expected an even number"),
        ({"num_hidden_layers": 10}, "layer_types: got 8 layers, expected num_hidden_layers (10)"),
        ({"n_input_layers": 4}, "num_hidden_layers: got 8, expected n_input_layers + n_recurrent_layers + "),
        ({"n_input_layers": 3, "n_output_layers": 1}, "n_input_layers: got 3, expected an even number: layer_types"),
        ({"layer_types": ["mlp", "full_attention"] * 4}, "layer_types: expected an attention and an mlp by turns"),
        ({"layer_types": ["linear_attention", "mlp"] * 4}, "layer_types[0]: got 'linear_attention', expected one of"),
        ({"sliding_window": None}, "sliding_window: got None, expected a number, since some layers have a window"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "rope_parameters: got None for sliding_attention"),
        (
            {"rope_parameters": {k: {"rope_type": "yarn", "rope_theta": 5.0} for k in ("sliding_attention", "full_attention")}},
            "rope_parameters: got {'rope_type': 'yarn', 'rope_theta': 5.0} for full_attention, expected rope_type default",
        ),
        ({"n_recurrent_loops": 0}, "n_recurrent_loops: got 0"),
        ({"recurrent_kv_cache_mode": "first_loop"}, "recurrent_kv_cache_mode: got 'first_loop', expected one of"),
        ({"recurrent_kv_cache_mode": "last_loop", "kv_policy": "all"}, 'kv_policy: got \'all\', expected "repeat"'),
        ({"min_loops": 3}, "min_loops: got 3, expected at most n_recurrent_loops (2)"),
        ({"untrained_loops": 63}, "untrained_loops: got 63, expected at most 62, 64 loops in all"),
        ({"exit_kl": 0.1}, "exit_kl: got 0.1, expected it off, since exit_rules has no 'kl'"),
        ({"hidden_act": "gelu"}, 'hidden_act: got "gelu", expected "silu"'),
        ({"attention_bias": True}, "attention_bias: got true, expected false"),
        ({"eos_token_id": 33}, "eos_token_id: got 33, expected below vocab_size (33)"),
        ({"n_loops": 4}, "unknown key 'n_loops'"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_one_line(changes: dict[str, Any], message: str) -> None:
    values = json.loads((GOLDEN / "grouped" / "config.json").read_text()) | changes
    with pytest.raises(ConfigError) as caught:
        DoryConfig.from_dict(values)
    assert str(caught.value).startswith("config: " + message)
    assert_one_line(str(caught.value))


def test_a_configuration_is_read_as_it_was_written() -> None:
    for name in MODELS:
        config = load_checkpoint(GOLDEN / name).config
        assert DoryConfig.from_dict(json.loads(config.to_json())) == config


ATTENTION, MLP = "backbone.layers.2", "backbone.layers.3"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{ATTENTION}.mixer.sqk"), f"tensor {ATTENTION}.mixer.sqk is missing;"),
        (lambda t: t.pop(f"{MLP}.mlp_alpha"), f"tensor {MLP}.mlp_alpha is missing;"),
        (lambda t: t.pop("lm_head.logit_scale"), "tensor lm_head.logit_scale is missing;"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is not part of the model;"),
        (lambda t: t.update({f"{MLP}.mixer.suv_up": torch.zeros(23)}), f"{MLP}.mixer.suv_up"),
        (lambda t: t.update({f"{ATTENTION}.mixer.g_proj.weight": torch.zeros(15, 16)}), f"{ATTENTION}.mixer.g_proj.weight"),
        (lambda t: t[f"{ATTENTION}.attn_alpha"].fill_(float("nan")), f"{ATTENTION}.attn_alpha"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_one_line(
    damage: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    assert_refused(GOLDEN / "grouped", damage, message, tmp_path / "c")


def test_a_tensor_that_transformers_wrote_is_missing(tmp_path: Path) -> None:
    """The message speaks of the names that are there."""
    shutil.copytree(GOLDEN / "deep", tmp_path / "c")
    tensors = load_file(GOLDEN / "deep" / "model.safetensors")
    del tensors["backbone.layers.1.self_attn.g_proj.weight"]
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor backbone\.layers\.1\.self_attn\.g_proj\.weight is missing;"):
        load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("name", MODELS)
def test_transformers_generates_the_published_tokens(name: str) -> None:
    """Through the Auto classes, which have this project's class and not transformers' own, from the published files."""
    transformers = pytest.importorskip("transformers")
    import rmse_edge.hf

    expected = known(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    assert isinstance(model, rmse_edge.hf.LoopedForCausalLM)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
        said = model.generate(expected["input_ids"][:, :6], max_new_tokens=8, do_sample=False)
    np.testing.assert_allclose(logits, expected["logits"][-1], atol=1e-4)
    assert torch.equal(said[:, 6:], expected["greedy"])


@pytest.mark.parametrize("name", MODELS)
def test_transformers_saves_the_released_layout(name: str, tmp_path: Path) -> None:
    """Whose attention and MLP are layers of their own: transformers has other names for them and does not know such a kind."""
    transformers = pytest.importorskip("transformers")
    import rmse_edge.hf  # noqa: F401

    transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name).save_pretrained(tmp_path / "theirs")
    save_checkpoint(load_checkpoint(GOLDEN / name), tmp_path / "ours", dtype=torch.float32)
    theirs, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert load_checkpoint(tmp_path / "theirs").config == load_checkpoint(tmp_path / "ours").config


@pytest.mark.onnx
@pytest.mark.nightly
def test_a_package_with_one_set_of_slots(tmp_path: Path) -> None:
    """Through `rmse-export`, its gate included: what transformers says token by token."""
    save_checkpoint(golden("shared"), tmp_path / "c", dtype=torch.float32)
    assert rmse_export(["--target", "onnx", "-m", str(tmp_path / "c"), "-o", str(tmp_path / "p.rmse")]) == 0
    runtime, expected = open_runtime(tmp_path / "p.rmse"), known("shared")
    for row, tokens in enumerate(expected["input_ids"].tolist()):
        runtime.reset()
        np.testing.assert_allclose(
            runtime.feed(tokens, runtime.info.dials).logits, expected["logits"][0][row], atol=1e-4
        )
