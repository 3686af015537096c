"""Answers in OpenAI's shapes. Beyond these, a choice has `depth`, the loops behind each token, `tokens`, their ids, and `spans`,
the text in pieces of one depth each; in a stream every chunk has those of its own, which together are the same lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rmse_edge.info import ModelInfo

from .engine import Finished, Job, Model, Piece, Started

# Why texts end, in OpenAI's words.
REASONS = {"eos": "stop", "stop": "stop", "length": "length", "max_seq_len": "length"}
LOOPS = ("mean_loops", "prompt_mean_loops", "max_loops", "iterations_saved", "histogram")
RETRIEVAL = ("surprises_heard", "consultations", "retrieval_failed")


def answer_id(job: Job) -> str:
    return f"{'chatcmpl' if job.asked.kind == 'chat' else 'cmpl'}-{job.id}"


def _head(job: Job, model: Model, chunk: bool) -> dict[str, Any]:
    kind = "text_completion" if job.asked.kind == "text" else "chat.completion" + ".chunk" * chunk
    return {
        "id": answer_id(job),
        "object": kind,
        "created": job.created,
        "model": model.name,
        "system_fingerprint": model.runtime.info.fingerprint[:16] or None,
        "seed": job.asked.sampling.seed,
    }


def _made(pieces: Sequence[Piece]) -> dict[str, Any]:
    return {
        "depth": [depth for piece in pieces for depth in piece.depth],
        "tokens": [token for piece in pieces for token in piece.tokens],
        "spans": [{"text": span.text, "depth": span.depth} for piece in pieces for span in piece.spans],
    }


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(span.text for piece in pieces for span in piece.spans)


def _loops(finished: Finished) -> dict[str, Any]:
    found = {"loops": {name: finished.statistics[name] for name in LOOPS}}
    if "speculation" in finished.statistics:
        found["speculation"] = finished.statistics["speculation"]
    if "consultations" in finished.statistics:
        found["retrieval"] = {name: finished.statistics[name] for name in RETRIEVAL}
    return found


def usage(started: Started, finished: Finished) -> dict[str, Any]:
    made = finished.statistics["generated_tokens"]
    return {
        "prompt_tokens": started.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": started.prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": started.cached_tokens},
    }


def whole(job: Job, model: Model, started: Started, pieces: Sequence[Piece], finished: Finished) -> dict[str, Any]:
    """An answer in one document."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": REASONS[finished.reason], "logprobs": None}
    if job.asked.kind == "chat":
        choice["message"] = {"role": "assistant", "content": _text(pieces), "refusal": None}
    else:
        choice["text"] = _text(pieces)
    choice |= _made(pieces)
    return _head(job, model, False) | {"choices": [choice], "usage": usage(started, finished)} | _loops(finished)


def opening(job: Job, model: Model) -> dict[str, Any]:
    """The first chunk of a chat: who speaks."""
    return _chunk(job, model, {"role": "assistant", "content": ""}, (), None)


def chunk(job: Job, model: Model, piece: Piece) -> dict[str, Any]:
    text = _text([piece])
    return _chunk(job, model, {"content": text} if job.asked.kind == "chat" else text, [piece], None)


def last_chunk(job: Job, model: Model, finished: Finished) -> dict[str, Any]:
    said: Any = {} if job.asked.kind == "chat" else ""
    return _chunk(job, model, said, (), REASONS[finished.reason]) | _loops(finished)


def usage_chunk(job: Job, model: Model, started: Started, finished: Finished) -> dict[str, Any]:
    """What `stream_options.include_usage` asks for."""
    return _head(job, model, True) | {"choices": [], "usage": usage(started, finished)}


def _chunk(job: Job, model: Model, said: Any, pieces: Sequence[Piece], reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": reason, "logprobs": None} | _made(pieces)
    choice["delta" if job.asked.kind == "chat" else "text"] = said
    return _head(job, model, True) | {"choices": [choice]}


def described(model: Model, created: int) -> dict[str, Any]:
    """A model as `/v1/models` lists it, with what clients need to know of its loops."""
    info: ModelInfo = model.runtime.info
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "rmse-edge",
        "model_type": info.model_type,
        "runtime": info.target,
        "quant": info.quant,
        "parameters": info.parameters,
        "max_loops": info.max_loops,
        "rules": list(info.rules),
        "dials": vars(info.dials),
        "chat": model.template is not None,
        "max_prompt_tokens": model.max_prompt_tokens,
        "max_tokens": model.max_new_tokens,
    }
