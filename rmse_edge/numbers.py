"""Numbers that several rooms agree on, and the ranges they may have.

Limits are generous: no looped model comes near them, and none of them alone takes memory, since weights are as large as
their file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .errors import ConfigError
from .schema import Expected, check_value

SEGMENT = 64  # positions; a call never crosses a multiple of it, and memory is written once per segment
# The names of sizes that vary from call to call, where programs have symbols for them: rows of the call, slots of the
# appended state, boards of a batch. A model that names `SLOTS` in its context is given 0, 1, 2, ... there, (slots,) int64.
ROWS, SLOTS, BOARDS = "rows", "slots", "boards"
# A model that names this in its context is told how many of a text's first positions see each other whatever their order,
# (1,) int64: 0 for a text without a prefix. The call that reads them holds all of them.
PREFIX = "prefix"
# A model with a plan (rmse_edge/loop/plan.py) that names this is told how many of a text's first positions the plan is made of,
# (1,) int64. The first call holds all of them.
PROMPT = "prompt"
DRAFT_TOKENS = 3  # of speculative decoding, where nobody says how many: docs/experiments/speculation
MAX_LOOPS = 64  # upper bound on the trained depth

Count = Annotated[int, Field(ge=1, le=2**16), Expected("a positive integer, at most 65536")]
Some = Annotated[int, Field(ge=0, le=2**16), Expected("0 or a positive integer, at most 65536")]
VocabularySize = Annotated[int, Field(ge=1, le=2**22), Expected("a positive integer, at most 4194304")]
Positions = Annotated[int, Field(ge=1, le=2**24), Expected("a positive integer, at most 16777216")]
Loops = Annotated[int, Field(ge=1, le=MAX_LOOPS)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Expected("a positive number")]
OffOr = Annotated[float, Field(ge=0, allow_inf_nan=False), Expected("0 (off) or a positive number")]
Share = Annotated[float, Field(ge=0, lt=1), Expected("a number in [0, 1)")]
Token = Annotated[int, Field(ge=0, lt=2**22)]
EndTokens = Annotated[Token | tuple[Token, ...] | None, Expected("a token id, a list of them, or null")]
KvDtype = Literal["float32", "float16", "int8"]  # that keys and values are stored in


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """What is written as one token id, several or none (None), as ids.

    Raises:
        ConfigError: it is none of these; names it.
    """
    ids = check_value(EndTokens, value, name, ConfigError)
    return () if ids is None else ids if isinstance(ids, tuple) else (ids,)
