"""Checkpoint folders: what is written is what is read, and every bad input is one line that names the culprit."""

from __future__ import annotations

import dataclasses
import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import small_config
from torch import Tensor
from toy import ARCH as TOY_ARCH
from toy import Toy, ToyConfig

from rmse_edge import checkpoint
from rmse_edge.arch import registry
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.errors import CheckpointError
from rmse_edge.text import train_character_tokenizer


def tiny_model(**changes: Any) -> RMSE:
    torch.manual_seed(0)
    return RMSE(small_config(**({"vocab_size": 65, "d_model": 64, "max_loops": 4} | changes))).eval()


@pytest.fixture(scope="module")
def model() -> RMSE:
    return tiny_model()


@pytest.fixture
def folder(model: RMSE, tmp_path: Path) -> Path:
    save_checkpoint(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"step_encoding": "temporal_rope"}, {"step_encoding": "none"}]
)
def test_what_is_written_is_read(tmp_path: Path, changes: dict[str, object]) -> None:
    model = tiny_model(**changes)
    save_checkpoint(model, tmp_path)
    back = load_checkpoint(tmp_path)
    assert back.config == model.config and not back.training
    for (name, saved), (_, read) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert read.dtype == torch.float32
        assert torch.equal(read, saved), name
    for (name, ours), (_, theirs) in zip(model.named_buffers(), back.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert (back.head_proj.weight is back.embed.weight) == model.config.tie_embeddings


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_file_holds_each_weight_once_in_its_own_type_or_another(
    tmp_path: Path, own: torch.dtype, dtype: torch.dtype | None
) -> None:
    model = tiny_model(tie_embeddings=True).to(own)
    save_checkpoint(model, tmp_path, dtype)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(model.state_dict()) - {"head_proj.weight"}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {dtype or own}  # noqa: SIM118


def test_another_type_on_disk_keeps_every_bit(model: RMSE, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path, dtype=torch.float32)
    for name, tensor in load_checkpoint(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_loading_leaves_the_callers_seed_alone(folder: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_checkpoint(folder)
    assert torch.equal(torch.rand(3), expected)


def test_numbers_of_a_generator_of_their_own_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that no file holds is the same in every model; what the file holds is not drawn first."""

    class Sketched(Toy):
        def __init__(self, config: ToyConfig) -> None:
            super().__init__(config)
            sketch = torch.empty(4).normal_(generator=torch.Generator().manual_seed(3))
            self.register_buffer("sketch", sketch, persistent=False)

    monkeypatch.setattr(registry, "_REGISTERED", {"toy": dataclasses.replace(TOY_ARCH, build=Sketched)})
    model = Sketched(ToyConfig())
    save_checkpoint(model, tmp_path)
    assert torch.equal(load_checkpoint(tmp_path).sketch, model.sketch)


@pytest.mark.slow
def test_loading_imports_no_compiler(folder: Path) -> None:
    """Which takes longer than everything else that loading does."""
    code = "import sys; from rmse_edge.checkpoint import load_checkpoint as load; load(sys.argv[1]); "
    code += "sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------ write


def test_saving_keeps_the_other_files_of_the_folder(model: RMSE, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a model card")
    save_checkpoint(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "a model card"
    assert {p.name for p in tmp_path.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def half_written(tensors: dict[str, Tensor], path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise failure

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(checkpoint, "save_file", half_written)
    expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
    for target in (folder, tmp_path / "new"):
        with pytest.raises(expected) as caught:
            save_checkpoint(tiny_model(min_loops=2), target)
        if expected is CheckpointError:
            assert_one_line(caught.value, str(target), "No space left on device")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_saving_refuses_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = tiny_model()
    model.gate.bias.data.fill_(float("nan"))
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(model, tmp_path / "out")
    assert_one_line(caught.value, "gate.bias", "NaN")
    assert not (tmp_path / "out").exists()


def test_saving_refuses_weights_that_overflow_on_disk(tmp_path: Path) -> None:
    model = tiny_model()
    model.embed.weight.data[3, 5] = 1e6
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(model, tmp_path, dtype=torch.float16)
    assert_one_line(caught.value, "embed.weight", "Inf")


def test_a_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    train_character_tokenizer("abc\n", tmp_path / "t.json")
    model = tiny_model(eos_token_id=0, pad_token_id=2)
    save_checkpoint(model, tmp_path / "out", tokenizer=tmp_path / "t.json")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (tmp_path / "t.json").read_text()
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["padding_side"], config["eos_token"], config["pad_token"]) == ("left", "\n", "b")
    assert "bos_token" not in config


def test_a_tokenizer_already_in_the_folder_is_configured(model: RMSE, tmp_path: Path) -> None:
    train_character_tokenizer("abc\n", tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text()
    save_checkpoint(model, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == text
    assert (tmp_path / "tokenizer_config.json").is_file()


def test_a_tokenizer_that_does_not_fit_is_refused(model: RMSE, tmp_path: Path) -> None:
    train_character_tokenizer("".join(chr(40 + i) for i in range(66)), tmp_path / "large.json")
    (tmp_path / "broken.json").write_text('{"model": 3}')
    for name, said in (
        ("large.json", "66 tokens"),
        ("broken.json", "not a tokenizer.json"),
        ("no.json", "No such file"),
    ):
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(model, tmp_path / "out", tokenizer=tmp_path / name)
        assert_one_line(caught.value, name, said)
        assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- read


def assert_one_line(error: Exception, *parts: str) -> None:
    message = str(error)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def edit_weights(edit: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def set_value(name: str, value: float) -> Callable[[Path], None]:
    return edit_weights(lambda tensors: tensors[name].view(-1)[3].fill_(value))


def edit_config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def package(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "manifest.json").write_text("{}")


BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), ["not a checkpoint", "config.json"]),
    "a package": (package, ["an exported package"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "no such file"]),
    "pickled weights": (pickle_only, ["pytorch_model.bin is not read", "safetensors"]),
    "truncated": (truncate, ["model.safetensors", "truncated or damaged"]),
    "empty file": (empty, ["model.safetensors", "truncated or damaged"]),
    "missing tensor": (edit_weights(lambda t: t.pop("gate.bias")), ["model.safetensors", "gate.bias is missing"]),
    "unexpected tensor": (
        edit_weights(lambda t: t.update({"extra.weight": torch.zeros(2)})),
        ["model.safetensors", "extra.weight is not part of the model"],
    ),
    "wrong shape": (
        edit_weights(lambda t: t.update({"norm.weight": torch.ones(63)})),
        ["model.safetensors", "norm.weight has shape (63,)", "(64,)"],
    ),
    "another config": (edit_config(max_loops=5), ["step_encoding has shape (4, 64)", "(5, 64)"]),
    "integers": (
        edit_weights(lambda t: t.update({"norm.weight": torch.ones(64, dtype=torch.int8)})),
        ["norm.weight has type torch.int8", "floating point"],
    ),
    "NaN": (
        set_value("block.experts.down_proj", float("nan")),
        ["model.safetensors", "block.experts.down_proj holds NaN"],
    ),
    "Inf": (set_value("inject.weight", float("-inf")), ["model.safetensors", "inject.weight holds Inf"]),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "not readable as JSON"]),
    "config value": (edit_config(window=8), ["config.json", "window: got 8"]),
    "config key": (edit_config(windows=128), ["config.json", "unknown key 'windows'"]),
    "another model": (
        edit_config(model_type="llama"),
        ["config.json", "model_type: got 'llama', expected one of", "rmse"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_one_line(folder: Path, case: str) -> None:
    damage, said = BAD[case]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert_one_line(caught.value, str(folder), *said)


def test_a_path_that_is_no_folder_is_one_line(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder / "nowhere")
    assert_one_line(caught.value, "nowhere", "no such checkpoint folder")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder / "model.safetensors")
    assert_one_line(caught.value, "model.safetensors", "is a file, expected a folder")
