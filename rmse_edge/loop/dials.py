"""The quality dial: when a loop may stop, set anew for every call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rmse_edge.errors import UserError
from rmse_edge.numbers import Loops
from rmse_edge.schema import Finite


@dataclass(frozen=True)
class Dials:
    """The quality dial of one call. Loops are 1-based; see rmse_edge/loop/stop.py for the rules."""

    max_loops: Loops
    min_loops: Loops = 1
    exit_threshold: Finite = 1.0  # >= 1 disables the gate
    exit_epsilon: Finite = 0.0  # 0 disables the delta rule
    exit_entropy: Finite = 0.0  # 0 disables the entropy rule

    def arrays(self) -> dict[str, np.ndarray]:
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
