"""rmse-train from text to checkpoint folder, and how verbs fail: one line, the right exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_models import small_recipe

from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli import common
from rmse_edge.cli.train import main
from rmse_edge.errors import UserError
from rmse_edge.text import Tokenizer, train_character_tokenizer
from rmse_edge.train.gpt import load_gpt
from rmse_edge.train.recipe import Recipe

pytestmark = pytest.mark.slow

SENTENCE = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(SENTENCE * 60)
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a person would write it: no vocab_size."""
    values = json.loads(small_recipe(steps=3, gate_steps=1, exit_steps=1).to_json())
    del values["model"]["vocab_size"]
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path, recipe: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "new" / "run"
    assert main(["--text", str(text), "--recipe", str(recipe), "-o", str(out)]) == 0
    return out


def fails(capsys: pytest.CaptureFixture[str], argv: Sequence[object], message: str, code: int = 2) -> None:
    capsys.readouterr()
    assert main([str(a) for a in argv]) == code
    err = capsys.readouterr().err.strip()
    assert err.startswith("rmse-train: error: ") and message in err and "\n" not in err, err


def test_a_run_leaves_a_whole_checkpoint(trained: Path, text: Path) -> None:
    assert {p.name for p in trained.iterdir()} >= {
        "recipe.json", "tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors", "log.csv",
        "curve.png", "evaluation.json", "training-state.pt",
    }  # fmt: skip
    model, tokenizer = load_checkpoint(trained), Tokenizer(trained / "tokenizer.json")
    assert model.config.vocab_size == tokenizer.vocab_size == len(set(SENTENCE))
    assert Recipe.from_file(trained / "recipe.json").model["vocab_size"] == tokenizer.vocab_size
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert evaluation["validation_tokens"] == 256 and evaluation["best"]["step"] == 3
    for losses in evaluation["loss_by_depth"].values():
        assert len(losses) == 4 and all(0 < v < 5 for v in losses)
    state = torch.load(trained / "training-state.pt", weights_only=True)
    assert torch.equal(state["average"]["embed.weight"].bfloat16().float(), model.embed.weight)
    assert (trained / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_begins_with_weights_keeps_their_chat_template(
    trained: Path, text: Path, recipe: Path, tmp_path: Path
) -> None:
    start = shutil.copytree(trained, tmp_path / "start")
    config = json.loads((start / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages[0].content }}"}
    (start / "tokenizer_config.json").write_text(json.dumps(config))
    argv = ["--text", text, "--recipe", recipe, "--init", start, "-o", tmp_path / "run", "--stop-at", "1"]
    assert main([str(a) for a in argv]) == 0
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_the_table_at_the_end(trained: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resuming a finished run trains nothing and writes the same files again."""
    before = (trained / "evaluation.json").read_text(), (trained / "model.safetensors").read_bytes()
    assert main(["--text", str(text), "-o", str(trained), "--resume"]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith("| depth | float32 | bfloat16 |")
        and "| 4 |" in out
        and "best weights of stage 1 at step 3" in out
    )
    assert before == ((trained / "evaluation.json").read_text(), (trained / "model.safetensors").read_bytes())


def test_another_run_is_not_written_over(trained: Path, text: Path, recipe: Path, capsys, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    fails(capsys, ["--text", text, "--recipe", recipe, "-o", trained], "holds another run (training-state.pt)")
    assert before == {p.name: p.read_bytes() for p in trained.iterdir()}
    (tmp_path / "recipe.json").write_text(Recipe(lr=9e-3).to_json())
    fails(capsys, ["--text", text, "--recipe", recipe, "-o", tmp_path], "is another recipe; pass it with --recipe")
    fails(capsys, ["--text", text, "-o", recipe], "is a file, expected a folder; choose another name")
    fails(capsys, ["--text", text, "-o", os.devnull], "is a device, expected a folder; choose another name")
    fails(capsys, ["--text", text, "--recipe", recipe, "-o", os.devnull, "--resume"], "is a device, expected a folder")
    fails(capsys, ["--text", text, "-o", tmp_path / "none", "--resume"], "recipe.json: no such file")


def test_stopping_and_resuming(trained: Path, text: Path, recipe: Path, capsys, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(recipe.read_text())  # the recipe itself may wait in its folder
    argv = ["--text", str(text), "-o", str(tmp_path)]
    assert main([*argv, "--recipe", str(tmp_path / "recipe.json"), "--stop-at", "2"]) == 0
    assert not (tmp_path / "model.safetensors").exists() and capsys.readouterr().out == ""
    fails(capsys, [*argv, "--resume", "--set", "lr=1"], "was written by another recipe")
    assert main([*argv, "--resume"]) == 0
    ours, theirs = (load_checkpoint(folder).state_dict() for folder in (tmp_path, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_gpt_is_saved_beside_its_recipe(text: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "gpt.json").write_text(json.dumps({
        "architecture": "gpt", "steps": 3, "batch_size": 4, "eval_every": 2, "eval_blocks": 2,
        "model": {"d_model": 32, "n_heads": 2, "n_layers": 2, "block_size": 64},
    }))  # fmt: skip
    out = tmp_path / "run"
    assert main(["--text", str(text), "--recipe", str(tmp_path / "gpt.json"), "-o", str(out), "--threads", "1"]) == 0
    assert "| all layers |" in capsys.readouterr().out
    model = load_gpt(out)
    assert model.config.n_layers == 2 and json.loads((out / "config.json").read_text())["model_type"] == "gpt-baseline"
    fails(capsys, ["report", out, "--text", text], "model_type: got 'gpt-baseline', expected one of ")


def test_vocabularies_must_agree(text: Path, recipe: Path, tmp_path: Path, capsys) -> None:
    run = ["--text", text, "--recipe", recipe, "-o", tmp_path / "run"]
    size = len(set(SENTENCE))
    fails(
        capsys, [*run, "--set", "model.vocab_size=65"], f"model.vocab_size is 65, but the tokenizer has {size} tokens"
    )
    train_character_tokenizer("xyz", tmp_path / "other.json")
    fails(capsys, [*run, "--tokenizer", tmp_path / "other.json"], "the tokenizer has no token for 't'")
    train_character_tokenizer(SENTENCE + "ÄÖ", tmp_path / "wider.json")
    assert main([str(a) for a in [*run, "--tokenizer", tmp_path / "wider.json", "--stop-at", "1"]]) == 0
    assert Recipe.from_file(tmp_path / "run" / "recipe.json").model["vocab_size"] == size + 2


def test_bad_texts_and_recipes(text: Path, recipe: Path, tmp_path: Path, capsys) -> None:
    out = ["-o", tmp_path / "run"]
    for content, message in (
        (b"", "the file is empty"),
        (b"ab\xff", "not UTF-8 at byte 2"),
        (b"abc" * 200, "validation split has 60 tokens, too few for one block of 64"),
    ):
        (tmp_path / "bad.txt").write_bytes(content)
        fails(capsys, ["--text", tmp_path / "bad.txt", "--recipe", recipe, *out], message)
    for argv, message in (
        (["--text", tmp_path / "none"], "--text: "),
        (["--text", text, "--recipe", text], "not readable as JSON"),
        (["--text", text, "--set", "lr=fast"], "--set: lr: got 'fast', expected a number"),
        (["--text", text, "--save-every", "0"], "--save-every: got '0', expected a whole number of at least 1"),
        (["--text", text, "--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--text", text, "--recpie", recipe], "unknown argument --recpie; did you mean --recipe?"),
        (["--recipe", recipe], "missing --text"),
    ):
        fails(capsys, [*argv, *out], message)
    assert not (tmp_path / "run").exists()


def test_the_report(trained: Path, text: Path, capsys) -> None:
    argv = ["report", str(trained), "--text", str(text), "--thresholds", "0.5,0.9"]
    assert main([*argv, "-o", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert report["loss_by_depth"] == pytest.approx(evaluation["loss_by_depth"]["bfloat16"], rel=1e-6)
    assert len(report["adaptive"]) == 6 and report["tokens"] == 256
    assert report["costs"]["rmse"]["loop_total"] > 0
    assert main([*argv, "--max-tokens", "128"]) == 0
    tables = capsys.readouterr().out
    assert "128 validation tokens" in tables and "| 0.9 | frozen |" in tables and "one loop / one GPT layer" in tables
    fails(capsys, [*argv, "--max-tokens", "10"], "too few for one block of 64")
    fails(
        capsys,
        ["report", trained, "--text", text, "--thresholds", "0.5,x"],
        "got 'x', expected a number between 0 and 1",
    )
    fails(capsys, ["report", trained / "none", "--text", text], "no such file or folder")


# ------------------------------------------------------------------------------------------------ what verbs share


def outcome(capsys: pytest.CaptureFixture[str], error: BaseException) -> tuple[int, str]:
    def main(argv: Sequence[str] | None) -> int | None:
        raise error

    code = common.run_verb("rmse-x", main)
    return code, capsys.readouterr().err


def test_failures_of_the_users_making_are_one_line(capsys) -> None:
    assert outcome(capsys, UserError("a: got 1,\nexpected 2")) == (2, "rmse-x: error: a: got 1, expected 2\n")
    assert outcome(capsys, OSError(28, "No space left on device", "/x/y")) == (
        2, "rmse-x: error: disk full while writing /x/y; free some space or choose another -o\n"
    )  # fmt: skip
    assert outcome(capsys, PermissionError(13, "Permission denied", "/x")) == (
        2,
        "rmse-x: error: /x: permission denied\n",
    )
    assert outcome(capsys, KeyboardInterrupt()) == (130, "\nrmse-x: interrupted\n")
    assert (
        outcome(capsys, KeyboardInterrupt("go on with --resume"))[1] == "\nrmse-x: interrupted; go on with --resume\n"
    )


@pytest.mark.parametrize("error", [ValueError("x"), OSError("no file named"), RuntimeError("x")])
def test_defects_keep_their_traceback(capsys, error: Exception) -> None:
    with pytest.raises(type(error)):
        outcome(capsys, error)


def test_exit_codes() -> None:
    assert common.run_verb("rmse-x", lambda argv: None) == 0
    assert common.run_verb("rmse-x", lambda argv: 3) == 3


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (common.positive_int, {"1": 1, "64": 64}, ["0", "-1", "1.5", "x", ""]),
        (common.non_negative_int, {"0": 0}, ["-1", "x"]),
        (common.positive_float, {"0.5": 0.5, "1e3": 1000.0}, ["0", "-1", "nan", "inf", "x"]),
        (common.non_negative_float, {"0": 0.0}, ["-0.1", "nan"]),
        (common.fraction, {"0": 0.0, "1": 1.0, "0.25": 0.25}, ["1.1", "-0.1", "nan"]),
        (common.list_of(common.positive_int), {"1,2": [1, 2], " 3 , 4 ": [3, 4]}, ["1,,2", "1,x", ""]),
    ],
)
def test_argument_types(kind, good: dict, bad: list[str]) -> None:
    import argparse

    for text, value in good.items():
        assert kind(text) == value
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            kind(text)


def test_path_types(tmp_path: Path) -> None:
    import argparse

    file = tmp_path / "file"
    file.write_text("x")
    assert common.existing_file(str(file)) == file and common.existing_folder(str(tmp_path)) == tmp_path
    assert common.output_path(str(tmp_path / "new")) == tmp_path / "new"
    for kind, path, message in (
        (common.existing_path, tmp_path / "no", "no such file or folder"),
        (common.existing_file, tmp_path, "is a folder, expected a file"),
        (common.existing_folder, file, "is a file, expected a folder"),
        (common.output_path, tmp_path / "no" / "x", "does not exist; create it first"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            kind(str(path))


def test_help_and_broken_pipes_in_a_real_process(trained: Path, text: Path) -> None:
    """--help is quick since PyTorch is not imported; a reader that goes away is no traceback."""
    code = "import sys; from rmse_edge.cli.train import main; main(['--help'])"
    probe = f"try:\n    exec({code!r})\nfinally:\n    print('torch' in __import__('sys').modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert "--stop-at" in done.stdout and done.stdout.strip().endswith("False"), done.stderr
    script = (
        "import sys; from rmse_edge.cli.common import run_verb; sys.exit(run_verb('x', lambda a: print('y' * 10**6)))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""
