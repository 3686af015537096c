"""ExecuTorch packages: what is in the file, what the runtime makes of it, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    assert_memory_and_hits_take_part,
    assert_one_line,
    mixed_model,
    random_tokens,
    refused_export,
    require_executorch,
    reseal,
)
from later import later
from small_models import small_config

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.bench import main as rmse_bench
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import ExportError, PackageError, UserError
from rmse_edge.export.gate.methods import compare_methods
from rmse_edge.export.pipeline import signatures
from rmse_edge.export.program import tensors_json, trace
from rmse_edge.export.targets import LowerOptions, get_target
from rmse_edge.package import MANIFEST, SUMS, Package
from rmse_edge.quantize import Format, Quantized, QuantizeRequest, Scheme, quantize
from rmse_edge.quantize.tensors import round_to_nearest
from rmse_edge.runtimes import Dials, open_runtime
from rmse_edge.runtimes.engines.executorch import ExecutorchMethods, ExecutorchRuntime, load_program
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.session import restore_session, save_session

executorch_lower = later("rmse_edge.export.executorch.lower")
executorch_ops = later("rmse_edge.export.executorch.ops")

pytestmark = [pytest.mark.executorch, pytest.mark.slow]

require_executorch()

FULL = Dials(4)
METHODS = [f"{name}_{rows}" for rows in (1, 64) for name in ("prelude", "begin", "step", "head", "commit")]


def runtime_of(folder: Path) -> ExecutorchRuntime:
    runtime = open_runtime(folder, threads=1)
    assert isinstance(runtime, ExecutorchRuntime)
    return runtime


# ------------------------------------------------------------------------------------------------------ the package


def test_the_gate_ran_and_the_package_holds_what_it_should(executorch_package: Path) -> None:
    """Exact rule at all settings and for all methods; one program, and the methods that the host calls."""
    package = Package.open(executorch_package)
    assert {p.name for p in executorch_package.iterdir()} == {
        MANIFEST, SUMS, "program.pte", "tokenizer.json", "sample.txt",
    }  # fmt: skip
    assert list(package.manifest["methods"]) == package.manifest["lowering"]["methods"] == METHODS
    parity = package.manifest["parity"]
    assert parity["rule"] == "exact" and list(parity["settings"]) == ["full depth", "gate", "delta"]
    assert all(s["positions"] >= 200 and s["same_depth"] == 1 for s in parity["settings"].values())
    assert set(parity["methods"]) == {*METHODS, "loop_1", "loop_64"}


def test_metadata_methods_say_what_a_runner_needs(executorch_package: Path) -> None:
    program = runtime_of(executorch_package).methods._program  # type: ignore[attr-defined]
    found = {name: program.load_method(name)([])[0] for name in ("get_vocab_size", "get_max_loops", "get_window")}
    assert found == {"get_vocab_size": 65, "get_max_loops": 4, "get_window": 64}
    assert program.load_method("get_bos_id")([]) == [-1]
    assert program.load_method("get_max_context_len")([]) == [2**31 - 1]


def test_weights_are_there_once_and_as_integers(executorch_int4: Path, calm: Quantized) -> None:
    """Every method of both sizes shares them; what was quantised is nowhere as floats."""
    content = (executorch_int4 / "program.pte").read_bytes()
    for name, q in calm.tensors.items():
        forms = [*executorch_lower.stored_forms(q)]
        assert sum(content.count(codes.numpy().tobytes()) for codes, _ in forms) == 1, name
        assert q.dequantize().numpy().tobytes() not in content
    table = calm.model.get_parameter("block.experts.router.weight")
    assert content.count(table.detach().numpy().tobytes()) == 1


def test_a_file_with_other_integers_is_refused(executorch_int4: Path, calm: Quantized) -> None:
    """One nibble of one expert is enough."""
    name = "block.experts.down_proj"
    planted = dict(calm.tensors)
    codes = planted[name].codes.clone()
    codes[3, 5, 7] ^= 1
    planted[name] = type(planted[name])(planted[name].format, codes, planted[name].scales)
    executorch_lower.check_weights(executorch_int4 / "program.pte", calm.tensors)
    scaled = dict(calm.tensors)
    scaled[name] = type(scaled[name])(scaled[name].format, scaled[name].codes, 2 * scaled[name].scales)
    with pytest.raises(ExportError, match=r"^block\.experts\.down_proj: ExecuTorch did not store the scales"):
        executorch_lower.check_weights(executorch_int4 / "program.pte", scaled)
    with pytest.raises(ExportError, match=r"^block\.experts\.down_proj: ExecuTorch did not store the integers"):
        executorch_lower.check_weights(executorch_int4 / "program.pte", planted)


def test_int4_passes_the_rounded_rule_with_memory_and_int8_cache(executorch_int4: Path) -> None:
    parity = Package.open(executorch_int4).manifest["parity"]
    assert parity["rule"] == "rounded"
    for setting in parity["settings"].values():
        assert setting["positions"] >= 200 and setting["same_top_token"] >= 0.98 and setting["same_depth"] >= 0.97
    assert parity["memory"]["writes"]["memory_up"] <= 1e-2
    runtime = runtime_of(executorch_int4)
    assert all(array.dtype == np.int8 for array in runtime.state.values())


# ------------------------------------------------------------------------------------------------------ the runtime


@pytest.mark.parametrize("dials", [FULL, Dials(4, 1, 0.6), Dials(2), Dials(4, 3, 0.3)])
def test_the_loop_stops_for_real(
    executorch_package: Path, tiny: RMSE, dials: Dials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine runs `step` as often as the deepest position needs and not once more; depths are PyTorch's."""
    runtime = runtime_of(executorch_package)
    calls: Counter[str] = Counter()
    plain = ExecutorchMethods._call

    def counted(self: ExecutorchMethods, name: str, given: Any) -> Any:
        calls[name] += 1
        return plain(self, name, given)

    monkeypatch.setattr(ExecutorchMethods, "_call", counted)
    tokens = random_tokens(80, seed=12)
    expected = TorchRuntime(tiny, "tiny").feed(tokens, dials)
    fed = runtime.feed(tokens, dials)
    np.testing.assert_array_equal(fed.depth, expected.depth)
    assert fed.iterations == expected.iterations
    singles = [n for n, rows in zip(fed.iterations, fed.chunks) if rows == 1]
    assert calls["step_1"] == sum(singles) and calls["step_64"] == sum(fed.iterations) - sum(singles)


