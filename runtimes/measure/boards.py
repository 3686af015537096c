"""Boards on any runtime: how many are solved, in how many steps, and how many per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rmse_edge.loop.dials import Dials
from rmse_edge.puzzles.game import Game
from rmse_edge.puzzles.sets import Boards
from rmse_edge.runtimes.host.board import BoardRuntime, Solved


@dataclass(frozen=True)
class Solving:
    """What boards became at one setting, (n,) each."""

    solved: np.ndarray  # bool: no rule is broken. Exact, and not the answer of the file: a board may have several
    cells: np.ndarray  # share of cells as in the file's answer
    steps: np.ndarray  # int64
    max_loops: int
    seconds: float

    def summary(self) -> dict[str, Any]:
        """`false_halts`: boards that stopped by themselves before the last step, and are not solved."""
        early = self.steps < self.max_loops
        counts = np.bincount(self.steps, minlength=self.max_loops + 1)[1:]
        return {
            "boards": len(self.solved),
            "solved": float(self.solved.mean()),
            "cells": float(self.cells.mean()),
            "mean_steps": float(self.steps.mean()),
            "false_halts": float((early & ~self.solved).mean()),
            "histogram": counts.tolist(),
            "boards_per_s": len(self.solved) / self.seconds,
        }


def solve_all(
    runtime: BoardRuntime,
    game: Game,
    boards: Boards,
    dials: Dials,
    batch: int = 32,
    progress: Callable[[int], object] = lambda _: None,
) -> Solving:
    """Every board of a set at one setting."""
    found: list[Solved] = []
    began = time.perf_counter()
    size = batch if runtime.largest_batch is None else min(batch, runtime.largest_batch)
    for first in range(0, len(boards), size):
        given = boards.given[first : first + size]
        found += runtime.solve_batch(given, dials)
        progress(len(given))
    seconds = time.perf_counter() - began
    solved = np.array([game.broken(given, s.cells) is None for given, s in zip(boards.given, found)])
    cells = np.array([(s.cells == answer).mean() for answer, s in zip(boards.answer, found)])
    return Solving(solved, cells, np.array([int(s.depth.max()) for s in found]), dials.max_loops, seconds)


def sweep_thresholds(
    runtime: BoardRuntime,
    game: Game,
    boards: Boards,
    dials: Dials,
    thresholds: Sequence[float],
    progress: Callable[[int], object] = lambda _: None,
) -> list[dict[str, Any]]:
    """`Solving.summary` at every threshold, and at full depth, which is 1."""
    return [
        {"exit_threshold": t}
        | solve_all(runtime, game, boards, replace(dials, exit_threshold=t), progress=progress).summary()
        for t in (*thresholds, 1.0)
    ]


def time_boards(
    runtime: BoardRuntime,
    boards: np.ndarray,
    settings: dict[str, Dials],
    batches: Sequence[int],
    repetitions: int,
    progress: Callable[[int], object] = lambda _: None,
) -> list[dict[str, Any]]:
    """Boards per second at several settings and batches, after a warm-up, interleaved so that all see the same machine."""
    jobs = [(name, dials, size) for size in batches for name, dials in settings.items()]
    times: dict[tuple[str, int], list[float]] = {}
    steps: dict[tuple[str, int], float] = {}
    for repetition in range(repetitions + 1):
        for name, dials, size in jobs:
            began = time.perf_counter()
            found = [
                s for at in range(0, len(boards), size) for s in runtime.solve_batch(boards[at : at + size], dials)
            ]
            took = time.perf_counter() - began
            if repetition:
                times.setdefault((name, size), []).append(took)
            steps[name, size] = float(np.mean([s.iterations for s in found]))
            progress(len(boards))
    return [
        {
            "setting": name,
            "batch": size,
            "mean_steps": steps[name, size],
            "boards_per_s": len(boards) / statistics.median(times[name, size]),
            "ms_per_step": 1000 * statistics.median(times[name, size]) / len(boards) / steps[name, size],
        }
        for name, _, size in jobs
    ]
