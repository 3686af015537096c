"""Flags that rmse-run, rmse-eval and rmse-bench share: which model on which runtime, and the quality dial."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import UserError
from .common import non_negative_float, positive_float, positive_int

if TYPE_CHECKING:
    from ..runtimes import Dials, ModelInfo, Runtime


def add_runtime_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("runtime")
    group.add_argument("--runtime", help="torch or onnx; the one the folder was made for without it")
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the torch runtime")
    group.add_argument("-t", "--threads", type=positive_int, metavar="N", help="the engine's own choice without it")


def open_model(args: argparse.Namespace) -> Runtime:
    """The runtime that the flags ask for, on `args.model`."""
    from ..runtimes import open_runtime

    return open_runtime(args.model, args.runtime, args.device, args.threads)


def add_dial_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quality dial", "the checkpoint's own settings unless given; loops count from 1")
    group.add_argument("--max-loops", type=positive_int, metavar="N", help="iterations at most")
    group.add_argument("--min-loops", type=positive_int, metavar="N", help="iterations before a token may stop")
    group.add_argument("--exit-threshold", type=positive_float, metavar="P", help="brake score to stop at; 1 disables")
    group.add_argument(
        "--exit-epsilon", type=non_negative_float, metavar="E", help="state change to stop at; 0 disables"
    )
    group.add_argument(
        "--exit-entropy", type=non_negative_float, metavar="H", help="entropy (nats) to stop at; 0 disables"
    )


def chosen_dials(args: argparse.Namespace, info: ModelInfo) -> Dials:
    """The checkpoint's dials with those of the command line put in.

    Raises:
        UserError: a dial is out of the model's range, or the model was not built with that rule.
    """
    if args.exit_entropy and "entropy" not in info.config["exit_rules"]:
        raise UserError(
            f"--exit-entropy: {info.name} was built without the entropy rule (exit_rules in its config.json)"
        )
    return info.dials_with(
        max_loops=args.max_loops,
        min_loops=args.min_loops,
        exit_threshold=args.exit_threshold,
        exit_epsilon=args.exit_epsilon,
        exit_entropy=args.exit_entropy,
    )
