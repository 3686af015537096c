"""What every runtime can do, and the part of it that is the same for all of them.

Two layers:

- `Methods` runs one exported method on arrays. A target implements this and nothing else.
- `Runtime` is a language model that remembers what it was fed. `LoopRuntime` (runtimes/host/text.py) builds it on any
  `Methods`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, Protocol, cast

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict  # pydantic takes Python's own from 3.12 on

from rmse_edge.errors import PackageError, UserError
from rmse_edge.numbers import Count, Loops, Positions, Positive, Token, VocabularySize
from rmse_edge.schema import Finite, Name, Shape, Whole, validated

Arrays = dict[str, np.ndarray]
Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]


def dtype_name(dtype: object) -> Dtype:
    """The name of a type of PyTorch's."""
    return cast(Dtype, str(dtype).removeprefix("torch."))


Kept = dict[Name, tuple[Shape, Dtype]]  # name -> (shape, type)


class Retrieval(TypedDict):
    """Sizes of a retrieval head, as in `RMSEConfig`."""

    key_dims: Count
    slots: Count
    hits: Count
    gamma: Finite


@dataclass(frozen=True)
class Dials:
    """The quality dial of one call. Loops are 1-based; see rmse_edge/loop/stop.py for the rules."""

    max_loops: Loops
    min_loops: Loops = 1
    exit_threshold: Finite = 1.0  # >= 1 disables the gate
    exit_epsilon: Finite = 0.0  # 0 disables the delta rule
    exit_entropy: Finite = 0.0  # 0 disables the entropy rule

    def arrays(self) -> Arrays:
        """As the scalar inputs of `loop` and `step`."""
        integers = {"max_loops", "min_loops"}
        return {k: np.array(v, np.int64 if k in integers else np.float32) for k, v in vars(self).items()}

    def check(self, trained_depth: int) -> Dials:
        """Itself, if a model trained to `trained_depth` loops can run it.

        Raises:
            UserError: naming the dial and its range.
        """
        if not 1 <= self.max_loops <= trained_depth:
            raise UserError(
                f"--max-loops: got {self.max_loops}, expected 1..{trained_depth} (the depth the model was trained to)"
            )
        if not 1 <= self.min_loops <= self.max_loops:
            raise UserError(f"--min-loops: got {self.min_loops}, expected 1..max-loops ({self.max_loops})")
        if not self.exit_threshold > 0:
            raise UserError(f"--exit-threshold: got {self.exit_threshold}, expected a positive number (1 disables it)")
        for name in ("exit_epsilon", "exit_entropy"):
            if not getattr(self, name) >= 0:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag}: got {getattr(self, name)}, expected 0 (off) or more")
        return self


class Methods(Protocol):
    """An exported model's methods on arrays."""

    def run(self, method: str, chunk: int, feeds: Arrays) -> Arrays:
        """Call `prelude`, `loop`, `step`, `head`, `commit` or a method of `LoopSpec.extra` for `chunk` rows.

        Names and shapes are the LoopSpec's.

        The arrays returned may be reused by the next call of the same method and chunk: copy what is to be kept.
        """


@dataclass(frozen=True)
class ModelInfo:
    """What a host needs to know about a model, from a checkpoint or a manifest."""

    name: Annotated[str, Field(max_length=200)]
    target: Name  # "torch", "onnx", ...
    vocab_size: VocabularySize
    max_loops: Loops  # the trained depth
    dials: Dials  # the checkpoint's own settings
    window: Positions
    rotary_dims: Count
    rope_theta: Positive
    parameters: Whole
    nbytes: Whole  # of the artifact on disk; a manifest, which is a part of it, does not say
    chunks: tuple[Count, ...]  # rows of the calls that exist, ascending; the first is 1
    state: Kept  # ring axis -2
    rings: dict[Name, Name]  # state name -> the commit result that fills it
    memory: Kept = field(default_factory=dict)  # empty: the model has none
    retrieval: Retrieval | None = None  # None: the model has no retrieval head
    quant: Name = "fp32"  # how weights are held: fp32, fp16, int8, int4
    # of the weights, the same for a checkpoint and every package made of it
    fingerprint: Annotated[str, Field(max_length=200)] = ""
    max_seq_len: Annotated[int, Field(ge=1, le=2**53)] | None = None
    eos_token_ids: tuple[Token, ...] = ()  # each of them ends a text
    # ranges [first, end) of ids without a token, ascending; never to be drawn
    unused_token_ids: tuple[tuple[Token, VocabularySize], ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    def dials_with(self, **overrides: float | int | None) -> Dials:
        """The checkpoint's dials with those given (not None) replaced, checked."""
        chosen = {k: v for k, v in overrides.items() if v is not None}
        if "max_loops" in chosen and "min_loops" not in chosen:
            chosen["min_loops"] = min(self.dials.min_loops, max(1, int(chosen["max_loops"])))
        return Dials(**(vars(self.dials) | chosen)).check(self.max_loops)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return {name: value for name, value in asdict(self).items() if name != "nbytes"}

    @classmethod
    def from_json(cls, values: Any, nbytes: int, where: str = "manifest") -> ModelInfo:
        """
        Raises:
            PackageError: a field is missing or does not fit its type; one line begins with `where` and names it.
        """
        if isinstance(values, dict):
            values = values | {"nbytes": nbytes}
            if "eos_token_ids" not in values and isinstance(values.get("config"), dict):
                # Packages made before a text could end in several ways have config.json's own token.
                own = values["config"].get("eos_token_id")
                values["eos_token_ids"] = [] if own is None else own if isinstance(own, list) else [own]
        return validated(cls, values, where, PackageError, "export the package again", "model")

    @property
    def full_depth(self) -> Dials:
        """Every position runs every loop."""
        return Dials(self.max_loops)


@dataclass(frozen=True)
class Surprise:
    """How badly the memory predicted a segment, before it learned it."""

    position: int  # tokens fed up to the segment's end
    value: float  # mean loss of the memory: 1 where it knows nothing
    mean: float  # of the segments before
    std: float
    segments: float  # how many those were (a trained start counts as some)

    def above(self, gamma: float) -> bool:
        """Whether it stands out: more than `gamma` deviations above the mean, once there is a deviation to speak of."""
        return self.segments >= 2 and self.value > self.mean + gamma * self.std


@dataclass(frozen=True)
class Fed:
    """What feeding tokens gave."""

    logits: np.ndarray  # (n or 1, V) float32: for every token fed, or for the last one
    depth: np.ndarray  # (n,) int64: iterations each position executed
    iterations: list[int]  # per call, the deepest position's depth: what the call really cost
    chunks: list[int]  # per call, its rows
    surprises: list[Surprise] = field(default_factory=list)  # of the segments that were completed


class Runtime(Protocol):
    """A looped language model that remembers what it was fed."""

    info: ModelInfo

    @property
    def position(self) -> int:
        """Tokens fed since `reset`."""

    def reset(self) -> None:
        """Forget everything."""

    def feed(self, tokens: Sequence[int] | np.ndarray, dials: Dials, logits: str = "all") -> Fed:
        """Continue the text with `tokens`; `logits` is "all" or "last".

        Raises:
            UserError: the text would grow beyond `max_seq_len`, a token is outside the vocabulary, or there is none.
        """

    def state_bytes(self) -> int:
        """Bytes kept between calls, the same however long the text is."""
