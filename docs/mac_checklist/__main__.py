"""What a Core ML package does on a Mac, as one Markdown report to attach to an issue. See docs/mac-checklist.md.

    pip install 'rmse-edge[coreml]'
    python docs/mac_checklist PACKAGE.rmse -o report.md

Everything comes from the package: its manifest says what each function takes and gives, the reference is the
interpreter of runtimes/mil/interpreter.py on the same file. No checkpoint is needed. Every check runs, whatever came of those ahead
of it; with -o the file is written after each one, so that a crash of the engine leaves what was found until then.

Exit codes: 0 all ok, 1 a check failed, 2 something given is wrong.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from checks import Unit
from facts import described, machine
from plan import UNITS, coremltools
from reference import Reference
from report import Outcome, Report, bullets

from rmse_edge.archive import unpacked
from rmse_edge.cli.common import Parser, positive_int, verb
from rmse_edge.errors import PackageError, UserError
from rmse_edge.package import Package

LEAST_TOKENS = 12  # so that the prompt is one padded call of 64 rows, and single tokens follow


def units(value: str) -> list[str]:
    chosen = list(dict.fromkeys(part.strip() for part in value.split(",")))
    if unknown := [part for part in chosen if part not in UNITS]:
        raise argparse.ArgumentTypeError(f"got {unknown[0]!r}, expected some of {', '.join(UNITS)}, with commas")
    return chosen


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="mac_checklist", description="Check a Core ML package on this Mac. The report goes to stdout.")
    parser.add_argument("package", type=Path, help="made with rmse-export --target coreml")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument("--compute", type=units, default="cpu,gpu,ane", metavar="LIST", help="compute units to check")
    parser.add_argument("--tokens", type=positive_int, default=96, metavar="N", help="of the texts that are compared")
    parser.add_argument("--repeats", type=positive_int, default=20, metavar="N", help="timed calls of each function")
    return parser.parse_args(argv)


def checked(args: argparse.Namespace) -> Package:
    """The package, if all is as it must be; a `UserError` otherwise."""
    if platform.system() != "Darwin":
        raise UserError(
            f"needs macOS 15 or later, this is {platform.system()}; here rmse-run and rmse-export use the interpreter"
        )
    system = platform.mac_ver()[0]
    if int(system.partition(".")[0] or 0) < 15:
        raise UserError(f"needs macOS 15 or later, this is {system or 'unknown'}; functions and states came with it")
    if args.tokens < LEAST_TOKENS:
        raise UserError(f"--tokens: got {args.tokens}, expected at least {LEAST_TOKENS}")
    if args.output is not None and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
        raise UserError(f"-o: {args.output} cannot be written; give a file name in a folder that exists")
    package = Package.open(unpacked(args.package))
    if package.target != "coreml":
        raise PackageError(f"{args.package}: made for {package.target}; make one with rmse-export --target coreml")
    limit = package.manifest["model"]["text"]["max_seq_len"]
    if limit is not None and args.tokens > limit:
        raise UserError(f"--tokens: got {args.tokens}, the package takes at most {limit}")
    return package


@verb("mac_checklist")
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    package = checked(args)
    ct = coremltools()
    report = Report(args.output)
    report.section("machine", bullets(machine()))
    report.section("package", bullets(described(package)))
    reference = Reference(package, args.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        compiled = Path(scratch) / "model.mlmodelc"

        def compile_it() -> Outcome:
            start = perf_counter()
            ct.models.utils.compile_model(str(reference.program), str(compiled))
            return Outcome([f"{perf_counter() - start:.2f} s"])

        report.check("compiling", compile_it)
        for compute in args.compute:
            unit = Unit(reference, compute, compiled, args.repeats)
            for name, check in unit.checks().items():
                report.check(f"{compute}: {name}", check)
    print(report.text(), end="")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
