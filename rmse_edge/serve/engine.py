"""The one thread that runs the model. Requests wait for it in a bounded line, and each is written from first to last.

A runtime holds one text. What a job makes goes to the event loop of the one who waits for it, in order: `Started`, `Piece`s,
`Finished` or a `RequestError`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rmse_edge.chat import ChatTemplate
from rmse_edge.errors import UserError
from rmse_edge.knowledge import KnowledgeError
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.host.text import LoopRuntime
from rmse_edge.runtimes.text.generate import Generation, Span
from rmse_edge.runtimes.text.librarian import Librarian
from rmse_edge.runtimes.text.sampling import Sampler
from rmse_edge.runtimes.text.writer import Writer
from rmse_edge.text import Tokenizer, TokenNumbers, check_ids

from .errors import RequestError, refused
from .requests import Asked
from .sessions import Sessions

logger = logging.getLogger("rmse_edge.serve")


@dataclass(frozen=True)
class Started:
    """The prompt is in order and about to be read."""

    prompt_tokens: int  # of the whole text, those included that a kept state has read before
    cached_tokens: int


@dataclass(frozen=True)
class Piece:
    """What a token, or a few, became."""

    spans: tuple[Span, ...]
    tokens: tuple[int, ...]
    depth: tuple[int, ...]  # of each token


@dataclass(frozen=True)
class Finished:
    reason: str  # as of `Generation`
    statistics: dict[str, Any]


Event = Started | Piece | Finished | RequestError


@dataclass(eq=False)
class Job:
    """A request on its way; made in the event loop that awaits its events."""

    asked: Asked
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    left: bool = False  # nobody waits any more
    turned: bool = False  # its dials were changed on the way
    generation: Generation | None = None

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.dials = self.asked.dials

    def turn(self, dials: Dials) -> None:
        """Change the dials from the next token on."""
        self.dials, self.turned = dials, True
        if self.generation is not None:
            self.generation.dials = dials

    def tell(self, event: Event) -> None:
        """From the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


@dataclass(frozen=True)
class Model:
    """What is served, and within which limits."""

    name: str
    runtime: LoopRuntime
    tokenizer: Tokenizer | TokenNumbers
    template: ChatTemplate | None
    no_template: str = ""  # why there is none
    librarian: Librarian | None = None
    max_prompt_tokens: int = 8192
    max_new_tokens: int = 4096


