"""`RMSEConfig` and `Recipe`: the same on disk as in Python, and every wrong value is one line that names it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_one_line
from small_models import small_config

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.arch.rmse.costs import average_context, macs_per_token, parameters
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.errors import ArgumentError, ConfigError
from rmse_edge.train.gpt import GPTConfig
from rmse_edge.train.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: got 0, expected a positive integer"),
        ({"d_model": 64.0}, "d_model: got 64.0, expected a positive integer"),
        ({"max_loops": True}, "max_loops: got True, expected a whole number from 1 to 64"),
        ({"max_loops": 65}, "max_loops: got 65, expected a whole number from 1 to 64"),
        ({"min_loops": 13}, "min_loops: got 13, expected at most max_loops (12)"),
        ({"n_kv_heads": 4}, "n_kv_heads: got 4, expected a divisor of n_heads (6)"),
        ({"head_dim": 33}, "head_dim: got 33, expected an even number"),
        ({"window": 63}, "window: got 63, expected at least 64"),
        ({"expert_width": 48}, "expert_width: got 48, expected a multiple of 32"),
        ({"top_k": 513}, "top_k: got 513, expected at most n_experts (512)"),
        ({"dropout": 1.0}, "dropout: got 1.0, expected a number in [0, 1)"),
        ({"exit_threshold": 0.0}, "exit_threshold: got 0.0, expected a positive number (1 or more disables the gate)"),
        ({"exit_threshold": float("nan")}, "exit_threshold: got nan, expected a positive number"),
        ({"exit_epsilon": -0.1}, "exit_epsilon: got -0.1, expected 0 (off) or a positive number"),
        (
            {"exit_rules": ("gate", "delta", "gate")},
            "exit_rules: got ('gate', 'delta', 'gate'), expected each rule once",
        ),
        ({"exit_rules": ("gate", "mood")}, "exit_rules: got 'mood', expected some of gate, delta, entropy"),
        ({"step_encoding": "sine"}, "step_encoding: got 'sine', expected one of learned, temporal_rope, none"),
        ({"attention_gate": "none"}, "attention_gate: got 'none', expected one of headwise, elementwise"),
        ({"kv_dtype": "int4"}, "kv_dtype: got 'int4', expected one of float32, float16, int8"),
        (
            {"step_encoding": "temporal_rope", "step_dims": 32},
            "step_dims: got 32, expected an even number below head_dim",
        ),
        (
            {"step_encoding": "temporal_rope", "step_dims": 3},
            "step_dims: got 3, expected an even number below head_dim",
        ),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RMSEConfig(**changes)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


WRONG = {int: ["64", 6.4, True, {}, 10**400, -1], float: ["10000", True, float("nan"), float("inf"), {}, 10**400],
         bool: ["false", 0, 1.0, None], str: [5, None, ["gate"]], None: ["</s>", -1, True, {}]}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RMSEConfig)])
def test_no_field_takes_a_value_of_another_type(name: str, tmp_path: Path) -> None:
    """In Python, from a mapping, from a file and through Hugging Face's class: one line that names the field."""
    from rmse_edge.hf.config import RMSEPretrainedConfig

    path = tmp_path / "config.json"
    default = getattr(RMSEConfig(), name)
    for value in (
        [*WRONG[None if default is None else type(default)], object()] if name != "exit_rules" else [5, "gate", [5]]
    ):
        said = re.escape(name) + r"(\[0\])?: got .*, expected "
        with pytest.raises(ConfigError, match=f"^{said}"):
            RMSEConfig(**{name: value})
        with pytest.raises(ConfigError, match=f"^config: {said}"):
            RMSEConfig.from_dict({name: value})
        with pytest.raises(ConfigError, match=said):
            RMSEPretrainedConfig(**{name: value})
        if type(value) is not object:
            path.write_text(json.dumps({name: value}))
            with pytest.raises(ConfigError, match=re.escape(str(path))) as caught:
                RMSEConfig.from_file(path)
            assert_one_line(str(caught.value), str(path))


