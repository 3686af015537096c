"""python -m benchmarks: looped models beside the dense model that one would deploy instead. See docs/benchmarks.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rmse_edge.cli.common import verb
from rmse_edge.errors import UserError
from rmse_edge.files import write_text

from . import bandwidth
from .artifacts import Artifacts
from .field import BASELINE
from .first_token import first_tokens
from .options import chosen_models, parse
from .report import Results
from .rounds import run_section


@verb("benchmarks")
def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse(argv)
    models, notes = chosen_models(args)
    if not models:
        raise UserError(f"--models: nothing is left to time; {'; '.join(notes)}")
    files = Artifacts(args.cache, args.llama_python, args.runner, say)
    results = Results(args.rounds, notes=notes)
    for model in models:
        results.models[model.name] = model
        for threads in args.threads:
            cells, facts = run_section(
                model, threads, args.contestants, args.tests, args.rounds, files, args.seconds, say
            )
            results.cells += cells
            results.facts |= {f"{model.name}/{threads}/{name}": said for name, said in facts.items() if said}
            # Behind the rounds: what is open keeps its files in memory, and no start would be cold.
            native = [name for name in (BASELINE, "rmse-runner") if name in args.contestants]
            if args.starts and native:
                say(f"{model.name}, threads {threads}: first tokens")
                results.first += first_tokens(model, threads, native, args.starts, files, args.seconds)
    for threads in args.threads:
        say(f"reading memory with threads {threads}")
        results.bandwidth[threads] = bandwidth.measured(threads)
    if args.json:
        write_text(args.json, json.dumps(results.document(), indent=1) + "\n")
    if args.plot:
        from .plot import draw

        draw(results, args.plot)
    print(results.markdown())
    return None


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
