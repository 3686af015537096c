"""Experts within a budget: every byte and every logit as without one, under real pressure; and one line for all that goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import FEW, assert_one_line, random_tokens
from native_runner import Runner
from paths import NATIVE, ROOT

from rmse_edge.errors import ArgumentError, UserError
from rmse_edge.package import Package
from rmse_edge.runtimes import Dials, open_runtime, runtime_for

pytestmark = [pytest.mark.native, pytest.mark.slow]

LIMIT = ROOT / "docs" / "experiments" / "offload" / "limit.py"
SIZES = (20000, 2560, 10000, 1280)  # of the pieces of an expert; native_offload.cpp says what is in them
BYTES = 33920  # of an expert: each piece begins at a multiple of 64
EXPERTS = 2000  # 67 MB
AT_ONCE = (256 << 10) // BYTES  # neighbours that are read in one go

# A disk that fails reads number FAIL_FROM to FAIL_FROM + FAIL_COUNT - 1, and says at last how many it was asked for.
DISK = """
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/uio.h>
static int calls = 0;
extern "C" ssize_t preadv(int file, const struct iovec* to, int count, off_t offset) {
  const int call = __sync_add_and_fetch(&calls, 1) - atoi(getenv("FAIL_FROM"));
  if (call >= 0 && call < atoi(getenv("FAIL_COUNT"))) return errno = EIO, -1;
  return ((ssize_t(*)(int, const struct iovec*, int, off_t))dlsym(RTLD_NEXT, "preadv"))(file, to, count, offset);
}
__attribute__((destructor)) static void say() { fprintf(stderr, "%d reads\\n", calls); }
"""


# ------------------------------------------------------------------------------------------------- the cache by itself


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("offload") / "native_offload"
    parts = [
        NATIVE / "offload" / f"{name}.cpp"
        for name in ("budget", "expert_cache", "expert_file", "expert_slots", "forecast")
    ]
    parts.append(NATIVE / "core" / "opened_file.cpp")
    command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", f"-I{NATIVE}", "-pthread"]
    command += [str(Path(__file__).with_name("native_offload.cpp")), *map(str, parts), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return path


def write_experts(path: Path, count: int) -> None:
    e = np.arange(count, dtype=np.int64)[:, None]
    with path.open("wb") as file:
        for piece, size in enumerate(SIZES):
            (131 * e + 31 * piece + 7 * np.arange(size)).astype(np.uint8).tofile(file)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "experts"
    write_experts(path, EXPERTS)
    return path


def read(
    program: Path, path: Path, readers: int, budget: str, calls: int, needed: int, *before: str | Path
) -> dict[str, Any]:
    command = [*before, program, "read", path, EXPERTS, budget, calls, needed, readers]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    if before and done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("needed", [10, 120])
@pytest.mark.parametrize("slots", [1, 3, 64, EXPERTS])
@pytest.mark.parametrize("readers", [1, 2])
def test_experts_are_those_of_the_file(program: Path, stored: Path, readers: int, slots: int, needed: int) -> None:
    """Of calls that need fewer than fit, and more; in memory there is never more than the budget."""
    found = read(program, stored, readers, str(slots * BYTES), 60, needed)
    assert found["wanted"] == 60 * needed and 0 < found["most"] <= found["budget"] == slots * BYTES
    # What was guessed and still being read when it was needed was not found, and is read once all the same.
    reads = found["wanted"] - found["found"] + found["ahead"]
    assert (reads - found["used"]) * BYTES <= found["read"] <= reads * BYTES
    if slots == EXPERTS:
        assert found["wasted"] == 0
    if slots > needed:
        assert found["found"] > 0 and found["ahead"] >= found["used"] + found["wasted"] > 0
    else:  # no room for guesses
        assert found["ahead"] == 0


@pytest.mark.parametrize("cached", [True, False], ids=["warm", "cold"])
def test_experts_of_four_times_the_memory(program: Path, stored: Path, cached: bool) -> None:
    """Under a hard limit of 16 MiB, which counts the cached pages of the file."""
    file = os.open(stored, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED if cached else os.POSIX_FADV_DONTNEED)
    os.close(file)
    found = read(program, stored, 2, "8M", 40, 100, sys.executable, LIMIT, "16M")
    assert found["wanted"] == 4000 and found["most"] <= 8 << 20
    assert EXPERTS * BYTES > 4 * (16 << 20) * 0.95


def test_a_budget_is_one_of_three(program: Path) -> None:
    def asked(*words: str) -> str:
        done = subprocess.run([program, *words], capture_output=True, text=True)
        assert (done.returncode == 0) == (done.stderr == "")
        return (done.stdout or done.stderr).strip()

    assert asked("budget", "25%", "1000") == "250"
    assert asked("budget", "1.5MiB", "1") == asked("budget", "1.5M", "1") == str(3 << 19)
    assert asked("budget", "auto", "1") == "1"  # no more than there is
    for text in ("0", "-1", "x", "1Q", "1MM", "nan", "1e400", ""):
        assert asked("budget", text, "1") == (
            f"got '{text}', expected a size (300M, 2G), a percentage of the experts (25%) or auto"
        )
    assert asked("budget", "101%", "1") == "got '101%', expected at most 100%"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


SYSTEM = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n"}
V1 = SYSTEM | {
    "proc/self/mountinfo": "1 0 0:1 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "2 0 0:2 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n",
    "proc/self/cgroup": "4:memory:/a/b\n3:cpu:/\n",
    "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1000000\n",
    "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "900000\n",
    "sys/fs/cgroup/memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 50000\ntotal_active_file 7\n",
    "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": "800000\n",
}
V2 = SYSTEM | {
    "proc/self/mountinfo": "1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/memory.max": "max\n",
    "sys/fs/cgroup/a/memory.current": "2000000\n",
    "sys/fs/cgroup/a/b/memory.max": "3000000\n",
    "sys/fs/cgroup/a/b/memory.current": "1000000\n",
    "sys/fs/cgroup/a/b/memory.stat": "anon 5\ninactive_file 20\nactive_file 3\n",
}
# A container sees its own cgroup as the root, and another name of it.
INSIDE = {name.replace("cgroup/a/b/", "cgroup/"): text for name, text in V2.items() if "cgroup/a/m" not in name}


@pytest.mark.parametrize(
    ("files", "free"),
    [(SYSTEM, 5120000), (V1, 150007), (V2, 2000023), (INSIDE, 2000023), ({}, -1)],
    ids=["system", "v1", "v2", "container", "unknown"],
)
def test_what_is_free(program: Path, tmp_path: Path, files: dict[str, str], free: int) -> None:
    done = subprocess.run([program, "memory", tree(tmp_path, files)], capture_output=True, text=True)
    assert done.stdout == f"{free}\n"


@pytest.mark.parametrize("event", ["shrink", "touch"])
def test_a_file_that_changes(program: Path, tmp_path: Path, event: str) -> None:
    """While it is read from: one line, and nothing that was read is used."""
    path = tmp_path / "experts"
    write_experts(path, EXPERTS)
    command = [program, "read", path, str(EXPERTS), "64K", "40", "10", "1", event]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"{path}: was written to while it was in use; export the package again\n"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that no byte can be read of")
def test_a_file_that_cannot_be_read(program: Path) -> None:
    done = subprocess.run(
        [program, "read", "/proc/self/mem", "9", "100%", "1", "2", "1"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "/proc/self/mem: its experts cannot be read (Input/output error)\n"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DISK, to be loaded before other libraries."""
    if sys.platform != "linux":
        pytest.skip("needs a loader that takes a library before others")
    source = tmp_path_factory.mktemp("disk") / "disk.cpp"
    source.write_text(DISK)
    library = source.with_suffix(".so")
    done = subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library, "-ldl"], capture_output=True)
    assert done.returncode == 0, done.stderr
    return library


