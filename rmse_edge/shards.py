"""The safetensors files of a checkpoint folder: one, or several that an index lists, read tensor by tensor.

model.safetensors             all tensors; where it is there, an index beside it is not looked at, as in transformers
model.safetensors.index.json  {"weight_map": {tensor: file of this folder}}, what `save_pretrained` writes beside shards
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError
from .schema import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILES = ("pytorch_model.bin", "model.pt", "model.pth", "checkpoint.pt")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # others come with scales that nobody reads


def is_sharded(folder: Path) -> bool:
    return not (folder / WEIGHTS_FILE).is_file() and (folder / INDEX_FILE).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors.

    Raises:
        CheckpointError: there are none, or the index or one of the files it lists is not as it should be.
    """
    if is_sharded(folder):
        return [folder / name for name in sorted(set(read_index(folder / INDEX_FILE).values()))]
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = next((name for name in PICKLED_FILES if (folder / name).is_file()), None)
        hint = f"{pickled} is not read, convert it to safetensors" if pickled else "copy it beside config.json"
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: no such file; {hint}")
    return [folder / WEIGHTS_FILE]


def read_index(path: Path) -> dict[str, str]:
    """The file of every tensor, by name.

    Raises:
        CheckpointError: one line that names the index and what is wrong with it.
    """
    index = read_json(path, CheckpointError)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f'{path}: has no "weight_map" from tensors to files; copy it again')
    for name, file in files.items():
        # A bare name: what a checkpoint refers to lies beside it.
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"{path}: tensor {name} is said to be in {file!r}, expected a file of the same folder"
            )
        if not (path.parent / file).is_file():
            raise CheckpointError(
                f"{path.parent / file}: no such file, and {path.name} has tensor {name} in it; copy it"
            )
    return files


class StoredTensors:
    """The tensors of a checkpoint folder, to be read one at a time.

    Attributes:
        path: model.safetensors or the index: what a message about all tensors names.
    """

    def __init__(self, folder: Path, alone: str | None = None, asked: str = "config.json") -> None:
        """Look into all files and compare them with their index.

        Args:
            alone: the one file that is meant; None: those of the model.
            asked: the file that says which shapes they have.
        Raises:
            CheckpointError: one line that names the file, and the tensor, that is missing, damaged, or there twice.
        """
        self._asked = asked
        sharded = alone is None and is_sharded(folder)
        self.path = folder / (alone or (INDEX_FILE if sharded else WEIGHTS_FILE))
        self._files: dict[str, Path] = {}  # by tensor
        for path in weight_files(folder) if alone is None else [self.path]:
            with _damage_of(path), safe_open(path, framework="pt", device="cpu") as file:
                names = list(file.keys())
            for name in names:
                if name in self._files:
                    first = self._files[name].name
                    raise CheckpointError(f"{path}: tensor {name} is in {first}, too; keep one of them")
                self._files[name] = path
        if sharded:
            self._compare(read_index(self.path))

    def _compare(self, index: dict[str, str]) -> None:
        for name, file in index.items():
            if name not in self._files or self._files[name].name != file:
                raise CheckpointError(
                    f"{self.path}: tensor {name} is not in {file}; the files do not belong together, copy all of them"
                )
        for name, path in self._files.items():
            if name not in index:
                raise CheckpointError(
                    f"{path}: tensor {name} is not in {INDEX_FILE}; the files do not belong together, copy all of them"
                )

    def names(self) -> set[str]:
        return set(self._files)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def dtype(self) -> torch.dtype:
        """The widest floating type of its tensors; float32 where types of 16 bits are mixed."""
        found = set()
        for path in set(self._files.values()):
            with _damage_of(path), safe_open(path, framework="pt", device="cpu") as file:
                found |= {file.get_slice(name).get_dtype() for name in list(file.keys())}
        return {"BF16": torch.bfloat16, "F16": torch.float16}.get(found.pop() if len(found) == 1 else "", torch.float32)

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor in float32: exact for bfloat16 and float16, rounded from float64.

        Args:
            shape: that it must have; None: any.

        Raises:
            CheckpointError: it has another shape, another kind of type, or is not finite in float32.
        """
        path = self._files[name]
        # A file is mapped for one tensor: what is read of a large one would stay in memory as long as its mapping.
        with _damage_of(path), safe_open(path, framework="pt", device="cpu") as file:
            found = tuple(file.get_slice(name).get_shape())
            if shape is not None and found != shape:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {found}, {self._asked} asks for {shape}; "
                    "the two files do not belong together"
                )
            tensor = file.get_tensor(name)
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: tensor {name} has type {tensor.dtype}, expected floating point of 16 bits or more; save the "
                "unquantised weights"
            )
        tensor = tensor.float()
        check_finite(path, name, tensor)
        return tensor


def check_finite(where: str | Path, name: str, tensor: Tensor) -> None:
    """Raise a `CheckpointError` that names the tensor if it holds NaN or Inf."""
    if not all_finite(tensor):
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "Inf"
        raise CheckpointError(
            f"{where}: tensor {name} holds {kind}; the training diverged or the file is damaged, use another checkpoint"
        )


def all_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor Inf: `torch.isfinite` makes a copy, and of the largest tensor there is no room for one."""
    if not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())  # both are NaN where anything is


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({_one_line(error)}); copy the file again") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
