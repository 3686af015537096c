"""`RMSEPretrainedConfig`: `RMSEConfig` as Hugging Face's Auto classes know it. Needs transformers, not torch."""

from __future__ import annotations

from typing import Any, ClassVar

from rmse_edge.arch.rmse.config import ALIASES, MODEL_TYPE, RMSEConfig

from .looped_config import with_fields_of

_Fields: Any = with_fields_of(MODEL_TYPE, RMSEConfig)


class RMSEPretrainedConfig(_Fields):
    """The configuration of an `RMSEForCausalLM`; see `RMSEConfig` for every field, its meaning and its range.

    Raises:
        ConfigError: a value out of range or an unknown key, named.
    """

    # What generic tools of transformers ask for -> our name for it.
    attribute_map: ClassVar[dict[str, str]] = ALIASES

    def to_rmse(self) -> RMSEConfig:
        """The same configuration as the dataclass that the model is built from."""
        return self.to_looped()

    @classmethod
    def from_rmse(cls, config: RMSEConfig) -> RMSEPretrainedConfig:
        return cls.from_looped(config)
