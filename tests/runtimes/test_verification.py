"""Packages whose program is verified in parts: by the runner while it computes, by Python as a whole; neither lets out a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_one_line, reseal
from later import later
from native_runner import Runner

from rmse_edge.errors import PackageError
from rmse_edge.package import MANIFEST, SUMS, Package
from rmse_edge.parts import Parts
from rmse_edge.quantize import Quantized

executorch_lower = later("rmse_edge.export.executorch.lower")

pytestmark = [pytest.mark.executorch, pytest.mark.native, pytest.mark.slow]

PROGRAM = "program.pte"
WRITES = ("--prompt-tokens", "1,2,3,0,1,2,3,3,2", "-n", "3", "--temperature", "0")
DAMAGED = f"{PROGRAM}: its SHA-256 is not that in {SUMS}; the file is damaged, export again"


@pytest.fixture
def copied(executorch_int4: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(executorch_int4, tmp_path / "parted.rmse")


def parts_of(folder: Path) -> list[tuple[int, int, bool]]:
    """First byte, end, and whether it is weights, of every part of the program."""
    found, at = [], 0
    for part in Package.open(folder).section(dict[str, Parts], "parts")[PROGRAM].parts:
        found.append((at, at + part.bytes, part.weights))
        at += part.bytes
    return found


def test_an_export_marks_its_large_weights_and_nothing_else(executorch_int4: Path, calm: Quantized) -> None:
    """Weights are codes and scales of quantised tensors; what is parsed lies before and behind them."""
    content = (executorch_int4 / PROGRAM).read_bytes()
    parts = parts_of(executorch_int4)
    assert parts[-1][1] == len(content) and not parts[0][2] and not parts[-1][2]
    assert max(end - first for first, end, _ in parts) <= 16384
    own = {
        at
        for first, end in executorch_lower.check_weights(executorch_int4 / PROGRAM, calm.tensors)
        for at in range(first, end)
    }
    marked = {at for first, end, weights in parts if weights for at in range(first, end)}
    # Between two weights there are up to 15 bytes that make the next one begin where it must: nobody reads them.
    assert all(content[at] == 0 for at in marked - own) and len(marked - own) < 16 * len(calm.tensors) * 2
    assert len(marked & own) > 0.9 * len(own)


def test_packages_with_and_without_parts_write_the_same(int4: Runner, runner: Path, copied: Path) -> None:
    """An older one has none, and is verified as a whole."""
    expected = int4.document(*WRITES)
    reseal(copied, lambda manifest: manifest.pop("parts"))
    found = Runner([runner], copied).document(*WRITES)
    assert found["tokens"] == expected["tokens"] and found["depth"] == expected["depth"]


def assert_refused(runner: Path, folder: Path, *said: str) -> None:
    """By the runner, whatever it is asked for, and by Python: one line, and nothing else."""
    run = Runner([runner], folder)
    logits = folder.parent / "logits"
    ids = WRITES[:2]
    for flags in (
        WRITES,
        (*WRITES, "-o", "json"),
        (*ids, "--logits", str(logits)),
        ("--bench", "-p", "4", "-n", "0", "-r", "1"),
    ):
        assert_one_line(run.refusal(*flags), str(folder), *said)
    assert not logits.exists()
    with pytest.raises(PackageError) as caught:
        Package.open(folder)
    assert_one_line(str(caught.value), str(folder), *said)


def test_a_damaged_byte_of_any_part_is_refused_before_a_word(runner: Path, copied: Path) -> None:
    parts = parts_of(copied)
    weights = [part for part in parts if part[2]]
    content = (copied / PROGRAM).read_bytes()
    assert len(weights) > 2
    for first, end, _ in (parts[0], weights[0], weights[len(weights) // 2], weights[-1], parts[-1]):
        for at in (first, end - 1):
            (copied / PROGRAM).write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
            assert_refused(runner, copied, DAMAGED)
    (copied / PROGRAM).write_bytes(content)
    Runner([runner], copied).document(*WRITES)


def test_all_weights_at_random_are_refused_and_not_followed(runner: Path, copied: Path) -> None:
    """Whatever they are, they are only multiplied with: the run ends with its line, and not by a signal."""
    content, parts = bytearray((copied / PROGRAM).read_bytes()), parts_of(copied)
    for fill in (b"\xff", b"\x00", b"\x80\x7f", np.random.default_rng(0).bytes(997)):
        for first, end, weights in parts:
            if weights:
                content[first:end] = (fill * (end - first))[: end - first]
        (copied / PROGRAM).write_bytes(content)
        assert_refused(runner, copied, DAMAGED)


def test_a_cut_program_is_refused(runner: Path, copied: Path) -> None:
    size = (copied / PROGRAM).stat().st_size
    for left in (0, 5000, size - 1):
        with (copied / PROGRAM).open("r+b") as file:
            file.truncate(left)
        assert_refused(runner, copied, f"{PROGRAM}: {left} bytes, the manifest says {size}; truncated?")


def test_damaged_weights_are_not_packed_and_sealed(runner: Path, copied: Path, tmp_path: Path) -> None:
    """A seal outlives the run: what XNNPACK packed of damaged bytes would be taken for good by the next one."""
    packed, run = tmp_path / "packed", Runner([runner], copied)
    first, end, _ = next(part for part in parts_of(copied) if part[2])
    content = (copied / PROGRAM).read_bytes()
    (copied / PROGRAM).write_bytes(content[:first] + bytes(end - first) + content[end:])
    assert DAMAGED in run.refusal(*WRITES, "--packed-weights", str(packed))
    assert not Path(f"{packed}.sha256").exists()
    (copied / PROGRAM).write_bytes(content)
    run(*WRITES, "--packed-weights", str(packed))
    assert Path(f"{packed}.sha256").exists()


def change(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: reseal(folder, lambda manifest: edit(manifest["parts"]))


def first(files: dict[str, Any]) -> dict[str, Any]:
    return files[PROGRAM]["parts"][0]


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no parts": (change(lambda p: p.update({PROGRAM: {}})), f"parts.{PROGRAM}.sha256: is missing"),
    "a list": (lambda f: reseal(f, lambda m: m.update(parts=[])), "parts: got []"),
    "a part of nothing": (change(lambda p: first(p).update(bytes=0)), f"parts.{PROGRAM}.parts[0].bytes: got 0, expected"),
    "a byte more": (change(lambda p: first(p).update(bytes=first(p)["bytes"] + 1)), f"parts.{PROGRAM}.parts: got "),
    "an enormous part": (change(lambda p: first(p).update(bytes=2**53)), f"parts.{PROGRAM}.parts: got "),
    "a hash that is none": (change(lambda p: first(p).update(sha256="0" * 63)), f"parts.{PROGRAM}.parts[0].sha256: got"),
    "weights that are a number": (change(lambda p: first(p).update(weights=1)), f"parts.{PROGRAM}.parts[0].weights: got 1"),
    "a file that is not there": (change(lambda p: p.update(x=p[PROGRAM])), "parts.x: got a file that is not in the package"),
    "another hash of the whole": (change(lambda p: p[PROGRAM].update(sha256="0" * 64)), DAMAGED),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_false_parts_are_refused(case: str, runner: Path, copied: Path) -> None:
    spoil, said = BAD[case]
    spoil(copied)
    assert_refused(runner, copied, said)


def test_a_false_hash_of_a_part_is_seen_by_who_reads_parts(runner: Path, copied: Path) -> None:
    """The whole file is as it should be, which is what Python reads."""
    for index in (0, len(parts_of(copied)) // 2, -1):
        manifest = json.loads((copied / MANIFEST).read_text())
        reseal(copied, lambda m, i=index: m["parts"][PROGRAM]["parts"][i].update(sha256="0" * 64))  # type: ignore[misc]
        assert DAMAGED in Runner([runner], copied).refusal(*WRITES)
        reseal(copied, lambda m, old=manifest: m.update(old))  # type: ignore[misc]
    Runner([runner], copied).document(*WRITES)
