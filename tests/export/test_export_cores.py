"""What an export does on a second core: the methods behind the loop, and the gate of the integers alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decisive_model
from later import later

from rmse_edge.errors import ParityError
from rmse_edge.export import ExportRequest, export_package, pipeline
from rmse_edge.export.program import ExportedMethod
from rmse_edge.quantize import Quantized, QuantizeRequest, Scheme, quantize

onnx_target = later("rmse_edge.export.onnx.lower")

pytestmark = [pytest.mark.packages, pytest.mark.onnx, pytest.mark.slow]


def request_of() -> ExportRequest:
    return ExportRequest(quant="int4")


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    return quantize(decisive_model(), QuantizeRequest(Scheme("int4"), method="rtn"))


@pytest.fixture(params=[1, 2])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So many for PyTorch. Where tests run in several processes, a thread of pytest's own waits for messages."""
    if sys.platform != "linux":
        pytest.skip("processes are copied on Linux only")
    before = torch.get_num_threads()
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def packages() -> dict[int, dict[str, bytes]]:
    """By cores, the files of what was exported; both tests of one model."""
    return {}


def test_packages_are_alike_on_one_core_and_on_two(
    quantized: Quantized,
    cores: int,
    packages: dict[int, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lowered, gates = [], []
    to_onnx, gate = onnx_target.to_onnx, pipeline.gate

    def lowers(method: ExportedMethod, *form: bool) -> Any:
        lowered.append(method.name)
        return to_onnx(method, *form)

    def compares(*args: Any) -> dict[str, Any]:
        gates.append(args)
        return gate(*args)

    monkeypatch.setattr(onnx_target, "to_onnx", lowers)
    monkeypatch.setattr(pipeline, "gate", compares)
    package = export_package(quantized.model, tmp_path / "q.rmse", request_of(), quantized=quantized)
    assert package.manifest["parity"]["integers"]["rule"] == "exact"
    # What the other process does is not seen here.
    assert ("step" in lowered, len(gates)) == ((False, 1) if cores == 2 else (True, 2))
    packages[cores] = {path.name: path.read_bytes() for path in package.folder.iterdir()}
    assert all(files == packages[cores] for files in packages.values())


@pytest.mark.parametrize("cores", [pytest.param(1, marks=pytest.mark.nightly), 2], indirect=True)
@pytest.mark.parametrize("package_too", [False, True])
def test_integers_that_fail_fail_the_export_wherever_they_are_compared(
    quantized: Quantized, cores: int, package_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = pipeline.gate

    def fails(*args: Any) -> dict[str, Any]:
        if args[2].package.manifest["lowering"]["accuracy_level"] == 0:
            raise ParityError("the integers are wrong")
        if package_too:
            raise ParityError("the package is wrong")
        return gate(*args)

    monkeypatch.setattr(pipeline, "gate", fails)
    with pytest.raises(ParityError, match=r"^the integers are wrong$"):
        export_package(quantized.model, tmp_path / "q.rmse", request_of(), quantized=quantized)
    assert not (tmp_path / "q.rmse").exists()
