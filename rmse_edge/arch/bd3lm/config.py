"""`Bd3lmConfig`: the numbers of a BD3-LM, by the names of its published config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rmse_edge.arch.common.published import PublishedConfig
from rmse_edge.errors import ConfigError
from rmse_edge.loop.dials import Dials
from rmse_edge.numbers import Count, EndTokens, Loops, OffOr, Positions, Positive, Share, Token, VocabularySize
from rmse_edge.schema import Expected, check_fields

Threshold = Annotated[Positive, Expected("a positive number (1 or more disables the rule)")]
Part = Annotated[float, Field(gt=0, le=1), Expected("a number above 0, at most 1")]
Noise = Literal["loglinear", "cosine", "square", "square_root", "log"]  # rmse_edge/train/noise.py

THETA = 10_000.0  # base of the rotary angles


@dataclass(frozen=True)
class Bd3lmConfig(PublishedConfig):
    """Shape and behaviour of one BD3-LM. The defaults are those of the models published for OpenWebText."""

    model_type: ClassVar[str] = "bd3lm"
    architectures: ClassVar[tuple[str, ...]] = ("BD3LM",)
    # How attention is computed, how the clipped range was found, and the size of a conditioning that is a constant.
    passed_over: ClassVar[frozenset[str]] = frozenset({"attn_backend", "var_min", "cond_dim", "return_dict"})
    only: ClassVar[dict[str, tuple[Any, ...]]] = {
        "time_conditioning": (False,),
        "causal": (False,),
        "cross_attn": (True,),
        "adaln": (True,),
    }
    added_tokens: ClassVar[int] = 1  # beyond the tokenizer's: the mask

    vocab_size: VocabularySize = 50_258  # with the mask, which is the last
    block_size: Loops = 16  # positions that are denoised together
    model_length: Positions = 1024  # positions of a text, at most, and of a training sequence
    hidden_dim: Count = 768
    n_blocks: Count = 12  # layers
    n_heads: Count = 12
    dropout: Share = 0.1
    # Of training: t of a block is drawn between these.
    sampling_eps_min: Part = 1e-3
    sampling_eps_max: Part = 1.0
    bos_token_id: Token | None = None
    eos_token_id: EndTokens = None
    pad_token_id: Token | None = None
    # What published files do not have.
    noise: Noise = "loglinear"  # of training
    min_loops: Loops = 1
    exit_threshold: Threshold = 1.0  # every token at least as likely is filled in; 1 or more: the likeliest alone
    exit_gap: OffOr = 0.0  # a block is filled in whole once its leads reach this; 0 disables. rmse_edge/loop/unmask.py
    kv_dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        self.require(self.vocab_size >= 2, "vocab_size", "at least 2: one of them is the mask")
        self.require(
            self.model_length % self.block_size == 0, "model_length", f"a multiple of block_size ({self.block_size})"
        )
        self.require(
            self.hidden_dim % (2 * self.n_heads) == 0, "hidden_dim", f"an even multiple of n_heads ({self.n_heads})"
        )
        self.require(
            self.sampling_eps_min <= self.sampling_eps_max,
            "sampling_eps_min",
            f"at most sampling_eps_max ({self.sampling_eps_max})",
        )
        self.require(self.min_loops <= self.max_loops, "min_loops", f"at most block_size ({self.block_size})")
        self.check_tokens()

    @property
    def max_loops(self) -> int:
        """A block has at most as many denoising steps as positions: each fills one in at least."""
        return self.block_size

    @property
    def mask_token_id(self) -> int:
        return self.vocab_size - 1

    @property
    def head_width(self) -> int:
        return self.hidden_dim // self.n_heads

    @property
    def mlp_width(self) -> int:
        return 4 * self.hidden_dim

    @property
    def dials(self) -> Dials:
        """The settings of the file."""
        return Dials(self.max_loops, self.min_loops, self.exit_threshold, exit_gap=self.exit_gap)
