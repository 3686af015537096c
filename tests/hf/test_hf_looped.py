"""Architectures beside RMS-E in transformers: published numbers, and the same whatever batch, padding and cache do."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import TEXTS, Case, argmax_of_whole_text, settings_of, whole
from helpers import assert_one_line
from later import later
from ouro_models import GOLDEN, POLICIES, golden, lively_ouro, published_folder
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import ARCH as TOY
from toy import toy
from toy_tower import TowerConfig

from rmse_edge.arch import registry
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.errors import CheckpointError, ConfigError, UserError
from rmse_edge.hf.known import text_types
from rmse_edge.text import train_character_tokenizer

# Imported when a test needs them: see tests/later.py.
transformers, hf = later("transformers"), later("rmse_edge.hf")

pytestmark = pytest.mark.slow

PAD = 1000  # outside every vocabulary: padding must not reach the embedding
THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 1.0)
LOGITS = 1e-4
GOLD = golden()
IDS = GOLD["input_ids"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_folder(tmp_path_factory.mktemp("hf") / "ouro", kv_policy="all")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def idle(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model, made to fail the test when it computes."""
    monkeypatch.setattr(model.looped, "prelude", lambda tensors: pytest.fail("computed before refusing"))
    return model


def tokens(count: int, seed: int = 0, rows: int = 1, vocab: int = 65) -> Tensor:
    return torch.randint(0, vocab, (rows, count), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], layout: str = "left") -> tuple[Tensor, Tensor]:
    """Rows (1, n) side by side, and their mask: with padding before, behind or between the tokens."""
    width = max(row.shape[1] for row in rows) + (7 if layout == "holes" else 0)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for r, n in enumerate(row.shape[1] for row in rows):
        places = torch.randperm(width, generator=torch.Generator().manual_seed(r))[:n]
        mask[r, {"left": slice(width - n, None), "right": slice(n), "holes": places}[layout]] = 1
    ids = torch.full_like(mask, PAD)
    ids[mask.bool()] = torch.cat(rows, 1)[0]
    return ids, mask


def loaded(model: Any, folder: Path) -> Any:
    save_checkpoint(model, folder, dtype=torch.float32)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------- the published numbers


@torch.no_grad()
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_forward_says_what_the_published_code_says(model: Any, threshold: float) -> None:
    out = model(IDS, exit_threshold=threshold)
    assert (out.logits - GOLD[f"threshold_{threshold}.logits"]).abs().max() < LOGITS
    assert torch.equal(out.depth - 1, GOLD[f"threshold_{threshold}.exit_step"])


@torch.no_grad()
@pytest.mark.parametrize(("name", "threshold"), [("all_loops", 1.0), ("thr0.5", 0.5)])
def test_decode_and_generate_say_what_the_published_cache_gives(model: Any, name: str, threshold: float) -> None:
    cache, logits = hf.LoopedCache(), []
    for piece in IDS.split([9, 1, 1, 1, 1, 1], 1):
        logits.append(model(piece, cache=cache, exit_threshold=threshold).logits)
    assert (torch.cat(logits, 1) - GOLD[f"cached.{name}.logits"]).abs().max() < LOGITS
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "exit_threshold": threshold}
    expected = GOLD[f"greedy.{name}.tokens"]
    assert torch.equal(model.generate(IDS[:, :9], **settings)[:, 9:], expected)
    assert torch.equal(model.generate(IDS[:, :9], use_cache=False, **settings)[:, 9:], expected)
    ids, mask = padded([IDS[:1, :9], IDS[1:, 4:9]])
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings)[0, 9:], expected[0])


# ------------------------------------------------------------------------------------- the same numbers in every batch


