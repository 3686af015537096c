"""Deep supervision: a solver of boards learns from one refinement at a time and goes on from where that one left it.

Every row of a batch works on a board of its own. What it has found (z_H, z_L) is carried, without its gradient, to the next
step of the optimiser; a row whose board has halted takes the next one that is offered. So a batch holds boards at all depths.

Sources: TRM, arXiv 2510.04871, and HRM, arXiv 2506.21734; as losses.py and trm.py of
SamsungSAILMontreal/TinyRecursiveModels e7b6871 and hrm_act_v1.py of sapientinc/HRM 42410da compute it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recipe import Recipe
from .sources import IGNORED, Batch


def log_stablemax(logits: Tensor) -> Tensor:
    """Logarithms of s(x) / sum s(x) over the last axis, float64; s(x) = x + 1 from 0 on, 1 / (1 - x) below (Prieto et al.
    2025, arXiv 2501.04697, eq. 6).
    """
    x = logits.double()
    s = torch.where(x < 0, 1 / (1 - x.clamp(max=0)), x + 1)
    return s.log() - s.sum(-1, keepdim=True).log()


def board_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) mean stable-max cross-entropy of a board's cells, nats, float64; (B,) bool, whether all of them are right."""
    asked = targets != IGNORED
    picked = log_stablemax(logits).gather(-1, targets.where(asked, 0).unsqueeze(-1)).squeeze(-1)
    losses = -(picked * asked).sum(-1) / asked.sum(-1).clamp_min(1)
    return losses, ((logits.argmax(-1) == targets) | ~asked).all(-1)


class DeepSupervision(nn.Module):
    """One step of the optimiser as a loss, with what is carried to the next: buffers of this module.

    Attributes:
        solved: of the boards that halted in the last step, the share with all cells right; None: none did.
    """

    tokens: Tensor  # (B, cells) the boards that the rows work on
    targets: Tensor
    puzzles: Tensor  # (B,) int64 which puzzles these are of; 0, where the model knows one
    z_h: Tensor  # (B, S, D)
    z_l: Tensor
    steps: Tensor  # (B,) int64, done on this board
    halted: Tensor  # (B,) bool: takes another board at the next step

    def __init__(self, model: Any, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        c, rows = model.config, recipe.batch_size
        for name in ("tokens", "targets"):
            self.register_buffer(name, torch.zeros(rows, c.seq_len, dtype=torch.int64))
        for name in ("z_h", "z_l"):
            self.register_buffer(name, torch.zeros(rows, c.positions, c.hidden_size))
        for name in ("puzzles", "steps"):
            self.register_buffer(name, torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("halted", torch.ones(rows, dtype=torch.bool))
        self.solved: float | None = None

    def forward(
        self, batch: Batch, stage: str, loops: int = 0, entropy_weight: float = 0.0, thresholds: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            batch: boards on offer, `tokens` and `targets` (B, cells), and where the model knows several puzzles, `puzzles`
                (B,), which of them these are of; B is the recipe's.
            stage: "validate" measures other boards, of any number, and touches nothing that is carried.
        Returns:
            (loss to differentiate, its part about cells, mean steps of the boards that halted), scalars; for "validate" the
            first is the mean loss of cells after every step, (K,).
        """
        if stage == "validate":
            return self.validate(batch)
        model, c = self.model, self.model.config
        fresh = self.halted
        self.tokens = torch.where(fresh[:, None], batch["tokens"], self.tokens)
        self.targets = torch.where(fresh[:, None], batch["targets"], self.targets)
        if "puzzles" in batch:
            self.puzzles = torch.where(fresh, batch["puzzles"], self.puzzles)
        x = model.embed(self.tokens, self.puzzles)
        first_h, first_l = model.first(x.detach())
        z_h = torch.where(fresh[:, None, None], first_h, self.z_h)
        z_l = torch.where(fresh[:, None, None], first_l, self.z_l)
        z_h, z_l = model.refine(x, z_h, z_l)
        self.z_h, self.z_l = z_h.detach(), z_l.detach()
        self.steps = torch.where(fresh, 0, self.steps) + 1
        of_cells, right = board_losses(model.head(z_h)["symbols"], self.targets)
        halt, go_on = model.halting(z_h)
        of_halting = F.binary_cross_entropy_with_logits(halt, right.to(halt.dtype))
        if c.halting == "q":
            of_halting = of_halting + F.binary_cross_entropy_with_logits(go_on, self.value_of_going_on(x))
        stop = halt > go_on if c.halting == "q" else halt > 0
        self.halted = (self.steps >= c.halt_max_steps) | (stop.detach() & (self.steps >= self.least_steps()))
        done = self.steps[self.halted]
        self.solved = right[self.halted].double().mean().item() if len(done) else None
        last = of_cells.mean()
        depth = (done if len(done) else self.steps).double().mean()
        return last + 0.5 * of_halting, last.detach(), depth

    def least_steps(self) -> Tensor:
        """(B,) steps before a board may halt: some explore what more of them would bring."""
        c, rows = self.model.config, self.steps
        explores = torch.rand(len(rows), device=rows.device) < c.halt_exploration_prob
        drawn = torch.randint(min(2, c.halt_max_steps), c.halt_max_steps + 1, (len(rows),), device=rows.device)
        return torch.where(explores, drawn, 0)

    @torch.no_grad()
    def value_of_going_on(self, x: Tensor) -> Tensor:
        """(B,) what q_continue should be: the better of the next step's two values, or halting's, behind the last."""
        c = self.model.config
        halt, go_on = self.model.halting(self.model.refine(x, self.z_h, self.z_l)[0])
        return torch.sigmoid(torch.where(self.steps >= c.halt_max_steps, halt, torch.maximum(halt, go_on)))

    @torch.no_grad()
    def validate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        x = model.embed(batch["tokens"], batch.get("puzzles"))
        z_h, z_l = model.first(x)
        losses = []
        for _ in range(model.config.halt_max_steps):
            z_h, z_l = model.refine(x, z_h, z_l)
            losses.append(board_losses(model.head(z_h)["symbols"], batch["targets"])[0].mean())
        return torch.stack(losses), losses[-1], losses[-1].new_tensor(float(len(losses)))
