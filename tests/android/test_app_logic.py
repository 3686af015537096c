"""What of the Android app needs no Android: threads, memory, guarded loads, colours, texts, and the checklist of a phone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kotlin_core import Core, Server
from paths import ROOT

pytestmark = [pytest.mark.android, pytest.mark.slow]

SOURCES = [ROOT / "android_demo/app/src" / kind / "kotlin/dev/rmseedge/demo/logic" for kind in ("main", "test")]


@pytest.fixture(scope="module")
def logic(core: Core, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    jar = tmp_path_factory.mktemp("logic") / "logic.jar"
    command = [ROOT / "android_demo/compile.sh", jar, ":".join(map(str, core.classes)), *SOURCES]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    server = Core(core.java, [jar, *core.classes], core.libraries, "dev.rmseedge.demo.logic.LogicDriverKt").serve()
    yield server
    server.close()


@pytest.mark.parametrize(
    ("kHz", "threads", "text"),
    [
        ([1_800_000] * 4 + [2_400_000] * 3 + [3_000_000], 4, "1 x 3.0 GHz, 3 x 2.4 GHz, 4 x 1.8 GHz"),
        ([1_800_000] * 6 + [2_200_000] * 2, 2, "2 x 2.2 GHz, 6 x 1.8 GHz"),
        ([3_500_000] * 6 + [4_300_000] * 2, 2, "2 x 4.3 GHz, 6 x 3.5 GHz"),
        ([2_000_000] * 8, 4, "8 x 2.0 GHz"),
        ([0] * 2, 1, "2"),
        ([0], 1, "1"),
        ([], 1, ""),
    ],
)
def test_threads_are_for_fast_cores(logic: Server, kHz: list[int], threads: int, text: str) -> None:
    assert logic.ask({"do": "cores", "kHz": kHz}) == {"threads": threads, "text": text, "count": len(kHz)}


def test_cores_are_read_as_linux_tells_of_them(logic: Server, tmp_path: Path) -> None:
    for number, kHz in enumerate(["1800000\n", "1800000\n", "2400000\n"]):
        (tmp_path / f"cpu{number}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{number}" / "cpufreq" / "cpuinfo_max_freq").write_text(kHz)
    for other in ("cpufreq", "cpuidle"):
        (tmp_path / other).mkdir()
    asked = {"do": "cores in", "folder": str(tmp_path), "count": 3}
    assert logic.ask(asked) == {"threads": 1, "text": "1 x 2.4 GHz, 2 x 1.8 GHz", "count": 3}
    # A system that lets no app look: as many alike.
    assert logic.ask(asked | {"folder": str(tmp_path / "none"), "count": 6}) == {"threads": 3, "text": "6", "count": 6}


def test_memory_fits_with_what_the_system_keeps(logic: Server) -> None:
    asked = {"do": "memory", "needed": 100, "reserve": 50}
    assert logic.ask(asked | {"free": 150}) is True
    assert logic.ask(asked | {"free": 149}) is False


@pytest.mark.parametrize(
    ("steps", "broken", "worked", "start"),
    [
        ([], None, None, None),
        (["try:a"], "a", None, None),
        (["try:a", "succeed:a"], None, "a", "a"),
        (["try:a", "fail:a"], None, None, None),
        (["try:a", "succeed:a", "try:b"], "b", "a", "a"),
        (["try:a", "succeed:a", "try:b", "fail:b"], None, "a", "a"),
        (["try:a b", "succeed:a b", "try:a b"], "a b", "a b", None),
    ],
)
def test_what_ended_the_app_is_not_loaded_again(
    logic: Server, steps: list[str], broken: str | None, worked: str | None, start: str | None
) -> None:
    found = logic.ask({"do": "guard", "steps": steps})
    assert found == {"broken": broken, "worked": worked, "at start": start}


@pytest.mark.parametrize(
    ("name", "first", "last", "value", "count"),
    [
        ("max_loops", 1, 12, 7, 12),
        ("exit_threshold", 0.01, 1, 0.9, 100),
        ("exit_epsilon", 0, 10, 0.05, 102),
        ("exit_steady", 0, 12, 3, 13),
    ],
)
def test_sliders_reach_what_a_dial_can_have(
    logic: Server, name: str, first: float, last: float, value: float, count: int
) -> None:
    found = logic.ask({"do": "dial", "name": name, "loops": 12, "value": value})
    values = found["values"]
    assert len(values) == count and values == sorted(set(values))
    assert (values[0], values[-1]) == (first, pytest.approx(last))
    assert found["steps"] == list(range(count))  # there and back
    assert values[found["nearest"]] == pytest.approx(value, rel=0.06)


def luminance(argb: int) -> float:
    """Relative luminance of WCAG 2.2."""
    channels = ((argb >> shift & 255) / 255 for shift in (16, 8, 0))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("dark", "ink"), [(0, 0xFF212121), (1, 0xFFE0E0E0)])
@pytest.mark.parametrize("loops", [1, 4, 12, 64])
def test_marks_can_be_read_and_told_apart(logic: Server, loops: int, dark: int, ink: int) -> None:
    """Text stays readable on every colour (WCAG's 4.5 to 1); lines grow with the loops, digits say them."""
    found = logic.ask({"do": "scale", "loops": loops, "dark": dark})
    for colour in found["background"]:
        high, low = sorted((luminance(ink), luminance(colour)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5 and colour & 0xFF000000 == 0xFF000000
    assert len(set(found["background"])) >= min(loops, 12) and len(set(found["bar"])) >= min(loops, 12)
    assert found["underline"] == sorted(set(found["underline"])) and len(found["underline"]) == loops
    normal = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
    assert [text.translate(normal) for text in found["digits"]] == [str(n + 1) for n in range(loops)]


def test_names_of_files_become_names_of_folders(logic: Server) -> None:
    named = {
        "rmse-shakespeare-onnx.rmse.zip": "rmse-shakespeare-onnx",
        "primary:Download/a model (1).rmse.zip": "a-model--1",
        "../../etc/passwd": "passwd",
        "..": "model",
        ".hidden.zip": "hidden",
        "": "model",
        "x" * 300 + ".rmse.zip": "x" * 80,
        "Größe.zip": "Größe",
    }
    assert logic.ask({"do": "names", "files": list(named)}) == list(named.values())
    assert logic.ask({"do": "unused", "name": "a", "taken": ["b"]}) == "a"
    assert logic.ask({"do": "unused", "name": "a", "taken": ["a", "a-2"]}) == "a-3"


def test_the_chart_has_the_latest(logic: Server) -> None:
    assert logic.ask({"do": "series", "room": 3, "depths": [1, 2]}) == [1, 2]
    assert logic.ask({"do": "series", "room": 3, "depths": [1, 2, 3, 4, 5]}) == [3, 4, 5]


def test_texts_survive_being_kept(logic: Server) -> None:
    texts = ["ROMEO:", "\n", "Tö\u2028", "", '"\\"', "🙂" * 40]
    found = logic.ask({"do": "transcript", "texts": texts, "depths": [0, 2, 12, 5, 1, 64]})
    assert found["text"] == "".join(texts) and found["depths"] == [0, 2, 12, 1, 64]  # what is empty is left out
    assert found["rest"] == 4 and found["model"] == "m" and found["title"].startswith("ROMEO: Tö")


def test_old_states_make_room_for_new_ones(logic: Server, tmp_path: Path) -> None:
    """The oldest go first, and never the one that was just written, however large it is."""
    for day, name in enumerate(["d", "b", "a", "c"], start=1):
        (tmp_path / name).write_bytes(bytes(1000))
        os.utime(tmp_path / name, (day * 86400, day * 86400))
    asked = {"do": "states", "folder": str(tmp_path)}
    assert logic.ask(asked | {"current": "c", "most": 4000}) == {"dropped": 0, "left": ["a", "b", "c", "d"]}
    assert logic.ask(asked | {"current": "d", "most": 2500}) == {"dropped": 2, "left": ["c", "d"]}
    assert logic.ask(asked | {"current": "d", "most": 500}) == {"dropped": 1, "left": ["d"]}


def test_a_phone_is_held_against_where_the_app_was_built(logic: Server, package: Path, tmp_path: Path) -> None:
    """The checklist passes on this machine, notices other numbers, and leaves out what is of another package."""
    path = tmp_path / "reference.json"
    asked = {"do": "check", "package": str(package), "reference": str(path), "scratch": str(tmp_path)}
    assert write_reference([str(package), "-o", str(path)]) == 0
    whole = json.loads(path.read_text())
    found = logic.ask(asked)
    assert found["text"] == found["sessions"] == "OK" and "| text | ok | 100.0 % same top token" in found["report"]
    for change, verdict in (
        ({"depth": [d % 4 + 1 for d in whole["depth"]]}, "FAILED"),
        ({"top": [0 for _ in whole["top"]]}, "FAILED"),
        ({"quant": "int4"}, "SKIPPED"),
        ({"fingerprint": "other"}, "SKIPPED"),
    ):
        path.write_text(json.dumps(whole | change))
        assert logic.ask(asked)["text"] == verdict
    assert not list(tmp_path.glob("*.session"))


def write_reference(argv: list[str]) -> Any:
    from android_demo.reference import main

    return main(argv)