def from_disk(
    disk: Path, fail_count: int, program: Path, path: Path, budget: str, calls: int, needed: int
) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in (program, "read", path, EXPERTS, budget, calls, needed, 2)]
    own = {**os.environ, "LD_PRELOAD": str(disk), "FAIL_FROM": "100", "FAIL_COUNT": str(fail_count)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=own)


def test_a_read_that_fails(program: Path, stored: Path, disk: Path) -> None:
    """Once: it is read again. Again and again: one line."""
    done = from_disk(disk, 1, program, stored, "1M", 40, 10)
    assert done.returncode == 0 and json.loads(done.stdout)["wanted"] == 400
    failed = from_disk(disk, 1000, program, stored, "1M", 40, 10)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith(f"{stored}: its experts cannot be read (Input/output error)\n")
    assert len(failed.stderr.splitlines()) == 2  # the other one is the disk's


def test_neighbours_are_read_in_one_go(program: Path, stored: Path, disk: Path) -> None:
    done = from_disk(disk, 0, program, stored, "100%", 1, EXPERTS)
    assert done.returncode == 0 and json.loads(done.stdout)["wanted"] == EXPERTS
    assert done.stderr == f"{len(SIZES) * -(-EXPERTS // AT_ONCE)} reads\n"


def test_a_file_that_is_replaced_or_gone(program: Path, tmp_path: Path) -> None:
    """What was opened stays what it was; another process that reads it may be killed."""
    path = tmp_path / "experts"
    write_experts(path, EXPERTS)
    command = [str(word) for word in (program, "read", path, EXPERTS, "512K", 40, 10, 2, "wait")]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    both[0].kill()
    other = tmp_path / "other"
    other.write_bytes(bytes(100))
    path.chmod(0o444)
    os.replace(other, path)
    out, _ = both[1].communicate("\n", timeout=60)
    both[0].communicate()
    # A file that lost its last name has another change time, which is all that changed.
    assert both[1].returncode in (0, 2) and (both[1].returncode == 2 or json.loads(out)["wanted"] == 400)


