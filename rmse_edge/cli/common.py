"""What every verb shares: one-line errors with an exit code, a parser whose errors are one line, argument types.

    @verb("rmse-thing")
    def main(argv: Sequence[str] | None = None) -> int | None:
        parser = Parser(prog="rmse-thing", description="...")
        parser.add_argument("--count", type=positive_int, default=1)
        args = parser.parse_args(argv)
        ...

The decorated `main` returns the exit code and can be a console script as it is. Verbs import PyTorch and the like inside
`main`, so that `--help` and a mistyped flag answer at once and Ctrl-C during an import is as quiet as later.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from rmse_edge.errors import ArgumentError, UserError
from rmse_edge.files import kind_of
from rmse_edge.progress import Report

USER_ERROR = 2  # exit codes
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE

Main = Callable[[Sequence[str] | None], int | None]
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def verb(name: str) -> Callable[[Main], Callable[..., int]]:
    """Decorator of a verb's `main(argv)`: it returns an exit code, and failures of the user's making are one line."""

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def wrapped(argv: Sequence[str] | None = None) -> int:
            return run_verb(name, main, argv)

        return wrapped

    return decorate


def run_verb(name: str, main: Main, argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` and turn what the user can mend into one line on stderr.

    Returns:
        main's own code (None counts as 0); 2 after a `UserError`, a full disk or a path that cannot be used; 130 after
        Ctrl-C; 141 where the reader of the output went away. Every other exception passes: it is a defect.
    """
    token = PARSER.set(None)
    try:
        with every_character():
            return _run_verb(name, main, argv)
    finally:
        PARSER.reset(token)


@contextmanager
def every_character() -> Iterator[None]:
    """Characters that a terminal or file cannot show are written as escapes (`\\u65e5`), instead of ending the command.

    Which ones those are the system decides: Windows consoles and files have code pages, the C locale is ASCII. Documents
    for programs are safe anyhow, JSON has only ASCII.
    """
    strict = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper) and s.errors != "backslashreplace"]
    before = [stream.errors for stream in strict]
    for stream in strict:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(strict, before):
            with suppress(OSError, ValueError):  # what it still holds cannot be written: that was said already
                stream.reconfigure(errors=errors)


def _run_verb(name: str, main: Main, argv: Sequence[str] | None) -> int:
    try:
        code = main(argv) or 0
        sys.stdout.flush()  # a closed pipe must show here, not at the interpreter's exit
        return code
    except UserError as error:
        return fail(name, in_flags(str(error), error.name if isinstance(error, ArgumentError) else ""))
    except KeyboardInterrupt as interrupt:  # its message, if any, says how to go on
        how = f"; {in_flags(str(interrupt))}" if interrupt.args else ""
        print(f"\n{name}: interrupted{how}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered would raise again at exit: let it go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno in DISK_FULL:
            where = error.filename or "the output"
            return fail(name, f"disk full while writing {where}; free some space or choose another -o")
        if error.filename is None:
            raise
        return fail(name, f"{error.filename}: {(error.strerror or str(error)).lower()}")


def fail(name: str, message: str) -> int:
    """Print `NAME: error: MESSAGE` as one line on stderr and return the exit code of user errors."""
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    print(f"{name}: error: {line}", file=sys.stderr)
    return USER_ERROR


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends "(default: X)" where there is a default worth telling."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with whole flags only and one-line errors, raised as `UserError`; `--help` shows the defaults."""

    def __init__(self, **kwargs: Any) -> None:
        chosen: dict[str, Any] = {"allow_abbrev": False, "formatter_class": Help} | kwargs
        super().__init__(**chosen)
        # Arguments of the library whose flags have another name: {"overwrite": "--force"}.
        self.arguments: dict[str, str] = {}

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        if PARSER.get() is None:
            PARSER.set(self)
        return super().parse_known_args(*args, **kwargs)

    def flags(self) -> dict[str, tuple[str, bool]]:
        """Of every argument that has a flag here: the flag, and whether it takes a value."""
        long = {
            action.dest: next((s for s in action.option_strings if s.startswith("--")), "") for action in self._actions
        }
        takes = {flag: action.nargs != 0 for action in self._actions for flag in action.option_strings}
        return {name: (flag, takes[flag]) for name, flag in (long | self.arguments).items() if flag}

    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL)
        if unknown:
            flag = unknown[1].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1, cutoff=0.7)
            message = f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else "")
        else:
            message = message.removeprefix("argument ").replace("the following arguments are required:", "missing")
        raise UserError(f"{message} (see {self.prog} --help)")


# The parser of the command that runs, from when it has begun to parse.
PARSER: ContextVar[Parser | None] = ContextVar("PARSER", default=None)
SETTING = re.compile(r"(?<![\w./='\"-])([a-z_]+)=(\w+(?:\.\w+)*)")  # NAME=VALUE, as messages of the library give advice


