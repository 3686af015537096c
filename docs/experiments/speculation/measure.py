"""Greedy decoding, plain and by speculation with several drafts, in turns: tokens, acceptance length, and time.

    python docs/experiments/speculation/measure.py PACKAGE [--loops 1,2] [--heads] [--auto] [--tokens 1,2,3,5] [--adaptive] [-n 64] [-r 5]
    python docs/experiments/speculation/measure.py PACKAGE --costs

Time is the processor's, not the clock's, on one thread: other work on the machine then disturbs it less. Each ratio is the
median over repetitions of plain time to speculative time within the same repetition. `--costs` prints what the parts of a round
cost instead, at full depth: a token of a draft, and the call that verifies.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time

from rmse_edge.runtimes import LoopRuntime, open_runtime
from rmse_edge.runtimes.text.drafts import AUTO, HEADS, label, shallow
from rmse_edge.runtimes.text.generate import Generation
from rmse_edge.runtimes.text.sampling import Sampler, Sampling
from rmse_edge.runtimes.text.speculation import Speculation
from rmse_edge.runtimes.text.writer import Writer, open_tokenizer

PROMPTS = ("ROMEO:\nWhat light is this", "First Citizen:\nWe are", "The king's own ")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def print_costs(runtime: LoopRuntime, loops: list[int], tokens: list[int], repetitions: int) -> None:
    """What each part of a round takes, as a multiple of one token at full depth: medians, taken in turns."""
    full = runtime.info.full_depth
    runtime.feed([1] * 30, full, logits="last")
    heads = runtime.info.drafting is not None

    def draft(n: int) -> None:
        with runtime.aside(1) as feed:
            feed(1, shallow(full, n))

    def verify(rows: int) -> None:
        runtime.calls.keep(runtime.ahead([1] * rows, full).call, rows, note=False)  # the text stays where it is

    parts = [("a token of full depth", partial(verify, 1))]
    parts += [(f"a token of a draft of {n} loops", partial(draft, n)) for n in loops]
    parts += [("a token of a draft by heads", lambda: runtime.by_heads()(1))] if heads else []
    parts += [(f"a verification of {n} tokens, {n + 1} rows", partial(verify, n + 1)) for n in tokens]
    taken: dict[str, list[float]] = {name: [] for name, _ in parts}
    for _ in range(repetitions):
        for name, part in parts:
            start = process_time()
            part()
            taken[name].append(process_time() - start)
    whole = median(taken[parts[0][0]])
    for name, seconds in taken.items():
        print(f"{name}: {median(seconds) / whole:.2f} ({1000 * median(seconds):.2f} ms)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--loops", type=numbers, default=[1, 2])
    parser.add_argument("--heads", action="store_true", help="drafts by the package's heads, too")
    parser.add_argument("--auto", action="store_true", help="and by whichever of these makes more tokens a millisecond")
    parser.add_argument("--tokens", type=numbers, default=[1, 2, 3, 5])
    parser.add_argument("--adaptive", action="store_true", help="the package's own exits instead of full depth")
    parser.add_argument("--prompt", action="append", help="instead of the three that there are; repeatable")
    parser.add_argument("-n", type=int, default=64, help="tokens behind each prompt")
    parser.add_argument("-r", type=int, default=5, help="repetitions, after one that is not timed")
    parser.add_argument("--costs", action="store_true", help="time the parts of a round instead")
    args = parser.parse_args()
    runtime = open_runtime(args.package, threads=1)
    assert isinstance(runtime, LoopRuntime)
    if args.costs:
        return print_costs(runtime, args.loops, args.tokens, 10 * args.r)
    prompts = args.prompt or PROMPTS
    tokenizer = open_tokenizer(args.package, runtime.info.vocab_size)
    dials = runtime.info.dials if args.adaptive else runtime.info.full_depth

    def write(prompt: str, speculation: Speculation | None) -> tuple[Generation, float]:
        runtime.reset()
        sampler = Sampler(Sampling(temperature=0))
        made = Writer(runtime, tokenizer, dials, sampler, args.n + 1, speculation=speculation).begun(prompt)
        steps = made.steps()
        next(steps)  # the prompt and the first token
        start = process_time()
        for _ in steps:
            pass
        return made, process_time() - start

    sources = [*([HEADS] if args.heads else []), *args.loops, *([AUTO] if args.auto else [])]
    settings = [Speculation(source, tokens).check(runtime) for source in sources for tokens in args.tokens]
    ratios: dict[Speculation, list[float]] = {s: [] for s in settings}
    said: dict[Speculation, list[Generation]] = {s: [] for s in settings}
    plain: list[float] = []
    texts: list[Generation] = []
    for repetition in range(args.r + 1):
        seconds = 0.0
        for prompt in prompts:
            made, spent = write(prompt, None)
            seconds += spent
            if not repetition:
                texts.append(made)
        if repetition:
            plain.append(len(prompts) * args.n / seconds)
        for setting in settings:
            own = 0.0
            for prompt, text in zip(prompts, texts):
                made, spent = write(prompt, setting)
                own += spent
                if not repetition:
                    assert made.tokens == text.tokens and made.depth == text.depth
                    said[setting].append(made)
            if repetition:
                ratios[setting].append(seconds / own)
    loops = sum(sum(text.depth) for text in texts) / sum(len(text.depth) for text in texts)
    print(f"plain: {median(plain):.1f} tokens per second of processor time, {loops:.2f} loops on average\n")
    print("| drafts by | tokens of a draft | accepted | tokens per verification | times as fast |")
    print("|---|---|---|---|---|")
    for setting in settings:
        found = [made.statistics()["speculation"] for made in said[setting]]
        rounds, drafted, accepted = (sum(f[name] for f in found) for name in ("rounds", "drafted", "accepted"))
        length = len(prompts) * args.n / rounds
        times = ratios[setting]
        print(
            f"| {label(setting.source)} | {setting.tokens} | {accepted / max(drafted, 1):.0%} | {length:.2f} | {median(times):.2f} "
            f"({min(times):.2f} to {max(times):.2f}) |"
        )


if __name__ == "__main__":
    main()
