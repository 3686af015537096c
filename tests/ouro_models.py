"""Small models of Ouro's architecture for tests: random ones, and the published code's own numbers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from paths import ROOT
from safetensors.torch import load_file
from torch import Tensor

from rmse_edge.arch.ouro.config import OuroConfig
from rmse_edge.arch.ouro.model import Ouro
from rmse_edge.checkpoint import load_checkpoint

GOLDEN = ROOT / "tests" / "data" / "ouro"
POLICIES = ("propagate", "repeat", "all")


def golden() -> dict[str, Tensor]:
    """What tests/data/ouro/README.md names; `input_ids` (2, 14) among it."""
    return load_file(GOLDEN / "outputs.safetensors") | load_file(GOLDEN / "inputs.safetensors")


def published(**changes: Any) -> Ouro:
    """The model of the published numbers, with these settings changed."""
    model = load_checkpoint(GOLDEN)
    changed = Ouro(dataclasses.replace(model.config, **changes)).eval()
    changed.load_state_dict(model.state_dict())
    return changed


def published_folder(folder: Path, **changes: Any) -> Path:
    """The published checkpoint, with these keys of its config.json changed; None takes one out."""
    folder.mkdir()
    shutil.copyfile(GOLDEN / "model.safetensors", folder / "model.safetensors")
    values = json.loads((GOLDEN / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def lively_ouro(seed: int = 0, **changes: Any) -> Ouro:
    """Two layers with grouped heads, three loops, random weights under which positions stop at every depth."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 65, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "total_ut_steps": 3, "max_position_embeddings": 512, "rope_theta": 10_000.0,
    }  # fmt: skip
    model = Ouro(OuroConfig(**sizes | changes)).eval()
    with torch.no_grad():
        model.model.early_exit_gate.weight.normal_(std=0.25)
        model.model.early_exit_gate.bias.fill_(-0.4)
    return model


def decided_ouro() -> Ouro:
    """The same, but of what it read last it is as sure as a trained model is of what comes next: the head is the embedding,
    and branches add little to it.
    """
    model = lively_ouro()
    with torch.no_grad():
        model.lm_head.weight.copy_(0.3 * model.model.embed_tokens.weight)
        for layer in model.model.layers:
            for norm in (layer.input_layernorm_2, layer.post_attention_layernorm_2):
                norm.weight.mul_(0.4)
    return model