def test_one_token_at_a_time_reads_what_long_calls_left(executorch_package: Path) -> None:
    """Chunked and single calls of the same text agree, over the window's end and with early exits."""
    runtime = runtime_of(executorch_package)
    tokens = random_tokens(150, seed=12)
    dials = Dials(4, 1, 0.6)
    at_once = runtime.feed(tokens, dials)
    runtime.reset()
    singly = [runtime.feed(tokens[i : i + 1], dials) for i in range(len(tokens))]
    np.testing.assert_array_equal(at_once.depth, np.concatenate([f.depth for f in singly]))
    np.testing.assert_allclose(at_once.logits, np.concatenate([f.logits for f in singly]), atol=1e-4)


def test_rmse_run_writes_what_pytorch_writes(
    executorch_package: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = []
    for folder in (checkpoint, executorch_package):
        assert rmse_run([str(folder), "-p", "HELLO", "-n", "90", "--temperature", "0", "-o", "json"]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0]["tokens"] == documents[1]["tokens"] and documents[0]["depth"] == documents[1]["depth"]
    assert documents[1]["runtime"] == "executorch"


def test_sessions_go_from_one_runtime_to_the_other(executorch_package: Path, tiny: RMSE, tmp_path: Path) -> None:
    """The host keeps the state, so a text begun by PyTorch goes on here."""
    tokens = random_tokens(100, seed=12)
    reference = TorchRuntime(tiny, "tiny")
    reference.feed(tokens[:70], FULL)
    save_session(reference, tmp_path / "s.session", [])
    runtime = runtime_of(executorch_package)
    restore_session(runtime, tmp_path / "s.session")
    assert runtime.position == 70
    np.testing.assert_allclose(
        runtime.feed(tokens[70:], FULL).logits, reference.feed(tokens[70:], FULL).logits, atol=1e-4
    )


def test_memory_and_hits_take_part(executorch_int4: Path, calm: Quantized) -> None:
    assert_memory_and_hits_take_part(runtime_of(executorch_int4), calm)


def test_bench_and_profile(executorch_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same rows as for any package, and the time of every operator."""
    flags = ["-p", "64", "-n", "8", "-r", "1", "-t", "1", "-o", "json"]
    assert rmse_bench([str(executorch_package), *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {row["test"] for row in document["rows"]} == {"pp64", "tg8"}
    assert document["runtime"] == "executorch" and document["baseline_rss_bytes"] > 0
    assert rmse_bench([str(executorch_package), "--profile", "-o", "json", "-t", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)["operators"]
    for test in ("pp256", "tg32"):
        mine = {row["operator"]: row for row in rows if row["test"] == test}
        assert sum(row["share"] for row in mine.values()) == pytest.approx(1)
        assert any(name.startswith("xnnpack: Fully Connected") for name in mine)
    runtime = runtime_of(executorch_package)
    iterations = sum(
        runtime.feed([int(t)], runtime.info.dials).iterations[0] for t in sample_ids(executorch_package)[:32]
    )
    experts = next(row for row in rows if row["test"] == "tg32" and row["operator"] == "sparse_experts")
    assert experts["calls"] == iterations
    assert rmse_bench([str(executorch_package), "--profile", "-t", "1"]) == 0
    shown = capsys.readouterr().out
    assert "| operator" in shown and "sparse_experts" in shown and "tg32: " in shown


def sample_ids(folder: Path) -> list[int]:
    from rmse_edge.text import Tokenizer

    return Tokenizer(folder / "tokenizer.json").encode((folder / "sample.txt").read_text())


def test_profile_of_another_runtime_is_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rmse_bench([str(checkpoint), "--profile"]) == 2
    assert_one_line(capsys.readouterr().err, "--profile", "torch", "--target executorch")


# ---------------------------------------------------------------------------------------------- any looped model


def test_a_puzzle_solver_is_lowered_too(tmp_path: Path) -> None:
    """No context, no state, nothing emitted, no commit: nothing here is about text."""
    from puzzle import CELLS, MAX_LOOPS, Puzzle

    torch.manual_seed(0)
    model = Puzzle().eval()
    target = get_target("executorch")
    program = trace(target.prepare(model, LowerOptions()), (CELLS,), host_loop=True)  # type: ignore[misc, arg-type]
    made = target.lower(program, tmp_path, LowerOptions())
    assert made["methods"] == ["prelude_16", "begin_16", "step_16", "head_16"]
    tables = {n: {"inputs": tensors_json(t), "outputs": tensors_json(g)} for n, (t, g) in
              signatures(program.specs, target, "fp32").items()}  # fmt: skip
    methods = ExecutorchMethods(tmp_path / made["program"], tables, MAX_LOOPS)
    dials = {"max_loops": MAX_LOOPS, "min_loops": 1, "exit_threshold": 0.5}
    worst = compare_methods(program, methods, dials, 1e-5)
    assert set(worst) == {"prelude_16", "begin_16", "step_16", "head_16", "loop_16"}


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--quant", "fp16"], ["--quant fp16", "executorch takes fp32, int8, int4"]),
        (["--quant", "int4", "--calibrate", "x", "--accuracy-level", "0"], ["--accuracy-level 0", "export to onnx"]),
        (["--quant", "int4", "--calibrate", "x", "--asymmetric"], ["--asymmetric", "executorch"]),
        (["--quant", "int3"], ["--quant", "int3"]),
        (["--no-compact"], ["--no-compact", "executorch"]),
    ],
)
def test_what_the_target_cannot_do_is_one_line(
    checkpoint: Path, tmp_path: Path, flags: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused_export("executorch", checkpoint, tmp_path, flags) == 2
    assert_one_line(capsys.readouterr().err, *parts)
    assert not list(tmp_path.glob("*.rmse"))


def test_groups_that_the_kernels_have_not_are_refused_before_quantising(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = [
        "--target",
        "executorch",
        "-m",
        str(checkpoint),
        "--quant",
        "int4",
        "--group-size",
        "16",
        "--method",
        "rtn",
    ]
    for more in (["--dry-run"], ["-o", str(tmp_path / "p.rmse")]):
        assert rmse_export([*target, *more]) == 2
        assert_one_line(capsys.readouterr().err, "groups of 16", "--group-size 32")
    assert not (tmp_path / "p.rmse").exists()


def test_groups_that_the_kernels_have_not_are_refused() -> None:
    model = mixed_model()
    made = quantize(model, QuantizeRequest(Scheme("int4", group_size=16), method="rtn"))
    with pytest.raises(ExportError) as caught:
        executorch_ops.prepare(made.model, LowerOptions(tensors=made.tensors))
    assert_one_line(str(caught.value), "groups of 16", "group_size=32")
    executorch_ops.check_format("w", Format(4, 64), 64, "matrix")
    narrow = RMSE(small_config(d_model=48)).eval()
    made = quantize(narrow, QuantizeRequest(Scheme("int8"), method="rtn"))
    with pytest.raises(ExportError) as caught:
        executorch_ops.prepare(made.model, LowerOptions(tensors=made.tensors))
    assert_one_line(str(caught.value), "block.experts.gate_up_proj", "48 inputs")


def overwrite(content: bytes) -> Any:
    return lambda folder: (folder / "program.pte").write_bytes(content)


def cut_in_half(folder: Path) -> None:
    os.truncate(folder / "program.pte", (folder / "program.pte").stat().st_size // 2)


def promise_a_method(folder: Path) -> None:
    reseal(folder, lambda m: m["methods"].update(think_1=m["methods"]["head_1"]))


def change_a_shape(folder: Path) -> None:
    reseal(folder, lambda m: m["methods"]["step_1"]["inputs"][1].update(shape=[1, 1, 3]))


def other_target(folder: Path) -> None:
    reseal(folder, lambda m: m.update(target="litert"))


DAMAGE = {
    "random bytes": (overwrite(np.random.default_rng(0).bytes(5000)), ["program.pte", "not an ExecuTorch program"]),
    "random behind the magic": (overwrite(b"\x30\0\0\0ET12" + np.random.default_rng(0).bytes(5000)), ["program.pte", "cannot load it"]),
    "empty": (overwrite(b""), ["program.pte", "not an ExecuTorch program"]),
    "cut in half": (cut_in_half, ["program.pte", "cannot load it"]),
    "a method that is not there": (promise_a_method, ["holds no think for 1 rows"]),
    "tensors of another model": (change_a_shape, ["methods.step_1.inputs.h: got [1, 1, 3] float32, expected [1, 1, 64] float32"]),
    "another target": (other_target, ["made for litert"]),
}  # fmt: skip


RUN_EACH = """
import sys
from rmse_edge.cli.run import main
for folder in sys.argv[1:]:
    print(folder, main([folder, "-p", "A", "-n", "1"]), flush=True)
    print("ended:", folder, file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def complaints(executorch_package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What `rmse-run` says to each damaged package, all in one process: none of them may bring it down."""
    root = tmp_path_factory.mktemp("damaged")
    folders = {damage: root / damage.replace(" ", "-") for damage in DAMAGE}
    for damage, folder in folders.items():
        shutil.copytree(executorch_package, folder)
        DAMAGE[damage][0](folder)
        reseal(folder)
    command = [sys.executable, "-c", RUN_EACH, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{folder} 2" for folder in folders.values()]
    said, found = [], {}
    for line in done.stderr.splitlines():
        if line.startswith("ended: "):
            found[line.removeprefix("ended: ")], said = said, []
        else:
            said.append(line)
    return {damage: found[str(folder)] for damage, folder in folders.items()}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_program_with_good_hashes_is_one_line(complaints: dict[str, list[str]], damage: str) -> None:
    """Even what the hashes cannot catch does not bring the process down."""
    assert len(complaints[damage]) == 1, complaints[damage]
    assert_one_line(complaints[damage][0], *DAMAGE[damage][1])


def test_a_flipped_weight_byte_is_caught_before_the_runtime(executorch_package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad.rmse"
    shutil.copytree(executorch_package, folder)
    content = bytearray((folder / "program.pte").read_bytes())
    content[len(content) * 3 // 4] ^= 1
    (folder / "program.pte").write_bytes(content)
    with pytest.raises(PackageError, match=r"program\.pte: its SHA-256 is not that in SHA256SUMS"):
        open_runtime(folder)


class Twins(torch.nn.Module):
    """Linear layers with the same codes: `once`, `twice` with twice the scales, `shifted` with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("once", "twice", "shifted"):
            self.add_module(name, torch.nn.Linear(64, 32, bias=name == "shifted"))
        torch.nn.init.ones_(self.shifted.bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.once(x), self.twice(x), self.shifted(x)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_equal_codes_keep_their_own_scales_and_biases(tmp_path: Path, bits: int) -> None:
    """In two methods of a program, which stores what is the same once."""
    from executorch.exir import to_edge

    once = round_to_nearest(torch.randn(32, 64), Format(bits, 32 if bits == 4 else None))
    twice = type(once)(once.format, once.codes, 2 * once.scales)
    tensors = {"once.weight": once, "twice.weight": twice, "shifted.weight": once}
    model = executorch_ops.prepare(Twins().eval(), LowerOptions(f"int{bits}", tensors))
    x = torch.randn(1, 64)
    modules = {"all": model, "two": model.twice}
    exported = {name: torch.export.export(module, (x,), strict=False) for name, module in modules.items()}
    path = tmp_path / "twins.pte"
    path.write_bytes(to_edge(exported).to_executorch().buffer)
    executorch_lower.check_weights(path, tensors)
    assert path.read_bytes().count(next(executorch_lower.stored_forms(once))[0].numpy().tobytes()) == 1
    loaded = load_program(path)
    methods = {name: loaded.load_method(name) for name in modules}
    plain = x @ once.dequantize().T
    expected = [plain, 2 * plain, plain + 1, 2 * plain]
    for ours, theirs in zip([*methods["all"]([x]), methods["two"]([x])[0]], expected):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()  # activations are rounded to int8


def test_a_text_too_short_to_profile_is_one_line(
    executorch_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("A" * 37)
    assert rmse_bench([str(executorch_package), "--profile", "--text", str(tmp_path / "short.txt")]) == 2
    assert_one_line(capsys.readouterr().err, "37 tokens", "needs 256", "--text")


def test_threads_that_the_engine_does_not_have(executorch_package: Path) -> None:
    with pytest.raises(UserError, match=r"^threads: got"):
        open_runtime(executorch_package, threads=10**6)


def test_the_model_is_left_alone(checkpoint: Path) -> None:
    """Preparing for the target changes a copy."""
    model, untouched = load_checkpoint(checkpoint), load_checkpoint(checkpoint)
    assert executorch_ops.prepare(model, LowerOptions()) is not model
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), untouched.state_dict().values()))
    assert model.block.attention.rotary_operator


def test_a_dry_run_says_what_there_would_be(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`begin` instead of `loop`, and a step that takes the mask; nothing is written."""
    assert rmse_export(["--target", "executorch", "-m", str(checkpoint), "--dry-run", "--format", "json"]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert list(methods) == METHODS and methods["step_64"]["inputs"]["mask"] == [[1, 1, 64, 128], "float32"]
