"""The core on ExecuTorch packages, which the native runner runs through JNI: built for the Java of this machine, and held against
PyTorch, the Python runtime and rmse-run, as the engine of ONNX packages is.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FEW, decided_text, random_tokens, require_executorch, reseal
from kotlin_core import Core, CoreRuntime, assert_says_what_pytorch_says
from native_runner import build_folder, make_library
from paths import NATIVE, ROOT

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.archive import pack
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import UserError
from rmse_edge.export.gate.compare import agreement
from rmse_edge.loop.dials import Dials
from rmse_edge.package import Package
from rmse_edge.quantize import Quantized
from rmse_edge.runtimes import open_runtime
from rmse_edge.runtimes.engines.kernels import executorch_folder
from rmse_edge.runtimes.host.session import restore_session, save_session

pytestmark = [pytest.mark.android, pytest.mark.executorch, pytest.mark.native, pytest.mark.slow]


@pytest.fixture(scope="module")
def app(core: Core) -> Iterator[Core]:
    """The core with the runner's library beside it."""
    jdk = Path(shutil.which("javac") or "/none").resolve().parents[1]
    if not (jdk / "include" / "jni.h").is_file():
        pytest.skip("needs a JDK (apt-get install openjdk-17-jdk-headless)")
    require_executorch()
    folder = executorch_folder()
    library = make_library(folder, build_folder(folder), f"JAVA_HOME={jdk}")
    core = Core(core.java, core.classes, core.libraries, runner=library.parent)
    yield core
    core.close()


@pytest.fixture
def fp32(app: Core, executorch_package: Path, tmp_path: Path) -> Iterator[CoreRuntime]:
    runtime = CoreRuntime(app, executorch_package, tmp_path)
    yield runtime
    runtime.close()


@pytest.fixture
def int4(app: Core, executorch_int4: Path, tmp_path: Path) -> Iterator[CoreRuntime]:
    runtime = CoreRuntime(app, executorch_int4, tmp_path)
    yield runtime
    runtime.close()


# -------------------------------------------------------------------------------------------------- as PyTorch says


def test_the_core_says_what_pytorch_says(fp32: CoreRuntime, tiny: RMSE) -> None:
    """By the parity gate's exact rule, at full depth and by each exit rule, once around the ring, sessions in the middle."""
    assert fp32.info.window is not None and fp32.info.window < 200
    assert_says_what_pytorch_says(tiny, fp32, decided_text(330))


def test_a_memory_is_taught_what_pytorch_teaches_it(int4: CoreRuntime, calm: Quantized, executorch_int4: Path) -> None:
    """In int4, over three writes and a wrapped ring, with early exits: PyTorch's tokens and depths by the rule of packages that round;
    and, to the bit of a depth, logits and surprises of the Python runtime.
    """
    text, dials = random_tokens(300, seed=7, vocab=FEW), Dials(4, 1, 0.6)
    assert int4.info.window is not None and int4.info.segment is not None and 3 * int4.info.segment < 250
    python = open_runtime(executorch_int4, threads=1)
    parts = [text[:130], text[130:131], text[131:]]
    fed, known = [int4.feed(part, dials) for part in parts], [python.feed(part, dials) for part in parts]
    logits, depth = np.concatenate([f.logits for f in fed]), np.concatenate([f.depth for f in fed])
    expected = calm.model.whole_text(
        torch.from_numpy(text), {n: torch.from_numpy(v) for n, v in dials.arrays().items()}
    )
    agreement(expected.logits.numpy(), logits, np.stack([expected.depth.numpy(), depth]), [], len(text), exact=False)
    assert len(set(depth)) > 1
    assert np.array_equal(depth, np.concatenate([f.depth for f in known]))
    np.testing.assert_allclose(logits, np.concatenate([f.logits for f in known]), atol=1e-5)
    surprises = [(s.position, s.value) for f in known for s in f.surprises]
    ours = [(s.position, s.value) for f in fed for s in f.surprises]
    assert len(ours) == 4 and ours == [(position, pytest.approx(value, rel=1e-5)) for position, value in surprises]


# ------------------------------------------------------------------------------------------------ as rmse-run writes


