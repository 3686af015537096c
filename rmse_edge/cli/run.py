"""rmse-run: a package or a checkpoint writes text, each token with the loops it needs, or fills in boards."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmse_edge.errors import FileError, UserError
from rmse_edge.files import check_file

from . import blocks
from .boards import refuse_flags_of_texts, run_boards
from .chat import NO_QUESTION, talk
from .common import INTERRUPTED, Parser, existing_model, list_of, model_folder, non_negative_int, positive_int, verb
from .display import DepthWriter, offload_lines, plain
from .flags import (
    add_dial_flags,
    add_memory_flags,
    add_runtime_flags,
    add_speculation_flags,
    chosen_dials,
    chosen_speculation,
    prepare_memory,
    rates_line,
)

if TYPE_CHECKING:
    from rmse_edge.runtimes.host.session import Resumed
    from rmse_edge.runtimes.text.conversation import Conversation
    from rmse_edge.runtimes.text.generate import Generation, Span


TEXT_FLAGS = (
    "max_new_tokens", "prefix", "temperature", "top_k", "top_p", "seed", "stop", "ignore_eos", "system", "no_memory", "kb",
    "gamma", "kb_hits", "kb_timeout", "kb_storage", "kb_optional", "session", "save_session", "show_depth", "show_prompt",
    "color", "speculate", "draft_tokens",
)  # fmt: skip

ENDED = {
    "length": "", "eos": "; ended by the model", "stop": "; ended at a stop text", "interrupted": "; interrupted",
    "max_seq_len": "; ended at the longest text that it takes",
}  # fmt: skip


@verb("rmse-run")
def main(argv: Sequence[str] | None = None) -> int | None:
    args, parser = parse(argv)
    if args.board is not None:
        return run_boards(args)

    from rmse_edge.chat import ChatTemplate
    from rmse_edge.runtimes import BlockRuntime, LoopRuntime, open_writer
    from rmse_edge.runtimes.host.session import SessionError, restore_session, save_session
    from rmse_edge.runtimes.text.sampling import Sampler, Sampling
    from rmse_edge.runtimes.text.writer import Writer, open_tokenizer
    from rmse_edge.text import Tokenizer, check_ids

    sampler = Sampler(Sampling(args.temperature, args.top_k, args.top_p, args.seed))
    speculation = chosen_speculation(args)
    text = read_prompt(args)
    if args.save_session:
        try:
            check_file(args.save_session)
        except FileError as error:
            raise UserError(f"--save-session: {error}") from None
    if args.session and args.no_memory:
        raise UserError("--no-memory: the session brings its own memory; leave one of them out")
    template = ChatTemplate.open(args.model) if args.chat else None
    runtime = open_writer(args.model, args.runtime, args.device, args.threads, args.expert_ram, args.dtype)
    if isinstance(runtime, BlockRuntime):
        blocks.refuse_flags(args, parser)
        written = blocks.generation_of(args, runtime, text or "")
        show(written, args)
        finish(written, text or "", args)
        return INTERRUPTED if written.finish_reason == "interrupted" else None
    assert isinstance(runtime, LoopRuntime)
    dials = chosen_dials(args, runtime.info)
    check_ids(args.prompt_tokens, runtime.info.vocab_size)
    # Ids are read and shown where there is no tokenizer.
    tokenizer = open_tokenizer(args.model, runtime.info.vocab_size, needed=not args.prompt_tokens)
    librarian = prepare_memory(runtime, args, warn)
    prefix = None if args.prefix is None else args.prefix == "all"
    writer = Writer(
        runtime, tokenizer, dials, sampler, args.max_new_tokens, args.stop or (), args.ignore_eos, prefix, librarian,
        speculation,
    )  # fmt: skip
    resumed = restore_session(runtime, args.session) if args.session else None
    if template is not None:
        return converse(args, writer.conversation(template), resumed, text)
    assert text is not None
    if resumed:
        ids = args.prompt_tokens
        if isinstance(tokenizer, Tokenizer) and not ids:
            ids = tokenizer.encode_more(text)
        generation = writer.generate(resumed.pending + ids, resumed.tail, len(resumed.pending))
    else:
        generation = writer.begun(args.prompt_tokens or text, args.show_prompt)
    base = runtime.position
    show(generation, args)
    finish(generation, text, args)
    if args.save_session:
        fed = runtime.position - base
        try:
            save_session(runtime, args.save_session, [*generation.prompt, *generation.tokens][fed:], generation.end)
        except SessionError as error:
            if generation.finish_reason != "interrupted":
                raise
            warn(str(error))
    return INTERRUPTED if generation.finish_reason == "interrupted" else None


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Parser]:
    parser = Parser(
        prog="rmse-run",
        description="Continue a prompt, or talk (--chat). Text goes to stdout, statistics to stderr.",
    )
    parser.add_argument("model", type=existing_model, help="package (NAME.rmse or NAME.rmse.zip) or checkpoint folder")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("-p", "--prompt", metavar="TEXT", help="text to continue; without it, all of stdin")
    given.add_argument(
        "-f", "--file", metavar="FILE", help="the prompt is in a UTF-8 file, taken as it is; - for stdin"
    )
    given.add_argument(
        "--prompt-tokens", type=list_of(non_negative_int), default=[], metavar="N,N,...",
        help="token ids to continue instead of a text; without a tokenizer the new tokens are shown as ids, too",
    )  # fmt: skip
    given.add_argument(
        "--board", metavar="FILE", help="boards to fill in, as people write them; - for stdin (a model of boards)"
    )
    parser.add_argument(
        "-n", "--max-new-tokens", type=positive_int, default=256, metavar="N", help="tokens to write at most"
    )
    parser.add_argument(
        "--prefix", choices=("all", "none"),
        help="positions of the prompt see each other whatever their order, or only those before them; by default all, where "
        "the model knows prefixes. Behind a session there is none",
    )  # fmt: skip
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest token, always")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens; 0: all")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens of mass P")
    group.add_argument("--seed", type=int, default=0, help="the same seed draws the same tokens on every runtime")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end tokens")
    group = parser.add_argument_group("chat")
    group.add_argument(
        "--chat", action="store_true",
        help="talk, through the model's chat template: a line of stdin is a question; or only that of -p or -f",
    )  # fmt: skip
    group.add_argument("--system", metavar="TEXT", help="the conversation's system message")
    add_dial_flags(parser)
    add_speculation_flags(parser)
    add_memory_flags(parser)
    group = parser.add_argument_group("session")
    group.add_argument("--session", type=Path, metavar="FILE", help="continue a saved session")
    group.add_argument("--save-session", type=Path, metavar="FILE", help="save the state of the text")
    add_runtime_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", choices=("text", "json"), default="text", help="json: one document at the end")
    group.add_argument("--stats", action="store_true", help="with --expert-ram: what it read and what it waited for")
    group.add_argument("--show-depth", action="store_true", help="mark every token with the loops it took")
    group.add_argument(
        "--show-steps", action="store_true", help="of --board: the board after every step, what changed marked"
    )
    group.add_argument("--show-prompt", action="store_true", help="print the prompt before its continuation")
    group.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto",
        help="of --show-depth; without colour, runs of one depth stand in brackets: [ROM/5][EO/3]",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.show_steps and args.board is None:
        raise UserError("--show-steps: shows the steps of a board; add --board")
    if args.board is not None and args.chat:
        raise UserError("--board: is no question; leave out --chat")
    if args.board is not None:
        refuse_flags_of_texts(args, parser, TEXT_FLAGS, "--board")
    if args.stats and args.expert_ram is None:
        raise UserError("--stats: needs --expert-ram")
    if args.prompt_tokens and args.chat:
        raise UserError("--prompt-tokens: are no question; leave out --chat")
    if args.prefix == "all" and args.session and not args.chat:
        raise UserError("--prefix: the session's text has begun already; leave one of them out")
    if args.system is not None and not args.chat:
        raise UserError("--system: is a message of a conversation; add --chat")
    if args.system is not None and args.session:
        raise UserError("--system: the session's conversation has begun already; leave one of them out")
    args.model = model_folder(args.model)
    return args, parser


def warn(message: str) -> None:
    print(f"rmse-run: {message}", file=sys.stderr)


def read_prompt(args: argparse.Namespace) -> str | None:
    """The text to continue, exactly as given, or nothing (see `begin_of_text`); None where questions come from stdin.

    Raises:
        TextError: the file is missing or not UTF-8.
        UserError: there is no stdin, or, with --chat, nothing but white space.
    """
    if args.prompt_tokens:
        return ""
    if args.prompt is not None:
        text = args.prompt
    elif args.file not in (None, "-"):
        from rmse_edge.text import read_text

        text = read_text(args.file, empty=True)
    elif args.chat and args.file is None:
        return None
    else:
        text = read_stdin()
    if args.chat and not text.strip():  # as blank lines of stdin are none
        raise UserError(NO_QUESTION)
    return text


def read_stdin() -> str:
    """All of stdin, exactly as given."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("no prompt; give --prompt TEXT, --file FILE, or pipe text into stdin")
    from rmse_edge.text import decode_utf8

    return decode_utf8(sys.stdin.buffer.read(), "stdin")


