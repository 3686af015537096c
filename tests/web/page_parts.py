"""What the browser's page runs on, fetched by its own script; tests are skipped where that cannot be."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from paths import ROOT

from rmse_edge.errors import UserError


@functools.cache
def page_script() -> ModuleType:
    """web_demo/__main__.py as a module."""
    spec = importlib.util.spec_from_file_location("web_demo_main", ROOT / "web_demo" / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fetched() -> Path:
    """The folder of the parts."""
    pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'rmse-edge[serve]'")
    if shutil.which("node") is None:
        pytest.skip("needs node")
    try:
        return page_script().fetched()
    except UserError as error:
        pytest.skip(str(error))
