"""Makes the files of this folder: `python make.py FOLDER`, with transformers 5.24.0 and PyTorch 2.13.0 on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Inkling2LoopForCausalLM, Inkling2LoopTextConfig

SAID = 8
S, F = "hybrid_sliding", "hybrid"
# name -> (how the checkpoint is laid out, positions of a text, cuts of it, its numbers)
MODELS: dict[str, tuple[str, int, tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    # Two layers in, four looped, two out; a window of three, one full layer in the loop.
    "grouped": ("released", 14, ((6, *[1] * 8), (5, 4, 5), (1,) * 14), {"loop_num_passes": 2}),
    # Three passes of three blocks, heads of another size and number in full layers, a text of several calls.
    "long": (
        "within",
        80,
        ((64, 16), (64, *[1] * 16), (1,) * 80),
        {
            "num_hidden_layers": 5, "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1,
            "loop_layer_index_end": 4, "loop_num_passes": 3, "layer_types": [S, F, S, F, S], "head_dim": 6,
            "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window_size": 24, "rel_extent": 20,
            "log_scaling_n_floor": 16, "max_position_embeddings": 96, "conv_kernel_size": 3,
        },
    ),
    # One pass, all layers full.
    "once": ("released", 14, ((6, *[1] * 8), (14,)), {"loop_num_passes": 1, "layer_types": [F] * 8, "route_scale": 1.5}),
    # Five passes, nothing behind the loop, all layers with a window.
    "deep": (
        "released",
        14,
        ((6, *[1] * 8), (5, 4, 5), (1,) * 14),
        {
            "num_hidden_layers": 4, "loop_layer_index_end": 4, "loop_num_passes": 5, "layer_types": [S] * 4,
            "num_experts_per_tok": 3, "conv_kernel_size": 2, "sliding_window_size": 5,
        },
    ),
}  # fmt: skip
SIZES = {
    "vocab_size": 40, "unpadded_vocab_size": 33, "hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 4,
    "sliding_window_size": 3, "d_rel": 3, "rel_extent": 6, "log_scaling_n_floor": 4, "moe_intermediate_size": 8,
    "n_routed_experts": 5, "num_experts_per_tok": 2, "n_layers_per_attn_res_block": 2, "loop_layer_index_start": 2,
    "loop_layer_index_end": 6, "loop_gate_rank": 5, "max_position_embeddings": 64, "eos_token_id": None,
    "qk_l2_clip_threshold": 2.0, "rel_l2_clip_threshold": 1.5, "mlp_gate_softcap": 1.5, "mlp_up_softcap": 2.0,
    "final_logit_softcapping": 2.0, "route_scale": 2.5,
}  # fmt: skip


@torch.no_grad()
def lively(model: Inkling2LoopForCausalLM, seed: int) -> None:
    """Random weights and scales of which each does something, all of them bfloat16 numbers."""
    draw = torch.Generator().manual_seed(seed)
    for name, p in model.state_dict().items():
        value = torch.randn(p.shape, generator=draw)
        if name.endswith(("norm.weight", "norm.scale")):
            value = 1 + 0.3 * value
        elif name.endswith("e_score_correction_bias"):
            value = 0.2 * value
        elif "conv1d" in name or name.endswith("static_weight"):
            value = 0.3 * value
        elif name.endswith("lm_head.weight"):
            value = value * p.shape[-1] ** -0.5
        elif "_gate" in name or name.endswith(
            "o_proj.linear.weight"
        ):  # so that errors of rounding grow less on their way
            value = 0.5 * value * p.shape[-1] ** -0.5
        elif name.endswith("query"):
            value = 0.3 * value
            if (
                "message" not in name
            ):  # as in a trained model, layers read the token most of all: nothing grows chaotically
                value[..., 0] += 4
        elif name.endswith("embed_tokens.weight"):
            value[:, 0] += 2
        else:
            value = value * p.shape[-1] ** -0.5
        p.copy_(value.bfloat16())


@torch.no_grad()
def numbers(
    model: Inkling2LoopForCausalLM, tokens: torch.Tensor, cuts: tuple[tuple[int, ...], ...]
) -> dict[str, torch.Tensor]:
    """What the model makes of texts (n, T)."""
    c, m = model.config, model.model
    start, end, each = c.loop_layer_index_start, c.loop_layer_index_end, c.n_layers_per_attn_res_block
    entered: dict[int, list[torch.Tensor]] = {}
    left: list[torch.Tensor] = []
    final: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: entered.setdefault(i, []).append(args[0]))
        for i, layer in enumerate(m.layers)
    ]
    hooks.append(m.layers[end - 1].register_forward_hook(lambda _, __, out: left.append(out)))
    hooks.append(m.norm.register_forward_hook(lambda _, __, out: final.append(out)))
    alone = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    found = {"input_ids": tokens, "final": final[0]}
    # The blocks before the loop, side by side, and those that each pass gives.
    found["input_out"] = torch.cat([entered[i][0] for i in range(0, start + 1, each)], -1)
    opened = range(start + each, end, each)
    passes = [torch.cat([*(entered[i][k] for i in opened), left[k]], -1) for k in range(c.loop_num_passes)]
    found["loop_out"] = torch.stack(passes)
    logits = [alone]
    for cut in cuts:
        cache, parts = None, []
        for part in tokens.split(cut, 1):
            out = model(part, cache=cache, use_cache=True)
            cache = out.cache
            parts.append(out.logits)
        logits.append(torch.cat(parts, 1))
        assert (logits[-1] - alone).abs().max() < 5e-5, cut
    found["logits"] = torch.stack(logits)  # of the cuts, the whole text first
    out, said = model(tokens[:, :6], use_cache=True), []
    while len(said) < SAID:
        said.append(out.logits[:, -1].argmax(-1))
        out = model(said[-1][:, None], cache=out.cache, use_cache=True)
    found["greedy"] = torch.stack(said, 1)
    return {name: t.contiguous() for name, t in found.items()}


def main(folder: Path) -> None:
    assert transformers.__version__ == "5.24.0"
    torch.set_num_threads(1)
    for seed, (name, (layout, count, cuts, changes)) in enumerate(MODELS.items()):
        model = Inkling2LoopForCausalLM(Inkling2LoopTextConfig(**SIZES | changes)).eval()
        model.set_attn_implementation("eager")
        lively(model, seed)
        place = folder / name
        model.save_pretrained(place)
        (place / "generation_config.json").unlink(missing_ok=True)
        weights = load_file(place / "model.safetensors") if layout == "released" else model.state_dict()
        weights = {n: t.bfloat16().contiguous() for n, t in weights.items()}
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        values = json.loads((place / "config.json").read_text()) | {"dtype": "bfloat16"}
        (place / "config.json").write_text(json.dumps(values, indent=1) + "\n")
        # transformers reads it as the same model.
        back = Inkling2LoopForCausalLM.from_pretrained(place, dtype=torch.float32)
        for (n, p), (m, q) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
            assert n == m and torch.equal(p, q), n
        tokens = torch.randint(0, 33, (2, count), generator=torch.Generator().manual_seed(100 + seed))
        save_file(numbers(model, tokens, cuts), place / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
