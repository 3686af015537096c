"""Experts laid out by a profile: another file, the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FEW, random_tokens, require_executorch
from native_runner import Runner

from rmse_edge.errors import ArgumentError
from rmse_edge.export.pipeline import ExportRequest, export_package
from rmse_edge.layers.experts import SparseExperts
from rmse_edge.package import Package
from rmse_edge.quantize import Quantized

pytestmark = pytest.mark.slow

PARTS = (64, 1, 1, 1, 9)


@pytest.mark.executorch
def test_pairs_that_are_used_together_are_neighbours() -> None:
    from rmse_edge.export.executorch.placement import places_of

    together = np.diag(np.arange(1, 9))
    for a, b, count in ((0, 5, 9), (5, 3, 8), (3, 0, 7), (1, 7, 6), (0, 7, 1)):
        together[a, b] = together[b, a] = count
    places = places_of(together)
    assert sorted(places) == list(range(8))
    near = [abs(places[a] - places[b]) for a, b in ((0, 5), (5, 3), (1, 7), (0, 7))]
    assert near == [1, 1, 1, 1]  # 3 and 0 are the two ends of a chain already
    assert list(places_of(np.ones((1, 1), np.int64))) == [0]


@pytest.mark.executorch
def test_what_is_recorded(calm: Quantized) -> None:
    from rmse_edge.export.executorch.placement import Record, profile_experts

    tokens = random_tokens(200, 3, FEW)
    first, again = (profile_experts(calm.model, tokens) for _ in range(2))
    other = profile_experts(calm.model, random_tokens(200, 4, FEW))
    assert first.tokens == 192 and first.digest == again.digest != other.digest
    layers = {name: m for name, m in calm.model.named_modules() if isinstance(m, SparseExperts)}
    assert first.places.keys() == layers.keys()
    for name, layer in layers.items():
        assert sorted(first.places[name].tolist()) == list(range(layer.n_experts))
        assert layer.observer is None and layer.listener is None
    with pytest.raises(ArgumentError, match="profile_experts: the text has less than 64 tokens"):
        profile_experts(calm.model, tokens[:63])
    with pytest.raises(ArgumentError, match="profile_experts: the model has no routed experts"):
        profile_experts(torch.nn.Linear(1, 1), tokens)
    record, (layer, *_) = Record(4, 2), layers.values()
    routing = layer.route(torch.zeros(1, layer.router.weight.shape[1]), 0)._replace(
        experts=torch.tensor([[2, 0], [2, 3]])
    )
    record.observe(1, routing)
    record.listen(torch.zeros(2, 1), routing)
    assert record.uses.tolist() == [[0, 0, 0, 0], [1, 0, 2, 1]]
    assert record.together.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 2, 1], [0, 0, 1, 1]]


@pytest.mark.executorch
@pytest.mark.native
@pytest.mark.nightly
def test_the_same_logits_with_and_without(
    calm: Quantized, int4: Runner, runner: Path, executorch_int4: Path, tmp_path: Path
) -> None:
    """To the bit, mapped and at several budgets; the manifest keeps the profile's digest."""
    require_executorch()
    from rmse_edge.export import ExecutorchOptions
    from rmse_edge.export.executorch.placement import profile_experts

    profile = profile_experts(calm.model, random_tokens(256, 5, FEW))
    assert any((places != torch.arange(len(places))).any() for places in profile.places.values())
    options = ExecutorchOptions(profile_experts=profile)
    folder = tmp_path / "placed.rmse"
    export_package(calm.model, folder, ExportRequest("executorch", "int4", options, check=False), quantized=calm)
    kept = Package.open(folder).manifest["lowering"]["expert_profile"]
    assert kept == {"sha256": profile.digest, "tokens": 256}
    assert "expert_profile" not in Package.open(executorch_int4).manifest["lowering"]
    tokens = random_tokens(sum(PARTS), 3, FEW)
    flags = ("--parts", ",".join(map(str, PARTS)))
    expected, depth = int4.feed(tokens, tmp_path / "logits", *flags)
    placed = Runner([runner], folder)
    for budget in ((), ("--expert-ram", "20%"), ("--expert-ram", "60%"), ("--expert-ram", "100%")):
        found, own = placed.feed(tokens, tmp_path / "logits", *flags, *budget)
        assert np.array_equal(found, expected) and np.array_equal(own, depth)
    int4_program, own_program = ((p / "program.pte").read_bytes() for p in (executorch_int4, folder))
    assert int4_program != own_program


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target", "onnx", "--quant", "int4"], "--profile-experts: .*executorch's do"),
        (["--target", "executorch"], "--profile-experts: fp32 packages have no experts that are read one by one"),
        (["--target", "executorch", "--quant", "int4", "--config", "config.json"], "--profile-experts: random weights"),
    ],
)
def test_what_cannot_be_laid_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    import re

    from rmse_edge.cli.export import main

    if "executorch" in flags:
        require_executorch()
    text = tmp_path / "text.txt"
    text.write_text("a text")
    assert main([*flags, "--profile-experts", str(text)]) == 2
    assert re.search(said, capsys.readouterr().err)
