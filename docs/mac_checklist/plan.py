"""Where Core ML means to run what."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmse_edge.errors import UserError, quiet

UNITS = {"cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ane": "CPU_AND_NE"}
DEVICES = {"cpu": "CPU", "gpu": "GPU", "ane": "NeuralEngine"}  # as coremltools' classes for them begin behind "ML"


def coremltools() -> Any:
    """
    Raises:
        UserError: it is not installed.
    """
    try:
        with quiet():
            import coremltools as ct
    except ImportError:
        raise UserError("coremltools is not installed; install it with: pip install 'rmse-edge[coreml]'") from None
    return ct


@dataclass
class Placement:
    """What Core ML plans for a function, nested blocks included."""

    operations: Counter[str] = field(default_factory=Counter)  # by the device that is preferred
    cost: dict[str, float] = field(default_factory=lambda: dict.fromkeys(DEVICES.values(), 0.0))  # share of all work
    # By operator, the device that is preferred, and those that could run it.
    kinds: Counter[tuple[str, str, frozenset[str]]] = field(default_factory=Counter)

    def off(self, wanted: str, most: int = 12) -> list[str]:
        """Operators that are not on a device, the most frequent first: `topk 2 (cannot)`."""
        found: Counter[tuple[str, bool]] = Counter()
        for (kind, device, able), count in self.kinds.items():
            if device != wanted:
                found[kind, wanted in able] += count
        return [f"{kind} {count}{'' if able else ' (cannot)'}" for (kind, able), count in found.most_common(most)]


def load_plan(compiled: Path, compute: str) -> Any:
    """Core ML's plan for a `.mlmodelc`."""
    from coremltools.models.compute_plan import MLComputePlan

    return MLComputePlan.load_from_path(str(compiled), coremltools().ComputeUnit[UNITS[compute]])


def placement(plan: Any, function: str) -> Placement:
    """What a plan says about a function; nothing, where Core ML did not plan that one.

    Raises:
        ValueError: the plan does not know the function.
    """
    program = plan.model_structure.program
    if program is None or function not in program.functions:
        raise ValueError(f"the plan has no function {function}")
    placed = Placement()
    for operation in nested(program.functions[function].block):
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        if usage is None:  # constants
            continue
        device = device_name(usage.preferred_compute_device)
        cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
        placed.operations[device] += 1
        placed.cost[device] = placed.cost.get(device, 0.0) + (cost.weight if cost is not None else 0.0)
        able = frozenset(device_name(d) for d in usage.supported_compute_devices)
        placed.kinds[operation.operator_name.rpartition(".")[2], device, able] += 1
    return placed


def nested(block: Any) -> Iterator[Any]:
    """Every operation of a block and of those inside it."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from nested(inner)


def device_name(device: Any) -> str:
    return type(device).__name__.removeprefix("ML").removesuffix("ComputeDevice")


def compiled_for(program: Path, function: str, folder: Path) -> Path:
    """The package compiled with another default function, in `folder`; once for all compute units."""
    from coremltools.proto import Model_pb2

    copy, target = folder / f"{function}.mlpackage", folder / f"{function}.mlmodelc"
    if not target.exists():
        shutil.copytree(program, copy)
        (file,) = copy.rglob("*.mlmodel")
        spec = Model_pb2.Model.FromString(file.read_bytes())
        spec.description.defaultFunctionName = function
        file.write_bytes(spec.SerializeToString())
        coremltools().models.utils.compile_model(str(copy), str(target))
        shutil.rmtree(copy)
    return target
