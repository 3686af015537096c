"""The CUDA engine: a checkpoint on a GPU, all of its state there between calls; tokens go there, logits and depths come back.

Everything of it takes a `device`. On "cpu" the same code runs without recordings, which is how it is tested.

Weights are float32, numbers of 16 bits, or the integers of a quantised checkpoint, packed as they lie in it. What stands
between their products (norms, softmax, gates, routers, the state of the loop) is float32 in all of them.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmse_edge.arch.common.identity import fingerprint, model_info
from rmse_edge.arch.registry import arch_of_model
from rmse_edge.checkpoint import load_checkpoint, stored_keys
from rmse_edge.errors import ArgumentError
from rmse_edge.info import ModelInfo
from rmse_edge.layers.fixed import fixed_work
from rmse_edge.layers.held import Rounded, Stored, with_stored
from rmse_edge.layers.packed import has_triton
from rmse_edge.loop.contract import LoopModel
from rmse_edge.quantize import is_quantized_checkpoint, load_quantized
from rmse_edge.quantize.scheme import table_of
from rmse_edge.runtimes.cuda.drive import LOOPS, AheadLoop
from rmse_edge.runtimes.cuda.recorded import RecordedMethod
from rmse_edge.runtimes.cuda.traffic import Traffic, traffic
from rmse_edge.runtimes.host.text import LoopRuntime
from rmse_edge.shards import weight_files

from .torch import TorchCalls, TorchMethods, check_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECORDED = ("prelude", "coda", "head", "commit")  # and the loop
AHEAD = 2  # iterations on their way: not measured, see docs/cuda.md


def matrices_in(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that would be quantised, rounded to a type of 16 bits, by name: what decides and what scales stays as it is.

    Raises:
        UserError: the architecture does not say which they are.
    """
    table = table_of(model)
    names = [name for name in stored_keys(model.config, list(model.state_dict())) if table.quantizes(name)]
    return {name: model.get_parameter(name).detach().to(dtype) for name in names if model.get_parameter(name).numel()}


def short_scales(model: Any) -> None:
    """Keep the scales of integers in bfloat16, which they are numbers of: every product reads them."""
    for module in model.modules():
        if isinstance(module, Stored) and not isinstance(module, Rounded):
            module.scales = module.scales.to(torch.bfloat16)


class CudaMethods(TorchMethods):
    """A `LoopModel`'s methods on tensors that keep their place, each recorded once per size of call."""

    def __init__(
        self,
        model: LoopModel,
        device: str = "cuda",
        ahead: int = AHEAD,
        capture: bool | None = None,
        exits: str = "flags",
    ) -> None:
        """
        Args:
            ahead: iterations on their way at once, see rmse_edge/runtimes/cuda/drive.py.
            exits: who says that the loop is over: "flags", the host, or "cond", the device.
            capture: record CUDA graphs; None: on a GPU.
        """
        super().__init__(model, device)
        if ahead < 1:
            raise ArgumentError("ahead", f"got {ahead}, expected at least 1")
        if exits not in LOOPS:
            raise ArgumentError("exits", f"got {exits!r}, expected one of {', '.join(LOOPS)}")
        self.ahead, self.exits = ahead, exits
        self.capture = self.device.type == "cuda" if capture is None else capture
        self.pool = torch.cuda.graph_pool_handle() if self.capture else None
        self.deepest = 0  # the dial max_loops, which the host reads, too
        self._given: dict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        self._recorded: dict[tuple[str, int], RecordedMethod] = {}
        self.loops: dict[int, AheadLoop] = {}

    @torch.inference_mode()
    def given(self, name: str, array: np.ndarray) -> Tensor:
        """A host's array on the device, at a place that is this name's and this shape's."""
        array = np.asarray(array)
        if name == "max_loops":
            self.deepest = int(array)
        key = (name, array.shape)
        if key not in self._given:
            like = torch.from_numpy(array)
            cuda = self.device.type == "cuda"
            staging = torch.empty(like.shape, dtype=like.dtype, pin_memory=cuda)
            self._given[key] = staging, torch.empty_like(like, device=self.device)
        staging, there = self._given[key]
        # The last copy out of the staging memory is over: the host has waited for the logits and depths of its call.
        staging.copy_(torch.from_numpy(array))
        there.copy_(staging, non_blocking=True)
        return there

    @torch.inference_mode()
    def run(self, method: str, chunk: int, feeds: dict[str, Any]) -> dict[str, Any]:
        if method not in RECORDED and method != "loop":
            with fixed_work():
                return super().run(method, chunk, feeds)
        if chunk not in self._specs:
            self._specs[chunk] = self.model.spec(chunk)
        spec = self._specs[chunk]
        on_device = any(isinstance(v, Tensor) for v in feeds.values())
        tensors = {k: v if isinstance(v, Tensor) else self.given(k, v) for k, v in feeds.items()}
        if method == "loop":
            loop = self.loops.get(chunk)
            if loop is None or not loop.fits(tensors):
                with fixed_work():
                    loop = LOOPS[self.exits](self.model, spec, tensors, self.ahead, self.capture, self.pool)
                self.loops[chunk] = loop
            found = loop(self.deepest)
        else:
            recorded = self._recorded.get((method, chunk))
            if recorded is None or not recorded.fits(tensors):
                work = getattr(self.model, method)
                if method == "head":
                    final = spec.final.name
                    work = lambda given: self.model.head(given[final])  # noqa: E731
                recorded = RecordedMethod(work, tensors, self.capture, self.pool)
                self._recorded[method, chunk] = recorded
            found = recorded()
        return found if on_device else {k: v.cpu().numpy() for k, v in found.items()}


