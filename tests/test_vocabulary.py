"""Which tokens end a text and which are never drawn: the same on every runtime, and as transformers has it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers import ALPHABET, assert_one_line, mixed_model
from small_models import lively_model, small_config

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import CheckpointError, ConfigError, TextError
from rmse_edge.export import ExportRequest, export_package
from rmse_edge.info import ModelInfo
from rmse_edge.numbers import token_ids
from rmse_edge.runtimes import open_runtime
from rmse_edge.runtimes.text.sampling import Sampler, Sampling
from rmse_edge.text import word_tokenizer
from rmse_edge.vocabulary import Vocabulary, unused

if TYPE_CHECKING:
    from memo import Memo

GREEDY = ("--temperature", "0")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------------------------- end tokens


@pytest.mark.parametrize(("given", "ids"), [(None, ()), (3, (3,)), ([1, 2], (1, 2)), ((1, 2), (1, 2)), ([], ())])
def test_end_tokens_are_one_several_or_none(given: Any, ids: tuple[int, ...]) -> None:
    config = small_config(eos_token_id=given)
    assert token_ids(config.eos_token_id, "eos") == ids == Vocabulary.of_model(config.eos_token_id).eos_token_ids
    written = json.loads(config.to_json())
    assert written["eos_token_id"] == (list(given) if isinstance(given, tuple) else given)  # as it was given
    assert RMSEConfig.from_dict(written) == config and hash(config)


@pytest.mark.parametrize("given", ["</s>", 1.5, True, -1, [1, None], [[1]], {"a": 1}])
def test_what_is_no_end_token_is_named(given: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        small_config(eos_token_id=given)
    assert_one_line(str(caught.value), "eos_token_id: got", repr(given))


@pytest.mark.slow  # transformers alone takes seconds
@pytest.mark.parametrize(
    "generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": 5}, {"eos_token_id": [5, 6]}]
)
@pytest.mark.parametrize("own", [None, 3, [3, 4]])
def test_generation_config_counts_as_in_transformers(
    tmp_path: Path, own: Any, generation: dict[str, Any] | None
) -> None:
    from transformers import AutoModelForCausalLM

    save_checkpoint(lively_model(small_config(eos_token_id=own)), tmp_path)
    file = tmp_path / "generation_config.json"
    file.unlink() if generation is None else file.write_text(json.dumps(generation))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    config = load_checkpoint(tmp_path).config
    found = Vocabulary.of_folder(tmp_path, config.vocab_size, config.eos_token_id).eos_token_ids
    assert (
        found
        == token_ids(theirs, "")
        == token_ids((generation or {}).get("eos_token_id", None if generation is not None else own), "")
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not readable as JSON"),
        ("[]", "a JSON object"),
        ('{"eos_token_id": "x"}', "got 'x'"),
        ('{"eos_token_id": [1, 37]}', "got 37, expected below vocab_size (37)"),
    ],
)
def test_a_bad_generation_config_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        Vocabulary.of_folder(tmp_path, 37, None)
    assert_one_line(str(caught.value), "generation_config.json", said)


def test_each_end_token_ends_a_text(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And `save_checkpoint` writes the list into both files."""

    def document(*flags: str) -> dict[str, Any]:
        assert rmse_run([str(folder), "-p", "HELLO", "-n", "20", "-o", "json", *GREEDY, *flags]) == 0
        return json.loads(capsys.readouterr().out)

    folder = shutil.copytree(checkpoint, tmp_path / "model")
    free = document()["tokens"]
    at = next(i for i in range(3, 20) if free[i] not in free[:i])
    model = load_checkpoint(folder)
    unlike = next(i for i in range(65) if i not in free)
    changed = RMSEConfig.from_dict(model.config.to_dict() | {"eos_token_id": [unlike, free[at]]})
    model.config = changed
    save_checkpoint(model, folder)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == [unlike, free[at]]
    ended = document()
    assert (ended["finish_reason"], ended["tokens"]) == ("eos", free[: at + 1])
    assert document("--ignore-eos")["tokens"] == free


def test_a_manifest_has_all_end_tokens() -> None:
    from rmse_edge.arch.common.identity import model_info

    model = mixed_model(eos_token_id=[7, 8])
    info = model_info(model, "m", 0)
    text = dataclasses.replace(info.language, eos_token_ids=(1, 2), unused_token_ids=((60, 65),))
    written = json.loads(json.dumps(dataclasses.replace(info, text=text).to_json()))
    info = ModelInfo.from_json(written, 0)
    assert (info.language.eos_token_ids, info.language.unused_token_ids) == ((1, 2), ((60, 65),))
    assert model_info(model, "m", 0).language.eos_token_ids == (7, 8)


@pytest.mark.slow
@pytest.mark.executorch
def test_an_executorch_program_says_all_end_tokens() -> None:
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer

    from rmse_edge.arch.common.identity import model_info
    from rmse_edge.export.executorch.lower import metadata
    from rmse_edge.export.program import LoopProgram
    from rmse_edge.export.targets import LowerOptions

    model = mixed_model()
    info = model_info(mixed_model(eos_token_id=[3, 9]), "m", 0)
    found = metadata(LoopProgram(model, {1: model.spec(1)}, []), LowerOptions(info=info))
    plain = torch.export.export(torch.nn.Identity(), (torch.ones(1),))
    lowered = to_edge_transform_and_lower({"forward": plain}, constant_methods=found).to_executorch()
    loaded = _load_for_executorch_from_buffer(lowered.buffer)
    assert list(loaded.run_method("get_eos_ids", ())) == [3, 9]


