"""Keys of config.json: both loaders take the same files, and refuse the others in the same words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from later import later, needs
from small_models import small_config

from rmse_edge.arch.rmse.config import FOREIGN_KEYS, RMSEConfig
from rmse_edge.errors import ConfigError

AutoConfig = later("transformers:AutoConfig")
transformers = later("transformers")

pytestmark = [pytest.mark.slow, needs("transformers", "hf")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d_modle": 64}, "unknown key 'd_modle'; known keys are attention_gate, "),
        ({"hidden_size": 64}, "unknown key 'hidden_size'; write d_model"),
        ({"temperature": 0.5}, "unknown key 'temperature'"),
        ({"max_loops": 65}, "max_loops: got 65, expected a whole number from 1 to 64"),
        ({"eos_token_id": [1, 2], "use_cache": False, "torch_dtype": "bfloat16", "transformers_version": "4.0"}, None),
        (
            {"_name_or_path": "x", "_comment": "trained on a laptop", "num_labels": 3, "attn_implementation": "sdpa"},
            None,
        ),
    ],
)
def test_both_loaders_have_one_rule_for_keys(tmp_path: Path, changes: dict[str, Any], said: str | None) -> None:
    """What one refuses the other refuses, in the same words; what one passes over the other does."""
    (tmp_path / "config.json").write_text(json.dumps(json.loads(small_config().to_json()) | changes))
    found = []
    for read in (RMSEConfig.from_file, AutoConfig.from_pretrained):
        try:
            config = read(tmp_path / "config.json")
            found.append(config if isinstance(config, RMSEConfig) else config.to_rmse())
        except ConfigError as error:
            assert said is not None and "\n" not in str(error)
            found.append(str(error).removeprefix(f"{tmp_path / 'config.json'}: ").removeprefix("config: "))
    assert found[0] == found[1]
    assert said is None or said in found[0]


def test_what_transformers_writes_is_known() -> None:
    """Its own fields never come as unknown keys on its side; so they must not on ours."""
    fields = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    assert fields - {field.name for field in dataclasses.fields(RMSEConfig)} <= FOREIGN_KEYS


def test_every_dial_is_an_argument() -> None:
    import inspect

    from rmse_edge.hf.looped_model import LoopedForCausalLM
    from rmse_edge.loop.dials import DIALS

    assert DIALS.keys() <= inspect.signature(LoopedForCausalLM.forward).parameters.keys()
