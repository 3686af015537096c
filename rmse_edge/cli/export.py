"""`rmse-export`: a checkpoint becomes a package that stops early and says what PyTorch says."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .common import (
    PARSER,
    Parser,
    existing_file,
    output_path,
    positive_int,
    random_model,
    run_verb,
    total_bar,
    verb,
)
from .quantize import add_quantize_flags, quantized, request_of

if TYPE_CHECKING:
    from rmse_edge.export import ExportRequest
    from rmse_edge.quantize import QuantizeRequest

DESCRIPTION = "Export a looped model into a package for a device runtime."
DEFAULT_MODEL = "rmse-shakespeare"  # of those that come with this package
TARGETS = ("onnx", "executorch", "coreml")
BITS = ("int8", "int4")
QUANTIZING = 0.5  # of the time that quantising and exporting take together, about


def parser() -> Parser:
    p = Parser(prog="rmse-export", description=DESCRIPTION)
    p.arguments |= {"compact": "--no-compact", "overwrite": "--force"}
    add_flags(p)
    return p


def add_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "-m",
        "--model",
        metavar="DIR",
        help=f"checkpoint folder, float or made by rmse-quantize, or the name of a shipped model (default: {DEFAULT_MODEL})",
    )
    p.add_argument(
        "--config", metavar="FILE", help="a config.json instead of a checkpoint: random weights, for benches"
    )
    p.add_argument(
        "-o", "--output", type=output_path, metavar="DIR", help="package folder (default: ./MODEL-TARGET.rmse)"
    )
    p.add_argument(
        "--archive", action="store_true",
        help="write the package as one file (default: ./MODEL-TARGET.rmse.zip), for phones and downloads",
    )  # fmt: skip
    p.add_argument("--target", default="onnx", help=f"what to export for: {', '.join(TARGETS)}")
    p.add_argument(
        "--quant", help="how weights are stored: fp32, fp16, int8, int4 (default: the checkpoint's, or fp32)"
    )
    p.add_argument(
        "--accuracy-level", type=int, choices=(0, 4),
        help="of int8 and int4: 4 rounds activations to int8, 0 does not (default: what the target can; onnx: 4)",
    )  # fmt: skip
    p.add_argument(
        "--compute", choices=("cpu", "gpu", "ane"),
        help="coreml: lay the program out for the CPU (default), the GPU or the Neural Engine",
    )  # fmt: skip
    p.add_argument(
        "--profile-experts", type=existing_file, metavar="FILE",
        help="executorch, int8 and int4: lay out experts in the file by which ones this text uses together",
    )  # fmt: skip
    p.add_argument(
        "--max-seq-len", type=positive_int, metavar="N", help="refuse texts longer than N tokens (default: no limit)"
    )
    p.add_argument(
        "--draft-tokens", type=positive_int, metavar="M",
        help="of executorch and coreml: also calls in which rmse-run --speculate verifies M tokens (onnx takes any number)",
    )  # fmt: skip
    p.add_argument("--no-compact", action="store_true", help="in 64-row calls, compute the experts of stopped rows too")
    p.add_argument(
        "--experts", choices=("fused", "gathered"),
        help="onnx: gathered, for GPUs of browsers: in operators that all engines have; int4 is slower elsewhere (default: fused)",
    )  # fmt: skip
    p.add_argument("--force", action="store_true", help="replace an existing package")
    p.add_argument("-t", "--threads", type=positive_int, metavar="N", help="threads (default: PyTorch's own choice)")
    p.add_argument("--seed", type=int, default=0, help="seed of --config's random weights")
    p.add_argument("--dry-run", action="store_true", help="print methods, shapes and sizes, and write nothing")
    p.add_argument("--format", choices=("text", "json"), default="text", help="format of --dry-run's output")
    add_quantize_flags(p)


@verb("rmse-export")
def main(argv: Sequence[str] | None = None) -> int | None:
    return export(parser().parse_args(argv))


def export_parsed(name: str, args: argparse.Namespace) -> int:
    """The command under another name, whose own parser was given the flags; its exit code."""

    def run(_: Sequence[str] | None) -> int | None:
        PARSER.set(parser())  # messages name its flags
        return export(args)

    return run_verb(name, run)


def export(args: argparse.Namespace) -> int | None:
    """What the command does, with the flags of `add_flags`."""
    from rmse_edge.errors import UserError

    if args.output and not args.archive and args.output.name.endswith(".rmse.zip"):
        raise UserError(f"-o: {args.output} is the name of an archive; add --archive")
    if args.model and args.config:
        raise UserError("--model and --config: give one of them")
    from rmse_edge.archive import check_archive
    from rmse_edge.checkpoint import load_checkpoint, shapes_of
    from rmse_edge.export import ExportRequest, describe, export_package
    from rmse_edge.export.pipeline import check_formats
    from rmse_edge.export.targets import get_target
    from rmse_edge.package import check_destination
    from rmse_edge.quantize import Scheme, can_stream, is_quantized_checkpoint, load_quantized, quantize
    from rmse_edge.quantize.quantizer import cached_in
    from rmse_edge.shipped import or_shipped, shipped

    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    folder = or_shipped(args.model) if args.model else shipped(DEFAULT_MODEL)
    stored = load_quantized(folder) if not args.config and is_quantized_checkpoint(folder) else None
    quant = args.quant or (stored.quant if stored else "fp32")
    request = ExportRequest(
        target=args.target,
        quant=quant,
        options=get_target(args.target).options.of(args.target, options_given(args)),
        max_seq_len=args.max_seq_len,
        draft_tokens=args.draft_tokens,
        overwrite=args.force,
    )
    if args.profile_experts:
        check_profile(args, quant)
    if stored is not None:
        request.check_integers(stored)
    refuse_idle_flags(args, quant, stored is not None)
    how = request_of(args, quant) if quant in BITS and stored is None else None
    if how:
        check_way(args, how)
    if args.config:
        config = Path(args.config)
        model, checkpoint, name = (
            random_model(config, args.seed).eval(),
            None,
            config.absolute().parent.name or "random",
        )
    else:
        streams = how is not None and can_stream(how, args.calibrate)
        # What is rounded tensor by tensor is never loaded as floats; its shapes are known without.
        model = stored.model if stored else shapes_of(folder) if streams else load_checkpoint(folder)
        checkpoint, name = folder, folder.absolute().name
    if how:  # int8 fits where any integers do; where it does not, no hint may lead there
        check_formats(model, Scheme("int8").formats(model), request.target)
    formats = how.scheme.formats(model) if how else {n: q.format for n, q in stored.tensors.items()} if stored else {}
    check_formats(model, formats, request.target)
    if args.dry_run:
        if how:
            model = cached_in(model, how.kv)
        print_description(describe(model, request, formats), args.format)
        return 0
    output = args.output or Path(f"{name}-{args.target}{'.rmse.zip' if args.archive else '.rmse'}")
    # before minutes of quantising
    check_archive(output, args.force) if args.archive else check_destination(output, args.force)
    integers = stored
    with total_bar() as part:
        if how and args.config:
            integers = quantize(model, how)  # rounds, in no time
        elif how:
            integers = quantized(args, model, folder, how, part(QUANTIZING))
        model = integers.model if integers else model
        if args.profile_experts:
            request = with_profile(request, model, folder, args.profile_experts)
        share = 1 - QUANTIZING if how and not args.config else 1.0
        with packed_into(output) if args.archive else nullcontext(output) as folder:
            package = export_package(model, folder, request, checkpoint, part(share), integers)
    print_result(package, output)
    return 0


@contextmanager
def packed_into(path: Path) -> Iterator[Path]:
    """A place for a package, beside which nothing is left when the block ends, but the archive `path` of it."""
    from rmse_edge.archive import write_entries
    from rmse_edge.errors import ExportError
    from rmse_edge.files import named, new_file
    from rmse_edge.package import Package

    with new_file(path, ExportError) as part:
        folder = part.with_suffix("")  # without .zip
        with named(folder, path):
            yield folder
        write_entries(Package.open(folder), part)


def options_given(args) -> dict[str, object]:
    """Options of targets that flags set, by name."""
    flags = {
        "compact": False if args.no_compact else None,
        "accuracy_level": args.accuracy_level,
        "compute": args.compute,
        "experts": args.experts,
    }
    return {name: value for name, value in flags.items() if value is not None}


def check_profile(args, quant: str) -> None:
    """Fail, before anything is computed, where experts cannot be laid out by a text.

    Raises:
        UserError: naming the flag.
    """
    from rmse_edge.errors import UserError
    from rmse_edge.export.targets import get_target

    get_target(args.target).options.of(args.target, {"profile_experts": None})
    if quant not in BITS:
        raise UserError(
            f"--profile-experts: {quant} packages have no experts that are read one by one; export with --quant int4"
        )
    if args.config:
        raise UserError("--profile-experts: random weights use all experts alike; leave it out")


def with_profile(request: ExportRequest, model, folder: Path, text: Path) -> ExportRequest:
    """The request, to lay out experts by which ones `model` uses together in a text."""
    import numpy as np

    from rmse_edge.export import ExecutorchOptions
    from rmse_edge.export.executorch.placement import profile_experts
    from rmse_edge.text import Tokenizer, read_text

    ids = np.asarray(Tokenizer(folder / "tokenizer.json").encode(read_text(text)), np.int64)
    own = ExecutorchOptions(request.own.accuracy_level, profile_experts(model, ids))
    return replace(request, options=own)


def check_way(args, how: QuantizeRequest) -> None:
    """Fail, before anything is computed, where a model cannot be quantised that way for that target.

    Raises:
        UserError: naming the flag.
    """
    from rmse_edge.errors import UserError
    from rmse_edge.export.targets import get_target

    if args.config and (args.calibrate or how.needs_text):
        flags = "--method rtn, and no --kv int8 or --qat-steps"
        raise UserError(f"--quant {how.scheme.quant}: random weights have nothing to calibrate; use {flags}")
    if how.needs_text and not args.calibrate:
        way = "or --method rtn without --kv int8 and --qat-steps"
        raise UserError(
            f"--quant {how.scheme.quant}: give --calibrate FILE, a text like those the model will read ({way})"
        )
    if not how.scheme.symmetric and not get_target(args.target).asymmetric:
        raise UserError(f"--asymmetric: {args.target} takes symmetric weights only; leave it out")


def refuse_idle_flags(args, quant: str, already: bool) -> None:
    """Fail where a flag says how to quantise and nothing is going to be quantised.

    Raises:
        UserError: naming the flag.
    """
    from rmse_edge.errors import UserError

    reason = "the checkpoint is quantised already" if already else f"--quant {quant} quantises nothing"
    if already or quant not in BITS:
        plain = Parser(prog="rmse-export")
        add_quantize_flags(plain)
        for name, default in vars(plain.parse_args([])).items():
            if getattr(args, name) != default:
                raise UserError(f"--{name.replace('_', '-')}: {reason}; leave it out")


def print_description(description: dict, form: str) -> None:
    if form == "json":
        print(json.dumps(description, indent=2))
        return
    print(f"target {description['target']}, {description['quantization']}, {description['parameters']:,} parameters")
    print(f"weights {description['weight_bytes']:,} bytes, state {description['state_bytes']:,} bytes")
    for method, tensors in description["methods"].items():
        print(f"\n{method}")
        for side, arrow in (("inputs", "<-"), ("outputs", "->")):
            for name, (shape, dtype) in tensors[side].items():
                print(f"  {arrow} {name:<16} {dtype:<8} {'x'.join(map(str, shape)) or 'scalar'}")


def print_result(package, output: Path) -> None:
    parity = package.manifest["parity"]
    print(f"{output}: {output.stat().st_size if output.is_file() else package.nbytes:,} bytes")
    for setting, r in parity["settings"].items():
        if "boards" in r:
            compared = f"{r['boards']} boards, same cells {r['same_cells']:.1%}"
            end = f"mean depth {r['mean_depth']:.2f}"
        elif "blocks" in r:
            compared = f"{r['blocks']} blocks, same tokens {r['same_tokens']:.1%}"
            end = f"mean steps {r['mean_steps']:.2f}, undecided {r['undecided']}"
        else:
            compared = f"{r['positions']} positions"
            end = f"mean depth {r['mean_depth'][1]:.2f}, undecided {len(r['undecided'])}"
        print(
            f"parity at {setting}: {compared}, max |d logit| {r['max_logit_difference']:.1e}, "
            f"same depth {r['same_depth']:.1%}, {end}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
