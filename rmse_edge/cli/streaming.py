"""`rmse-bench --stream`: one long text through a runtime, reported by tenths."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from .display import plain, table

if TYPE_CHECKING:
    from rmse_edge.runtimes import Dials, LoopRuntime

MIB = 2**20


def measure(
    runtime: LoopRuntime, ids: np.ndarray, dials: Dials, tokens: int, threads: int | None, notes: list[str]
) -> dict[str, Any]:
    """Stream `tokens` tokens with a progress bar; everything under stable names."""
    from rmse_edge.runtimes.measure.stream import Stream

    stream = Stream(runtime, ids, dials, tokens)
    with tqdm(total=tokens, unit=" tokens", unit_scale=True, disable=None, leave=False, file=sys.stderr) as bar:
        stream.run(bar.update)
    info = runtime.info
    return {
        "model": info.name,
        "runtime": info.target,
        "parameters": info.parameters,
        "package_bytes": info.nbytes or None,
        "threads": threads,
        "dials": vars(dials),
        **stream.summary(),
        "notes": notes,
    }


def as_markdown(d: dict[str, Any]) -> str:
    """A line per tenth, then what stayed flat and what did not."""
    surprised = d["tenths"][0]["mean_surprise"] is not None
    head = ("tokens", "tokens/s", "mean loops", *(["mean surprise"] if surprised else []))

    def row(tenth: dict[str, Any]) -> tuple[str, ...]:
        cells = (f"{tenth['first']:,} to {tenth['end']:,}", f"{tenth['tok_per_s']:.1f}", f"{tenth['mean_loops']:.2f}")
        return (*cells, f"{tenth['mean_surprise']:.4f}") if surprised else cells

    grown, resident = d["rss_growth_bytes"], d["rss_bytes"]
    memory = (
        "unknown" if grown is None else f"{resident / MIB:.1f} MiB at the end, {grown:+,} bytes since the first tenth"
    )
    lines = [
        table(head, [row(tenth) for tenth in d["tenths"]]),
        "",
        f"speed: the last tenth is {d['speed_ratio']:.3f} × as fast as the first (medians over calls of 64 tokens)",
        f"  side by side, {d['paired_calls']} calls in turns at {d['paired_loops']} loops: the state at the end is "
        f"{d['paired_speed_ratio']:.3f} × as fast as the one after the warm-up",
        f"memory: {memory}",
        f"state: {d['state_bytes_early']:,} bytes after 1,000 tokens, {d['state_bytes']:,} bytes at the end, "
        + ("all of it finite" if d["finite"] else "NOT FINITE"),
        f"{d['model']} on {d['runtime']}, {d['stream_tokens']:,} tokens, the first {d['warm_up_tokens']:,} to warm up; "
        f"the text has {d['text_tokens']:,}",
        *(f"note: {note}" for note in d["notes"]),
    ]
    return plain("\n".join(lines))


def as_csv(d: dict[str, Any]) -> str:
    """The tenths."""
    names = [name for name, value in d["tenths"][0].items() if value is not None]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(d["tenths"])
    return out.getvalue().rstrip("\n")


FORMS: dict[str, Callable[[dict[str, Any]], str]] = {"md": as_markdown, "json": json.dumps, "csv": as_csv}
