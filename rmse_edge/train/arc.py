"""The task of ARC: a puzzle of its own for every task, which the model knows by a vector that it learns from the pairs shown."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from rmse_edge.errors import ConfigError
from rmse_edge.puzzles.arc import PAD, SIDE, SYMBOLS, Pair, board_of, forms_of, read_arc, unseen
from rmse_edge.puzzles.measures import THRESHOLDS, table_of_depths, table_of_thresholds
from rmse_edge.puzzles.sets import Boards
from rmse_edge.schema import check_fields

from .boards import Solving, trajectories
from .sources import IGNORED, Batch, Seed, Sized, require


@dataclass
class Arc(Solving):
    """All pairs of the training tasks are learnt, and of the evaluation tasks those shown. What these ask is the test, but
    for pairs that are symmetric forms of learnt ones.

    As published, a pair lies anywhere on the board, and each symmetric form of a task is a puzzle of its own. The test is
    of the tasks as they are, one answer for each; nothing votes over forms.
    """

    data: str  # see `read_arc`
    size: Annotated[int, Field(ge=1, le=SIDE)] = SIDE  # of the boards; tasks with larger grids are left out
    forms: Sized = 1  # of each task, itself among them
    held_out: Sized = 32  # pairs of the training ones, for validation
    tasks: Sized | None = None  # of the evaluation tasks and of the training ones, the first so many; None: all
    seed: int = 0  # of the forms
    puzzle_lr_scale: float = 1.0  # learning rate of the puzzles' vectors beside the recipe's

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        require(self, "puzzle_lr_scale", self.puzzle_lr_scale > 0, "a number above 0")
        self.vocab_size = SYMBOLS
        sets = read_arc(self.data)
        training, evaluation = (
            [task for task in tasks if task.side <= self.size][: self.tasks]
            for tasks in (sets.training, sets.evaluation)
        )
        require(self, "size", bool(evaluation), "that of some evaluation task at least")
        draw = np.random.default_rng(self.seed)
        learnt: list[tuple[int, Pair]] = []
        self.names: list[str] = []  # of the puzzles
        for i, task in enumerate((*evaluation, *training)):
            for form in forms_of(task, self.forms, draw):
                pairs = form.shown if i < len(evaluation) else (*form.shown, *form.asked)
                learnt += [(len(self.names), pair) for pair in pairs]
                self.names.append(task.name)
        asked = unseen(evaluation, [pair for _, pair in learnt])
        require(self, "data", bool(asked), "evaluation tasks that ask for what is not learnt")
        self.test = [(i * self.forms, pair) for i, pair in asked]  # the first form of a task is the task itself
        require(self, "held_out", self.held_out < len(learnt), f"fewer than the {len(learnt)} pairs to learn")
        order = draw.permutation(len(learnt))
        self.held, self.learnt = ([learnt[i] for i in part] for part in np.split(order, [self.held_out]))
        digest = hashlib.sha256(repr((self.size, self.names)).encode())
        for _, pair in (*self.learnt, *self.held, *self.test):
            digest.update(board_of(pair.given, SIDE).tobytes() + board_of(pair.answer, SIDE).tobytes())
        self.fingerprint = digest.hexdigest()

    def check_model(self, config: Any) -> None:
        known = len(self.names)
        self.check_sizes(config, "arc", seq_len=self.size**2, vocab_size=SYMBOLS, num_puzzle_identifiers=known)

    def boards(self, pairs: list[tuple[int, Pair]], draw: np.random.Generator | None = None) -> Batch:
        """Pairs as boards, in the corner or, drawn, anywhere; nothing is asked of an answer's padding."""
        given, answers = [], []
        for _, pair in pairs:
            free = [self.size - max(sizes) + 1 for sizes in zip(pair.given.shape, pair.answer.shape)]
            place = [0, 0] if draw is None else [int(draw.integers(room)) for room in free]
            given.append(board_of(pair.given, self.size, *place))
            answers.append(board_of(pair.answer, self.size, *place))
        targets = np.stack(answers)
        return {
            "tokens": torch.from_numpy(np.stack(given)),
            "targets": torch.from_numpy(np.where(targets == PAD, IGNORED, targets)),
            "puzzles": torch.tensor([puzzle for puzzle, _ in pairs]),
        }

    def batch(self, count: int, seed: Seed) -> Batch:
        draw = np.random.default_rng(seed)
        return self.boards([self.learnt[i] for i in draw.integers(0, len(self.learnt), count)], draw)

    def validation(self, count: int) -> Batch:
        return self.boards(self.held[:count])

    def evaluate(self, model: Any) -> dict[str, Any]:
        """What is asked of the evaluation tasks: solved at every depth, and with halting at several thresholds."""
        found = self.boards(self.test)
        boards = Boards(found["tokens"].numpy(), found["targets"].numpy(), np.zeros(len(self.test), np.int64))
        exact, cells, score = trajectories(model, boards, found["puzzles"].numpy())
        return {
            "boards": len(boards),
            "puzzles": len(self.names),
            "by_depth": table_of_depths(exact, cells),
            "by_threshold": table_of_thresholds(exact, score, (*THRESHOLDS, 1.0)),
        }