def test_the_next_loop_is_guessed(program: Path) -> None:
    done = subprocess.run([program, "forecast"], capture_output=True, text=True)
    right, _, total = done.stdout.split()
    assert int(right) > 0.9 * int(total)


# --------------------------------------------------------------------------------------------------------- packages

PARTS = (64, 1, 1, 1, 64, 1, 9, 1)
WIDE = 400 << 20  # bytes of experts of a package that is run under a quarter of it
BUDGETS = ("least", "30%", "60%", "100%")


def least(runner: Runner) -> str:
    """The smallest budget that works, as the refusal of a smaller one names it."""
    line = runner.refusal("--prompt-tokens", "1", "--expert-ram", "1")
    return line.rsplit(" ", 1)[1].strip()


@pytest.mark.executorch
@pytest.mark.parametrize("threads", ["1", "2"])
def test_logits_and_depths_are_those_without_a_budget(int4: Runner, tmp_path: Path, threads: str) -> None:
    """To the bit, in calls of 1 and of 64 rows."""
    tokens = random_tokens(sum(PARTS), 3, FEW)
    flags = ("--parts", ",".join(map(str, PARTS)), "-t", threads)
    expected, depth = int4.feed(tokens, tmp_path / "logits", *flags)
    assert len(set(depth)) > 1
    for budget in BUDGETS:
        bounded = ("--expert-ram", least(int4) if budget == "least" else budget)
        found, own = int4.feed(tokens, tmp_path / "logits", *flags, *bounded)
        assert np.array_equal(found, expected) and np.array_equal(own, depth)


@pytest.mark.executorch
def test_python_reads_the_same_experts(int4: Runner, executorch_int4: Path) -> None:
    tokens = random_tokens(sum(PARTS), 3, FEW)
    plain, bounded = open_runtime(executorch_int4), open_runtime(executorch_int4, expert_ram="30%")
    for start, count in zip(np.cumsum((0, *PARTS)), PARTS):
        expected, found = (
            runtime.feed(tokens[start : start + count], plain.info.dials) for runtime in (plain, bounded)
        )
        assert np.array_equal(found.logits, expected.logits) and np.array_equal(found.depth, expected.depth)
    assert plain.expert_figures(1) is None  # type: ignore[attr-defined]
    figures = bounded.expert_figures(len(tokens))  # type: ignore[attr-defined]
    assert 0 < figures["resident_expert_bytes"] <= figures["budget_bytes"] <= 0.3 * figures["expert_bytes"]
    assert 0 < figures["hit_rate"] < 1 and figures["mib_read_per_token"] > 0
    assert len(figures["hit_rate_per_loop"]) == bounded.info.max_loops
    native = int4.document("--prompt-tokens", "1,2,3", "-n", "4", "--expert-ram", "30%")["expert_ram"]
    assert list(native) == list(figures) and native["budget_bytes"] == figures["budget_bytes"]
    bounded.clear_expert_figures()  # type: ignore[attr-defined]
    assert bounded.expert_figures(1)["hit_rate"] is None  # type: ignore[attr-defined]


