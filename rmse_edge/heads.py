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
from typing import TYPE_CHECKING

from .errors import CheckpointError
from .schema import read_json, validated
from .shards import StoredTensors, check_finite

if TYPE_CHECKING:
    from .layers.mtp import MtpHeads

HEADS_FILES = CONFIG, WEIGHTS = "mtp.json", "mtp.safetensors"
AGAIN = "train heads for this model (rmse-train --stage mtp), or remove mtp.json"


def has_heads(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


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


def load_heads(folder: Path, fingerprint: str) -> MtpHeads | None:
    """The heads of a checkpoint folder, in float32 and evaluation mode; None: it has none.

    Args:
        fingerprint: of its model; of a quantised one, that of the float model it was made from.
    Raises:
        CheckpointError: one line that names the file: it is damaged, or the heads are another model's.
    """
    if not has_heads(folder):
        return None
    import torch

    from .layers.mtp import HeadsConfig, MtpHeads

    where = folder / CONFIG
    config = validated(HeadsConfig, read_json(where, CheckpointError), str(where), CheckpointError, AGAIN)
    if config.model != fingerprint:
        raise CheckpointError(f"{where}: the heads were trained on another model; {AGAIN}")
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
