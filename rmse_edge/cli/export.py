"""`rmse-export`: a checkpoint becomes a package that stops early and says what PyTorch says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .common import Parser, output_path, positive_int, verb

DEFAULT_MODEL = "models/rmse-shakespeare"
TARGETS = ("onnx",)


def parser() -> Parser:
    p = Parser(prog="rmse-export", description="Export a looped model into a package for a device runtime.")
    p.add_argument("-m", "--model", metavar="DIR", help=f"checkpoint folder (default: {DEFAULT_MODEL})")
    p.add_argument(
        "--config", metavar="FILE", help="a config.json instead of a checkpoint: random weights, for benches"
    )
    p.add_argument(
        "-o", "--output", type=output_path, metavar="DIR", help="package folder (default: ./MODEL-TARGET.rmse)"
    )
    p.add_argument("--target", default="onnx", help=f"what to export for: {', '.join(TARGETS)}")
    p.add_argument("--quant", default="fp32", help="how weights are stored: fp32, fp16")
    p.add_argument(
        "--max-seq-len", type=positive_int, metavar="N", help="refuse texts longer than N tokens (default: no limit)"
    )
    p.add_argument("--no-compact", action="store_true", help="in 64-row calls, compute the experts of stopped rows too")
    p.add_argument("--force", action="store_true", help="replace an existing package")
    p.add_argument("--seed", type=int, default=0, help="of the random weights of --config")
    p.add_argument("--dry-run", action="store_true", help="print methods, shapes and sizes, and write nothing")
    p.add_argument("--format", choices=("text", "json"), default="text", help="of --dry-run's output")
    return p


@verb("rmse-export")
def main(argv: Sequence[str] | None = None) -> int | None:
    args = parser().parse_args(argv)
    from ..errors import UserError

    if args.model and args.config:
        raise UserError("--model and --config: give one of them")
    from ..export import ExportRequest, describe, export_package

    request = ExportRequest(
        target=args.target,
        quant=args.quant,
        compact=not args.no_compact,
        max_seq_len=args.max_seq_len,
        overwrite=args.force,
    )
    model, checkpoint, name = load(args)
    if args.dry_run:
        print_description(describe(model, request), args.format)
        return 0
    output = args.output or Path(f"{name}-{args.target}.rmse")
    from tqdm import tqdm

    with tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=None) as bar:

        def progress(stage: str) -> None:
            bar.set_description_str(stage)

        package = export_package(model, output, request, checkpoint, progress)
    print_result(package)
    return 0


def load(args):
    """The model to export, the folder it came from (None for random weights), and its name."""
    if args.config:
        import torch

        from ..config import RMSEConfig
        from ..model import RMSE

        config = RMSEConfig.from_file(args.config)
        torch.manual_seed(args.seed)
        return RMSE(config).eval(), None, Path(args.config).absolute().parent.name or "random"
    from ..checkpoint import load_checkpoint

    folder = Path(args.model or DEFAULT_MODEL)
    return load_checkpoint(folder), folder, folder.absolute().name


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


def print_result(package) -> None:
    parity = package.manifest["parity"]
    print(f"{package.folder}: {package.nbytes:,} bytes")
    for setting, r in parity["settings"].items():
        print(
            f"parity at {setting}: {r['positions']} positions, max |d logit| {r['max_logit_difference']:.1e}, "
            f"same depth {r['same_depth']:.1%}, mean depth {r['mean_depth'][1]:.2f}, undecided {len(r['undecided'])}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
