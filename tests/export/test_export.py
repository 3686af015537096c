"""`rmse-export`, from the command line to numbers: every kind of model agrees, and every failure leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_one_line, decided_text, mixed_model, tiny_config, write_checkpoint
from later import later
from memo import Memo
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.cli.export import main as rmse_export
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import UserError
from rmse_edge.export import ExportRequest, OnnxOptions, export_package
from rmse_edge.export.pipeline import rounded
from rmse_edge.loop.stop import delta_stops, entropy_stops, gate_stops
from rmse_edge.package import Package, check_destination
from rmse_edge.runtimes import Dials, open_runtime
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.text import LoopRuntime

onnx_weights = later("rmse_edge.export.onnx.weights")

pytestmark = [pytest.mark.onnx, pytest.mark.slow]

Numbers = tuple[np.ndarray, np.ndarray]  # logits, depth
METHODS = [f"{name}_{chunk}" for chunk in (1, 64) for name in ("prelude", "loop", "begin", "step", "head", "commit")]

# ------------------------------------------------------------------------------------------------------ numbers


@torch.no_grad()
def full_forward(model: RMSE, ids: np.ndarray, dials: Dials) -> Numbers:
    """The whole text at once by the training path: no cache, no ring, no chunks, every loop computed for every position."""
    threshold, epsilon, entropy = (
        torch.tensor(x, dtype=torch.float32) for x in (dials.exit_threshold, dials.exit_epsilon, dials.exit_entropy)
    )

    def stop(k: int, before: Tensor, after: Tensor, log_survival: Tensor) -> Tensor:
        stops = gate_stops(log_survival, threshold) | delta_stops(before, after, epsilon)
        if "entropy" in model.config.exit_rules:
            stops = stops | entropy_stops(model.head_proj(model.norm(after)), entropy)
        return stops & (k + 1 >= dials.min_loops)

    states, _, depth = model.trajectory(torch.from_numpy(ids)[None], dials.max_loops, stop)
    return model.head_proj(states[-1])[0].numpy(), depth[0].numpy()


def fed(runtime: LoopRuntime, ids: np.ndarray, dials: Dials, parts: list[int]) -> Numbers:
    """The text from an empty state, in parts of the given sizes."""
    assert sum(parts) == len(ids)
    runtime.reset()
    found = [runtime.feed(part, dials) for part in np.split(ids, np.cumsum(parts)[:-1])]
    return np.concatenate([f.logits for f in found]), np.concatenate([f.depth for f in found])


def assert_same(ours: Numbers, theirs: Numbers, tolerance: float = 1e-4) -> None:
    assert ours[1].tolist() == theirs[1].tolist()
    assert np.abs(ours[0] - theirs[0]).max() <= tolerance


DIALS = {
    "full depth": {"exit_threshold": 1.0},
    "gate": {"exit_threshold": 0.6},
    "delta": {"exit_threshold": 1.0, "exit_epsilon": 0.48},
    "both": {"exit_threshold": 0.8, "exit_epsilon": 0.48},
    "at most two loops": {"max_loops": 2, "exit_threshold": 0.6},
    "at least three loops": {"min_loops": 3, "exit_threshold": 0.6},
}


@pytest.mark.parametrize("setting", DIALS)
def test_chunks_and_single_tokens_equal_one_full_forward(setting: str, package: Path, tiny: RMSE) -> None:
    """330 tokens through a window of 64, on ONNX Runtime: a chunked prompt with mixed exits followed by decoding, decoding
    from the first token on, and PyTorch over the whole text at once give the same logits and the same depths.

    All dials go into the same package: none of them needs another export.
    """
    runtime = open_runtime(package)
    assert isinstance(runtime, LoopRuntime)
    dials, ids = runtime.info.dials_with(**DIALS[setting]), decided_text(330)
    expected = full_forward(tiny, ids, dials)
    assert_same(fed(runtime, ids, dials, [200, *[1] * 60, 45, *[1] * 25]), expected)
    assert_same(fed(runtime, ids, dials, [1] * 330), expected)
    depths = set(expected[1].tolist())
    assert depths <= set(range(dials.min_loops, dials.max_loops + 1))
    assert len(depths) >= {"full depth": 1, "at least three loops": 2, "at most two loops": 2}.get(setting, 2)


def test_a_call_costs_as_many_iterations_as_its_deepest_position(package: Path) -> None:
    """What the loop reports as iterations, per call, is the largest depth of the call's positions."""
    runtime = open_runtime(package)
    ids = decided_text(140)
    seen = set()
    for threshold in (0.3, 0.6, 0.9):
        runtime.reset()
        found = runtime.feed(ids, runtime.info.dials_with(exit_threshold=threshold))
        ends = np.cumsum([min(64, 140 - start) for start in range(0, 140, 64)])
        depths = np.split(found.depth, ends[:-1])
        assert found.chunks == [64, 64, 64]
        assert found.iterations == [int(d.max()) for d in depths]
        found = runtime.feed([7], runtime.info.dials_with(exit_threshold=threshold))
        assert found.chunks == [1] and found.iterations == found.depth.tolist()
        seen.update(found.iterations)
    assert min(seen) < runtime.info.max_loops


