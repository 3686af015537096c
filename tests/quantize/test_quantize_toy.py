"""An architecture of one's own: quantised by its table, calibrated through its calls, on disk like any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import toy as toys
from helpers import assert_one_line, write_checkpoint
from toy import ARCH, Toy, toy

from rmse_edge.arch import registry
from rmse_edge.arch.quantization import QuantTable
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.quantize import main
from rmse_edge.errors import ExportError, UserError
from rmse_edge.export.pipeline import check_formats
from rmse_edge.quantize import QuantizeRequest, Scheme, load_quantized, quantize, save_quantized

QUANTIZED = {"embed.weight", "say.weight", "up.weight", "down.weight", "head_proj.weight"}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._REGISTERED, "toy", ARCH)


def change(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setitem(registry._REGISTERED, "toy", dataclasses.replace(ARCH, **changes))


# ------------------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize(("quant", "symmetric"), [("int8", True), ("int4", False)])
def test_rounding_by_the_table_and_what_is_on_disk(quant: str, symmetric: bool, tmp_path: Path) -> None:
    source = write_checkpoint(toy(), tmp_path / "source")
    model = load_checkpoint(source)
    found = quantize(model, QuantizeRequest(Scheme(quant, symmetric=symmetric), method="rtn"), None, "a fingerprint")
    assert [*found.tensors] == ["embed.weight", "say.weight", "up.weight", "down.weight", "head_proj.weight"]
    assert found.report["rarely_routed_experts"] is None
    save_quantized(found, tmp_path / "q", source)
    back = load_quantized(tmp_path / "q")
    assert isinstance(back.model, Toy) and back.model.config == found.model.config
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor), name
    assert (tmp_path / "q" / "tokenizer.json").is_file()


def test_an_architecture_without_a_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(monkeypatch, quantization=None)
    source = write_checkpoint(toy(), tmp_path / "source")
    assert main(["-m", str(source), "-o", str(tmp_path / "q"), "--method", "rtn"]) == 2
    assert_one_line(capsys.readouterr().err, "model_type toy", "--quant fp32")
    assert not (tmp_path / "q").exists()


def test_a_tensor_that_the_table_forgets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, quantization=lambda config: dataclasses.replace(toys.table(config), float=("*.bias", "halt.*")))
    with pytest.raises(UserError, match=r"^norm\.weight: the quantiser does not know this tensor"):
        quantize(toy(), QuantizeRequest(method="rtn"))


def test_stages_are_in_the_order_of_the_table() -> None:
    table = QuantTable(
        stages=(("a.*.q", "a.*.v"), ("a.0.*",), ("x", "a.*")), float=(), experts=("a.*.e",), embedding="x"
    )
    names = ["a.1.o", "x", "a.1.v", "a.0.v", "a.0.q", "a.0.e", "a.1.q"]
    assert table.in_order(names) == [["a.0.q", "a.1.q", "a.1.v", "a.0.v"], ["a.0.e"], ["x", "a.1.o"]]
    assert [table.use(name) for name in ("a.0.e", "x", "a.0.q")] == ["experts", "rows", "matrix"]


@pytest.mark.onnx
def test_targets_ask_the_table_how_a_weight_is_read() -> None:
    """ONNX Runtime multiplies with a matrix of any width, and looks up rows in whole blocks only."""
    model = toy(width=24)
    formats = Scheme("int8").formats(model)
    with pytest.raises(ExportError, match=r"^embed\.weight: 24 inputs make no whole blocks"):
        check_formats(model, formats, "onnx")
    del formats["embed.weight"]
    check_formats(model, formats, "onnx")
