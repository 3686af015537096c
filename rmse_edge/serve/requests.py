"""Requests as OpenAI's clients send them, checked; every field is known or refused.

Beyond OpenAI's there are `top_k`, `ignore_eos`, `prefix`, `speculate`, `draft_tokens` and every dial of the model by its name (`exit_threshold`, ...).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from rmse_edge.errors import ArgumentError
from rmse_edge.info import ModelInfo
from rmse_edge.loop.dials import DIALS, Dials
from rmse_edge.numbers import DRAFT_TOKENS, Token
from rmse_edge.runtimes.text.sampling import Sampling
from rmse_edge.runtimes.text.speculation import Speculation
from rmse_edge.runtimes.text.writer import MAX_NEW_TOKENS
from rmse_edge.schema import Expected, Name, check_value, first_of, parse_json

from .errors import RequestError, refused


class Part(TypedDict):
    """Of a message that has several."""

    type: Literal["text"]
    text: str


class Message(TypedDict):
    """Of a conversation. Its template says which roles it takes, and in what order."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str | list[Part], Expected("text, or a list of parts of text")]
    name: NotRequired[str]


class StreamOptions(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    include_usage: NotRequired[bool]


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Some = Annotated[tuple[Stop, ...], Field(max_length=16)]
# Token ids are checked against the vocabulary where they are fed; a list of one prompt is what some clients make of any.
Prompt = Annotated[
    str | tuple[Token, ...] | tuple[str] | tuple[tuple[Token, ...]],
    Expected("text, or a list of token ids (one prompt a request)"),
]

COMMON: dict[str, Any] = {
    "model": Name,
    "max_tokens": Count,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "seed": int,
    "stop": Annotated[Stop | Some, Expected("a text to stop at, or a list of up to 16")],
    "stream": bool,
    "stream_options": StreamOptions,
    "ignore_eos": bool,
    "prefix": Literal["all", "none"],
    "speculate": Annotated[int | Literal["heads", "auto"], Expected("a number of loops, heads or auto")],
    "draft_tokens": int,
    "user": str,
    **{name: int if dial.dtype == "int64" else float for name, dial in DIALS.items()},
}
FIELDS: dict[str, dict[str, Any]] = {
    "text": COMMON | {"prompt": Prompt, "echo": bool},
    "chat": COMMON
    | {
        "messages": Annotated[tuple[Message, ...], Field(min_length=1, max_length=10_000)],
        "max_completion_tokens": Count,
    },
}
# Fields of OpenAI's that are known here at one value alone: at it, they change nothing.
NEUTRAL: dict[str, Any] = {
    "n": 1, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "logprobs": False, "suffix": "",
    "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "service_tier": "auto",
    "modalities": ["text"], "metadata": {},
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request that was found in order."""

    kind: Literal["text", "chat"]
    prompt: str | tuple[int, ...]  # of a chat nothing
    messages: tuple[dict[str, str], ...]  # of a text none
    dials: Dials
    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]
    ignore_eos: bool
    prefix: bool | None
    echo: bool
    stream: bool
    include_usage: bool
    speculation: Speculation | None


def read_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a request, without its fields that are null: they are as good as left out.

    Raises:
        RequestError: it is none.
    """
    value = parse_json(data, "the request", RequestError, "send a JSON object")
    if not isinstance(value, dict):
        raise RequestError("the request: not a JSON object; send one")
    return {name: member for name, member in value.items() if member is not None}


def read_request(data: bytes, kind: Literal["text", "chat"], info: ModelInfo, name: str, most: int) -> Asked:
    """What the body of a request asks for.

    Args:
        name: of the model that is served.
        most: tokens that one answer may have.
    Raises:
        RequestError: naming the field that is wrong, unknown, missing or not supported.
    """
    body, fields = read_body(data), FIELDS[kind]
    for field, neutral in NEUTRAL.items():
        if field in body and (value := body.pop(field)) != neutral:
            said = (
                "is not supported" if neutral in ("", [], {}, False) else f"got {value!r:.60}, supported is {neutral!r}"
            )
            raise RequestError(f"{field}: {said}; leave it out", param=field, code="unsupported_value")
    if (unknown := first_of(body, fields)) is not None:
        raise RequestError(
            f"{unknown[:60]}: unknown field; known: {', '.join(fields)}", param=unknown[:60], code="unknown_parameter"
        )
    for required in ("model", "messages" if kind == "chat" else "prompt"):
        if required not in body:
            raise RequestError(f"{required}: is missing", param=required, code="missing_required_parameter")
    given = {field: checked(fields[field], value, field) for field, value in body.items()}
    if given["model"] != name:
        raise RequestError(
            f"model: {given['model']!r} is not served here; {name!r} is", 404, "model", "model_not_found"
        )
    wanted = given.get("max_completion_tokens", given.get("max_tokens", min(MAX_NEW_TOKENS, most)))
    if wanted > most:
        raise RequestError(
            f"max_tokens: got {wanted}, this server writes {most} at most; ask for fewer", param="max_tokens"
        )
    try:
        dials = info.dials_asked({dial: given.get(dial) for dial in DIALS})
        sampling = Sampling(
            given.get("temperature", Sampling.temperature),
            given.get("top_k", Sampling.top_k),
            given.get("top_p", Sampling.top_p),
            given.get("seed", secrets.randbits(53)),  # which JavaScript's numbers hold
        )
        speculation = None
        if "speculate" in given:
            speculation = Speculation(given["speculate"], given.get("draft_tokens", DRAFT_TOKENS))
        elif "draft_tokens" in given:
            raise ArgumentError("draft_tokens", "needs speculate, where drafts come from")
    except ArgumentError as error:
        raise refused(error) from None
    stop, prefix = given.get("stop", ()), given.get("prefix")
    return Asked(
        kind,
        the_prompt(given["prompt"]) if kind == "text" else "",
        tuple(plain(message) for message in given.get("messages", ())),
        dials,
        sampling,
        wanted,
        (stop,) if isinstance(stop, str) else stop,
        given.get("ignore_eos", False),
        None if prefix is None else prefix == "all",
        given.get("echo", False),
        given.get("stream", False),
        given.get("stream_options", {}).get("include_usage", False),
        speculation,
    )


def read_dials(data: bytes, info: ModelInfo, before: Dials) -> Dials:
    """The dials of a text that is being written, some of them turned.

    Raises:
        RequestError: naming the field.
    """
    body = read_body(data)
    if (unknown := first_of(body, DIALS)) is not None:
        raise RequestError(f"{unknown[:60]}: is no dial; known: {', '.join(DIALS)}", param=unknown[:60])
    given = {field: checked(COMMON[field], value, field) for field, value in body.items()}
    try:
        info.dials_asked(given)
        return before.changed(info.max_loops, info.untrained, **given)
    except ArgumentError as error:
        raise refused(error) from None


def checked(kind: Any, value: Any, field: str) -> Any:
    """`value`, if it fits the field.

    Raises:
        RequestError: naming the field.
    """
    try:
        return check_value(kind, value, field, RequestError)
    except RequestError as error:
        raise RequestError(str(error), param=field, code="invalid_type") from None


def the_prompt(prompt: Any) -> str | tuple[int, ...]:
    """The only prompt of a request.

    Raises:
        RequestError: it is a list without a token.
    """
    if isinstance(prompt, tuple) and prompt and isinstance(prompt[0], str | tuple):
        prompt = prompt[0]
    if prompt == ():
        raise RequestError("prompt: an empty list; give text, or at least one token id", param="prompt")
    return prompt


def plain(message: Mapping[str, Any]) -> dict[str, str]:
    """A message as templates take it: its content one text."""
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {"role": message["role"], "content": text}