@pytest.mark.executorch
def test_figures_for_people_and_for_programs(int4: Runner) -> None:
    shown = int4("--prompt-tokens", "1,2,3", "-n", "4", "--expert-ram", "50%", "--stats").stderr
    assert "were there when they were needed" in shown and "there when needed, by loops: 1:" in shown
    document = int4.document("--bench", "--prompt-tokens", ",".join(["1"] * 80), "-p", "64", "-n", "2", "-r", "1",
                             "--expert-ram", "50%")  # fmt: skip
    assert all(0 <= row["expert_ram"]["hit_rate"] <= 1 for row in document["rows"])


@pytest.mark.executorch
def test_what_is_no_budget(int4: Runner, fp32: Runner, executorch_int4: Path) -> None:
    tokens = ("--prompt-tokens", "1")
    assert "hold no expert" in int4.refusal(*tokens, "--expert-ram", "1") and least(int4).endswith("K")
    assert "a percentage of the experts" in int4.refusal(*tokens, "--expert-ram", "much")
    assert "no quantised experts" in fp32.refusal(*tokens, "--expert-ram", "50%")
    assert "needs --expert-ram" in int4.refusal(*tokens, "--stats")
    with pytest.raises(ArgumentError, match=r"^expert_ram: .* the smallest budget that works is") as refused:
        open_runtime(executorch_int4, expert_ram="1")
    assert_one_line(str(refused.value))


@pytest.mark.executorch
def test_a_package_that_changes_underneath(int4: Runner, executorch_int4: Path, tmp_path: Path) -> None:
    """Python's runtime, with the file touched between two tokens."""
    folder = shutil.copytree(executorch_int4, tmp_path / "own.rmse")
    runtime = open_runtime(folder, expert_ram="30%")
    runtime.feed([1], Dials(1), logits="last")
    os.utime(folder / "program.pte")
    with pytest.raises(UserError, match="was written to while it was in use") as refused:
        runtime.feed([2], Dials(1), logits="last")
    assert_one_line(str(refused.value))


