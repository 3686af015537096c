"""The Android app, built as users build it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kotlin_core import missing
from paths import ROOT

from android_demo.parts import PARTS, have, read_lock
from rmse_edge.errors import UserError

DEMO = ROOT / "android_demo"
OF_TESTS = ("ktlint", "java-arm64", "enjarify")  # parts that the app is not made of


def fetch(*names: str) -> None:
    """Skip the test unless these parts are there, or can be had."""
    try:
        for name in names:
            have(read_lock()[name], PARTS)
    except UserError as error:
        pytest.skip(f"needs parts of android_demo/parts.lock, and {error}")


def built(*flags: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [str(DEMO / "build_apk.sh"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == code, done.stdout + done.stderr
    return done


def build(archive: Path, path: Path) -> Path:
    """The app with this package inside, or a skip."""
    if why := missing():
        pytest.skip(why)
    if shutil.which("javac") is None:
        pytest.skip("needs a JDK (apt-get install openjdk-17-jdk-headless)")
    fetch(*(name for name in read_lock() if name not in OF_TESTS))
    built("-m", str(archive), "-o", str(path))
    return path