class CudaCalls(TorchCalls):
    """Calls whose tensors stay on the device, what a call is told at the same places each time."""

    def __init__(self, info: ModelInfo, methods: CudaMethods) -> None:
        super().__init__(info, methods)

    def give(self, name: str, array: np.ndarray) -> Tensor:
        assert isinstance(self.methods, CudaMethods)
        return self.methods.given(name, array)


class CudaRuntime(LoopRuntime):
    """A checkpoint folder, or a model already in memory, run by the CUDA engine."""

    def __init__(
        self,
        model: Any,
        name: str,
        nbytes: int = 0,
        device: str = "cuda",
        dtype: str = "fp32",
        tensors: dict[str, Any] | None = None,
        quant: str | None = None,
        source: str | None = None,
        folder: Path | None = None,
        ahead: int = AHEAD,
        exits: str = "flags",
    ) -> None:
        """
        Args:
            ahead, exits: see `CudaMethods`.
            model: a float32 model; its tensors are moved to the device, those that are not replaced.
            dtype: "fp32", "bf16" or "fp16", of the weights that `tensors` does not have.
            tensors: the integers of a quantised model, `QuantizedTensor` by name of the weight.
            quant: what those are called.
        Raises:
            ArgumentError: there is no such device or type, or no triton.
            UserError: the architecture does not say which weights may be held in fewer bits, or its texts have a plan.
        """
        if check_device(device).type == "cuda" and not has_triton():
            raise ArgumentError(
                "runtime", "cuda needs triton, which there is for Linux: pip install 'rmse-edge[cuda]'", "cuda"
            )
        if dtype not in DTYPES:
            raise ArgumentError("dtype", f"got {dtype!r}, expected one of {', '.join(DTYPES)}")
        if arch_of_model(model).planned:
            raise ArgumentError(
                "runtime", f"cuda runs no layers by a plan, as {name} has; torch does, on a GPU too", "cuda"
            )
        source = source or fingerprint(model)
        held = tensors or ({} if dtype == "fp32" else matrices_in(model, DTYPES[dtype]))
        if held:
            model = with_stored(model, held, arch_of_model(model).tied(model.config))
            short_scales(model)
        self.model = model.to(device).eval()
        info = model_info(self.model, name, nbytes, "cuda", source, quant or dtype, folder)
        super().__init__(info, CudaMethods(self.model, device, ahead, exits=exits), CudaCalls)

    @cached_property
    def traffic(self) -> Traffic:
        """Bytes that calls read from memory."""
        return traffic(self.model)

    @property
    def device(self) -> torch.device:
        assert isinstance(self.methods, CudaMethods)
        return self.methods.device

    @classmethod
    def open(cls, folder: str | Path, device: str = "cuda", dtype: str | None = None) -> CudaRuntime:
        """
        Args:
            dtype: of a float checkpoint; None: float32. A quantised one keeps its integers.
        Raises:
            ArgumentError: `dtype` of a quantised checkpoint, or a device or type that is not there.
        """
        folder = Path(folder)
        check_device(device)
        nbytes = sum(file.stat().st_size for file in weight_files(folder))
        name = folder.absolute().name
        if not is_quantized_checkpoint(folder):
            return cls(load_checkpoint(folder), name, nbytes, device, dtype or "fp32", folder=folder)
        if dtype is not None:
            raise ArgumentError("dtype", f"{folder} is quantised and keeps its integers; leave it out", dtype)
        q = load_quantized(folder, lean=True)
        return cls(q.model, name, nbytes, device, tensors=q.tensors, quant=q.quant, source=q.fingerprint, folder=folder)
