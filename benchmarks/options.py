"""The flags of `python -m benchmarks`, and what they say is run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rmse_edge.cli.common import (
    Parser,
    existing_file,
    list_of,
    non_negative_int,
    one_of,
    output_path,
    positive_float,
    positive_int,
)
from rmse_edge.errors import UserError

from .artifacts import RUNNER
from .child import ROOT
from .field import CONTESTANTS, Timed
from .llama import check_python
from .shapes import OURO, SHIPPED, WIDTHS, Looped, dense, hrm_text, moe, ouro, shipped

DEFAULT = ("moe", "dense", "shipped", "hrm-text")
MODELS = (*DEFAULT, OURO)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """
    Raises:
        UserError: a flag is unknown or its value does not do.
    """
    parser = Parser(
        prog="python -m benchmarks",
        description="Time looped models beside llama.cpp on a dense model of the same FLOPs, or on the same model, in turns.",
    )
    parser.add_argument(
        "--models",
        type=list_of(one_of(*MODELS)),
        default=",".join(DEFAULT),
        metavar="M,M,...",
        help=f"of {', '.join(MODELS)} (default: all but {OURO}, which takes 8 GB of memory)",
    )
    parser.add_argument(
        "--widths", type=list_of(one_of(*map(str, WIDTHS))), default="768", metavar="N,N,...",
        help=f"of the random models, of {', '.join(map(str, WIDTHS))}",
    )  # fmt: skip
    parser.add_argument(
        "--contestants", type=list_of(one_of(*CONTESTANTS)), default=",".join(CONTESTANTS), metavar="C,C,...",
        help="of " + ", ".join(CONTESTANTS),
    )  # fmt: skip
    parser.add_argument(
        "-t", "--threads", type=list_of(positive_int), default="1,2", metavar="N,N,...", help="one after the other"
    )
    parser.add_argument(
        "-p", "--prompt", type=non_negative_int, default=512, metavar="N", help="tokens of a prompt, pp; 0: none"
    )
    parser.add_argument(
        "-n", "--generate", type=non_negative_int, default=128, metavar="N", help="tokens to generate, tg; 0: none"
    )
    parser.add_argument("-r", "--rounds", type=positive_int, default=5, metavar="N", help="timed, after one warm-up")
    parser.add_argument(
        "--starts", type=non_negative_int, default=3, metavar="N",
        help="cold and as many warm starts of which the time to the first token is taken; 0: none",
    )  # fmt: skip
    parser.add_argument(
        "--seconds",
        type=positive_float,
        default=900.0,
        metavar="S",
        help="that one answer may take; then it has failed",
    )
    parser.add_argument(
        "--llama-python", type=existing_file, metavar="FILE",
        help="Python of an environment with llama-cpp-python and gguf (default: one is made in --cache, once)",
    )  # fmt: skip
    parser.add_argument(
        "--runner", type=existing_file, metavar="FILE", help="rmse-runner (default: as make runner builds it)"
    )
    parser.add_argument(
        "--cache", type=output_path, metavar="DIR",
        help="models, packages, llama.cpp's environment, and what contestants print (default: build/benchmarks)",
    )  # fmt: skip
    parser.add_argument("--json", type=output_path, metavar="FILE", help="write everything that was measured")
    parser.add_argument(
        "--plot", type=output_path, metavar="FILE", help="write a picture; the ending chooses the format"
    )
    args = parser.parse_args(argv)
    if not args.prompt and not args.generate:
        raise UserError("--prompt and --generate: both are 0, so there is nothing to time")
    if args.plot:
        from rmse_edge.runtimes.measure.sweep import check_plot

        check_plot(args.plot)
    for name in ("llama_python", "runner", "cache"):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).absolute())  # contestants run in the folder of the project
    args.runner = args.runner or RUNNER
    args.cache = args.cache or ROOT / "build" / "benchmarks"
    if args.llama_python:
        check_python(args.llama_python)
    args.tests = Timed(args.prompt, args.generate)
    return args


def chosen_models(args: argparse.Namespace) -> tuple[list[Looped], list[str]]:
    """The models, and what is left out."""
    makers = {"moe": moe, "dense": dense, "hrm-text": hrm_text}
    widths = [int(width) for width in dict.fromkeys(args.widths)]
    found = [makers[kind](width) for width in widths for kind in dict.fromkeys(args.models) if kind in makers]
    found += [ouro()] if OURO in args.models else []
    notes = []
    if "shipped" in args.models:
        if (SHIPPED / "model.safetensors").is_file():
            found.append(shipped(SHIPPED))
        else:
            notes.append(f"left out: the trained model, {SHIPPED.relative_to(ROOT)} is not here")
    return found, notes
