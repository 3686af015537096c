"""What is checked on the saved `.mlpackage` itself, before its numbers are.

A converter can leave out what it does not understand, and say nothing: a write to a state, an input that it took for a
constant, a weight that it left as floats. All of that is seen in the file:

- every function there is, of operators of iOS 18, and no name stands for two values;
- every input that the traced method reads is read, through to a result or a state;
- states are written by `commit` and by nothing else, each once, and no result is what was written;
- the last two axes of a state are multiples of 32, or the Neural Engine does not take it;
- what picks experts, and what leads to flags and survival only, is float32, and comes from float32 products;
- every quantised weight is there with its own integers and scales, as often as the traced method uses one;
- no weight is stored twice, and all together take no more than 1.05 times their integers, scales and floats (or 16 KiB
  more than that, in toys). Tables of places, which converters make of masks and distances, are no weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from torch import nn

from rmse_edge.errors import ExportError
from rmse_edge.export.program import ANY_ACTIVE, ExportedMethod
from rmse_edge.layers.held import OPERATOR
from rmse_edge.loop.contract import TensorSpec
from rmse_edge.quantize import QuantizedTensor
from rmse_edge.runtimes.mil.file import Blob, Function, ModelFile, Operation, operations

from .functions import OPSET as IOS18
from .functions import TILE, Assembly
from .graph import deciding, moved_from, named_twice, operations_of, read_names
from .ops import half, packed_halves

OPSET = "CoreML8"  # of iOS 18, as files name it
SLACK = 1.05  # of the weights' bytes
ROUND = 16 * 1024  # bytes that constants beside the weights may take in any case
SMALL = 1024  # bytes of a constant from which it counts as a weight
CONSTEXPR = "constexpr_blockwise_shift_scale"


@dataclass(frozen=True)
class Constant:
    """What both checks ask of a constant in the weights' file: reading and hashing are most of their time."""

    digest: str
    table: bool


Digests = dict[tuple[str, int], Constant]  # by file and offset


@dataclass(frozen=True)
class Expected:
    """What a function has to show."""

    reads: frozenset[str]  # inputs
    writes: frozenset[str]  # states
    packed: int  # weights stored packed and used whole
    decisions: frozenset[str] = frozenset()  # results that only say how to go on


def expected(assembly: Assembly, methods: Mapping[str, ExportedMethod], name: str) -> Expected:
    """What the function `name` of an assembly has to show, from the traced methods it is made of."""
    parts = [methods[part] for part in (("begin", "step") if name == "loop" else (name,))]
    takes = {t.name for t in assembly.signatures[name][0]}
    reads = {read for part in parts for read in used_inputs(part)} & takes
    writes: set[str] = set()
    if name == "loop":
        reads.add("max_loops")
    if name == "commit" and assembly.rings:
        reads |= {"position", "n_valid"}
        writes = {ring.name for ring in assembly.rings}
    if name == "step" and assembly.rings:
        reads.add("k")
    decisions = {t.name for t in parts[0].gives if decides(parts[0], t)} if name == "step" else set()
    packed = sum(stored_weights(part) for part in parts)
    return Expected(frozenset(reads), frozenset(writes), packed, frozenset(decisions))


def decides(method: ExportedMethod, t: TensorSpec) -> bool:
    """Whether a result of `step` only says how to go on: one number for every flag, or for the whole call."""
    flags = next((g.shape for g in method.gives if g.name == "next_active"), None)
    return method.name == "step" and (t == ANY_ACTIVE or t.shape == flags)


def used_inputs(method: ExportedMethod) -> set[str]:
    """The tensors that what a traced method gives depends on; it may read others for what nobody asks for."""
    graph = method.program.graph
    live = {graph.output_node()}
    for node in reversed(graph.nodes):
        if node in live:
            live.update(node.all_input_nodes)
    names = {node.name for node in live}
    placed = zip(method.takes, method.program.graph_signature.user_inputs, strict=True)
    return {t.name for t, name in placed if name in names}


def stored_weights(method: ExportedMethod) -> int:
    """Different weights that a traced method unpacks whole."""
    return len({n.args for n in method.program.graph.nodes if n.target == OPERATOR})