@torch.no_grad()
@pytest.mark.parametrize("layout", ["left", "right", "holes"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_of_different_lengths_equals_its_rows_alone(policy: str, layout: str, tmp_path: Path) -> None:
    model = loaded(lively_ouro(kv_policy=policy), tmp_path)
    rows = [tokens(n, seed=n) for n in (5, 130, 290)]  # within a call, in a page of the cache, in the next page
    ids, mask = padded(rows, layout)
    out = model(ids, attention_mask=mask, exit_threshold=0.6)
    assert out.cache.position.tolist() == [5, 130, 290]
    assert out.cache.state["past_keys"].shape == (3, 3, 4, 512, 8)
    more = tokens(9, seed=7, rows=3)
    after = model(more, cache=out.cache, exit_threshold=0.6)
    for r, row in enumerate(rows):
        alone = model(torch.cat([row, more[r : r + 1]], 1), exit_threshold=0.6)
        here = mask[r].bool()
        assert (torch.cat([out.logits[r, here], after.logits[r]]) - alone.logits[0]).abs().max() < LOGITS
        assert torch.equal(torch.cat([out.depth[r, here], after.depth[r]]), alone.depth[0])
        depths = set(alone.depth.flatten().tolist())
        assert not out.depth[r, ~here].any() and not out.logits[r, ~here].any()
    assert depths == {1, 2, 3}


@torch.no_grad()
@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case.name)
@pytest.mark.parametrize("setting", ["full depth", "adaptive", "shallow"])
def test_every_architecture_says_what_its_whole_text_says(case: Case, setting: str, tmp_path: Path) -> None:
    """Rings, slots, recurrences, memories of noise: at once, in pieces, and in a batch with shorter texts."""
    model, chosen = (
        transformers.AutoModelForCausalLM.from_pretrained(case.checkpoint(tmp_path / "m")),
        settings_of(case)[setting],
    )
    assert isinstance(model, hf.LoopedForCausalLM) and type(model.config).model_type == case.name
    dials = {name: value for name, value in vars(chosen).items() if name in model.model.spec(1).dials}
    text = case.ids(min(100, (model.model.spec(1).capacity or 102) - 2))
    expected, depth = (torch.from_numpy(a) for a in whole(case.model(), text, chosen))
    row, n = torch.from_numpy(text)[None], len(text)
    ids, mask = padded([row[:, : n // 3], row, row[:, : n // 2 + 1]])
    out = model(ids, attention_mask=mask, **dials)
    for r in range(3):
        here = mask[r].bool()
        count = int(here.sum())
        assert torch.equal(out.depth[r, here], depth[:count])
        assert (out.logits[r, here] - expected[:count]).abs().max() < LOGITS
        assert not out.logits[r, ~here].any()
    cache, logits = None, []
    for piece in row.split([n - 20, 1, 1, 18], 1):
        step = model(piece, cache=cache, **dials)
        cache = step.cache
        logits.append(step.logits[0])
    assert (torch.cat(logits) - expected).abs().max() < LOGITS
    assert torch.equal(cache.depth[0], depth)


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case.name)
def test_every_architecture_generates(case: Case, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(case.checkpoint(tmp_path / "m"))
    dials = settings_of(case)["adaptive"]
    own = vars(dials).items()
    settings = {"max_new_tokens": 10, "do_sample": False} | {k: v for k, v in own if k in case.model().spec(1).dials}
    prompt = case.ids(30)
    rows = [torch.from_numpy(prompt)[None], torch.from_numpy(prompt[:7])[None]]
    ids, mask = padded(rows)
    out = model.generate(ids, attention_mask=mask, **settings)
    for r, row in enumerate(rows):
        new = out[r, ids.shape[1] :].tolist()
        assert new == argmax_of_whole_text(case.model(), row[0].numpy(), new, dials)


@torch.no_grad()
def test_a_row_that_a_call_leaves_out_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the model makes of a row without tokens, which is nobody's business but a batch's."""
    model = loaded(toy(), tmp_path)
    commit = model.looped.commit

    def spoilt(given: dict[str, Tensor]) -> dict[str, Tensor]:
        empty = (given["n_valid"] == 0).view(1, -1, 1)
        return {name: t.masked_fill(empty, torch.nan) for name, t in commit(given).items()}

    monkeypatch.setattr(model.looped, "commit", spoilt)
    rows = [tokens(3), tokens(40, seed=1)]
    ids, mask = padded(rows)
    cache = model(ids, attention_mask=mask).cache
    for r, row in enumerate(rows):
        assert (cache.state["sums"][:, r] - model(row).cache.state["sums"][:, 0]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("make", [toy, lively_ouro])
def test_models_of_fixed_calls_are_padded_to_them(
    make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = loaded(make(), tmp_path), tokens(90)
    free, sizes, spec = model(ids, exit_threshold=0.5), set(), model.looped.spec

    def fixed(chunk: int) -> Any:
        if chunk not in model.looped.call_sizes():
            raise ConfigError(f"chunk: got {chunk}")
        sizes.add(chunk)
        return spec(chunk)

    monkeypatch.setattr(model.looped, "spec", fixed)
    out = model(ids, exit_threshold=0.5)
    assert (out.logits - free.logits).abs().max() < LOGITS and torch.equal(out.depth, free.depth)
    assert sizes == set(model.looped.call_sizes())


# ---------------------------------------------------------------------------------------------------------- settings


def test_dials_reach_the_loop_from_everywhere(model: Any) -> None:
    settings = {"max_new_tokens": 8, "return_dict_in_generate": True, "eos_token_id": None}
    dials = {"max_loops": 3, "min_loops": 2, "exit_threshold": 0.3}
    by_argument = model.generate(IDS, **settings, **dials).cache.depth
    assert set(by_argument.flatten().tolist()) == {2, 3}
    by_config = model.generate(IDS, generation_config=transformers.GenerationConfig(**settings, **dials)).cache.depth
    assert torch.equal(by_config, by_argument)
    own = copy.deepcopy(model)
    own.config.early_exit_threshold, own.config.min_loops = 0.3, 2
    assert torch.equal(own(IDS, max_loops=3).depth, by_argument[:, :14])
    assert model.looped.config.early_exit_threshold == 1.0
    own.config.min_loops = 9
    with pytest.raises(ConfigError) as caught:
        own(IDS)
    assert_one_line(str(caught.value), "min_loops: got 9, expected at most total_ut_steps (4)")


def test_settings_of_the_file_may_be_replaced_on_loading(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, early_exit_threshold=0.5)
    assert torch.equal(model(IDS).depth - 1, GOLD["threshold_0.5.exit_step"])
    assert set(type(model).from_pretrained(folder)(IDS).depth.flatten().tolist()) == {4}


def test_sampling_follows_the_seed(model: Any) -> None:
    def sample(seed: int, **settings: Any) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(IDS, max_new_tokens=12, do_sample=True, eos_token_id=None, **settings)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert sample(1, num_return_sequences=3, temperature=2.0).shape == (6, 26)


def test_noise_is_of_its_seed_and_its_position(tmp_path: Path) -> None:
    case = next(case for case in TEXTS if case.name == "toy_recurrent")
    model = transformers.AutoModelForCausalLM.from_pretrained(case.checkpoint(tmp_path / "m"))
    row = tokens(20, vocab=13)
    with torch.no_grad():
        first, again, other = (model(row, noise_seed=seed).logits for seed in (3, 3, 4))
        assert torch.equal(first, again) and (first - other).abs().max() > 1e-2
        ids, mask = padded([row[:, :6], row])
        batch = model(ids, attention_mask=mask, noise_seed=3).logits
        assert (batch[1] - first[0]).abs().max() < LOGITS and (batch[0, -6:] - first[0, :6]).abs().max() < LOGITS
    settings = {"max_new_tokens": 9, "do_sample": False}
    by_config = transformers.GenerationConfig(**settings, noise_seed=4)
    assert torch.equal(model.generate(row, generation_config=by_config), model.generate(row, noise_seed=4, **settings))
    for wrong in (-1, 2**64, 0.5):
        with pytest.raises(UserError) as caught:
            model(row, noise_seed=wrong)
        assert_one_line(str(caught.value), f"noise_seed: got {wrong}, expected a whole number from 0 to 2**64 - 1")
    with pytest.raises(UserError) as caught:
        model(tokens(49, vocab=13))
    assert_one_line(str(caught.value), "49 tokens are more than the 48 that the model attends to")


def test_the_loss_is_that_of_the_returned_logits_and_has_gradients(tmp_path: Path) -> None:
    """Beyond one call, so that they flow through the cache; at full depth the training path gives the same ones."""
    model = loaded(lively_ouro(kv_policy="all"), tmp_path).train()
    ids = tokens(80, rows=2)
    labels = ids.clone()
    labels[:, :10] = -100
    out = model(ids, labels=labels, exit_threshold=1.0)
    assert out.cache is None
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(out.loss, expected, atol=1e-5)
    out.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.looped.named_parameters() if p.grad is not None}
    model.zero_grad()
    states, _, _ = model.looped.trajectory(ids)
    logits = model.looped.lm_head(states[-1])
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
    theirs = {name: p.grad for name, p in model.looped.named_parameters() if p.grad is not None}
    assert len(theirs) > 15
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max(), name


def test_ids_without_a_token_are_never_chosen_and_stop_strings_end_a_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    letters = "".join(chr(97 + i) for i in range(20))
    train_character_tokenizer(letters, tmp_path / "tokenizer.json")
    save_checkpoint(lively_ouro(), tmp_path / "m", tokenizer=tmp_path / "tokenizer.json")
    model, tokenizer = (
        auto.from_pretrained(tmp_path / "m") for auto in (transformers.AutoModelForCausalLM, AutoTokenizer)
    )
    torch.manual_seed(0)
    free = model.generate(tokens(5, vocab=20), max_new_tokens=40, do_sample=True, temperature=9.0)[0, 5:]
    assert free.max() < 20 and len(free.unique()) > 8
    greedy = model.generate(tokens(5, vocab=20), max_new_tokens=20, do_sample=False)[0, 5:].tolist()
    stop = tokenizer.decode(greedy[6:8])
    length = next(n for n in range(2, 20) if stop in tokenizer.decode(greedy[:n]))
    out = model.generate(tokens(5, vocab=20), max_new_tokens=20, stop_strings=[stop], tokenizer=tokenizer)
    assert out[0, 5:].tolist() == greedy[:length]
    with pytest.raises(UserError) as caught:
        model.generate(tokens(5, vocab=20), max_new_tokens=3, stop_strings=["a"])
    assert_one_line(str(caught.value), "stop_strings: give the model's tokenizer")


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("trust", [None, False, True])
def test_code_beside_a_checkpoint_is_never_run(trust: bool | None, tmp_path: Path) -> None:
    maps = {"AutoConfig": "configuration_ouro.OuroConfig", "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM"}
    folder = published_folder(tmp_path / "ouro", auto_map=maps, kv_policy="all")
    (folder / "custom_generate").mkdir()
    for name in ("configuration_ouro.py", "modeling_ouro.py", "custom_generate/generate.py"):
        (folder / name).write_text("raise SystemExit('code of the checkpoint was run')\n")
    given = {} if trust is None else {"trust_remote_code": trust}
    assert transformers.AutoConfig.from_pretrained(folder, **given).total_ut_steps == 4
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **given)
    expected = GOLD["greedy.all_loops.tokens"][:, :4]
    assert torch.equal(model.generate(IDS[:, :9], max_new_tokens=4, eos_token_id=None)[:, 9:], expected)
    with pytest.raises(UserError) as caught:
        model.generate(IDS, custom_generate=str(folder), trust_remote_code=True)
    assert_one_line(str(caught.value), "custom_generate: got", "code of a repository is not run")


def test_what_is_saved_has_the_published_names_and_is_read_by_both(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "again")
    own, written = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert written.keys() == own.keys() and all(torch.equal(written[name], own[name]) for name in own)
    ours = load_checkpoint(tmp_path / "again")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert ours.config == theirs.looped.config == model.looped.config == theirs.config.to_looped()
    assert torch.equal(theirs(IDS).logits, model(IDS).logits)
    assert theirs.generation_config.eos_token_id == 2


def test_shards_of_bfloat16_are_read_and_written(model: Any, tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "ouro", torch_dtype="bfloat16", dtype="bfloat16")
    own = {name: t.bfloat16() for name, t in load_file(GOLDEN / "model.safetensors").items()}
    own["model.rotary_emb.inv_freq"] = torch.ones(6)
    parts = {f"model-0000{i}-of-00002.safetensors": sorted(own)[i - 1 :: 2] for i in (1, 2)}
    for file, names in parts.items():
        save_file({name: own[name] for name in names}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    read = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert read.dtype == torch.float32 and read.config.dtype == torch.float32
    assert torch.equal(read.looped.lm_head.weight, own["lm_head.weight"].float())
    read.save_pretrained(tmp_path / "again", max_shard_size="60KB")
    assert len([*(tmp_path / "again").glob("model-*.safetensors")]) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), read.state_dict().values(), strict=True))


def test_a_tied_head_is_one_tensor(tmp_path: Path) -> None:
    model = loaded(lively_ouro(tie_word_embeddings=True), tmp_path / "tied")
    assert model.looped.lm_head.weight is model.looped.model.embed_tokens.weight
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path / "again")
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens(9)).logits, model(tokens(9)).logits)
    other = loaded(toy(tied=True), tmp_path / "toy")  # whose configuration calls it otherwise
    other.save_pretrained(tmp_path / "toy again")
    assert "head_proj.weight" not in load_file(tmp_path / "toy again" / "model.safetensors")
    assert load_checkpoint(tmp_path / "toy again").config.tied


def test_a_checkpoint_in_the_hubs_cache_is_read_from_there(folder: Path, model: Any, tmp_path: Path) -> None:
    """As the hub's client lays it out: ids to folders, revisions to commits. Nothing is asked over a network."""
    commit, repo = "0" * 40, tmp_path / "models--someone--ouro"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    given = {"cache_dir": tmp_path, "local_files_only": True}
    cached = transformers.AutoModelForCausalLM.from_pretrained("someone/ouro", **given)
    assert torch.equal(cached(IDS).logits, model(IDS).logits) and cached.name_or_path == "someone/ouro"
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        transformers.AutoModelForCausalLM.from_pretrained("someone/ouro", **given)
    assert_one_line(str(caught.value), "model.safetensors: no such file")


def test_a_model_from_a_configuration_starts_like_the_architecture(model: Any) -> None:
    torch.manual_seed(3)
    expected = type(model.looped)(model.looped.config).state_dict()
    torch.manual_seed(3)
    made = transformers.AutoModelForCausalLM.from_config(model.config)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.looped.state_dict().items())


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 2}, "beam search is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported"),
        ({"is_assistant": True}, "ouro cannot assist another model"),
        ({"cache_implementation": "static"}, "ouro has its own LoopedCache"),
        ({"cache": "DynamicCache"}, "cache: got DynamicCache, expected a LoopedCache"),
        ({"max_loops": 5}, "max_loops: got 5, expected 1..4 (the depth the model was trained to; untrained_loops"),
        ({"max_loops": 2, "min_loops": 3}, "min_loops: got 3, expected 1..2 (max_loops)"),
        ({"exit_threshold": 0.0}, "exit_threshold: got 0.0"),
        ({"exit_entropy": 1.0}, "exit_entropy: this model has no entropy rule"),
        ({"noise_seed": 1}, "noise_seed: this model begins from no noise"),
        (
            {"output_hidden_states": True, "return_dict_in_generate": True},
            "output_hidden_states: ouro does not take it",
        ),
    ],
)
def test_generate_refuses_in_one_line_before_any_compute(idle: Any, settings: dict[str, Any], said: str) -> None:
    if "cache" in settings:  # made here, so that finding tests imports no transformers
        settings = {"cache": getattr(transformers, settings["cache"])()}
    with pytest.raises(UserError) as caught:
        idle.generate(IDS, max_new_tokens=3, **settings)
    assert_one_line(str(caught.value), said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"input_ids": None}, "input_ids: expected token numbers"),
        ({"input_ids": torch.tensor([[1, 128]])}, "token 128 is outside the vocabulary (0..127)"),
        (
            {"input_ids": torch.zeros(1, 257, dtype=torch.long)},
            "257 tokens are more than the 256 that the model attends to",
        ),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask: got shape (2, 4), expected (2, 14)"),
        ({"position_ids": torch.arange(5)[None]}, "position_ids: ouro does not take it"),
        ({"labels": torch.ones(1, 4)}, "labels: expected the shape of input_ids"),
    ],
)
def test_forward_refuses_in_one_line(idle: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        idle(**({"input_ids": IDS} | arguments))
    assert_one_line(str(caught.value), said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dtype": torch.bfloat16}, "ouro computes in float32, got torch.bfloat16"),
        ({"torch_dtype": "float16"}, "ouro computes in float32, got torch.float16"),
        ({"device_map": {"looped.model": 0, "looped.lm_head": "cpu"}}, "device_map: names several devices"),
        ({"device_map": "nowhere"}, "device_map: got 'nowhere', expected a device"),
        (
            {"quantization_config": {"quant_method": "x"}},
            "quantization_config: ouro does not take it when it is loaded",
        ),
        ({"exit_treshold": 0.5}, "exit_treshold: ouro does not take it when it is loaded"),
        ({"total_ut_steps": 0}, "total_ut_steps: got 0"),
    ],
)
def test_from_pretrained_refuses_in_one_line(folder: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments)
    assert_one_line(str(caught.value), said)


