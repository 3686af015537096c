"""rmse-trace: one text, token by token: the loops each took and what every loop said, as pictures and a page to look into."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rmse_edge.errors import UserError

from .common import Parser, existing_file, existing_model, model_folder, positive_int, verb
from .display import table
from .flags import add_dial_flags, add_memory_flags, add_runtime_flags, chosen_dials, open_model, prepare_memory

TOKENS = 160  # of a text, unless more are asked for
WRITTEN = 64  # behind a prompt, likewise


@verb("rmse-trace")
def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse(argv)
    from rmse_edge.files import changed_folder, check_folder
    from rmse_edge.probe.plots import check_matplotlib
    from rmse_edge.probe.trace_plots import draw_trace
    from rmse_edge.probe.tracing import Tracer, by_loop, write_trace_page
    from rmse_edge.runtimes import LoopRuntime
    from rmse_edge.runtimes.text.sampling import Sampling
    from rmse_edge.text import Tokenizer, read_text

    check_matplotlib()
    check_folder(args.output)
    sampling = Sampling(args.temperature, seed=args.seed)
    runtime = open_model(args)
    assert isinstance(runtime, LoopRuntime)
    runtime.noise_seed = args.seed
    dials = chosen_dials(args, runtime.info)
    tokenizer = Tokenizer(args.model / "tokenizer.json").fitting(runtime.info.vocab_size)
    librarian = prepare_memory(runtime, args, lambda message: print(f"rmse-trace: {message}", file=sys.stderr))
    tracer = Tracer(runtime, tokenizer, dials, librarian)
    if args.text:
        tracer.read(tokenizer.encode(read_text(args.text))[: (args.max_tokens or TOKENS) + 1])
    else:
        prompt = tokenizer.encode(args.prompt)
        if not prompt:
            raise UserError("--prompt: is empty; give at least one token")
        tracer.write(prompt, sampling, args.max_new_tokens or WRITTEN)
    found = tracer.document()
    with changed_folder(args.output) as folder:
        (folder / "trace.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
        draw_trace(found, [folder / "trace.png", folder / "trace.svg"])
        write_trace_page(found, folder / "trace.png", folder / "trace.html")
    print(table(*by_loop(found)))
    print(f"\n{len(found['trace'])} tokens, {found['mean_loops']:.2f} of {found['loops']} loops on average")
    print(f"{args.output}: trace.json, trace.png, trace.svg, trace.html")
    return None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="rmse-trace",
        description="Follow one text token by token: the loops each took, the memory's surprise, what was looked up; of a "
        "checkpoint also what every loop said, how the state moved and which experts it used. Pictures and one page.",
    )
    parser.arguments["text"] = "--text"
    parser.add_argument("model", type=existing_model, help="checkpoint folder, or package (NAME.rmse or NAME.rmse.zip)")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("-p", "--prompt", metavar="TEXT", help="text to continue")
    given.add_argument("--text", type=existing_file, metavar="FILE", help="UTF-8 text to read")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for what is written")
    parser.add_argument(
        "-n",
        "--max-new-tokens",
        type=positive_int,
        metavar="N",
        help=f"of a prompt: tokens to write (default: {WRITTEN})",
    )
    parser.add_argument(
        "--max-tokens", type=positive_int, metavar="N", help=f"of a text: tokens to read at most (default: {TOKENS})"
    )
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest token, always")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same tokens on every runtime")
    add_dial_flags(parser)
    add_memory_flags(parser)
    add_runtime_flags(parser)
    args = parser.parse_args(argv)
    if args.text and args.max_new_tokens:
        parser.error("--max-new-tokens: is of a prompt; a text is read up to --max-tokens")
    if not args.text and args.max_tokens:
        parser.error("--max-tokens: is of a text; behind a prompt --max-new-tokens are written")
    args.model = model_folder(args.model)
    return args


if __name__ == "__main__":
    sys.exit(main())
