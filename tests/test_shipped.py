"""The shipped model, from checkpoint to package: it passes the gate, stops early, and every way of running it agrees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT

from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.evaluate import main as rmse_eval
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.export import ExportRequest, export_package
from rmse_edge.package import Package
from rmse_edge.runtimes import open_runtime
from rmse_edge.text import Tokenizer

pytestmark = [pytest.mark.onnx, pytest.mark.slow]

MODEL = ROOT / "models" / "rmse-shakespeare"
PROMPT = "ROMEO:\nIt is the east, and "


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("shipped") / "rmse-shakespeare-onnx.rmse"
    return export_package(load_checkpoint(MODEL), folder, ExportRequest(), MODEL)


def test_the_gate_saw_enough_and_found_nothing(shipped: Package) -> None:
    parity = shipped.manifest["parity"]
    assert parity["rule"] == "exact" and set(parity["settings"]) == {"full depth", "gate", "delta"}
    for result in parity["settings"].values():
        assert result["positions"] >= 200
        assert len(result["undecided"]) <= 0.01 * result["positions"]
        assert result["max_logit_difference"] <= 1e-4 and result["same_depth"] == 1.0
    assert parity["settings"]["gate"]["depth_sd"] >= 0.5, "exits must vary for the comparison to mean anything"


def test_the_package_is_no_larger_than_its_weights(shipped: Package) -> None:
    """All files together are at most 1.06 x 4 bytes x parameters."""
    parameters = sum(p.numel() for p in load_checkpoint(MODEL).parameters())
    total = sum(p.stat().st_size for p in shipped.folder.iterdir())
    assert shipped.manifest["model"]["parameters"] == parameters and shipped.nbytes == total
    assert 4 * parameters < total <= 1.06 * 4 * parameters


def test_generate_of_transformers_is_greedy_rmse_run(shipped: Package, capsys: pytest.CaptureFixture[str]) -> None:
    """Same tokens and same depths: transformers on the checkpoint, rmse-run on the ONNX package."""
    pytest.importorskip("transformers")
    from rmse_edge import RMSEForCausalLM

    model = RMSEForCausalLM.from_pretrained(MODEL)
    ids = Tokenizer(MODEL / "tokenizer.json").encode(PROMPT)
    out = model.generate(torch.tensor([ids]), max_new_tokens=80, do_sample=False, return_dict_in_generate=True)
    arguments = [str(shipped.folder), "--prompt", PROMPT, "--max-new-tokens", "80", "--temperature", "0", "-o", "json"]
    assert rmse_run(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == out.sequences[0, len(ids) :].tolist()
    assert result["depth"] == out.cache.depth[0, len(ids) - 1 :].tolist()
    assert len(set(result["depth"])) > 1


def test_stopping_early_costs_little(shipped: Package, capsys: pytest.CaptureFixture[str]) -> None:
    """On its own text: at least 30 % fewer iterations for at most 1 % more loss, by depths that vary."""
    losses = {}
    for name, flags in {"adaptive": [], "full": ["--exit-threshold", "1"]}.items():
        assert (
            rmse_eval(
                [str(shipped.folder), "--text", str(MODEL / "sample.txt"), "--block", "256", "-o", "json", *flags]
            )
            == 0
        )
        losses[name] = json.loads(capsys.readouterr().out)
    # What rmse-eval prints of the checkpoint itself, nats per character.
    assert losses["full"]["loss"] == pytest.approx(1.2098, abs=1e-3)
    assert losses["adaptive"]["loss"] == pytest.approx(1.1647, abs=1e-3)
    assert losses["full"]["mean_loops"] == 12 and losses["adaptive"]["mean_loops"] == pytest.approx(3.23, abs=0.02)
    assert losses["adaptive"]["mean_loops"] <= 0.7 * 12 and losses["adaptive"]["depth_sd"] >= 0.9
    assert losses["adaptive"]["loss"] <= 1.01 * losses["full"]["loss"]


@pytest.mark.gpu
def test_a_gpu_says_what_the_cpu_says() -> None:
    ids = Tokenizer(MODEL / "tokenizer.json").encode((MODEL / "sample.txt").read_text(encoding="utf-8"))[:200]
    fed = []
    for device in ("cpu", "cuda"):
        runtime = open_runtime(Path(MODEL), device=device)
        fed.append(runtime.feed(ids, runtime.info.full_depth))
    assert np.abs(fed[0].logits - fed[1].logits).max() <= 1e-2
    assert (fed[0].logits.argmax(-1) == fed[1].logits.argmax(-1)).mean() >= 0.98
