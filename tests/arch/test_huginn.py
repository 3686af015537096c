"""Huginn against the numbers that its published code gave; tests/data/huginn/README.md says what they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import greedy, small_huginn
from architectures import whole as whole_of
from helpers import ONNX_ALWAYS, assert_one_line, random_tokens
from paths import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmse_edge.arch.common.recurrent import UNTRAINED
from rmse_edge.arch.huginn_raven.config import HuginnConfig
from rmse_edge.arch.huginn_raven.entry import parameters
from rmse_edge.arch.huginn_raven.model import Huginn
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.errors import ArgumentError, CheckpointError, ConfigError
from rmse_edge.layers.cache import with_cache_dtype
from rmse_edge.layers.rope import rotary_angles
from rmse_edge.loop.contract import WholeText, check_spec
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.whole import in_one_call
from rmse_edge.quantize import QuantizeRequest, Scheme, load_quantized, quantize, save_quantized
from rmse_edge.quantize.kv_scales import kv_scales
from rmse_edge.runtimes import open_runtime
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.base import Arrays

pytestmark = pytest.mark.slow  # many layers; of its kind, make quick has Ouro

GOLDEN = ROOT / "tests" / "data" / "huginn"
# Dial -> the published name of its rule, and the threshold of its published code.
PUBLISHED = {
    "exit_epsilon": ("latent-diff", 0.03),
    "exit_cosine": ("cosine", 1e-3),
    "exit_kl": ("kl", 1e-3),
    "exit_entropy_change": ("entropy-diff", 1e-3),
    "exit_steady": ("argmax-stability", 5),
}
LOOPS = 8


@pytest.fixture(scope="module")
def known() -> dict[str, Tensor]:
    return load_file(GOLDEN / "inputs.safetensors") | load_file(GOLDEN / "outputs.safetensors")


def golden(**changes: Any) -> Huginn:
    """The model of the numbers, with other settings."""
    config = HuginnConfig.from_dict(json.loads((GOLDEN / "config.json").read_text()) | changes)
    model = Huginn(config).eval()
    model.load_state_dict(load_checkpoint(GOLDEN).state_dict())
    return model


class Started(TorchRuntime):
    """A runtime whose texts begin from given states (T, d)."""

    def __init__(self, model: Huginn, start: Tensor) -> None:
        super().__init__(model, "huginn")
        self.start = start.numpy()

    def _noise(self, chunk: int, position: int) -> Arrays:
        rows = np.zeros((1, chunk, self.start.shape[1]), np.float32)
        given = self.start[position : position + chunk]
        rows[0, : len(given)] = given
        return {"start": rows}


def whole(model: Huginn, known: dict[str, Tensor], row: int, dials: Dials) -> WholeText:
    """A text of the numbers at once, from its given start."""
    tokens, c = known["input_ids"][row], model.config
    angles = rotary_angles(np.arange(len(tokens)), c.head_width, c.rope_base)
    context = {name: torch.from_numpy(a)[None] for name, a in zip(("cos", "sin"), angles)}
    scalars = {name: torch.from_numpy(a) for name, a in dials.arrays().items()}
    scalars = {name: scalars[name] for name in model.spec(1).dials}
    return in_one_call(model, tokens, context | {"start": known["input_states"][row][None]}, scalars)


def assert_close(got: Any, expected: Tensor, relative: float) -> None:
    got = torch.as_tensor(got)
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) < relative


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("tag", ["rand", "zero"])
@torch.no_grad()
def test_every_part_gives_the_published_numbers(tag: str, known: dict[str, Tensor]) -> None:
    model = golden(state_init="like-init" if tag == "rand" else "zero")
    batch, count = known["input_ids"].shape
    angles = rotary_angles(np.arange(count), model.config.head_width, model.config.rope_base)
    given = {name: torch.from_numpy(a).expand(batch, -1, -1) for name, a in zip(("cos", "sin"), angles)}
    given |= {"tokens": known["input_ids"], "slots": torch.arange(1), "position": torch.zeros(batch, dtype=torch.int64)}
    given |= {"n_valid": torch.full((batch,), count)}
    given |= {"start": known["input_states"]} if tag == "rand" else {}
    spec = model.spec(count)
    given |= {s.name: torch.zeros(s.of_slots(1).of_batch(batch)) for s in spec.state}
    given |= model.prelude(given)
    assert_close(given["x0"], known["prelude_out"], 1e-5)
    carry, masks = model.begin(given)
    off = {name: torch.tensor(value) for name, value in vars(Dials(LOOPS)).items() if name in spec.dials}
    for k in range(LOOPS):
        if tag == "rand":
            injected = model.transformer.adapter(torch.cat([carry["h"], given["x0"]], -1))
            assert_close(injected, known["rand.adapter_out"][k], 1e-5)
        past = {s.name: given[s.name][k] for s in spec.rows}
        carry, _ = model.step(torch.tensor(k), carry, past, given | masks, off)
        assert_close(carry["h"], known[f"{tag}.core_out"][k], 1e-5)
        if tag == "rand":
            logits = model.head(model.coda(given | carry)["y"])["logits"]
            np.testing.assert_allclose(logits, known["rand.logits_by_depth"][k], atol=1e-4)


@pytest.mark.parametrize("cut", [(10,), (6, 1, 1, 1, 1), (3, 7)], ids=str)
@pytest.mark.parametrize("loops", [4, 8])
@pytest.mark.parametrize("tag", ["rand", "zero"])
def test_logits_of_a_text_in_calls(tag: str, loops: int, cut: tuple[int, ...], known: dict[str, Tensor]) -> None:
    model = golden(state_init="like-init" if tag == "rand" else "zero")
    for row, tokens in enumerate(known["input_ids"].numpy()):
        runtime = Started(model, known["input_states"][row]) if tag == "rand" else TorchRuntime(model, "huginn")
        parts = np.split(tokens, np.cumsum(cut)[:-1])
        logits = np.concatenate([runtime.feed(part, runtime.info.dials_with(max_loops=loops)).logits for part in parts])
        for name in ("logits", "cached_logits"):
            np.testing.assert_allclose(logits, known[f"{tag}.r{loops}.{name}"][row], atol=1e-4)


def test_repeated_keys_are_those_of_the_published_latest_strategy(known: dict[str, Tensor]) -> None:
    """A token that ran few loops leaves those of its last one to tokens that run more."""
    steps = known["rand.varied_steps.steps"].tolist()
    expected = known["rand.varied_steps.latest-m4.cached_logits"]
    for row, tokens in enumerate(known["input_ids"].numpy()):
        runtime = Started(golden(), known["input_states"][row])
        parts = [tokens[:6], *tokens[6:, None]]
        depths = [steps[0], *steps[6:]]
        fed = [runtime.feed(part, runtime.info.dials_with(max_loops=k)) for part, k in zip(parts, depths)]
        np.testing.assert_allclose(np.concatenate([f.logits for f in fed]), expected[row], atol=1e-4)


@pytest.mark.parametrize("kv_policy", ["propagate", "all"])
def test_the_other_policies_differ_only_where_loops_were_not_run(kv_policy: str, known: dict[str, Tensor]) -> None:
    for row, tokens in enumerate(known["input_ids"].numpy()):
        runtime = Started(golden(kv_policy=kv_policy), known["input_states"][row])
        logits = np.concatenate([runtime.feed(part, Dials(LOOPS)).logits for part in (tokens[:6], tokens[6:])])
        np.testing.assert_allclose(logits, known["rand.r8.logits"][row], atol=1e-4)


def test_greedy_tokens(known: dict[str, Tensor]) -> None:
    for row, tokens in enumerate(known["input_ids"].tolist()):
        runtime = TorchRuntime(golden(state_init="zero"), "huginn")
        dials, said = runtime.info.dials_with(max_loops=4), []
        logits = runtime.feed(tokens[:6], dials).logits[-1]
        while len(said) < 10:
            said.append(int(logits.argmax()))
            logits = runtime.feed(said[-1:], dials).logits[-1]
        assert said == known["zero.r4.greedy"][row].tolist()


@pytest.mark.packages
@pytest.mark.nightly
@pytest.mark.parametrize("target", ONNX_ALWAYS)
def test_packages_say_what_the_published_code_says(target: str, tmp_path: Path, known: dict[str, Tensor]) -> None:
    """From the given start that a package can have, which is zeros."""
    folder, package = tmp_path / "huginn", tmp_path / "huginn.rmse"
    save_checkpoint(golden(state_init="zero"), folder)
    assert rmse_export(["-m", str(folder), "--target", target, "-o", str(package)]) == 0
    runtime = open_runtime(package)
    for row, tokens in enumerate(known["input_ids"].numpy()):
        for loops in (4, LOOPS):
            runtime.reset()
            fed = [runtime.feed(part, runtime.info.dials_with(max_loops=loops)) for part in (tokens[:6], tokens[6:])]
            logits = np.concatenate([f.logits for f in fed])
            np.testing.assert_allclose(logits, known[f"zero.r{loops}.cached_logits"][row], atol=1e-4)
        runtime.reset()
        dials = runtime.info.dials_with(max_loops=4)
        assert greedy(runtime, tokens[:6], dials, 10) == known["zero.r4.greedy"][row].tolist()


# --------------------------------------------------------------------------------------------------------------- exits


def test_what_every_rule_compares(known: dict[str, Tensor]) -> None:
    model = golden(exit_rules=UNTRAINED)
    for row in range(2):
        scores = whole(model, known, row, Dials(LOOPS)).scores
        assert set(scores) == set(PUBLISHED)
        for dial, (name, _) in PUBLISHED.items():
            expected = known[f"exit.{name}.token.value"][:, row]
            np.testing.assert_allclose(scores[dial], expected, atol=2e-5, err_msg=dial)
        assert torch.equal(scores["exit_steady"], known["exit.argmax-stability.token.value"][:, row])


def first_loop(held: Tensor) -> list[int]:
    """(K, T) bool -> the loop, from 1, of which a rule first held; the last where it never did."""
    last = torch.ones_like(held[:1])
    return (torch.cat([held[:-1], last]).int().argmax(0) + 1).tolist()


@pytest.mark.parametrize("dial", PUBLISHED)
def test_positions_stop_where_the_published_rule_holds(dial: str, known: dict[str, Tensor]) -> None:
    """At its own threshold, and at others at which positions stop at several depths."""
    name, own = PUBLISHED[dial]
    values, depths = known[f"exit.{name}.token.value"], set()
    model = golden(exit_rules=UNTRAINED, kv_policy="all")
    for row in range(2):
        held = {own: known[f"exit.{name}.token.exit"][:, row]}
        if dial == "exit_steady":
            held |= {n: values[:, row] >= n for n in (1, 2, 3)}
        else:
            ordered = values[:, row].flatten().sort().values
            gaps = ordered.diff()
            for part in (slice(10, 30), slice(30, 50)):  # between two values that are clearly apart
                at = int(gaps[part].argmax()) + part.start
                middle = float((ordered[at] + ordered[at + 1]) / 2)
                held[middle] = values[:, row] < middle
        for threshold, expected in held.items():
            depth = whole(model, known, row, Dials(LOOPS, **{dial: threshold})).depth.tolist()
            assert depth == first_loop(expected), threshold
            depths |= set(depth)
    assert len(depths) > 2


@pytest.mark.parametrize("kv_policy", ["repeat", "propagate", "all"])
@pytest.mark.parametrize("dial", ["exit_kl", "exit_steady", "exit_cosine"])
def test_exits_do_not_depend_on_how_a_text_is_cut(kv_policy: str, dial: str, known: dict[str, Tensor]) -> None:
    model = golden(exit_rules=UNTRAINED, kv_policy=kv_policy)
    dials = Dials(LOOPS, 2, **{dial: {"exit_kl": 0.3, "exit_steady": 2, "exit_cosine": 0.1}[dial]})
    for row, tokens in enumerate(known["input_ids"].numpy()):
        expected = whole(model, known, row, dials)
        for cut in ((10,), (6, 1, 1, 1, 1), (1, 9)):
            runtime = Started(model, known["input_states"][row])
            fed = [runtime.feed(part, dials) for part in np.split(tokens, np.cumsum(cut)[:-1])]
            assert np.array_equal(np.concatenate([f.depth for f in fed]), expected.depth)
            np.testing.assert_allclose(np.concatenate([f.logits for f in fed]), expected.logits, atol=1e-4)
        assert len(set(expected.depth.tolist())) > 1


def test_a_float16_cache_holds_what_was_rounded_before_use(known: dict[str, Tensor]) -> None:
    model, dials = with_cache_dtype(golden(exit_rules=UNTRAINED), "float16"), Dials(2)
    for row, tokens in enumerate(known["input_ids"].numpy()):
        runtime = Started(model, known["input_states"][row])
        fed = [runtime.feed(part, dials) for part in (tokens[:6], *tokens[6:, None])]
        assert {a.dtype for a in runtime.tensors().values()} == {np.dtype("float16")}
        # What is a millionth apart is here and there rounded to another float16.
        found, expected = np.concatenate([f.logits for f in fed]), whole(model, known, row, dials).logits
        np.testing.assert_allclose(found, expected, atol=2e-3)


CUTS = ((1,), (64,), (7, 40, 3))


def small(**changes: Any) -> Huginn:
    """Four loops, 32 channels, and room for texts that are long enough to calibrate on."""
    own = small_huginn(changes.get("exit_rules", ("gate", *UNTRAINED)))
    model = Huginn(dataclasses.replace(own.config, **changes)).eval()
    model.load_state_dict(own.state_dict())
    return model


def in_int8(model: Huginn) -> Huginn:
    """Quantised with an int8 cache; its weights only rounded."""
    request = QuantizeRequest(Scheme("int8"), method="rtn", kv="int8", calibration_tokens=512, evaluation_tokens=0)
    return quantize(model, request, random_tokens(2048)).model


@pytest.mark.parametrize("rules", [("delta", "cosine"), UNTRAINED], ids=["states", "predictions"])
@pytest.mark.parametrize("policy", ["propagate", "repeat", "all"])
def test_an_int8_cache_reads_a_text_alike_however_it_is_cut(policy: str, rules: tuple[str, ...]) -> None:
    """Of prelude, core block and coda, whose keys of every loop are kept where a rule reads predictions."""
    floats = small(kv_policy=policy, exit_rules=rules)
    model, text = in_int8(floats), random_tokens(60)
    for dial, value in (("exit_cosine", 0.3), ("exit_kl", 0.5)):
        if dial not in model.config.rules:
            continue
        dials = Dials(4, **{dial: value})
        expected, depth = whole_of(model, text, dials)
        assert len(set(depth.tolist())) > 2
        rounding = np.abs(whole_of(floats, text, Dials(4))[0] - whole_of(model, text, Dials(4))[0]).max()
        for sizes in CUTS:
            runtime, found, done = TorchRuntime(model, "huginn"), [], 0
            while done < len(text):
                found.append(runtime.feed(text[done : done + sizes[len(found) % len(sizes)]], dials))
                done += len(found[-1].depth)
            assert {a.dtype for a in runtime.tensors().values()} == {np.dtype("int8")}
            assert (np.concatenate([f.depth for f in found]) == depth).mean() > 0.97
            # What is a millionth apart is now and then rounded to another integer.
            assert np.abs(np.concatenate([f.logits for f in found]) - expected).max() < 0.1 * rounding


def test_loops_that_read_each_other_s_keys_share_scales() -> None:
    shared, own = (in_int8(small(kv_policy=p)).transformer.core_block.cache.kv_scales for p in ("repeat", "propagate"))
    assert torch.equal(shared, shared[:, :1].expand_as(shared))
    assert not torch.equal(own, own[:, :1].expand_as(own))


def test_scales_reach_what_stopped_positions_leave_to_loops_that_did_not_run() -> None:
    """Read with exits that stop all positions of a text in its first loop: the others are known by `commit` alone."""
    model = small(kv_policy="propagate", exit_cosine=2.5)
    text = torch.from_numpy(random_tokens(64))[None]
    scales = kv_scales(model, text)["transformer.core_block.cache"]
    runtime = TorchRuntime(model, "huginn")
    assert set(runtime.feed(text[0], model.config.dials).depth) == {1}
    for which, name in enumerate(("past_keys", "past_values")):
        kept = np.abs(runtime.tensors()[name][:, 0, :, :64]).max((-1, -2))  # (K, L * G)
        assert (kept <= scales[which].numpy() * 127).all()


def test_quantised_with_an_int8_cache_and_read_again(tmp_path: Path) -> None:
    request = QuantizeRequest(Scheme("int8"), kv="int8", calibration_tokens=512, evaluation_tokens=0)
    found = quantize(small(exit_kl=0.5), request, random_tokens(2048), "f")
    save_quantized(found, tmp_path / "q")
    back = load_quantized(tmp_path / "q").model
    assert back.config.kv_dtype == "int8"
    for path in ("prelude", "core_block", "coda"):
        scales = back.get_submodule(f"transformer.{path}").cache.kv_scales
        assert torch.equal(scales, found.model.get_submodule(f"transformer.{path}").cache.kv_scales)
        assert float(scales.amin()) > 1e-4 and scales.shape[1] == (4 if path == "core_block" else 1)
    text = random_tokens(20)
    fed = [TorchRuntime(m, "huginn").feed(text, m.config.dials).logits for m in (found.model, back)]
    assert np.array_equal(*fed)
    assert TorchRuntime(found.model, "x", source="f").info.fingerprint != "f"


def test_a_count_of_loops_hangs_by_the_lead_of_its_token(known: dict[str, Tensor]) -> None:
    model = golden(exit_rules=UNTRAINED)
    found = whole(model, known, 0, Dials(LOOPS, exit_steady=LOOPS))  # which nothing reaches
    best = known["rand.logits_by_depth"][:-1, 0].topk(2).values
    np.testing.assert_allclose(found.margin, (best[..., 0] - best[..., 1]).amin(0), atol=1e-4)
    assert bool(whole(model, known, 0, Dials(LOOPS)).margin.isinf().all())


# -------------------------------------------------------------------------------------------------------------- shapes


def test_the_published_model(known: dict[str, Tensor]) -> None:
    """Of the size that its paper states, 3.5 billion parameters; nothing is allocated for all positions of all loops."""
    with torch.device("meta"):
        model = Huginn(HuginnConfig(untrained_loops=32, exit_rules=UNTRAINED))
    assert sum(p.numel() for p in model.parameters()) == parameters(model.config)
    assert abs(parameters(model.config) / 3.5e9 - 1) < 0.02
    spec = model.spec(1)
    check_spec(spec)
    assert spec.max_loops == 64 and model.config.dials.max_loops == 32 and spec.capacity == 4096
    layers = 64 * (4 + 2) + 2 + 2  # with the coda of every loop
    assert sum(t.of_slots(256).nbytes for t in spec.state) == layers * 256 * 2 * 5280 * 4
    assert sum(t.nbytes for t in spec.state) == layers * 4096 * 2 * 5280 * 4  # 67 GB


@pytest.mark.parametrize(
    ("untrained", "text"),
    [
        (0, "1..8 (the depth the model was trained to; untrained_loops in its config.json allows more)"),
        (2, "1..10 (2 of them beyond the depth the model was trained to, by untrained_loops in its config.json)"),
    ],
)
def test_loops_beyond_the_trained_depth_are_asked_for_by_name(
    untrained: int, text: str, known: dict[str, Tensor]
) -> None:
    model = golden(untrained_loops=untrained)
    runtime = Started(model, known["input_states"][0])
    assert runtime.info.dials.max_loops == LOOPS and runtime.info.max_loops == LOOPS + untrained
    deep = LOOPS + untrained
    assert runtime.feed([1, 2], runtime.info.dials_with(max_loops=deep)).depth.tolist() == [deep, deep]
    for ask in (
        lambda: runtime.info.dials_with(max_loops=deep + 1),
        lambda: runtime.feed([1], Dials(deep + 1)),
    ):
        with pytest.raises(ArgumentError) as caught:
            ask()
        assert str(caught.value) == f"max_loops: got {deep + 1}, expected {text}"


def test_the_seed_decides_where_a_text_begins() -> None:
    found = []
    for seed in (0, 0, 1):
        runtime = TorchRuntime(golden(), "huginn")
        runtime.noise_seed = seed
        found.append(runtime.feed([1, 2, 3], runtime.info.dials).logits)
    assert np.array_equal(found[0], found[1]) and not np.allclose(found[0], found[2], atol=1e-2)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 30}, "n_embd: got 30, expected a multiple of 2 * n_heads (8)"),
        ({"min_loops": 9}, "min_loops: got 9, expected at most mean_recurrence (8)"),
        ({"mean_recurrence": 65}, "mean_recurrence: got 65"),
        ({"untrained_loops": 57}, "untrained_loops: got 57, expected at most 56, 64 loops in all"),
        ({"exit_rules": ["minp-kl"]}, "exit_rules[0]: got 'minp-kl', expected one of gate, delta, cosine, kl"),
        ({"exit_rules": ["kl", "kl"]}, "exit_rules: got ('kl', 'kl'), expected each rule once"),
        ({"exit_kl": 0.1}, "exit_kl: got 0.1, expected it off, since exit_rules has no 'kl'"),
        ({"exit_steady": 0.5, "exit_rules": ["steady"]}, "exit_steady: got 0.5, expected 0 or a positive integer"),
        ({"state_init": "normal"}, "state_init: got 'normal', expected one of like-init, zero"),
        ({"injection_type": "add"}, 'injection_type: got "add", expected "linear"'),
        ({"block_class_name": "Block"}, 'block_class_name: got "Block", expected "SandwichBlock"'),
        ({"bias": True}, "bias: got true, expected false"),
        ({"test_time_noise": 0.1}, "test_time_noise: got 0.1, expected 0 or null"),
        ({"n_layers": 8}, "n_layers: got 8, expected 7, as the other keys say"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: got 2, expected 4, as the other keys say"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: got False, expected True"),
        ({"init_values": {"embed_scale": 1.0}}, "init_values.embed_scale: got 1.0, expected sqrt(n_embd)"),
        ({"eos_token_id": 96}, "eos_token_id: got 96, expected below vocab_size (96)"),
        ({"num_steps": 4}, "unknown key 'num_steps'"),
    ],
)
def test_a_wrong_configuration_is_one_line(changes: dict[str, Any], message: str) -> None:
    values = json.loads((GOLDEN / "config.json").read_text()) | changes
    with pytest.raises(ConfigError) as caught:
        HuginnConfig.from_dict(values)
    assert str(caught.value).startswith("config: " + message)
    assert_one_line(str(caught.value))


def test_a_configuration_is_read_as_it_was_written() -> None:
    config = HuginnConfig(exit_rules=UNTRAINED, exit_steady=3, eos_token_id=[3, 4])  # type: ignore[arg-type]
    assert HuginnConfig.from_dict(json.loads(config.to_json())) == config


CORE = "transformer.core_block.0"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{CORE}.attn.Wqkv.weight"), f"tensor {CORE}.attn.Wqkv.weight is missing;"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is not part of the model;"),
        (lambda t: t.update({f"{CORE}.attn.Wqkv.weight": torch.zeros(95, 32)}), f"{CORE}.attn.Wqkv.weight (95, 32) gives"),
        (lambda t: t.update({f"{CORE}.attn.Wqkv.weight": torch.zeros(97, 32)}), f"{CORE}.attn.Wqkv.weight (97, 32) gives"),
        (lambda t: t.update({f"{CORE}.attn.qk_bias": torch.zeros(3, 1, 4, 8)}), f"{CORE}.attn.qk_bias (3, 1, 4, 8) gives"),
        (lambda t: t.update({f"{CORE}.attn.qk_bias": torch.zeros(2, 1, 4, 6)}), f"{CORE}.attn.qk_bias (2, 1, 4, 6) gives"),
        (lambda t: t.update({f"{CORE}.mlp.fc.weight": torch.zeros(127, 32)}), f"{CORE}.mlp.fc.weight (127, 32) gives"),
        (lambda t: t.update({f"{CORE}.mlp.proj.weight": torch.zeros(32, 63)}), f"{CORE}.mlp.proj.weight"),
        (lambda t: t.update({"transformer.adapter.weight": torch.zeros(32, 32)}), "transformer.adapter.weight"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(96, 32)}), "tensor lm_head.weight differs from transformer.wte"),
        (lambda t: t[f"{CORE}.norm_2.weight"].fill_(float("nan")), f"{CORE}.norm_2.weight"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_one_line(
    damage: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    tensors = load_file(GOLDEN / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert_one_line(str(caught.value))


def test_a_head_of_its_own(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "model.safetensors") | {"lm_head.weight": torch.randn(96, 32)}
    save_file(tensors, tmp_path / "model.safetensors")
    values = json.loads((GOLDEN / "config.json").read_text()) | {"tie_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = load_checkpoint(tmp_path)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(model.transformer.wte.weight, tensors["transformer.wte.weight"])
