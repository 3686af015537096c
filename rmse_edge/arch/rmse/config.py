"""`RMSEConfig`: every number that defines an RMS-E model, validated once, the same on disk (JSON) as in Python."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from rmse_edge.errors import ConfigError
from rmse_edge.loop.dials import DIALS, Dials
from rmse_edge.numbers import (
    SEGMENT,
    Count,
    EndTokens,
    KvDtype,
    Loops,
    OffOr,
    Positions,
    Positive,
    Share,
    Some,
    Token,
    VocabularySize,
)
from rmse_edge.schema import Expected, Finite, check_fields, read_json

MODEL_TYPE = "rmse"  # the Hugging Face `model_type` of config.json

EXIT_RULES = ("gate", "delta", "entropy")
RINGS = {"past_keys": "keys", "past_values": "values"}  # what is kept between calls <- the commit result that fills it
StepEncoding = Literal["learned", "temporal_rope", "none"]
AttentionGate = Literal["headwise", "elementwise"]
Memory = Literal["none", "titans", "atlas"]

Threshold = Annotated[Positive, Expected("a positive number (1 or more disables the gate)")]
# What transformers may add to a config.json; none of it concerns the model.
FOREIGN_KEYS = frozenset(
    "model_type architectures transformers_version dtype torch_dtype auto_map use_cache return_dict output_hidden_states "
    "output_attentions is_encoder_decoder chunk_size_feed_forward id2label label2id num_labels problem_type name_or_path "
    "attn_implementation experts_implementation".split()
)
# What other models call a field -> the field. Code may use these names through transformers, a config.json may not.
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "num_hidden_layers": "max_loops",
    "tie_word_embeddings": "tie_embeddings",
}


@dataclass(frozen=True)
class RMSEConfig:
    """Shape and behaviour of one RMS-E model: a single block applied up to `max_loops` times."""

    model_type: ClassVar[str] = MODEL_TYPE
    vocab_size: VocabularySize = 65
    d_model: Count = 192
    # attention
    n_heads: Count = 6
    n_kv_heads: Count = 2  # grouped-query attention; divides n_heads
    head_dim: Count = 32
    attention_gate: AttentionGate = "headwise"  # output gate: one sigmoid per head, or per channel ("elementwise")
    window: Positions = 128  # positions a query sees, itself included
    rope_theta: Positive = 10_000.0
    # the loop
    max_loops: Loops = 12  # the trained depth
    min_loops: Loops = 1
    # What tells the block which loop it is in: a bias per loop, or "temporal_rope", Q and K turned by the loop index, either
    # beside router logits per loop; "none": not even these, every loop is the same function
    step_encoding: StepEncoding = "learned"
    step_dims: Some = 8  # channels of each head that temporal_rope reserves (even)
    # exit; a position stops at the first loop where one of the rules holds
    exit_rules: tuple[str, ...] = ("gate", "delta")
    exit_threshold: Threshold = 1.0  # gate: stop when 1 - survival >= this; >= 1 disables
    exit_epsilon: OffOr = 0.0  # delta: stop when |h' - h| < this * |h'|; 0 disables
    exit_entropy: OffOr = 0.0  # entropy: stop when the logits' entropy (nats) < this; 0 disables
    # experts
    n_experts: Count = 512
    top_k: Count = 10
    expert_width: Count = 32  # a multiple of 32, so that it quantises in groups
    n_shared_experts: Some = 1
    shared_width: Some = 96  # of each shared expert
    # neural memory: a two-layer MLP per sequence, written once per 64-token segment, read in every loop
    memory: Memory = "none"  # or "titans", "atlas"
    memory_dim: Count = 64  # channels of values, and of titans' keys
    memory_hidden: Count = 256  # channels between the two layers
    memory_key_dim: Count = 16  # atlas: channels of keys, before all their products are added
    memory_window: Positions = 128  # atlas: positions learned together, a multiple of 64
    # retrieval: passages of a knowledge base, fetched when the memory is surprised, read by x0
    retrieval_slots: Some = 0  # vectors per passage; 0: no retrieval
    retrieval_hits: Count = 4  # passages injected at once, at most
    retrieval_dim: Count = 64  # channels of the keys that are searched
    retrieval_gamma: Finite = 2.0  # deviations of the surprise above its mean that call for passages
    # numerics and training
    norm_eps: Positive = 1e-6
    kv_dtype: KvDtype = "float32"  # K and V are rounded to it before any use; int8 by scales that rmse-quantize finds
    tie_embeddings: bool = False
    dropout: Share = 0.0
    block_size: Positions = 256  # positions of one training sequence
    bos_token_id: Token | None = None
    eos_token_id: EndTokens = None  # several: any of them ends a text
    pad_token_id: Token | None = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        self._require(self.min_loops <= self.max_loops, "min_loops", f"at most max_loops ({self.max_loops})")
        self._require(self.n_heads % self.n_kv_heads == 0, "n_kv_heads", f"a divisor of n_heads ({self.n_heads})")
        self._require(self.head_dim % 2 == 0, "head_dim", "an even number")
        self._require(self.window >= SEGMENT, "window", f"at least {SEGMENT}")
        self._require(self.expert_width % 32 == 0, "expert_width", "a multiple of 32")
        self._require(self.memory_window % SEGMENT == 0, "memory_window", f"a multiple of {SEGMENT}")
        self._require(
            self.retrieval_slots == 0 or self.memory != "none",
            "retrieval_slots",
            "0, since there is no memory to be surprised",
        )
        self._require(self.top_k <= self.n_experts, "top_k", f"at most n_experts ({self.n_experts})")
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, role)
            beyond = [i for i in (ids if isinstance(ids, tuple) else (ids,)) if i is not None and i >= self.vocab_size]
            self._require(not beyond, role, f"below vocab_size ({self.vocab_size})")
        for rule in self.exit_rules:
            if rule not in EXIT_RULES:
                raise ConfigError(f"exit_rules: got {rule!r}, expected some of {', '.join(EXIT_RULES)}")
        self._require(len(set(self.exit_rules)) == len(self.exit_rules), "exit_rules", "each rule once")
        for rule, name in (("gate", "exit_threshold"), ("delta", "exit_epsilon"), ("entropy", "exit_entropy")):
            on = DIALS[name].enables(getattr(self, name))
            self._require(not on or rule in self.exit_rules, name, f"it off, since exit_rules has no {rule!r}")
        if self.step_encoding == "temporal_rope":
            ok = self.step_dims % 2 == 0 and 0 < self.step_dims < self.head_dim
            self._require(ok, "step_dims", f"an even number below head_dim ({self.head_dim})")

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @property
    def dials(self) -> Dials:
        """The settings that the model was made for."""
        return Dials(self.max_loops, self.min_loops, self.exit_threshold, self.exit_epsilon, self.exit_entropy)

    @property
    def rotary_dims(self) -> int:
        """Channels of each head that turn with the position (the rest, if any, turn with the loop index)."""
        return self.head_dim - (self.step_dims if self.step_encoding == "temporal_rope" else 0)

    @property
    def ring_shape(self) -> tuple[int, ...]:
        """Of each of `RINGS`: (loops, 1, key and value heads, positions, channels), of `kv_dtype`."""
        return self.max_loops, 1, self.n_kv_heads, self.window, self.head_dim

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def to_json(self) -> str:
        """The text of config.json: these fields plus what Hugging Face's Auto classes look for."""
        head = {"model_type": MODEL_TYPE, "architectures": ["RMSEForCausalLM"]}
        return json.dumps(head | self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> RMSEConfig:
        """Build from a mapping; keys that Hugging Face adds are ignored, unknown ones are an error.

        Raises:
            ConfigError: a key this version does not know, another `model_type`, or a value out of range.
        """
        if values.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise ConfigError(f"{where}: model_type is {values['model_type']!r}, expected {MODEL_TYPE!r}")
        refuse_unknown_keys(values, where)
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            return cls(**{k: v for k, v in values.items() if k in known})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> RMSEConfig:
        path = Path(path)
        try:
            values = read_json(path, ConfigError)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; expected a config.json of an RMS-E model") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object of configuration keys")
        return cls.from_dict(values, where=str(path))


def refuse_unknown_keys(keys: Iterable[str], where: str = "config") -> None:
    """The one rule for keys of a config.json, of this package and of transformers: a setting that would be dropped is an error.

    A misspelt setting would otherwise be another model. What transformers writes is passed over, and so is what begins
    with an underscore: notes of whoever wrote the file.

    Raises:
        ConfigError: naming the first key that is none of these.
    """
    known = {f.name for f in dataclasses.fields(RMSEConfig)}
    unknown = sorted(key for key in set(keys) - known - FOREIGN_KEYS if not key.startswith("_"))
    if unknown:
        instead = (
            f"write {ALIASES[unknown[0]]}" if unknown[0] in ALIASES else f"known keys are {', '.join(sorted(known))}"
        )
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; {instead}")
