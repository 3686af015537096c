"""What makes rmse-runner fast, and what measures it: its bench, packed weights, the instructions of ARM processors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arm import COMPILER, CPUS, QEMU, emulated
from helpers import FEW, random_tokens
from native_runner import Runner, flip, make
from paths import ROOT

from rmse_edge.cli.bench import main as rmse_bench

pytestmark = [pytest.mark.executorch, pytest.mark.native, pytest.mark.slow]

ARM = ROOT / "build" / "native-aarch64"
ARM_WHEEL = ARM / f"executorch-{version('executorch')}" / "executorch"

# Of logits of about 10, over all processors. fp32: products are summed in another order. int4: here and there an
# activation is rounded to the neighbouring integer, and later loops build on that.
ACROSS_PROCESSORS = {"fp32": 1e-4, "int4": 0.5}


# ------------------------------------------------------------------------------------------------------- the bench

BENCH = ("-p", "64", "-n", "8", "-r", "1", "-t", "1")


def form(value: Any) -> Any:
    """Names, and what identifies a row; not what was measured."""
    if isinstance(value, dict):
        return {k: v if k in ("test", "mode", "max_loops", "mean_loops") else form(v) for k, v in value.items()}
    if isinstance(value, list):
        return [form(v) for v in value]
    return None


def test_bench_documents_are_those_of_rmse_bench(
    fp32: Runner, executorch_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rmse_bench([str(executorch_package), *BENCH, "-o", "json"]) == 0
    expected, found = json.loads(capsys.readouterr().out), fp32.document("--bench", *BENCH)
    assert json.dumps(form(found)) == json.dumps(form(expected))  # in the same order
    same = ("quant", "parameters", "package_bytes", "state_bytes", "threads", "dials", "histogram", "notes")
    assert {k: found[k] for k in same} == {k: expected[k] for k in same}
    # Bytes of weights per token, of which both tell gigabytes per second.
    moved = [
        [row["gb_per_s"] / row["tok_per_s"]["median"] for row in d["rows"] if row["gb_per_s"] is not None]
        for d in (found, expected)
    ]
    np.testing.assert_allclose(*moved, rtol=1e-12)
    assert 0 < found["baseline_rss_bytes"] < found["rss_bytes"] <= found["peak_rss_bytes"]


def test_bench_tables_are_those_of_rmse_bench(
    fp32: Runner, executorch_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for run in (
        lambda *a: rmse_bench([str(executorch_package), *a]),
        lambda *a: print(fp32("--bench", *a).stdout, end=""),
    ):
        run(*BENCH)
        numbers = re.sub(r"[\d.,]+", "9", capsys.readouterr().out).replace("executorch-native", "executorch")
        shown.append(re.sub(r" +|-+", " ", numbers))
    assert shown[0] == shown[1]


def test_without_a_text_the_bench_reads_made_up_tokens(int4: Runner, tmp_path: Path) -> None:
    """Exits mean nothing on them: there are no adaptive rows. With a text's tokens there are."""
    document = int4.document("--bench", *BENCH)
    assert {row["mode"] for row in document["rows"]} == {"fixed"} and document["histogram"] is None
    assert len(document["notes"]) == 1 and "made-up tokens" in document["notes"][0]
    ids = ",".join(map(str, random_tokens(200, vocab=FEW)))
    document = int4.document("--bench", "--prompt-tokens", ids, *BENCH)
    assert {row["mode"] for row in document["rows"]} == {"fixed", "adaptive"} and document["notes"] == []
    (tmp_path / "text").write_text("abc")
    assert "holds no tokenizer.json" in int4.refusal("--bench", "--text", str(tmp_path / "text"), *BENCH)


# -------------------------------------------------------------------------------------------------- packed weights


SPOILED = {
    "flipped at the start": flip(0),
    "flipped in the middle": flip(0.5),
    "flipped at the end": flip(1),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "without a seal": lambda file: Path(f"{file}.sha256").unlink(),
    "of another program": lambda file: flip(0.3)(Path(f"{file}.sha256")),
}


