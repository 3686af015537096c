"""rmse-train: a text file and a recipe in, a checkpoint folder out; `rmse-train report` measures a trained one.

Several processes: `torchrun --nproc-per-node N --no-python rmse-train --text ... -o ... --parallel fsdp`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmse_edge.errors import UserError

from .common import Parser, existing_file, existing_folder, fraction, list_of, positive_int, verb


@verb("rmse-train")
def main(argv: Sequence[str] | None = None) -> int | None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["report"]:
        return report(argv[1:])
    parser = Parser(
        prog="rmse-train",
        description="Train a model on a text file, or on the task of a recipe (recall, facts, mqar, parity, modular_addition, needle, sudoku, maze, arc). `rmse-train report CHECKPOINT --text FILE` measures a trained one.",
    )
    parser.arguments |= {"changes": "--set", "mode": "--parallel", "start": "--init"}
    parser.add_argument(
        "--text", type=existing_file, help="UTF-8 text; its first 90 %% trains. Not for a recipe's task"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--recipe", type=existing_file, help="recipe.json; without it, the built-in one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe: model.d_model=64"
    )
    parser.add_argument("--tokenizer", type=existing_file, help="tokenizer.json; without it, the text's characters")
    parser.add_argument(
        "--init", type=existing_folder, metavar="DIR",
        help="start from this checkpoint's weights; the recipe's model may add a memory or retrieval",
    )  # fmt: skip
    parser.add_argument(
        "--stage", choices=("gate", "routers", "mtp"),
        help="train the exit gate of the --init checkpoint alone, all else frozen; a model without a gate gets one. Or the routers before "
        "its layers, by plans that are searched for prompts of the text, or heads for multi-token prediction, which draft for "
        "rmse-run --speculate (--recipe: their own recipe)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    parser.add_argument("--stop-at", type=positive_int, metavar="STEP", help="leave after this step, to resume later")
    parser.add_argument("--save-every", type=positive_int, default=200, metavar="N", help="steps between saved states")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun")
    parser.add_argument(
        "--threads", type=positive_int, help="CPU threads of this process (default: PyTorch's own choice)"
    )
    args = parser.parse_args(argv)

    import torch

    from rmse_edge.train.recipe import Recipe
    from rmse_edge.train.session import RECIPE_FILE, train, train_task

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.stage and not args.init and not args.resume:
        what = {"gate": "whose gate is trained", "routers": "whose routers are trained", "mtp": "that gets the heads"}
        raise UserError(f"--stage {args.stage}: missing --init DIR, the checkpoint {what[args.stage]}")
    if args.stage in ("routers", "mtp"):
        in_one_go(args)
        return None
    if args.stage and args.recipe:
        raise UserError("--recipe: --stage gate makes its own of the checkpoint; leave it out, and use --set")
    source = args.recipe or (args.output / RECIPE_FILE if args.resume else None)
    if source:
        recipe = Recipe.from_file(source)
    else:
        recipe = Recipe.of_gate(args.init) if args.stage else Recipe(model={"dropout": 0.1})
    recipe = recipe.override(args.set)
    if (args.text is None) != (recipe.task is not None):
        raise UserError("--text: the recipe has a task and takes no text" if args.text else "missing --text FILE")
    rest = (args.resume, args.device, args.parallel, args.stop_at, args.save_every, args.init)
    if args.resume and (args.init or args.tokenizer):
        raise UserError(f"--{'init' if args.init else 'tokenizer'}: a resumed run has its own; leave it out")
    if recipe.task is not None and args.tokenizer:
        raise UserError("--tokenizer: the recipe's task has its own words; leave it out")
    if recipe.task is not None:
        result = train_task(args.output, recipe, *rest)
        if result is not None:
            print(json.dumps(result, indent=2))
        return None
    evaluation = train(args.text, args.output, recipe, args.tokenizer, *rest)
    if evaluation is not None:
        print(evaluation_table(evaluation))
    return None


def in_one_go(args: argparse.Namespace) -> None:
    """`--stage routers` and `--stage mtp`, whose recipes are their own."""
    for flag in ("resume", "stop_at"):
        if getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')}: --stage {args.stage} is done in one go; leave it out")
    if args.device != "cpu":
        raise UserError(f"--device: --stage {args.stage} runs on the CPU; leave it out")
    if args.text is None:
        raise UserError("missing --text FILE")
    if args.stage == "mtp":
        from rmse_edge.train import mtp

        heads = mtp.HeadsRecipe.from_file(args.recipe) if args.recipe else mtp.HeadsRecipe()
        print(
            mtp.as_markdown(
                mtp.train_heads(args.text, args.output, heads.override(args.set), args.init, args.tokenizer)
            )
        )
        return
    from rmse_edge.train.routing import RouterRecipe, as_markdown, train_routers

    recipe = RouterRecipe.from_file(args.recipe) if args.recipe else RouterRecipe()
    print(as_markdown(train_routers(args.text, args.output, recipe.override(args.set), args.init, args.tokenizer)))


def evaluation_table(evaluation: dict[str, Any]) -> str:
    """Validation loss at every depth, best last line."""
    losses = evaluation["loss_by_depth"]
    lines = [f"| {' | '.join(['depth', *losses])} |", "|---" * (1 + len(losses)) + "|"]
    lines += [f"| {i} | {' | '.join(f'{x:.4f}' for x in row)} |" for i, row in enumerate(zip(*losses.values()), 1)]
    if evaluation["architecture"] == "gpt":
        lines[2:] = [line.replace("| 1 |", "| all layers |", 1) for line in lines[2:]]
    best = evaluation["best"]
    tail = f"{evaluation['parameters']:,} parameters, {evaluation['validation_tokens']:,} validation tokens"
    return "\n".join([*lines, tail + (f", best weights of stage 1 at step {best['step']}" if best else "")])


def report(argv: list[str]) -> int | None:
    parser = Parser(
        prog="rmse-train report",
        description="Losses by depth and by brake threshold, expert overlap between loops, and costs of a checkpoint.",
    )
    parser.add_argument(
        "checkpoint", type=existing_folder, help="folder with config.json, model.safetensors, tokenizer.json"
    )
    parser.add_argument("--text", type=existing_file, required=True)
    parser.add_argument("--split", choices=("train", "validation", "all"), default="validation")
    parser.add_argument("--max-tokens", type=positive_int, metavar="N", help="only the first N tokens of the split")
    parser.add_argument("--thresholds", type=list_of(fraction), default=[0.5, 0.7, 0.8, 0.9, 0.95], metavar="X,X,...")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md", help="tables, or one JSON document")
    args = parser.parse_args(argv)

    import torch

    from rmse_edge.train.report import as_markdown, measure

    if args.threads:
        torch.set_num_threads(args.threads)
    result = measure(args.checkpoint, args.text, args.split, args.thresholds, args.max_tokens)
    print(json.dumps(result, indent=2) if args.output == "json" else as_markdown(result))
    return None


if __name__ == "__main__":
    sys.exit(main())
