"""The load script on a model that talks, with some of its requests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from later import later
from paths import ROOT

pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'rmse-edge[serve]'")
served = later("serve.served")

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


def test_answers_under_load_are_the_models_own(tmp_path: Path):
    talker = served.write_talker(tmp_path / "talker")
    command = [sys.executable, str(ROOT / "docs/experiments/serve/load.py"), str(talker), "-n", "80", "--clients", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.search(r"first round \| (\d+) left, (\d+) refused, (\d+) whole", done.stdout)
    equal = re.search(r"equal to the model's alone \| (\d+)", done.stdout)
    assert counted and equal and min(map(int, counted.groups())) > 0
    assert int(equal[1]) >= int(counted[3]) > 30
