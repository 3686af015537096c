"""A session on disk: everything a text has left behind, so that it can go on later, in another process or on a phone.

One safetensors file: the KV ring, the neural memory, the segment it has not yet learned, the hits in force, and, in its
header, format version, position, tokens not yet read, the last tokens of the text (a character may have begun), the
conversation where it is one, the model's fingerprint and a SHA-256 over all tensors. A session made on a checkpoint goes on
in a package of it, and the other way round.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rmse_edge.errors import UserError
from rmse_edge.files import kind_of, new_file
from rmse_edge.schema import Expected, Name, validated

from .base import Arrays
from .tail import BEGINNING, Tail
from .text import LoopRuntime

FORMAT = "rmse-edge session"
VERSION = "3"


class SessionError(UserError):
    """A session file is missing, damaged, of another version, or of another model."""


class Resumed(NamedTuple):
    """What a session says beside the runtime's state."""

    pending: list[int]  # tokens of the text that were not fed yet: what is fed next begins with them
    tail: Tail  # where the text has got to, the pending tokens included
    chat: str  # what `rmse_edge.chat` keeps of a conversation; empty: the text is none


def save_session(
    runtime: LoopRuntime, path: str | Path, pending: Sequence[int] = (), tail: Tail = BEGINNING, chat: str = ""
) -> None:
    """Write the runtime's state to `path`, whole or not at all; only its owner may read it.

    Args:
        pending: tokens that belong to the text but were not fed yet, such as the last one generated.
        tail, chat: as in `Resumed`.
    Raises:
        SessionError: the file cannot be written, or something that is no regular file stands there; nothing was changed.
    """
    path = Path(path)
    if not runtime.whole:
        raise SessionError(
            f"{path}: not saved, since the text was broken off while the model was reading; run it again"
        )
    tensors = {name: np.ascontiguousarray(array) for name, array in runtime.tensors().items()}
    header = {"format": FORMAT, "version": VERSION, "model": runtime.info.fingerprint, "name": runtime.info.name,
              "position": str(runtime.position), "pending": " ".join(map(str, pending)),
              "context": " ".join(map(str, tail.context)), "open": " ".join(map(str, tail.open)), "chat": chat}  # fmt: skip
    header["sha256"] = digest(tensors, header)
    with new_file(path, SessionError, mode=0o600) as part:
        save_file(tensors, part, metadata=header)