# ---------------------------------------------------------------------------------------------------- ids without a token


def test_gaps_and_what_lies_beyond_a_tokenizer_are_unused() -> None:
    assert unused("t", range(500), 512) == ((500, 512),)
    assert unused("t", [0, 1, 4, 5, 7], 9) == ((2, 4), (6, 7), (8, 9))
    assert unused("t", range(12), 12) == unused("t", range(30), 12) == ()
    assert unused("t", range(10), 12, eos=(11,)) == ((10, 11),)  # it ends a text, and is never written
    with pytest.raises(TextError) as caught:
        unused("tokenizer.json", [20], 12)
    assert_one_line(str(caught.value), "tokenizer.json", "the tokenizer the model was trained with")


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 6}, {"top_p": 0.9}, {"top_k": 9, "top_p": 0.5}])
def test_the_sampler_takes_unused_ids_for_missing_rows(options: dict[str, Any]) -> None:
    """The same tokens as from a head without them, whatever their logits, not numbers among them."""
    logits = np.random.default_rng(0).normal(size=40).astype(np.float32)
    larger = np.concatenate([logits, np.full(24, 50.0, np.float32)])
    larger[50] = np.nan
    given = larger.copy()
    small, large = (Sampler(Sampling(**{"seed": 4, **options})) for _ in range(2))
    assert [small.pick(logits) for _ in range(100)] == [large.pick(larger, ((40, 64),)) for _ in range(100)]
    np.testing.assert_array_equal(larger, given)  # the caller's logits stay


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of 64 rows for 50 tokens, with a gap, whose other rows have the largest logits."""
    folder = tmp_path_factory.mktemp("padded") / "model"
    words = [f"w{i}" for i in range(51)]
    tokenizer = json.loads(word_tokenizer(words))
    del tokenizer["model"]["vocab"]["w20"]
    (folder.parent / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = lively_model(small_config(vocab_size=64))
    with torch.no_grad():
        for rows in (slice(20, 21), slice(51, 64)):
            model.head_proj.weight[rows] *= 20
    save_checkpoint(model, folder, tokenizer=folder.parent / "tokenizer.json")
    return folder


@pytest.mark.parametrize("flags", [GREEDY, ("--seed", "1"), ("--temperature", "5", "--top-k", "10")])
def test_ids_without_a_token_are_not_written(
    padded: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert rmse_run([str(padded), "-p", "w3 w4", "-n", "60", "-o", "json", *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["tokens"]) == 60 == len(document["text"].split())
    assert not {20, *range(51, 64)} & set(document["tokens"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "sample",
    [
        {},
        {"eos_token_id": -1},
        {"eos_token_id": torch.tensor([1]), "min_new_tokens": 40},
        {"do_sample": True, "temperature": 5.0},
    ],
)
def test_transformers_does_not_choose_them_either(padded: Path, sample: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(padded)
    ids = torch.tensor([[3, 4], [5, 6]])
    torch.manual_seed(0)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, **sample)
    assert not {20, *range(51, 64)} & set(made.flatten().tolist())
    expected = [int(t) for t in model(made).logits[0, 1:-1, [*range(20), *range(21, 51)]].argmax(-1)]
    if not sample or sample.get("eos_token_id") == -1:  # the largest of those that have a token
        assert made[0, 2:].tolist() == [t if t < 20 else t + 1 for t in expected]


def test_a_model_without_a_tokenizer_may_say_everything(padded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(padded, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert open_runtime(folder).info.language.unused_token_ids == ()
    assert open_runtime(padded).info.language.unused_token_ids == ((20, 21), (51, 64))


def test_a_tokenizer_with_ids_beyond_the_head_is_refused(tmp_path: Path) -> None:
    """Two tokens, of which the model can have one."""
    tokenizer = json.loads(word_tokenizer(["a", "b"]))
    tokenizer["model"]["vocab"] = {"a": 0, "b": 37}
    (tmp_path / "t.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(lively_model(small_config()), tmp_path / "model", tokenizer=tmp_path / "t.json")
    assert_one_line(str(caught.value), "t.json", "up to id 37", "vocab_size 37")


# ------------------------------------------------------------------------------------------------------------- packages


def test_an_export_carries_both(
    checkpoint: Path, quick_export: Memo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids 9, 10 and the last have no token here; two others end a text."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for id in (9, 10, 64):
        del tokenizer["model"]["vocab"][ALPHABET[id]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "sample.txt").unlink(missing_ok=True)
    edit(folder / "generation_config.json", eos_token_id=[1, 64])
    request = ExportRequest(check=False)
    export_package(load_checkpoint(folder), tmp_path / "p.rmse", request, folder)
    info = open_runtime(tmp_path / "p.rmse").info
    assert (info.language.eos_token_ids, info.language.unused_token_ids) == ((1, 64), ((9, 11),))
    documents = []
    for source in (folder, tmp_path / "p.rmse"):
        assert rmse_run([str(source), "-p", "HELLO", "-n", "60", "-o", "json", "--temperature", "2"]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0]["tokens"] == documents[1]["tokens"] and not {9, 10} & set(documents[0]["tokens"])