def converse(
    args: argparse.Namespace, conversation: Conversation, resumed: Resumed | None, question: str | None
) -> int | None:
    """--chat: one question, or those of stdin; with a session before and after."""
    from rmse_edge.runtimes.host.session import save_session

    if resumed is not None:
        if not resumed.chat:
            raise UserError("--session: was saved without --chat; leave out --chat to go on with its text")
        conversation.resume(resumed)
    elif args.system is not None:
        conversation.messages.append({"role": "system", "content": args.system})

    def answer(generation: Generation, question: str) -> None:
        show(generation, args)
        finish(generation, question, args)

    def keep() -> None:
        if not args.save_session:
            return
        if not conversation.begun:
            warn(f"{args.save_session}: not saved, nothing was answered")
            return
        save_session(conversation.runtime, args.save_session, *conversation.save())

    try:
        code = talk(conversation, question, answer)
    except UserError:  # such as a question too many for the package: what was said before is kept
        with suppress(UserError):
            keep()
        raise
    keep()
    return code


def show(generation: Generation, args: argparse.Namespace) -> None:
    """Run the model and print the text as it comes, or nothing yet for JSON. Ctrl-C ends the text, not the command."""
    write = (lambda _: 0) if args.output == "json" else sys.stdout.write
    color = sys.stdout.isatty() if args.color == "auto" else args.color == "always"
    marked = DepthWriter(write, generation.runtime.info.max_loops, color) if args.show_depth else None

    def put(spans: Iterator[Span]) -> None:
        for span in spans:
            if marked:
                marked.add(span)
            else:
                write(span.text)
            sys.stdout.flush()

    with suppress(KeyboardInterrupt):
        put(generation.spans(with_prompt=args.show_prompt))
    put(generation.rest(whole=args.chat or not args.save_session))  # a saved session goes on inside a character
    if marked:
        marked.close()