@pytest.mark.parametrize(
    ("dtype", "device"), [(None, None), ("auto", "cpu"), ("float32", {"": "cpu"}), (torch.float32, torch.device("cpu"))]
)
def test_float32_and_one_device_may_be_asked_for(folder: Path, dtype: Any, device: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device)
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (lambda t: t.update({"extra": torch.zeros(2)}), "tensor extra is not part of the model"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "tensor model.norm.weight holds NaN"),
    ],
)
def test_from_pretrained_does_not_make_up_weights(
    folder: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any], said: str
) -> None:
    own = load_file(folder / "model.safetensors")
    edit(own)
    save_file(own, tmp_path / "model.safetensors")
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError) as caught:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_one_line(str(caught.value), said)


def test_a_config_that_does_not_fit_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "ouro", hidden_act="gelu")
    with pytest.raises(ConfigError) as caught:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert_one_line(str(caught.value), f'{folder}: hidden_act: got "gelu", expected "silu"')


def test_a_theta_among_rope_parameters_is_read(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    folder = published_folder(tmp_path / "ouro", rope_parameters=rope)
    values = json.loads((folder / "config.json").read_text())
    del values["rope_theta"]
    (folder / "config.json").write_text(json.dumps(values))
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).looped.config.rope_theta == 500.0


