"""An architecture of one's own: quantised by its table, calibrated through its calls, on disk like any other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy as toys
from helpers import (
    ALPHABET,
    QUICK_CALIBRATION,
    assert_one_line,
    calibration_text,
    decided_text,
    mixed_model,
    write_checkpoint,
)
from torch import Tensor
from toy import ARCH, Toy, ToyConfig, toy

from rmse_edge.arch import registry
from rmse_edge.arch.common.quantization import QuantTable
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.common import random_model
from rmse_edge.cli.export import main as export
from rmse_edge.cli.quantize import main
from rmse_edge.errors import ArgumentError, ExportError, UserError
from rmse_edge.export.pipeline import check_formats
from rmse_edge.loop.dials import Dials
from rmse_edge.quantize import QuantizeRequest, Scheme, load_quantized, quantize, save_quantized
from rmse_edge.quantize.compare import compare
from rmse_edge.quantize.gate import recalibrate
from rmse_edge.quantize.hessians import gather
from rmse_edge.quantize.reader import CallReader, own_dials, reader_of, text_of


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
        stages=(("a.*.q", "a.*.v"), ("a.0.*",), ("x",), ("a.*",)), float=(), experts=("a.*.e",), embedding="x"
    )
    names = ["a.1.o", "x", "a.1.v", "a.0.v", "a.0.q", "a.0.e", "a.1.q"]
    assert table.in_order(names) == [["a.0.q", "a.1.q", "a.1.v", "a.0.v"], ["a.0.e"], ["x"], ["a.1.o"]]
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


# ---------------------------------------------------------------------------------------------------- through its calls


def texts(count: int, length: int) -> Tensor:
    return torch.randint(65, (count, length), generator=torch.Generator().manual_seed(3))


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


@pytest.mark.parametrize("stop", [False, True])
@torch.no_grad()
def test_calls_say_what_the_whole_text_says(stop: bool) -> None:
    """Logits and depths of texts that end within a call, at full depth and where positions stop."""
    model = toy()
    blocks, dials = texts(3, 45), own_dials(model) if stop else Dials(4)
    course = reader_of(model).read(blocks, stop=stop, every=False)
    given = {name: torch.from_numpy(array) for name, array in dials.arrays().items()}
    for text, said, depth in zip(blocks, reader_of(model).logits(course.states[-1]), course.depth):
        whole = model.whole_text(text, given)
        assert torch.equal(depth, whole.depth) and close(said, whole.logits)
    assert (len(course.depth.unique()) > 2) == stop  # so that it shows who stopped


@torch.no_grad()
def test_every_input_of_the_loop_is_heard() -> None:
    """A quarter of the texts at full depth, the rest where positions run; padding never; what is read once, once."""
    model, blocks = toy(), texts(8, 45)
    heard: list[Tensor] = []
    hook = model.down.register_forward_pre_hook(lambda _, args: heard.append(args[0][0]))
    expected, head = torch.zeros(64, 64), torch.zeros(32, 32)
    for text, dials in zip(blocks, [Dials(4)] * 2 + [own_dials(model)] * 6):
        heard.clear()
        whole = model.whole_text(text, {name: torch.from_numpy(a) for name, a in dials.arrays().items()})
        for k, x in enumerate(heard):
            rows = x[k < whole.depth]
            expected += rows.T @ rows
        states = model.norm(whole.h)
        head += states.T @ states if dials.exit_threshold < 1 else torch.zeros(32, 32)
    hook.remove()
    found = gather(model, blocks, ["down.weight", "head_proj.weight"])
    assert close(found.of("down.weight"), expected)
    full = reader_of(model).read(blocks[:2]).states
    head += sum((model.norm(h).flatten(0, 1).T @ model.norm(h).flatten(0, 1)) / 4 for h in full)
    assert close(found.of("head_proj.weight"), head)


@torch.no_grad()
def test_calls_hear_what_a_reader_of_the_architecture_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMS-E, whose own reader sees whole texts, through calls, rings of keys and stacks of experts: the same sums."""
    model, blocks = mixed_model(), torch.from_numpy(decided_text(330))[None]
    names = [
        "block.attention.q_proj.weight",
        "block.experts.down_proj",
        "block.experts.gate_up_proj",
        "head_proj.weight",
    ]
    own = gather(model, blocks, names, "even")
    arch = dataclasses.replace(registry.arch_of("rmse"), reader=None)
    monkeypatch.setitem(registry._REGISTERED, "rmse", arch)
    assert isinstance(reader_of(model), CallReader)
    by_calls = gather(model, blocks, names, "even")
    for name in names:
        assert close(by_calls.of(name), own.of(name)), name
    rows = [found.rows["block.experts"] for found in (own, by_calls)]
    assert (rows[0] - rows[1]).abs().sum() <= 4  # of undecided routings
    assert (own.sums["head_proj.weight"] != 0).any()


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_gptq_says_more_than_rounding(quant: str) -> None:
    model = toy(tied=True)
    request = QuantizeRequest(Scheme(quant), **QUICK_CALIBRATION)
    found = quantize(model, request, calibration_text())
    rounded = quantize(model, dataclasses.replace(request, method="rtn"), calibration_text())
    again = quantize(model, request, calibration_text())
    evaluation = found.report["evaluation"]
    assert {*found.tensors} == {"embed.weight", "say.weight", "up.weight", "down.weight"}
    for name, q in found.tensors.items():
        assert not torch.equal(q.codes, rounded.tensors[name].codes), name
        assert torch.equal(q.codes, again.tensors[name].codes), name
    assert evaluation["full_depth"]["kl"] < rounded.report["evaluation"]["full_depth"]["kl"]
    assert len(evaluation["drift"]) == 4 and 1 < evaluation["adaptive"]["mean_depth"]["float"] < 4


