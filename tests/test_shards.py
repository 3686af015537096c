"""Checkpoints in several files, in other float types and with a tied head: both loaders read the same, or say why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_one_line
from safetensors.torch import load_file, save_file
from small_models import lively_model, small_config
from torch import Tensor

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint, start_from
from rmse_edge.cli.train import main as rmse_train
from rmse_edge.errors import CheckpointError
from rmse_edge.runtimes import open_runtime
from rmse_edge.shards import INDEX_FILE, WEIGHTS_FILE

Tensors = dict[str, Tensor]


def write(folder: Path, *shards: Tensors, tied: bool = False) -> Path:
    """A checkpoint folder of these tensors, in one file or in several with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(small_config(tie_embeddings=tied).to_json())
    if len(shards) == 1:
        save_file(shards[0], folder / WEIGHTS_FILE, metadata={"format": "pt"})
        return folder
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(tensors, name)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """The tensors of a checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("one file")
    save_checkpoint(lively_model(small_config()), folder, torch.bfloat16)
    return load_file(folder / WEIGHTS_FILE)


def halves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    names = sorted(tensors)
    return {n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}


def by_transformers(folder: Path) -> RMSE:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).rmse


LOADERS: dict[str, Callable[[Path], RMSE]] = {"load_checkpoint": load_checkpoint, "from_pretrained": by_transformers}
both_loaders = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


def assert_holds(model: RMSE, tensors: Tensors) -> None:
    state = model.state_dict()
    for name, tensor in tensors.items():
        assert state[name].dtype == torch.float32 and torch.equal(state[name], tensor.float()), name


# ------------------------------------------------------------------------------------------------------- what is read


@both_loaders
@pytest.mark.slow
def test_shards_hold_what_one_file_holds(tmp_path: Path, stored: Tensors, load: Callable[[Path], RMSE]) -> None:
    assert_holds(load(write(tmp_path, *halves(stored))), stored)


def test_shards_of_save_pretrained_are_read_by_the_verbs(tmp_path: Path, stored: Tensors) -> None:
    from transformers import AutoModelForCausalLM

    write(tmp_path / "one", stored)
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "many", max_shard_size="20KB")
    files = list((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "many" / WEIGHTS_FILE).exists()
    assert_holds(load_checkpoint(tmp_path / "many"), stored)
    runtime = open_runtime(tmp_path / "many")
    assert runtime.info.nbytes == sum(file.stat().st_size for file in files)
    assert runtime.info.fingerprint == open_runtime(tmp_path / "one").info.fingerprint


def test_one_file_goes_before_an_index(tmp_path: Path, stored: Tensors) -> None:
    """As in transformers: `save_checkpoint` into a folder of shards is not undone by them."""
    write(tmp_path, *halves({name: torch.zeros_like(tensor) for name, tensor in stored.items()}))
    for load in LOADERS.values():
        assert_holds(load(write(tmp_path, stored)), stored)


@both_loaders
def test_float_types_may_be_mixed(tmp_path: Path, stored: Tensors, load: Callable[[Path], RMSE]) -> None:
    """bfloat16 and float16 are widened without loss: subnormal numbers and the largest ones too."""
    types = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    mixed = {name: stored[name].to(types[i % len(types)]) for i, name in enumerate(sorted(stored))}
    mixed["norm.weight"] = torch.full_like(stored["norm.weight"], 2.0**-130, dtype=torch.bfloat16)
    mixed["gate.weight"] = torch.full_like(stored["gate.weight"], 6.1e-7, dtype=torch.float16)
    mixed["gate.bias"] = torch.full_like(stored["gate.bias"], torch.finfo(torch.bfloat16).max)
    assert_holds(load(write(tmp_path, *halves(mixed))), mixed)


def test_training_starts_from_shards_and_does_not_write_over_them(
    tmp_path: Path, stored: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "shards", *halves(stored))
    model = RMSE(small_config())
    assert start_from(model, folder) == []
    assert_holds(model, stored)
    (tmp_path / "text").write_text("abc " * 100)
    assert rmse_train(["--text", str(tmp_path / "text"), "-o", str(folder)]) == 2
    assert_one_line(capsys.readouterr().err, str(folder), INDEX_FILE)


# ------------------------------------------------------------------------------------------------------ a tied head


@both_loaders
@pytest.mark.parametrize("kept", ["both", "the head alone"])
def test_a_tied_head_on_disk_is_the_embedding(
    tmp_path: Path, stored: Tensors, load: Callable[[Path], RMSE], kept: str
) -> None:
    tensors = stored | {"head_proj.weight": stored["embed.weight"].clone()}
    expected = dict(tensors)
    if kept == "the head alone":
        del tensors["embed.weight"]
    model = load(write(tmp_path, tensors, tied=True))
    assert_holds(model, expected)
    assert model.head_proj.weight is model.embed.weight


@both_loaders
def test_a_tied_head_with_values_of_its_own_is_refused(
    tmp_path: Path, stored: Tensors, load: Callable[[Path], RMSE]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path, stored, tied=True))
    assert_one_line(str(caught.value), str(tmp_path), "head_proj.weight differs from embed.weight", "untie")
    load(write(tmp_path, stored, tied=False))  # what the line says to do


# --------------------------------------------------------------------------------------------------- what is refused


def edit_index(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX_FILE).read_text())
        edit(index)
        (folder / INDEX_FILE).write_text(json.dumps(index))

    return damage


def said_to_be_in(file: object) -> Callable[[Path], None]:
    return edit_index(lambda index: index["weight_map"].update({"gate.bias": file}))


def first(folder: Path) -> Path:
    return folder / "model-00001-of-00002.safetensors"


def twice(folder: Path) -> None:
    """The second shard holds a tensor of the first as well."""
    second = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {"gate.bias": load_file(first(folder))["gate.bias"]}, second)


def without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        save_file({n: t for n, t in load_file(first(folder)).items() if n != name}, first(folder))

    return damage


BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a shard that is missing": (lambda f: first(f).unlink(), ["model-00001-of-00002.safetensors: no such file"]),
    "a shard that is cut": (lambda f: first(f).write_bytes(first(f).read_bytes()[:-9]), ["00001", "truncated or damaged"]),
    "a tensor that its shard lacks": (without("gate.bias"), [INDEX_FILE, "gate.bias is not in model-00001"]),
    "a tensor that the index lacks": (
        edit_index(lambda index: index["weight_map"].pop("embed.weight")), ["embed.weight is not in", INDEX_FILE],
    ),
    "a tensor in the other shard": (
        said_to_be_in("model-00002-of-00002.safetensors"), ["gate.bias is not in model-00002"],
    ),
    "a tensor in two shards": (twice, ["gate.bias is in model-00001-of-00002.safetensors, too"]),
    "a file of another folder": (said_to_be_in("../other.safetensors"), ["gate.bias is said to be in '../other"]),
    "an absolute path": (said_to_be_in("/etc/hostname"), ["gate.bias is said to be in '/etc/hostname'"]),
    "a number for a file": (said_to_be_in(3), ["gate.bias is said to be in 3"]),
    "a folder for a file": (said_to_be_in("."), ["gate.bias is said to be in '.'"]),
    "no map": (lambda f: (f / INDEX_FILE).write_text("{}"), [INDEX_FILE, "weight_map"]),
    "no JSON": (lambda f: (f / INDEX_FILE).write_text("{"), [INDEX_FILE, "not readable as JSON"]),
    "nested deeply": (lambda f: (f / INDEX_FILE).write_text("[" * 10**5), [INDEX_FILE, "not readable as JSON"]),
    "not UTF-8": (lambda f: (f / INDEX_FILE).write_bytes(b'{"\xff": 1}'), [INDEX_FILE, "not readable as JSON"]),
}  # fmt: skip


@both_loaders
@pytest.mark.parametrize("case", BAD)
def test_bad_shards_are_one_line(tmp_path: Path, stored: Tensors, load: Callable[[Path], RMSE], case: str) -> None:
    write(tmp_path, *halves(stored))
    damage, said = BAD[case]
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert_one_line(str(caught.value), str(tmp_path), *said)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(32).to(torch.float8_e4m3fn), "norm.weight has type torch.float8_e4m3fn"),
        (torch.full((32,), 1e300, dtype=torch.float64), "norm.weight holds Inf"),
    ],
)
def test_what_float32_cannot_hold_is_refused(tmp_path: Path, stored: Tensors, tensor: Tensor, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(write(tmp_path, stored | {"norm.weight": tensor}))
    assert_one_line(str(caught.value), WEIGHTS_FILE, said)