def check(
    path: Path, wanted: Mapping[str, Expected], tensors: Mapping[str, QuantizedTensor], model: nn.Module, halves: bool
) -> dict[str, Any]:
    """Check a saved package.

    Args:
        wanted: by name of the function.
        tensors: the quantised weights by name.
        model: whose other weights the package holds, in float16 where `halves` and they do not decide.
    Returns:
        What was counted, for the manifest: operators, constants stored packed, state writes, bytes of weights.
    Raises:
        ExportError: naming the function and what is wrong with it.
    """
    file = ModelFile(path)
    if missing := sorted(set(wanted) - set(file.functions)):
        raise ExportError(f"{path.name}: {missing[0]} is not in the saved program; it has {', '.join(file.functions)}")
    known = {kind for kind, versions in SSAOpRegistry.core_ops.items() if IOS18 in versions}
    known |= {"const", "read_state", "write_state"}
    counted = {"operators": 0, "packed": 0, "state_writes": 0}
    for name, want in wanted.items():
        function = file.function(name)
        ops = list(operations(function))
        if function.opset != OPSET:
            raise ExportError(f"{name}: is written for {function.opset}, expected {OPSET} (iOS 18)")
        if strange := next((op for op in ops if op.kind not in known), None):
            raise ExportError(f"{strange.place}: iOS 18 has no such operator")
        if again := named_twice(function):
            raise ExportError(f"{again}; names must be of one value")
        _check_states(function, ops, want)
        if lost := sorted(want.reads - read_names(operations_of(function), function.block.outputs)):
            raise ExportError(f"{name}: does not read {lost[0]}: the converter made it a constant")
        packed = [op for op in ops if op.kind == CONSTEXPR]
        if len(packed) != want.packed:
            raise ExportError(f"{name}: stores {len(packed)} weights packed, expected {want.packed}")
        if halves and want.decisions:
            _check_decisions(function, want)
        counted["operators"] += sum(op.kind != "const" for op in ops)
        counted["packed"] += len(packed)
        counted["state_writes"] += len(want.writes)
    digests: Digests = {}
    check_integers(file, tensors, digests)
    return counted | check_weights(file, ideal_bytes(model, tensors, halves), digests)


def _check_decisions(function: Function, want: Expected) -> None:
    """What decides is float32; so is what it decides upon, but for what is read by others, too."""
    for op in deciding(operations_of(function), function.block.outputs, want.decisions):
        if any(t.dtype == "float16" for t in op.outputs.values()):
            raise ExportError(f"{op.place}: decides in float16, expected float32")


def _check_states(function: Function, ops: list[Operation], want: Expected) -> None:
    written = [op for op in ops if op.kind == "write_state"]
    names = [op.inputs["input"][0] for op in written]
    if sorted(names) != sorted(want.writes):
        raise ExportError(
            f"{function.name}: writes {', '.join(names) or 'no state'}, expected {', '.join(sorted(want.writes)) or 'none'}"
        )
    results = {name for output in function.block.outputs for name in moved_from(ops, output)}
    for op in written:
        if results & moved_from(ops, op.inputs["data"][0]):
            raise ExportError(f"{op.place}: a result of the function is what is written; Core ML may hand out either")
    for name, kept in function.states.items():
        if any(n is None or n % TILE for n in kept.shape[-2:]):
            raise ExportError(f"{function.name}: state {name} is {kept}; its last two axes must be multiples of {TILE}")


# ---------------------------------------------------------------------------------------------------- weights


def check_integers(file: ModelFile, tensors: Mapping[str, QuantizedTensor], digests: Digests | None = None) -> None:
    """Fail unless every quantised weight is in the file, its integers and its scales, in one of the forms there are.

    Args:
        digests: those that are known, and then those of all constants that were read.
    Raises:
        ExportError: naming the weight.
    """
    if not tensors:
        return
    there: set[str] = set()
    digests = {} if digests is None else digests  # functions share most of what lies in the weights' file
    for name in file.functions:
        for op in operations(file.function(name)):
            for _, value in op.values():
                if value.WhichOneof("value") == "blobFileValue":
                    continue
                found = file.value(value)
                if isinstance(found, np.ndarray) and found.dtype != object:
                    there.add(_digest(found))
        there.update(_constant(file, blob, digests).digest for blob in file.blobs(file.function(name)))
    for name, q in tensors.items():
        if not any(_held(there, *form) for form in stored_forms(q)):
            raise ExportError(
                f"{name}: the saved program does not hold its integers and scales; export with quant=fp32"
            )