@pytest.mark.parametrize(
    ("options", "dials"),
    [
        ({"temperature": 0.0}, {}),
        ({"seed": 2**63 + 11, "temperature": 1.3}, {}),
        ({"seed": 4, "top_k": 20}, {"exit_threshold": 0.6}),
    ],
    ids=["greedy", "a large seed", "early exit"],
)
def test_texts_are_those_of_rmse_run(
    fp32: CoreRuntime,
    executorch_package: Path,
    options: dict[str, Any],
    dials: dict[str, float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tokens, depths and statistics of 200 tokens."""
    flags = [w for name, value in (options | dials).items() for w in (f"--{name.replace('_', '-')}", str(value))]
    assert rmse_run([str(executorch_package), "-p", "HELLO", "-n", "200", "-t", "1", "-o", "json", *flags]) == 0
    expected, found = json.loads(capsys.readouterr().out), fp32.generate("HELLO", 200, dials, **options)
    same = ["tokens", "depth", "finish_reason", "histogram", "mean_loops", "prompt_mean_loops", "generated_tokens"]
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert "".join(text for text, _ in found["spans"]) == expected["text"].removeprefix("HELLO")


def test_dials_act_at_once_and_a_text_can_be_stopped(fp32: CoreRuntime) -> None:
    """From the token behind the change on; reading stops between two calls, and goes on as if it had not."""
    found = fp32.generate("HELLO", 30, when={"shallow after": 10}, temperature=0.0)
    assert max(found["depth"][:10]) > 1 and set(found["depth"][10:]) == {1}
    text, dials = random_tokens(200), vars(fp32.info.dials)
    fp32.reset()
    whole = fp32.feed(text, fp32.info.dials, logits="last")
    fp32.reset()
    some = fp32.ask("feed", tokens=text.tolist(), dials=dials, logits="last", prefix=0, calls=2)
    count = some["position"]
    assert count == 128 and some["logits"] == "" and len(some["depth"]) == count
    rest = fp32.feed(text[count:], fp32.info.dials, logits="last")
    assert np.array_equal(rest.logits, whole.logits) and np.array_equal(whole.depth, [*some["depth"], *rest.depth])


# ------------------------------------------------------------------------------------------- sessions, experts, memory


def test_sessions_go_from_python_to_the_core_and_back(int4: CoreRuntime, executorch_int4: Path, tmp_path: Path) -> None:
    """The same file, in the middle of a segment, of an int8 ring and a memory; both go on alike."""
    python, dials = open_runtime(executorch_int4, threads=1), Dials(4, 1, 0.6)
    text = random_tokens(200, seed=3, vocab=FEW)
    python.feed(text[:150], dials)
    save_session(python, tmp_path / "python")  # type: ignore[arg-type]
    assert int4.ask("restore", path=str(tmp_path / "python"))["position"] == 150
    a, b = python.feed(text[150:], dials), int4.feed(text[150:], dials)
    assert np.array_equal(a.depth, b.depth)
    np.testing.assert_allclose(a.logits, b.logits, atol=1e-5)
    int4.ask("save", path=str(tmp_path / "core"), chat="")
    python.reset()
    restore_session(python, tmp_path / "core")  # type: ignore[arg-type]
    assert python.position == 200
    content = bytearray((tmp_path / "core").read_bytes())
    content[-1] ^= 1
    (tmp_path / "core").write_bytes(content)
    with pytest.raises(UserError, match="its SHA-256 does not fit"):
        int4.ask("restore", path=str(tmp_path / "core"))
    more = text[:5]
    np.testing.assert_allclose(int4.feed(more, dials).logits, python.feed(more, dials).logits, atol=1e-5)


def test_appended_state_grows_and_goes_into_a_session(app: Core, toy_package: Path, tmp_path: Path) -> None:
    runtime, python = CoreRuntime(app, toy_package, tmp_path), open_runtime(toy_package, threads=1)
    text, dials = random_tokens(44, vocab=runtime.info.vocab_size), runtime.info.dials
    begun = runtime.ask("reset")["state_bytes"]
    expected = python.feed(text, dials)
    first = runtime.feed(text[:30], dials)
    assert runtime.ask("save", path=str(tmp_path / "s"), chat="")["state_bytes"] > begun
    runtime.reset()
    assert runtime.ask("restore", path=str(tmp_path / "s"))["position"] == 30
    found = np.concatenate([first.logits, runtime.feed(text[30:], dials).logits])
    np.testing.assert_allclose(found, expected.logits, atol=1e-5)
    runtime.close()


def test_experts_keep_to_their_budget(app: Core, int4: CoreRuntime, executorch_int4: Path, tmp_path: Path) -> None:
    """Tokens and depths stay what they are; the figures say what was there."""
    text, dials = random_tokens(100, seed=1, vocab=FEW), Dials(4)
    assert int4.ask("reset")["experts"] is None
    bounded = CoreRuntime(app, executorch_int4, tmp_path, "50%")
    a, b = int4.feed(text, dials), bounded.feed(text, dials)
    assert np.array_equal(a.logits, b.logits) and np.array_equal(a.depth, b.depth)
    experts = bounded.ask("reset")["experts"]
    assert 0 < experts["budget"] <= experts["total"] / 2 and 0 < experts["hit_rate"] < 1
    assert (
        0.9 < app.document("open", executorch_int4)["expert_bytes"] / experts["total"] <= 1
    )  # as they lie, in whole lines
    bounded.close()


def test_without_experts_no_memory_for_them_is_offered(app: Core, executorch_package: Path) -> None:
    """Those of a float model are read by an operator that knows of no budget."""
    assert app.document("open", executorch_package)["expert_bytes"] == 0


@pytest.mark.parametrize("made", ["executorch_package", "executorch_int4"])
def test_what_generating_takes_is_foreseen(app: Core, made: str, request: pytest.FixtureRequest) -> None:
    """The memory that a package is said to need is not less than it takes, nor three times as much."""
    package = request.getfixturevalue(made)
    fresh = app.serve()
    before, after = fresh.ask(["memory", str(package)])
    fresh.close()
    predicted = app.document("open", package)["predicted_bytes"]
    assert after - before <= predicted <= 3 * (after - before)


@pytest.mark.parametrize(
    ("budget", "said"), [("1K", "the smallest budget that works is"), ("much", "got 'much', expected a size")]
)
def test_a_bad_budget_is_one_line(app: Core, executorch_int4: Path, budget: str, said: str) -> None:
    assert said in app.refusal("run", executorch_int4, budget)


def test_a_bench_names_the_engine(app: Core, executorch_package: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(executorch_package, tmp_path / "bench.rmse")
    found = app.document("bench", folder, 1)
    assert found["runtime"] == "executorch-native" and found["threads"] == 1
    assert {row["test"] for row in found["loop_rows"]} == {"loop1", "loop64"}


# --------------------------------------------------------------------------------------------------------- packages


def test_an_archive_is_unpacked_and_says_its_engine(app: Core, executorch_package: Path, tmp_path: Path) -> None:
    pack(Package.open(executorch_package), tmp_path / "tiny.rmse.zip")
    (tmp_path / "store").mkdir()
    assert app.document("unpack", tmp_path / "tiny.rmse.zip", tmp_path / "store", "m")["engine"] == "ExecuTorch"
    assert app.document("load", tmp_path / "store" / "m") > 0


def test_without_the_runner_a_package_is_one_line(core: Core, executorch_package: Path) -> None:
    """As in an app that was built without the NDK."""
    line = core.refusal("open", executorch_package)
    assert "made for executorch, and this app was built without the runner of such packages" in line
    assert line.endswith("export with --target onnx")


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda f: flipped(next(f.glob("*.pte"))), "its SHA-256 is not that in SHA256SUMS"),
    "a truncated program": (lambda f: next(f.glob("*.pte")).write_bytes(b"x" * 100), "100 bytes, the manifest says"),
    "a lying manifest": (lambda f: reseal(f, lambda m: m["methods"].pop("step_1")), "step_1 among them"),
    "no program": (lambda f: reseal(f, lambda m: m["lowering"].update(program="none.pte")), "the package holds no none.pte"),
    "no ExecuTorch": (lambda f: (next(f.glob("*.pte")).write_bytes(b"x" * 100), reseal(f, lambda m: None)), ""),
    "another target": (lambda f: reseal(f, lambda m: m.update(target="coreml")), "made for coreml, and this app runs packages made for onnx and executorch"),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD)
def test_a_bad_package_is_one_line(app: Core, executorch_package: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(executorch_package, tmp_path / "bad.rmse")
    change, said = BAD[damage]
    change(folder)
    assert said in app.refusal("run", folder)


# ----------------------------------------------------------------------------------------------- the build for phones


def test_cmake_compiles_what_make_does() -> None:
    """CMakeLists.txt, which Gradle runs with the NDK, is of the files that the library here is made of."""
    demo = ROOT / "android_demo" / "native"
    listed = re.findall(r"\$\{RUNNER\}/(\S+\.cpp)", (demo / "CMakeLists.txt").read_text())
    given = {str(file.relative_to(NATIVE)) for pattern in listed for file in NATIVE.glob(pattern)}
    command = [
        "make",
        "-s",
        "-C",
        str(demo),
        "--eval=library:; @echo $(LIBRARY)",
        "library",
        "EXECUTORCH=/none",
        "BUILD=/b",
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(given) > 30 and given == {name.removeprefix("/b/").replace(".o", ".cpp") for name in made}
