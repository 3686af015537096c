"""Rodimus and Rodimus+ against the numbers of their published code; tests/data/rodimus/README.md says what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_one_line
from paths import ROOT
from published_code import assert_close, assert_refused, fed, whole
from safetensors.torch import load_file
from torch import Tensor

from rmse_edge.arch.common.hybrid_model import HybridModel
from rmse_edge.arch.hybrid.config import HybridConfig
from rmse_edge.arch.registry import arch_of, read_config
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.errors import ConfigError
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.engines.torch import TorchRuntime

DATA = ROOT / "tests" / "data"
both = pytest.mark.parametrize("name", ["rodimus", "rodimus_plus"])


def known(name: str) -> dict[str, Tensor]:
    return load_file(DATA / name / "outputs.safetensors") | load_file(DATA / name / "inputs.safetensors")


@both
@pytest.mark.parametrize("text", [0, 1])
@torch.no_grad()
def test_the_published_logits_at_once_and_in_calls(name: str, text: int) -> None:
    model, expected = load_checkpoint(DATA / name), known(name)
    heard: dict[str, Tensor] = {}
    mixers = model.layers[0].mixers
    hooks = [
        mixer.register_forward_hook(lambda m, args, out, key=key: heard.update({key: out[0]}))
        for key, mixer in zip(("mixer_out", "attn_out"), mixers)
    ]
    assert_close(whole(model, expected["input_ids"][text], Dials(1)).logits, expected["logits"][text])
    for hook in hooks:
        hook.remove()
    for key, out in heard.items():
        assert_close(out[0], expected[f"layer0.{key}"][text])
    tokens = expected["input_ids"][text].numpy()
    for cut in ((20,), (1,) * 20, (7, 7, 6), (5, *[1] * 15)):
        assert_close(fed(model, tokens, cut, Dials(1))[0], expected["logits"][text])


@both
@torch.no_grad()
def test_training_reads_the_published_logits(name: str) -> None:
    """Both texts as one batch, as `rmse-train` computes them."""
    model, expected = load_checkpoint(DATA / name), known(name)
    states, _, depth = model.trajectory(expected["input_ids"])
    assert_close(model.read_out(states[-1]), expected["logits"])
    assert arch_of("rodimus").trains and depth.unique().tolist() == [1]


@both
def test_the_published_states(name: str) -> None:
    model, expected = load_checkpoint(DATA / name), known(name)
    for text in range(2):
        runtime, tokens = TorchRuntime(model, name), expected["input_ids"][text].numpy()
        for tag, part in (("prefill", tokens[:5]), ("decode", tokens[5:])):
            runtime.feed(part, Dials(1))
            kept, done = runtime.tensors(), runtime.position
            # The published cache of Rodimus+ drops a key, which the layers behind the first one feel.
            for i in range(1 if name == "rodimus_plus" and tag == "decode" else 2):
                memory = expected[f"cache.after_{tag}.layer{i}.ssm_state"][text]
                assert_close(kept[f"past_layer{i}_memory"][0, 0, 0], memory)
                slots = torch.from_numpy(kept[f"past_layer{i}_inputs"][0, 0, 0])[[p % 3 for p in range(done - 3, done)]]
                assert_close(slots.T, expected[f"cache.after_{tag}.layer{i}.conv_state"][text][:, 1:])


@both
def test_a_hybrid_of_the_same_layers_is_the_same_model(name: str) -> None:
    """The published models are configurations of a hybrid; also the two hops, which it has as a kind of layer."""
    model, expected = load_checkpoint(DATA / name), known(name)
    plus = name == "rodimus_plus"
    sizes: dict[str, Any] = {"rodimus_channels": 64, "rodimus_state_dim": 16, "rodimus_gate_rank": 8, "norm_eps": 1e-5}
    sizes |= {"n_heads": 4, "head_dim": 8, "rotary_dims": 8, "shared_key_window": 9} if plus else {}
    config = HybridConfig(vocab_size=96, d_model=32, layers=(name,) * 2, intermediate_size=48 if plus else 0, **sizes)
    twin = HybridModel(config).eval()
    twin.load_state_dict(model.state_dict())
    text = expected["input_ids"][0]
    assert torch.equal(whole(twin, text, Dials(1)).logits, whole(model, text, Dials(1)).logits)


@both
def test_one_loop_is_the_plain_stack_and_two_are_not(name: str) -> None:
    plain, tokens = load_checkpoint(DATA / name), known(name)["input_ids"][0].numpy()
    values = json.loads((DATA / name / "config.json").read_text())
    config = type(plain.config).from_dict(values | {"think": [1, 2], "think_loops": 2})
    model = HybridModel(config).eval()
    model.load_state_dict(plain.state_dict())
    once = fed(model, tokens, (20,), Dials(1))[0]
    assert np.array_equal(once, fed(plain, tokens, (20,), Dials(1))[0])
    assert not np.array_equal(once, fed(model, tokens, (20,), Dials(2))[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.layers.1.mixer.fc.weight"), "model.layers.1.mixer.fc.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "tensor extra is not part of the model"),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(damage: Any, message: str, tmp_path: Path) -> None:
    assert_refused(DATA / "rodimus", damage, message, tmp_path / "damaged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_scale_embedding": True}, "use_scale_embedding: got true, expected false"),
        ({"mixer_cfg": {"stride": 2}}, "mixer_cfg: got {'stride': 2}, expected an object with some of d_conv"),
        ({"attn_cfg": {"num_heads": 4, "num_heads_k": 2}}, "attn_cfg.num_heads_k: got 2, expected 1"),
        ({"attn_cfg": {}}, "num_heads: got None, expected a number, since block_type is rodimus_plus"),
        ({"d_model": 36}, "num_heads: got 4, expected a divisor of d_model (36)"),
    ],
)
def test_configurations_that_are_computed_otherwise(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((DATA / "rodimus_plus/config.json").read_text()) | changes)
    )
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "config.json")
    assert_one_line(str(caught.value), message)
