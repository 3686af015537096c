"""Everything that is measured of one model, as one document."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmse_edge.errors import TextError
from rmse_edge.progress import Report, Work, silent
from rmse_edge.text import Tokenizer, consecutive_blocks, read_text, split, spread

from . import EPSILON, difficulty, diversity, exits, labels, linear, solving, trace
from .measures import Verdict, by_iteration, settled_at, settling, verdicts
from .readings import Readings, read
from .subjects import Layered, Subject, open_subject

TRACED = 160  # tokens
EXCHANGED = 1  # blocks on which codes are exchanged


@dataclass(frozen=True)
class Settings:
    """What is measured, and on how much."""

    blocks: int = 32  # of the text's last tenth, spread evenly
    epsilon: float = EPSILON
    tasks: Sequence[str] = ()  # of problems.PROBLEMS
    problems: int = 400  # of each
    probes: bool = True
    seed: int = 0


def measure(
    folder: Path, text_file: Path, settings: Settings, judge: Path | None = None, progress: Report = silent
) -> dict[str, Any]:
    """Probe a checkpoint on the last tenth of a text, which it was not trained on if the text is its own.

    Args:
        judge: a checkpoint that says how hard a token is; None: n-grams of the other nine tenths.
    Raises:
        UserError: the model, its tokenizer or the text cannot be used.
    """
    subject, tokenizer = open_subject(folder)
    ids, ends, text, first = _held_out(tokenizer, text_file)
    held = ids[first:]
    blocks, places = _spread(held, subject.length, settings.blocks)
    start = int(ends[first - 1])  # characters: who speaks in the last tenth may not have spoken before
    classes = labels.of_characters(text[start:]) if settings.probes else {}
    tables = diversity.codes(subject.model)
    loops = len(subject.course(torch.from_numpy(blocks[:1, :2]))[0])
    work = Work(
        {
            "reading": float(len(blocks)),
            "judging": 4.0,
            "exchanging codes": float(len(tables[0]) ** 2 * min(EXCHANGED, len(blocks))) / 2 if tables else 0.0,
            "probes": float(len(classes) * loops),
            **{f"solving {task}": settings.problems / 20 for task in settings.tasks},
            "tracing": 1.0,
        },
        progress,
    )
    states: list[np.ndarray] = []
    readings = read(subject, blocks, work.start("reading", len(blocks)), states if classes else None)
    settled = settled_at(readings.change, settings.epsilon)
    found: dict[str, Any] = {
        "model": str(folder),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "unit": "layer" if isinstance(subject, Layered) else "loop",
        "text": str(text_file),
        "tokens": int(readings.targets.size),
        "settings": dataclasses.asdict(settings) | {"tasks": list(settings.tasks)},
        "by_iteration": by_iteration(readings, settings.epsilon),
        "settled": settling(readings, settings.epsilon),
        "experts": None if readings.overlap is None else {"overlap": readings.overlap.tolist()},
    }
    found["exits"] = exits.frontiers(readings)
    claims = verdicts(readings)
    work.start("judging", 1)
    found["difficulty"] = _judged(subject, tokenizer, judge, ids[:first], readings, settled, settings.seed)
    claims.append(_harder_later(found["difficulty"]))
    note = work.start("exchanging codes", len(tables[0]) ** 2 if tables else 1)
    found["codes"] = diversity.exchanged(subject, blocks[:EXCHANGED], lambda: note(1))
    note = work.start("probes", len(classes) * loops)
    found["probes"] = {}
    for name, of_characters in classes.items():
        of_tokens = labels.of_tokens(of_characters, ends[first:] - start)
        of_blocks = np.stack([of_tokens[at : at + subject.length] for at in places])
        if (row := linear.probed(states, readings.tokens, of_blocks, settings.seed, lambda: note(1))) is not None:
            found["probes"][name] = row
            claims.append(_probe_improves(name, row))
    found["tasks"] = {}
    for task in settings.tasks:
        tell = work.start(f"solving {task}", settings.problems)
        found["tasks"][task] = solving.solved(
            subject, tokenizer, task, settings.problems, settings.epsilon, settings.seed, tell
        )
        claims.append(_task_later(task, found["tasks"][task]))
    work.start("tracing", 1)
    found["trace"] = trace.traced(subject, tokenizer, blocks[0][: TRACED + 1])
    found["verdicts"] = [dataclasses.asdict(claim) for claim in claims]
    return found


def _held_out(tokenizer: Tokenizer, file: Path) -> tuple[np.ndarray, np.ndarray, str, int]:
    """Ids of a text and where each ends in it, the text, and the first id of its last tenth."""
    text = read_text(file)
    ids, ends = tokenizer.spans(text)
    return ids, ends, text, len(split(ids, "train"))


def _spread(held: np.ndarray, length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks (n, length + 1) of the held-out ids, spread evenly, and where each begins there."""
    if len(held) < 3:
        raise TextError(f"the text's last tenth has {len(held)} tokens; too few to probe a model on")
    length = min(length, len(held) - 1)
    every = consecutive_blocks(held, length)
    picks = spread(len(every), count)
    return every[picks], picks * length


def _judged(
    subject: Subject,
    tokenizer: Tokenizer,
    judge: Path | None,
    learnt: np.ndarray,
    readings: Readings,
    settled: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    vocabulary = subject.vocab_size
    if judge is None:
        losses = difficulty.NGrams(learnt, vocabulary).losses(readings.tokens, readings.targets)
        name = "n-grams"
    else:
        other, its = open_subject(judge)
        if not its.same(tokenizer):
            raise TextError(f"{judge}: has another tokenizer; a judge reads the same tokens as the model")
        whole = np.concatenate([readings.tokens, readings.targets[:, -1:]], 1)
        losses, name = read(other, whole).loss[-1], str(judge)
    rare = difficulty.rarity(learnt, readings.targets, vocabulary)
    return {"judge": name, "loss": float(losses.mean())} | difficulty.correlation(settled, losses, rare, seed)


def _harder_later(found: dict[str, Any]) -> Verdict:
    claim = "harder tokens settle later"
    low, high = found["given_rarity_interval"] or (-1.0, 1.0)
    verdict = "kept" if low > 0 else "refuted" if high < 0 else "unclear"
    return Verdict(
        claim,
        verdict,
        f"Spearman {found['spearman']:.3f}, {found['given_rarity']:.3f} given rarity (95 %: {low:.3f} to {high:.3f}); "
        f"judge: {found['judge']}",
    )


def _probe_improves(name: str, row: dict[str, Any]) -> Verdict:
    gain, error = row["gain"], row["gain_error"] or 0.0
    verdict = "kept" if gain > 2 * error else "refuted" if gain < -2 * error else "unclear"
    return Verdict(
        f"later iterations say more about: {name}",
        verdict,
        f"{row['by_iteration'][0]:.1%} after the first, {row['by_iteration'][-1]:.1%} after the last, gain {gain:+.1%} ± "
        f"{error:.1%}; token alone {row['token']:.1%}, shuffled {row['shuffled']:.1%}",
    )


def _task_later(task: str, row: dict[str, Any]) -> Verdict:
    n = sum(row["problems"])
    error = 1 / (n - 3) ** 0.5
    rho = row["spearman"]
    verdict = "kept" if rho > 2 * error else "refuted" if rho < -2 * error else "unclear"
    return Verdict(f"harder problems settle later: {task}", verdict, f"Spearman {rho:.3f} ± {error:.3f}, {n} problems")
