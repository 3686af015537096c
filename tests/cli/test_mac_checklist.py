"""docs/mac_checklist from one end to the other, with stand-ins for Core ML: its classes over our interpreter."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import assert_one_line
from later import later
from paths import ROOT

from rmse_edge.package import Package, seal
from rmse_edge.runtimes.engines.coreml import CoremlRuntime
from rmse_edge.runtimes.mil.file import ModelFile, Operation
from rmse_edge.runtimes.mil.interpreter import Interpreter

ct = later("coremltools")
compute_device = later("coremltools.models.compute_device")
compute_plan = later("coremltools.models.compute_plan")

pytestmark = [pytest.mark.coreml, pytest.mark.slow]

FEW = ["--tokens", "12", "--repeats", "1"]
CHECKS = ["loading", "functions against the interpreter", "states", "text against the interpreter", "latency",
          "greedy decoding", "compute plan"]  # fmt: skip

# ----------------------------------------------------------------------------------------------------- stand-ins


class State:
    """coremltools' MLState over arrays."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def read_state(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise RuntimeError(f"no state {name}")
        return self.arrays[name].copy()

    def write_state(self, name: str, value: np.ndarray) -> None:
        own = self.arrays.get(name)
        if own is None or not isinstance(value, np.ndarray) or (value.shape, value.dtype) != (own.shape, own.dtype):
            raise RuntimeError(f"cannot write state {name}")
        own[:] = value


