"""rmse-probe: what a looped model does from loop to loop, and which claims about looped models it bears out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmse_edge.probe import EPSILON, KINDS

from .common import (
    Parser,
    existing_file,
    existing_folder,
    existing_model_folder,
    non_negative_int,
    positive_float,
    positive_int,
    total_bar,
    verb,
)
from .display import table


@verb("rmse-probe")
def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse(argv)
    from rmse_edge.files import changed_folder, check_folder
    from rmse_edge.probe.page import iterations, write_page
    from rmse_edge.probe.plots import check_matplotlib, draw
    from rmse_edge.probe.report import Settings, measure

    check_matplotlib()
    if args.probes:
        check_sklearn()
    check_folder(args.output)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    settings = Settings(args.blocks, args.epsilon, args.task or (), args.problems, args.probes, args.seed)
    with total_bar() as begin:
        found = measure(args.model, args.text, settings, args.judge, begin(1.0))
    with changed_folder(args.output) as folder:
        document = {name: value for name, value in found.items() if name != "trace"}
        (folder / "probe.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        draw(found, folder / "probe.png")
        write_page(found, folder / "probe.png", folder / "probe.html")
    print(table(*iterations(found)))
    print()
    print(verdict_lines(found))
    print()
    print(exit_line(found))
    print(f"\n{args.output}: probe.json, probe.png, probe.html")
    return None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="rmse-probe",
        description="Read the last tenth of a text with all loops, and measure loss, entropy, change of the state, linear probes "
        "and more after every one: a table here, and a document, plots and a page to look into in a folder.",
    )
    parser.add_argument(
        "model", type=existing_model_folder, help="checkpoint folder of a looped model, or of the GPT baseline"
    )
    parser.add_argument("--text", type=existing_file, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for what is written")
    parser.add_argument(
        "--task", action="append", choices=KINDS,
        help="problems of known difficulty to solve, too; several times for several kinds",
    )  # fmt: skip
    parser.add_argument("--problems", type=positive_int, default=400, metavar="N", help="of each kind")
    parser.add_argument(
        "--judge", type=existing_folder, metavar="DIR",
        help="checkpoint that says how hard a token is (default: n-grams of the rest of the text)",
    )  # fmt: skip
    parser.add_argument("--blocks", type=positive_int, default=32, metavar="N", help="texts of the model's own length")
    parser.add_argument(
        "--epsilon", type=positive_float, default=EPSILON, metavar="E",
        help="a token has settled when its state changes by less, relative to its length",
    )  # fmt: skip
    parser.add_argument("--no-probes", dest="probes", action="store_false", help="leave out linear probes")
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, metavar="N", help="of problems, probes and resampling"
    )
    parser.add_argument("-t", "--threads", type=positive_int, metavar="N", help="threads (default: all cores)")
    return parser.parse_args(argv)


def check_sklearn() -> None:
    """Before minutes are spent."""
    from rmse_edge.probe.linear import sklearn_parts

    sklearn_parts()


def verdict_lines(found: dict[str, Any]) -> str:
    width = max(len(row["claim"]) for row in found["verdicts"])
    return "\n".join(f"{row['verdict']:<8} {row['claim']:<{width}}  {row['evidence']}" for row in found["verdicts"])


def exit_line(found: dict[str, Any]) -> str:
    rules = ", ".join(f"{name} {rule['saved']:.0%}" for name, rule in found["exits"]["rules"].items())
    return f"{found['unit']}s saved at 1 % more loss than all of them, by what tokens stop by: {rules}"


if __name__ == "__main__":
    sys.exit(main())
