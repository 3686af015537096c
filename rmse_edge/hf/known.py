"""Which architectures there are for transformers. Nothing heavy is imported: `import rmse_edge` passes through here."""

from __future__ import annotations

import warnings
from typing import NamedTuple


class Own(NamedTuple):
    """Classes that an architecture has for itself: module of this package, name."""

    config: tuple[str, str]
    model: tuple[str, str]


OWN = {"rmse": Own((".config", "RMSEPretrainedConfig"), (".model", "RMSEForCausalLM"))}


def text_types() -> list[str]:
    """The names of all architectures of texts that write token by token, but for those whose texts have a plan: those whose
    configuration has a `vocab_size`.
    """
    from dataclasses import fields, is_dataclass

    from rmse_edge.arch.registry import arch_of, model_types

    found = []
    for name in model_types():
        try:
            arch = arch_of(name)
            config = arch.config
        except Exception as error:  # of another package, whatever its import raises: transformers must not suffer
            warnings.warn(f"architecture {name}: cannot be loaded ({error})", stacklevel=2)
            continue
        if (
            not (arch.by_blocks or arch.planned)
            and is_dataclass(config)
            and any(f.name == "vocab_size" for f in fields(config))
        ):
            found.append(name)
    return found