def _constant(file: ModelFile, blob: Blob, digests: Digests) -> Constant:
    if (where := (blob.file, blob.offset)) not in digests:
        array = file.weights(f"@model_path/{blob.file}").read(blob.offset, blob.type)
        digests[where] = Constant(_digest(array), is_table(array))
    return digests[where]


def _held(there: set[str], codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> bool:
    """Whether a form of a weight is among the constants that are there; scales in either float type."""
    either = {_digest(scales), _digest(scales.astype(np.float32))}
    return _digest(codes) in there and bool(either & there) and (zeros is None or _digest(zeros) in there)


def stored_forms(q: QuantizedTensor) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """What a weight's codes, scales and zeros may be stored as: packed rows, or a matrix."""
    bits = q.format.bits
    zeros = None if q.zeros is None else q.zeros.numpy()
    yield packed_halves(q.codes, bits).numpy(), half(q.scales.numpy()), zeros
    matrices = [(q.codes, q.scales, q.zeros)]
    if q.codes.dim() == 3:  # experts, computed as one matrix: gate and up, or down
        parts = (q.codes, q.scales, q.zeros)
        matrices = [tuple(None if t is None else t.flatten(0, 1) for t in parts),  # type: ignore[list-item]
                    tuple(None if t is None else t.transpose(0, 1).flatten(1) for t in parts)]  # type: ignore[list-item]  # fmt: skip
    for codes, scales, offset in matrices:
        stored = (
            codes.numpy() if offset is not None else (codes.numpy().astype(np.int16) - q.format.middle).astype(np.int8)
        )
        yield stored, half(scales.numpy()), None if offset is None else offset.numpy()


def _digest(array: np.ndarray) -> str:
    """Of the values and the shape; integers of less than a byte count as bytes."""
    whole = np.ascontiguousarray(array)
    return hashlib.sha256(f"{whole.dtype.name} {whole.shape}".encode() + whole.tobytes()).hexdigest()


def ideal_bytes(model: nn.Module, tensors: Mapping[str, QuantizedTensor], halves: bool) -> int:
    """Bytes of all weights of a float model, stored once: integers with scales, floats in 2 bytes where the package
    computes with them in float16."""
    total = sum(q.nbytes for q in tensors.values())
    for name, p in model.named_parameters():
        if name not in tensors:
            small = p.numel() * 4 < SMALL or any(
                part in name for part in ("router", "step_logits", "memory", "retrieval")
            )
            # A memory of a layer is read in float16 and learns in float32: what it begins with is there in both.
            learns = halves and name.endswith((".up", ".down"))
            total += p.numel() * (6 if learns else 2 if halves and not small else 4)
    return total


def check_weights(file: ModelFile, ideal: int, digests: Digests | None = None) -> dict[str, int]:
    """Fail where a weight is stored twice or all of them are too many bytes.

    Args:
        digests: as for `check_integers`.
    Returns:
        "weight_bytes" in the file, "table_bytes" besides, and "ideal_bytes".
    """
    seen: dict[tuple[str, int], int] = {}
    tables = 0
    contents: dict[str, str] = {}
    digests = {} if digests is None else digests
    for name in file.functions:
        for blob in file.blobs(file.function(name)):
            if (blob.file, blob.offset) in seen:
                continue
            seen[blob.file, blob.offset] = blob.nbytes
            if blob.nbytes >= SMALL:
                constant = _constant(file, blob, digests)
                other = contents.setdefault(constant.digest, blob.place)
                if other != blob.place:
                    raise ExportError(
                        f"{blob.place}: stores {blob.name} again, which {other} has; weights are to be shared"
                    )
                tables += blob.nbytes * constant.table
    total = sum(seen.values()) - tables
    if total > max(SLACK * ideal, ideal + ROUND):
        raise ExportError(
            f"{file.path.name}: holds {total:,} bytes of weights, expected at most {SLACK} x {ideal:,}; "
            "some are stored twice or were not quantised"
        )
    return {"weight_bytes": total, "table_bytes": tables, "ideal_bytes": ideal}


def is_table(constant: np.ndarray) -> bool:
    """Whether a constant says which place is before which, or how far: whole numbers in a type that no codes are in."""
    if constant.dtype.itemsize == 1 and constant.dtype != bool:
        return False
    return bool((constant == np.rint(constant)).all())
