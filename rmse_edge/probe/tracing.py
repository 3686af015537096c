"""What a model did with one text, token by token: the loops each took at a setting of the dial, the memory's surprise and what was
looked up, and of a checkpoint what every loop said, all of them run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmse_edge.errors import ArgumentError
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes import LoopRuntime, Surprise
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.text.librarian import Librarian
from rmse_edge.runtimes.text.sampling import Sampler, Sampling
from rmse_edge.runtimes.text.writer import Writer
from rmse_edge.text import Tokenizer

from .page import COLOURS, html_table, write_sections
from .readings import read
from .subjects import Looped
from .trace import traced

DEPTH = {"depth": "loops it took"}


class Tracer:
    """Follows a runtime from an empty past; give it one text, by `read` or `write`, then ask for its `document`."""

    def __init__(
        self, runtime: LoopRuntime, tokenizer: Tokenizer, dials: Dials, librarian: Librarian | None = None
    ) -> None:
        self.runtime, self.tokenizer, self.dials, self.librarian = runtime, tokenizer, dials, librarian
        self.surprises: list[Surprise] = []
        self.ids: list[int] = []
        self.depth: list[int] = []  # of every token but the last
        self.prompt = 0  # tokens that were given
        heard = runtime.on_surprise

        def hear(surprise: Surprise) -> None:
            self.surprises.append(surprise)
            if heard is not None:
                heard(surprise)

        runtime.on_surprise = hear

    def read(self, ids: Sequence[int]) -> None:
        """A text that is there, of at least two tokens; the last is only what should follow."""
        if len(ids) < 2:
            raise ArgumentError("text", f"has {len(ids)} tokens, expected at least 2")
        self.ids, self.prompt = list(ids), len(ids)
        self.depth = self.runtime.feed(self.ids[:-1], self.dials, logits="last").depth.tolist()

    def write(self, prompt: Sequence[int], sampling: Sampling, count: int) -> None:
        """A prompt and what the model writes behind it, `count` tokens or up to its end token."""
        writer = Writer(self.runtime, self.tokenizer, self.dials, Sampler(sampling), count, librarian=self.librarian)
        generation = writer.generate(prompt)
        for _ in generation.steps():
            pass
        self.ids, self.prompt = [*prompt, *generation.tokens], len(prompt)
        self.depth = [*generation.prompt_depth, *generation.depth[1:]]

    def document(self) -> dict[str, Any]:
        """JSON: `trace`, a row for every token but the last (`trace.traced`, and its depth); `experts`, of each layer of experts in
        the loop how many tokens chose each, (K, E); `surprises` and `consultations`. Packages say nothing of single loops: their
        rows have no iterations.
        """
        info = self.runtime.info
        rows: list[dict[str, Any]]
        experts: list[list[list[int]]] = []
        if isinstance(self.runtime, TorchRuntime):
            subject = Looped(self.runtime.model.cpu())
            ids = np.array(self.ids, np.int64)
            readings = read(subject, ids[None])
            rows = traced(subject, self.tokenizer, ids, readings)
            experts = [counts.tolist() for counts in readings.used]
        else:
            words = [self.tokenizer.decode([i]) for i in self.ids]
            rows = [{"token": a, "next": b, "iterations": []} for a, b in itertools.pairwise(words)]
        return {
            "model": info.name,
            "runtime": info.target,
            "unit": "loop",
            "loops": info.trained_loops,
            "dials": vars(self.dials),
            "prompt_tokens": self.prompt,
            "mean_loops": float(np.mean(self.depth)),
            "trace": [row | {"depth": int(depth)} for row, depth in zip(rows, self.depth)],
            "experts": experts,
            "surprises": [vars(surprise) for surprise in self.surprises],
            "gamma": None if self.librarian is None else self.librarian.gamma,
            "consultations": [] if self.librarian is None else [c.to_json() for c in self.librarian.consultations],
        }


def write_trace_page(found: dict[str, Any], picture: Path, page: Path) -> None:
    """
    Args:
        found: as `Tracer.document` gives it.
        picture: the PNG of it, which goes into the page.
    """
    tables = {"Loops": html_table(*by_loop(found))}
    if found["surprises"]:
        rows = [tuple(f"{s[k]:.3f}" for k in ("value", "mean", "std")) for s in found["surprises"]]
        cells = [(str(s["position"]), *row) for s, row in zip(found["surprises"], rows)]
        tables["Surprise of the memory"] = html_table(("behind token", "surprise", "mean before", "deviation"), cells)
    if found["consultations"]:
        looked = [
            (str(c["position"]), f"{hit['score']:.3f}", hit["source"], hit["text"])
            for c in found["consultations"]
            for hit in c["hits"]
        ]
        tables["Looked up"] = html_table(("behind token", "cosine", "source", "passage"), looked)
    title = f"{found['model']}: {len(found['trace'])} tokens, {found['mean_loops']:.2f} of {found['loops']} loops"
    colours = DEPTH | (COLOURS if found["trace"][0]["iterations"] else {})
    write_sections(page, title, tables, picture, found, colours)


def by_loop(found: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A table by loop: its head and its rows."""
    depth = np.array([row["depth"] for row in found["trace"]])
    head: tuple[str, ...] = ("loop", "tokens that stop here")
    rows: list[tuple[str, ...]] = [(str(k), str(int((depth == k).sum()))) for k in range(1, found["loops"] + 1)]
    if found["trace"][0]["iterations"]:
        head += ("entropy", "loss", "change")
        values = {name: of_loops(found, name) for name in ("entropy", "loss", "change")}
        rows = [
            (*row, *("" if np.isnan(v[k]).all() else f"{np.nanmean(v[k]):.3f}" for v in values.values()))
            for k, row in enumerate(rows)
        ]
    if found["experts"]:
        head += ("experts in use",)
        used = [sum(int((np.array(layer[k]) > 0).sum()) for layer in found["experts"]) for k in range(len(rows))]
        rows = [(*row, str(count)) for row, count in zip(rows, used)]
    return head, rows


def of_loops(found: dict[str, Any], name: str) -> np.ndarray:
    """A figure of every token in every loop, (K, T); NaN where there is none."""
    rows = [[np.nan if of[name] is None else of[name] for of in row["iterations"]] for row in found["trace"]]
    return np.array(rows, np.float64).T
