"""What the report says of the machine and of the package."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rmse_edge.package import MANIFEST, Package


def sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed (run from a folder)"


def machine() -> dict[str, str]:
    memory = sysctl("hw.memsize")
    return {
        "macOS": platform.mac_ver()[0],
        "chip": sysctl("machdep.cpu.brand_string") or platform.machine(),
        "memory": f"{int(memory) / 2**30:.0f} GiB" if memory.isdigit() else "unknown",
        "Python": platform.python_version(),
        **{name: installed(name) for name in ("coremltools", "numpy", "rmse-edge")},
    }


def described(package: Package) -> dict[str, Any]:
    model, lowering = package.manifest["model"], package.manifest["lowering"]
    weights = [package.path(name).stat().st_size for name in package.digests if name.endswith("weight.bin")]
    return {
        "name": f"{model['name']}, {model['parameters']:,} parameters, {model['max_loops']} loops",
        "target": package.target,
        "quant": model["quant"],
        "laid out for": lowering["compute"],
        "bytes": f"{package.nbytes:,}, of which weights {sum(weights):,}",
        "fingerprint": model["fingerprint"],
        "sha256 of the manifest": package.digests[MANIFEST],
        "states": ", ".join(f"{name} {ring['shape']}" for name, ring in lowering["rings"].items()) or "none",
        "structure": lowering.get("structure", "not counted"),
        "functions": ", ".join(package.manifest["methods"]),
        "made with": ", ".join(f"{k} {v}" for k, v in package.manifest["versions"].items()),
    }
