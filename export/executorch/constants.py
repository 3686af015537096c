"""The constants of a program, which are on disk from before it is traced until it is written.

ExecuTorch's exporter copies what it is to write: the bytes of every constant when it emits a program, those of every weight
that XNNPACK reads when it delegates, and both stay in memory until the file is there. A model whose integers
are gigabytes would be in memory several times. Here the exporter is given places in files instead, and the
serialiser reads them when it writes: it takes parts of a file that are on disk (`FileBackedData`). The file that is written is the
same to the byte.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.emit import _emitter
from executorch.exir.schema import EValue
from executorch.exir.tensor import make_tensor_value
from torch import Tensor

LEAST = 64 * 1024  # bytes of a constant that is worth a place of its own


class Shelf:
    """A file that has no name and is gone when nothing reads it any more, also where the process is killed. When the shelf is
    closed, nothing more can be put there; what is on it stays as long as it is mapped.
    """

    def __init__(self, folder: Path | None) -> None:
        """
        Args:
            folder: where there is room for what is kept; None: where the system has temporary files.
        """
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by `__exit__`)
        self._size = 0

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *failed: object) -> None:
        self._file.close()

    def keep(self, content: Any) -> mmap.mmap:
        """Write bytes, and map them: pages that are read can be dropped again, as those of any file."""
        self._size += -self._size % mmap.ALLOCATIONGRANULARITY
        self._file.seek(self._size)
        self._file.write(content)
        self._file.flush()  # a full disk says so here; where pages of a mapping are written it ends the process
        start, size = self._size, len(content)
        self._size += size
        # A copy for who would write to it: PyTorch has no tensors that cannot be written to.
        return mmap.mmap(self._file.fileno(), size, offset=start, access=mmap.ACCESS_COPY)

    def tensor(self, tensor: Tensor) -> Tensor:
        """The same tensor, on the shelf; a small one stays where it is."""
        if tensor.nbytes < LEAST:
            return tensor
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        return torch.frombuffer(self.keep(content), dtype=tensor.dtype).view(tensor.shape)


class Place(FileBackedData):
    """Bytes that stay where they are: what the serialiser reads when it writes them."""

    def __init__(self, content: memoryview) -> None:
        self._content = content  # holds what it is a view of

    def __len__(self) -> int:
        return self._content.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> Place:
        return self

    def prefix(self, size: int) -> bytes:
        return bytes(self._content[:size])

    def sha256(self) -> bytes:
        return hashlib.sha256(self._content).digest()

    def to_bytes(self) -> bytes:
        return bytes(self._content)

    def write_to_file(self, outfile: io.BufferedIOBase) -> None:
        outfile.write(self._content)

    def close(self) -> None:
        """Nothing: who put it there owns it."""


def _emit(emitter: Any, spec: Any, constant_tag: str | None = None) -> EValue:
    """A constant tensor of a program: known by its bytes, as ExecuTorch's own emitter has it, without a copy of them."""
    storage = spec.storage if spec.const else None
    apart = constant_tag is not None or spec.extra_tensor_info is not None or spec.mem_id is not None
    if storage is None or apart or storage.nbytes() < LEAST or spec.nbytes() != storage.nbytes():
        return _ORIGINAL(emitter, spec, constant_tag)
    place = Place(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data)
    digest = place.sha256().hex()
    index = emitter.program_state.cached_spec_hash_values.get(digest)
    if index is None:
        index = emitter._save_new_const_tensor(spec, place, digest)
    return EValue(make_tensor_value(index, None, spec))


_ORIGINAL = _emitter._Emitter._tensor_spec_to_evalue


@contextmanager
def left_on_disk(folder: Path | None) -> Iterator[None]:
    """Within, ExecuTorch lowers and emits programs without copies of large constants.

    What a program's operators read stays where it is. What XNNPACK's delegates read goes to a `Shelf` in `folder`, since XNNPACK may
    lay it out anew.
    """

    class OnShelf(NamedDataStore):
        def add_named_data(self, key: str, data: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(data, bytes) and len(data) >= LEAST and key not in self.key_to_buffer_idx:
                data = Place(memoryview(shelf.keep(data)))
            super().add_named_data(key, data, *args, **kwargs)

    with Shelf(folder) as shelf, ExitStack() as stack:
        stack.enter_context(patch.object(_emitter._Emitter, "_tensor_spec_to_evalue", _emit))
        stack.enter_context(patch.object(xnnpack_preprocess, "NamedDataStore", OnShelf))
        yield
