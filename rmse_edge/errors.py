"""Two families of failure: what the user can mend, and what is ours.

A `UserError` (bad input, bad file, bad flag) is shown as one line that names the thing and the fix; the command line
turns it into exit code 2. Anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Packages that export or inspect warn about much that is their own business; errors still come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: Exception) -> str:
    """What an exception of another package says first; its type, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UserError(Exception):
    """Something the user gave is wrong. The message is one line: what, where, and what to do about it.

    Names that come from a file may hold anything: line breaks become spaces, what a terminal would obey is escaped.
    """

    def __str__(self) -> str:
        return "".join(" " if c in "\r\n\t" else c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


class ArgumentError(UserError):
    """A function was given an argument that does not do: "max_loops: got 9, expected 1..4".

    Messages of the library name arguments as Python does, and advise in the same way ("export with quant=fp32"); the
    command line puts its flags in their place (rmse_edge/cli/common.py).
    """

    def __init__(self, name: str, problem: str, value: object = None) -> None:
        """`value`: where it belongs to the name, as in "quant=int8: onnx takes fp32"."""
        super().__init__(f"{name if value is None else f'{name}={value}'}: {problem}")
        self.name, self.problem, self.value = name, problem, value

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, str, object]]:
        return type(self), (self.name, self.problem, self.value)  # it may come from another process


class ConfigError(UserError):
    """A configuration value is outside what the model supports ("got X, expected Y")."""


class CheckpointError(UserError):
    """A checkpoint folder is missing files, truncated, or holds values that cannot be loaded."""


class PackageError(UserError):
    """A package is missing, damaged, edited, or made for something else."""


class ExportError(UserError):
    """A model cannot be lowered to the chosen target, or the lowered artifact failed its checks."""


class ParityError(ExportError):
    """The exported package does not say what the PyTorch model says."""


class FileError(UserError):
    """A file or folder cannot be written."""


class TextError(UserError):
    """A text file cannot be read, decoded, or expressed in the tokenizer's vocabulary."""
