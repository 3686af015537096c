"""`Recipe`: everything that decides what a training run produces, as one JSON file beside the model it made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rmse_edge.arch.bd3lm.config import Bd3lmConfig
from rmse_edge.arch.common.recursive import RecursiveConfig
from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.checkpoint import read_config
from rmse_edge.errors import ConfigError
from rmse_edge.numbers import SEGMENT, Loops, Share
from rmse_edge.schema import Expected, Finite, check_fields
from rmse_edge.shards import StoredTensors

from .gpt import GPTConfig
from .looped import gate_name, trainable
from .recipe_file import RecipeFile

Steps = Annotated[int, Field(ge=1, le=10**9)]
SomeSteps = Annotated[int, Field(ge=0, le=10**9)]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False), Expected("a number above 0")]
AtLeastZero = Annotated[float, Field(ge=0, allow_inf_nan=False), Expected("a number of at least 0")]


LENGTH = 256  # positions of a sequence that a gate is trained on, at most, unless a recipe says otherwise


@dataclass(frozen=True)
class Recipe(RecipeFile):
    """Data order, optimiser and stages. Lengths are optimiser steps."""

    groups: ClassVar[tuple[str, ...]] = ("model", "task")

    model: Annotated[dict[str, Any], Expected("an object of model fields")] = field(
        default_factory=dict
    )  # fields of the architecture's configuration, or of GPTConfig
    architecture: str = "rmse"  # a model_type that is trained here, or "gpt", the plain baseline
    task: Annotated[dict[str, Any], Expected("an object with a name")] | None = (
        None  # made-up examples instead of a text: {"name": "recall", ...}
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    block_size: Steps | None = None  # positions of a training sequence; None: the model's own block_size
    batch_size: Steps = 8  # sequences per step, all processes and accumulation rounds together
    accumulate: Steps = 1  # forward/backward rounds a step is split into
    # stage 1: "expected", the expected loss over the exit distribution of the gate, or "last", the loss after the last loop
    # of the step, for models of elastic depth and those without a gate
    objective: Literal["expected", "last"] = "expected"
    steps: SomeSteps = 1500
    depths: tuple[Loops, ...] = (4, 8, 12)  # a step's number of loops is drawn from these
    entropy_weight: Finite = 0.5  # beta, nats; falls linearly over stage 1, since deep loops pay off late
    final_entropy_weight: Finite = 0.1
    surprise_weight: AtLeastZero = 0.0  # of the memory's surprise in the loss: what is ordinary should not surprise
    # stage 2: the gate alone
    gate_steps: SomeSteps = 150
    gate_lr: Above = 1e-2
    gate_cost: AtLeastZero = 0.02  # nats a loop must bring
    # stage 3: exits sampled from the gate, keys and values as deployed
    exit_steps: SomeSteps = 100
    exit_lr: Above = 1e-4
    # AdamW, cosine to `final_lr_share`
    lr: Above = 2e-3
    warmup: SomeSteps = 100
    final_lr_share: Finite = 0.05
    optimizer: Literal["adamw", "adam_atan2"] = "adamw"
    beta_1: Share = 0.9
    beta_2: Share = 0.98
    weight_decay: Finite = 0.1  # on matrices only
    clip: Above = 1.0  # gradient norm
    ema: Share = 0.99  # decay per step of the averaged weights that are evaluated and saved
    balance_rate: Finite = 1e-2  # step of the expert balancing bias, in logits, or in sigmoids of these
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # "bf16", "fp32", or bf16 where the processor computes in it
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the checkpoint
    # bookkeeping
    eval_every: Steps = 100
    eval_blocks: Steps = 48

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        if self.batch_size % self.accumulate:
            raise ConfigError(f"accumulate: got {self.accumulate}, expected a divisor of batch_size {self.batch_size}")
        config = self.model_config()
        if self.task is not None and isinstance(config, GPTConfig):
            raise ConfigError(f"task: got {self.task!r}, expected none for architecture {self.architecture}")
        if isinstance(config, RecursiveConfig):
            self._check_boards()
        if isinstance(config, RMSEConfig) and config.memory != "none" and self.block < 2 * SEGMENT:
            raise ConfigError(
                f"{'model.' * (self.block_size is None)}block_size: got {self.block}, expected at least {2 * SEGMENT}: a memory is read from the "
                "second segment on"
            )
        if self.task is None and self.block_of(config) is None:  # a task's sequences have lengths of their own
            raise ConfigError("block_size: is missing, expected the number of positions of a training sequence")
        if isinstance(config, GPTConfig) and self.block_size not in (None, config.block_size):
            raise ConfigError(f"block_size: got {self.block_size}, expected that of the model ({config.block_size})")
        if not self.total_steps:
            raise ConfigError("steps: got 0, expected at least 1: no other stage has any")
        if isinstance(config, Bd3lmConfig):
            self._check_diffusion(config)
        elif not isinstance(config, GPTConfig):
            self._check_gate(config)
            most = config.dials.max_loops
            if not self.depths or max(self.depths) > most:
                raise ConfigError(
                    f"depths: got {list(self.depths)}, expected loops in 1..{most}, the depth that is trained"
                )

    def _check_gate(self, config: Any) -> None:
        """Fail where a stage needs a gate that the model does not have."""
        if gate_name(config) is not None:
            return
        add = 'the model has no exit gate; exit_rules with "gate" give it one'
        if self.steps and self.objective == "expected":
            raise ConfigError(f"objective: got 'expected', expected 'last': {add}")
        for name in ("gate_steps", "exit_steps"):
            if getattr(self, name):
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected 0: {add}")

    def _check_diffusion(self, config: Bd3lmConfig) -> None:
        """Fail where a model that writes blocks is to learn what it cannot; it learns from texts, and all in one stage."""
        self._check_gate(config)
        if self.task is not None:
            raise ConfigError(f"task: got {self.task!r}, expected none for architecture {self.architecture}")
        if self.block % config.block_size or self.block > config.model_length:
            raise ConfigError(
                f"block_size: got {self.block_size}, expected a multiple of the model's block_size ({config.block_size}), at most "
                f"its model_length ({config.model_length})"
            )

    def _check_boards(self) -> None:
        """Fail where a solver of boards is to learn what it cannot."""
        if self.task is None:
            raise ConfigError(
                f"task: is missing, expected one of boards (sudoku or maze) for architecture {self.architecture}"
            )
        if self.accumulate > 1:
            raise ConfigError(
                f"accumulate: got {self.accumulate}, expected 1: rows keep their boards from step to step"
            )

    def block_of(self, config: Any) -> int | None:
        """Positions of a training sequence of a model of this configuration."""
        if isinstance(config, Bd3lmConfig):  # whose own block_size is that of what is denoised together
            return self.block_size or config.model_length
        return self.block_size or getattr(config, "block_size", None) or getattr(config, "seq_len", None)

    @property
    def block(self) -> int:
        """Positions of a training sequence."""
        found = self.block_of(self.model_config())
        assert found is not None  # checked
        return found

    def model_config(self) -> Any:
        if self.architecture != "gpt":
            config = trainable(self.architecture, "architecture").from_dict(self.model, where="model")
            if getattr(config, "kv_dtype", None) == "int8":
                raise ConfigError(
                    "model.kv_dtype: int8 needs scales that only calibration finds; use rmse-quantize --kv int8"
                )
            return config
        try:
            return GPTConfig(**self.model)
        except (TypeError, ConfigError) as error:
            raise ConfigError(f"model: {error}") from None

    @property
    def total_steps(self) -> int:
        return self.steps + (0 if self.architecture == "gpt" else self.gate_steps + self.exit_steps)

    @classmethod
    def of_gate(cls, start: Path) -> Recipe:
        """What trains the exit gate of a checkpoint alone, all else frozen. A model without a gate gets one, if it can.

        Raises:
            CheckpointError: there is no such checkpoint.
            ConfigError: its architecture is not trained here, or has no exit gate.
        """
        config = read_config(start)
        trainable(config.model_type, f"{start}: model_type")
        if gate_name(config) is None and not hasattr(config, "exit_rules"):
            raise ConfigError(
                f"{start}: model_type: {config.model_type} has no exit gate, and no exit rules that could have one"
            )
        if gate_name(config) is None:
            config = dataclasses.replace(config, exit_rules=(*config.exit_rules, "gate"))
        dtype: Any = str(StoredTensors(start).dtype()).removeprefix("torch.")
        length = getattr(config, "block_size", None) or LENGTH
        return cls(
            model=config.to_dict(), architecture=config.model_type, block_size=min(length, LENGTH), steps=0, exit_steps=0,
            depths=(1,), dtype=dtype,
        )  # fmt: skip

    def stage(self, step: int) -> str:
        """Which stage a step (0-based) belongs to: "loops", "gate" or "exits"."""
        if step < self.steps:
            return "loops"
        return "gate" if step < self.steps + self.gate_steps else "exits"
