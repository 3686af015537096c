"""How the configuration of a model that also sees is read. All else is asked of `inkling2_loop_text`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmse_edge.arch.common.published import OF_TRANSFORMERS
from rmse_edge.arch.inkling2_loop_text.config import InklingConfig
from rmse_edge.arch.inkling2_loop_text.entry import ARCH as TEXT
from rmse_edge.arch.registry import Arch
from rmse_edge.errors import ConfigError
from rmse_edge.schema import first_of

EYES = frozenset({"vision_config", "image_token_id"})  # what the text model has no use for
TOKENS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})  # which either may say


class SeeingConfig:
    """The reader of such a config.json."""

    model_type = "inkling2_loop"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> InklingConfig:
        """The configuration of the text model.

        Raises:
            ConfigError: there is no `text_config`, it is none of `inkling2_loop_text`, or a key is not known.
        """
        text = values.get("text_config")
        if not isinstance(text, dict):
            raise ConfigError(
                f"{where}: text_config: got {str(text)[:60]}, expected an object, the text model's numbers"
            )
        own = {key: value for key, value in values.items() if not key.startswith("_")}
        named = {"model_type", "text_config", "tie_word_embeddings"} | EYES | TOKENS | OF_TRANSFORMERS
        if (unknown := first_of(own, named)) is not None:
            raise ConfigError(f"{where}: unknown key {unknown!r} beside text_config")
        kind = text.get("model_type", InklingConfig.model_type)
        if kind != InklingConfig.model_type:
            raise ConfigError(f"{where}: text_config.model_type: got {kind!r}, expected {InklingConfig.model_type!r}")
        found = dict(text)
        for key in TOKENS | {"tie_word_embeddings"}:
            if own.get(key) is not None and found.setdefault(key, own[key]) != own[key]:
                raise ConfigError(
                    f"{where}: {key}: got {own[key]!r}, but text_config says {found[key]!r}; keep one of them"
                )
        return InklingConfig.from_dict(found, f"{where}: text_config")


ARCH = Arch(SeeingConfig, TEXT.build, TEXT.parts)
