"""What lies in a Core ML `.mlpackage`: the program, its types and constants, and the weights' file.

Nothing here computes. `ModelFile` reads; `operations` walks a function, nested blocks included, and says of every
operation where it stands, so that a checker or an interpreter can name the place; `blobs` lists what a function
keeps in the weights' file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rmse_edge.errors import PackageError, UserError, quiet
from rmse_edge.package import AGAIN
from rmse_edge.schema import read_json

SENTINEL = 0xDEADBEEF  # opens the metadata of every entry of a weights' file
STORAGE_VERSION = 2
HEADER_BYTES = METADATA_BYTES = 64
STORED = {  # numbers of the weights' file
    1: "float16",
    2: "float32",
    3: "uint8",
    4: "int8",
    5: "bfloat16",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}
DECLARED = {  # numbers of the program; the names are NumPy's where it has the type
    1: "bool",
    2: "string",
    10: "float16",
    11: "float32",
    12: "float64",
    13: "bfloat16",
    21: "int8",
    22: "int16",
    23: "int32",
    24: "int64",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
    34: "uint64",
    35: "uint4",
    36: "uint2",
    37: "uint1",
    38: "uint6",
    39: "uint3",
}
PACKED_BITS = {"int4": 4, "uint4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint6": 6}
BLOCK_NAMES = {"while_loop": ("condition", "body"), "cond": ("true", "false")}

Value = np.ndarray | str | list | dict


@dataclass(frozen=True)
class TensorType:
    """Shape and element type of a value; an extent that the file leaves open is None."""

    shape: tuple[int | None, ...]
    dtype: str  # as in `DECLARED`

    def __str__(self) -> str:
        return f"{self.dtype} ({', '.join('?' if n is None else str(n) for n in self.shape)})"

    @property
    def array_dtype(self) -> np.dtype:
        """What an array with these values is made of: sub-byte integers take a byte each.

        Raises:
            PackageError: NumPy has no such type.
        """
        if self.dtype in PACKED_BITS:
            return np.dtype(np.uint8 if self.dtype.startswith("u") else np.int8)
        if self.dtype in ("bfloat16", "unknown"):
            raise PackageError(f"values of type {self.dtype} cannot be read here; export the package without them")
        return np.dtype(object if self.dtype == "string" else self.dtype)

    @property
    def size(self) -> int:
        """How many values; all extents must be known."""
        return math.prod(n for n in self.shape if n is not None)


@dataclass(frozen=True)
class Signature:
    """What a function takes, gives and keeps."""

    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]
    states: dict[str, TensorType]


@dataclass(frozen=True)
class Function:
    """A function of the program, as the file has it."""

    name: str
    block: Any  # MIL_pb2.Block
    opset: str  # "CoreML8" is iOS 18
    inputs: dict[str, TensorType]
    states: dict[str, TensorType]

    @property
    def outputs(self) -> dict[str, TensorType]:
        """Names and types of what it returns.

        Raises:
            PackageError: it returns a value that nothing in it makes.
        """
        made = dict(self.inputs)
        for operation in self.block.operations:
            made |= {output.name: tensor_type(output.type) for output in operation.outputs}
        missing = [name for name in self.block.outputs if name not in made]
        if missing:
            raise PackageError(
                f"{self.name}: returns {missing[0]}, which nothing in it makes; export the package again"
            )
        return {name: made[name] for name in self.block.outputs}

    @property
    def signature(self) -> Signature:
        return Signature(dict(self.inputs), self.outputs, dict(self.states))


@dataclass(frozen=True)
class Operation:
    """An operation and where it stands."""

    function: str
    number: str  # counted from 0 as in the file; "112.body.5" is operation 5 of the body of operation 112
    proto: Any  # MIL_pb2.Operation

    @property
    def kind(self) -> str:
        return self.proto.type

    @property
    def place(self) -> str:
        """For example "step_1, operation 37 (mul)"."""
        return f"{self.function}, operation {self.number} ({self.kind})"

    @property
    def inputs(self) -> dict[str, list[str]]:
        """Of every input that is a value made elsewhere, the names bound to it."""
        bound = {k: [b.name for b in argument.arguments if b.name] for k, argument in self.proto.inputs.items()}
        return {k: names for k, names in bound.items() if names}

    @property
    def outputs(self) -> dict[str, TensorType]:
        return {output.name: tensor_type(output.type) for output in self.proto.outputs}

    def blocks(self) -> Iterator[tuple[str, Any]]:
        """Its nested blocks, each with what it is called in a place."""
        names = BLOCK_NAMES.get(self.kind, ())
        for i, block in enumerate(self.proto.blocks):
            yield (names[i] if i < len(names) else f"block{i}"), block

    def inside(self, called: str, block: Any) -> list[Operation]:
        """The operations of one of its blocks."""
        return [Operation(self.function, f"{self.number}.{called}.{i}", op) for i, op in enumerate(block.operations)]

    def values(self) -> Iterator[tuple[str, Any]]:
        """Constants written into it: attributes and inputs that are no names, as (name, MIL_pb2.Value)."""
        yield from self.proto.attributes.items()
        for name, argument in self.proto.inputs.items():
            yield from ((name, b.value) for b in argument.arguments if b.WhichOneof("binding") == "value")


@dataclass(frozen=True)
class Blob:
    """A constant that lies in a weights' file."""

    place: str  # of the operation that holds it
    name: str  # of the operation's output, or of its attribute
    type: TensorType
    file: str  # relative to the model's folder
    offset: int  # of its metadata
    dtype: str  # as the weights' file says
    data: int  # offset of its bytes
    nbytes: int


