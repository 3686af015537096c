"""Tasks of boards: Sudoku and mazes, made from a seed or read from CSV files, with what is measured on boards never seen."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rmse_edge.arch.common.recursive import RecursiveConfig
from rmse_edge.errors import ArgumentError, ConfigError, UserError
from rmse_edge.info import BoardKind
from rmse_edge.puzzles.game import Game
from rmse_edge.puzzles.known import game_of
from rmse_edge.puzzles.measures import THRESHOLDS, table_of_depths, table_of_thresholds
from rmse_edge.puzzles.sets import Boards, made, read_boards, unlike
from rmse_edge.schema import check_fields

from .recipe import Recipe
from .sources import IGNORED, Batch, Seed, Sized, require
from .supervision import DeepSupervision

TRAIN_FILE, TEST_FILE = "train.csv", "test.csv"


class Solving:
    """What tasks of all boards have in common, whatever the boards are."""

    puzzle_lr_scale: float

    def check_sizes(self, config: Any, name: str, **wanted: Any) -> None:
        """Fail where a model of this configuration solves no boards of these fields.

        Args:
            name: of the task.
            wanted: fields of the model, and what they must be.
        Raises:
            ConfigError: names the field of the model.
        """
        if not isinstance(config, RecursiveConfig):
            raise ConfigError(
                f"architecture: got {config.model_type!r}, the task {name} needs a solver of boards (trm or hrm)"
            )
        for field, value in wanted.items():
            if getattr(config, field) != value:
                raise ConfigError(f"model.{field}: got {getattr(config, field)!r}, the task {name} needs {value!r}")

    def objective(self, model: Any, recipe: Recipe) -> DeepSupervision:
        return DeepSupervision(model, recipe)

    def lr_scales(self) -> dict[str, float]:
        """How the names of parameters begin -> their learning rate beside the recipe's."""
        return {"puzzle_emb.": self.puzzle_lr_scale}

    def vocabulary(self) -> list[str]:
        return []

    def calibration(self) -> Tensor | None:
        return None

    def draw_plot(self, result: dict[str, Any], picture: Path, window: int) -> None:
        """Boards solved by depth, and with halting against the mean steps."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        from rmse_edge.files import new_file

        figure, axis = plt.subplots(figsize=(7, 4))
        depths = result["by_depth"]
        axis.plot([d["steps"] for d in depths], [100 * d["solved"] for d in depths], "o-", ms=3, label="fixed steps")
        halting = sorted(result["by_threshold"], key=lambda row: row["mean_steps"])
        axis.plot([t["mean_steps"] for t in halting], [100 * t["solved"] for t in halting], "s-", ms=4, label="halting")
        axis.set_xlabel("mean steps")
        axis.set_ylabel("test boards solved (%)")
        axis.legend(fontsize=8)
        figure.tight_layout()
        with new_file(picture) as part:
            figure.savefig(part, dpi=110)
        plt.close(figure)


@dataclass
class BoardTask(Solving):
    """Boards with one answer each."""

    kind: ClassVar[BoardKind]

    size: Sized = 9
    train: Sized = 1000  # boards
    held_out: Sized = 128  # of them, for validation
    test: Sized = 500
    seed: int = 0  # of the boards
    data: str | None = None  # a folder with train.csv and test.csv: as many are drawn from there, in place of made ones
    augment: bool = True  # every board that is offered is a random symmetric form of one
    puzzle_lr_scale: float = 1.0  # learning rate of the puzzle's own vectors beside the recipe's

    def __post_init__(self) -> None:
        self.alike = 0  # test boards that are left out
        check_fields(self, ConfigError)
        try:
            self.game: Game = game_of(self.kind, self.size**2)
        except UserError as error:
            raise ConfigError(str(error)) from None
        require(self, "puzzle_lr_scale", self.puzzle_lr_scale > 0, "a number above 0")
        if self.data is None:
            try:
                boards, self.tested = made(self.game, self.train, self.test, self.seed)
            except ArgumentError as error:
                raise ConfigError(f"{'train' if error.name == 'count' else error.name}: {error.problem}") from None
        else:
            files = ((TRAIN_FILE, self.train), (TEST_FILE, self.test))
            boards, tested = (read_boards(Path(self.data) / name, self.game, n, self.seed) for name, n in files)
            self.tested = unlike(self.game, tested, boards)
            self.alike = len(tested) - len(self.tested)
            if not self.tested:
                raise ConfigError(f"data: every test board of {self.data} is a symmetric form of a training board")
        require(self, "held_out", self.held_out < len(boards), f"fewer than the {len(boards)} training boards")
        self.held = boards.part(slice(0, self.held_out))
        self.boards = boards.part(slice(self.held_out, None))
        digest = hashlib.sha256()
        for part in (self.boards, self.held, self.tested):
            digest.update(part.given.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def vocab_size(self) -> int:
        return self.game.symbols

    def check_model(self, config: Any) -> None:
        self.check_sizes(config, self.kind, seq_len=self.size**2, vocab_size=self.vocab_size, puzzle=self.kind)

    def batch(self, count: int, seed: Seed) -> Batch:
        draw = np.random.default_rng(seed)
        rows = draw.integers(0, len(self.boards), count)
        given, answer = self.boards.given[rows], self.boards.answer[rows]
        if self.augment:
            given, answer = self.game.augmented(given, answer, draw)
        return {"tokens": torch.from_numpy(given), "targets": torch.from_numpy(answer)}

    def validation(self, count: int) -> Batch:
        held = self.held.part(slice(0, count))
        return {"tokens": torch.from_numpy(held.given), "targets": torch.from_numpy(held.answer)}

    def evaluate(self, model: Any) -> dict[str, Any]:
        """Boards never seen: solved at every depth, and with halting at several thresholds."""
        exact, cells, score = trajectories(model, self.tested)
        return {
            "boards": len(self.tested),
            **({"left_out": self.alike} if self.alike else {}),
            "by_depth": table_of_depths(exact, cells),
            "by_threshold": table_of_thresholds(exact, score, (*THRESHOLDS, 1.0)),
        }


@dataclass
class SudokuTask(BoardTask):
    kind = "sudoku"


@dataclass
class MazeTask(BoardTask):
    kind = "maze"


@torch.no_grad()
def trajectories(
    model: Any, boards: Boards, puzzles: np.ndarray | None = None, batch: int = 64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """After every step, (K, n) each: whether all cells that are asked for are right, the share that is, and the halting score.

    Args:
        boards: `IGNORED` in an answer asks for nothing.
        puzzles: (n,) which they are of, where the model knows several.
    """
    model.eval()
    found = []
    for first in range(0, len(boards), batch):
        part = boards.part(slice(first, first + batch))
        of = None if puzzles is None else torch.from_numpy(puzzles[first : first + batch])
        asked = part.answer != IGNORED
        x = model.embed(torch.from_numpy(part.given), of)
        z_h, z_l = model.first(x)
        rows = []
        for _ in range(model.config.halt_max_steps):
            z_h, z_l = model.refine(x, z_h, z_l)
            right = (model.head(z_h)["symbols"].argmax(-1).numpy() == part.answer).sum(1) / asked.sum(1)
            rows.append((right == 1, right, model.halting_score(z_h).double().numpy()))
        found.append([np.stack(column) for column in zip(*rows)])
    exact, cells, score = (np.concatenate(parts, 1) for parts in zip(*found))
    return exact, cells, score