def finish(generation: Generation, prompt: str, args: argparse.Namespace) -> None:
    """The end of the output: one JSON document, or the statistics on stderr."""
    statistics = generation.statistics()
    if args.output == "json":
        document: dict[str, Any] = {
            "text": generation.text,
            "tokens": generation.tokens,
            "depth": generation.depth,
            "prompt": prompt,
        }
        info = generation.runtime.info
        document |= statistics | {
            "model": info.name,
            "runtime": info.target,
            "state_bytes": generation.runtime.state_bytes(),
            "dials": vars(generation.dials),
            "sampling": vars(generation.sampler.sampling),
        }
        if args.expert_ram is not None:
            document["expert_ram"] = expert_figures(generation)
        print(json.dumps(document), flush=True)
        return
    if args.show_depth or not generation.text.endswith("\n"):
        print()
    sys.stdout.flush()
    if "blocks" in statistics:
        lines = blocks.statistics_lines(statistics, ENDED[statistics["finish_reason"]])
    else:
        lines = statistics_lines(statistics)[-1 if args.chat else 0 :]
    if args.show_depth:
        counts = (f"{k}:{count}" for k, count in enumerate(statistics["histogram"], 1) if count)
        lines.append(f"tokens by loops: {' '.join(counts)}")
    lines += speculation_lines(statistics) + retrieval_lines(statistics)
    if args.stats:
        lines += offload_lines(expert_figures(generation))
    print("\n".join(lines), file=sys.stderr)


def expert_figures(generation: Generation) -> dict[str, Any]:
    """What --expert-ram did for the tokens of this text."""
    from rmse_edge.runtimes import LoopRuntime

    assert isinstance(generation.runtime, LoopRuntime)
    figures = generation.runtime.expert_figures(len(generation.prompt) + max(0, len(generation.tokens) - 1))
    assert figures is not None
    return figures


def speculation_lines(s: dict[str, Any]) -> list[str]:
    """How much of its drafts was accepted; nothing without --speculate."""
    if not (found := s.get("speculation")) or not found["rounds"]:
        return []
    source = {"loops": f"with {found['draft_loops']} loops ", "heads": "by heads "}.get(found["drafts"], "")
    lines = [
        f"{found['tokens_per_round']:.2f} tokens per verification; {found['accepted']} of {found['drafted']} drafted {source}accepted"
    ]
    return [*lines, rates_line(found)] if "tokens_per_ms" in found else lines


def retrieval_lines(s: dict[str, Any]) -> list[str]:
    """What was looked up and why, one line for each time; nothing without a knowledge base."""
    if "consultations" not in s:
        return []
    lines = [f"asked the knowledge base {len(s['consultations'])} times at {s['surprises_heard']} chances"]
    for found in s["consultations"]:
        hits = "; ".join(f"{hit['source']} ({hit['score']:.2f})" for hit in found["hits"]) or "nothing found"
        expected = plain(f"{found['mean']:.3f} ± {found['std']:.3f} expected", sys.stderr)
        lines.append(f"  at token {found['position']}: surprise {found['value']:.3f}, {expected}: {hits}")
    return lines


def statistics_lines(s: dict[str, Any]) -> list[str]:
    """The statistics in two readable lines, or one when no token was made."""
    if s["mean_loops"] is None:
        return [f"prompt {s['prompt_tokens']} tokens; stopped before the first new token"]
    ended = ENDED[s["finish_reason"]]
    speed = f" at {s['tokens_per_s']:.1f} tokens/s" if s["tokens_per_s"] else ""
    return [
        f"prompt {s['prompt_tokens']} tokens at {s['prompt_tokens_per_s']:.1f} tokens/s, "
        f"{s['prompt_mean_loops']:.2f} loops on average; first token after {1000 * s['time_to_first_token_s']:.0f} ms",
        f"generated {s['generated_tokens']} tokens{speed}, {s['mean_loops']:.2f} of {s['max_loops']} loops on average, "
        f"{s['iterations_saved']:.0%} of the iterations saved{ended}",
    ]


if __name__ == "__main__":
    sys.exit(main())