def test_the_gate_s_bias_is_moved_where_the_architecture_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model, blocks = toy(), toy(), texts(16, 45)
    with torch.no_grad():
        model.halt.bias += 0.5
    found = recalibrate(reference, model, blocks)
    assert found is not None and found.shift == pytest.approx(-0.5, abs=0.1)
    change(monkeypatch, gate_bias=registry.no_gate)
    assert recalibrate(reference, model, blocks) is None


def test_finetuning_goes_through_calls() -> None:
    model, blocks = toy(), texts(4, 41)
    request = QuantizeRequest(method="rtn", evaluation_tokens=0, recalibrate_gate=False, calibration_tokens=512)
    rounded = quantize(model, request, calibration_text())
    tuned = quantize(model, dataclasses.replace(request, qat_steps=30), calibration_text())
    a, b = (compare(model, q.model, blocks)["full_depth"]["kl"] for q in (rounded, tuned))
    assert b < 0.9 * a


def test_what_an_architecture_has_not_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for kv in ("int8", "float16"):
        with pytest.raises(ArgumentError, match=f"^kv={kv}: model_type toy keeps its cache in float32; leave it out$"):
            quantize(toy(), QuantizeRequest(kv=kv, method="rtn"), calibration_text())
    change(monkeypatch, parts=lambda model: {"dials": Dials(4)})
    with pytest.raises(UserError, match=r"^model_type toy: reads no texts; .*method=rtn$"):
        text_of(toy())


def test_a_weight_that_gptq_cannot_hear_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another module, one that nobody reads, and one whose rows are no positions."""

    class Other(Toy):
        def refined(self, h: Tensor, mean: Tensor, x0: Tensor) -> Tensor:
            return super().refined(h, mean, x0) + self.down(self.up(mean[:, :5])).sum(1, keepdim=True)

    model = toy()
    model.idle = torch.nn.Linear(32, 32, bias=False)
    model.odd = torch.nn.Bilinear(32, 32, 32, bias=False)
    other = toy()
    other.__class__ = Other
    for built, name, said in (
        (model, "odd.weight", "is a weight of Bilinear, whose inputs gptq does not hear"),
        (other, "up.weight", "is given 15 rows for 48 positions"),
    ):
        with pytest.raises(UserError, match=f"^{name}: {said}"):
            gather(built, texts(3, 16), [name], "even")
    with pytest.raises(UserError, match=r"^idle\.weight: nothing is multiplied with it"):
        gather(model, texts(3, 16), ["idle.weight"], "even").of("idle.weight")


# ---------------------------------------------------------------------------------------------------------- the commands


def test_the_command_calibrates_any_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(toy(), tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("".join(ALPHABET[i] for i in calibration_text(2000)))
    flags = ["--calibrate", str(text), "--calibration-tokens", "512", "--evaluation-tokens", "80"]
    assert main(["-m", str(source), "-o", str(tmp_path / "q"), *flags]) == 0
    printed = capsys.readouterr().out
    for part in ("say.weight", "adaptive", "exit gate", "drift"):
        assert part in printed
    assert isinstance(load_quantized(tmp_path / "q").model, Toy)


@pytest.mark.onnx
def test_random_weights_of_any_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`rmse-export --config` reads whose they are."""
    (tmp_path / "config.json").write_text(ToyConfig().to_json())
    flags = ["--config", str(tmp_path / "config.json"), "--dry-run", "--quant", "int4", "--method", "rtn"]
    assert export([*flags, "--format", "json"]) == 0
    described = json.loads(capsys.readouterr().out)
    model = random_model(tmp_path / "config.json")
    assert isinstance(model, Toy) and described["parameters"] == sum(p.numel() for p in model.parameters())
    assert described["methods"]["prelude_16"]["inputs"] == {"tokens": [[1, 16], "int64"]}
    assert export([*flags, "--kv", "float16"]) == 2
    assert_one_line(capsys.readouterr().err, "--kv float16: model_type toy keeps its cache in float32")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert export(flags) == 2
    assert_one_line(capsys.readouterr().err, "config.json: model_type: got 'llama', expected one of")
