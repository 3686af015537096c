"""The parity gate of a model that writes by blocks: the same tokens, each filled in by the same denoising step.

The reference reads the text and the block as one sequence at every step: no cache, no calls, no commit. A block is compared
behind the reference's own text, so that one difference does not become many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmse_edge.errors import ParityError
from rmse_edge.export.program import LoopProgram
from rmse_edge.info import ModelInfo
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.unmask import fills, guess, mean_lead, ranks, without_mask
from rmse_edge.runtimes.host.blocks import BlockRuntime

from .methods import compare_methods

BLOCKS = 2  # written behind each prompt
TOLERANCE = {True: 1e-4, False: 5e-2}  # of logits, relative; by rule: exact, rounded
METHOD_TOLERANCE = {True: 1e-4, False: 1e-2}
SAME_TOKENS, SAME_DEPTH = 0.98, 0.97  # by the rounded rule, shares
# A decision (which token, which position, whether a rule is met) that is no farther from another one, in nats or logits, may be
# taken otherwise by another engine.
UNDECIDED = {True: 1e-3, False: 5e-2}
LONGEST = 512  # tokens of the longest prompt: it makes the state grow


@dataclass(frozen=True)
class Reference:
    """A block as the model writes it without a runtime."""

    tokens: np.ndarray  # (n,) int64, those that were to be filled in
    depth: np.ndarray  # (n,) int64
    logits: np.ndarray  # (n, V) float32, by which each was filled in
    margin: float  # of its closest decision
    sure: np.ndarray  # (steps, n) log-probabilities, of what was masked; NaN elsewhere
    leads: np.ndarray  # (steps,) mean lead of what was masked


@torch.no_grad()
def written(model: Any, text: list[int], dials: Dials) -> Reference:
    """The block behind `text`, or the rest of the one that it has begun."""
    c, scalars = model.config, {name: torch.from_numpy(value) for name, value in dials.arrays().items()}
    size = c.block_size
    known = len(text) % size
    sequence = torch.tensor([[*text, *[c.mask_token_id] * (size - known)]])
    depth, margin = torch.zeros(size, dtype=torch.int64), np.inf
    logits, sure, leads = torch.zeros(size, c.vocab_size), [], []
    k = 0
    while (masked := sequence[:, -size:] == c.mask_token_id).any():
        found_logits = model.logits_of(sequence)[:, -size:]
        found, step = guess(without_mask(found_logits, c.mask_token_id)), torch.tensor(k)
        filled = fills(found, masked, step, scalars)
        margin = min(margin, _margin(found.probability, found.lead, masked, filled, k, dials))
        sure.append(torch.where(masked, found.probability.log(), torch.nan)[0].numpy())
        leads.append(float(mean_lead(found.lead, masked)))
        depth += masked[0]
        logits[filled[0]] = found_logits[filled]
        sequence[:, -size:] = torch.where(filled, found.tokens, sequence[:, -size:])
        k += 1
    rows = slice(known, size)
    tokens = sequence[0, -size:][rows].numpy()
    return Reference(
        tokens, depth[rows].numpy(), logits[rows].numpy(), margin, np.stack(sure)[:, rows], np.array(leads)
    )


def _margin(probability: Tensor, lead: Tensor, masked: Tensor, filled: Tensor, k: int, dials: Dials) -> float:
    """How far a step is from another decision, in nats or logits."""
    sure, found = probability.log()[0], []
    chosen, rest = filled[0], masked[0] & ~filled[0]
    found.append(float(lead[0][chosen].min()))
    order = ranks(probability, masked)[0]
    least = -(-int(masked.sum()) // (dials.max_loops - k))  # that are filled in by their rank alone
    evenly = masked[0] & (order < least)
    if bool(rest.any()):
        found.append(float(sure[evenly].min() - sure[rest].max()))
    if k + 1 >= dials.min_loops and dials.exit_threshold < 1:
        others = sure[masked[0] & ~evenly]
        if len(others):
            found.append(float((others - np.log(dials.exit_threshold)).abs().min()))
    if k + 1 >= dials.min_loops and dials.exit_gap > 0:
        percent = 100 * (k + 1) / dials.max_loops
        found.append(abs(float(mean_lead(lead, masked)) - dials.exit_gap * (1 + (percent < 67) + (percent < 33))))
    return min(found)


def settings_of(info: ModelInfo, references: list[Reference]) -> dict[str, Dials]:
    """One token a step, half the steps, and both exit rules where they fill in about half of a block sooner.

    Args:
        references: of the first setting.
    """
    full = info.full_depth
    settings = {"full depth": full}
    if info.max_loops > 1:
        settings["half the steps"] = dataclasses.replace(full, max_loops=(info.max_loops + 1) // 2)
    sure = np.concatenate([r.sure.ravel() for r in references])
    threshold = float(np.exp(np.nanquantile(sure, 0.75)))
    settings["confidence"] = dataclasses.replace(full, exit_threshold=min(max(threshold, 1e-6), 0.999))
    middle = [float(r.leads[len(r.leads) // 2]) for r in references]
    settings["gap"] = dataclasses.replace(full, exit_gap=max(1e-6, float(np.median(middle)) / 2))
    return settings


def prompts(tokens: np.ndarray, room: int, size: int) -> Iterator[list[int]]:
    """Texts to go on from: shorter than a block, some blocks with and without a rest, and one that is long."""
    longest = max(0, min(LONGEST, room - (BLOCKS + 1) * size))
    for count in sorted({min(n, longest) for n in (1, size // 2, 2 * size, 3 * size + 1, longest)}):
        yield tokens[:count].tolist()


def block_gate(
    program: LoopProgram,
    model: Any,
    candidate: BlockRuntime,
    tokens: np.ndarray,
    exact: bool,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The whole gate. Returns the report that goes into the manifest.

    Args:
        model: with identically rounded weights. It says by `logits_of(tokens (1, T))` what it makes of whole sequences.
        tokens: (n,) of a text, none of them the mask.
        exact: float32: the same tokens and steps, logits within 1e-4; otherwise shares of them.
    Raises:
        ParityError: the package must not ship.
    """
    info = candidate.info
    size, mask = candidate.blocks.size, candidate.blocks.mask_token_id
    texts = list(prompts(tokens[tokens != mask], candidate.room, size))
    progress("parity at full depth")
    references = {"full depth": [list(_behind(model, text, info.full_depth)) for text in texts]}
    settings = settings_of(info, [r for found in references["full depth"] for _, r in found])
    report: dict[str, Any] = {"rule": "exact" if exact else "rounded", "settings": {}}
    for name, dials in settings.items():
        if name not in references:
            progress(f"parity at {name}")
            references[name] = [list(_behind(model, text, dials)) for text in texts]
        differences, same, depths, steps, undecided = [0.0], [], [], [], 0
        for text, expected in (found for each in references[name] for found in each):
            candidate.reset()
            candidate.read(text)
            got = candidate.write(dials)
            steps.append(len(expected.leads))
            if expected.margin < UNDECIDED[exact]:
                undecided += 1
                continue
            same.append(float((got.tokens == expected.tokens).mean()))
            depths.append(float((got.depth == expected.depth).mean()))
            if np.array_equal(got.tokens, expected.tokens) and np.array_equal(got.depth, expected.depth):
                difference = np.abs(got.logits - expected.logits).max() / max(1.0, np.abs(expected.logits).max())
                differences.append(float(difference))
        if not same:
            raise ParityError(
                f"parity failed at {name}: nothing could be compared, since each of {len(steps)} blocks hangs on a decision closer "
                f"than {UNDECIDED[exact]:g}; train the model further, or choose {'another text' if exact else 'fp32'}"
            )
        summary = {
            "blocks": len(steps),
            "max_logit_difference": max(differences),
            "same_tokens": float(np.mean(same)),
            "same_depth": float(np.mean(depths)),
            "undecided": undecided,
            "mean_steps": float(np.mean(steps)),
        }
        report["settings"][name] = {"dials": vars(dials), **summary}
        least = (1.0, 1.0) if exact else (SAME_TOKENS, SAME_DEPTH)
        close = summary["max_logit_difference"] <= TOLERANCE[exact]
        if not close or summary["same_tokens"] < least[0] or summary["same_depth"] < least[1]:
            raise ParityError(
                f"parity failed at {name}: logits differ by {summary['max_logit_difference']:.1e} relative, "
                f"{summary['same_tokens']:.1%} of the tokens and {summary['same_depth']:.1%} of their steps are the same"
            )
    progress("parity of each method")
    program = dataclasses.replace(program, model=model)
    report["methods"] = compare_methods(
        program, candidate.calls.methods, vars(info.full_depth), METHOD_TOLERANCE[exact]
    )
    return report


def _behind(model: Any, text: list[int], dials: Dials) -> Iterator[tuple[list[int], Reference]]:
    """The blocks behind a text, each with the text that it stands behind."""
    for _ in range(BLOCKS):
        found = written(model, text, dials)
        yield text, found
        text = [*text, *found.tokens.tolist()]
