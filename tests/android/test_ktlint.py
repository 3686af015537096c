"""Kotlin as ktlint wants it, by android_demo/.editorconfig."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from paths import ROOT

from android_demo.parts import PARTS, have, read_lock
from rmse_edge.errors import UserError

pytestmark = [pytest.mark.android, pytest.mark.slow]


def test_ktlint_has_nothing_to_say() -> None:
    if shutil.which("java") is None:
        pytest.skip("needs a Java runtime (apt-get install openjdk-17-jdk-headless)")
    try:
        ktlint = have(read_lock()["ktlint"], PARTS) / "resources" / "ktlint"
    except UserError as error:
        pytest.skip(f"needs ktlint, and {error}")
    command = ["java", "-jar", str(ktlint), "--relative", "android_demo/**/*.kt", "android_demo/**/*.kts"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
