"""`rmse-bench --profile`: the time of every operator, in prefill and in decoding: of ExecuTorch packages, and on a GPU."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from rmse_edge.errors import UserError

from .display import table

if TYPE_CHECKING:
    from rmse_edge.runtimes import Dials, LoopRuntime

SHOWN = 20  # operators of each table; the rest is one line


def measure(runtime: LoopRuntime, ids: np.ndarray, dials: Dials, threads: int | None) -> dict[str, Any]:
    """Everything under stable names.

    Raises:
        UserError: the runtime keeps no times of operators.
    """
    from rmse_edge.runtimes.measure.profile import profile, profile_torch

    if runtime.info.target == "cuda":
        rows = profile_torch(runtime, ids, dials)
    else:
        rows = profile(runtime.package, ids, dials, threads)  # type: ignore[attr-defined]
    info = runtime.info
    return {
        "model": info.name,
        "runtime": info.target,
        "quant": info.quant,
        "threads": threads,
        "dials": vars(dials),
        "operators": [row.to_json() for row in rows],
    }


def check(runtime: LoopRuntime) -> None:
    """
    Raises:
        UserError: the runtime keeps no times of operators.
    """
    if runtime.info.target not in ("executorch", "cuda"):
        raise UserError(
            f"--profile: {runtime.info.target} keeps no times of operators; give a package of --target executorch, or a "
            "checkpoint with --runtime cuda"
        )


def as_markdown(d: dict[str, Any]) -> str:
    from rmse_edge.runtimes.measure.profile import BETWEEN  # no operator, so no time of one

    parts = []
    for test in dict.fromkeys(row["test"] for row in d["operators"]):
        rows = [row for row in d["operators"] if row["test"] == test]
        cells = [
            (
                r["operator"],
                f"{r['calls']:,}",
                "" if r["operator"] == BETWEEN else f"{1000 * r['ms'] / r['calls']:.1f}",
                f"{r['share']:.1%}",
            )
            for r in rows[:SHOWN]
        ]
        left = rows[SHOWN:]
        if left:
            cells.append(
                (
                    f"{len(left)} others",
                    f"{sum(r['calls'] for r in left):,}",
                    "",
                    f"{sum(r['share'] for r in left):.1%}",
                )
            )
        tokens = int(test[2:])
        ms = sum(r["ms"] for r in rows)
        parts.append(f"{test}: {ms / tokens:.3f} ms a token inside the runtime, measuring included")
        parts.append(table(("operator", "calls", "µs a call", "share"), cells))
    parts.append(f"{d['model']} on {d['runtime']}, {d['quant']}")
    return "\n\n".join(parts)


def as_csv(d: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["test", "operator", "calls", "ms", "share"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(d["operators"])
    return out.getvalue().rstrip("\n")


FORMS: dict[str, Callable[[dict[str, Any]], str]] = {"md": as_markdown, "json": json.dumps, "csv": as_csv}
