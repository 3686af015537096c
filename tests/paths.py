"""Where things lie; a module of its own, since `conftest` may be any of several."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "runtimes" / "native"
