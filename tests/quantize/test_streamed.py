"""Rounding a checkpoint tensor by tensor gives what rounding the loaded model gives, with a fraction of the memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import CASES, Case
from conftest import made_package
from helpers import ONNX_ALWAYS, random_tokens
from ouro_models import lively_ouro
from safetensors.torch import load_file, save_file

from rmse_edge.arch.common.identity import fingerprint, model_info
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.cli.quantize import main as rmse_quantize
from rmse_edge.errors import ArgumentError, CheckpointError
from rmse_edge.layers import held
from rmse_edge.layers.held import Stored, holds
from rmse_edge.loop.dials import Dials
from rmse_edge.quantize import QuantizeRequest, Scheme, load_quantized, quantize, quantize_folder, save_quantized
from rmse_edge.runtimes.engines.torch import TorchRuntime

pytestmark = pytest.mark.slow

every = pytest.mark.parametrize(
    "case", [c for c in CASES if c.quants != ("fp32",) or c.name == "rmse"], ids=lambda c: c.name
)


@every
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_the_same_integers_as_of_the_loaded_model(case: Case, quant: str, tmp_path: Path) -> None:
    folder = case.checkpoint(tmp_path / "float")
    request = QuantizeRequest(Scheme(quant), method="rtn")
    loaded = load_checkpoint(folder)
    whole = quantize(loaded, request, None, fingerprint(loaded))
    found = quantize_folder(folder, request)
    assert holds(found.model)
    assert (found.fingerprint, found.report) == (whole.fingerprint, whole.report)
    assert list(found.tensors) == list(whole.tensors)
    for name, q in whole.tensors.items():
        assert torch.equal(found.tensors[name].codes, q.codes)
        assert torch.equal(found.tensors[name].scales, q.scales)
    for which, result in (("whole", whole), ("found", found)):
        save_quantized(result, tmp_path / which, folder)
    for file in ("model.safetensors", "quantization.json", "config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "found" / file).read_bytes()


def test_a_tied_head_counts_under_both_names(tmp_path: Path) -> None:
    model = lively_ouro(tie_word_embeddings=True)
    save_checkpoint(model, tmp_path / "float", dtype=torch.float32)
    found = quantize_folder(tmp_path / "float", QuantizeRequest(Scheme("int8"), method="rtn"))
    assert found.fingerprint == fingerprint(load_checkpoint(tmp_path / "float"))
    assert found.model.lm_head._modules["stored_weight"] is found.model.model.embed_tokens._modules["stored_weight"]


@pytest.mark.parametrize("name", ["rmse", "ouro", "tower"])
def test_a_lean_model_says_what_the_float_one_says(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    folder = case.stored(tmp_path / "q", "int4") if name != "rmse" else case.checkpoint(tmp_path / "float")
    if name == "rmse":
        save_quantized(quantize_folder(folder, QuantizeRequest(Scheme("int4"), method="rtn")), tmp_path / "q")
        folder = tmp_path / "q"
    text = random_tokens(20)
    said = {}
    for lean in (True, False):
        model = load_quantized(folder, lean=lean).model
        assert holds(model) == lean
        assert any(isinstance(module, Stored) for module in model.modules()) == lean
        runtime = TorchRuntime(model, "q")
        fed = runtime.feed(text, Dials(runtime.info.max_loops))
        said[lean] = (fed.logits, fed.depth, model_info(model, "q", 0).parameters)
    # Of a layer some outputs at a time, of experts one at a time: in another order of sums.
    np.testing.assert_allclose(said[True][0], said[False][0], atol=2e-5)
    assert (said[True][1] == said[False][1]).all()
    assert said[True][2] == said[False][2]


def test_a_lean_model_decodes_no_weight_as_a_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of layers some rows, of embeddings those that are looked up, of experts those that are chosen; here fewer than there are."""
    folder = CASES[0].checkpoint(tmp_path / "float")
    model = quantize_folder(folder, QuantizeRequest(Scheme("int4"), method="rtn")).model
    monkeypatch.setattr("rmse_edge.layers.held.BLOCK", 1000)
    decoded: list[int] = []
    real = held.decoded
    monkeypatch.setattr(held, "decoded", lambda codes, *rest: decoded.append(codes.numel()) or real(codes, *rest))
    monkeypatch.setattr(Stored, "forward", lambda self: pytest.fail(f"{self.name} was decoded as a whole"))
    TorchRuntime(model, "q").feed(random_tokens(3), Dials(2))
    largest = max(math.prod(module.shape) for module in model.modules() if isinstance(module, Stored))
    assert decoded and max(decoded) < largest


def test_a_model_that_is_calibrated_is_not_streamed(tmp_path: Path) -> None:
    folder = CASES[1].checkpoint(tmp_path / "float")
    with pytest.raises(ArgumentError, match=r"method: got 'gptq'|method"):
        quantize_folder(folder, QuantizeRequest(Scheme("int8")))


def test_a_damaged_checkpoint_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_checkpoint(lively_ouro(), tmp_path / "float", dtype=torch.float32)
    file = tmp_path / "float" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        quantize_folder(tmp_path / "float", QuantizeRequest(Scheme("int8"), method="rtn"))
    assert (
        rmse_quantize(["-m", str(tmp_path / "float"), "--quant", "int8", "--method", "rtn", "-o", str(tmp_path / "q")])
        == 2
    )
    assert not (tmp_path / "q").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("target", ONNX_ALWAYS)
def test_a_package_of_a_lean_model_is_that_of_the_float_one(
    target: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in CASES if case.name == "ouro")
    source, whole = made_package(case, target, "int4", tmp_path_factory)
    monkeypatch.setattr("rmse_edge.quantize.store.LEAN", 0)
    assert rmse_export(["-m", str(source), "--target", target, "-o", str(tmp_path / "lean.rmse")]) == 0
    assert contents(tmp_path / "lean.rmse") == contents(whole)


def contents(package: Path) -> dict[str, object]:
    """The files of a package but for its manifest; a Core ML program parsed, since the order of its attributes is free."""
    found: dict[str, object] = {}
    for path in sorted(package.rglob("*")):
        if path.suffix == ".mlmodel":
            from coremltools.proto import Model_pb2

            found[str(path.relative_to(package))] = Model_pb2.Model.FromString(path.read_bytes())
        elif path.is_file() and path.suffix != ".json" and path.name != "SHA256SUMS":
            found[str(path.relative_to(package))] = path.read_bytes()
    return found


MEASURE = """
import json, resource, sys
from rmse_edge.quantize import QuantizeRequest, Scheme, quantize_folder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize_folder(sys.argv[1], QuantizeRequest(Scheme("int4"), method="rtn"))
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))
"""


def test_rounding_takes_less_memory_than_the_float_model(tmp_path: Path) -> None:
    """A model of 170 MB as float32: its integers take 42, and one of its weights as floats a few."""
    model = lively_ouro(hidden_size=512, intermediate_size=1536, num_hidden_layers=14, num_attention_heads=8)
    nbytes = sum(4 * p.numel() for p in model.parameters())
    assert nbytes > 160_000_000
    save_checkpoint(model, tmp_path / "float", dtype=torch.bfloat16)
    del model
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "float")], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) < 0.75 * nbytes
