"""The routes: what comes in over HTTP, and what goes out."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import answers
from .engine import Engine, Event, Finished, Job, Piece, Started
from .errors import RequestError
from .metrics import CONTENT_TYPE, Metrics
from .requests import read_dials, read_request

PAGE = Path(__file__).parent / "page"
OPEN = ("/v1/", "/metrics")  # what an API key is asked for; the page itself and /health say nothing of anybody's
COUNTED = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
BODY_SECONDS = 30.0  # in which the body of a request must have come
# The page loads nothing from elsewhere, and no other page may show it.
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """Asks for the API key, for a name of this machine in `Host`, and puts headers on every answer.

    Without a key the server is this machine's alone. Pages from elsewhere, which a browser on it shows, could ask through a
    name of their own that leads here: so only the names that are known are answered to. And their requests of type
    application/json are not sent, since nothing here allows them to be.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, keys: Collection[str], hosts: Collection[str]) -> None:
        """
        Args:
            keys: each of them will do; none: nobody is asked.
            hosts: names that are answered to; none: all.
        """
        self.app, self.metrics = app, metrics
        self.keys, self.hosts = [key.encode() for key in keys], frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                # What was asked for by names that nobody can count is one path.
                path = scope["path"] if scope["path"] in COUNTED else "other"
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        app: ASGIApp = self.app
        try:
            self.check(scope["path"], Headers(scope=scope))
        except RequestError as error:
            app = failure(error)
        await app(scope, receive, counted)

    def check(self, path: str, headers: Headers) -> None:
        """
        Raises:
            RequestError: the request is not to be answered.
        """
        if self.hosts:
            host = urlsplit(f"//{headers.get('host', '')}").hostname
            if host not in self.hosts:
                raise RequestError(f"Host: {host!r} is no name of this server; call it {min(self.hosts)}", 421)
        if self.keys and path.startswith(OPEN):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # All are compared, in a time that says nothing of how much was right.
            fits = [hmac.compare_digest(given.strip().encode(), key) for key in self.keys]
            if scheme.lower() != "bearer" or not any(fits):
                raise RequestError(
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY", 401, code="invalid_api_key"
                )


def failure(error: RequestError) -> JSONResponse:
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}, 503: {"retry-after": "1"}}
    return JSONResponse(error.document(), error.status, headers.get(error.status))


class Events(StreamingResponse):
    """Server-sent events of a job, which is left when the client leaves."""

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()