class Compiled:
    """coremltools' CompiledMLModel, as strict about what it is given."""

    interpreters: dict[str, Interpreter] = {}
    loaded: list[tuple[str, str]] = []  # (compute units, function)

    def __init__(
        self,
        path: str,
        compute_units: ct.ComputeUnit | None = None,
        function_name: str | None = None,
        optimization_hints: dict | None = None,
        asset: Any = None,
    ) -> None:
        assert isinstance(path, str) and path.endswith(".mlmodelc") and asset is None and optimization_hints is None
        compute_units = compute_units or ct.ComputeUnit.ALL
        assert isinstance(compute_units, ct.ComputeUnit) and isinstance(function_name, str)
        source = source_of(path)
        self.name = function_name
        if source not in self.interpreters:
            self.interpreters[source] = Interpreter(source)
        self.interpreter = self.interpreters[source]
        if function_name not in self.interpreter.functions:
            raise RuntimeError(f"Error: function {function_name} is not in the model")
        self.loaded.append((compute_units.name, function_name))

    def predict(self, data: dict[str, np.ndarray], state: State | None = None) -> dict[str, np.ndarray]:
        assert type(data) is dict
        signature = self.interpreter.signature(self.name)
        if signature.states and state is None:
            raise RuntimeError(f"{self.name} has states; none were given")
        if state is not None and not signature.states:
            raise RuntimeError(f"{self.name} has no states; some were given")
        given = {name: data[name] for name in signature.inputs}
        held = None if state is None else {name: state.arrays[name] for name in signature.states}
        return self.computed(given, held)

    def computed(self, given: dict[str, np.ndarray], held: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        return self.interpreter.predict(given, held, self.name)

    def make_state(self) -> State:
        return State(self.interpreter.make_state(self.name))


class Wrong(Compiled):
    """Its iteration gives wrong numbers."""

    def computed(self, given: dict[str, np.ndarray], held: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        results = super().computed(given, held)
        return results | ({"next_h": 1.5 * results["next_h"]} if self.name.startswith("step_") else {})


class Forgetful(Compiled):
    """What it writes into states is lost."""

    def computed(self, given: dict[str, np.ndarray], held: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        return super().computed(given, held and {name: array.copy() for name, array in held.items()})


class Refusing(Compiled):
    """One of its functions cannot be loaded."""

    def __init__(self, path: str, compute_units: Any = None, function_name: str | None = None) -> None:
        if function_name == "memorize_64":
            raise RuntimeError("Error computing NN outputs.\nmemorize_64 | broken")
        super().__init__(path, compute_units, function_name)


class Plan:
    """coremltools' MLComputePlan: of the package's default function only, and of no constant."""

    def __init__(self, file: ModelFile, units: ct.ComputeUnit) -> None:
        self.default, self.units = file.default_function, units
        # Of the others, the script is to see nothing that is placed.
        functions = {name: compute_plan.MLModelStructureProgramFunction([], self.block([])) for name in file.functions}
        found = [Operation("", str(i), op) for i, op in enumerate(file.function(self.default).block.operations)]
        functions[self.default] = compute_plan.MLModelStructureProgramFunction([], self.block(found))
        program = compute_plan.MLModelStructureProgram(functions)
        self.model_structure = SimpleNamespace(program=program)

    @classmethod
    def load_from_path(cls, path: str, compute_units: ct.ComputeUnit | None = None) -> Plan:
        compute_units = compute_units or ct.ComputeUnit.ALL
        assert isinstance(path, str) and isinstance(compute_units, ct.ComputeUnit)
        return cls(ModelFile(source_of(path)), compute_units)

    def block(self, found: list[Operation]) -> Any:
        operations = []
        for op in found:
            blocks = [self.block(op.inside(called, block)) for called, block in op.blocks()]
            operations.append(compute_plan.MLModelStructureProgramOperation({}, f"ios18.{op.kind}", [], blocks, None))
        return compute_plan.MLModelStructureProgramBlock([], operations, [])

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        if operation.operator_name.endswith(".const"):
            return None
        cpu, ane = (object.__new__(getattr(compute_device, f"ML{n}ComputeDevice")) for n in ("CPU", "NeuralEngine"))
        both = self.units is ct.ComputeUnit.CPU_AND_NE and not operation.operator_name.endswith(".topk")
        return compute_plan.MLComputePlanDeviceUsage(ane if both else cpu, [cpu, ane] if both else [cpu])

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        return compute_plan.MLComputePlanCost(0.01)


def source_of(compiled: str) -> str:
    """The `.mlpackage` that was compiled."""
    return (Path(compiled) / "source").read_text(encoding="utf-8")


def compile_into(scratch: Path, model: str, destination_path: str | None = None) -> str:
    """coremltools' `compile_model`: what it leaves works on when the package is deleted."""
    assert isinstance(model, str) and model.endswith(".mlpackage") and Path(model).is_dir()
    assert destination_path is None or destination_path.endswith(".mlmodelc")
    folder = Path(destination_path or tempfile.mkdtemp(".mlmodelc", dir=scratch))
    folder.mkdir(exist_ok=True)
    source = Path(model)
    if source.parent.suffix != ".rmse":  # a copy that the script made
        source = Path(shutil.copytree(model, folder / "program.mlpackage"))
    (folder / "source").write_text(str(source), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def checklist() -> ModuleType:
    """The script as a module, found beside its others as `python docs/mac_checklist` finds them."""
    folder = ROOT / "docs" / "mac_checklist"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("mac_checklist", folder / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mac(checklist: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Core ML's place is taken by the interpreter, and the script believes that this is a Mac."""
    answers = {
        "system": "Darwin",
        "mac_ver": ("15.1", ("", "", ""), "arm64"),
        "machine": "arm64",
        "python_version": "3",
    }
    stand_in = SimpleNamespace(**{name: lambda value=value: value for name, value in answers.items()})
    monkeypatch.setattr(checklist, "platform", stand_in)
    monkeypatch.setattr(sys.modules["facts"], "platform", stand_in)
    monkeypatch.setattr("rmse_edge.runtimes.engines.coreml.platform", stand_in)
    monkeypatch.setattr(ct.models, "CompiledMLModel", Compiled)
    monkeypatch.setattr(ct.models.utils, "compile_model", partial(compile_into, tmp_path))
    monkeypatch.setattr(compute_plan, "MLComputePlan", Plan)
    monkeypatch.setattr(Compiled, "loaded", [])
    return monkeypatch


def verdicts(report: str) -> dict[str, str]:
    """The table at the top: verdicts by check."""
    rows = [line.strip("| ").split(" | ", 1) for line in report.splitlines() if line.startswith("| ")]
    start = rows.index(["check", "verdict"])
    found: dict[str, str] = {}
    for row in rows[start + 2 :]:
        if row == ["function", "first load, ms | second load, ms"]:
            break
        found[row[0]] = row[1]
    return found


def section(report: str, title: str) -> str:
    return report.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


# --------------------------------------------------------------------------------------------------------- tests


def test_all_is_ok_on_every_compute_unit(
    checklist: ModuleType, mac: pytest.MonkeyPatch, coreml_int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A package with states: the whole report, on stdout and in the file, and every function loaded on every unit."""
    mac.setattr(sys.modules["checks"], "EARLY", 10.0)  # timings of a test machine prove nothing
    mac.setattr(sys.modules["checks"].Unit, "greedy", lambda self, dials: (float(2 - dials.exit_threshold), 1.0))
    output = tmp_path / "report.md"
    assert checklist.main([str(coreml_int4), "-o", str(output), *FEW]) == 0
    printed = capsys.readouterr()
    assert printed.out == output.read_text(encoding="utf-8") and "ane: states ..." in printed.err
    found = verdicts(printed.out)
    assert found == {"compiling": "ok"} | {
        f"{unit}: {check}": "ok" for unit in ("cpu", "gpu", "ane") for check in CHECKS
    }
    manifest = json.loads((coreml_int4 / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["model"]["fingerprint"] in section(printed.out, "package")
    assert "macOS: 15.1" in section(printed.out, "machine")
    wanted = {(unit, name) for unit in sys.modules["plan"].UNITS.values() for name in manifest["methods"]}
    assert set(Compiled.loaded) == wanted
    functions = section(printed.out, "gpu: functions against the interpreter")
    assert all(f"| {name} | 0.0e+00 | 0.0e+00 |" in functions for name in manifest["methods"])
    plan = section(printed.out, "ane: compute plan")
    assert all(f"| {name} | " in plan for name in manifest["methods"]) and "topk 2 (cannot)" in plan
    assert "| loop_1, 1 of 4 loops |" in section(printed.out, "cpu: latency")
    assert "| adaptive | in the graph | 4, single tokens | 100.0% | 100.0% | 0 | 0 |" in printed.out


def test_a_package_without_states_and_early_exit_that_shows(
    checklist: ModuleType, mac: pytest.MonkeyPatch, coreml_package: Path, capsys: pytest.CaptureFixture
) -> None:
    """fp32 is held to the exact rule; the loop takes less time where it stops early, as the interpreter's does."""
    assert checklist.main([str(coreml_package), "--compute", "cpu", "--tokens", "16", "--repeats", "5"]) == 0
    report = capsys.readouterr().out
    found = verdicts(report)
    assert found["cpu: states"].startswith("skipped: the package keeps no states")
    assert {v for check, v in found.items() if check != "cpu: states"} == {"ok"}
    assert "largest at most 1e-03" in report and "loop_1 stopped at 1 of 4 loops takes 0." in report
    rows = [line for line in section(report, "cpu: greedy decoding").splitlines() if "adaptive" in line]
    assert len(rows) == 2 and all(row.endswith(" x |") for row in rows)


@pytest.mark.parametrize(
    ("stand_in", "failing", "message"),
    [
        (
            Wrong,
            ["functions against the interpreter", "states", "text against the interpreter"],
            "step_1: next_h differs",
        ),
        (
            Forgetful,
            ["functions against the interpreter", "states", "text against the interpreter"],
            "does not see what",
        ),
        (Refusing, ["loading", "functions against the interpreter", "latency"], "memorize_64 \\| broken"),
    ],
)
def test_what_is_wrong_shows(
    checklist: ModuleType,
    mac: pytest.MonkeyPatch,
    coreml_int4: Path,
    capsys: pytest.CaptureFixture,
    stand_in: type[Compiled],
    failing: list[str],
    message: str,
) -> None:
    """In one line of the report, and no check stops the others."""
    mac.setattr(ct.models, "CompiledMLModel", stand_in)
    mac.setattr(sys.modules["checks"], "EARLY", 10.0)
    mac.setattr(sys.modules["checks"].Unit, "greedy", lambda self, dials: (float(2 - dials.exit_threshold), 1.0))
    assert checklist.main([str(coreml_int4), "--compute", "cpu", *FEW]) == 1
    found = verdicts(capsys.readouterr().out)
    assert list(found) == ["compiling", *(f"cpu: {check}" for check in CHECKS)]
    failed = [check.removeprefix("cpu: ") for check, verdict in found.items() if verdict.startswith("**FAILED**")]
    assert failed == failing
    assert message in " ".join(found.values())


def test_a_loop_that_does_not_stop_early_shows(
    checklist: ModuleType, mac: pytest.MonkeyPatch, coreml_int4: Path, capsys: pytest.CaptureFixture
) -> None:
    mac.setattr(sys.modules["checks"], "timed", lambda call, repeats: [1.0] * repeats)
    mac.setattr(sys.modules["checks"].Unit, "greedy", lambda self, dials: (10.0, 1.5))
    assert checklist.main([str(coreml_int4), "--compute", "ane", *FEW]) == 1
    found = verdicts(capsys.readouterr().out)
    assert "loop_1 stopped at 1 of 4 loops takes 1.00 of the full time" in found["ane: latency"]
    assert "loop in the graph: 1.50 of 4 loops are no faster than all of them" in found["ane: greedy decoding"]


def test_core_ml_that_does_not_compile_leaves_a_whole_report(
    checklist: ModuleType, mac: pytest.MonkeyPatch, coreml_package: Path, capsys: pytest.CaptureFixture
) -> None:
    def broken(model: str, destination_path: str | None = None) -> str:
        raise RuntimeError("Error compiling model:\nunsupported op")

    mac.setattr(ct.models.utils, "compile_model", broken)
    assert checklist.main([str(coreml_package), "--compute", "cpu", *FEW]) == 1
    found = verdicts(capsys.readouterr().out)
    assert found["compiling"] == "**FAILED**: RuntimeError: Error compiling model: unsupported op"
    assert len(found) == 1 + len(CHECKS) and "cannot compile it" in found["cpu: text against the interpreter"]


def test_the_engine_reads_and_writes_states_through_core_ml(mac: pytest.MonkeyPatch, coreml_int4: Path) -> None:
    """CoremlRuntime on Core ML's classes: the same numbers, and what it was fed is restored on the interpreter."""
    package = Package.open(coreml_int4)
    runtimes = [CoremlRuntime(package, engine=engine) for engine in ("coreml", "interpreter")]
    ids = np.arange(10) % runtimes[0].info.vocab_size
    fed = [runtime.feed(ids, runtime.info.dials) for runtime in runtimes]
    np.testing.assert_array_equal(fed[0].logits, fed[1].logits)
    runtimes[1].reset()
    runtimes[1].restore(10, runtimes[0].tensors())
    fed = [runtime.feed([1], runtime.info.dials) for runtime in runtimes]
    np.testing.assert_array_equal(fed[0].logits, fed[1].logits)


# --------------------------------------------------------------------------------------------------- user errors


def refused(checklist: ModuleType, capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert checklist.main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err


def test_elsewhere_than_on_a_mac_one_line_says_so(checklist: ModuleType, capsys: pytest.CaptureFixture) -> None:
    message = refused(checklist, capsys, "any.rmse")
    assert_one_line(message, "mac_checklist: error: needs macOS 15", "rmse-run and rmse-export use the interpreter")


def test_wrong_arguments_are_one_line(
    checklist: ModuleType, mac: pytest.MonkeyPatch, coreml_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert_one_line(refused(checklist, capsys, tmp_path / "no.rmse"), "no.rmse: no such package folder")
    assert_one_line(refused(checklist, capsys, coreml_package, "--compute", "cpu,npu"), "got 'npu'", "cpu, gpu, ane")
    assert_one_line(refused(checklist, capsys, coreml_package, "--tokens", 3), "--tokens: got 3, expected at least 12")
    assert_one_line(
        refused(checklist, capsys, coreml_package, "-o", tmp_path / "no" / "x.md"), "-o: ", "folder that exists"
    )
    mac.setattr(checklist.platform, "mac_ver", lambda: ("14.5", ("", "", ""), "arm64"))
    assert_one_line(refused(checklist, capsys, coreml_package), "needs macOS 15 or later, this is 14.5")


def test_a_package_of_another_target_is_refused(
    checklist: ModuleType, mac: pytest.MonkeyPatch, coreml_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = tmp_path / "other.rmse"
    shutil.copytree(coreml_package, copy)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    seal(copy, manifest | {"target": "onnx"})
    assert_one_line(refused(checklist, capsys, copy), "other.rmse: made for onnx", "--target coreml")
