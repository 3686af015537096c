"""The file of weights that all graphs of a package share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from onnx import ModelProto, TensorProto, external_data_helper, helper, numpy_helper
from torch import nn

from .passes import rename

MODEL = "model."  # how the names of initializers begin that are the traced model's tensors: see `Method`


class Place(NamedTuple):
    """A tensor in the file."""

    dtype: int  # of `TensorProto`
    offset: int
    nbytes: int


def aliases(model: object) -> dict[str, str]:
    """Of tensors that a model has under several names, each further name -> the first."""
    names: dict[tuple[int, tuple[int, ...]], str] = {}
    found: dict[str, str] = {}
    if isinstance(model, nn.Module):
        for name, tensor in model.state_dict(keep_vars=True).items():
            first = names.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
            if first != name and tensor.numel():
                found[name] = first
    return found


class WeightFile:
    """One file for the weights of all graphs: every distinct tensor is stored once, at an aligned offset.

    A tensor of the model is known by its name; only one that is new is looked at, and compared with all others.
    """

    ALIGNMENT = 4096  # a page, so that a tensor can be mapped, dropped and fetched by itself
    INLINE_BELOW = 1024  # bytes; smaller tensors stay in the graph

    def __init__(self, path: Path, aliases: Mapping[str, str], half: bool) -> None:
        """
        Args:
            path: of the file, in the folder of the graphs.
            aliases: see `aliases`.
            half: store float32 tensors as float16 and cast them in front of their readers.
        """
        self.location, self.aliases, self.half = path.name, aliases, half
        self.file = path.open("wb")
        self.places: dict[str, Place] = {}  # of the model's tensors, by name
        self.contents: dict[bytes, Place] = {}  # of all, by type and content: in whatever shape it is read
        self.size = 0

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def take(self, model: ModelProto) -> None:
        """Move the model's large initializers into this file, renamed to what they are.

        Given:   initializer model.block.attention.kv_proj.weight.T (float32, inline)
        Result:  initializer block.attention.kv_proj.weight.T (external, shared), cast from float16 if `half`
        """
        graph, renamed, casts = model.graph, {}, []
        taken = {tensor.name for tensor in graph.initializer}
        for tensor in graph.initializer:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            if int(np.prod(tensor.dims)) * dtype.itemsize < self.INLINE_BELOW:
                continue
            name = self.name_of(tensor.name)
            half = self.half and dtype == np.float32
            dims, place = list(tensor.dims), self._place(tensor, name, half)
            if tensor.name != name and name in taken:
                name = f"{name}.{tensor.name}"
            taken.add(name)
            renamed[tensor.name] = name
            tensor.Clear()
            tensor.name = f"{name}.fp16" if half else name
            tensor.dims.extend(dims)
            tensor.data_type = place.dtype
            tensor.raw_data = b"\0"  # `set_external_data` insists on there being some
            external_data_helper.set_external_data(tensor, self.location, place.offset, place.nbytes)
            tensor.ClearField("raw_data")
            if half:
                casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
        rename(graph, renamed)
        for node in reversed(casts):
            graph.node.insert(0, node)

    def name_of(self, initializer: str) -> str:
        """What a tensor of the model is called in the checkpoint; the tracer's own names stay."""
        if not initializer.startswith(MODEL):
            return initializer
        base = initializer.removeprefix(MODEL).removesuffix(".T")
        return self.aliases.get(base, base) + (".T" if initializer.endswith(".T") else "")

    def _place(self, tensor: TensorProto, name: str, half: bool) -> Place:
        ours = tensor.name.startswith(MODEL)
        if ours and name in self.places:
            return self.places[name]
        array = numpy_helper.to_array(tensor)
        place = self._stored(array.astype(np.float16) if half else array)
        if ours:
            self.places[name] = place
        return place

    def _stored(self, array: np.ndarray) -> Place:
        dtype, content = helper.np_dtype_to_tensor_dtype(array.dtype), np.ascontiguousarray(array)
        key = hashlib.blake2b(content.data, digest_size=32, person=bytes([dtype])).digest()
        if key not in self.contents:
            self._write(bytes(-self.size % (self.ALIGNMENT if array.nbytes >= self.ALIGNMENT else 64)))
            self.contents[key] = Place(dtype, self.size, array.nbytes)
            self._write(content.data)
        return self.contents[key]

    def _write(self, part: bytes | memoryview) -> None:
        self.file.write(part)
        self.size += memoryview(part).nbytes
