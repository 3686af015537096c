"""Compiles and loads what ExecuTorch packages need besides the `executorch` wheel: the kernels in runtimes/native.

The wheel brings headers and libraries, so a C++ compiler is all it takes. The library is made once, on first use, and kept
in the user's cache folder under a name that says what it was made from.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rmse_edge.cache import cache_folder
from rmse_edge.errors import FileError, UserError
from rmse_edge.files import new_file

NATIVE = Path(__file__).parent.with_name("native")
# All kernels, as the Makefile takes them, what bounds the memory of experts, and the operators around them.
PARTS = ("kernels/*.cpp", "kernels/*.h", "offload/*.cpp", "offload/*.h", "executorch/operators.*", "core/errors.h", "core/opened_file.*")  # fmt: skip
FILES = sorted(file for part in PARTS for file in NATIVE.glob(part))
# Without contraction every processor rounds alike. The macros are those that the wheel itself was built with.
FLAGS = (
    "-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-DC10_USING_CUSTOM_GENERATED_MACROS",
    "-DET_USE_THREADPOOL", "-DET_EVENT_TRACER_ENABLED",
)  # fmt: skip
LIBRARIES = ("executorch", "executorch_threadpool", "executorch_kernels_quantized")  # the last one for embeddings
COMPILERS = ("c++", "g++", "clang++")
SIGNS = ("error:", "cannot find", "undefined reference")  # of the line that says why a compiler failed


def executorch_folder() -> Path:
    """Where the wheel's headers and libraries are.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("executorch is not installed; install it with: pip install 'rmse-edge[executorch]'")
    return Path(next(iter(spec.submodule_search_locations)))


def bindings() -> Any:
    """The wheel's Python bindings of the runtime.

    Not through `executorch.runtime`, which imports the exporter too: seconds, and its warnings.

    Raises:
        UserError: the wheel is not installed.
    """
    executorch_folder()
    import torch  # noqa: F401  (the bindings use its libraries)
    from executorch.extension.pybindings import _C

    return _C


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """Register the operators with the ExecuTorch runtime of this process; compiles them first where that was not done.

    Raises:
        UserError: the wheel is not installed, there is no compiler, or it fails.
    """
    bindings()  # the runtime must be there before
    path = compiled()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be loaded ({error}); remove it, it is made anew") from None
    library.rmse_instruction_set.restype = ctypes.c_char_p
    library.rmse_last_error.restype = ctypes.c_char_p
    library.rmse_take_messages()
    return library


def compiled() -> Path:
    """The path of the compiled library, made if it is not there yet."""
    folder = executorch_folder()
    made_from = [importlib.metadata.version("executorch"), str(folder), platform.machine(), *FLAGS, *LIBRARIES]
    digest = hashlib.sha256("\n".join(made_from).encode())
    for file in FILES:
        digest.update(file.read_bytes())
    path = cache_folder() / f"rmse-edge-kernels-{digest.hexdigest()[:16]}.so"
    if not path.is_file():
        compile_to(path, folder)
    return path


def compile_to(path: Path, folder: Path) -> None:
    """Compile into `path`, all or nothing: other processes may be doing the same.

    Raises:
        UserError: no compiler, no place to write to, or an error in the compilation (its first line).
    """
    named = shlex.split(os.environ.get("CXX", ""))
    compiler = next((c for c in ([named] if named else [[c] for c in COMPILERS]) if shutil.which(c[0])), None)
    if compiler is None:
        raise UserError(
            f"ExecuTorch packages need a C++ compiler once ({' '.join(named) or ', '.join(COMPILERS)} not found); install "
            "one (Debian: apt install g++) or set CXX"
        )
    include = folder / "include"
    command = [*compiler, *FLAGS]
    for where in (include, include / "executorch" / "runtime" / "core" / "portable_type" / "c10"):
        command += ["-isystem", str(where)]
    command += [str(file) for file in FILES if file.suffix == ".cpp"]
    command += [f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-Wl,--no-as-needed"]
    command += [f"-l{name}" for name in LIBRARIES]
    print("rmse-edge: compiling the kernels for ExecuTorch packages (once)", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as part:
            done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.splitlines() or ["it gave no reason"]
                reason = next((line for line in lines if any(sign in line for sign in SIGNS)), lines[0])
                raise UserError(f"{' '.join(compiler)} cannot compile the kernels for ExecuTorch packages: {reason}")
    except (OSError, FileError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path.parent}: cannot be written ({reason}); set RMSE_EDGE_CACHE to a folder") from None