def restore_session(runtime: LoopRuntime, path: str | Path) -> Resumed:
    """Put a saved session into `runtime`, in place of what it was fed.

    Raises:
        SessionError: the file is not a session of this version and this model, or it is damaged; nothing was changed.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, False also for a name that is too long
        what = f"is {kind_of(path)}, expected a file" if os.path.exists(path) else "no such session file"
        raise SessionError(f"{path}: {what}; make one with rmse-run --save-session")
    known: dict[str, Form] = {}
    found: dict[str, Form] = {}
    tensors: Arrays | None = None
    try:
        with safe_open(path, framework="numpy") as file:
            values = file.metadata() or {}
            if values.get("format") != FORMAT:
                raise SessionError(f"{path}: not a session file; make one with rmse-run --save-session")
            if values.get("version") != VERSION:
                raise SessionError(
                    f"{path}: session version {values.get('version')}, this rmse-edge reads {VERSION}; start a new one"
                )
            header = validated(Header, values, str(path), SessionError, "start a new session")
            known = {**runtime.forms(_position(path, header, runtime))}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            found = {name: (tuple(s.get_shape()), TYPES.get(s.get_dtype())) for name, s in slices.items()}
            if found == known:  # so that no more is read than the model keeps anyway
                tensors = {name: file.get_tensor(name) for name in found}
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise SessionError(f"{path}: damaged ({reason}); start a new session") from None
    if tensors is not None and values.get("sha256") != digest(tensors, values):
        raise SessionError(f"{path}: its SHA-256 does not fit; the file is damaged, start a new session")
    if not runtime.info.fingerprint or header.model != runtime.info.fingerprint:
        raise SessionError(
            f"{path}: a session of another model ({header.name}), not of {runtime.info.name}; start a new one"
        )
    if tensors is None:
        wrong = next(name for name in sorted(known | found) if known.get(name) != found.get(name))
        got, expected = (_form(forms.get(wrong)) for forms in (found, known))
        raise SessionError(
            f"{path}: its tensors are not those of {runtime.info.name} ({wrong}: got {got}, expected {expected}); "
            "start a new session"
        )
    for name, array in tensors.items():
        finite = np.isfinite(array) if array.dtype.kind == "f" else array.view(np.uint8) <= 1
        if array.dtype.kind in "fb" and not finite.all():
            what = "numbers that are not finite" if array.dtype.kind == "f" else "flags that are neither true nor false"
            raise SessionError(f"{path}: {name}: holds {what}; start a new session")
    pending, context, begun = ([int(t) for t in getattr(header, k).split()] for k in ("pending", "context", "open"))
    for name, tokens in (("pending", pending), ("context", context), ("open", begun)):
        if beyond := [token for token in tokens if token >= runtime.info.vocab_size]:
            raise SessionError(
                f"{path}: {name}: got token {beyond[0]}, expected some below {runtime.info.vocab_size}; start a new session"
            )
    runtime.restore(int(header.position), tensors)
    return Resumed(pending, Tail(tuple(context), tuple(begun)), header.chat)


def _position(path: Path, header: Header, runtime: LoopRuntime) -> int:
    """Where the text has got to.

    Raises:
        SessionError: further than the model's state goes.
    """
    position, most = int(header.position), runtime.info.longest
    if most is not None and position > most:
        raise SessionError(
            f"{path}: position: got {position}, and {runtime.info.name} takes {most} tokens at most; start a new session"
        )
    return position


Tokens = Annotated[str, Field(pattern="^([0-9]{1,9}( [0-9]{1,9})*)?$"), Expected("tokens")]


@dataclass(frozen=True)
class Header:
    """What a session's file says beside its tensors."""

    model: Name  # fingerprint
    position: Annotated[str, Field(pattern="^[0-9]{1,15}$"), Expected("a number of tokens")]
    name: Annotated[str, Field(max_length=200)] = ""
    pending: Tokens = ""
    context: Tokens = ""  # with `open`, see Tail
    open: Tokens = ""
    chat: str = ""


# The names that safetensors has for types.
TYPES: dict[str, np.dtype] = {
    "F32": np.dtype("float32"), "F16": np.dtype("float16"), "I8": np.dtype("int8"), "I64": np.dtype("int64"),
    "BOOL": np.dtype("bool"),
}  # fmt: skip


Form = tuple[tuple[int, ...], np.dtype | None]  # shape and type; None: a type that no session has


def _form(form: Form | None) -> str:
    return "none" if form is None else f"{list(form[0])} {form[1] or 'of another type'}"


def digest(tensors: Arrays, header: Mapping[str, str]) -> str:
    """SHA-256 over the header without its own hash and all tensors, in an order and a form that every language writes alike.

    Of each entry of the header, by name: `NAME BYTES`, a line break, its value in UTF-8, a line break; BYTES is the value's
    length. Then of each tensor, by name: `NAME TYPE SIZExSIZE...`, a line break, its bytes in C order, a line break. Names are
    ASCII, types those of NumPy.
    """
    found = hashlib.sha256()
    for name, text in sorted(header.items()):
        if name != "sha256":
            value = text.encode()
            found.update(b"%s %d\n%s\n" % (name.encode(), len(value), value))
    for name, array in sorted(tensors.items()):
        found.update(f"{name} {array.dtype} {'x'.join(map(str, array.shape))}\n".encode())
        found.update(np.ascontiguousarray(array).tobytes() + b"\n")
    return found.hexdigest()