def operations(function: Function) -> Iterator[Operation]:
    """Every operation of a function, nested ones after the one they are nested in."""

    def walk(found: Sequence[Operation]) -> Iterator[Operation]:
        for operation in found:
            yield operation
            for called, block in operation.blocks():
                yield from walk(operation.inside(called, block))

    yield from walk([Operation(function.name, str(i), op) for i, op in enumerate(function.block.operations)])


def tensor_type(proto: Any) -> TensorType:
    """The type in a MIL_pb2.ValueType; a state's is what it holds."""
    kind = proto.WhichOneof("type")
    if kind == "stateType":
        return tensor_type(proto.stateType.wrappedType)
    if kind != "tensorType":
        return TensorType((), "unknown")
    tensor = proto.tensorType
    sizes = (d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions)
    return TensorType(tuple(sizes), DECLARED.get(tensor.dataType, "unknown"))


def unpack(packed: np.ndarray, dtype: str, count: int) -> np.ndarray:
    """Sub-byte integers as one byte each: (count,) int8 or uint8.

    Args:
        packed: (m,) uint8; values follow each other from the lowest bit up, across byte borders.
    """
    bits = PACKED_BITS[dtype]
    if bits == 4:  # the common one, without a byte per bit
        pairs = np.empty((packed.size, 2), np.uint8)
        np.bitwise_and(packed, 15, out=pairs[:, 0])
        np.right_shift(packed, 4, out=pairs[:, 1])
        codes = pairs.reshape(-1)[:count]
    else:
        single = np.unpackbits(packed, bitorder="little", count=count * bits).reshape(count, bits)
        codes = np.packbits(single, axis=1, bitorder="little").reshape(-1)
    if dtype.startswith("u"):
        return codes
    return ((codes ^ (1 << (bits - 1))).astype(np.int8) - np.int8(1 << (bits - 1))).astype(np.int8)


