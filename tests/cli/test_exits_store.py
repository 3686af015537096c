"""rmse-eval --store: a measured setting becomes the default, and says what it was measured on."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import small_dory, small_inkling
from helpers import assert_one_line, write_checkpoint
from ouro_models import lively_ouro
from paths import ROOT

from rmse_edge.arch.common.identity import fingerprint
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.cli.evaluate import main as rmse_eval
from rmse_edge.exits import carried, with_dials
from rmse_edge.loop.dials import Dials
from rmse_edge.package import Package
from rmse_edge.runtimes import open_runtime

WORDS = "THE_CAT_SAT_ON_THE_MAT,AND_THE_DOG_ON_THE_LOG." * 4


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


def swept(model: Path, text: Path, rule: str, *more: str) -> list[str]:
    return [str(model), "--text", str(text), "--sweep", "--rule", rule, "--budget", "1000", "--store", *more]


def folder_of(model: Any, path: Path, checkpoint: Path) -> Path:
    """`model` as a checkpoint folder with the tokenizer of another one of as many tokens."""
    save_checkpoint(model, path, torch.float32, checkpoint / "tokenizer.json")
    return path


@pytest.mark.parametrize(
    ("build", "rule", "field"),
    [
        (None, "exit-threshold=0.3,0.9", "exit_threshold"),
        (lively_ouro, "exit-threshold=0.3,0.9", "early_exit_threshold"),
        (small_dory, "exit-kl=0.01,0.3", "exit_kl"),
        (small_inkling, "exit-epsilon=0.9,0.95", "exit_epsilon"),
    ],
    ids=["rmse", "ouro", "dory", "inkling"],
)
def test_the_default_of_a_checkpoint(
    build: Any, rule: str, field: str, checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    if build is None:
        shutil.copytree(checkpoint, folder)
    else:
        folder_of(build(), folder, checkpoint)
    values = json.loads((folder / "config.json").read_text()) | {"transformers_version": "5.0.0"}  # a key of others
    (folder / "config.json").write_text(json.dumps(values))
    before, files = load_checkpoint(folder), sorted(p.name for p in folder.iterdir())
    assert rmse_eval(swept(folder, text, rule, "-o", "json")) == 0
    said = json.loads(capsys.readouterr().out)
    chosen, stored = said["proposal"], json.loads((folder / "exits.json").read_text())
    name = rule.partition("=")[0].replace("-", "_")
    assert stored == said["stored"] and stored["dials"][name] == chosen[name] and stored["rule"] == name
    assert stored["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert stored["tokens"] == said["tokens"] and stored["mean_loops"] == chosen["mean_loops"]
    assert stored["full_loops"] == len(said["fixed"]) == before.config.dials.max_loops
    assert json.loads((folder / "config.json").read_text()) == values | {field: chosen[name]}
    after = load_checkpoint(folder)
    assert getattr(after.config.dials, name) == chosen[name] and fingerprint(after) == fingerprint(before)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*files, "exits.json"])
    # Runtimes of the folder begin with it, and what is exported of it says where it is from, as long as it is so.
    info = open_runtime(folder).info
    assert getattr(info.dials, name) == chosen[name] and carried(folder, info.dials) == {"exits": stored}
    assert carried(folder, info.dials_with(**{name: chosen[name] / 2})) == {}


@pytest.mark.onnx
@pytest.mark.slow
def test_the_default_of_a_package(
    package: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.rmse"
    shutil.copytree(package, copy)
    before = Package.open(copy)
    assert rmse_eval(swept(copy, text, "exit-threshold=0.31,0.9", "-o", "json")) == 0
    chosen = json.loads(capsys.readouterr().out)["proposal"]
    after = Package.open(copy)
    assert open_runtime(copy).info.dials.exit_threshold == chosen["exit_threshold"] == 0.31
    changed = {name for name in after.manifest if after.manifest[name] != before.manifest.get(name)}
    assert changed == {"model", "exits"}
    assert after.manifest["exits"]["runtime"] == "onnx"
    assert {n for n in before.digests if before.digests[n] != after.digests.get(n)} == {"manifest.json"}
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=copy, check=False).returncode == 0
    Package.open(package)  # the files that both have in common are as they were


@pytest.mark.onnx
@pytest.mark.slow
def test_an_export_carries_it(checkpoint: Path, text: Path, tmp_path: Path, quick_export: Any) -> None:
    from rmse_edge.cli.export import main as rmse_export

    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    assert rmse_eval(swept(folder, text, "exit-threshold=0.3,0.9")) == 0
    assert rmse_export(["-m", str(folder), "-o", str(tmp_path / "p.rmse")]) == 0
    manifest = Package.open(tmp_path / "p.rmse").manifest
    assert manifest["exits"] == json.loads((folder / "exits.json").read_text())
    assert manifest["model"]["dials"]["exit_threshold"] == manifest["exits"]["dials"]["exit_threshold"]


def test_what_cannot_be_stored_is_one_line(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (tmp_path / "ids.txt").write_text("1 2 3 4 5 6 7 8")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    every = [str(folder), "--text", str(text), "--store"]
    for flags, message in (
        (every, "--store keeps what --sweep proposes; add --sweep"),
        ([str(folder), "--ids", str(tmp_path / "ids.txt"), "--sweep", "--store"], "--store: needs a text"),
        ([*every, "--sweep", "--max-loops", "2"], "--store: keeps exit rules, at the trained depth"),
    ):
        assert rmse_eval(flags) == 2
        assert_one_line(capsys.readouterr().err, message)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.slow
def test_nothing_is_stored_where_stopping_costs_too_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trained model's first loop is worse than its last."""
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "models" / "ouro-shakespeare", folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    flags = [str(folder), "--sweep", "--rule", "exit-epsilon=99", "--budget", "0", "--block", "256"]
    assert rmse_eval([*flags, "--store"]) == 2
    assert_one_line(capsys.readouterr().err, "--store: nothing stays within 0 % over full depth; raise --budget")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_damaged_record_is_one_line(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_checkpoint(load_checkpoint(checkpoint), folder)
    assert rmse_eval(swept(folder, text, "exit-threshold=0.3,0.9")) == 0
    values = json.loads((folder / "exits.json").read_text())
    dials = load_checkpoint(folder).config.dials
    for wrong in (values | {"text_sha256": "x"}, {k: v for k, v in values.items() if k != "tokens"}, []):
        (folder / "exits.json").write_text(json.dumps(wrong))
        with pytest.raises(Exception, match=r"exits\.json: .*; measure again with rmse-eval --store") as found:
            carried(folder, dials)
        assert "\n" not in str(found.value)


def test_settings_that_a_model_lacks(checkpoint: Path) -> None:
    config = small_dory().config
    assert with_dials(config, Dials(2, 2, exit_kl=0.5)).dials == Dials(2, 2, exit_kl=0.5)
    with pytest.raises(Exception, match="exit_steady: got 2"):
        with_dials(config, Dials(2, exit_steady=2))