class Api:
    """What the routes do."""

    def __init__(self, engine: Engine, max_body: int) -> None:
        """
        Args:
            max_body: bytes of a request at most.
        """
        self.engine, self.model, self.max_body = engine, engine.model, max_body
        self.metrics = Metrics(engine)
        self.begun = int(time.time())
        engine.on_event = self.metrics.heard

    # ------------------------------------------------------------------------------------------------- routes

    async def page(self, request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def health(self, request: Request) -> Response:
        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def metered(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [answers.described(self.model, self.begun)]})

    async def a_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.model.name:
            raise RequestError(
                f"model: {name!r} is not served here; {self.model.name!r} is", 404, code="model_not_found"
            )
        return JSONResponse(answers.described(self.model, self.begun))

    async def completions(self, request: Request) -> Response:
        return await self.answer(request, "text")

    async def chat(self, request: Request) -> Response:
        return await self.answer(request, "chat")

    async def turn(self, request: Request) -> Response:
        """Turn dials of an answer while it is written."""
        job = self.engine.jobs.get(request.path_params["name"].rpartition("-")[2])
        if job is None:
            raise RequestError("no such answer is being written", 404)
        job.turn(read_dials(await self.body(request), self.model.runtime.info, job.dials))
        return JSONResponse({"id": answers.answer_id(job), "dials": vars(job.dials)})

    # ------------------------------------------------------------------------------------------------- an answer

    async def answer(self, request: Request, kind: Literal["text", "chat"]) -> Response:
        model = self.model
        if kind == "chat" and model.template is None:
            raise RequestError(model.no_template, param="messages", code="no_chat_template")
        asked = read_request(await self.body(request), kind, model.runtime.info, model.name, model.max_new_tokens)
        job, begun = Job(asked), time.perf_counter()
        self.engine.submit(job)

        def leave() -> None:
            self.engine.leave(job)
            self.metrics.seconds.observe(time.perf_counter() - begun)

        try:
            first = await unless_left(request, job.events.get())
            assert isinstance(first, Started)
            if asked.stream:
                return Events(self.events(job, first), leave)
            pieces: list[Piece] = []
            while isinstance(event := await unless_left(request, job.events.get()), Piece):
                pieces.append(event)
            assert isinstance(event, Finished)
        except BaseException:
            leave()
            raise
        leave()
        return JSONResponse(answers.whole(job, model, first, pieces, event))

    async def events(self, job: Job, started: Started) -> AsyncIterator[str]:
        model = self.model
        if job.asked.kind == "chat":
            yield sent(answers.opening(job, model))
        while isinstance(event := await job.events.get(), Piece):
            burst = [sent(answers.chunk(job, model, event))]
            # What is there already goes out at once, and the next wait lets the loop see whether the client has left.
            while not job.events.empty() and isinstance(event := job.events.get_nowait(), Piece):
                burst.append(sent(answers.chunk(job, model, event)))
            yield "".join(burst)
            if not isinstance(event, Piece):
                break
        if isinstance(event, RequestError):
            yield sent(event.document())
            return
        assert isinstance(event, Finished)
        yield sent(answers.last_chunk(job, model, event))
        if job.asked.include_usage:
            yield sent(answers.usage_chunk(job, model, started, event))
        yield "data: [DONE]\n\n"

    async def body(self, request: Request) -> bytes:
        """The JSON of a request.

        Raises:
            RequestError: it is too large, of another type, or does not come.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(f"Content-Type: got {kind[:60] or 'none'}, expected application/json", 415)
        found = bytearray()
        too_large = RequestError(
            f"the request: larger than {self.max_body} bytes; send less", 413, code="request_too_large"
        )
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.max_body:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    found += part
                    if len(found) > self.max_body:
                        raise too_large
        except TimeoutError:
            raise RequestError(f"the request: not there after {BODY_SECONDS:.0f} s", 408) from None
        return bytes(found)


def sent(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, separators=(',', ':'))}\n\n"


async def unless_left(request: Request, event: Awaitable[Event]) -> Event:
    """The next event of a job.

    Raises:
        ClientDisconnect: nobody waits for it any more.
        RequestError: it is one.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    next_event, leaving = asyncio.ensure_future(event), asyncio.ensure_future(left())
    try:
        await asyncio.wait({next_event, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not next_event.done():
            raise ClientDisconnect
        found = next_event.result()
    finally:
        next_event.cancel()
        leaving.cancel()
    if isinstance(found, RequestError):
        raise found
    return found


def application(
    engine: Engine, keys: Collection[str] = (), hosts: Collection[str] = (), max_body: int = 1 << 20
) -> Starlette:
    """The ASGI application; arguments as of `Guard` and `Api`."""
    api = Api(engine, max_body)

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            status = HTTPStatus(error.status_code)
            error = RequestError(f"{request.method} {request.url.path}: {status.phrase.lower()}", error.status_code)
        assert isinstance(error, RequestError)
        return failure(error)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def broken(request: Request, error: Exception) -> Response:
        return failure(RequestError("the server failed; its log says why", 500, code="internal_error"))

    routes = [
        Route("/health", api.health),
        Route("/metrics", api.metered),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.a_model),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions/{name}", api.turn, methods=["PATCH"]),
        Route("/v1/chat/completions/{name}", api.turn, methods=["PATCH"]),
        Route("/", api.page),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            RequestError: refuse, HTTPException: refuse, ClientDisconnect: gone, Exception: broken,
        },
    )  # fmt: skip
    app.add_middleware(Guard, metrics=api.metrics, keys=keys, hosts=hosts)
    return app