class WeightsFile:
    """A mapped weights' file: arrays out of it are views of the mapping wherever a value takes whole bytes."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            PackageError: there is no such file, or it is of another format.
        """
        self.path = path
        try:
            self._bytes: np.ndarray = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError):  # ValueError: it is empty
            raise PackageError(f"{path}: the weights' file is missing or empty; export the package again") from None
        version = self._header(0, 8).view("<u4")[1]
        if version != STORAGE_VERSION:
            raise PackageError(f"{path}: storage version is {version}, expected {STORAGE_VERSION}; export it again")

    def _header(self, offset: int, nbytes: int) -> np.ndarray:
        found = np.array(self._bytes[offset : offset + nbytes])
        if found.size < nbytes:
            raise PackageError(
                f"{self.path}: ends at {self._bytes.size} bytes, an entry at {offset} is cut off; export the package again"
            )
        return found

    def entry(self, offset: int) -> tuple[str, int, int, int]:
        """Of the entry whose metadata is at `offset`: stored dtype, where its bytes begin, how many, padding bits.

        Raises:
            PackageError: no entry begins there, its type is unknown, or it goes beyond the file's end.
        """
        words = self._header(offset, METADATA_BYTES)
        sentinel, number = (int(n) for n in words[:8].view("<u4"))
        nbytes, data, padding = (int(n) for n in words[8:32].view("<u8"))
        if sentinel != SENTINEL:
            raise PackageError(f"{self.path}: no entry begins at {offset}: the file is damaged or another model's")
        if number not in STORED:
            raise PackageError(f"{self.path}: the entry at {offset} is of type {number}, which is not known")
        if data + nbytes > self._bytes.size:
            raise PackageError(
                f"{self.path}: ends at {self._bytes.size} bytes, the entry at {offset} needs {data + nbytes}"
            )
        return STORED[number], data, nbytes, padding

    def read(self, offset: int, declared: TensorType) -> np.ndarray:
        """The entry at `offset` as the program declares it, read-only.

        Raises:
            PackageError: it holds another type or another number of values than declared.
        """
        dtype, data, nbytes, padding = self.entry(offset)
        bits = PACKED_BITS.get(dtype, declared.array_dtype.itemsize * 8)
        stored_bool = declared.dtype == "bool" and dtype == "uint8"
        if (dtype != declared.dtype and not stored_bool) or (nbytes * 8 - padding) != declared.size * bits:
            raise PackageError(
                f"{self.path}: the entry at {offset} is {nbytes} bytes of {dtype}, the program says {declared}"
            )
        raw = self._bytes[data : data + nbytes]
        array = unpack(raw, dtype, declared.size) if dtype in PACKED_BITS else raw.view(declared.array_dtype)
        array = np.asarray(array).reshape([n or 0 for n in declared.shape])
        array.flags.writeable = False
        return array


def protocol() -> Any:
    """coremltools' description of the files, a module.

    Raises:
        UserError: coremltools is not installed.
    """
    try:
        with quiet():  # the import is slow, and says much
            from coremltools.proto import Model_pb2
    except ImportError as error:
        if (error.name or "").split(".")[0] != "coremltools":
            raise
        raise UserError("coremltools is not installed; install it with: pip install 'rmse-edge[coreml]'") from None
    return Model_pb2


