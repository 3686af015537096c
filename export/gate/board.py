"""The parity gate of a model that fills in boards: the same symbols in all cells, after the same number of iterations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rmse_edge.errors import ParityError
from rmse_edge.export.program import LoopProgram
from rmse_edge.info import BoardInfo, ModelInfo
from rmse_edge.loop.contract import LoopModel, Tensors
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.drive import run_loop
from rmse_edge.puzzles.known import game_of_model
from rmse_edge.runtimes.host.board import BoardRuntime

from .methods import compare_methods

BOARDS = 32  # made up
TOLERANCE = {True: 1e-4, False: 5e-2}  # of the symbols' logits, relative; by rule: exact, rounded
METHOD_TOLERANCE = {True: 1e-4, False: 1e-2}
ACTIVATION_TOLERANCE = 0.1  # relative, root mean square: where activations are rounded to int8 as well
SAME_CELLS, SAME_DEPTH = 0.98, 0.97  # by the rounded rule, shares
HIGHEST = {
    True: 0.999,
    False: 0.95,
}  # threshold: scores of a decided model crowd at 1, where rounding moves boards at will
UNDECIDED = 0.02  # by the rounded rule, a score so close to the threshold may be on either side of it


def board_settings(info: ModelInfo, scores: np.ndarray, highest: float = HIGHEST[True]) -> dict[str, Dials]:
    """Full depth, and thresholds at which a third and two thirds of the boards have stopped by the middle loop.

    Args:
        scores: (boards, K) what the rule compares with its dial.
    """
    settings = {"full depth": info.full_depth}
    middle = max(0, info.max_loops // 2 - 1)
    for name, share in (("early", 1 / 3), ("late", 2 / 3)):
        reached = np.sort(scores[:, : middle + 1].max(1))
        place = min(len(reached) - 2, int(share * len(reached)))
        threshold = float(np.float32((reached[place] + reached[place + 1]) / 2))
        settings[name] = dataclasses.replace(info.full_depth, exit_threshold=min(max(1e-6, threshold), highest))
    return settings


def boards_of(board: BoardInfo) -> np.ndarray:
    """(BOARDS, cells) boards with one answer each, of a kind that is known; otherwise any symbols.

    A trained model has answers to the former alone: between two symbols for a cell of the latter it may be undecided.
    """
    draw = np.random.default_rng(0)
    if board.kind is None:
        return draw.integers(0, board.symbols, (BOARDS, board.cells))
    game = game_of_model(board)
    return np.stack([game.generate(draw)[0] for _ in range(BOARDS)])


def board_gate(
    program: LoopProgram,
    model: Any,
    candidate: BoardRuntime,
    exact: bool,
    progress: Callable[[str], None] = lambda _: None,
    rounded_activations: bool = False,
) -> dict[str, Any]:
    """The whole gate. Returns the report that goes into the manifest. Where a package takes several boards at once, all are
    solved once alone and once together.

    Args:
        model: with identically rounded weights. It says by `scores(board, dials)`, (K,), what its exit rule compares.
        exact: float32: logits within 1e-4 and equal depth; otherwise shares of equal cells and depths.
        rounded_activations: as in `rmse_edge.export.gate.compare.gate`: methods may differ by more, and in the mean.
    Raises:
        ParityError: the package must not ship.
    """
    info, board = candidate.info, candidate.board
    boards = boards_of(board)
    with torch.no_grad():
        scores = np.stack([model.scores(torch.from_numpy(b[None]), _scalars(info.full_depth)).numpy() for b in boards])
    report: dict[str, Any] = {"rule": "exact" if exact else "rounded", "settings": {}}
    settings = board_settings(info, scores, HIGHEST[exact])
    for name, dials in settings.items():
        progress(f"parity at {name}")
        differences, cells, depths, found = [], [], [], []
        undecided = 0
        together = candidate.solve_batch(boards, dials) if candidate.largest_batch != 1 else [None] * BOARDS
        for given, score, in_batch in zip(boards, scores, together):
            ours, depth = _solved(model, given, dials)
            asked = score[: int(depth.max())]
            open_end = not exact and dials.exits and bool((np.abs(asked - dials.exit_threshold) < UNDECIDED).any())
            undecided += open_end
            for theirs in (candidate.solve(given, dials), *([in_batch] if in_batch is not None else [])):
                differences.append(float(np.abs(ours - theirs.logits).max() / max(1.0, np.abs(ours).max())))
                cells.append(float((ours.argmax(-1) == theirs.cells).mean()))
                if not open_end:
                    depths.append(bool(np.array_equal(depth, theirs.depth)))
            found.append(float(depth.mean()))
        summary = {
            "boards": BOARDS,
            "batches": candidate.largest_batch != 1,
            "max_logit_difference": max(differences),
            "same_cells": float(np.mean(cells)),
            "same_depth": float(np.mean(depths)) if depths else 1.0,
            "undecided": undecided,
            "mean_depth": float(np.mean(found)),
        }
        report["settings"][name] = {"dials": vars(dials), **summary}
        least = (1.0, 1.0) if exact else (SAME_CELLS, SAME_DEPTH)
        close = not exact or summary["max_logit_difference"] <= TOLERANCE[True]
        if not close or summary["same_cells"] < least[0] or summary["same_depth"] < least[1]:
            random = "; random symbols were compared: puzzle in its config.json would say what its boards are"
            raise ParityError(
                f"parity failed at {name}: logits differ by {summary['max_logit_difference']:.1e} relative, "
                f"{summary['same_cells']:.1%} of the cells and {summary['same_depth']:.1%} of the depths are the same"
                f"{random if board.kind is None else ''}"
            )
    progress("parity of each method")
    program = dataclasses.replace(program, model=model)
    worst: dict[str, float] = {}
    tolerance = ACTIVATION_TOLERANCE if rounded_activations else METHOD_TOLERANCE[exact]
    # Rounded so, the one board of these inputs may stop elsewhere: the boards above count that.
    of_methods = [info.full_depth] if rounded_activations else list(settings.values())
    for dials in of_methods:
        found_differences = compare_methods(program, candidate.methods, vars(dials), tolerance, rounded_activations)
        for label, difference in found_differences.items():
            worst[label] = max(worst.get(label, 0.0), difference)
    report["methods"] = worst
    return report


def _scalars(dials: Dials) -> Tensors:
    return {name: torch.from_numpy(value) for name, value in dials.arrays().items()}


@torch.no_grad()
def _solved(model: LoopModel, cells: np.ndarray, dials: Dials) -> tuple[np.ndarray, np.ndarray]:
    """Symbols' logits (cells, symbols) and depth, by the model without a runtime."""
    spec, scalars = model.spec(len(cells)), _scalars(dials)
    tensors: Tensors = {"board": torch.from_numpy(cells[None])}
    tensors |= model.prelude(tensors)
    found = run_loop(model, spec, tensors, {name: scalars[name] for name in spec.dials})
    return model.head(found["h"])["symbols"][0].numpy(), found["depth"].numpy()
