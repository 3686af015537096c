"""Heads for multi-token prediction: training, the two files, the verb. 15 s of one core."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import ALPHABET, assert_one_line, mixed_model, random_heads, write_checkpoint
from safetensors.torch import load_file, save_file
from toy_tower import ARCH, lively_tower

from rmse_edge.arch import registry
from rmse_edge.arch.common.identity import fingerprint
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.cli.train import main as rmse_train
from rmse_edge.errors import CheckpointError
from rmse_edge.heads import load_heads, save_heads
from rmse_edge.quantize import QuantizeRequest, Scheme, quantize, save_quantized
from rmse_edge.runtimes import open_runtime
from rmse_edge.train.mtp import HeadsRecipe, dials_of, learn, measure, read

SMALL = ("heads=2", "intermediate_size=16", "windows=12", "window=40", "held_out=2", "steps=120", "batch_size=128")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(mixed_model(), tmp_path_factory.mktemp("mtp") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    draw = torch.Generator().manual_seed(4)
    file.write_text("".join(ALPHABET[int(i)] for i in torch.randint(65, (2000,), generator=draw)))
    return file


def test_the_verb_trains_and_what_it_writes_drafts(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = ["--text", str(text), "--stage", "mtp", "--init", str(checkpoint), "-o", str(tmp_path / "out")]
    argv += [part for change in SMALL for part in ("--set", change)]
    assert not rmse_train(argv)
    assert "| full depth | 4.00 | 2 |" in capsys.readouterr().out
    out = tmp_path / "out"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
    found = json.loads((out / "mtp-evaluation.json").read_text())
    assert len(found["losses"]) == 10 and all(a > b for a, b in zip(found["losses"][0], found["losses"][-1]))
    assert HeadsRecipe.from_file(out / "mtp-recipe.json").steps == 120
    said = []
    for flags in ([], ["--speculate", "heads", "--draft-tokens", "4"]):
        argv = [str(out), "-p", "!!", "-n", "12", "--temperature", "0", "-o", "json", *flags]
        assert rmse_run(argv) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[1]["tokens"] == said[0]["tokens"] and said[1]["speculation"]["drafts"] == "heads"
    assert rmse_train(["--text", str(text), "--stage", "mtp", "--init", str(checkpoint), "-o", str(out)]) == 2
    assert_one_line(capsys.readouterr().err, "already exists; choose another folder")


@pytest.mark.parametrize("behind", [False, True], ids=["rmse", "with a coda"])
def test_heads_learn_what_the_model_says_later(behind: bool, monkeypatch: pytest.MonkeyPatch):
    """More than by chance of what it says at positions they have not seen, of a model with layers behind its loop, too."""
    monkeypatch.setitem(registry._REGISTERED, "tower", ARCH)
    model = lively_tower() if behind else mixed_model()
    assert bool(model.spec(1).coda) is behind
    model.requires_grad_(False)
    recipe = HeadsRecipe(heads=2, window=32, steps=150, batch_size=128, lr=5e-3)
    tokens = torch.randint(65, (24, 32), generator=torch.Generator().manual_seed(1)) % 8
    course = read(model, tokens[:20], dials_of(model)[1])
    other = read(model, tokens[20:], dials_of(model)[1])
    assert (course.logits is not None) is behind
    heads = random_heads(model)
    heads.requires_grad_(True)
    before = measure(model, heads, other)
    learn(model, heads, [course], recipe)
    after = measure(model, heads, other)
    for k in range(2):
        assert after["same_distribution"][k] > before["same_distribution"][k] + 0.1
    assert after["gained"] <= sum(after["same_token"])


def test_a_quantised_checkpoint_has_the_heads_of_the_float_one(checkpoint: Path, tmp_path: Path):
    model = mixed_model()
    folder = write_checkpoint(model, tmp_path / "float")
    save_heads(random_heads(model), folder)
    integers = quantize(model, QuantizeRequest(Scheme("int8"), "rtn"), fingerprint=fingerprint(model))
    save_quantized(integers, tmp_path / "int8", folder)
    runtime = open_runtime(tmp_path / "int8")
    assert runtime.info.drafting is not None and runtime.info.drafting.heads == 2
    assert runtime.info.fingerprint == fingerprint(model) == open_runtime(checkpoint).info.fingerprint


def test_files_that_do_not_fit_are_one_line(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]):
    model = mixed_model()
    folder = write_checkpoint(model, tmp_path / "tiny")
    assert load_heads(folder, model) is None
    heads = random_heads(model)
    save_heads(heads, folder)
    known = load_heads(folder, model)
    assert known is not None
    for name, tensor in known.state_dict().items():
        torch.testing.assert_close(tensor, heads.state_dict()[name].bfloat16().float(), atol=0, rtol=0)
    with pytest.raises(CheckpointError, match=r"mtp.json: the heads were trained on another model"):
        load_heads(folder, mixed_model(1))
    with pytest.raises(CheckpointError, match=r"mtp.json: the heads were trained on another model"):
        load_heads(folder, model, "0" * 64)
    weights, config = folder / "mtp.safetensors", folder / "mtp.json"
    whole = load_file(weights)
    gone = "layers.1.eh_proj.weight"
    for tensors, said in (
        ({k: v for k, v in whole.items() if k != gone}, f"tensor {gone} is missing"),
        (whole | {"layers.2.norm.weight": whole[gone][0].clone()}, "tensor layers.2.norm.weight is none of the heads"),
        (whole | {gone: whole[gone][:3].contiguous()}, "mtp.json asks for"),
        (whole | {gone: whole[gone] * float("nan")}, f"tensor {gone} holds NaN"),
    ):
        save_file(tensors, weights)
        assert rmse_run([str(folder), "-p", "!", "-n", "1"]) == 2
        assert_one_line(capsys.readouterr().err, said)
    known_values = json.loads(config.read_text())
    for changes, said in (
        ({"embedding": "head"}, "embedding: got 'head', expected 'embed'"),
        ({"hidden_size": 32}, "hidden_size: got 32"),
    ):
        config.write_text(json.dumps(known_values | changes))
        assert rmse_run([str(folder), "-p", "!", "-n", "1"]) == 2
        assert_one_line(capsys.readouterr().err, said)
    config.write_text(json.dumps(known_values))
    weights.unlink()
    assert rmse_run([str(folder), "-p", "!", "-n", "1"]) == 2
    assert_one_line(capsys.readouterr().err, "mtp.safetensors: no such file")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"heads": 99}))
    assert rmse_run([str(folder), "-p", "!", "-n", "1"]) == 2
    assert_one_line(capsys.readouterr().err, "mtp.json", "heads")
    train = ["--text", str(text), "--stage", "mtp", "--init", str(tmp_path / "tiny"), "-o", str(tmp_path / "o")]
    for more, said in (
        (["--set", "window=8", "--set", "heads=7"], "window: got 8, expected more than"),
        (["--set", "window=4000"], "too few for windows of 4000"),
        (["--set", "beams=2"], "unknown key 'beams'"),
        (["--resume"], "--resume: --stage mtp is done in one go"),
    ):
        assert rmse_train([*train, *more]) == 2
        assert_one_line(capsys.readouterr().err, said)
        assert not (tmp_path / "o").exists()