def test_packed_weights_are_kept_and_made_anew_where_they_are_spoiled(fp32: Runner, tmp_path: Path) -> None:
    """The engine itself would compute with what it finds."""
    file = tmp_path / "cache" / "packed"
    file.parent.mkdir()
    tokens = random_tokens(80, seed=12)
    expected, _ = fp32.feed(tokens, tmp_path / "logits")
    flags = ("--packed-weights", str(file))
    assert fp32.feed(tokens, tmp_path / "logits", *flags)[0].tobytes() == expected.tobytes()
    made = file.read_bytes(), file.stat().st_ino
    assert {p.name for p in file.parent.iterdir()} == {"packed", "packed.sha256"} and len(made[0]) > 10_000
    assert fp32.feed(tokens, tmp_path / "logits", *flags)[0].tobytes() == expected.tobytes()
    assert (file.read_bytes(), file.stat().st_ino) == made  # used, not made again
    for name, spoil in SPOILED.items():
        spoil(file)
        assert fp32.feed(tokens, tmp_path / "logits", *flags)[0].tobytes() == expected.tobytes(), name
        assert len(file.read_bytes()) == len(made[0]) and Path(f"{file}.sha256").is_file(), name
    (tmp_path / "diary").write_text("not to be lost")
    line = fp32.refusal("-p", "A", "--packed-weights", str(tmp_path / "diary"))
    assert "holds something else" in line and (tmp_path / "diary").read_text() == "not to be lost"


def test_packed_weights_behind_a_link(fp32: Runner, tmp_path: Path) -> None:
    """The link stays; what is no file is refused, as the weights and as their seal."""
    (tmp_path / "disk").mkdir()
    link, file = tmp_path / "packed", tmp_path / "disk" / "weights"
    link.symlink_to("disk/weights")
    tokens, flags = random_tokens(80, seed=12), ("--packed-weights", str(link))
    expected, _ = fp32.feed(tokens, tmp_path / "logits")
    for change in (lambda: None, lambda: None, lambda: flip(0.5)(file), lambda: Path(f"{file}.sha256").unlink()):
        change()
        assert fp32.feed(tokens, tmp_path / "logits", *flags)[0].tobytes() == expected.tobytes()
        assert link.is_symlink() and file.stat().st_size > 10_000
        assert {p.name for p in file.parent.iterdir()} == {"weights", "weights.sha256"}
    os.mkfifo(tmp_path / "fifo")
    Path(f"{file}.sha256").unlink()
    os.mkfifo(f"{file}.sha256")
    for path in (tmp_path / "fifo", link):
        assert "is no file; choose another name" in fp32.refusal("-p", "A", "--packed-weights", str(path))


def test_launches_at_the_same_time_share_packed_weights(fp32: Runner, tmp_path: Path) -> None:
    command = [*fp32.command, "-p", "HELLO", "-n", "20", "--temperature", "0"]
    expected = subprocess.run(command, capture_output=True).stdout
    command += ["--packed-weights", str(tmp_path / "packed")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(5)]
    assert [process.communicate()[0] for process in running] == [expected] * 5
    assert subprocess.run(command, capture_output=True).stdout == expected


# ------------------------------------------------------------------------------------------------------------- ARM


@pytest.fixture(scope="module")
def arm_runner() -> Path:
    if shutil.which(f"{COMPILER}g++") is None or shutil.which(QEMU) is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64, which make test-arm installs")
    if not ARM_WHEEL.is_dir():
        pytest.skip(f"needs {ARM_WHEEL.relative_to(ROOT)}, which make test-arm fetches")
    return make(ARM_WHEEL, ARM, f"CXX={COMPILER}g++")


@pytest.mark.arm
@pytest.mark.nightly
@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("quant", ACROSS_PROCESSORS)
def test_arm_processors_say_the_same(
    request: pytest.FixtureRequest, arm_runner: Path, quant: str, cpu: str, tmp_path: Path
) -> None:
    """Logits within a tolerance, and the same top token wherever it leads by as much."""
    here: Runner = request.getfixturevalue(quant)
    there = Runner([*emulated(cpu), arm_runner], Path(here.command[-1]))
    tokens = random_tokens(140, seed=12, vocab=65 if quant == "fp32" else FEW)
    full = ("--exit-threshold", "1")  # a position that stops a loop earlier is compared with nothing
    (ours, _), (theirs, _) = (run.feed(tokens, tmp_path / "logits", *full) for run in (here, there))
    tolerance = ACROSS_PROCESSORS[quant]
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=tolerance)
    ranked = np.sort(ours, axis=-1)
    same = theirs.argmax(-1) == ours.argmax(-1)
    assert same.mean() > 0.95 and same[ranked[:, -1] - ranked[:, -2] > tolerance].all()
    # Experts give the same bits through all instruction sets.
    plain, _ = there.feed(tokens, tmp_path / "logits", *full, env={**os.environ, "RMSE_PRODUCTS": "portable"})
    assert plain.tobytes() == theirs.tobytes()
