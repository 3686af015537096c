"""The heads for multi-token prediction of a checkpoint folder: two files beside the model's own, which stay what they are.

    mtp.json           how many heads there are, their sizes, and the fingerprint of the model that they were trained on
    mtp.safetensors    their weights, bfloat16; nothing of the model's, whose embedding and head they use

So a folder with heads is the same model as without: its sessions, knowledge bases and texts are the same. A quantised checkpoint has the
files of the one that it was made from. Heads stay float there: each is run once a token, a loop's weights again and again; and what
rounding would change of a draft costs accepted tokens and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arch.common.identity import fingerprint
from .arch.registry import arch_of_model
from .errors import CheckpointError, ConfigError
from .schema import read_json, validated
from .shards import StoredTensors, check_finite

if TYPE_CHECKING:
    from .layers.mtp import MtpHeads

HEADS_FILES = CONFIG, WEIGHTS = "mtp.json", "mtp.safetensors"
AGAIN = "train heads for this model (rmse-train --stage mtp), or remove mtp.json"


def save_heads(heads: MtpHeads, folder: Path) -> None:
    """Write the two files.

    Raises:
        CheckpointError: a tensor holds NaN or Inf as it is stored.
    """
    import torch
    from safetensors.torch import save_file

    tensors = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in heads.state_dict().items()}
    for name, tensor in tensors.items():
        check_finite(folder / WEIGHTS, name, tensor)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(heads.config), indent=2) + "\n", encoding="utf-8")


def load_heads(folder: Path, model: Any, source: str | None = None) -> MtpHeads | None:
    """The heads of a checkpoint folder, in float32 and evaluation mode; None: it has none.

    Args:
        model: of the folder.
        source: of a quantised model, the fingerprint of the float model it was made from.
    Raises:
        CheckpointError: one line that names the file: it is damaged, or the heads are another model's.
    """
    if not (folder / CONFIG).is_file():
        return None
    import torch

    from .layers.mtp import HeadsConfig, MtpHeads

    where = folder / CONFIG
    config = validated(HeadsConfig, read_json(where, CheckpointError), str(where), CheckpointError, AGAIN)
    if config.model != (source or fingerprint(model)):
        raise CheckpointError(f"{where}: the heads were trained on another model; {AGAIN}")
    if (name := embedding_of(model)) != config.embedding:
        raise CheckpointError(f"{where}: embedding: got {config.embedding!r}, expected {name!r}; {AGAIN}")
    if (width := model.spec(1).h.shape[-1]) != config.hidden_size:
        raise CheckpointError(f"{where}: hidden_size: got {config.hidden_size}, expected the model's {width}; {AGAIN}")
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder / WEIGHTS}: no such file; copy it beside {CONFIG}, or remove that")
    stored = StoredTensors(folder, WEIGHTS, CONFIG)
    with torch.device("meta"):
        heads = MtpHeads(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}
    if stored.names() != wanted.keys():
        name = min(stored.names() ^ wanted.keys())
        raise CheckpointError(
            f"{stored.path}: tensor {name} is {'missing' if name in wanted else 'none of the heads'}; {AGAIN}"
        )
    tensors = {name: stored.read(name, shape) for name, shape in wanted.items()}
    heads.load_state_dict(tensors, assign=True)
    return heads.eval().requires_grad_(False)


def embedding_of(model: Any) -> str:
    """The name of the layer that looks up the rows of tokens.

    Raises:
        ConfigError: it is not to be told which.
    """
    from torch import nn

    table = arch_of_model(model).quantization
    if table is not None and (name := table(model.config).embedding) is not None:
        return name.rpartition(".")[0]
    size = model.config.vocab_size
    found = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding) and m.num_embeddings == size]
    if len(found) != 1:
        raise ConfigError(f"model_type: {model.config.model_type} has {len(found)} embeddings of tokens, expected one")
    return found[0]


def check_fits(model: Any) -> None:
    """Fail where a model cannot have heads.

    Raises:
        ConfigError: it does not write token by token, makes a plan of each text, or its head reads other states than it loops over.
    """
    arch, name = arch_of_model(model), model.config.model_type
    if getattr(model.config, "vocab_size", None) is None or arch.by_blocks or not hasattr(model, "whole_text"):
        raise ConfigError(f"model_type: {name} does not write token by token, and has no use for drafts")
    if arch.planned:
        raise ConfigError(f"model_type: {name} runs its texts by a plan, and drafts nothing")
    spec = model.spec(1)
    wide = model.get_submodule(embedding_of(model)).embedding_dim
    if not spec.h.shape == spec.final.shape == (1, 1, wide):
        sizes = f"states {spec.h.shape}, embeddings of {wide}, and a head that reads {spec.final.shape}"
        raise ConfigError(f"model_type: {name} has {sizes}; heads need them alike")
