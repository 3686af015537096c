"""The GPT baseline: nanoGPT's published block, as transformers' GPT-2 computes it, whose weights nanoGPT reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rmse_edge.errors import CheckpointError
from rmse_edge.train.gpt import GPT, GPTConfig, load_gpt, save_gpt

PUBLISHED = {"positions": "learned", "bias": True, "tied": True, "dropout": 0.0}
SIZES = {"vocab_size": 40, "d_model": 24, "n_heads": 3, "n_layers": 2, "block_size": 32}
# Ours -> GPT-2's, which keeps its linear layers transposed.
LINEAR = {"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
NORMS = {"norm_1": "ln_1", "norm_2": "ln_2"}


def test_nanogpts_block_says_what_gpt_2_says() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40, n_embd=24, n_head=3, n_layer=2, n_positions=32, activation_function="gelu",
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )
    ).eval()  # fmt: skip
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    given = theirs.transformer.state_dict()
    weights = {
        "embed.weight": given["wte.weight"],
        "head.weight": given["wte.weight"],
        "places.weight": given["wpe.weight"],
    }
    for kind in ("weight", "bias"):
        weights[f"norm.{kind}"] = given[f"ln_f.{kind}"]
        for layer in range(2):
            for ours, name in (LINEAR | NORMS).items():
                tensor = given[f"h.{layer}.{name}.{kind}"]
                weights[f"layers.{layer}.{ours}.{kind}"] = tensor.T if ours in LINEAR else tensor
    model = GPT(GPTConfig(**SIZES, **PUBLISHED)).eval()
    model.load_state_dict(weights)
    tokens = torch.randint(40, (3, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, PUBLISHED])
def test_a_baseline_comes_back(changes: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | changes)).eval()
    save_gpt(model, tmp_path, torch.float32)
    back = load_gpt(tmp_path)
    tokens = torch.randint(40, (2, 17))
    with torch.no_grad():
        assert torch.equal(model(tokens), back(tokens)) and back.config == model.config
    assert (back.head.weight is back.embed.weight) == model.config.tied
    begun = dict(model.named_parameters())
    assert all(not p.any() for name, p in begun.items() if name.endswith("bias"))


def test_weights_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    save_gpt(GPT(GPTConfig(**SIZES)), tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"tied": false', '"tied": true').replace('"rotary"', '"learned"')
    )
    with pytest.raises(CheckpointError, match=r"not a readable gpt-baseline .*places\.weight"):
        load_gpt(tmp_path)
