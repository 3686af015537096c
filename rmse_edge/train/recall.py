"""Multi-query associative recall: pairs in the first segment, asked for segments later (Arora et al. 2023, Zoology).

    k1 v1 k2 v2 ... noise | noise k7 noise k2 noise ... | ... | ... k4 noise ...
    fresh pairs             queries: the model is to say the value of the key it has just read

A query is one key token and is not answered in the text, so every segment may ask for every pair. Pairs are drawn anew
for every sequence: nothing can be learned by heart, only to remember. With the pairs further back than max_loops
windows, out of reach of attention however often it is stacked, only a memory can answer.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.errors import ConfigError
from rmse_edge.files import new_file
from rmse_edge.numbers import SEGMENT
from rmse_edge.schema import check_fields

from .sources import IGNORED, Batch, Part, Plural, Seed, Sized, check_memory, require

DISTANCES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Recall:
    """Tokens: keys, then values, then noise."""

    pairs: Sized = 16
    keys: Sized = 64
    values: Sized = 64
    noise: Sized = 64
    segments: Plural = 8  # of a training sequence at most, the one with the pairs included; drawn from 2 on
    short: Part = 0.6  # share of batches with two segments: what is asked for soon is learned first

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        require(self, "pairs", self.pairs <= min(self.keys, SEGMENT // 2), f"at most keys and {SEGMENT // 2}")

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + self.noise

    def check_model(self, config: Any) -> None:
        check_memory("recall", self.vocab_size, config)

    @property
    def fingerprint(self) -> str:
        return json.dumps({"task": "recall"} | dataclasses.asdict(self))

    def batch(self, count: int, seed: Seed) -> Batch:
        draw = np.random.default_rng(seed)
        segments = 2 if draw.random() < self.short else int(draw.integers(2, self.segments + 1))
        return self.draw(draw, count, segments)

    def validation(self, count: int) -> Batch:
        """Queries in the last segment of the longest training sequences only."""
        return self.draw(np.random.default_rng(2**31), count, self.segments, last_only=True)

    def draw(self, draw: np.random.Generator, count: int, segments: int, last_only: bool = False) -> Batch:
        """`count` sequences of `segments` segments.

        Args:
            last_only: queries in the last segment alone, `segments` - 1 segments after the pairs.
        """
        length = segments * SEGMENT
        tokens = draw.integers(self.keys + self.values, self.vocab_size, (count, length))
        targets = np.full((count, length), IGNORED)
        for row, asked in zip(tokens, targets):
            keys = draw.permutation(self.keys)[: self.pairs]
            values = self.keys + draw.integers(0, self.values, self.pairs)
            row[0 : 2 * self.pairs : 2], row[1 : 2 * self.pairs : 2] = keys, values
            for segment in range(segments - 1 if last_only else 1, segments):
                order = draw.permutation(self.pairs)
                places = segment * SEGMENT + np.sort(draw.permutation(SEGMENT)[: self.pairs])
                row[places], asked[places] = keys[order], values[order]
        return {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}

    def vocabulary(self) -> list[str]:
        kinds = (("key", self.keys), ("value", self.values), ("noise", self.noise))
        return [f"{kind}{i}" for kind, size in kinds for i in range(size)]

    def calibration(self) -> Tensor:
        return self.draw(np.random.default_rng(2**31 + 1), 16, self.segments)["tokens"]

    @torch.no_grad()
    def evaluate(self, model: RMSE, count: int = 64, distances: tuple[int, ...] = DISTANCES) -> dict[str, Any]:
        """Share of queries whose likeliest token is the value, by distance, with the memory written and left blank.

        Args:
            count: sequences per distance, `pairs` queries each.
            distances: segments of 64 positions between the pairs and the queries.
        """
        model.eval()
        result: dict[str, Any] = {"distance": list(distances), "memory": [], "blank": []}
        for distance in tqdm(distances, desc="recall", unit="distance", disable=None, leave=False):
            batch = self.draw(np.random.default_rng((2**31, distance)), count, distance + 1, last_only=True)
            for name, remember in (("memory", True), ("blank", False)):
                right = 0
                for tokens, targets in zip(batch["tokens"].split(8), batch["targets"].split(8)):
                    asked = targets != IGNORED
                    states, _, _ = model.trajectory(tokens, remember=remember)
                    right += int((model.head_proj(states[-1][asked]).argmax(-1) == targets[asked]).sum())
                result[name].append(right / (count * self.pairs))
        beyond = model.config.max_loops + 4
        far = [i for i, d in enumerate(distances) if d * SEGMENT >= beyond * model.config.window]
        return result | {
            "queries": count * self.pairs,
            "chance": 1 / self.values,
            "beyond_windows": beyond,  # what attention cannot reach, however often it is stacked
            "beyond": {
                name: float(np.mean([result[name][i] for i in far])) if far else None for name in ("memory", "blank")
            },
        }

    def draw_plot(self, result: dict[str, Any], picture: Path, window: int) -> None:
        """Recall against distance."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axis = plt.subplots(figsize=(7, 4))
        axis.plot(result["distance"], result["memory"], "o-", label="memory written")
        axis.plot(result["distance"], result["blank"], "s--", label="memory left blank")
        axis.axhline(result["chance"], color="grey", lw=0.8, ls=":", label="chance")
        reach = result["beyond_windows"] * window / SEGMENT
        if reach < max(result["distance"]):
            axis.axvspan(
                reach, max(result["distance"]), color="tab:green", alpha=0.06, label="out of reach of attention"
            )
        axis.axvline(self.segments - 1, color="grey", lw=0.8, ls="--", label="longest in training")
        axis.set_xscale("log", base=2)
        axis.set_xticks(result["distance"], [str(d) for d in result["distance"]])
        axis.set_xlabel("segments of 64 positions between pairs and queries")
        axis.set_ylabel("recall")
        axis.set_ylim(-0.02, 1.04)
        axis.legend(fontsize=8, loc="center left")
        figure.tight_layout()
        with new_file(picture) as part:
            figure.savefig(part, dpi=110)
        plt.close(figure)
