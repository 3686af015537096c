"""A cache that a caller gives: by either of its names, with all of the text or what is new of it; and what it is refused with."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TEXTS, Case
from helpers import assert_one_line
from later import later
from safetensors.torch import load_file
from torch import Tensor

from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.errors import UserError

# Imported when a test needs it: see tests/later.py.
transformers = later("transformers")

pytestmark = pytest.mark.slow

OLD = "past_key_values"  # what transformers called it until 5.23
each_text = pytest.mark.parametrize("case", TEXTS, ids=lambda case: case.name)


def loaded(case: Case, folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(case.checkpoint(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    case = next(case for case in TEXTS if case.name == "ouro")
    return loaded(case, tmp_path_factory.mktemp("hf") / "ouro")


def prompt(case: Case) -> Tensor:
    """Two rows of 20 tokens; a batch with padding in front of the first."""
    return torch.from_numpy(case.ids(40)).reshape(2, 20)


@torch.no_grad()
@each_text
def test_a_text_goes_on_from_a_cache(case: Case, tmp_path: Path) -> None:
    """A cache takes the place of what it has read, by either name: whole texts are cut, as one call and in chunks."""
    model, ids = loaded(case, tmp_path / "m"), prompt(case)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    settings = {"attention_mask": mask, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, max_new_tokens=6, **settings)
    first = model(ids[:, :15], attention_mask=mask[:, :15]).cache
    for given in ({}, {"prefill_chunk_size": 2}):
        assert torch.equal(
            model.generate(ids, max_new_tokens=6, cache=copy.deepcopy(first), **settings, **given), expected
        )
    part = model.generate(ids[:, 15:], max_new_tokens=6, cache=copy.deepcopy(first), **settings)
    assert torch.equal(part[:, 5:], expected[:, 20:])
    cache, old = copy.deepcopy(first), copy.deepcopy(first)
    logits = model(ids[:, 15:], attention_mask=mask, cache=cache).logits
    with pytest.warns(FutureWarning, match="past_key_values: transformers calls it cache"):
        assert torch.equal(model(ids[:, 15:], attention_mask=mask, **{OLD: old}).logits, logits)
    assert old.position.tolist() == cache.position.tolist() == [13, 20]
    with pytest.warns(FutureWarning, match="past_key_values: transformers calls it cache"):
        assert torch.equal(model.generate(ids, max_new_tokens=6, **{OLD: first}, **settings), expected)


def test_no_warning_where_no_cache_is_given(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.tensor([[1, 2]]), **{OLD: None})
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, **{OLD: None})


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("cache", OLD), "past_key_values: got a cache by this name and one as cache; give cache alone"),
        (("cache", "cache_params"), "cache_params: ouro does not take it; give cache"),
        (("cache_params",), "cache_params: ouro does not take it; give cache"),
    ],
)
def test_a_cache_by_other_names_is_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], said: str
) -> None:
    """transformers takes one of two names and drops the other."""
    ids = torch.tensor([[1, 2, 3]])
    caches = {name: model(ids[:, :2]).cache for name in names}
    monkeypatch.setattr(model.looped, "prelude", lambda tensors: pytest.fail("computed before refusing"))
    for call in (model, model.generate):
        with pytest.raises(UserError) as caught:
            call(ids, **caches)
        assert_one_line(str(caught.value), said)


@pytest.mark.parametrize("name", ["cache", OLD])
def test_generating_without_a_cache_takes_none(model: Any, name: str) -> None:
    """It would be given the whole text again for every token."""
    ids = torch.tensor([[1, 2, 3]])
    cache = model(ids[:, :2]).cache
    config = transformers.GenerationConfig(use_cache=False, max_new_tokens=3)
    for settings in ({"use_cache": False}, {"generation_config": config}):
        with pytest.raises(UserError) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.generate(ids, **{name: cache}, **settings)
        assert_one_line(str(caught.value), "use_cache: got False and a cache; leave out one of them")


def test_what_is_no_tensor_is_left_out_by_trainer(model: Any) -> None:
    """Or it would gather caches as predictions."""
    out = model(torch.tensor([[1, 2]]))
    others = {name for name, value in out.items() if not isinstance(value, Tensor)}
    assert others == set(model.config.keys_to_ignore_at_inference)


def test_an_output_has_both_names(model: Any) -> None:
    out = model(torch.tensor([[1, 2]]))
    assert getattr(out, OLD) is out[OLD] is out.cache is out[1]


@each_text
def test_what_is_saved_is_what_save_checkpoint_writes(case: Case, tmp_path: Path) -> None:
    """Of every architecture: transformers has own names for the tensors of some, and rules for their configurations."""
    loaded(case, tmp_path / "m").save_pretrained(tmp_path / "theirs")
    save_checkpoint(load_checkpoint(tmp_path / "m"), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name].float()) for name in ours)
    assert load_checkpoint(tmp_path / "theirs").config == load_checkpoint(tmp_path / "m").config
