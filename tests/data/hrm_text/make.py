"""Makes the files of this folder: `python make.py FOLDER`, with transformers 5.24.0 and PyTorch 2.13.0 on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import HrmTextConfig, HrmTextForCausalLM

T, PROMPT, SAID = 14, 6, 8
CUTS = ((T,), (6, 1, 1, 1, 1, 1, 1, 1, 1), (5, 4, 5), (1,) * T)
# With a prefix: how long it is, and the calls. It may end within the first call.
PREFIXES = {"all_of_prompt": (6, (6, 1, 1, 1, 1, 1, 1, 1, 1)), "part_of_prompt": (4, (9, 5)), "whole": (T, (T,))}
SIZES = {
    "vocab_size": 33, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.25,
}  # fmt: skip
# name -> (how the checkpoint is laid out, its numbers)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # As the published model: two cycles of three calls of L and one of H, two layers in each.
    "released": ("released", {}),
    # Three cycles of one call each, one layer, a tied head, heads that are no part of the width, a scale of its own. As
    # transformers names tensors within itself, and the real number of layers alone.
    "within": (
        "within",
        {
            "num_hidden_layers": 1, "H_cycles": 3, "L_cycles": 1, "num_attention_heads": 4, "head_dim": 6,
            "tie_word_embeddings": True, "embedding_scale": 3.0, "L_bp_cycles": [1, 1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    # One cycle, three layers, no prefix: token_type_ids change nothing.
    "causal": (
        "released",
        {"num_hidden_layers": 3, "H_cycles": 1, "L_cycles": 2, "prefix_lm": False, "rms_norm_eps": 1e-3},
    ),
}  # fmt: skip


@torch.no_grad()
def lively(model: HrmTextForCausalLM, seed: int) -> None:
    """Random weights, all of them bfloat16 numbers, and a start of z_L that is not zero. Where the head is the embedding, layers
    add more than the token that is there: it would be the likeliest next one, always.
    """
    draw = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        size = {"z_L_init": 0.7, "embed_tokens.weight": 0.25}.get(name.removeprefix("model."), p.shape[-1] ** -0.5)
        if model.config.tie_word_embeddings and name.endswith(("o_proj.weight", "down_proj.weight")):
            size *= 4
        p.copy_((torch.randn(p.shape, generator=draw) * size).bfloat16())


def types(tokens: torch.Tensor, prefix: int) -> torch.Tensor:
    """token_type_ids of a text whose first `prefix` tokens see each other."""
    return (torch.arange(tokens.shape[1]) < prefix).long().expand_as(tokens)


@torch.no_grad()
def fed(model: HrmTextForCausalLM, tokens: torch.Tensor, cut: tuple[int, ...], prefix: int = 0) -> torch.Tensor:
    """Logits of a text in calls, the prefix told to the first of them."""
    cache, logits = None, []
    for part in tokens.split(cut, 1):
        told = {"token_type_ids": types(part, prefix)} if prefix and cache is None else {}
        out = model(part, cache=cache, use_cache=True, **told)
        cache = out.cache
        logits.append(out.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def states(model: HrmTextForCausalLM, tokens: torch.Tensor, prefix: int = 0) -> dict[str, torch.Tensor]:
    """z_L after every call of L, and z_H after every call of H: (calls, n, T, d)."""
    seen: dict[str, list[torch.Tensor]] = {"low": [], "high": []}
    stacks = {"low": model.model.L_module, "high": model.model.H_module}
    hooks = [m.register_forward_hook(lambda _, __, out, n=n: seen[n].append(out)) for n, m in stacks.items()]
    told = {"token_type_ids": types(tokens, prefix)} if prefix else {}
    model(tokens, use_cache=False, **told)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(found) for name, found in seen.items()}


@torch.no_grad()
def greedy(model: HrmTextForCausalLM, tokens: torch.Tensor, **told: torch.Tensor) -> torch.Tensor:
    said = model.generate(tokens[:, :PROMPT], max_new_tokens=SAID, do_sample=False, **told)
    return said[:, PROMPT:]


def numbers(model: HrmTextForCausalLM, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model makes of texts (n, T)."""
    found = {"input_ids": tokens, "logits": torch.stack([fed(model, tokens, cut) for cut in CUTS])}
    found |= states(model, tokens) | {"greedy": greedy(model, tokens)}
    if model.config.prefix_lm:
        for name, (prefix, cut) in PREFIXES.items():
            found[f"prefix.{name}"] = fed(model, tokens, cut, prefix)
        found |= {f"prefix.{name}": t for name, t in states(model, tokens, PROMPT).items()}
        found["prefix.greedy"] = greedy(model, tokens, token_type_ids=types(tokens[:, :PROMPT], PROMPT))
    else:
        same = fed(model, tokens, (T,), PROMPT)
        assert torch.equal(same, found["logits"][0])
    return {name: t.contiguous() for name, t in found.items()}


def main(folder: Path) -> None:
    assert transformers.__version__ == "5.24.0"
    torch.set_num_threads(1)
    for seed, (name, (layout, changes)) in enumerate(MODELS.items()):
        model = HrmTextForCausalLM(HrmTextConfig(**SIZES | changes)).eval()
        lively(model, seed)
        model.tie_weights()
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        values = model.config.to_dict() | {"architectures": ["HrmTextForCausalLM"], "dtype": "bfloat16"}
        if layout == "released":
            model.save_pretrained(place)
            (place / "generation_config.json").unlink()
            weights = load_file(place / "model.safetensors")
            assert any("gqkv_proj" in key for key in weights)
        else:
            weights = {n: p.data for n, p in model.named_parameters()}
            values["num_hidden_layers"] = values.pop("num_layers_per_stack")
            del values["initializer_range"]
        weights = {n: t.bfloat16().contiguous() for n, t in weights.items()}
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(values, indent=1) + "\n")
        # transformers reads it as the same model.
        back = HrmTextForCausalLM.from_pretrained(place, dtype=torch.float32)
        for (n, p), (m, q) in zip(model.named_parameters(), back.named_parameters(), strict=True):
            assert n == m and torch.equal(p, q), n
        assert back.config.num_layers_per_stack == model.config.num_layers_per_stack
        tokens = torch.randint(0, 33, (2, T), generator=torch.Generator().manual_seed(100 + seed))
        save_file(numbers(model, tokens), place / "outputs.safetensors")
        assert load_file(place / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