@torch.no_grad()
def test_a_cache_continues_only_its_own_batch_and_is_not_rolled_back(model: Any) -> None:
    cache = model(IDS).cache
    with pytest.raises(UserError) as caught:
        model(IDS[:1], cache=cache)
    assert_one_line(str(caught.value), "a LoopedCache of 2 rows, got input_ids of 1")
    with pytest.raises(UserError) as caught:
        cache.reorder_cache(torch.tensor([1, 0]))
    assert_one_line(str(caught.value), "LoopedCache.reorder_cache: what a looped model keeps cannot be reordered")
    longer = copy.deepcopy(cache)
    model(IDS[:, :3], cache=longer)
    assert (cache.get_seq_length(), longer.get_seq_length(), len(cache)) == (14, 17, 4)
    cache.reset()
    assert torch.equal(model(IDS[:1], cache=cache).logits, model(IDS[:1]).logits)


# ------------------------------------------------------------------------------------------------------ registration


def test_every_architecture_of_texts_is_known_and_no_other() -> None:
    known = set(text_types())
    assert {case.name for case in TEXTS} <= known and "puzzle" not in known
    for case in TEXTS:
        name = case.name
        config = transformers.AutoConfig.for_model(name, **case.model().config.to_dict())
        assert config.model_type == name
        again, kind = pickle.loads(pickle.dumps((config, type(transformers.AutoModelForCausalLM.from_config(config)))))
        assert issubclass(kind, hf.LoopedForCausalLM) and kind.config_class is type(config)
        assert type(again) is type(config) and again.to_looped() == config.to_looped()


