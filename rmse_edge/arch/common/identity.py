"""What a model is, for hosts: `ModelInfo` from its spec and its architecture, and the fingerprint of its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rmse_edge.arch.registry import arch_of, arch_of_model
from rmse_edge.info import DraftingInfo, ModelInfo
from rmse_edge.layers.cache import scales_of
from rmse_edge.layers.held import count
from rmse_edge.vocabulary import Vocabulary

if TYPE_CHECKING:
    from rmse_edge.layers.mtp import MtpHeads


def model_info(
    model: Any,
    name: str,
    nbytes: int,
    target: str = "torch",
    source: str | None = None,
    quant: str = "fp32",
    folder: Path | None = None,
    max_seq_len: int | None = None,
    sizes: Iterable[int] | None = None,
    heads: MtpHeads | None = None,
) -> ModelInfo:
    """The host's view of a model.

    Args:
        nbytes: size of what holds it on disk.
        source: fingerprint of the float model that a quantised one was made from. It counts as the same model: sessions
            and knowledge bases of one can be used with the other.
        quant: how the weights are held.
        max_seq_len: tokens that a text may have, where that is fewer than the model takes.
        sizes: rows of its calls, ascending; None: the model's own.
        heads: that draft for it, if it has any.
        folder: that the model comes from, with its tokenizer; None: the model's configuration is all there is.
    """
    specs = {chunk: model.spec(chunk).of_capacity(max_seq_len) for chunk in sizes or model.call_sizes()}
    drafting = None
    if heads is not None:
        specs = {chunk: heads.added_to(spec) for chunk, spec in specs.items()}
        drafting = DraftingInfo(heads.config.heads, next(iter(specs.values())).final.name)
    found = source or fingerprint(model)
    if scales := scales_of(model):
        found = hashlib.sha256(found.encode() + scales).hexdigest()
    info = ModelInfo.of_spec(
        specs,
        name=name,
        target=target,
        model_type=model.config.model_type,
        parameters=count(model),
        nbytes=nbytes,
        quant=quant,
        fingerprint=found,
        config=model.config.to_dict(),
        drafting=drafting,
        **arch_of_model(model).parts(model),
    )
    if info.text_part is None:
        return info
    info = info if max_seq_len is None else info.with_limit(max_seq_len)
    if folder is None:
        return info
    tokens = Vocabulary.of_folder(folder, info.vocab_size, info.language.eos_token_ids)
    text = dataclasses.replace(
        info.language, eos_token_ids=tokens.eos_token_ids, unused_token_ids=tokens.unused_token_ids
    )
    return info.with_language(text)


def fingerprint(model: Any) -> str:
    """SHA-256 of the architecture and all weights: what a session or a knowledge base was made with.

    The dials do not count: they may be set anew for every call.
    """
    return fingerprint_of(model.config, sorted(model.state_dict().items()))


def fingerprint_of(config: Any, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """`fingerprint` of all tensors of a model, in alphabetical order, which need not be there at the same time."""
    settings = arch_of(config.model_type).settings
    architecture = {k: v for k, v in config.to_dict().items() if not k.startswith(settings or ("\0",))}
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