def test_numbers_are_floats_and_lists_are_tuples() -> None:
    config = RMSEConfig.from_dict({"rope_theta": 10000, "exit_rules": ["gate"]})
    assert config == RMSEConfig(exit_rules=("gate",)) and isinstance(config.rope_theta, float)


def test_a_token_is_of_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"eos_token_id: got 65, expected below vocab_size \(65\)"):
        RMSEConfig(eos_token_id=65)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested"),
        ('{"a": ' * 40 + "1" + "}" * 40, "nested more than 32 deep"),
        ('{"d_model": 32, "d_model": 64}', "'d_model' occurs twice"),
        ('{"rope_theta": NaN}', "NaN is not a number"),
        ('{"rope_theta": 1e999}', "a number is too large"),
        ('{"d_model": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"memory": "\\ud800"}', "surrogates"),
    ],
)
@pytest.mark.parametrize("kind", [RMSEConfig, Recipe])
def test_json_that_readers_disagree_about_is_refused(tmp_path: Path, kind: type, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        kind.from_file(path)  # type: ignore[attr-defined]
    assert_one_line(str(caught.value), str(path))


def test_of_an_endless_file_only_a_part_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(200 << 30)  # without blocks on the disk
    with pytest.raises(ConfigError, match="larger than 16 MiB"):
        RMSEConfig.from_file(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_modle": 64}, "config: unknown key 'd_modle'; known keys are attention_gate, "),
        ({"model_type": "llama"}, "config: model_type is 'llama', expected 'rmse'"),
        ({"dropout": "high"}, "config: "),
        ({"exit_rules": 5}, "config: "),
    ],
)
def test_a_wrong_mapping_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RMSEConfig.from_dict(values)
    assert str(caught.value).startswith(message)


def test_json_and_back(tmp_path: Path) -> None:
    config = small_config(step_encoding="temporal_rope", exit_rules=("gate", "entropy"), exit_threshold=0.8)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert RMSEConfig.from_file(path) == config
    assert json.loads(path.read_text())["architectures"] == ["RMSEForCausalLM"]
    hugging_face = json.loads(config.to_json()) | {"transformers_version": "5.0", "dtype": "bfloat16"}
    assert RMSEConfig.from_dict(hugging_face) == config


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
@pytest.mark.parametrize("kind", [RMSEConfig, Recipe])
def test_a_broken_file_is_one_line_that_names_it(tmp_path: Path, text: str, kind: type) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        kind.from_file(path)  # type: ignore[attr-defined]
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no such file"):
        kind.from_file(tmp_path / "missing.json")  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ recipes