class ModelFile:
    """A parsed package."""

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            PackageError: the package lacks a file, a file is damaged, or it holds no ML Program.
            UserError: coremltools is not installed.
        """
        self.path = Path(path)
        self.model_path = self._find_model()
        self.spec: Any = protocol().Model()
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        try:
            self.spec.ParseFromString(self.model_path.read_bytes())
        except OSError:
            raise PackageError(f"{self.model_path}: is missing or unreadable; export the package again") from None
        except DecodeError:
            raise PackageError(f"{self.model_path}: is damaged or cut off; export the package again") from None
        if self.spec.WhichOneof("Type") != "mlProgram":
            raise PackageError(f"{self.model_path}: holds no ML Program; export the package again")
        self.program = self.spec.mlProgram
        self._weights: dict[str, WeightsFile] = {}

    def _find_model(self) -> Path:
        manifest = self.path / "Manifest.json"
        try:
            values = read_json(manifest, PackageError, AGAIN)
            item = values["itemInfoEntries"][values["rootModelIdentifier"]]["path"]
            model: Path = (self.path / "Data" / item).resolve()
        except OSError:
            raise PackageError(f"{manifest}: is missing; {self.path} is no Core ML package") from None
        except (ValueError, KeyError, TypeError):
            raise PackageError(f"{manifest}: does not say where the model is; export the package again") from None
        if not model.is_relative_to(self.path.resolve()):
            raise PackageError(f"{manifest}: names a model outside the package, {item}; export the package again")
        return self.path / "Data" / item

    @cached_property
    def functions(self) -> tuple[str, ...]:
        """Names, in the order the model's description has them."""
        described = [f.name for f in self.spec.description.functions if f.name in self.program.functions]
        return tuple(described + sorted(set(self.program.functions) - set(described)))

    @property
    def default_function(self) -> str:
        named = self.spec.description.defaultFunctionName or "main"
        return named if named in self.functions else self.functions[0]

    def function(self, name: str) -> Function:
        """
        Raises:
            UserError: there is no such function.
            PackageError: it has no block for its own opset.
        """
        if name not in self.functions:
            raise UserError(f"{self.path}: has no function {name}; it has {', '.join(self.functions)}")
        proto = self.program.functions[name]
        if proto.opset not in proto.block_specializations:
            raise PackageError(f"{self.path}: {name} has no block for opset {proto.opset}; export the package again")
        state = {i.name: i.type.WhichOneof("type") == "stateType" for i in proto.inputs}
        types = {i.name: tensor_type(i.type) for i in proto.inputs}
        return Function(
            name,
            proto.block_specializations[proto.opset],
            proto.opset,
            {k: t for k, t in types.items() if not state[k]},
            {k: t for k, t in types.items() if state[k]},
        )

    def weights(self, file: str) -> WeightsFile:
        """The weights' file that a constant names ("@model_path/weights/weight.bin").

        Raises:
            PackageError: it is outside the package, missing, or of another format.
        """
        if file not in self._weights:
            path = self.model_path.parent / file.removeprefix("@model_path/")
            if not path.resolve().is_relative_to(self.path.resolve()):
                raise PackageError(f"{self.model_path}: takes weights from {file}, which is outside the package")
            self._weights[file] = WeightsFile(path)
        return self._weights[file]

    def value(self, proto: Any) -> Value:
        """A MIL_pb2.Value: an array (read-only), a str, or a list or dict of those.

        Raises:
            PackageError: its type is not known, or its weights' file is missing or damaged.
        """
        declared = tensor_type(proto.type)
        if proto.WhichOneof("value") == "blobFileValue":
            return self.weights(proto.blobFileValue.fileName).read(proto.blobFileValue.offset, declared)
        immediate = proto.immediateValue
        kind = immediate.WhichOneof("value")
        if kind == "dictionary":
            return {str(self.value(pair.key)): self.value(pair.value) for pair in immediate.dictionary.values}
        if kind in ("list", "tuple"):
            return [self.value(v) for v in getattr(immediate, kind).values]
        return _immediate(immediate.tensor, declared)

    def blobs(self, function: Function) -> Iterator[Blob]:
        """Every constant of a function that lies in a weights' file.

        Raises:
            PackageError: an entry is missing or damaged.
        """
        for operation in operations(function):
            for name, value in operation.values():
                if value.WhichOneof("value") == "blobFileValue":
                    where = value.blobFileValue
                    dtype, data, nbytes, _ = self.weights(where.fileName).entry(where.offset)
                    name = operation.proto.outputs[0].name if operation.kind == "const" else name
                    file = where.fileName.removeprefix("@model_path/")
                    declared = tensor_type(value.type)
                    yield Blob(operation.place, name, declared, file, where.offset, dtype, data, nbytes)


def _immediate(tensor: Any, declared: TensorType) -> np.ndarray | str:
    """The value of a MIL_pb2.TensorValue."""
    held = tensor.WhichOneof("value")
    values: Any = getattr(tensor, held).values if held else ()
    shape = [n or 0 for n in declared.shape]
    if declared.dtype == "string":
        return str(values[0]) if not shape else np.array(list(values), object).reshape(shape)
    if held == "bytes":  # every type that protobuf has no field for
        if declared.dtype in PACKED_BITS:
            flat = unpack(np.frombuffer(values, np.uint8), declared.dtype, declared.size)
        else:
            flat = np.frombuffer(values, declared.array_dtype)
    else:
        flat = np.array(values, declared.array_dtype)
    if flat.size == 1 < declared.size:
        flat = np.repeat(flat, declared.size)
    array = flat.reshape(shape)
    array.flags.writeable = False
    return array