class Engine:
    """Serves jobs one after the other until it is closed."""

    def __init__(self, model: Model, queue: int = 64, session_bytes: int = 256 << 20) -> None:
        """
        Args:
            queue: jobs that may wait besides the one that is served.
            session_bytes: memory for conversations between their turns.
        """
        self.model, self.capacity = model, queue
        self.sessions = Sessions(session_bytes)
        self.on_event: Callable[[Job, Event], object] = lambda job, event: None  # in the engine's thread
        self.jobs: dict[str, Job] = {}  # that wait or are served
        self._waiting: deque[Job] = deque()
        self._more = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Put a job into the line.

        Raises:
            RequestError: the line is full, or the server is ending.
        """
        with self._more:
            if self._closed:
                raise closing()
            if len(self.jobs) > self.capacity:
                raise RequestError(
                    f"{len(self._waiting)} requests are waiting, as many as may; try again later",
                    429,
                    code="queue_full",
                )
            self._waiting.append(job)
            self.jobs[job.id] = job
            self._more.notify()

    def leave(self, job: Job) -> None:
        """Nobody waits for a job any more: it is not begun, or ends at its next token. Nothing happens if it has ended."""
        job.left = True
        with self._more:
            if job in self._waiting:
                self._waiting.remove(job)
                self.jobs.pop(job.id, None)

    def close(self) -> None:
        """End the job that is served at its next token, refuse the others, and wait for the thread."""
        with self._more:
            self._closed = True
            for job in self.jobs.values():
                job.left = True
            self._more.notify()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._more:
                while not self._waiting and not self._closed:
                    self._more.wait()
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            try:
                event: Event = closing() if job.left else self._finish(job)
                if isinstance(event, Finished) and event.reason == "interrupted":
                    event = closing()  # or the client left, and nobody hears it
            except RequestError as error:
                event = error
            except KnowledgeError as error:
                event = RequestError(str(error), 503, code="knowledge_base_failed")
            except UserError as error:
                event = refused(error, "messages" if job.asked.kind == "chat" else "prompt")
            except Exception:
                logger.exception("request %s failed", job.id)
                event = RequestError("the server failed; its log says why", 500, code="internal_error")
            with self._more:
                self.jobs.pop(job.id, None)
            job.generation = None
            self.on_event(job, event)
            job.tell(event)

    def _finish(self, job: Job) -> Finished:
        """Serve a job, all but the last event told."""
        model, asked = self.model, job.asked
        if model.librarian is not None:
            model.librarian.begin()
        writer = Writer(
            model.runtime, model.tokenizer, job.dials, Sampler(asked.sampling), asked.max_new_tokens, asked.stop,
            asked.ignore_eos, asked.prefix, model.librarian, asked.speculation,
        )  # fmt: skip
        if asked.kind == "text":
            model.runtime.reset()
            if not isinstance(asked.prompt, str):
                check_ids(list(asked.prompt), model.runtime.info.vocab_size)
            elif isinstance(model.tokenizer, TokenNumbers):
                raise RequestError("prompt: the model has no tokenizer; give a list of token ids", param="prompt")
            return self._write(job, writer.begun(asked.prompt, asked.echo))
        if model.template is None:
            raise RequestError(model.no_template, param="messages", code="no_chat_template")
        *before, question = asked.messages
        if question["role"] != "user":
            raise RequestError("messages: the last one must be the user's", param="messages")
        conversation = writer.conversation(model.template)
        conversation.messages.extend(before)
        key = self._key(asked, job.dials)
        self.sessions.resume(model.runtime, key, conversation, model.template.render(asked.messages))
        generation = conversation.ask(question["content"])
        finished = self._write(job, generation)
        conversation.answered(generation)
        if not job.turned:
            self.sessions.keep(model.runtime, key, conversation)
        return finished

    def _key(self, asked: Asked, dials: Dials) -> Hashable:
        """What a state depends on beside its text."""
        seed = asked.sampling.seed if self.model.runtime.info.noise else 0
        return dials, seed, asked.prefix

    def _write(self, job: Job, generation: Generation) -> Finished:
        cached, longest = self.model.runtime.position, self.model.runtime.info.longest
        whole = cached + len(generation.prompt)
        most = self.model.max_prompt_tokens if longest is None else min(longest, self.model.max_prompt_tokens)
        if whole > most:
            what = "messages" if job.asked.kind == "chat" else "prompt"
            raise RequestError(
                f"{what}: {whole} tokens are more than the {most} that this server reads; shorten it",
                param=what, code="context_length_exceeded",
            )  # fmt: skip
        job.generation = generation
        generation.dials = job.dials  # they may have been turned just now
        self._tell(job, Started(whole, cached))
        told = 0

        def tell(spans: Sequence[Span]) -> None:
            nonlocal told
            made = generation.made[told:]
            told = len(generation.made)
            if spans or made:
                self._tell(job, Piece(tuple(spans), tuple(t for t, _ in made), tuple(d for _, d in made)))

        for piece in generation.pieces(with_prompt=job.asked.echo):
            tell(list(piece))
            if job.left:
                break
        tell(list(generation.rest()))
        return Finished(generation.finish_reason, generation.statistics())

    def _tell(self, job: Job, event: Event) -> None:
        self.on_event(job, event)
        job.tell(event)


def closing() -> RequestError:
    return RequestError("the server is shutting down", 503, code="shutting_down")
