"""The socket and the web server."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from rmse_edge.errors import UserError

from .engine import Engine

GRACE_SECONDS = 5  # for answers that are under way when the server ends; they are ended at their next token


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the address is in use, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{host}:{port}: cannot be listened on ({reason}); choose another address or port") from None
    return made


class Server(uvicorn.Server):
    """Ends the engine, if there is one, before it waits for the connections: they wait for the engine."""

    def __init__(self, config: uvicorn.Config, engine: Engine | None, begun: Callable[[], object]) -> None:
        super().__init__(config)
        self.engine, self.begun = engine, begun

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.begun()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.engine is not None:
            self.engine.close()
        await super().shutdown(sockets)


def server(app: ASGIApp, engine: Engine | None, begun: Callable[[], object] = lambda: None) -> Server:
    """Serves where its `run` is told, until a signal or `should_exit` ends it.

    Args:
        engine: that the application asks; None: it asks none.
        begun: called when connections are taken.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=16384,
    )
    return Server(config, engine, begun)
