"""The parity gate: an export fails unless the package says what the PyTorch model says.

A package is run through its real runtime, teacher-forced, and held against the PyTorch model with identically rounded
weights over the whole text at once, at full depth and at adaptive settings, one for every exit rule that the model has.
The reference (reference.py) has no host, no cache and no calls, so what a runtime does with keys, positions, segments and
hits between the engine's calls is compared like everything else. Two rules:

- exact (fp32): logits within 1e-4 and equal depth at every position, except from a position on where the reference
  itself is undecided: the margin between its 10th and 11th expert, or of the exit rule, is below 1e-4. There the
  comparison restarts from an empty state; such positions are listed and may be 1 % at most. Where the reference's own
  logits move by more than a quarter of 1e-4 when its norms are rounded once more (large logits, many layers), four times
  as far is allowed; the report then says so.
- rounded (fp16, quantised, float16 KV): at least 98 % same top token, 97 % same depth, mean depth within 2 %, KL at most 5e-3.
  (With 10 of 512 experts, a perturbation of 5e-4 flips 6 % of routings: exact equality is no meaningful bar there.)
  These are shares, so more positions are compared: 2,000, or what a target's runtime has time for. Where the target can
  also compute with float activations (ONNX), a package that rounds them to int8 is also held to the exact rule without
  that, on the same integers: what remains is the operators' own rounding. Otherwise the lowering looks codes and scales
  up in the file. Shares would forgive small faults of the host, so unless some package of the export is held to the exact
  rule, the host is, run on PyTorch's own methods (`compare_host`).

A model whose texts may have a prefix is compared with one, too, at full depth. One whose texts have a plan is compared with every
layer run once, with the plan that its routers make of the first tokens, and with every layer run twice, which fills all slots.

The tokens are fed as in a conversation: prompts, single tokens, another prompt; in between, what is kept is taken out and
put back, as a session is. Every method is also compared by itself, and the loop driven by the host through `step` must
match `loop`: by the largest difference, or, where the package rounds activations to int8, by the root of the mean
square, at fixed depths.

A model with a neural memory is held to the same rule by its surprise at every segment's end, and its memory is compared
over 32 segments, write by write and each side carrying its own: 1e-4 relative (exact), 1e-2 (rounded). No host takes part
in that: when it writes, and what, shows in the surprise. A model with a retrieval head embeds a passage, by the exact rule.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from rmse_edge.errors import ParityError
from rmse_edge.export.program import LoopProgram
from rmse_edge.info import ModelInfo
from rmse_edge.loop.dials import DIALS, Dials
from rmse_edge.loop.plan import EACH_TWICE, ROUTERS
from rmse_edge.loop.predictions import RULES as PREDICTION_RULES
from rmse_edge.loop.predictions import compares
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.text import LoopRuntime

from .memory import MEMORY_TOLERANCE, compare_memory, compare_passage, memory_tokens
from .methods import MOST, ROUNDINGS, compare_methods
from .reference import (
    LEAST_POSITIONS,
    MARGIN,
    SINGLES,
    Course,
    Known,
    Reference,
    Told,
    affordable,
    conversation,
    least_positions,
    made_up_hits,
    stretch,
    told_prefix,
)

LOGITS_TOLERANCE = 1e-4
UNDECIDED_SHARE = 0.01
SAME_TOKEN, SAME_DEPTH, MEAN_DEPTH, KL = 0.98, 0.97, 0.02, 5e-3
POSITIONS = {True: LEAST_POSITIONS, False: 2000}  # tokens compared per setting at most; by rule: exact, rounded
METHOD_TOLERANCE = {True: 1e-4, False: 1e-2}  # relative; by rule: exact, rounded
ACTIVATION_TOLERANCE = 0.1  # relative, root mean square: where activations are rounded to int8 as well
SURPRISE = 0.05  # relative, by the rounded rule: positions that stop elsewhere are written otherwise
LAST_ONLY = 40  # tokens of the call of which only the last logits are asked for: a padded one


def adaptive_settings(reference: Reference, tokens: np.ndarray) -> dict[str, Dials]:
    """Full depth and adaptive settings at which this model's exits vary, one for every rule that it has.

    The checkpoint's own setting is used where it is adaptive; otherwise a first run at full depth shows the brake scores
    and relative changes of the middle loop, and the threshold is put among them, where it is clearest who stops.
    """
    own, full = reference.info.dials, reference.info.full_depth
    middle = max(0, reference.info.max_loops // 2 - 1)
    settings = {"full depth": full}
    for name, of_loops in reference.course(tokens, full).scores.items():
        dial, value = DIALS[name], getattr(own, name)
        if dial.dtype == "int64":
            value = value or max(1, round(float(np.median(of_loops[middle]))))
        else:
            value = value if value != dial.off else clear_threshold(of_loops[middle])
            value = float(np.float32(min(value, 0.999) if name == "exit_threshold" else value))
        settings[dial.rule] = Dials(**(vars(full) | {name: value}))
    if reference.info.plan is not None:
        routed = own.route if DIALS["route"].enables(own.route) else ROUTERS
        settings["route"] = dataclasses.replace(full, route=routed)
        settings["every layer twice"] = dataclasses.replace(full, route=EACH_TWICE)
    return settings


def clear_threshold(values: np.ndarray) -> float:
    """The middle of the widest gap among the central third of `values`; a little below them if they are all alike."""
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    central = np.sort(values[(values >= low) & (values <= high)])
    gaps = np.diff(central)
    if not len(gaps) or gaps.max() < 10 * MARGIN:
        return float(low - min(0.01, low / 2))
    widest = int(np.argmax(gaps))
    return float((central[widest] + central[widest + 1]) / 2)


def teacher_forced(runtime: LoopRuntime, tokens: np.ndarray, dials: Dials, told: Told = ()) -> Course:
    """Every token, fed from an empty state as `conversation` says; of the first prompt, the last 64 tokens by themselves.

    Made-up hits are there from the first single token to the next boundary. Amid the single tokens the text is
    interrupted as a session is: what is kept is taken out, and put back into an empty runtime. One position's logits
    come from a call that was asked for its last row only, as prompts of people are.

    Args:
        told: of the first prompt.
    """
    beginning_told: dict[str, Any] = dict(told)
    first, last = conversation(len(tokens), runtime.info)
    fed, surprise = [], np.zeros(len(tokens))
    runtime.reset()
    beginning = min(LAST_ONLY, first)
    only = runtime.feed(tokens[:beginning], dials, "last", **beginning_told).logits[-1] if beginning else None
    runtime.reset()
    cuts = sorted({0, max(0, first - stretch(runtime.info)), *range(first, last + 1), len(tokens)})
    for start, end in itertools.pairwise(cuts):
        if start == first and (hits := made_up_hits(runtime.info)) is not None:
            runtime.inject(*hits)
        if start == first + SINGLES // 2:
            interrupt(runtime)
        fed.append(runtime.feed(tokens[start:end], dials, **(beginning_told if start == 0 else {})))
        for found in fed[-1].surprises:
            surprise[found.position - 1] = found.value
    logits = np.concatenate([f.logits for f in fed])
    if only is not None:
        logits[beginning - 1] = only
    return Course(logits, np.concatenate([f.depth for f in fed]), surprise)


def interrupt(runtime: LoopRuntime) -> None:
    """Take out what is kept, forget everything, and put it back."""
    kept = runtime.position, {name: array.copy() for name, array in runtime.tensors().items()}
    runtime.reset()
    runtime.restore(*kept)


def compare(
    reference: Reference, candidate: LoopRuntime, tokens: np.ndarray, dials: Dials, exact: bool, prefixed: bool = False
) -> dict[str, Any]:
    """Run the candidate over `tokens` at one setting and measure how far it is from the reference.

    Args:
        prefixed: texts begin with a prefix of some tokens.
    Raises:
        ParityError: they disagree beyond the rule; the message names the position and the numbers.
    """
    start, undecided = 0, []
    ours, theirs, depths = [], [], []
    surprises: list[np.ndarray] = []
    allowed = LOGITS_TOLERANCE
    room = longest_text(candidate.info, tokens)
    while start < len(tokens):
        text = tokens[start : start + room]
        told = told_of(len(text), candidate.info, prefixed)
        a = reference.course(text, dials, told)
        b = teacher_forced(candidate, text, dials, told)
        difference = np.abs(a.logits - b.logits).max(1)
        surprise = np.abs(a.surprise - b.surprise) / np.maximum(1e-3, a.surprise)  # relative
        if exact and not difference.max() <= allowed:
            allowed = max(LOGITS_TOLERANCE, min(ROUNDINGS * reference.rounding, MOST))
        wrong = ~(difference <= allowed) | (a.depth != b.depth)  # NaN is wrong
        wrong |= ~(surprise <= MEMORY_TOLERANCE[True])
        n = len(wrong)
        if exact and wrong.any():
            first = int(np.argmax(wrong))
            unsure = np.flatnonzero(a.margin[: first + 1] < MARGIN)
            if not len(unsure):
                raise ParityError(
                    f"position {start + first}: logits differ by {difference[first]:.1e} (allowed "
                    f"{allowed:.0e}), depth {b.depth[first]} instead of {a.depth[first]}, surprise by "
                    f"{surprise[first]:.1e} relative, and the reference is decided (margin {a.margin[: first + 1].min():.1e})"
                )
            undecided.append(start + int(unsure[-1]))
            n = int(unsure[-1])
            if len(undecided) > UNDECIDED_SHARE * len(tokens):
                listed = ", ".join(map(str, undecided))
                raise ParityError(f"more than {UNDECIDED_SHARE:.0%} of {len(tokens)} positions are undecided: {listed}")
        ours.append(a.logits[:n])
        theirs.append(b.logits[:n])
        depths.append(np.stack([a.depth[:n], b.depth[:n]]))
        surprises.append(surprise[:n])
        start += n + 1 if exact and wrong.any() else n
    summary = agreement(
        np.concatenate(ours), np.concatenate(theirs), np.concatenate(depths, 1), undecided, len(tokens), exact
    )
    if allowed > LOGITS_TOLERANCE:
        summary["allowed"] = allowed
    if reference.info.memory:
        largest = float(np.concatenate(surprises).max())  # relative
        summary["max_surprise_difference"] = largest
        if not exact and not largest <= SURPRISE:  # NaN is wrong
            raise ParityError(f"surprise differs by {largest:.1e} relative (allowed {SURPRISE:.0e})")
    return summary


def told_of(count: int, info: ModelInfo, prefixed: bool = False) -> Told:
    """What a text of `count` tokens is told at its beginning.

    Args:
        prefixed: it has a prefix.
    """
    if info.plan is not None:
        return (("prompt", max(1, told_prefix(count, info))),)
    return (("prefix", told_prefix(count, info)),) if prefixed else ()


def agreement(
    ours: np.ndarray, theirs: np.ndarray, depths: np.ndarray, undecided: list[int], total: int, exact: bool
) -> dict[str, Any]:
    """How well logits (n, V) and depths (2, n) of the reference and a candidate agree.

    Raises:
        ParityError: by the rounded rule (not `exact`), they do not.
    """
    p, q = _log_softmax(ours), _log_softmax(theirs)
    mean = depths.mean(1)
    result: dict[str, Any] = {
        "positions": total,
        "max_logit_difference": float(np.abs(ours - theirs).max()),
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "same_top_token": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        "same_depth": float((depths[0] == depths[1]).mean()),
        "mean_depth": [float(mean[0]), float(mean[1])],
        "depth_sd": float(depths[0].std()),
        "undecided": undecided,
    }
    if not exact:
        checks = {
            f"same top token {result['same_top_token']:.1%} < {SAME_TOKEN:.0%}": result["same_top_token"] >= SAME_TOKEN,
            f"same depth {result['same_depth']:.1%} < {SAME_DEPTH:.0%}": result["same_depth"] >= SAME_DEPTH,
            f"mean depth {mean[1]:.3f} against {mean[0]:.3f}": abs(mean[1] / mean[0] - 1) <= MEAN_DEPTH,
            f"KL {result['kl']:.1e} > {KL:.0e}": result["kl"] <= KL,
        }
        for message, ok in checks.items():
            if not ok:
                raise ParityError(message)
    return result


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def gate(
    program: LoopProgram,
    reference: Reference,
    candidate: LoopRuntime,
    tokens: np.ndarray,
    exact: bool,
    progress: Callable[[str], None] = lambda _: None,
    rounded_activations: bool = False,
    positions: int | None = None,
) -> dict[str, Any]:
    """The whole gate for a language model. Returns the report that goes into the manifest.

    Args:
        exact: the rule; see the module.
        rounded_activations: the package rounds activations, too: to int8, or computes in float16.
        positions: to compare, if not the rule's own number; more, where the ring would not be wrapped by then.
    Raises:
        ParityError: the package must not ship.
    """
    tokens = compared(tokens, reference.info, exact, positions)
    report: dict[str, Any] = {"rule": "exact" if exact else "rounded", "settings": {}}
    settings = settings_for(reference, tokens)
    of_prefix = {"full depth, with a prefix": settings["full depth"]} if reference.info.language.prefix else {}
    for name, dials in (settings | of_prefix).items():
        progress(f"parity at {name}")
        try:
            result = compare(reference, candidate, tokens, dials, exact, prefixed=name in of_prefix)
        except ParityError as error:
            raise ParityError(f"parity failed at {name}: {error}") from None
        report["settings"][name] = {"dials": vars(dials), **result}
    progress("parity of each method")
    program = dataclasses.replace(program, model=reference.model)  # rounded as the package is
    full = settings["full depth"]
    # At half the depth, commit supplies the keys and values of loops that never ran, whatever the call's rows decided.
    half = dataclasses.replace(full, max_loops=max(1, full.max_loops // 2))
    worst: dict[str, float] = {}
    tolerance = ACTIVATION_TOLERANCE if rounded_activations else METHOD_TOLERANCE[exact]
    for dials in (full, half) if rounded_activations else (full, *list(settings.values())[1:2], half):
        found = compare_methods(program, candidate.methods, vars(dials), tolerance, rounded_activations)
        for label, difference in found.items():
            worst[label] = max(worst.get(label, 0.0), difference)
    report["methods"] = worst
    if reference.info.memory:
        progress("parity of the memory")
        report["memory"] = compare_memory(reference, candidate.methods, exact)
    if reference.info.retrieval is not None and exact:
        report["passage"] = compare_passage(reference, candidate, tokens)
    candidate.reset()
    return report


def longest_text(info: ModelInfo, tokens: np.ndarray) -> int:
    """How many of the tokens are one text: a model that attends to the whole text reads several, one after the other."""
    return info.room or len(tokens)


def settings_for(reference: Reference, tokens: np.ndarray) -> dict[str, Dials]:
    """The settings that are compared, chosen on the beginning of a text."""
    first = min(least_positions(reference.info), longest_text(reference.info, tokens))
    return adaptive_settings(reference, tokens[:first])


def computed_ahead(reference: Reference, tokens: np.ndarray) -> Known:
    """What `gate` asks of the reference about these tokens, which no package has to be there for."""
    room = longest_text(reference.info, tokens)
    settings = settings_for(reference, tokens)
    for start in range(0, len(tokens), room):
        text = tokens[start : start + room]
        for dials in settings.values():
            reference.course(text, dials, told_of(len(text), reference.info))
        if reference.info.language.prefix:
            reference.course(text, settings["full depth"], told_of(len(text), reference.info, prefixed=True))
    if reference.info.memory:
        reference.segments(memory_tokens(reference.info))
    return reference.known()


def compare_host(model: Any, tokens: np.ndarray, known: Reference | None = None) -> dict[str, Any]:
    """The host by itself: PyTorch's own methods, run by it, against the whole text, by the exact rule at full depth.

    What the rounded rule allows an engine would hide small faults of the host that runs it. So where packages are held
    to that rule only, the host, which is the same for all of them, is compared without an engine.

    Args:
        model: with keys and values in float32: what is a millionth apart is otherwise rounded apart here and there.
        known: a reference, which need not be computed again if it is of this model.
    Raises:
        ParityError: they disagree; the message names the position.
    """
    candidate = TorchRuntime(model, "host")
    reference = known if known is not None and known.model is model else Reference(model, candidate.info)
    tokens = compared(tokens, reference.info, True)
    try:
        report = compare(reference, candidate, tokens, reference.info.full_depth, True)
        if reference.info.language.prefix:
            compare(reference, candidate, tokens, reference.info.full_depth, True, prefixed=True)
        if compares(reference.info.rules):
            # What the predictions of the loops are made of is read by exit rules alone: at full depth nobody sees it.
            chosen = settings_for(reference, tokens)
            for rule in (DIALS[name].rule for name in PREDICTION_RULES if name in reference.info.rules):
                compare(reference, candidate, tokens, chosen[rule], True)
        if reference.info.retrieval is not None:
            report["passage"] = compare_passage(reference, candidate, tokens)
        return report
    except ParityError as error:
        raise ParityError(f"parity of the host failed: {error}") from None


def compared(tokens: np.ndarray, info: ModelInfo, exact: bool, positions: int | None = None) -> np.ndarray:
    """The part of a text that the gate compares, by its rule; see `gate`. A text that is too short is read over again.

    Of a large model fewer positions than the rule's are affordable: as many as `PRODUCTS` are enough for at full depth.
    """
    least = least_positions(info)
    count = max(least, min(POSITIONS[exact], positions or POSITIONS[exact], affordable(info)))
    return tokens[:count] if len(tokens) >= least else np.resize(tokens, least)
