"""`rmse-run --chat`: turns of a conversation, typed at a terminal or piped in, one a line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from rmse_edge.errors import TextError, UserError

from .common import INTERRUPTED, fail

if TYPE_CHECKING:
    from rmse_edge.runtimes.text.conversation import Conversation
    from rmse_edge.runtimes.text.generate import Generation

NO_QUESTION = "no question; give --prompt TEXT or one a line on stdin"
HINT = "Ctrl-C stops an answer, Ctrl-D ends"


def talk(conversation: Conversation, first: str | None, answer: Callable[[Generation, str], object]) -> int | None:
    """Take turns until there are no more.

    Args:
        first: the only question; None: they come from stdin.
        answer: shows the answer to a question as it is made.
    Returns:
        130 where Ctrl-C ended it. At a terminal it ends an answer only, and the conversation where a question is awaited.
    """
    at_terminal = first is None and sys.stdin is not None and sys.stdin.isatty()
    questions = iter([first]) if first is not None else typed() if at_terminal else piped()
    while True:
        try:
            question = next(questions, None)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return INTERRUPTED
        if question is None:
            return None
        try:
            generation = conversation.ask(question)
            answer(generation, question)
        except (
            UserError
        ) as error:  # such as a character that the tokenizer does not know: the next question may be better
            if not at_terminal:
                raise
            fail("rmse-run", str(error))
            continue
        conversation.answered(generation)
        if generation.finish_reason == "interrupted" and not at_terminal:
            return INTERRUPTED


def typed() -> Iterator[str]:
    """Questions from a terminal."""
    with suppress(ImportError):  # not there on every system: lines can then not be edited
        import readline  # noqa: F401
    print(HINT, file=sys.stderr)
    while True:
        try:
            line = ask("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except UnicodeDecodeError as error:
            raise TextError(f"stdin: not UTF-8 at byte {error.start}; set the terminal to UTF-8") from None
        if line.strip():
            yield line


def ask(prompt: str) -> str:
    """A line from a terminal, its prompt not in what is written to a file.

    Raises:
        EOFError: there is none.
    """
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def piped() -> Iterator[str]:
    """Questions from a pipe or file, one a line, blank lines left out.

    Raises:
        UserError: there is none.
    """
    from rmse_edge.text import decode_utf8

    if sys.stdin is None:
        raise UserError(NO_QUESTION)
    asked = False
    for number, raw in enumerate(sys.stdin.buffer, 1):
        line = decode_utf8(raw, f"stdin:{number}").rstrip("\r\n")
        if line.strip():
            asked = True
            yield line
    if not asked:
        raise UserError(NO_QUESTION)
