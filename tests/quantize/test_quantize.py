"""A whole model: what is quantised, what is reported, the gate, the finetune, the int8 cache, and the checkpoint on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    QUICK_CALIBRATION,
    assert_one_line,
    calibration_text,
    mixed_model,
    random_tokens,
    remembering_model,
    tiny_config,
    write_checkpoint,
)

from rmse_edge.arch.common.identity import fingerprint
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.arch.rmse.quantization import EXPERTS, table
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.cli.quantize import main
from rmse_edge.errors import ArgumentError, CheckpointError, UserError
from rmse_edge.numbers import SEGMENT
from rmse_edge.quantize import QuantizeRequest, Scheme, load_quantized, quantize, save_quantized
from rmse_edge.quantize.compare import compare, mean_depth
from rmse_edge.quantize.gate import CLOSE, recalibrate
from rmse_edge.quantize.quantizer import LEAST_TEXT
from rmse_edge.runtimes import Dials, open_runtime
from rmse_edge.runtimes.engines.torch import TorchRuntime

pytestmark = pytest.mark.slow

DENSE = {name for stage in table(tiny_config()).stages for name in stage} - {*EXPERTS}


@pytest.fixture(scope="module")
def model() -> RMSE:
    return mixed_model()


@pytest.fixture(scope="module")
def int4(model: RMSE):
    return quantize(model, QuantizeRequest(**QUICK_CALIBRATION), calibration_text(), "a fingerprint")


# ------------------------------------------------------------------------------------------------------------- scheme


def test_what_is_quantised_and_what_stays_float(model: RMSE, int4) -> None:
    """Experts, attention, embedding and head are integers; the rest is bit for bit what it was, but for the gate's bias."""
    assert set(int4.tensors) == {*DENSE, *EXPERTS}
    before, after = model.state_dict(), int4.model.state_dict()
    for name, tensor in before.items():
        if name in int4.tensors:
            assert torch.equal(after[name], int4.tensors[name].dequantize())
            assert 0 < (after[name] - tensor).norm() / tensor.norm() < 0.3
        elif name != "gate.bias":
            assert torch.equal(after[name], tensor), name
    assert {q.format.group for n, q in int4.tensors.items() if n in EXPERTS} == {32}
    assert int4.tensors["inject.weight"].format.group == 64  # the largest that divides its 64 inputs


def test_the_model_that_is_given_stays_as_it_is() -> None:
    model = mixed_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize(model, QuantizeRequest(**QUICK_CALIBRATION, kv="int8", qat_steps=1), calibration_text())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.kv_dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({"attention_gate": "elementwise"}, {"block.attention.gate_proj.weight"}),
        ({"tie_embeddings": True}, set()),
        ({"n_shared_experts": 0}, set()),
        ({"step_encoding": "temporal_rope"}, set()),
        ({"step_encoding": "none"}, set()),
    ],
    ids=str,
)
def test_other_architectures(changes: dict[str, Any], extra: set[str]) -> None:
    model = mixed_model(**changes)
    found = quantize(model, QuantizeRequest(**QUICK_CALIBRATION), calibration_text())
    expected = {*DENSE, *EXPERTS} | extra
    if "tie_embeddings" in changes:
        expected -= {"head_proj.weight"}
        assert found.model.head_proj.weight is found.model.embed.weight
    if "n_shared_experts" in changes:
        expected -= {n for n in DENSE if "shared" in n}
    assert set(found.tensors) == expected


def test_memory_and_retrieval_stay_float() -> None:
    model = remembering_model()
    found = quantize(model, QuantizeRequest(method="rtn", evaluation_tokens=0))
    assert not any(name.startswith(("memory", "retrieval")) for name in found.tensors)
    assert {name for name in model.state_dict() if name.startswith("memory")} <= set(found.report["float_tensors"])


def test_a_tensor_the_quantiser_does_not_know_is_named() -> None:
    with pytest.raises(UserError, match=r"^block\.mixer\.weight: the quantiser does not know this tensor"):
        table(tiny_config()).quantizes("block.mixer.weight")
    model = mixed_model()
    model.block.mixer = torch.nn.Linear(64, 64)
    with pytest.raises(UserError, match=r"^block\.mixer\.weight: .*does not know"):
        quantize(model, QuantizeRequest(method="rtn"))