def test_positions_far_out_agree_too(package: Path, tiny: RMSE) -> None:
    """At position 10 million, on a ring that a long text has filled, package and PyTorch agree in chunks and singly."""
    ids = decided_text(264)
    found = []
    for runtime in (open_runtime(package), TorchRuntime(tiny, "reference")):
        assert isinstance(runtime, LoopRuntime)
        dials = runtime.info.dials_with(exit_threshold=0.6)
        runtime._position = 10_000_000
        runtime.feed(ids[:64], dials)
        parts = [runtime.feed(ids[64:230], dials), *(runtime.feed([i], dials) for i in ids[230:])]
        assert runtime.position == 10_000_264
        found.append((np.concatenate([f.logits for f in parts]), np.concatenate([f.depth for f in parts])))
    assert_same(*found)
    assert len(set(found[0][1].tolist())) > 2


# ----------------------------------------------------------------------------------------------- kinds of models

KINDS: dict[str, dict[str, object]] = {
    "40 loops that nothing tells apart, tied embeddings": {
        "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "max_loops": 40, "n_experts": 8, "top_k": 2,
        "tie_embeddings": True, "exit_threshold": 0.97, "step_encoding": "none",
    },
    "temporal rope, elementwise gate, entropy rule, no shared expert": {
        "step_encoding": "temporal_rope", "attention_gate": "elementwise", "exit_rules": ("gate", "delta", "entropy"),
        "n_shared_experts": 0,
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_exports_and_agrees(kind: str, quick_export: Memo, tmp_path: Path) -> None:
    """Real exports with the gate, at full depth and adaptive; then against one full forward, with early exits."""
    model = mixed_model(**KINDS[kind])
    package = export_package(model, tmp_path / "p.rmse", ExportRequest())
    settings = package.manifest["parity"]["settings"]
    for result in settings.values():
        assert result["max_logit_difference"] <= 1e-4 and result["same_depth"] == 1.0
    assert settings["full depth"]["mean_depth"] == [model.config.max_loops] * 2
    takes = {name: [t["name"] for t in m["inputs"]] for name, m in package.manifest["methods"].items()}
    entropy = "entropy" in model.config.exit_rules
    assert all(("exit_entropy" in takes[f"{m}_{c}"]) == entropy for m in ("loop", "step") for c in (1, 64))
    assert ("entropy" in settings) == entropy
    runtime = open_runtime(package.folder)
    assert isinstance(runtime, LoopRuntime)
    ids = decided_text(100)
    for result in settings.values():
        dials = Dials(**result["dials"])
        expected = full_forward(model, ids, dials)
        assert_same(fed(runtime, ids, dials, [70, *[1] * 30]), expected)
        assert len(set(expected[1].tolist())) > 1 or result is settings["full depth"]


def test_a_float16_cache_is_half_the_state(quick_export: Memo, tmp_path: Path) -> None:
    """K and V rounded to float16 before use: the gate passes by the rounded rule, and the ring is float16.

    Rounding turns a difference of 1e-7 between two engines into one of 5e-4 in a key now and then, so the numbers agree
    to 1e-3 instead of 1e-4: chunks, single tokens and one full forward, with the same depths.
    """
    model = mixed_model(kv_dtype="float16")
    package = export_package(model, tmp_path / "p.rmse", ExportRequest())
    report = package.manifest["parity"]
    assert report["rule"] == "rounded"
    assert max(result["max_logit_difference"] for result in report["settings"].values()) <= 1e-3
    runtime = open_runtime(package.folder)
    assert isinstance(runtime, LoopRuntime)
    assert {a.dtype for a in runtime.state.values()} == {np.dtype(np.float16)}
    assert 2 * runtime.state_bytes() == TorchRuntime(mixed_model(), "float32").state_bytes()
    ids, dials = decided_text(200), runtime.info.dials_with(exit_threshold=0.6)
    expected = full_forward(model, ids, dials)
    for parts in ([170, *[1] * 30], [1] * 200):
        assert_same(fed(runtime, ids, dials, parts), expected, tolerance=1e-3)


def test_fp16_storage_computes_what_the_rounded_model_computes(
    tiny: RMSE, checkpoint: Path, package: Path, quick_export: Memo, tmp_path: Path
) -> None:
    """Storage is all that --quant fp16 changes: against PyTorch with the same rounded weights it is exact, as fp32 is."""
    half = export_package(tiny, tmp_path / "half.rmse", ExportRequest(quant="fp16"), checkpoint)
    runtime = open_runtime(half.folder)
    assert isinstance(runtime, LoopRuntime)
    ids, dials = decided_text(200), runtime.info.dials_with(exit_threshold=0.6)
    expected = full_forward(rounded(tiny, "fp16"), ids, dials)
    assert_same(fed(runtime, ids, dials, [170, *[1] * 30]), expected)
    assert np.abs(full_forward(tiny, ids, dials)[0] - expected[0]).max() > 1e-4  # and not what the unrounded one does


def test_without_compaction_the_numbers_are_the_same(
    tiny: RMSE, package: Path, quick_export: Memo, tmp_path: Path
) -> None:
    """--no-compact computes stopped rows too; the gate passes, and the two packages agree."""
    plain = export_package(tiny, tmp_path / "plain.rmse", ExportRequest(options=OnnxOptions(compact=False)))
    assert plain.manifest["lowering"]["compact"] is False
    ids = decided_text(200)
    found = []
    for folder in (package, plain.folder):
        runtime = open_runtime(folder)
        assert isinstance(runtime, LoopRuntime)
        found.append(fed(runtime, ids, runtime.info.dials_with(exit_threshold=0.6), [200]))
    assert_same(*found)


# ----------------------------------------------------------------------------------------------- the command line


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def failure(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """stderr of an rmse-export that must fail in one line."""
    capsys.readouterr()
    assert rmse_export([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    said = err.split("\r")[-1]  # the progress line is wiped before
    assert_one_line(said, "rmse-export: ")
    return said


def test_the_package_is_named_after_the_model(
    checkpoint: Path, package: Path, quick_export: Memo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Without -o it is ./MODEL-TARGET.rmse; the parity of every setting is printed."""
    monkeypatch.chdir(tmp_path)
    assert rmse_export(["-m", str(checkpoint)]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-onnx.rmse"]
    out = capsys.readouterr().out
    assert "tiny-onnx.rmse: " in out
    assert [line.split(":")[0] for line in out.splitlines()[1:]] == [
        "parity at full depth", "parity at gate", "parity at delta",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_dry_run_shows_every_method_and_writes_nothing(
    form: str, checkpoint: Path, tiny: RMSE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert rmse_export(["-m", str(checkpoint), "--dry-run", "--format", form]) == 0
    out, err = capsys.readouterr()
    assert listing(tmp_path) == [] and err == ""
    parameters = sum(p.numel() for p in tiny.parameters())
    if form == "json":
        document = json.loads(out)
        assert list(document["methods"]) == METHODS
        assert document["methods"]["loop_64"]["inputs"]["past_keys"] == [[4, 1, 2, 64, 16], "float32"]
        assert document["parameters"] == parameters and document["weight_bytes"] == 4 * parameters
        assert document["state_bytes"] == 2 * 4 * 4 * 2 * 64 * 16
    else:
        lines = out.splitlines()
        assert [line for line in lines if line in METHODS] == METHODS
        assert f"{parameters:,} parameters" in lines[0]
        assert (
            "  <- past_keys        float32  4x1x2x64x16" in lines and "  <- max_loops        int64    scalar" in lines
        )


def test_a_dry_run_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--config needs no checkpoint, and fp16 halves the weights."""
    (tmp_path / "config.json").write_text(tiny_config().to_json())
    sizes = []
    for quant in ("fp32", "fp16"):
        assert (
            rmse_export(["--config", str(tmp_path / "config.json"), "--quant", quant, "--dry-run", "--format", "json"])
            == 0
        )
        sizes.append(json.loads(capsys.readouterr().out)["weight_bytes"])
    assert sizes[0] == 2 * sizes[1] and listing(tmp_path) == ["config.json"]


def test_bad_requests_are_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is traced: what is wrong, what there is to choose from, and nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    (tmp_path / "file.rmse").write_text("mine")
    before = listing(tmp_path)
    for argv, said in (
        (
            ["-m", checkpoint, "--target", "tflite"],
            ["--target: got 'tflite', expected one of coreml, executorch, onnx"],
        ),
        (["-m", checkpoint, "--quant", "int3"], ["--quant: got 'int3', expected one of fp32, fp16"]),
        (["-m", checkpoint, "--max-seq-len", "0"], ["--max-seq-len", "at least 1"]),
        (["-m", checkpoint, "-o", "photos"], ["photos", "is not a package"]),
        (["-m", checkpoint, "-o", "photos", "--force"], ["photos", "is not a package"]),
        (["-m", checkpoint, "-o", "file.rmse", "--force"], ["file.rmse: is a file, expected a folder"]),
        (["-m", checkpoint, "-o", os.devnull], [f"{os.devnull}: is a device, expected a folder; choose another name"]),
        (["-m", checkpoint, "-o", "no/such/p.rmse"], ["no/such", "does not exist"]),
        (["-m", "nowhere"], ["nowhere", "no such checkpoint folder"]),
        (["-m", checkpoint, "--config", "c.json"], ["--model and --config"]),
        (["--config", "c.json"], ["c.json", "no such file"]),
        (["-m", checkpoint, "--taget", "onnx"], ["unknown argument --taget; did you mean --target?"]),
    ):
        said_line = failure(capsys, *argv)
        for part in said:
            assert part in said_line, said_line
    if Path("/proc/self").is_dir():
        assert "/proc/x.rmse: cannot be written" in failure(capsys, "-m", checkpoint, "-o", "/proc/x.rmse")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("-inf"), "Inf")])
def test_a_checkpoint_with_nan_is_refused_by_name(
    value: float, kind: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["block.experts.down_proj"][3, 5, 7] = value
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    said = failure(capsys, "-m", tmp_path / "m", "-o", tmp_path / "p.rmse")
    assert "block.experts.down_proj" in said and kind in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_model_with_nan_in_memory_is_refused_by_name(tmp_path: Path) -> None:
    """The library checks too, for models that never were a checkpoint."""
    broken = mixed_model()
    with torch.no_grad():
        broken.inject.weight[3, 5] = float("nan")
    with pytest.raises(UserError) as caught:
        export_package(broken, tmp_path / "p.rmse", ExportRequest())
    assert_one_line(str(caught.value), "inject.weight", "NaN")
    assert listing(tmp_path) == []


def test_the_reference_is_rounded_as_the_package_is() -> None:
    """Parameters and buffers from 1 KB on, such as the balancing bias of 512 experts; smaller ones stay float32."""
    model = mixed_model(n_experts=512, expert_width=32)
    twin = rounded(model, "fp16")
    for (name, before), (_, after) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        expected = before.half().float() if before.nbytes >= onnx_weights.WeightFile.INLINE_BELOW else before
        assert torch.equal(after, expected), name
    bias = "block.experts.balance_bias"
    assert not torch.equal(model.state_dict()[bias], twin.state_dict()[bias])


def test_a_weight_beyond_float16_is_refused_by_name() -> None:
    """--quant fp16 never writes an infinity."""
    large = mixed_model()
    with torch.no_grad():
        large.head_proj.weight[3, 5] = 1e5
    with pytest.raises(UserError) as caught:
        rounded(large, "fp16")
    assert_one_line(str(caught.value), "head_proj.weight", "quant=fp32")


def test_an_existing_package_is_replaced_only_by_force(
    checkpoint: Path, package: Path, quick_export: Memo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = tmp_path / "p.rmse"
    shutil.copytree(package, destination)
    (destination / "manifest.json").write_text((destination / "manifest.json").read_text() + " ")
    before = (destination / "manifest.json").read_bytes()
    assert "already exists" in failure(capsys, "-m", checkpoint, "-o", destination)
    assert (destination / "manifest.json").read_bytes() == before
    # What replaces it has a chat template besides, which the manifest has as plain text.
    talking = shutil.copytree(checkpoint, tmp_path / "talking")
    (talking / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role + m.content + '.' }}{% endfor %}")
    assert rmse_export(["-m", str(talking), "-o", str(destination), "--force"]) == 0
    assert (destination / "manifest.json").read_bytes() != before
    assert Package.open(destination).manifest["chat"]["user"] == ["user", "."]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.rmse", "talking"]


def test_a_length_limit_holds_at_run_time(
    checkpoint: Path, package: Path, quick_export: Memo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--max-seq-len 70, shorter than the gate's own text: the export passes, and the package takes 70 tokens, not 71."""
    destination = tmp_path / "p.rmse"
    assert rmse_export(["-m", str(checkpoint), "-o", str(destination), "--max-seq-len", "70"]) == 0
    assert Package.open(destination).manifest["model"]["text"]["max_seq_len"] == 70
    runtime = open_runtime(destination)
    dials = runtime.info.dials
    runtime.feed([1] * 69, dials)
    runtime.feed([1], dials)
    for run in (lambda: runtime.feed([1], dials), lambda: (runtime.reset(), runtime.feed([1] * 71, dials))):
        with pytest.raises(UserError) as caught:
            run()
        assert_one_line(str(caught.value), "71 tokens are more than the 70", "--max-seq-len")
    capsys.readouterr()
    assert rmse_run([str(destination), "-p", "A" * 71]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, "more than the 70", "--max-seq-len")


# -------------------------------------------------------------------------------------------- a full disk, Ctrl-C


@contextlib.contextmanager
def full_disk(folder: Path, size: int) -> Iterator[str]:
    """`folder` on a disk of `size` bytes where this process may mount one, else a file size limit; yields the reason."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    if mounted:
        try:
            yield "No space left"
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    checkpoint: Path, package: Path, quick_export: Memo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The graphs still fit, the weights do not: no package, no scratch folder, and a package that was there stays."""
    size = (package / "weights.bin").stat().st_size // 2
    with full_disk(tmp_path / "disk", size) as reason:
        destination = tmp_path / "disk" / "p.rmse"
        said = failure(capsys, "-m", checkpoint, "-o", destination)
        assert reason in said and str(destination) in said
        assert listing(tmp_path / "disk") == []
        destination.mkdir()
        (destination / "manifest.json").write_text("{}")
        assert reason in failure(capsys, "-m", checkpoint, "-o", destination, "--force")
        assert listing(tmp_path / "disk") == ["p.rmse", "p.rmse/manifest.json"]


@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_a_disk_that_is_full_at_the_very_end(
    write: int,
    checkpoint: Path,
    package: Path,
    quick_export: Memo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only the manifest or the hashes do not fit any more: the first ones, for the gate, or those with its report."""
    writes = []

    def write_text(path: Path, text: str, encoding: str | None = None) -> int:
        writes.append(path.name)
        if len(writes) == write:
            path.write_bytes(text.encode()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return path.write_bytes(text.encode())

    monkeypatch.setattr(Path, "write_text", write_text)
    assert "No space left" in failure(capsys, "-m", checkpoint, "-o", tmp_path / "p.rmse")
    assert writes == (["manifest.json", "SHA256SUMS"] * 2)[:write]
    assert listing(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "when"),
    [
        (signal.SIGINT, ".p.rmse.*/new/p.rmse/*.onnx"),
        pytest.param(signal.SIGKILL, ".p.rmse.*/new/p.rmse", marks=pytest.mark.nightly),
    ],
)
def test_an_export_that_is_ended(sent: signal.Signals, when: str, tmp_path: Path) -> None:
    """With --force over an older package, which stays untouched.

    Ctrl-C, here while graphs are being written, ends it with exit code 130 and one line, and nothing lies beside the
    package. What a kill leaves beside it, the next export to the same place removes before it begins.
    """
    checkpoint = write_checkpoint(mixed_model(), tmp_path / "model")
    out = tmp_path / "out"
    (out / "p.rmse").mkdir(parents=True)
    (out / "p.rmse" / "manifest.json").write_text("{}")
    # A process started in the background inherits an ignored SIGINT; a person's shell does not.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from rmse_edge.cli.export import main; sys.exit(main())"
    )
    command = [sys.executable, "-P", "-c", code, "-m", str(checkpoint), "-o", str(out / "p.rmse"), "--force"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        deadline = time.monotonic() + 400
        while not list(out.glob(when)):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the export wrote no graph"
            time.sleep(0.05)
        process.send_signal(sent)
        stdout, stderr = process.communicate(timeout=240)
    assert stdout == "" and "Traceback" not in stderr
    if sent == signal.SIGKILL:
        assert process.returncode == -sent and len(list(out.iterdir())) == 2
        check_destination(out / "p.rmse", overwrite=True)
    else:
        assert process.returncode == 130
        assert stderr.splitlines()[-1].strip() == "rmse-export: interrupted"
    assert listing(out) == ["p.rmse", "p.rmse/manifest.json"]
    assert (out / "p.rmse" / "manifest.json").read_text() == "{}"
