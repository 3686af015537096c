"""Checkpoints of any architecture: `model_type` says which, and published ones are read under the names they have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toy as toys
from helpers import assert_one_line, mixed_model
from safetensors.torch import load_file, save_file
from toy import Toy, published, toy

from rmse_edge.arch import registry
from rmse_edge.arch.registry import read_config
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.errors import CheckpointError, ConfigError
from rmse_edge.loop.contract import Tensors
from rmse_edge.text import train_character_tokenizer


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._REGISTERED, "toy", toys.ARCH)


def write(folder: Path, model: Toy, tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(model.config.to_json())
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_is_read(tmp_path: Path, tied: bool) -> None:
    """By its own names, a tied tensor left out, with a tokenizer: as RMS-E."""
    model = toy(tied=tied)
    train_character_tokenizer("abc\n", tmp_path / "t.json")
    save_checkpoint(model, tmp_path / "out", dtype=torch.float32, tokenizer=tmp_path / "t.json")
    assert ("head_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")) != tied
    back = load_checkpoint(tmp_path / "out")
    assert isinstance(back, Toy) and back.config == model.config and not back.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert (back.head_proj.weight is back.embed.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_published_names_and_forms(tmp_path: Path, tied: bool) -> None:
    """Renamed, transposed, cut out of one, joined from two, interleaved; a table that nobody reads is passed over."""
    model = toy(tied=tied)
    back = load_checkpoint(write(tmp_path, model, published(model)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    again = tmp_path / "again"
    save_checkpoint(back, again, dtype=torch.float32)  # by its own names
    assert torch.equal(load_checkpoint(again).down.weight, model.down.weight)


def put(name: str, shape: tuple[int, ...]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


DAMAGE: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "missing": (lambda t: t.pop("w1.b"), ("tensor w1.b is missing",)),
    "unexpected": (put("w1.c", (2, 2)), ("tensor w1.c is not part of the model",)),
    "renamed, of another shape": (put("wte", (65, 31)), ("wte has shape (65, 31)", "(65, 32)")),
    "made, of another shape": (put("w2", (63, 32)), ("w2 (63, 32) gives no down.weight of shape (32, 64)",)),
    "parts that do not fit": (put("w1.a", (32, 7)), ("w1.a (32, 7), w1.b (32, 32) gives no up.weight",)),
    "not numbers": (lambda t: t["w1.b"].fill_(torch.nan), ("tensor w1.b holds NaN",)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_named_as_it_is_on_disk(tmp_path: Path, damage: str) -> None:
    model = toy()
    tensors = published(model)
    spoil, parts = DAMAGE[damage]
    spoil(tensors)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(write(tmp_path, model, tensors))
    assert_one_line(str(caught.value), str(tmp_path), *parts)


def edit(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


@pytest.mark.parametrize("model_type", ["llama", "registry", 3, ["rmse"]])
def test_an_architecture_that_is_not_known_lists_the_choices(tmp_path: Path, model_type: object) -> None:
    folder = edit(write(tmp_path, toy(), {}), model_type=model_type)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert_one_line(
        str(caught.value), "config.json: model_type: got", repr(model_type), "expected one of", "rmse", "toy"
    )


def test_without_a_model_type_only_keys_of_the_first_will_do(tmp_path: Path) -> None:
    """The oldest checkpoints of RMS-E have none. Anything else without one is not taken for RMS-E."""
    save_checkpoint(mixed_model(), tmp_path / "old")
    values = json.loads((tmp_path / "old" / "config.json").read_text())
    old = {key: value for key, value in values.items() if key not in ("model_type", "architectures")}
    (tmp_path / "old" / "config.json").write_text(json.dumps(old | {"_note": "kept"}))
    assert load_checkpoint(tmp_path / "old").config == mixed_model().config
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(edit(write(tmp_path / "toy", toy(), {}), model_type=None))
    assert_one_line(str(caught.value), "config.json: model_type is missing, expected one of ", "rmse, ", "toy")


def test_a_config_that_is_none(tmp_path: Path) -> None:
    for text, said in (("[]", "expected a JSON object"), ("{", "not readable as JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_config(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"none\.json: no such file"):
        read_config(tmp_path / "none.json")
