"""`rmse-quantize`: a checkpoint becomes int8 or int4, chosen so that the loop keeps saying what it said."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmse_edge.errors import UserError

from .common import (
    Parser,
    existing_file,
    existing_model_folder,
    non_negative_int,
    output_path,
    positive_int,
    total_bar,
    verb,
)
from .display import table

if TYPE_CHECKING:
    from rmse_edge.progress import Report
    from rmse_edge.quantize import Quantized, QuantizeRequest


def parser() -> Parser:
    p = Parser(
        prog="rmse-quantize",
        description="Quantise a checkpoint for every target: the integers are chosen once, exporters store them as they are.",
    )
    p.arguments["overwrite"] = "--force"
    p.add_argument(
        "-m", "--model", type=existing_model_folder, metavar="DIR", required=True, help="float checkpoint folder"
    )
    p.add_argument("-o", "--output", type=output_path, metavar="DIR", help="folder to write (default: ./MODEL-QUANT)")
    p.add_argument("--quant", choices=("int8", "int4"), default="int4")
    add_quantize_flags(p)
    p.add_argument("--force", action="store_true", help="replace an existing quantised checkpoint")
    p.add_argument("-t", "--threads", type=positive_int, metavar="N", help="threads (default: PyTorch's own choice)")
    p.add_argument(
        "--report", choices=("md", "json"), default="md", help="format of the printed report; the folder has it as JSON"
    )
    return p


def add_quantize_flags(p: argparse.ArgumentParser) -> None:
    """How to quantise: shared with rmse-export."""
    if isinstance(p, Parser):  # it may be another program's
        p.arguments |= {"ids": "--calibrate", "symmetric": "--asymmetric"}
    group = p.add_argument_group("quantisation")
    group.add_argument(
        "--calibrate", type=existing_file, metavar="FILE",
        help="UTF-8 text like those the model will read, or a CSV of boards: 90 %% of it calibrate, the rest evaluates",
    )  # fmt: skip
    group.add_argument(
        "--method", choices=("gptq", "rtn"), default="gptq", help="rtn: round to the nearest, without data"
    )
    group.add_argument(
        "--loops", choices=("exits", "even", "first"), default="exits",
        help="whose inputs gptq sees: every loop's by the exit distribution, every loop's alike, the first loop's",
    )  # fmt: skip
    group.add_argument(
        "--group-size", type=positive_int, default=32, metavar="N", help="int4: groups of the routed experts"
    )
    group.add_argument(
        "--dense-group-size", type=positive_int, metavar="N",
        help="int4: groups of everything else (default: the largest of 128, 64, 32, 16 that divides)",
    )  # fmt: skip
    group.add_argument("--asymmetric", action="store_true", help="int4: a zero point per group; not for every target")
    group.add_argument(
        "--kv", choices=("float32", "float16", "int8"), help="type of the KV cache (default: the checkpoint's own)"
    )
    group.add_argument(
        "--calibration-tokens", type=positive_int, default=32_768, metavar="N", help="drawn from the text at random"
    )
    group.add_argument(
        "--evaluation-tokens", type=non_negative_int, default=8_192, metavar="N", help="0: no comparison"
    )
    group.add_argument(
        "--keep-gate", action="store_true", help="leave the exit gate's bias, though the mean depth may move"
    )
    group.add_argument(
        "--qat-steps", type=non_negative_int, default=0, metavar="N", help="finetune the rounded weights"
    )
    group.add_argument(
        "--calibration-seed", type=non_negative_int, default=0, metavar="N", help="seed of the drawn texts"
    )


def request_of(args: argparse.Namespace, quant: str) -> QuantizeRequest:
    """The request that the flags make.

    Raises:
        UserError: a value that does not go with the others.
    """
    from rmse_edge.quantize import QuantizeRequest, Scheme

    return QuantizeRequest(
        scheme=Scheme(quant, args.group_size, args.dense_group_size, not args.asymmetric),
        method=args.method,
        loops=args.loops,
        kv=args.kv,
        calibration_tokens=args.calibration_tokens,
        evaluation_tokens=args.evaluation_tokens,
        recalibrate_gate=not args.keep_gate,
        qat_steps=args.qat_steps,
        seed=args.calibration_seed,
    )


def quantized(
    args: argparse.Namespace, model: Any, folder: Path, request: QuantizeRequest, progress: Report
) -> Quantized:
    """Quantise the checkpoint in `folder`.

    Args:
        model: its model; None: it is loaded if it is needed.
    """
    import numpy as np

    from rmse_edge.arch.common.identity import fingerprint
    from rmse_edge.checkpoint import load_checkpoint
    from rmse_edge.puzzles.known import game_of_model
    from rmse_edge.puzzles.sets import Boards, read_boards
    from rmse_edge.quantize import can_stream, quantize, quantize_folder
    from rmse_edge.quantize.boards import board_of
    from rmse_edge.text import Tokenizer, read_text

    if can_stream(request, args.calibrate):
        return quantize_folder(folder, request, progress)
    model = load_checkpoint(folder) if model is None else model
    ids: np.ndarray | Boards | None = None
    if args.calibrate and (board := board_of(model)) is not None:
        ids = read_boards(args.calibrate, game_of_model(board))
    elif args.calibrate:
        progress("reading the text", 0)
        ids = np.asarray(Tokenizer(folder / "tokenizer.json").encode(read_text(args.calibrate)), np.int64)
    return quantize(model, request, ids, fingerprint(model), progress)


@verb("rmse-quantize")
def main(argv: Sequence[str] | None = None) -> int | None:
    args = parser().parse_args(argv)
    request = request_of(args, args.quant)
    from rmse_edge.quantize import save_quantized
    from rmse_edge.quantize.store import check_destination

    if request.needs_text and not args.calibrate:
        raise UserError(
            "--calibrate FILE is missing: a text like those the model will read, or a CSV of boards (--method rtn rounds "
            "without one)"
        )
    output = args.output or Path(f"{args.model.absolute().name}-{args.quant}")
    check_destination(output, args.force)  # before minutes of quantising
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    with total_bar() as part:
        result = quantized(args, None, args.model, request, part(1.0))
    save_quantized(result, output, args.model)
    print(json.dumps(result.report) if args.report == "json" else as_markdown(result.report, output))
    return None


def as_markdown(report: dict[str, Any], output: Path) -> str:
    """Tables for people: tensors, then what it cost."""
    lines = [tensor_table(report), ""]
    rare = report["rarely_routed_experts"]
    if rare:
        lines.append(
            f"{rare['count']} of {rare['of']} experts saw fewer rows than they have inputs: the rows that every expert "
            "borrows from the average count most there"
        )
    gate = report["gate"]
    if gate:
        lines.append(
            f"exit gate: mean loops {gate['wanted']:.3f} before, {gate['before']:.3f} quantised, "
            f"{gate['after']:.3f} with its bias moved by {gate['shift']:+.3f}"
        )
    if "evaluation" in report:
        lines += ["", evaluation_table(report["evaluation"])]
    else:
        lines.append("not compared with the float model (needs --calibrate FILE and --evaluation-tokens)")
    lines += ["", f"{output}: {report['bytes']:,} bytes of codes and scales"]
    return "\n".join(lines)


def tensor_table(report: dict[str, Any]) -> str:
    def row(name: str, t: dict[str, Any]) -> tuple[str, ...]:
        error = f"{t['relative_error']:.3f}" + (
            f" (worst expert {t['worst_expert']:.3f})" if "worst_expert" in t else ""
        )
        group = "channel" if t["group"] is None else str(t["group"])
        return name, "x".join(map(str, t["shape"])), str(t["bits"]), group, f"{t['bytes']:,}", error

    head = ("tensor", "shape", "bits", "group", "bytes", "|w - q| / |w|")
    return table(head, [row(name, t) for name, t in report["tensors"].items()])


def evaluation_table(e: dict[str, Any]) -> str:
    if "boards" in e:
        return board_table(e)
    rows = []
    for name in ("full_depth", "adaptive"):
        if name not in e:
            continue
        s = e[name]
        error = "" if s["increase_se"] is None else f" ± {s['increase_se']:.4f}"
        spread = "" if s["perplexity_se"] is None else f" ± {s['perplexity_se']:.3f}"
        rows.append((
            name.replace("_", " "), f"{s['perplexity']['float']:.3f}", f"{s['perplexity']['quantized']:.3f}{spread}",
            f"{s['perplexity_increase']:+.2%}", f"{s['increase']:+.4f}{error}", f"{s['kl']:.4f}",
            f"{s['same_top_token']:.1%}", f"{s['mean_depth']['float']:.2f}, {s['mean_depth']['quantized']:.2f}",
        ))  # fmt: skip
    head = ("", "perplexity, float", "quantised", "increase", "nats", "KL", "same top token", "mean loops")
    drift = ", ".join(f"{d:.3f}" for d in e["drift"])
    return f"{table(head, rows)}\n{e['tokens']:,} held-out tokens; drift of the states by loop: {drift}"


def board_table(e: dict[str, Any]) -> str:
    """What quantising cost on boards."""
    rows = [
        (f"{side}, {setting.replace('_', ' ')}", f"{s['solved']:.2%}", f"{s['cells']:.2%}", f"{s['mean_steps']:.2f}")
        for setting in ("full_depth", "adaptive")
        for side in ("float", "quantized")
        for s in (e[side][setting],)
    ]
    drift = ", ".join(f"{d:.3f}" for d in e["drift"])
    tail = f"{e['boards']:,} held-out boards, {e['same_steps']:.1%} of them in the same step; drift of the states by step: {drift}"
    return f"{table(('', 'solved', 'cells right', 'mean steps'), rows)}\n{tail}"


if __name__ == "__main__":
    sys.exit(main())
