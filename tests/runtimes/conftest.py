"""The runner on packages that several files of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_runner import Runner


@pytest.fixture
def fp32(runner: Path, executorch_package: Path) -> Runner:
    return Runner([runner], executorch_package)


@pytest.fixture
def int4(runner: Path, executorch_int4: Path) -> Runner:
    return Runner([runner], executorch_int4)
