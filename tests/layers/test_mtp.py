"""Heads for multi-token prediction, against another's, and as hosts run them. 5 s, most of it to import transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import mixed_model, random_heads
from torch import Tensor, nn

from rmse_edge.errors import ParityError
from rmse_edge.export.gate.methods import compare_methods
from rmse_edge.export.program import LoopProgram, specs_of
from rmse_edge.layers.mtp import HeadsConfig, MtpHead
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.runtimes.engines.torch import TorchMethods, TorchRuntime
from rmse_edge.train.mtp import chain


def test_a_head_is_the_published_layer_around_another_block():
    """`MtpLayer` of transformers, by its own names, with our block in the place of its decoder layer."""
    layers = pytest.importorskip("transformers.modeling_layers")
    torch.manual_seed(3)
    ours = MtpHead(HeadsConfig(1, 16, 24, 1e-5, "embed", "0" * 64))
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 1.0))

    class Block(nn.Module):
        def __init__(self, config: Any, index: int) -> None:
            super().__init__()

        def forward(self, x: Tensor, **rest: Any) -> Tensor:
            return x + ours.mlp(ours.norm(x))

    config = SimpleNamespace(hidden_size=16, rms_norm_eps=1e-5)
    theirs = layers.MtpLayer(config, Block, lambda width, eps: RMSNorm(width, eps), 0)
    own = {k: v for k, v in ours.state_dict().items() if not k.startswith(("mlp.", "norm."))}
    theirs.load_state_dict(own)
    embedded, state = torch.randn(2, 1, 5, 16)
    said = theirs(embedded, state, position_embeddings=None, attention_mask=None, position_ids=None, cache=None)
    torch.testing.assert_close(ours(embedded, state), said, atol=1e-6, rtol=0)


@torch.no_grad()
def test_hosts_run_the_chain_that_was_trained():
    """Behind a text, and beyond the last head, which goes on."""
    model = mixed_model()
    heads = random_heads(model, 2)
    runtime, text = TorchRuntime(model, "tiny", heads=heads), [5, 3, 8, 1]
    for length in (3, 1):  # a call of some rows, and of one
        runtime.reset()
        for start in range(0, 3, length):
            runtime.feed(text[start : start + length], runtime.info.dials)
        dials = {name: torch.from_numpy(v) for name, v in runtime.info.dials.arrays().items()}
        state = model.whole_text(torch.tensor(text[:3]), dials).h[-1:]
        behind = torch.tensor([[1, 7]])
        states = chain(heads, model.embed, state, behind)
        states.append(heads.layers[1](model.embed(torch.tensor([4])), states[-1]))
        feed = runtime.by_heads()
        for token, wanted in zip((1, 7, 4), states):
            np.testing.assert_allclose(feed(token), model.head(wanted[None])["logits"][0, 0], atol=1e-4)
    runtime.reset()
    with pytest.raises(ValueError, match="no newest position"):
        runtime.by_heads()


def test_a_memory_has_its_methods_beside_those_of_heads():
    """In calls of a segment, and heads in calls of one row."""
    model = mixed_model(memory="titans", memory_dim=16, memory_hidden=32)
    specs = specs_of(model, (1, 64), None, random_heads(model))
    assert [list(specs[rows].extra) for rows in (1, 64)] == [["draft0", "draft1"], ["blank", "memorize"]]


def test_the_gate_compares_every_head():
    model = mixed_model()
    heads, others = random_heads(model), random_heads(model)
    with torch.no_grad():
        others.layers[1].post_norm.weight.mul_(1.01)  # type: ignore[union-attr, operator]
    program = LoopProgram(model, {1: heads.added_to(model.spec(1))}, (), heads=heads)

    class Host(TorchMethods):
        def run(self, method: str, chunk: int, feeds: dict[str, Any]) -> dict[str, Any]:
            if method not in ("begin", "step"):
                return super().run(method, chunk, feeds)
            raise NotImplementedError  # the heads come before these

    with pytest.raises(NotImplementedError):
        compare_methods(program, Host(model, heads=heads), vars(model.config.dials), 1e-4)
    with pytest.raises(ParityError, match="draft1_1: drafted differs"):
        compare_methods(program, Host(model, heads=others), vars(model.config.dials), 1e-4)
