"""The Hugging Face side: the same files, and the same numbers whatever the batch, the padding and the cache do."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from later import later, needs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import dials, lively_model, small_config, whole_sequence
from torch import Tensor

import rmse_edge
from rmse_edge import RMSE, RMSEConfig, load_checkpoint, save_checkpoint
from rmse_edge.errors import CheckpointError, ConfigError, UserError
from rmse_edge.text import train_character_tokenizer

if TYPE_CHECKING:
    from rmse_edge import RMSEForCausalLM

AutoConfig = later("transformers:AutoConfig")
AutoModelForCausalLM = later("transformers:AutoModelForCausalLM")
AutoTokenizer = later("transformers:AutoTokenizer")
transformers = later("transformers")

pytestmark = [pytest.mark.slow, needs("transformers", "hf")]

PAD = 65  # outside the vocabulary: padding must not reach the embedding


TINY = {"vocab_size": 65, "d_model": 64, "max_loops": 4, "n_experts": 32, "top_k": 4, "exit_threshold": 0.6}


def tiny_config(**changes: Any) -> RMSEConfig:
    return small_config(**(TINY | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    alphabet = "\n" + "".join(chr(39 + i) for i in range(64))  # with the letters that stop strings are measured by
    train_character_tokenizer(alphabet, folder.parent / "tokenizer.json")
    save_checkpoint(lively_model(tiny_config()), folder, tokenizer=folder.parent / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> RMSEForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


def tokens(count: int, seed: int = 0, rows: int = 1) -> Tensor:
    return torch.randint(0, 65, (rows, count), generator=torch.Generator().manual_seed(seed))


def reference(model: RMSEForCausalLM, ids: Tensor, threshold: float | None = None) -> tuple[Tensor, Tensor]:
    """Logits and depths of whole rows by the training path: no cache, no ring, no chunks, no early stop."""
    threshold = model.config.exit_threshold if threshold is None else threshold
    return whole_sequence(model.rmse, ids, dials(model.rmse, exit_threshold=threshold))


def reference_greedy(model: RMSEForCausalLM, ids: Tensor, count: int) -> tuple[list[int], list[int]]:
    """The next `count` tokens of one row, and the depth each of them took, everything recomputed for each."""
    depths = []
    for _ in range(count):
        logits, depth = reference(model, ids)
        depths.append(int(depth[0, -1]))
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, -count:].tolist(), depths


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([F.pad(row, (width - row.shape[1], 0), value=PAD) for row in rows])
    return ids, (ids != PAD).long()


# --------------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_forward_agrees_with_the_training_path_beyond_the_window(
    model: RMSEForCausalLM, threshold: float | None
) -> None:
    ids = tokens(150, rows=2)
    logits, depth = reference(model, ids, threshold)
    out = model(ids, exit_threshold=threshold)
    assert torch.equal(out.depth, depth)
    assert (out.logits - logits).abs().max() < 1e-4
    assert set(depth.unique().tolist()) == ({4} if threshold else {1, 2, 3, 4})


@torch.no_grad()
def test_logits_with_the_cache_equal_logits_without(model: RMSEForCausalLM) -> None:
    ids = tokens(150, seed=1, rows=2)
    whole = model(ids, use_cache=False)
    assert whole.cache is None
    cache, logits, depth = None, [], []
    for piece in ids.split([70, 1, 1, 30, 1, 47], 1):
        out = model(piece, cache=cache)
        cache = out.cache
        logits.append(out.logits)
        depth.append(out.depth)
    assert torch.equal(torch.cat(depth, 1), whole.depth)
    assert torch.equal(cache.depth, whole.depth)
    assert (torch.cat(logits, 1) - whole.logits).abs().max() < 1e-4
    assert cache.get_seq_length() == 150 and cache.position.tolist() == [150, 150]
    assert cache.keys.shape == (4, 2, 2, 64, 16)  # bounded by the window


@torch.no_grad()
@pytest.mark.parametrize("layout", ["left", "right", "holes"])
def test_padding_changes_nothing_wherever_it_is(model: RMSEForCausalLM, layout: str) -> None:
    lengths = [5, 90, 130]
    rows = [tokens(n, seed=n) for n in lengths]
    mask = torch.zeros(3, 140, dtype=torch.long)
    for r, n in enumerate(lengths):
        if layout == "holes":
            mask[r, torch.randperm(140, generator=torch.Generator().manual_seed(r))[:n]] = 1
        else:
            mask[r, slice(140 - n, None) if layout == "left" else slice(n)] = 1
    ids = torch.full_like(mask, PAD)
    ids[mask.bool()] = torch.cat(rows, 1)[0]
    out = model(ids, attention_mask=mask)
    assert out.cache.position.tolist() == lengths
    for r, row in enumerate(rows):
        alone = model(row)
        here = mask[r].bool()
        assert (out.logits[r, here] - alone.logits[0]).abs().max() < 1e-4
        assert torch.equal(out.depth[r, here], alone.depth[0])
        assert not out.depth[r, ~here].any() and not out.logits[r, ~here].any()


def test_no_call_of_a_row_crosses_a_multiple_of_64(model: RMSEForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, calls = model.rmse.begin, []

    def spy(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        calls.append((tensors["position"].tolist(), tensors["n_valid"].tolist()))
        return begin(tensors)

    monkeypatch.setattr(model.rmse, "begin", spy)
    ids, mask = left_padded([tokens(n) for n in (3, 100)])
    cache = model(ids, attention_mask=mask).cache
    model(tokens(70, rows=2), cache=cache)
    assert calls == [([0, 0], [3, 64]), ([3, 64], [0, 36]), ([3, 100], [61, 28]), ([64, 128], [9, 42])]


def test_mixed_precision_does_not_change_the_model(model: RMSEForCausalLM) -> None:
    ids = tokens(20)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids)
    assert torch.equal(out.logits, model(ids).logits)


@pytest.mark.parametrize("kept", [1, 7, torch.tensor([0, 19, 4])])
def test_logits_to_keep(model: RMSEForCausalLM, kept: int | Tensor) -> None:
    ids = tokens(20, rows=2)
    whole = model(ids)
    expected = whole.logits[:, -kept:] if isinstance(kept, int) else whole.logits[:, kept]
    out = model(ids, logits_to_keep=kept)
    assert (out.logits - expected).abs().max() < 1e-4 and out.logits.shape == expected.shape
    assert torch.equal(out.depth, whole.depth)


def test_the_loss_is_that_of_the_returned_logits(model: RMSEForCausalLM) -> None:
    model = copy.deepcopy(model).train()
    ids = tokens(100, rows=2)
    labels = ids.clone()
    labels[:, :10] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(out.loss, expected, atol=1e-5)
    assert out.cache is None
    assert model(ids, labels=labels, return_dict=False)[0] == out.loss


def test_gradients_flow_through_the_ring(model: RMSEForCausalLM) -> None:
    """At full depth the training path is differentiable too: both must agree, beyond the first 64 positions."""
    model = copy.deepcopy(model).train()
    ids = tokens(100, rows=2)
    model(ids, labels=ids, exit_threshold=1.0).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.rmse.named_parameters() if p.grad is not None}
    model.zero_grad()
    states, _, _ = model.rmse.trajectory(ids)
    logits = model.rmse.head_proj(states[-1])
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = {name: p.grad for name, p in model.rmse.named_parameters() if p.grad is not None}
    assert set(ours) - {"gate.weight", "gate.bias"} == set(theirs) and len(theirs) > 15
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() < 1e-3 * gradient.abs().max(), name


# ---------------------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("length", [1, 60, 100])
def test_greedy_is_the_argmax_of_the_reference(model: RMSEForCausalLM, length: int) -> None:
    ids = tokens(length, seed=2)
    expected, depths = reference_greedy(model, ids, 12)
    out = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert out.sequences[0, length:].tolist() == expected
    assert out.cache.depth[0, length - 1 :].tolist() == depths
    assert len(set(expected)) > 3 and len(set(depths)) > 1
    assert model.generate(ids, max_new_tokens=12, use_cache=False)[0, length:].tolist() == expected
    assert model.generate(ids, max_new_tokens=12, prefill_chunk_size=17)[0, length:].tolist() == expected


def test_left_padded_batch_equals_each_prompt_alone(model: RMSEForCausalLM) -> None:
    rows = [tokens(n, seed=n) for n in (1, 62, 70, 130)]
    ids, mask = left_padded(rows)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=9, return_dict_in_generate=True)
    assert out.cache.position.tolist() == [n + 8 for n in (1, 62, 70, 130)]
    for r, row in enumerate(rows):
        alone = model.generate(row, max_new_tokens=9, return_dict_in_generate=True)
        assert torch.equal(out.sequences[r, 130:], alone.sequences[0, row.shape[1] :])
        assert torch.equal(out.cache.depth[r, 129:], alone.cache.depth[0, -9:])
    assert len({tuple(s) for s in out.sequences[:, 130:].tolist()}) == 4


def test_generation_continues_from_a_returned_or_copied_cache(model: RMSEForCausalLM) -> None:
    ids, mask = left_padded([tokens(30), tokens(50, seed=1)])
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=20)
    first = model.generate(ids, attention_mask=mask, max_new_tokens=8, return_dict_in_generate=True)
    longer = torch.cat([mask, mask.new_ones(2, 8)], 1)
    for cache in (copy.deepcopy(first.cache), first.cache):
        rest = model.generate(first.sequences, attention_mask=longer, cache=cache, max_new_tokens=12)
        assert torch.equal(rest, whole)
    cache.reset()
    assert (cache.get_seq_length(), len(cache), cache.depth.numel()) == (0, 0, 0)


def test_sampling_follows_the_seed_and_not_the_number_of_experts(model: RMSEForCausalLM) -> None:
    ids, mask = left_padded([tokens(30), tokens(50, seed=1)])

    def sample(seed: int, **settings: Any) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=True, **settings)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert not torch.equal(sample(1)[0], sample(1)[1])
    assert sample(1, num_return_sequences=3).shape == (6, 62)
    assert model.generation_config.top_k is None
    hot = torch.cat([sample(seed, temperature=50.0) for seed in range(3)])[:, 50:]
    assert len(hot.unique()) > 30  # config.json's top_k = 4 experts would leave 4 candidates each time


def test_folders_without_a_generation_config_do_not_sample_among_top_k_experts(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.top_k is None
    assert (
        rmse_edge.RMSEForCausalLM(rmse_edge.RMSEPretrainedConfig.from_rmse(tiny_config())).generation_config.top_k
        is None
    )


@pytest.mark.parametrize(
    ("dials", "depths"),
    [
        ({"max_loops": 1}, {1}),
        ({"max_loops": 2, "exit_threshold": 1.0}, {2}),
        ({"exit_threshold": 1.0}, {4}),
        ({"exit_threshold": 1.0, "exit_epsilon": 100.0, "min_loops": 3}, {3}),
        ({"min_loops": 2}, {2, 3, 4}),
    ],
)
def test_dials_reach_the_loop_from_everywhere(model: RMSEForCausalLM, dials: dict[str, Any], depths: set[int]) -> None:
    ids = tokens(40)
    settings = {"max_new_tokens": 20, "return_dict_in_generate": True}
    by_argument = model.generate(ids, **settings, **dials)
    assert set(by_argument.cache.depth.flatten().tolist()) == depths
    by_config = model.generate(ids, generation_config=transformers.GenerationConfig(**settings, **dials))
    assert torch.equal(by_config.cache.depth, by_argument.cache.depth)
    own = copy.deepcopy(model)
    for name, value in dials.items():
        setattr(own.generation_config, name, value)
    assert torch.equal(own.generate(ids, **settings).cache.depth, by_argument.cache.depth)
    assert torch.equal(model(ids, **dials).depth, by_argument.cache.depth[:, :40])


def test_the_configurations_own_dials_are_the_default(model: RMSEForCausalLM) -> None:
    ids = tokens(40)
    own = copy.deepcopy(model)
    own.config.exit_threshold = 1.0
    own.config.min_loops = 3
    assert set(own(ids).depth.unique().tolist()) == {4}
    assert set(own(ids, max_loops=2).depth.unique().tolist()) == {2}  # and min_loops follows down
    assert not torch.equal(own(ids).depth, model(ids).depth)


def test_stop_strings_end_a_text(folder: Path, model: RMSEForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokens(5)
    free = model.generate(ids, max_new_tokens=40)[0, 5:].tolist()
    stop = tokenizer.decode(free[9:11])
    length = next(n for n in range(2, 40) if stop in tokenizer.decode(free[:n]))
    out = model.generate(ids, max_new_tokens=40, stop_strings=[stop], tokenizer=tokenizer)
    assert out[0, 5:].tolist() == free[:length]
    config = transformers.GenerationConfig(max_new_tokens=40, stop_strings=stop)
    assert torch.equal(model.generate(ids, generation_config=config, tokenizer=tokenizer), out)


def test_stop_strings_that_cannot_be_looked_for_are_refused(
    folder: Path, tmp_path: Path, idle: RMSEForCausalLM
) -> None:
    with pytest.raises(UserError) as caught:
        idle.generate(tokens(5), max_new_tokens=3, stop_strings=["A"])
    assert_one_line(caught.value, "stop_strings: give the model's tokenizer")
    for stops in ("", [""], ["A", ""], [], [5]):
        with pytest.raises(UserError) as caught:
            idle.generate(tokens(5), max_new_tokens=3, stop_strings=stops, tokenizer=object())
        assert_one_line(caught.value, f"stop_strings: got {stops!r}, expected the text to stop at")
    train_character_tokenizer("\nABC", tmp_path / "t.json")
    save_checkpoint(lively_model(tiny_config()), tmp_path / "model", tokenizer=tmp_path / "t.json")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with pytest.raises(UserError) as caught:
        idle.generate(tokens(5), max_new_tokens=3, stop_strings=["A"], tokenizer=tokenizer)
    assert_one_line(caught.value, "stop_strings: transformers measures tokens behind the text 'abcdef'")


# ---------------------------------------------------------------------------------------------------------------- refusals


def assert_one_line(error: BaseException, said: str) -> None:
    assert "\n" not in str(error)
    assert said in str(error)


@pytest.fixture
def idle(model: RMSEForCausalLM, monkeypatch: pytest.MonkeyPatch) -> RMSEForCausalLM:
    """The model, made to fail the test when it computes."""
    monkeypatch.setattr(model.rmse, "prelude", lambda tensors: pytest.fail("computed before refusing"))
    return model


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 2}, "beam search is not supported"),
        ({"num_beams": 2, "do_sample": True}, "beam sample is not supported"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "group beam search is not supported"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported"),
        ({"assistant_model": "itself"}, "assisted generation is not supported"),
        ({"is_assistant": True}, "cannot assist another model"),
        ({"cache_implementation": "static"}, "cache_implementation: got 'static'"),
        ({"cache_implementation": "quantized"}, "cache_implementation: got 'quantized'"),
        ({"cache_implementation": "paged"}, "cache_implementation: got 'paged'"),
        ({"cache": "another"}, "expected an RMSECache"),
        ({"max_loops": 5}, "max_loops: got 5, expected 1..4 (the depth the model was trained to)"),
        ({"max_loops": 0}, "max_loops: got 0"),
        ({"max_loops": 2, "min_loops": 3}, "min_loops: got 3, expected 1..2 (max_loops)"),
        ({"exit_threshold": 0.0}, "exit_threshold: got 0.0"),
        ({"exit_threshold": float("nan")}, "exit_threshold: got nan"),
        ({"exit_epsilon": -1.0}, "exit_epsilon: got -1.0"),
        ({"exit_entropy": 1.0}, "no entropy rule"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ],
)
def test_generate_refuses_in_one_line_before_any_compute(
    idle: RMSEForCausalLM, settings: dict[str, Any], said: str
) -> None:
    if settings.get("assistant_model"):
        settings = {"assistant_model": idle}
    if settings.get("cache"):
        settings = {"cache": transformers.DynamicCache()}
    with pytest.raises(UserError) as caught:
        idle.generate(tokens(5), max_new_tokens=3, **settings)
    assert_one_line(caught.value, said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"input_ids": None}, "input_ids: expected token numbers"),
        ({"input_ids": torch.tensor([[1, 65]])}, "token 65 is outside the vocabulary (0..64)"),
        ({"input_ids": torch.tensor([[1, -1]])}, "token -1 is outside the vocabulary"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask: got shape (1, 4), expected (1, 5)"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, "attention_mask: got shape"),
        ({"inputs_embeds": torch.zeros(1, 5, 64)}, "inputs_embeds: RMS-E does not take it; give input_ids"),
        ({"position_ids": torch.arange(5)[None]}, "position_ids: RMS-E does not take it"),
        ({"labels": torch.ones(1, 4)}, "labels: expected the shape of input_ids"),
        ({"labels": torch.ones(1, 5), "logits_to_keep": 1}, "no logits_to_keep"),
    ],
)
def test_forward_refuses_in_one_line(idle: RMSEForCausalLM, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        idle(**({"input_ids": tokens(5)} | arguments))
    assert_one_line(caught.value, said)


def test_a_cache_continues_only_its_own_batch(model: RMSEForCausalLM) -> None:
    cache = model(tokens(5)).cache
    with pytest.raises(UserError) as caught:
        model(tokens(1, rows=2), cache=cache)
    assert_one_line(caught.value, "an RMSECache of 1 rows, got input_ids of 2")


@pytest.mark.parametrize(
    "operation",
    ["update", "get_mask_sizes", "reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices"],
)
def test_a_ring_says_what_it_cannot_do(operation: str) -> None:
    with pytest.raises(UserError) as caught:
        getattr(rmse_edge.RMSECache(), operation)(torch.tensor([0]))
    assert_one_line(caught.value, f"RMSECache.{operation}: a ring cannot be")
    assert not (rmse_edge.RMSECache().is_compileable or rmse_edge.RMSECache().is_croppable)


def test_a_resized_vocabulary_is_refused(model: RMSEForCausalLM) -> None:
    with pytest.raises(UserError, match="vocabulary is part of the trained model"):
        model.resize_token_embeddings(70)


# ------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("encoding", ["learned", "temporal_rope", "none"])
@pytest.mark.parametrize("tied", [False, True])
def test_both_loaders_read_the_same_file(tmp_path: Path, encoding: str, tied: bool) -> None:
    save_checkpoint(lively_model(tiny_config(step_encoding=encoding, tie_embeddings=tied)), tmp_path)
    ours = load_checkpoint(tmp_path)
    torch.use_deterministic_algorithms(True)  # memory that nobody fills is NaN
    try:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    assert isinstance(theirs, rmse_edge.RMSEForCausalLM) and theirs.rmse.config == ours.config and not theirs.training
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.rmse.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.rmse.named_buffers(), strict=True):
        assert torch.equal(a, b), name  # those that no file holds, too
    assert (theirs.rmse.head_proj.weight is theirs.rmse.embed.weight) == tied

    theirs.save_pretrained(tmp_path / "again")
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as a,
        safe_open(tmp_path / "again/model.safetensors", "pt") as b,
    ):
        assert set(a.keys()) == set(b.keys())
        assert a.metadata() == b.metadata()
    again = load_checkpoint(tmp_path / "again")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again").rmse.embed.weight, ours.embed.weight)


def test_a_model_from_a_configuration_starts_like_rmse() -> None:
    config = rmse_edge.RMSEPretrainedConfig.from_rmse(tiny_config())
    torch.manual_seed(3)
    expected = RMSE(config.to_rmse()).state_dict()
    torch.manual_seed(3)
    for name, tensor in AutoModelForCausalLM.from_config(config).rmse.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_one_dialect_of_config_json(tmp_path: Path) -> None:
    ours = tiny_config(
        exit_rules=("gate", "entropy"), exit_entropy=0.5, eos_token_id=3, tie_embeddings=True, min_loops=2
    )
    (tmp_path / "config.json").write_text(ours.to_json())
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, rmse_edge.RMSEPretrainedConfig) and theirs.to_rmse() == ours
    assert (theirs.hidden_size, theirs.num_attention_heads, theirs.tie_word_embeddings) == (64, 4, True)
    theirs.use_cache = False  # as Trainer does
    theirs.output_hidden_states = True
    theirs.num_labels = 7
    theirs.save_pretrained(tmp_path / "again")
    assert RMSEConfig.from_file(tmp_path / "again" / "config.json") == ours
    with pytest.raises(ConfigError, match="window: got 3, expected at least 64"):
        rmse_edge.RMSEPretrainedConfig(window=3)


def test_weights_are_widened_and_other_types_refused(folder: Path, model: RMSEForCausalLM) -> None:
    assert model.dtype == torch.float32  # from a bfloat16 file
    with pytest.raises(UserError) as caught:
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert_one_line(caught.value, "computes in float32, got torch.bfloat16")
    with pytest.raises(UserError, match=r"computes in float32, got torch\.float16"):
        copy.deepcopy(model).half()(tokens(3))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("gate.bias"), "tensor gate.bias is missing"),
        (lambda t: t.update({"extra": torch.zeros(2)}), "tensor extra is not part of the model"),
        (lambda t: t["gate.bias"].fill_(float("nan")), "tensor gate.bias holds NaN"),
        (lambda t: t["block.experts.balance_bias"].fill_(float("inf")), "tensor block.experts.balance_bias holds Inf"),
    ],
)
def test_from_pretrained_does_not_make_up_weights(
    folder: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any], said: str
) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_one_line(caught.value, said)


def test_a_tensor_of_another_shape_is_never_initialised(folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"tensor step_encoding has shape \(4, 64\), config\.json asks for \(3, 64\)"
    ):
        rmse_edge.RMSEForCausalLM.from_pretrained(folder, max_loops=3, ignore_mismatched_sizes=True)


def test_the_tokenizer_fits_generate(folder: Path, model: RMSEForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "TO BE\nOR , NOT 'S"
    text = text.replace(" ", "_")
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    tokenizer.pad_token = "\n"
    batch = tokenizer(["HELLO", "A"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
    out = model.generate(**batch, max_new_tokens=6)
    alone = model.generate(**tokenizer("A", return_tensors="pt"), max_new_tokens=6)
    assert torch.equal(out[1, 5:], alone[0, 1:])


# ------------------------------------------------------------------------------------------------------------ registration


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import rmse_edge\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport rmse_edge",
        "from rmse_edge.hf import RMSECache\nfrom transformers import AutoModelForCausalLM",
    ],
)
def test_either_import_order_registers(folder: Path, imports: str) -> None:
    code = f"""{imports}
