"""Flags that rmse-run, rmse-eval and rmse-bench share: which model on which runtime, and the quality dial."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmse_edge.errors import UserError
from rmse_edge.loop.dials import DIALS
from rmse_edge.numbers import DRAFT_TOKENS

from .common import Parser, finite_float, key_value, non_negative_float, non_negative_int, positive_float, positive_int

if TYPE_CHECKING:
    from rmse_edge.runtimes import Dials, ModelInfo, Runtime
    from rmse_edge.runtimes.text.librarian import Librarian
    from rmse_edge.runtimes.text.speculation import Speculation


def add_runtime_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--runtime", help="torch, cuda, onnx, executorch or coreml (default: what the folder was made for)"
    )
    group.add_argument(
        "--device", choices=("cpu", "cuda"),
        help="where the torch and the cuda runtime compute (default: the one on the CPU, the other on a GPU)",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"),
        help="how the cuda runtime holds the weights of a float checkpoint (default: fp32)",
    )  # fmt: skip
    group.add_argument(
        "-t", "--threads", type=positive_int, metavar="N", help="threads (default: the engine's own choice)"
    )
    group.add_argument(
        "--expert-ram", metavar="SIZE",
        help="of ExecuTorch packages: keep so much of the experts in memory (300M, 25%%, auto), read the others when needed",
    )  # fmt: skip


def open_model(args: argparse.Namespace, path: Path | None = None) -> Runtime:
    """The runtime that the flags ask for, on `args.model` or another folder."""
    from rmse_edge.runtimes import open_runtime

    return open_runtime(path or args.model, args.runtime, args.device, args.threads, args.expert_ram, args.dtype)


def add_dial_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quality dial", "the checkpoint's own settings unless given; loops count from 1")
    for name, dial in DIALS.items():
        if dial.dtype == "int64":
            number: Callable[[str], float] = positive_int if dial.least > 0 else non_negative_int
        elif dial.least < 0:
            number = finite_float  # `Dials.check` knows its range
        else:
            number = positive_float if dial.exclusive else non_negative_float
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=number,
            metavar=dial.symbol,
            help=dial.help,
        )


def chosen_dials(args: argparse.Namespace, info: ModelInfo) -> Dials:
    """The checkpoint's dials with those of the command line put in.

    Raises:
        UserError: a dial is out of the model's range, or the model was not built with that rule.
    """
    return info.dials_asked({name: getattr(args, name) for name in DIALS})


def add_speculation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speculative decoding")
    group.add_argument(
        "--speculate", type=draft_source, metavar="N|heads|auto",
        help="draft tokens with N loops, or by the model's heads (rmse-train --stage mtp), and verify them together at the dials: greedy "
        "tokens stay the same. auto: whichever makes more tokens a millisecond, or none; drawn texts then depend on the clock",
    )  # fmt: skip
    group.add_argument(
        "--draft-tokens", type=positive_int, metavar="M",
        help=f"of --speculate: tokens that are drafted before they are verified, at most (default: {DRAFT_TOKENS})",
    )  # fmt: skip


def draft_source(text: str) -> int | str:
    """Where drafts come from: a number of loops, or a word."""
    if text in ("heads", "auto"):
        return text
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of loops, heads or auto") from None


def rates_line(found: dict[str, Any]) -> str:
    """What `Rates` measured, of statistics of speculation that have it."""
    rates = ", ".join(f"{name} {rate:.3f}" for name, rate in found["tokens_per_ms"].items())
    return f"tokens per ms, by what drafted: {rates}"


def chosen_speculation(args: argparse.Namespace) -> Speculation | None:
    """What the flags of `add_speculation_flags` say.

    Raises:
        UserError: --draft-tokens without --speculate, or beyond its range.
    """
    from rmse_edge.runtimes.text.speculation import Speculation

    if args.speculate is None:
        if args.draft_tokens is not None:
            raise UserError("--draft-tokens: needs --speculate")
        return None
    return Speculation(args.speculate, args.draft_tokens or DRAFT_TOKENS)


def add_memory_flags(parser: Parser) -> None:
    parser.arguments["hits"] = "--kb-hits"
    group = parser.add_argument_group("memory and retrieval")
    group.add_argument("--no-memory", action="store_true", help="leave the neural memory blank")
    group.add_argument(
        "--kb", metavar="KB", help="knowledge base made by rmse-index, asked when the memory is surprised"
    )
    group.add_argument(
        "--gamma",
        type=finite_float,
        metavar="G",
        help="ask when surprise is G deviations above its mean (default: the model's own)",
    )
    group.add_argument(
        "--kb-hits", type=positive_int, metavar="N", help="passages to read at once (default: all there is room for)"
    )
    group.add_argument(
        "--kb-timeout", type=positive_float, metavar="S", help="seconds that a server may take (default: 10)"
    )
    group.add_argument(
        "--kb-storage", action="append", type=key_value, metavar="KEY=VALUE", help="LanceDB storage option; repeatable"
    )
    group.add_argument(
        "--kb-optional", action="store_true", help="if the knowledge base fails, say so and go on without"
    )


def leave_memory_blank(runtime: Runtime) -> None:
    """--no-memory.

    Raises:
        UserError: the model has none.
    """
    from rmse_edge.runtimes import LoopRuntime

    assert isinstance(runtime, LoopRuntime)
    if not runtime.memory:
        raise UserError(f"--no-memory: {runtime.info.name} has no memory")
    runtime.remember = False


def prepare_memory(runtime: Runtime, args: argparse.Namespace, warn: Callable[[str], object]) -> Librarian | None:
    """Apply the flags of `add_memory_flags`; the librarian, where there is a knowledge base.

    Raises:
        UserError: flags that need a memory, a retrieval head or a knowledge base that is not there.
    """
    from rmse_edge.runtimes import LoopRuntime

    assert isinstance(runtime, LoopRuntime)
    if args.no_memory:
        leave_memory_blank(runtime)
    if args.kb is None:
        for flag in ("gamma", "kb_hits", "kb_timeout", "kb_storage", "kb_optional"):
            if getattr(args, flag) is not None and getattr(args, flag) is not False:
                raise UserError(f"--{flag.replace('_', '-')}: needs a knowledge base (--kb)")
        return None
    if args.no_memory:
        raise UserError("--kb: the memory's surprise decides when to ask; leave out --no-memory")
    from rmse_edge.knowledge import TIMEOUT_S, KnowledgeError, open_retriever
    from rmse_edge.runtimes.text.librarian import Librarian

    try:
        retriever = open_retriever(args.kb, args.kb_timeout or TIMEOUT_S, dict(args.kb_storage or ()))
        return Librarian.attach(runtime, retriever, args.kb, args.gamma, args.kb_hits, args.kb_optional, warn)
    except KnowledgeError as error:
        if not args.kb_optional:
            raise
        warn(f"going on without retrieval: {error}")
        return None