def test_the_shipped_recipe_reads_and_spells_out() -> None:
    recipe = Recipe.from_file(ROOT / "models" / "rmse-shakespeare" / "recipe.json")
    config = recipe.model_config()
    assert isinstance(config, RMSEConfig) and (config.n_experts, config.top_k, config.max_loops) == (512, 10, 12)
    assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps=-1", "changes: steps: got -1, expected a whole number from 0 to 1000000000"),
        ("steps=many", "changes: steps: got 'many', expected a whole number"),
        ("lr=0", "changes: lr: got 0, expected a number above 0"),
        ("lr=[1]", "changes: lr: got [1], expected a number above 0"),
        ("ema=1", "changes: ema: got 1, expected a number in [0, 1)"),
        ("depths=[4,13]", "changes: depths: got [4, 13], expected loops in 1..12, the depth that is trained"),
        ("depths=[]", "changes: depths: got [], expected loops in 1..12, the depth that is trained"),
        ("accumulate=3", "changes: accumulate: got 3, expected a divisor of batch_size 8"),
        ("precision=fp8", "changes: precision: got 'fp8', expected one of auto, bf16, fp32"),
        (
            "architecture=rnn",
            "changes: architecture: got 'rnn', expected one of gpt, bd3lm, dory, dr_llm, hrm, hrm_text, huginn_raven, hybrid, inkling2_loop_text, "
            "ouro, qwen3_next, rmse, rodimus, trm",
        ),
        ("speed=9", "changes: unknown key 'speed'; known keys are "),
        ("model.d_modle=64", "changes: model: unknown key 'd_modle'; known keys are "),
        ("model.window=8", "changes: model: window: got 8, expected at least 64"),
        ("model=5", "changes: model: got 5, expected an object of model fields"),
        ("lr", "changes: got 'lr', expected key=value"),
    ],
)
def test_a_wrong_override_is_named(change: str, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Recipe().override([change])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_overrides() -> None:
    recipe = Recipe(model={"d_model": 32}).override(["lr=1e-3", "model.n_heads=2", "depths=[2,4]", "precision=fp32"])
    assert recipe == Recipe(model={"d_model": 32, "n_heads": 2}, lr=1e-3, depths=(2, 4), precision="fp32")
    gpt = Recipe(model={}).override(["architecture=gpt", "model.n_layers=2"])
    assert gpt.model_config() == GPTConfig(n_layers=2) and gpt.total_steps == gpt.steps
    with pytest.raises(ArgumentError, match=r"model: n_heads: got 5, expected a divisor of d_model \(192\)"):
        gpt.override(["model.n_heads=5"])


def test_stages_by_step() -> None:
    recipe = Recipe(steps=3, gate_steps=2, exit_steps=1)
    assert [recipe.stage(i) for i in range(recipe.total_steps)] == ["loops"] * 3 + ["gate"] * 2 + ["exits"]


# ------------------------------------------------------------------------------------------------ costs


@pytest.mark.parametrize(
    "values",
    [{}, {"memory": "titans"}, {"memory": "atlas", "retrieval_slots": 3}, {"attention_gate": "elementwise"},
     {"step_encoding": "temporal_rope"}, {"step_encoding": "none"}, {"tie_embeddings": True}, {"n_shared_experts": 0}, {"exit_rules": ("entropy",)}],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_parameters_are_those_of_the_model(values: dict[str, Any]) -> None:
    odd = {"d_model": 48, "vocab_size": 65, "shared_width": 24, "memory_dim": 10, "memory_hidden": 12, "memory_key_dim": 6,
           "retrieval_dim": 9}  # fmt: skip
    with torch.device("meta"):
        model = RMSE(small_config(**(odd | values)))
    assert parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_costs_of_the_shipped_shape_by_hand() -> None:
    macs = macs_per_token(RMSEConfig(), context=100.0)
    d = 192
    expected = {
        "q_proj": d * 192, "kv_proj": d * 128, "gate_proj": d * 6, "o_proj": 192 * d, "attention": 2 * 6 * 32 * 100,
        "router": d * 512, "routed_experts": 10 * 3 * d * 32, "shared_expert": 3 * d * 96, "brake_gate": d,
    }  # fmt: skip
    assert macs["loop"] == expected
    assert macs["once"] == {"inject": d * d, "head": d * 65, "propagate_kv": 12 * d * 128}
    assert macs["total"] == 12 * sum(expected.values()) + sum(macs["once"].values())


def test_one_loop_of_the_shipped_shape_costs_as_much_as_one_gpt_layer() -> None:
    ours = macs_per_token(RMSEConfig(), average_context(256, 128))["loop_total"]
    context = average_context(256)
    two, one = (GPTConfig(n_layers=n).macs_per_token(context) for n in (2, 1))
    assert ours / (two - one) == pytest.approx(1, abs=0.05)


def test_average_context() -> None:
    assert average_context(4) == (1 + 2 + 3 + 4) / 4
    assert average_context(6, 4) == (1 + 2 + 3 + 4 + 4 + 4) / 6
    assert average_context(3, 8) == 2