@pytest.mark.executorch
def test_two_runners_of_one_package(int4: Runner) -> None:
    """Each has a budget of its own; that one is killed while it reads is nothing to the other."""
    prompt = ",".join(map(str, random_tokens(64, 3, FEW)))
    flags = ("--prompt-tokens", prompt, "--temperature", "0", "--ignore-eos", "--expert-ram", "30%")
    expected = int4.document(*flags[:-2], "-n", "32")
    killed = subprocess.Popen(
        [*int4.command, "-t", "1", *flags, "-n", "100000000"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert killed.stdout is not None and killed.stdout.read(1)
    other = subprocess.Popen(
        [*int4.command, "-t", "1", *flags, "-n", "32", "-o", "json"], stdout=subprocess.PIPE, text=True
    )
    killed.kill()
    killed.communicate()
    found = json.loads(other.communicate(timeout=120)[0])
    assert (found["tokens"], found["depth"]) == (expected["tokens"], expected["depth"])


@pytest.mark.executorch
def test_a_disk_that_takes_nothing(int4: Runner, executorch_int4: Path) -> None:
    """Mounted read-only: nothing is ever written, so a full one is as good."""
    inside = (
        'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && ! touch "$0/x" 2> /dev/null || exit 77; exec "$@"'
    )
    enter = ["unshare", "--mount", "sh", "-c", inside, str(executorch_int4)]
    if shutil.which("unshare") is None or subprocess.run([*enter, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    flags = ("--prompt-tokens", "1,2,3", "--temperature", "0", "-n", "8")
    expected = int4.document(*flags)
    found = Runner([*enter, *int4.command[:-1]], executorch_int4).document(*flags, "--expert-ram", "30%")
    assert (found["tokens"], found["depth"]) == (expected["tokens"], expected["depth"])


@pytest.fixture(scope="module")
def wide(executorch_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`executorch_int4` with WIDE bytes of experts, and more."""
    folder, script = tmp_path_factory.mktemp("wide") / "wide.rmse", LIMIT.with_name("widen.py")
    layers = Package.open(executorch_int4).manifest["quantization"]["tensors"]
    (shape,) = (
        tensor["shape"] for name, tensor in layers.items() if name.endswith("down_proj") and len(tensor["shape"]) == 3
    )
    experts, width, _ = shape
    channels = -(-WIDE // (experts * 3 * width * 9 // 16)) // 32 * 32 + 32  # 4 bits, and 16 for the scale of 32
    words = [sys.executable, script, executorch_int4, "--width", channels, "-o", folder]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.executorch
@pytest.mark.nightly
@pytest.mark.parametrize("cached", [True, False], ids=["warm", "cold"])
def test_a_runner_with_a_quarter_of_its_experts(
    runner: Path, wide: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """Under a hard limit, everything counted: the tokens and depths of a run without."""
    monkeypatch.syspath_prepend(str(LIMIT.parent))
    from limit import Limited, NoCgroup, forget

    # Few rows: what is between the two matrices of an expert this wide takes a megabyte and a half for each.
    flags = ["--prompt-tokens", ",".join(map(str, random_tokens(8, 3, FEW))), "--temperature", "0", "--ignore-eos"]
    flags += ["-n", "16", "-o", "json"]
    expected = Runner([runner], wide).document(*flags[:-2])
    forget(wide)
    if cached:
        (wide / "program.pte").read_bytes()
    try:
        with Limited(WIDE // 4) as group:
            words = group.command(str(runner), str(wide), *flags, "-t", "1", "--expert-ram", str(WIDE // 16))
            done = subprocess.run(words, capture_output=True, text=True, timeout=600)
            peak = group.peak()
    except NoCgroup as reason:
        pytest.skip(f"no cgroup: {reason}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["tokens"], found["depth"]) == (expected["tokens"], expected["depth"])
    figures = found["expert_ram"]
    assert figures["expert_bytes"] >= WIDE and figures["resident_expert_bytes"] <= WIDE // 16
    assert peak <= WIDE // 4


@pytest.mark.executorch
@pytest.mark.nightly
def test_wider_experts_say_the_same(int4: Runner, runner: Path, executorch_int4: Path, tmp_path: Path) -> None:
    """The model that runs are measured with: more to read and to multiply, the same depths and, but for rounding, logits."""
    wide, script = tmp_path / "wide.rmse", LIMIT.with_name("widen.py")
    words = [sys.executable, script, executorch_int4, "--width", "96", "-o", wide]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens = random_tokens(sum(PARTS), 3, FEW)
    expected, depth = int4.feed(tokens, tmp_path / "logits")
    found, own = Runner([runner], wide).feed(tokens, tmp_path / "logits", "--expert-ram", "30%")
    assert np.array_equal(own, depth) and np.allclose(found, expected, atol=1e-4)


@pytest.mark.executorch
@pytest.mark.parametrize("flags", [(), ("--expert-ram", "30%")], ids=["mapped", "budget"])
def test_a_program_that_becomes_shorter_under_a_runner(
    runner: Path, executorch_int4: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """What is mapped cannot be read any more, either: one line, whatever is touched first."""
    folder = shutil.copytree(executorch_int4, tmp_path / "own.rmse")
    command = [runner, folder, "--prompt-tokens", "1", "-n", "100000000", "-t", "1", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(1)
    os.truncate(folder / "program.pte", 1000)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and said.startswith(b"rmse-runner: error: ") and b"export the package again" in said
    assert_one_line(said.decode())


@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_other_targets_name_the_one_that_can(tmp_path: Path, target: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^expert_ram: the {target} runtime keeps no budget; .*executorch"):
        runtime_for(Package(tmp_path, {"target": target}, {}), expert_ram="50%")
