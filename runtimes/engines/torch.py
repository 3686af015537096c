"""The reference runtime: the PyTorch model itself, on a CPU or a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmse_edge.arch.common.identity import model_info
from rmse_edge.arch.registry import arch_of_model
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.errors import ArgumentError, UserError
from rmse_edge.heads import load_heads
from rmse_edge.info import ModelInfo
from rmse_edge.layers.mtp import MtpHeads
from rmse_edge.loop.contract import LoopModel, LoopSpec
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.drive import run_loop
from rmse_edge.quantize import is_quantized_checkpoint, load_quantized
from rmse_edge.runtimes.host.blocks import BlockRuntime
from rmse_edge.runtimes.host.board import BoardRuntime, Solved, check_cells
from rmse_edge.runtimes.host.calls import Calls
from rmse_edge.runtimes.host.text import LoopRuntime
from rmse_edge.shards import weight_files


class TorchMethods:
    """A `LoopModel`'s methods, on NumPy arrays or on tensors of the model's device: what is given is given back."""

    def __init__(self, model: LoopModel, device: str = "cpu", heads: MtpHeads | None = None) -> None:
        self.model, self.heads = model, heads
        self.device = torch.device(device)
        self._specs: dict[int, LoopSpec] = {}

    @torch.inference_mode()
    def run(self, method: str, chunk: int, feeds: dict[str, Any]) -> dict[str, Any]:
        if chunk not in self._specs:
            self._specs[chunk] = self.model.spec(chunk)
        model, spec = self.model, self._specs[chunk]
        on_device = any(isinstance(v, Tensor) for v in feeds.values())
        tensors = {
            k: v if isinstance(v, Tensor) else torch.from_numpy(np.asarray(v)).to(self.device) for k, v in feeds.items()
        }
        if method == "prelude":
            out = model.prelude(tensors)
        elif method == "loop":
            out = run_loop(model, spec, tensors, {d: tensors[d] for d in spec.dials})
        elif method == "head":
            out = model.head(tensors[spec.final.name])
        elif self.heads is not None and method in self.heads.methods:
            out = self.heads.draft(method, model, tensors)
        elif method in spec.methods:
            out = getattr(model, method)(tensors)
        else:
            raise ValueError(f"unknown method {method!r}")
        return out if on_device else {k: v.cpu().numpy() for k, v in out.items()}


class TorchCalls(Calls):
    """Calls whose tensors stay on the model's device: tokens go there, logits and depths come back."""

    def __init__(self, info: ModelInfo, methods: TorchMethods) -> None:
        self.device = methods.device
        self.any_rows = len(info.chunks) > 1
        super().__init__(info, methods)

    def put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(array)).to(self.device)

    def get(self, array: Tensor) -> np.ndarray:
        return array.cpu().numpy()

    def copied(self, array: Tensor) -> Tensor:
        return array.clone()


class TorchRuntime(LoopRuntime):
    """A checkpoint folder, or a model already in memory, run by PyTorch."""

    def __init__(
        self,
        model: Any,
        name: str,
        nbytes: int = 0,
        device: str = "cpu",
        source: str | None = None,
        folder: Path | None = None,
        heads: MtpHeads | None = None,
    ) -> None:
        self.model = on_device(model, device)
        if heads is not None:
            heads = on_device(heads, device)
        info = model_info(model, name, nbytes, source=source, folder=folder, heads=heads)
        super().__init__(info, TorchMethods(model, device, heads), TorchCalls)

    @classmethod
    def open(cls, folder: str | Path, device: str = "cpu") -> TorchRuntime:
        model, source, nbytes = loaded(folder := Path(folder))
        return cls(model, folder.absolute().name, nbytes, device, source, folder, load_heads(folder, model, source))


class TorchBlocks(BlockRuntime):
    """A model that writes by blocks, run by PyTorch."""

    def __init__(self, model: Any, info: ModelInfo, device: str = "cpu") -> None:
        self.model = on_device(model, device)
        super().__init__(info, TorchMethods(model, device), TorchCalls)