@pytest.mark.parametrize(
    ("scheme", "parts"),
    [
        ({"group_size": 64}, ("block.experts.down_proj", "group size 64", "32 inputs", "group_size=16 or 32")),
        ({"group_size": 48}, ("group size: got 48",)),
        (
            {"dense_group_size": 128},
            ("embed.weight", "group size 128", "64 inputs", "dense_group_size=16 or 32"),
        ),
        ({"quant": "int8", "symmetric": False}, ("symmetric=False", "int8 is symmetric")),
        ({"quant": "int3"}, ("quant: got", "int3", "int8, int4")),
    ],
    ids=str,
)
def test_formats_that_do_not_fit(model: RMSE, scheme: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        quantize(model, QuantizeRequest(Scheme(**scheme), method="rtn"))
    assert_one_line(str(caught.value), *parts)


# ------------------------------------------------------------------------------------------------------------ the work


def test_equal_seeds_make_equal_integers(model: RMSE, int4) -> None:
    again = quantize(model, QuantizeRequest(**QUICK_CALIBRATION), calibration_text(), "a fingerprint")
    other = quantize(model, QuantizeRequest(**QUICK_CALIBRATION, seed=1), calibration_text())
    codes = [torch.cat([q.codes.flatten() for q in found.tensors.values()]) for found in (int4, again, other)]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    assert int4.report == again.report


def test_gptq_is_nearer_to_the_float_model_than_rounding(model: RMSE) -> None:
    """On held-out text, by the divergence from the float model at full depth; random weights, so by a little."""
    blocks = torch.from_numpy(random_tokens(8 * 65, 9).reshape(8, 65))
    divergence = {}
    for method in ("rtn", "gptq"):
        request = QuantizeRequest(method=method, calibration_tokens=4096, evaluation_tokens=0, recalibrate_gate=False)
        divergence[method] = compare(model, quantize(model, request, calibration_text()).model, blocks)["full_depth"][
            "kl"
        ]
    assert divergence["gptq"] < 0.8 * divergence["rtn"]


def test_each_stage_sees_the_stages_before_it_quantised(model: RMSE) -> None:
    """With the float model's inputs instead, later weights come out differently, the first stage's do not."""
    flow = quantize(model, QuantizeRequest(calibration_tokens=512, evaluation_tokens=0), calibration_text())
    apart = quantize(
        model, QuantizeRequest(calibration_tokens=512, evaluation_tokens=0, in_flow=False), calibration_text()
    )
    same = {n: torch.equal(q.codes, apart.tensors[n].codes) for n, q in flow.tensors.items()}
    assert same["embed.weight"] and not same["head_proj.weight"] and not same["block.experts.down_proj"]


def test_int8_is_much_nearer_than_int4(model: RMSE, int4) -> None:
    found = quantize(model, QuantizeRequest(Scheme("int8"), **QUICK_CALIBRATION), calibration_text())
    assert {(q.format.bits, q.format.group) for q in found.tensors.values()} == {(8, None)}
    eight, four = (q.report["evaluation"]["full_depth"] for q in (found, int4))
    assert eight["kl"] < 0.1 * four["kl"] and eight["same_top_token"] > max(0.9, four["same_top_token"])


def test_the_report(model: RMSE, int4) -> None:
    """Everything in it is measured again here, on the model that comes with it."""
    report = int4.report
    assert json.loads(json.dumps(report)) == report
    assert report["bytes"] == sum(q.nbytes for q in int4.tensors.values())
    up = report["tensors"]["block.experts.gate_up_proj"]
    weight = model.block.experts.gate_up_proj.detach()
    error = int4.model.block.experts.gate_up_proj.detach() - weight
    assert up["relative_error"] == pytest.approx(float(error.norm() / weight.norm()), rel=1e-4)
    assert up["worst_expert"] >= up["relative_error"] and (up["bits"], up["group"]) == (4, 32)
    evaluation = report["evaluation"]
    assert len(evaluation["drift"]) == 4 and all(0 < d < 1 for d in evaluation["drift"])
    for setting in ("full_depth", "adaptive"):
        s = evaluation[setting]
        assert s["perplexity"]["quantized"] == pytest.approx(np.exp(s["loss"]["quantized"]))
        assert s["increase"] == pytest.approx(s["loss"]["quantized"] - s["loss"]["float"], abs=1e-6)
        assert s["increase_se"] > 0 and s["kl"] > 0 and 0.5 < s["same_top_token"] <= 1
    assert evaluation["adaptive"]["mean_depth"]["float"] < 4
    assert report["rarely_routed_experts"]["of"] == 32


def test_comparison_is_that_of_a_runtime(model: RMSE, int4) -> None:
    """Loss and depth with early exit equal what the runtime that stops for real says, block by block."""
    blocks = torch.from_numpy(random_tokens(3 * 65, 4).reshape(3, 65))
    found = compare(model, int4.model, blocks)["adaptive"]
    from rmse_edge.runtimes.measure.evaluate import evaluate

    for side, m in (("float", model), ("quantized", int4.model)):
        runtime = TorchRuntime(m, "x")
        parts = [evaluate(runtime, b.numpy(), runtime.info.dials, 64) for b in blocks]
        assert found["loss"][side] == pytest.approx(np.mean([p.loss for p in parts]), abs=1e-4)
        assert found["mean_depth"][side] == pytest.approx(np.mean([p.mean_loops for p in parts]), abs=0.02)


def test_the_gate_is_recalibrated_to_the_float_model_s_depth() -> None:
    """A gate whose bias is off by half a logit stops at another depth; recalibrated, at the float model's."""
    reference, model = mixed_model(), mixed_model()
    blocks = torch.from_numpy(random_tokens(16 * SEGMENT, 2).reshape(16, SEGMENT))
    with torch.no_grad():
        model.gate.bias += 0.5
    found = recalibrate(reference, model, blocks)
    assert found is not None and found.before < 0.97 * found.wanted
    assert abs(found.after / found.wanted - 1) < 3 * CLOSE
    assert found.shift == pytest.approx(-0.5, abs=0.1)
    assert mean_depth(model, blocks) == pytest.approx(found.after)
    assert recalibrate(mixed_model(exit_threshold=1.0), mixed_model(exit_threshold=1.0), blocks) is None


@pytest.mark.slow
def test_finetuning_the_integers_brings_them_nearer(model: RMSE) -> None:
    """Scales stay, codes move, and the divergence from the float model falls on text that was not trained on."""
    blocks = torch.from_numpy(random_tokens(8 * 65, 9).reshape(8, 65))
    request = QuantizeRequest(method="rtn", evaluation_tokens=0, recalibrate_gate=False, calibration_tokens=2048)
    rounded = quantize(model, request, calibration_text())
    tuned = quantize(model, dataclasses.replace(request, qat_steps=40), calibration_text())
    moved = {n: float((q.codes != rounded.tensors[n].codes).float().mean()) for n, q in tuned.tensors.items()}
    assert all(torch.equal(q.scales, rounded.tensors[n].scales) for n, q in tuned.tensors.items())
    assert all(0 < share < 0.3 for share in moved.values()), moved  # in every stage, and no tensor is torn apart
    a, b = (compare(model, q.model, blocks)["full_depth"]["kl"] for q in (rounded, tuned))
    assert b < 0.98 * a


def test_a_tied_table_is_quantised_for_the_head() -> None:
    """It is looked up and multiplied with; what the head says counts."""
    model = mixed_model(tie_embeddings=True)
    found = quantize(model, QuantizeRequest(**QUICK_CALIBRATION), calibration_text())
    rounded = quantize(model, QuantizeRequest(method="rtn", evaluation_tokens=0))
    assert not torch.equal(found.tensors["embed.weight"].codes, rounded.tensors["embed.weight"].codes)


# ------------------------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize(
    ("quant", "symmetric", "kv"), [("int4", True, None), ("int4", False, "float16"), ("int8", True, "int8")]
)
def test_a_quantised_checkpoint_is_read_as_it_was_written(
    quant: str, symmetric: bool, kv: str | None, tmp_path: Path
) -> None:
    source = write_checkpoint(remembering_model(), tmp_path / "source")
    model = load_checkpoint(source)
    request = QuantizeRequest(Scheme(quant, symmetric=symmetric), kv=kv, **QUICK_CALIBRATION)
    found = quantize(model, request, calibration_text(), fingerprint(model))
    save_quantized(found, tmp_path / "q", source)
    read = load_quantized(tmp_path / "q")
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(read.model.state_dict()[name], tensor), name
    for name, q in found.tensors.items():
        assert torch.equal(read.tensors[name].codes, q.codes) and read.tensors[name].format == q.format
    assert (read.quant, read.fingerprint) == (quant, fingerprint(model))
    assert read.report == json.loads(json.dumps(found.report))
    size = (tmp_path / "q" / "model.safetensors").stat().st_size
    kept = sum(4 * model.state_dict()[n].numel() for n in found.report["float_tensors"] if n in model.state_dict())
    assert size < found.report["bytes"] + kept + 16384
    # The runtime reads it like any checkpoint, and it counts as the model it was made from.
    ours, theirs = open_runtime(tmp_path / "q"), open_runtime(source)
    assert (ours.info.fingerprint == theirs.info.fingerprint) == (kv != "int8")  # scales of a cache make it another
    assert ours.feed(random_tokens(70), Dials(4)).logits.shape == (70, 65)