def in_flags(message: str, name: str = "") -> str:
    """A message of the library as the command line says it: with its flags for the arguments that it has flags for.

    >>> in_flags("quant=int8: onnx takes fp32; export with quant=fp32", "quant")  # in rmse-export
    '--quant int8: onnx takes fp32; export with --quant fp32'

    Args:
        name: of the argument that the message begins with, if it does.
    """
    parser = PARSER.get()
    flags = {} if parser is None else parser.flags()

    def flag(match: re.Match[str]) -> str:
        if match[1] not in flags:
            return match[0]
        found, takes_value = flags[match[1]]
        return f"{found} {match[2]}" if takes_value else found

    if name in flags and message.startswith(f"{name}:"):
        message = flags[name][0] + message[len(name) :]
    return SETTING.sub(flag, message)


def random_model(config: Path, seed: int = 0) -> Any:
    """A model with the configuration of a file, of the architecture that it names, and random weights.

    Raises:
        ConfigError: see `read_config`.
    """
    import torch

    from rmse_edge.arch.registry import arch_of, read_config

    found = read_config(config)
    torch.manual_seed(seed)
    return arch_of(found.model_type).build(found)


@contextmanager
def total_bar() -> Iterator[Callable[[float], Report]]:
    """One bar for the whole of a command, on a terminal: what it is doing, how far it is, and how long it has still to go.

    Yields:
        part(share): for the next so much of the command, the `Report` that its parts of known cost tell.
    """
    from tqdm import tqdm

    form = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left"
    tqdm.monitor_interval = (
        0  # no thread that looks after bars: this one is refreshed, and an export copies its process
    )
    with tqdm(total=1.0, bar_format=form, smoothing=0, leave=False, disable=None, file=sys.stderr) as bar:
        begun = 0.0

        def part(share: float) -> Report:
            nonlocal begun
            first, begun = begun, begun + share

            def report(what: str, done: float) -> None:
                bar.set_description_str(what, refresh=False)
                bar.update(max(0.0, first + share * done - bar.n))
                bar.refresh()

            return report

        yield part


# -------------------------------------------------------------------------------------------------- argument types


def _number(kind: type, text: str, ok: Callable[[float], bool], expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not ok(value):  # NaN fails every comparison
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    return value


def positive_int(text: str) -> int:
    return _number(int, text, lambda v: v >= 1, "a whole number of at least 1")


def port(text: str) -> int:
    number = non_negative_int(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number up to 65535")
    return number


def finite_float(text: str) -> float:
    return _number(float, text, math.isfinite, "a number")


def key_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected KEY=VALUE")
    return name, value


def non_negative_int(text: str) -> int:
    return _number(int, text, lambda v: v >= 0, "a whole number of at least 0")


def positive_float(text: str) -> float:
    return _number(float, text, lambda v: 0 < v < math.inf, "a number above 0")


def non_negative_float(text: str) -> float:
    return _number(float, text, lambda v: 0 <= v < math.inf, "a number of at least 0")


def fraction(text: str) -> float:
    return _number(float, text, lambda v: 0 <= v <= 1, "a number between 0 and 1")


def list_of(item: Callable[[str], object]) -> Callable[[str], list]:
    """Comma-separated values of one type: `type=list_of(positive_int)` reads "64,512"."""

    def parse(text: str) -> list:
        return [item(part.strip()) for part in text.split(",")]

    parse.__name__ = f"list of {getattr(item, '__name__', 'values')}"
    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected some of {', '.join(choices)}")
        return text

    return parse


def existing_path(text: str) -> Path:
    """A file or folder that must be there."""
    path = Path(text).expanduser()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return path


def existing_model(text: str) -> Path:
    """A checkpoint or package that must be there, or the name of a shipped model."""
    from rmse_edge.shipped import or_shipped

    return existing_path(str(or_shipped(text)))


def existing_file(text: str) -> Path:
    path = existing_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a folder, expected a file")
    return path


def existing_folder(text: str) -> Path:
    path = existing_path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is {kind_of(path)}, expected a folder")
    return path


def existing_model_folder(text: str) -> Path:
    """A checkpoint folder that must be there, or the name of a shipped model."""
    from rmse_edge.shipped import or_shipped

    return existing_folder(str(or_shipped(text)))


def model_folder(path: Path) -> Path:
    """The folder of a model that was given as a package, a checkpoint or an archive, which is unpacked into the cache.

    Raises:
        UserError: the archive cannot be unpacked.
    """
    from rmse_edge.archive import unpacked

    return unpacked(path)


def output_path(text: str) -> Path:
    """A path to be written: its parent folder must be there, so that a long run does not fail at its end."""
    path = Path(text).expanduser()
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: the folder {path.parent} does not exist; create it first")
    return path