def open_writer(folder: str | Path, device: str = "cpu") -> TorchRuntime | TorchBlocks:
    """The runtime of a checkpoint folder of a model of texts, whether it writes token by token or by blocks.

    Raises:
        UserError: it fills in boards, or is no checkpoint.
    """
    model, source, nbytes = loaded(folder := Path(folder))
    name = folder.absolute().name
    if arch_of_model(model).by_blocks:
        return TorchBlocks(model, model_info(model, name, nbytes, source=source, folder=folder), device)
    return TorchRuntime(model, name, nbytes, device, source, folder, load_heads(folder, model, source))


class TorchBoards(BoardRuntime):
    """A checkpoint folder of a model that fills in boards, run by PyTorch: many boards at once, of which those that have
    stopped leave the batch.
    """

    def __init__(self, model: Any, info: ModelInfo, device: str = "cpu") -> None:
        self.model = on_device(model, device)
        super().__init__(info, TorchMethods(model, device))
        self.largest_batch = None

    @classmethod
    def open(cls, folder: str | Path, device: str = "cpu") -> TorchBoards:
        """
        Raises:
            UserError: it is a model of texts, or no checkpoint.
        """
        model, source, nbytes = loaded(folder := Path(folder))
        info = model_info(model, folder.absolute().name, nbytes, source=source, folder=folder)
        if info.board is None:
            raise UserError(f"{folder}: is a model of texts; give it a prompt, or a text to read")
        return cls(model, info, device)

    @torch.inference_mode()
    def solve_batch(self, boards: np.ndarray, dials: Dials, puzzle: int = 0) -> list[Solved]:
        cells = np.stack([check_cells(board, self.board) for board in boards])
        self.info.check(dials)
        model, device = self.model, self.methods.device  # type: ignore[attr-defined]
        spec = model.spec(self.board.cells)
        tensors = {"board": torch.from_numpy(cells).to(device)} | self.puzzles(puzzle, len(cells), torch.full)
        tensors |= model.prelude(tensors)
        carry, invariants = model.begin(tensors)
        fixed = {t.name: (tensors | invariants)[t.name] for t in (*spec.prelude, *spec.invariants)}
        scalars = {name: torch.from_numpy(value) for name, value in dials.arrays().items() if name in spec.dials}
        rows, answers = np.arange(len(cells)), [Solved(np.empty(0), np.empty(0), 0)] * len(cells)
        for k in range(dials.max_loops):
            carry, _ = model.step(torch.tensor(k), carry, {}, fixed, scalars)
            going = carry["active"] if k + 1 < dials.max_loops else torch.zeros_like(carry["active"])
            if not bool(going.all()):
                logits = model.head(carry["h"][~going])["symbols"].cpu().numpy()
                for row, own in zip(rows[~going.cpu().numpy()], logits):
                    answers[row] = Solved(own, np.array([k + 1]), k + 1)
                rows = rows[going.cpu().numpy()]
                carry, fixed = ({n: t[going] for n, t in part.items()} for part in (carry, fixed))
            if not len(rows):
                break
        return answers


def check_device(device: str) -> torch.device:
    """
    Raises:
        ArgumentError: PyTorch sees no such device.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ArgumentError("device", "PyTorch sees no CUDA device here; use device=cpu", "cuda")
    return torch.device(device)


def on_device(model: Any, device: str) -> Any:
    """The model there, in evaluation mode.

    Raises:
        ArgumentError: there is no such device.
    """
    return model.to(check_device(device)).eval()


def loaded(folder: Path) -> tuple[Any, str | None, int]:
    """The model of a checkpoint folder, the fingerprint of the float model where it is quantised, and its bytes on disk."""
    quantized = load_quantized(folder) if is_quantized_checkpoint(folder) else None
    model, source = (quantized.model, quantized.fingerprint) if quantized else (load_checkpoint(folder), None)
    return model, source, sum(file.stat().st_size for file in weight_files(folder))


def set_threads(threads: int | None) -> None:
    """Limit PyTorch's threads for the whole process."""
    if threads is not None:
        torch.set_num_threads(threads)
