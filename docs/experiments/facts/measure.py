"""Answers from a knowledge base, end to end: package, index, librarian, generated text. Prints one JSON document.

    rmse-train --recipe docs/experiments/facts/recipe.json -o runs/facts
    rmse-export -m runs/facts -o runs/facts.rmse
    python docs/experiments/facts/measure.py runs/facts.rmse

Every question stands at the end of a prompt of chatter. Subjects were never drawn in training. "with" holds the facts
asked for and as many others, "swapped" the same subjects with other values: then its answers count as right. Triggers:
the share of segments of plain chatter, and of prompts that end with a question, whose surprise calls for help, by gamma.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from rmse_edge.cli.index import main as index
from rmse_edge.knowledge import open_retriever
from rmse_edge.runtimes import LoopRuntime, open_runtime
from rmse_edge.runtimes.text.generate import Generation
from rmse_edge.runtimes.text.librarian import Librarian
from rmse_edge.runtimes.text.sampling import Sampler, Sampling
from rmse_edge.text import Tokenizer
from rmse_edge.train.facts import ANSWER, QUESTION, Facts

SEGMENTS = 400  # of chatter without a question
CONTEXTS = (20, 150)  # words of chatter before a question
GAMMAS = (1.0, 1.5, 2.0, 3.0)


def main(package: Path, questions: int) -> None:
    task, tokenizer = Facts(), Tokenizer(package / "tokenizer.json")
    runtime = open_runtime(package, threads=1)
    assert isinstance(runtime, LoopRuntime)
    draw = np.random.default_rng(77)
    facts = {tuple(f[:3]): f for f in (task.fact(draw, held_out=True) for _ in range(questions))}
    asked = np.stack(list(facts.values()))
    swapped = asked.copy()
    first = task.offsets["value"]
    swapped[:, 3] = first + (asked[:, 3] - first + draw.integers(1, task.values, len(asked))) % task.values
    others = [f for f in (task.fact(draw, held_out=True) for _ in range(len(asked))) if tuple(f[:3]) not in facts]
    prompts = []
    for i, fact in enumerate(asked):
        chatter = task.chatter(draw, 1, CONTEXTS[i % len(CONTEXTS)])[0]
        prompts.append([*chatter.tolist(), QUESTION, *fact[:3].tolist(), ANSWER])

    def answers(kb: Path | None, gamma: float | None = None) -> tuple[np.ndarray, float]:
        """The generated tokens, and the share of questions that were looked up before their answer."""
        given, looked = [], 0
        for prompt in prompts:
            runtime.reset()
            librarian = None
            runtime.on_surprise = None
            if kb is not None:
                retriever = open_retriever(kb)
                librarian = Librarian.attach(runtime, retriever, kb, gamma)
            sampler = Sampler(Sampling(temperature=0))
            generation = Generation(runtime, tokenizer, prompt, runtime.info.dials, sampler, 1, librarian=librarian)
            given.append(next(generation.steps())[0])
            if librarian is not None:
                looked += any(c.surprise.position == len(prompt) - 1 for c in librarian.consultations)
                librarian.retriever.close()
        runtime.on_surprise = None
        return np.array(given), looked / len(prompts)

    result: dict[str, object] = {"questions": len(asked), "chance": 1 / task.values}
    with tempfile.TemporaryDirectory() as scratch:
        for name, base in (("with", asked), ("swapped", swapped)):
            text = Path(scratch) / f"{name}.txt"
            lines = [tokenizer.decode([int(t) for t in fact]) for fact in [*base, *others]]
            text.write_text("\n".join(lines) + "\n", encoding="utf-8")
            with redirect_stdout(sys.stderr):  # what it reports is no part of the document
                failed = index([str(package), str(text), "-o", str(Path(scratch) / f"{name}.kb")])
            if failed:
                raise SystemExit("rmse-index failed")
            given, looked = answers(Path(scratch) / f"{name}.kb")
            result[name] = float((given == base[:, 3]).mean())
            result[f"asked_{name}"] = looked
    result["without"] = float((answers(None)[0] == asked[:, 3]).mean())
    runtime.reset()
    chatter = runtime.feed(
        task.chatter(draw, 1, min(SEGMENTS, 2 * questions) * 64)[0], runtime.info.dials, "last"
    ).surprises
    needing = []
    for prompt in prompts:
        runtime.reset()
        runtime.feed(prompt[:-1], runtime.info.dials, "last")
        needing.append(runtime.peek())
    result["gamma"] = (runtime.info.retrieval or {})["gamma"]
    result["triggers"] = {
        gamma: {
            "chatter": float(np.mean([s.above(gamma) for s in chatter])),
            "questions": float(np.mean([s is not None and s.above(gamma) for s in needing])),
        }
        for gamma in GAMMAS
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    main(args.package, args.questions)
