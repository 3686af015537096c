"""Boards through a model that fills them in: what calibration hears, and what quantising costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmse_edge.arch.registry import arch_of_model
from rmse_edge.errors import ArgumentError
from rmse_edge.info import BoardInfo
from rmse_edge.loop.contract import Tensors
from rmse_edge.loop.course import Course, Watcher
from rmse_edge.loop.dials import Dials
from rmse_edge.puzzles.known import game_of_model
from rmse_edge.puzzles.sets import Boards

HELD_OUT = 10  # of so many boards, one evaluates
EVALUATED = 500  # boards at most
LEAST_BOARDS = 20


def board_of(model: Any) -> BoardInfo | None:
    """What is to know of the boards of a model; None: it is of texts."""
    return arch_of_model(model).parts(model).get("board")


def split_boards(boards: Boards, cells: int, seed: int) -> tuple[Tensor, Boards]:
    """Boards (n, cells) to calibrate on, drawn so that they have about so many cells, and others to evaluate on.

    Raises:
        ArgumentError: there are too few.
    """
    if len(boards) < LEAST_BOARDS:
        raise ArgumentError("ids", f"the file has {len(boards)} boards, expected at least {LEAST_BOARDS}")
    order = np.random.default_rng(seed).permutation(len(boards))
    held = order[: min(EVALUATED, len(boards) // HELD_OUT)]
    chosen = order[len(held) :][: max(1, cells // boards.given.shape[1])]
    return torch.from_numpy(boards.given[chosen]), boards.part(held)


class BoardReader:
    """`Reader` (rmse_edge/loop/course.py) of boards (B, cells), each of which stops as a whole: a position stands for a
    board, and everything that is computed of it counts alike.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.dials = model, arch_of_model(model).parts(model)["dials"]
        self.exits: bool = self.dials.exits

    @torch.no_grad()
    def read(
        self,
        tokens: Tensor,
        stop: bool = False,
        loops: int | None = None,
        every: bool = True,
        watcher: Watcher | None = None,
    ) -> Course:
        model, spec = self.model, self.model.spec(tokens.shape[1])
        most = self.dials.max_loops if loops is None else loops
        dials = Dials(most, min(self.dials.min_loops, most), self.dials.exit_threshold if stop else 1.0)
        scalars: Tensors = {n: torch.from_numpy(v) for n, v in dials.arrays().items() if n in spec.dials}
        of_one_puzzle = {"puzzle": torch.zeros(len(tokens), dtype=torch.int64)}
        if watcher is not None:
            watcher.begins(torch.ones(len(tokens), 1, dtype=torch.bool))
        given: Tensors = {"board": tokens} | of_one_puzzle
        given |= model.prelude(given)
        carry, invariants = model.begin(given)
        states, depth = [], torch.zeros(len(tokens), 1, dtype=torch.int64)
        for k in range(most):
            active = carry["active"][:, None]
            if not bool(active.any()):
                break
            if watcher is not None:
                watcher.iterates(active, None, None, k)
            depth += active
            carry, _ = model.step(torch.tensor(k), carry, {}, given | invariants, scalars)
            states.append(carry["h"])
        if watcher is not None:
            watcher.ends()
        return Course(states if every else states[-1:], depth, None)

    def logits(self, state: Tensor) -> Tensor:
        return self.model.head(state)["symbols"]

    def read_by_head(self, state: Tensor) -> Tensor:
        return state[:, -self.model.config.seq_len :]


def compare_boards(model: Any, quantized: Any, boards: Boards) -> dict[str, Any]:
    """Both models on boards that calibrated nothing: solved, steps, and how far their states drift apart."""
    info = board_of(model)
    assert info is not None
    game = game_of_model(info)
    tokens = torch.from_numpy(boards.given)
    sides: dict[str, dict[str, Any]] = {}
    courses = {}
    for name, side in (("float", model), ("quantized", quantized)):
        reader = BoardReader(side)
        courses[name] = reader.read(tokens)
        sides[name] = {}
        for setting, course in (
            ("full_depth", courses[name]),
            ("adaptive", reader.read(tokens, stop=True, every=False)),
        ):
            answers = reader.logits(course.states[-1]).argmax(-1).numpy()
            solved = [game.broken(given, answer) is None for given, answer in zip(boards.given, answers)]
            sides[name][setting] = {
                "solved": float(np.mean(solved)),
                "cells": float((answers == boards.answer).mean()),
                "mean_steps": float(course.depth.double().mean()),
                "depth": course.depth[:, 0],
            }
    adaptive = [sides[name]["adaptive"]["depth"] for name in ("float", "quantized")]
    for side_ in sides.values():
        for found in side_.values():
            del found["depth"]
    drift = [
        float(((a - b).norm() / a.norm()).item()) for a, b in zip(courses["float"].states, courses["quantized"].states)
    ]
    same = float((adaptive[0] == adaptive[1]).double().mean())
    return {"boards": len(boards), **sides, "same_steps": same, "drift": drift}
