"""`RMSEForCausalLM`: `LoopedForCausalLM` of RMS-E."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from rmse_edge.arch.registry import Arch
from rmse_edge.arch.rmse import ARCH
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.layers.attention import Attention
from rmse_edge.layers.experts import SparseExperts
from rmse_edge.layers.memory.atlas import Atlas

from .cache import RMSECache
from .config import RMSEPretrainedConfig
from .looped_cache import LoopedCache
from .looped_model import LoopedCausalLMOutput, LoopedForCausalLM

__all__ = ["RMSECache", "RMSECausalLMOutput", "RMSEForCausalLM", "RMSEPretrainedConfig"]

RMSECausalLMOutput = LoopedCausalLMOutput


class RMSEForCausalLM(LoopedForCausalLM):
    """RMS-E with the interface of a Hugging Face causal language model: see `LoopedForCausalLM`.

    Its cache is a ring per loop, which does not grow with the text, and the neural memory.
    """

    config_class = RMSEPretrainedConfig
    base_model_prefix = "rmse"
    arch: ClassVar[Arch] = ARCH
    cache_class: ClassVar[type[LoopedCache]] = RMSECache
    spoken = "RMS-E"
    rmse: RMSE
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def _build(self, config: Any) -> RMSE:
        # The tables of temporal_rope come from NumPy, which does not mix with tensors of the meta device.
        on_meta = torch.get_default_device().type == "meta"
        with torch.device("cpu") if on_meta and config.step_encoding == "temporal_rope" else nullcontext():
            return super()._build(config)

    def _init_weights(self, module: nn.Module) -> None:
        """Fill the buffers that no checkpoint holds, of a model that was made without storage."""
        if isinstance(module, SparseExperts):
            module.get_buffer("load").zero_()
        if isinstance(module, (Attention, Atlas)):
            with torch.device("cpu"):
                tables = module.tables()
            for name, table in tables.items():
                module.get_buffer(name).copy_(table)


AutoModelForCausalLM.register(RMSEPretrainedConfig, RMSEForCausalLM, exist_ok=True)
