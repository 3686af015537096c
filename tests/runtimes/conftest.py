"""The runner, for all files of tests that start it."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import pytest
from native_runner import ROOT, Runner, make


@pytest.fixture(scope="session")
def runner() -> Path:
    """Built against this interpreter's ExecuTorch."""
    from rmse_edge.runtimes.engines.kernels import executorch_folder

    for tool in ("make", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    folder = executorch_folder()
    return make(folder, ROOT / "build" / f"native-{zlib.crc32(str(folder).encode()):08x}")


@pytest.fixture
def fp32(runner: Path, executorch_package: Path) -> Runner:
    return Runner([runner], executorch_package)


@pytest.fixture
def int4(runner: Path, executorch_int4: Path) -> Runner:
    return Runner([runner], executorch_int4)
