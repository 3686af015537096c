"""llama.cpp's environment: a virtual environment of its own, made once, since its packages are none of ours.

It is compiled here, for this machine, as a user of llama.cpp would; that takes some minutes. AMX is off: where a machine
announces its tiles and a hypervisor does not let them be used, the first prompt ends the process (SIGILL at `tilezero`).
llama.cpp's own switches are not enough for that: beside GGML_NATIVE they change nothing, since the sources ask for what
-march=native defines. So those macros are undefined, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rmse_edge.errors import UserError

from .child import ROOT

VERSION = "0.3.36"  # of llama-cpp-python, which brings the llama.cpp of its day
PINS = (f"llama-cpp-python=={VERSION}", "gguf==0.19.0", "numpy==2.4.6")
NO_AMX = ("-DGGML_AMX_TILE=OFF", "-DGGML_AMX_INT8=OFF", "-DGGML_AMX_BF16=OFF")
NOT_BUILT = ("LLAVA_BUILD", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES")
CMAKE_ARGS = " ".join(("-DGGML_NATIVE=ON", *NO_AMX, *(f"-D{part}=OFF" for part in NOT_BUILT)))
NO_AMX_MACROS = " ".join(f"-U__AMX_{part}__" for part in ("TILE", "INT8", "BF16"))
WHY_NO_AMX = "AMX is off: its tiles fail on machines that announce them and do not let them be used"
ASK = "import gguf, json, llama_cpp; print(json.dumps(llama_cpp.__version__))"


def llama_python(given: Path | None, cache: Path, say: Callable[[str], object]) -> Path:
    """The Python of an environment with llama-cpp-python and gguf: the one given, or our own, made if it is not there.

    Raises:
        UserError: it has not what is needed, or cannot be made.
    """
    if given is not None:
        return check_python(given)
    folder = cache / f"llama-cpp-python-{VERSION}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.is_file() and version_of(python) == VERSION:
        return python
    say(f"compiling llama-cpp-python {VERSION} into {folder}: once, some minutes ({WHY_NO_AMX})")
    log = cache / "llama-cpp-python.log"
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-binary", "llama-cpp-python"]
    with log.open("w") as out:
        for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], [*install, *PINS]):
            environment = os.environ | {"CMAKE_ARGS": CMAKE_ARGS, "CFLAGS": NO_AMX_MACROS, "CXXFLAGS": NO_AMX_MACROS}
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment).returncode:
                raise UserError(f"llama-cpp-python {VERSION} was not built; {log} says why")
    return python


def check_python(python: Path) -> Path:
    """Itself, if its environment has what is needed.

    Raises:
        UserError: it has not.
    """
    if (found := version_of(python)) != VERSION:
        has = f"has llama-cpp-python {found}" if found else "does not import llama-cpp-python and gguf"
        raise UserError(f"--llama-python: {python} {has}, expected llama-cpp-python {VERSION} and gguf")
    return python


def version_of(python: Path) -> str | None:
    """Of its llama-cpp-python, where gguf is there as well; None: one of them is not."""
    try:
        done = subprocess.run([str(python), "-c", ASK], capture_output=True, text=True)
    except OSError:
        return None
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def write_gguf(python: Path, module: str, shape: dict[str, int], path: Path) -> None:
    """The GGUF of a shape, by the program of this folder that writes its kind.

    Raises:
        UserError: it was not written.
    """
    part = path.with_suffix(".part")
    command = [str(python), "-m", f"benchmarks.{module}", json.dumps(shape), str(part)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{path.name} was not written: {done.stderr.strip().splitlines()[-1]}")
    part.replace(path)
