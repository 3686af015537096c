"""A trace, drawn: tokens from left to right, one panel above the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rmse_edge.errors import quiet

from .plots import check_matplotlib
from .tracing import of_loops

INCHES, NARROWEST, WIDEST = 0.17, 8.0, 26.0  # of a token; of the figure
LABELLED = 170  # tokens that are written below the bars
SIGNS = str.maketrans({"\n": "↵", " ": "␣", "\t": "⇥", "$": r"\$"})  # a dollar would begin a formula


def draw_trace(found: dict[str, Any], pictures: Sequence[Path]) -> None:
    """
    Args:
        found: as `Tracer.document` gives it.
        pictures: the same as PNG or SVG, by its suffix.
    """
    matplotlib = check_matplotlib()
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rmse-trace"  # the same trace gives the same file
    from matplotlib import pyplot as plt

    panels = _panels(found)
    width = min(WIDEST, max(NARROWEST, INCHES * len(found["trace"]) + 1.5))
    heights = [height for height, _, _ in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(width, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, (_, title, paint) in zip(axes[:, 0], panels):
        paint(axis)
        axis.set_title(title, fontsize=10, loc="left")
    with quiet():  # a font that lacks a character of the text draws a box, and warns
        for picture in pictures:
            same = {"metadata": {"Date": None}} if picture.suffix == ".svg" else {"dpi": 110}
            figure.savefig(picture, **same)
    plt.close(figure)


def _panels(found: dict[str, Any]) -> list[tuple[float, str, Callable[[Any], None]]]:
    """(inches, title, what paints it) of each."""
    mean = f"{found['mean_loops']:.2f} of {found['loops']} on average"
    panels: list[tuple[float, str, Callable[[Any], None]]] = [
        (2.6, f"loops of each token, {mean}", partial(_depths, found=found))
    ]
    if found["trace"][0]["iterations"]:
        for name, title in (
            ("entropy", "entropy of the prediction after each loop, nats; the line is where the token stopped"),
            ("change", "change of the state in each loop, relative to its length, powers of ten"),
        ):
            values = of_loops(found, name)
            values = np.log10(np.maximum(values, 1e-6)) if name == "change" else values
            panels.append((2.4, title, partial(_by_token, values=values, found=found)))
    for i, layer in enumerate(found["experts"]):
        which = f" of layer {i + 1} of {len(found['experts'])}" if len(found["experts"]) > 1 else ""
        title = f"experts{which}: share of the tokens that use each, the most used first"
        panels.append((2.2, title, partial(_experts, counts=np.array(layer), tokens=len(found["trace"]))))
    if found["surprises"]:
        panels.append((2.2, "surprise of the memory at the end of each segment", partial(_surprises, found=found)))
    return panels


def _depths(axis: Any, found: dict[str, Any]) -> None:
    from matplotlib import colormaps

    depth = np.array([row["depth"] for row in found["trace"]])
    axis.bar(range(len(depth)), depth, width=0.9, color=colormaps["viridis"](depth / found["loops"]))
    axis.set_ylim(0, found["loops"] + 0.5)
    axis.set_xlim(-0.6, len(depth) - 0.4)
    axis.set_ylabel("loops")
    if found["prompt_tokens"] < len(depth):
        axis.axvline(found["prompt_tokens"] - 0.5, color="grey", lw=0.8, ls=":")
        axis.text(found["prompt_tokens"] - 0.3, found["loops"], "written from here", fontsize=7, color="grey", va="top")
    if len(depth) <= LABELLED:
        words = [row["token"].translate(SIGNS) for row in found["trace"]]
        upright = max(map(len, words)) > 2
        axis.set_xticks(range(len(depth)), words, fontsize=7, family="monospace", rotation=90 if upright else 0)


def _by_token(axis: Any, values: np.ndarray, found: dict[str, Any]) -> None:
    loops, count = values.shape
    image = axis.imshow(values, extent=(-0.5, count - 0.5, loops + 0.5, 0.5), aspect="auto", interpolation="nearest")
    axis.figure.colorbar(image, ax=axis, pad=0.01)
    depth = [row["depth"] for row in found["trace"]]
    axis.step(range(count), depth, where="mid", color="white", lw=1.4)
    axis.step(range(count), depth, where="mid", color="crimson", lw=0.8)
    axis.set_xlim(-0.6, count - 0.4)
    axis.set_ylabel("loop")


def _experts(axis: Any, counts: np.ndarray, tokens: int) -> None:
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    order = np.argsort(-counts.sum(0), kind="stable")
    loops, experts = counts.shape
    image = axis.imshow(
        counts[:, order] / tokens, extent=(0.5, experts + 0.5, loops + 0.5, 0.5), aspect="auto", interpolation="nearest",
        cmap="magma", norm=PowerNorm(0.5),
    )  # fmt: skip
    axis.figure.colorbar(image, ax=axis, pad=0.01)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("loop")
    axis.set_xlabel("expert")


def _surprises(axis: Any, found: dict[str, Any]) -> None:
    rows = found["surprises"]
    at = [row["position"] - 1 for row in rows]  # the last token of the segment
    axis.plot(at, [row["value"] for row in rows], "o-", ms=4, label="surprise")
    axis.plot(at, [row["mean"] for row in rows], ".-", color="grey", lw=0.8, label="mean of the segments before")
    if found["gamma"] is not None:
        limit = [row["mean"] + found["gamma"] * row["std"] for row in rows]
        axis.plot(at, limit, color="grey", lw=0.8, ls="--", label="looked up above")
    for i, looked in enumerate(found["consultations"]):
        axis.axvline(looked["position"] - 1, color="C1", lw=1, label=None if i else "looked up")
    axis.set_xlim(-0.6, len(found["trace"]) - 0.4)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("token")
    axis.legend(fontsize=7)