import inspect, sys
from transformers.models.auto import modeling_auto
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
loaders = modeling_auto.__loader__, modeling_auto.__spec__.loader
print(type(model).__name__, {{type(loader).__name__ for loader in loaders}}, len(inspect.getsource(modeling_auto)) > 1000)
print([f for f in sys.meta_path if "hf.auto" in str(f)])
"""
    assert python(code).splitlines() == ["RMSEForCausalLM {'SourceFileLoader'} True", "[]"]


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    heavy = {"torch", "transformers", "numpy", "safetensors", "json"}
    code = f"import sys, rmse_edge\nprint(sorted({heavy!r} & set(sys.modules)), rmse_edge.RMSEConfig().window)"
    assert python(code) == "[] 128"


def test_a_machine_without_transformers_is_told_what_to_install() -> None:
    code = """import sys
sys.modules["transformers"] = None
import rmse_edge
try:
    rmse_edge.RMSEForCausalLM
except ImportError as error:
    print(error)
try:
    rmse_edge.nothing
except AttributeError as error:
    print(error)
"""
    said = python(code).splitlines()
    assert said[0] == "RMSEForCausalLM needs transformers: pip install 'rmse-edge[hf]'"
    assert said[1] == "module 'rmse_edge' has no attribute 'nothing'"


def test_public_names_exist() -> None:
    import rmse_edge

    assert all(getattr(rmse_edge, name) is not None for name in rmse_edge.__all__)
    assert set(rmse_edge.__all__) <= set(dir(rmse_edge))
    assert json.loads(json.dumps(rmse_edge.__version__)) == "0.1.0"
