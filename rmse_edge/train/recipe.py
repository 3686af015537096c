"""`Recipe`: everything that decides what a training run produces, as one JSON file beside the model it made."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import SEGMENT, RMSEConfig
from ..errors import ConfigError
from .gpt import GPTConfig

ARCHITECTURES = ("rmse", "gpt")


@dataclass(frozen=True)
class Recipe:
    """Data order, optimiser and stages. Lengths are optimiser steps."""

    model: dict[str, Any] = field(default_factory=dict)  # fields of RMSEConfig or GPTConfig
    architecture: str = "rmse"  # or "gpt", the plain baseline
    task: dict[str, Any] | None = None  # made-up examples instead of a text: {"name": "recall", ...}
    seed: int = 1337
    batch_size: int = 8  # sequences per step, all processes and accumulation rounds together
    accumulate: int = 1  # forward/backward rounds a step is split into
    # stage 1: the expected loss over the exit distribution
    steps: int = 1500
    depths: tuple[int, ...] = (4, 8, 12)  # a step's number of loops is drawn from these
    entropy_weight: float = 0.5  # beta, nats; falls linearly over stage 1, since deep loops pay off late
    final_entropy_weight: float = 0.1
    surprise_weight: float = 0.0  # of the memory's surprise in the loss: what is ordinary should not surprise
    # stage 2: the gate alone
    gate_steps: int = 150
    gate_lr: float = 1e-2
    gate_cost: float = 0.02  # nats a loop must bring
    # stage 3: exits sampled from the gate, keys and values as deployed
    exit_steps: int = 100
    exit_lr: float = 1e-4
    # AdamW, cosine to `final_lr_share`
    lr: float = 2e-3
    warmup: int = 100
    final_lr_share: float = 0.05
    beta_1: float = 0.9
    beta_2: float = 0.98
    weight_decay: float = 0.1  # on matrices only
    clip: float = 1.0  # gradient norm
    ema: float = 0.99  # decay per step of the averaged weights that are evaluated and saved
    balance_rate: float = 1e-2  # step of the expert balancing bias, in logits
    precision: str = "auto"  # "bf16", "fp32", or bf16 where the processor computes in it
    # bookkeeping
    eval_every: int = 100
    eval_blocks: int = 48

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(f"architecture: got {self.architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ConfigError(f"precision: got {self.precision!r}, expected auto, bf16 or fp32")
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            if field_.type == "int" and (not isinstance(value, int) or isinstance(value, bool)):
                raise ConfigError(f"{field_.name}: got {value!r}, expected a whole number")
            if field_.type == "float" and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ConfigError(f"{field_.name}: got {value!r}, expected a number")
        if not isinstance(self.model, dict):
            raise ConfigError(f"model: got {self.model!r}, expected an object of model fields")
        if self.task is not None and (not isinstance(self.task, dict) or self.architecture != "rmse"):
            raise ConfigError(f"task: got {self.task!r}, expected an object with a name, for architecture rmse")
        for name in ("batch_size", "accumulate", "steps", "eval_every", "eval_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("gate_steps", "gate_cost", "exit_steps", "warmup", "seed", "surprise_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least 0")
        for name in ("lr", "gate_lr", "exit_lr", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected a number above 0")
        for name in ("beta_1", "beta_2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected a number in [0, 1)")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"accumulate: got {self.accumulate}, expected a divisor of batch_size {self.batch_size}")
        config = self.model_config()
        if isinstance(config, RMSEConfig) and config.memory != "none" and config.block_size < 2 * SEGMENT:
            raise ConfigError(
                f"model.block_size: got {config.block_size}, expected at least {2 * SEGMENT}: a memory is read from the "
                "second segment on"
            )
        fits = self.depths and all(
            isinstance(n, int) and 1 <= n <= getattr(config, "max_loops", n) for n in self.depths
        )
        if isinstance(config, RMSEConfig) and not fits:
            raise ConfigError(f"depths: got {list(self.depths)}, expected loops in 1..max_loops ({config.max_loops})")

    def model_config(self) -> RMSEConfig | GPTConfig:
        if self.architecture == "rmse":
            config = RMSEConfig.from_dict(self.model, where="model")
            if config.kv_dtype == "int8":
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
        return self.steps + (self.gate_steps + self.exit_steps if self.architecture == "rmse" else 0)

    def stage(self, step: int) -> str:
        """Which stage a step (0-based) belongs to: "loops", "gate" or "exits"."""
        if step < self.steps:
            return "loops"
        return "gate" if step < self.steps + self.gate_steps else "exits"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def override(self, changes: list[str]) -> Recipe:
        """The recipe with "key=value" changes applied, as `--set` gives them: "lr=1e-3", "model.d_model=64".

        Values are JSON; what is not JSON is taken as text.

        Raises:
            ConfigError: no such key, or a value out of range.
        """
        values = dataclasses.asdict(self)
        for change in changes:
            key, equals, text = change.partition("=")
            if not equals or not key:
                raise ConfigError(f"--set: got {change!r}, expected key=value")
            try:
                value = json.loads(text)
            except ValueError:
                value = text
            group, dot, inner = key.partition(".")
            if dot and group in ("model", "task"):
                values[group] = (values[group] or {}) | {inner: value}
            else:
                values[key] = value
        return Recipe.from_dict(values, where="--set")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> Recipe:
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}")
        try:
            return cls(**values)
        except (TypeError, ConfigError) as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; expected a recipe.json") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not readable as JSON ({error})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object of recipe fields")
        return cls.from_dict(values, where=str(path))
