"""The Kotlin core of android_demo/, compiled against Android's API and run on desktop Java, with the app's own ONNX Runtime."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bionic import make_libraries
from filelock import FileLock
from helpers import assert_one_line
from paths import ROOT

from android_demo.parts import LOCK, PARTS, have, read_lock
from rmse_edge.errors import UserError
from rmse_edge.export.gate.compare import compare, settings_for
from rmse_edge.export.gate.reference import Reference
from rmse_edge.info import ModelInfo
from rmse_edge.loop.dials import Dials
from rmse_edge.package import Package
from rmse_edge.runtimes.host.base import Arrays, Fed, Surprise
from rmse_edge.runtimes.host.signatures import read_model

NEEDED = ("kotlin", "api", "gson", "onnxruntime")  # of android_demo/parts.lock
SOURCES = tuple(ROOT / "android_demo" / "core" / "src" / kind / "kotlin" for kind in ("main", "test"))
DRIVER, CLASSES, LIBRARIES = "driver.jar", "onnxruntime.jar", "libraries"  # in the folder of `build`
ENGINE = ("libonnxruntime.so", "libonnxruntime4j_jni.so")
COMPILER = ("gcc", "readelf")  # makes the C library that Android's libraries ask for
GSON = PARTS / "gson" / "usr" / "share" / "java" / "gson.jar"
STDLIB = PARTS / "kotlin" / "lib" / "kotlin-stdlib.jar"
JAVA_FLAGS = ("-Xmx1g", "-XX:+UseSerialGC")
MAIN = "dev.rmseedge.core.DriverKt"


def missing() -> str:
    """Why the core cannot be compiled and run here; empty: it can. Fetches what is not there yet."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "needs Linux on x86-64"
    if shutil.which("java") is None:
        return "needs a Java runtime (apt-get install openjdk-17-jdk-headless)"
    if lacking := [tool for tool in COMPILER if shutil.which(tool) is None]:
        return f"needs {lacking[0]} (apt-get install gcc)"
    try:
        for name in NEEDED:
            have(read_lock()[name], PARTS)
    except UserError as error:
        return f"needs parts of android_demo/parts.lock, and {error}"
    return ""


def built() -> Path:
    """The folder with the core and the tests' driver compiled, once for these sources and parts."""
    sources = [file for source in SOURCES for file in sorted(source.rglob("*.kt"))]
    known = hashlib.sha256(b"".join(file.read_bytes() for file in (LOCK, *sources))).hexdigest()[:16]
    folder = ROOT / "build" / "android" / f"tests-{known}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                build(Path(scratch) / "made")
                (Path(scratch) / "made").rename(folder)
    return folder


def build(folder: Path) -> None:
    """Compile them without a warning, and lay out ONNX Runtime for this machine's processor."""
    libraries = folder / LIBRARIES
    libraries.mkdir(parents=True)
    with zipfile.ZipFile(PARTS / "onnxruntime" / "Plugins" / "Android" / "onnxruntime.aar") as archive:
        (folder / CLASSES).write_bytes(archive.read("classes.jar"))
        for name in ENGINE:
            (libraries / name).write_bytes(archive.read(f"jni/x86_64/{name}"))
    make_libraries([libraries / name for name in ENGINE], libraries, "x86_64")
    command = [ROOT / "android_demo" / "compile.sh", folder / DRIVER, f"{folder / CLASSES}:{GSON}", *SOURCES]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Core:
    """Kotlin of the demo on a Java of the caller's.

    Args:
        java: the command that starts it.
        classes: what it runs.
        libraries: the folder of ONNX Runtime's native ones and of what they ask for.
        main: whose `main` answers; the core's own driver if not given.
        runner: the folder of the library that runs ExecuTorch packages; None: there is none, as in an app built without the NDK.
    """

    def __init__(
        self,
        java: Sequence[str],
        classes: Sequence[Path],
        libraries: Path,
        main: str = MAIN,
        runner: Path | None = None,
    ) -> None:
        self.java, self.classes, self.libraries = java, classes, libraries
        native = [f"-Donnxruntime.native.path={libraries}", f"-Djava.library.path={runner or libraries}"]
        self._command = [*java, *JAVA_FLAGS, *native, "-cp", ":".join(map(str, classes)), main]
        self._commands: Server | None = None

    @staticmethod
    def desktop(folder: Path) -> Core:
        """In a folder that `build` made."""
        return Core(["java"], [folder / DRIVER, folder / CLASSES, GSON, STDLIB], folder / LIBRARIES)

    def serve(self, *arguments: object) -> Server:
        """A process of it that answers what it is asked: without arguments commands, otherwise of the package given."""
        # ONNX Runtime's libraries ask for others by name.
        environment = os.environ | {"LD_LIBRARY_PATH": str(self.libraries)}
        return Server([*self._command, *map(str, arguments)], environment)

    def document(self, *arguments: object) -> Any:
        """What a command gives.

        Raises:
            UserError: what the core refuses, in its own words.
        """
        self._commands = self._commands or self.serve()
        return self._commands.ask(list(map(str, arguments)))

    def refusal(self, *arguments: object) -> str:
        """The one line that it says of bad input."""
        with pytest.raises(UserError) as caught:
            self.document(*arguments)
        assert_one_line(str(caught.value))
        return str(caught.value)

    def close(self) -> None:
        if self._commands is not None:
            self._commands.close()


