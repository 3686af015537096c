"""Makes the files of this folder: `python make.py FOLDER`, with transformers 5.24.0 and PyTorch 2.13.0 on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DoryConfig, DoryForCausalLM

T, PROMPT, SAID = 14, 6, 8
CUTS = ((6, 1, 1, 1, 1, 1, 1, 1, 1), (5, 4, 5), (1,) * T)
S, F = "sliding_attention", "full_attention"
# name -> (how the checkpoint is laid out, its numbers)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # One layer in, two looped, one out; grouped heads, a window of three.
    "grouped": ("released", {"layer_types": [S, S, F, S], "n_recurrent_loops": 2}),
    # Four loops, a tied head, kinds by default, one head of keys.
    "deep": (
        "written",
        {
            "num_hidden_layers": 5, "n_recurrent_loops": 4, "num_key_value_heads": 1, "head_dim": 6, "sliding_window": 5,
            "tie_word_embeddings": True, "initializer_range": 0.05, "ngpt_alpha_init": 0.1,
        },
    ),
    # One loop, layers of one kind, as many heads of keys as of queries.
    "once": (
        "within",
        {
            "layer_types": [F, F, F], "num_hidden_layers": 3, "n_recurrent_loops": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": {F: {"rope_type": "default", "rope_theta": 100.0}},
        },
    ),
    # One set of keys and values for all loops: read token by token.
    "shared": (
        "released",
        {"layer_types": [S, S, F, S], "n_recurrent_loops": 3, "recurrent_kv_cache_mode": "last_loop"},
    ),
}  # fmt: skip
SIZES = {
    "vocab_size": 33, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 3, "n_input_layers": 1, "n_output_layers": 1,
    "max_position_embeddings": 64,
}  # fmt: skip


def lively(model: DoryForCausalLM, seed: int) -> None:
    """Random weights and scales of which each does something, all of them bfloat16 numbers."""
    draw = torch.Generator().manual_seed(seed)
    c = model.config

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=draw) * (high - low) + low

    for name, p in model.named_parameters():
        if name.endswith(("sqk", "s_gate")):
            value = uniform(p, 0.4, 1.1) * c.initializer_range
        elif ".suv_" in name:
            value = uniform(p, 0.3, 1.2)
        elif ".lambda_" in name:  # of either sign: the rate is its absolute value
            value = uniform(p, 0.1, 0.6) * torch.sign(uniform(p, -1, 1)) * c.initializer_range / c.ngpt_alpha_init
        elif name.endswith("logit_scale"):
            value = uniform(p, 2.0, 5.0) * c.initializer_range
        else:
            value = torch.randn(p.shape, generator=draw) * p.shape[-1] ** -0.5
        p.data.copy_(value.bfloat16())


def on_disk(name: str, layout: str) -> str:
    """A parameter's name in a checkpoint."""
    if layout == "within":
        return name
    name = name.replace("model.embed_tokens", "backbone.embeddings").replace("self_attn.gate_proj", "self_attn.g_proj")
    name = name.replace("model.", "backbone.")
    parts = name.split(".")
    if layout == "written" or parts[1] != "layers":
        return name
    block = 2 * int(parts[2]) + (parts[3] in ("mlp", "lambda_2"))
    ours = {"self_attn": "mixer", "mlp": "mixer", "lambda_1": "attn_alpha", "lambda_2": "mlp_alpha"}[parts[3]]
    return ".".join(("backbone.layers", str(block), ours, *parts[4:]))


@torch.no_grad()
def numbers(model: DoryForCausalLM, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model makes of texts (n, T): with cuts where its cache is per loop, else token by token alone."""
    c, m = model.config, model.model
    seen: dict[int, list[torch.Tensor]] = {}
    for i, layer in enumerate(m.layers):
        layer.register_forward_hook(lambda _, __, out, i=i: seen.setdefault(i, []).append(out))
    found = {"input_ids": tokens}
    shared = c.recurrent_kv_cache_mode == "last_loop"
    first, last = c.n_input_layers - 1, c.n_input_layers + c.n_recurrent_layers - 1
    cut_logits = []
    for cut in CUTS[-1:] if shared else ((T,), *CUTS):
        seen.clear()
        cache, logits, states = None, [], []
        for part in tokens.split(cut, 1):
            out = model(part, cache=cache, use_cache=True)
            cache = out.cache
            logits.append(out.logits)
            states.append(m.norm(seen[len(m.layers) - 1][-1]))
        cut_logits.append(torch.cat(logits, 1))
        if cut == (T,) or shared:
            loops = c.n_recurrent_loops
            found["input_out"] = torch.cat(seen[first], 1)
            found["loop_out"] = torch.stack([torch.cat(seen[last][k::loops], 1) for k in range(loops)])
            found["final"] = torch.cat(states, 1)
    found["logits"] = torch.stack(cut_logits)  # of the cuts, the whole text first
    if not shared:
        alone = model(tokens, use_cache=False).logits
        assert (alone - found["logits"][0]).abs().max() < 1e-5
    said: list[torch.Tensor] = []
    cache, part = None, tokens[:, :PROMPT]
    for one in part.split(1, 1) if shared else (part,):
        out = model(one, cache=cache, use_cache=True)
        cache = out.cache
    while len(said) < SAID:
        said.append(out.logits[:, -1].argmax(-1))
        out = model(said[-1][:, None], cache=cache, use_cache=True)
        cache = out.cache
    found["greedy"] = torch.stack(said, 1)
    return {name: t.contiguous() for name, t in found.items()}


def main(folder: Path) -> None:
    assert transformers.__version__ == "5.24.0"
    torch.set_num_threads(1)
    for seed, (name, (layout, changes)) in enumerate(MODELS.items()):
        model = DoryForCausalLM(DoryConfig(**SIZES | changes)).eval()
        model.set_attn_implementation("eager")
        lively(model, seed)
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        weights = {on_disk(n, layout): p.data.bfloat16().contiguous() for n, p in model.named_parameters()}
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        values = model.config.to_dict() | {"architectures": ["DoryForCausalLM"], "dtype": "bfloat16"}
        if layout == "within":  # counted in layers of an attention and an MLP
            values["layer_types"] = model.config.layer_types
            for key in ("num_hidden_layers", "n_input_layers", "n_recurrent_layers", "n_output_layers"):
                values[key] //= 2
        (place / "config.json").write_text(json.dumps(values, indent=1) + "\n")
        # transformers reads it as the same model.
        back = DoryForCausalLM.from_pretrained(place, dtype=torch.float32)
        for (n, p), (m, q) in zip(model.named_parameters(), back.named_parameters(), strict=True):
            assert n == m and torch.equal(p, q), n
        tokens = torch.randint(0, 33, (2, T), generator=torch.Generator().manual_seed(100 + seed))
        save_file(numbers(model, tokens), place / "outputs.safetensors")
        assert load_file(place / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