def test_an_architecture_may_be_registered_late_and_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    save_checkpoint(toy(), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": "late"}))
    with pytest.raises(ValueError, match="`late`"):
        transformers.AutoConfig.from_pretrained(tmp_path)
    registry.register("late", TOY)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (type(model).__name__, type(model.config).__name__) == ("LateForCausalLM", "LatePretrainedConfig")
    registry.register("late", dataclasses.replace(TOY, config=TowerConfig))
    assert "d_model" in transformers.AutoConfig.for_model("late").to_dict()


def test_an_architecture_that_cannot_be_imported_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmse_edge.arch.registry.model_types", lambda: ["absent", "ouro"])
    monkeypatch.setattr("rmse_edge.arch.registry.arch_of", lambda name: {"ouro": TOY}[name])
    with pytest.warns(UserWarning, match="architecture absent: cannot be loaded"):
        assert text_types() == ["ouro"]


@pytest.mark.parametrize(
    "imports",
    [
        "import rmse_edge\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport rmse_edge",
        "from rmse_edge.hf import LoopedCache\nfrom transformers import AutoModelForCausalLM",
        "from rmse_edge.hf import LoopedForCausalLM\nfrom transformers import AutoModelForCausalLM",
    ],
)
def test_either_import_order_registers(folder: Path, imports: str) -> None:
    code = f"{imports}\nprint(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "OuroForCausalLM"
