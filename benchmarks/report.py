"""The results as a document for programs and as Markdown for people."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rmse_edge.cli.display import plain, table

from . import llama
from .cells import Cell
from .field import BASELINE, CONTESTANTS, TWINS
from .first_token import FirstToken
from .shapes import Looped, Twin

HEAD = (
    "contestant", "test", "loops", "tokens/s", "slowest to fastest", "x llama.cpp", "GB/s of weights", "peak MiB",
    "file MB", "note",
)  # fmt: skip


@dataclass
class Results:
    """All that was measured."""

    rounds: int
    cells: list[Cell] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # "model/threads/contestant" -> what it says of itself
    first: list[FirstToken] = field(default_factory=list)
    bandwidth: dict[int, dict[float, float]] = field(default_factory=dict)  # threads -> working set in MB -> GB/s
    models: dict[str, Looped] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {
            "machine": machine(),
            "rounds": self.rounds,
            "models": {
                name: {"config": model.config, "twin": model.twin.shape(), "trained": model.checkpoint is not None}
                for name, model in self.models.items()
            },
            "cells": [cell.summary(self.cells) for cell in self.cells],
            "first_token": [first.summary() for first in self.first],
            "bandwidth_gb_per_s": {
                str(n): {f"{mb:g}": v for mb, v in rows.items()} for n, rows in self.bandwidth.items()
            },
            "contestants": self.facts,
            "llama_cpp": {"version": llama.VERSION, "cmake": llama.CMAKE_ARGS, "amx": self._amx()},
            "notes": self.notes,
        }

    def markdown(self) -> str:
        parts = []
        for name, threads in dict.fromkeys((cell.model, cell.threads) for cell in self.cells):
            cells = [cell for cell in self.cells if (cell.model, cell.threads) == (name, threads)]
            rows = [self._row(cell) for cell in in_order(cells)]
            parts += [f"## {name}, threads: {threads}", self._about(name, threads), table(HEAD, rows)]
        if self.first:
            parts += ["## Time to the first token", first_table(self.first)]
        if self.bandwidth:
            parts += ["## Reading memory, by working set", bandwidth_table(self.bandwidth)]
        here = machine()
        notes = [
            f"{here['processor']}, {here['cores']} cores, {here['system']}; medians of {self.rounds} rounds after a warm-up",
            "x llama.cpp: the median of the ratios within each round, to llama.cpp on what stands below the heading",
            "GB/s of weights: those that decoding multiplied with, from memory or from a cache; each loop counts",
            "peak: resident memory of the contestant's own process, Python included where it runs in Python",
            f"llama-cpp-python {llama.VERSION}; {self._amx()}",
            *self.notes,
        ]
        return plain("\n\n".join(parts) + "\n\n" + "\n".join(f"- {note}" for note in notes))

    def _about(self, name: str, threads: int) -> str:
        said = [self.models[name].twin.about]
        for contestant in CONTESTANTS:
            weights = self.facts.get(f"{name}/{threads}/{contestant}", {}).get("weights")
            if weights and contestant not in TWINS and contestant not in ("eager", "compiled"):
                said.append(
                    f"A token of the looped model reads {weights['loop'] / 1e6:.1f} MB of weights in each loop, "
                    f"{weights['once'] / 1e6:.1f} MB once."
                )
                break
        return " ".join(said)

    def _amx(self) -> str:
        """Of the llama.cpp that ran, which may be one that was given."""
        systems = [str(said["system"]) for said in self.facts.values() if "system" in said]
        return "compiled with AMX" if any("AMX_INT8 = 1" in system for system in systems) else llama.WHY_NO_AMX

    def _row(self, cell: Cell) -> tuple[str, ...]:
        speed, spread, ratio = cell.median, cell.spread, cell.ratio(self.cells)
        return (
            CONTESTANTS[cell.contestant],
            cell.test,
            loops_of(cell, isinstance(self.models[cell.model].twin, Twin)),
            "-" if speed is None else f"{speed:.1f}",
            "-" if spread is None else f"{spread[0]:.1f} to {spread[1]:.1f}",
            "-" if ratio is None else f"{ratio:.2f}",
            "-" if not cell.gb_per_s else f"{median(cell.gb_per_s):.1f}",
            "-" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**20:.0f}",
            "-" if cell.file_bytes is None else f"{cell.file_bytes / 1e6:.1f}",
            "" if cell.failed is None else f"failed: {cell.failed}",
        )


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Test by test; in each the dense twin, then all others at full depth, at a third, and stopping by themselves."""
    tests, names = list(dict.fromkeys(c.test for c in cells)), list(CONTESTANTS)

    def place(cell: Cell) -> tuple[int, bool, int, int]:
        looped = cell.contestant not in TWINS
        depth = 0 if cell.loops is None else cell.loops  # of models that stop by themselves: behind all fixed depths
        return tests.index(cell.test), looped, -depth if looped else 0, names.index(cell.contestant)

    return sorted(cells, key=place)


def loops_of(cell: Cell, twin: bool = True) -> str:
    """`twin`: what stands beside the model is dense."""
    if cell.contestant in TWINS:
        return "no loop" if twin else "all"
    if cell.loops is not None:
        return str(cell.loops)
    return "by itself" if cell.mean_loops is None else f"by itself, {cell.mean_loops:.2f}"


def first_table(rows: Sequence[FirstToken]) -> str:
    base = {(r.model, r.threads, r.cold): median(r.seconds) for r in rows if r.contestant == BASELINE and r.seconds}

    def line(row: FirstToken) -> tuple[str, ...]:
        known = [row.model, str(row.threads), CONTESTANTS[row.contestant], "cold" if row.cold else "warm"]
        if not row.seconds:
            return (*known, "-", "-", "-", f"failed: {row.failed}")
        times, against = sorted(row.seconds), base.get((row.model, row.threads, row.cold))
        ratio = "-" if against is None else f"{median(times) / against:.2f}"
        return (*known, f"{1000 * median(times):.0f}", f"{1000 * times[0]:.0f} to {1000 * times[-1]:.0f}", ratio, "")

    head = ("model", "threads", "contestant", "start", "ms", "fastest to slowest", "x llama.cpp's time", "note")
    return table(head, [line(row) for row in rows])


def bandwidth_table(bandwidth: dict[int, dict[float, float]]) -> str:
    sizes = list(dict.fromkeys(size for rows in bandwidth.values() for size in rows))
    head = ("MB", *(f"GB/s, threads: {n}" for n in bandwidth))
    return table(head, [(f"{mb:g}", *(f"{rows[mb]:.1f}" for rows in bandwidth.values())) for mb in sizes])


def machine() -> dict[str, Any]:
    return {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()}


def processor() -> str:
    """Its name, as far as the system tells."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
