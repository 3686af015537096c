"""`RMSEPretrainedConfig`: `RMSEConfig` as Hugging Face's Auto classes know it. Needs transformers, not torch.

One dialect: its fields are those of `RMSEConfig`, taken over name by name, and every instance passes `RMSEConfig`'s
checks. The config.json of either one is read by the other.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from rmse_edge.arch.rmse.config import ALIASES, MODEL_TYPE, RMSEConfig, refuse_unknown_keys

FIELDS = dataclasses.fields(RMSEConfig)


class RMSEPretrainedConfig(PreTrainedConfig):
    """The configuration of an `RMSEForCausalLM`; see `RMSEConfig` for every field, its meaning and its range.

    Raises:
        ConfigError: a value out of range or an unknown key, named.
    """

    model_type: ClassVar[str] = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # What generic tools of transformers ask for -> our name for it.
    attribute_map: ClassVar[dict[str, str]] = ALIASES

    # Weights are stored in bfloat16 and computed with in float32. Without this, `dtype="auto"`, the default of
    # from_pretrained, would take the type of the file.
    dtype: Any = "float32"

    # A class body's vars() is the namespace the class is made from; PreTrainedConfig turns annotated names into
    # dataclass fields. A field, and not a plain attribute, also keeps `top_k` (experts per position) from being
    # taken for the sampling setting of the same name.
    for _field in FIELDS:
        __annotations__[_field.name] = Any
        vars()[_field.name] = _field.default
    del _field
    if TYPE_CHECKING:
        exit_rules: list[str]

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_keys(kwargs)  # those that are no field
        self.exit_rules = list(self.to_rmse().exit_rules)  # as in JSON, once every field is known to be what it should
        super().__post_init__(**kwargs)

    def to_rmse(self) -> RMSEConfig:
        """The same configuration as the dataclass that the model is built from."""
        return RMSEConfig(**{field.name: getattr(self, field.name) for field in FIELDS})

    @classmethod
    def from_rmse(cls, config: RMSEConfig) -> RMSEPretrainedConfig:
        return cls(**config.to_dict())
