"""The reference runtime: the PyTorch model itself, on a CPU or a GPU."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.errors import UserError
from rmse_edge.loop.contract import LoopModel, run_loop
from rmse_edge.numbers import SEGMENT
from rmse_edge.quantize import is_quantized_checkpoint, load_quantized
from rmse_edge.runtimes.host.base import Arrays, Dials, ModelInfo, dtype_name
from rmse_edge.runtimes.host.text import LoopRuntime
from rmse_edge.shards import weight_files
from rmse_edge.vocabulary import Vocabulary


class TorchMethods:
    """A `LoopModel`'s methods on NumPy arrays."""

    def __init__(self, model: LoopModel, device: str = "cpu") -> None:
        self.model = model
        self.device = torch.device(device)

    @torch.inference_mode()
    def run(self, method: str, chunk: int, feeds: Arrays) -> Arrays:
        model, spec = self.model, self.model.spec(chunk)
        tensors = {k: torch.from_numpy(np.asarray(v)).to(self.device) for k, v in feeds.items()}
        if method == "prelude":
            out = model.prelude(tensors)
        elif method == "loop":
            out = run_loop(model, spec, tensors, {d: tensors[d] for d in spec.dials})
        elif method == "head":
            out = model.head(tensors["h"])
        elif method == "commit" or method in spec.extra:
            out = getattr(model, method)(tensors)
        else:
            raise ValueError(f"unknown method {method!r}")
        return {k: v.cpu().numpy() for k, v in out.items()}


def model_info(
    model: RMSE,
    name: str,
    nbytes: int,
    target: str = "torch",
    source: str | None = None,
    quant: str = "fp32",
    vocabulary: Vocabulary | None = None,
) -> ModelInfo:
    """The host's view of an RMS-E model.

    Args:
        nbytes: size of what holds it on disk.
        source: fingerprint of the float model that a quantised one was made from. It counts as the same model: sessions
            and knowledge bases of one can be used with the other.
        quant: how the weights are held.
        vocabulary: of the folder that the model comes from; None: the model's configuration is all there is.
    """
    config, spec = model.config, model.spec(1)
    slots = config.retrieval_slots
    vocabulary = vocabulary or Vocabulary.of_model(config.eos_token_id)
    return ModelInfo(
        name=name,
        target=target,
        vocab_size=config.vocab_size,
        max_loops=config.max_loops,
        dials=Dials(
            config.max_loops, config.min_loops, config.exit_threshold, config.exit_epsilon, config.exit_entropy
        ),
        window=config.window,
        rotary_dims=config.rotary_dims,
        rope_theta=config.rope_theta,
        parameters=sum(p.numel() for p in model.parameters()),
        nbytes=nbytes,
        chunks=(1, SEGMENT),
        state={t.name: (t.shape, dtype_name(t.dtype)) for t in spec.state},
        rings=dict(spec.notes["rings"]),
        memory={t.name: (t.shape, "float32") for t in spec.memory},
        retrieval={
            "key_dims": config.retrieval_dim,
            "slots": slots,
            "hits": config.retrieval_hits,
            "gamma": config.retrieval_gamma,
        }
        if slots
        else None,
        quant=quant,
        fingerprint=_with_cache(source or fingerprint(model), model),
        eos_token_ids=vocabulary.eos_token_ids,
        unused_token_ids=vocabulary.unused_token_ids,
        config=config.to_dict(),
    )


def _with_cache(found: str, model: RMSE) -> str:
    """A fingerprint that tells int8 caches of different scales apart: one could be read as the other."""
    if model.config.kv_dtype != "int8":
        return found
    return hashlib.sha256(found.encode() + model.block.attention.kv_scales.cpu().numpy().tobytes()).hexdigest()


DIALS_OF_CONFIG = ("exit_", "min_loops", "retrieval_gamma")


def fingerprint(model: RMSE) -> str:
    """SHA-256 of the architecture and all weights: what a session or a knowledge base was made with.

    The dials do not count: they may be set anew for every call.
    """
    architecture = {k: v for k, v in model.config.to_dict().items() if not k.startswith(DIALS_OF_CONFIG)}
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class TorchRuntime(LoopRuntime):
    """A checkpoint folder, or a model already in memory, run by PyTorch."""

    def __init__(
        self,
        model: RMSE,
        name: str,
        nbytes: int = 0,
        device: str = "cpu",
        source: str | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
        self.model = model.to(device).eval()
        info = model_info(model, name, nbytes, source=source, vocabulary=vocabulary)
        super().__init__(info, TorchMethods(model, device))

    @classmethod
    def open(cls, folder: str | Path, device: str = "cpu") -> TorchRuntime:
        folder = Path(folder)
        quantized = load_quantized(folder) if is_quantized_checkpoint(folder) else None
        model, source = (quantized.model, quantized.fingerprint) if quantized else (load_checkpoint(folder), None)
        nbytes = sum(file.stat().st_size for file in weight_files(folder))
        vocabulary = Vocabulary.of_folder(folder, model.config.vocab_size, model.config.eos_token_id)
        return cls(model, folder.absolute().name, nbytes, device, source, vocabulary)


def set_threads(threads: int | None) -> None:
    """Limit PyTorch's threads for the whole process."""
    if threads is not None:
        torch.set_num_threads(threads)