class Server:
    """A process that answers JSON documents, one on a line."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
        assert self._answer() == {"ready": True}

    def ask(self, document: Any) -> Any:
        """
        Raises:
            UserError: what the core refuses, in its own words.
        """
        self._process.stdin.write(json.dumps(document) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if isinstance(answer, dict) and "error" in answer:
            raise UserError(answer["error"])
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(60) == 0

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        assert line, f"the core ended with {self._process.wait()}"
        return json.loads(line)


class CoreRuntime:
    """The core on a package, as the parity gate drives a `LoopRuntime`: its state is taken out and put back through session files."""

    def __init__(self, core: Core, folder: Path, scratch: Path, *expert_memory: str) -> None:
        self.info: ModelInfo = read_model(Package.open(folder))
        self.position = 0
        self.session = str(scratch / "kept.session")
        self._server = core.serve(folder, *expert_memory)

    def close(self) -> None:
        self._server.close()

    def ask(self, what: str, **more: Any) -> dict[str, Any]:
        """Raises as `Server.ask`."""
        return self._server.ask({"do": what} | more)

    # ------------------------------------------------------------------------------------------ as a LoopRuntime

    def reset(self) -> None:
        self.position = self.ask("reset")["position"]

    def feed(self, tokens: Sequence[int] | np.ndarray, dials: Dials, logits: str = "all", prefix: int = 0) -> Fed:
        fed = self.ask("feed", tokens=[int(t) for t in tokens], dials=vars(dials), logits=logits, prefix=prefix)
        self.position = fed["position"]
        values = np.frombuffer(base64.b64decode(fed["logits"]), "<f4").reshape(-1, self.info.vocab_size)
        surprises = [Surprise(position, value, 0.0, 0.0, 0.0) for position, value in fed["surprises"]]
        return Fed(values, np.array(fed["depth"]), fed["iterations"], [], surprises)

    def tensors(self) -> Arrays:
        """Nothing: what is kept goes to a session file, which `restore` takes."""
        self.ask("save", path=self.session, chat="")
        return {}

    def restore(self, position: int, tensors: Arrays) -> None:
        assert self.ask("restore", path=self.session)["position"] == position
        self.position = position

    # ------------------------------------------------------------------------------------------------- texts

    def generate(
        self,
        prompt: str,
        count: int,
        dials: Mapping[str, float] | None = None,
        stop: Sequence[str] = (),
        when: Mapping[str, int] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """What it writes, under the names of `rmse-run -o json`.

        Args:
            when: "shallow after" or "stop after": tokens after which a dial is turned to one loop, or the text is stopped.
            options: the sampler's.
        """
        given = {name: str(value) if name == "seed" else value for name, value in options.items()}
        return self.ask(
            "generate", prompt=prompt, count=count, dials=dials or {}, options=given, stop=[*stop], **(when or {})
        )


def assert_says_what_pytorch_says(model: Any, runtime: CoreRuntime, text: np.ndarray) -> None:
    """By the parity gate's exact rule, at full depth and by each exit rule that the model has: logits, depths, surprises."""
    reference = Reference(model, runtime.info, text)
    depths = []
    for dials in settings_for(reference, text).values():
        found = compare(reference, runtime, text, dials, exact=True)  # type: ignore[arg-type]
        assert found["positions"] >= 200 and found["same_depth"] == 1 and found["undecided"] == []
        assert found["max_logit_difference"] <= 1e-4
        depths.append(found["depth_sd"])
    assert max(depths) > 0.5 and depths[0] == 0