@pytest.fixture(scope="module")
def stored(int4, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "q"
    save_quantized(int4, folder, checkpoint)
    return folder


def spoil_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "quantization.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a flipped byte": (spoil_byte, ("model.safetensors", "SHA-256", "copy it again")),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("model.safetensors", "no such file")),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:1000]),
        ("model.safetensors", "SHA-256"),
    ),
    "no json": (lambda f: (f / "quantization.json").write_text("{"), ("quantization.json", "not readable as JSON")),
    "another json": (lambda f: (f / "quantization.json").write_text("{}"), ("quantization.json", "not the file of")),
    "another version": (lambda f: edit(f, format_version=9), ("quantization.json", "format version 9")),
    "a format that does not fit": (
        lambda f: edit(f, tensors={"embed.weight": {"bits": 4, "group": 128, "symmetric": True}}),
        ("embed.weight", "group size 128 does not divide 64 inputs"),
    ),
    "no tensors": (lambda f: edit(f, tensors=None), ("quantization.json", "tensors: ")),
    "no format": (lambda f: edit(f, tensors={"embed.weight": "int4"}), ("tensors.embed.weight", "expected an object")),
    "a tensor less": (lambda f: edit(f, tensors={}), ("embed.weight", "missing")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(damage: str, stored: Path, tmp_path: Path) -> None:
    spoil, parts = DAMAGE[damage]
    shutil.copytree(stored, tmp_path / "q")
    spoil(tmp_path / "q")
    with pytest.raises(CheckpointError) as caught:
        load_quantized(tmp_path / "q")
    assert_one_line(str(caught.value), *parts)


def test_what_trains_refuses_a_quantised_checkpoint(stored: Path, model: RMSE) -> None:
    """To be read as a float one, by Hugging Face, and to be written over."""
    pytest.importorskip("transformers")
    from rmse_edge.hf.model import RMSEForCausalLM

    before = {p.name: p.read_bytes() for p in stored.iterdir()}
    for use in (load_checkpoint, RMSEForCausalLM.from_pretrained, lambda folder: save_checkpoint(model, folder)):
        with pytest.raises(CheckpointError) as caught:
            use(stored)
        assert_one_line(str(caught.value), str(stored), "a quantised checkpoint")
    assert {p.name: p.read_bytes() for p in stored.iterdir()} == before


def test_nothing_of_a_replaced_checkpoint_stays(int4, checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    save_quantized(int4, tmp_path / "q", source)
    carried = [tmp_path / "q" / name for name in ("tokenizer.json", "chat_template.jinja", "sample.txt")]
    assert all(path.is_file() for path in carried)
    save_quantized(int4, tmp_path / "q")
    assert not any(path.exists() for path in carried)


# ---------------------------------------------------------------------------------------------------------- the command


def sample(folder: Path, count: int = 4000) -> Path:
    from helpers import ALPHABET

    path = folder / "calibrate.txt"
    path.write_text("".join(ALPHABET[i] for i in calibration_text(count)))
    return path


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


QUICK = ("--calibration-tokens", 512, "--evaluation-tokens", 256)


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "q"
    argv = ("-m", checkpoint, "-o", out, "--calibrate", sample(tmp_path), *QUICK)
    code, printed, err = call(capsys, *argv)
    assert code == 0 and err == ""
    for part in ("gate_up_proj", "worst expert", "full depth", "adaptive", "exit gate", "drift", "borrows", str(out)):
        assert part in printed
    assert (out / "tokenizer.json").is_file() and (out / "sample.txt").is_file()
    code, _, err = call(capsys, *argv)
    assert code == 2
    assert_one_line(err, str(out), "already exists", "--force")
    code, printed, _ = call(capsys, *argv, "--force", "--report", "json")
    assert code == 0 and json.loads(printed)["quant"] == "int4"


def test_rounding_needs_no_text(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = call(capsys, "-m", checkpoint, "-o", tmp_path / "q", "--method", "rtn", "--quant", "int8")
    assert code == 0 and "not compared with the float model" in printed
    assert load_quantized(tmp_path / "q").quant == "int8"


def test_bad_input_is_one_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = sample(tmp_path)
    short = tmp_path / "short.txt"
    short.write_text(good.read_text()[: LEAST_TEXT - 1])
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("ä" * 5000)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("mine")
    bad = tmp_path / "bad"
    model = mixed_model()
    with torch.no_grad():
        model.block.attention_norm.weight[0] = 3e38
    write_checkpoint(model, bad)
    small_vocabulary = write_checkpoint(mixed_model(), tmp_path / "small")
    save_checkpoint(mixed_model(vocab_size=64), tmp_path / "other")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "other" / name, small_vocabulary / name)
    cases: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
        ((), ("--calibrate FILE is missing",)),
        (("--calibrate", short), ("1023 tokens", "at least 1024")),
        (("--calibrate", foreign), ("no token for 'ä'",)),
        (("--calibrate", tmp_path / "none.txt"), ("none.txt", "no such file")),
        (("--calibrate", good, "--group-size", 64), ("block.experts.down_proj", "--group-size 16 or 32")),
        (("--calibrate", good, "--group-size", 48), ("group size: got 48",)),
        (("--calibrate", good, "--quant", "int8", "--asymmetric"), ("--asymmetric",)),
        (("--calibrate", good, "--quant", "int8", "--group-size", 64), ("--group-size", "int8")),
        (("--calibrate", good, "--calibration-tokens", 1), ("--calibration-tokens", "got 1")),
        (("--calibrate", good, "--calibration-seed", -1), ("--calibration-seed", "-1")),
        (("-m", small_vocabulary, "--calibrate", good), ("token 64", "outside the vocabulary (0..63)")),
        (("--calibrate", good, "--quant", "int2"), ("int2", "int8")),
        (("--calibrate", good, "-o", taken), (str(taken), "not a quantised checkpoint")),
        (
            ("--calibrate", good, "-o", os.devnull),
            (f"{os.devnull}: is a device, expected a folder; choose another name",),
        ),
        (("--calibrate", good, "-o", "/proc/x"), ("/proc/x: cannot be written",)),
        (("-m", tmp_path / "nowhere", "--calibrate", good), ("nowhere",)),
        (("-m", bad, "--calibrate", good), ("NaN or Inf", "calibration text")),
        (("-m", bad, "--calibrate", good, "--method", "rtn"), ("no number on this text",)),
    ]
    for flags, parts in cases:
        out = () if "-o" in flags else ("-o", tmp_path / "q")
        source = () if "-m" in flags else ("-m", checkpoint)
        code, printed, err = call(capsys, *source, *out, *QUICK, *flags)
        assert (code, printed) == (2, ""), flags
        assert_one_line(err, "rmse-quantize: error:", *parts)
        assert not (tmp_path / "q").exists()
    assert [p.name for p in taken.iterdir()] == ["letter.txt"]


def test_texts_are_checked_before_anything_is_computed(model: RMSE) -> None:
    with pytest.raises(ArgumentError, match=r"^ids: the text has 100 tokens, expected at least 1024$"):
        quantize(model, QuantizeRequest(), calibration_text(100))
