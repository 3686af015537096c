"""The page in which a browser runs a package by itself: fetches what it needs once, and serves it, with the package.

    python -m rmse_edge.web_demo rmse-shakespeare-onnx.rmse      # http://localhost:8001; in a clone also: python web_demo

Nothing here computes: any server of files will do that knows ranges and sends the headers below. Without them a page is not
isolated, and the model runs on one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rmse_edge.serve
from rmse_edge.archive import is_archive
from rmse_edge.cache import cache_folder
from rmse_edge.cli.common import Parser, existing_path, port, verb
from rmse_edge.errors import UserError
from rmse_edge.package import MANIFEST
from rmse_edge.registries import have, read_lock

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HERE = Path(__file__).resolve().parent
LOCK = HERE / "parts.lock"
PAGE = Path(rmse_edge.serve.__file__).parent / "page"
HEADERS = {
    # Isolated from pages of others, so that threads may share memory.
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "content-security-policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


class Headed:
    """Puts `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import MutableHeaders

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, headed)


def application(package: Path | None, parts: Path) -> Starlette:
    """The page, its parts, and a package: a folder or an archive, which the page loads by itself; None: it is picked."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import FileResponse, HTMLResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    async def index(request: Request) -> Response:
        text = (HERE / "index.html").read_text()
        place = "" if package is None else '<meta name="package" content="package' + "/" * package.is_dir() + '">\n'
        return HTMLResponse(text.replace("<title>", place + "<title>"))

    async def archive(request: Request) -> Response:
        assert package is not None
        return FileResponse(package)

    async def script(request: Request) -> Response:
        name = request.path_params["name"]
        return FileResponse(HERE / f"{name}.js") if name in ("main", "worker") else Response(status_code=404)

    routes: list[Route | Mount] = [Route("/", index)]
    if package is not None and package.is_dir():
        routes.append(Mount("/package", StaticFiles(directory=package)))
    elif package is not None:
        routes.append(Route("/package", archive))
    for path, folder in (("/page", PAGE), ("/parts", parts), ("/host", HERE / "host")):
        routes.append(Mount(path, StaticFiles(directory=folder)))
    routes.append(Route("/{name}.js", script))
    app = Starlette(routes=routes)
    app.add_middleware(Headed)
    return app


def parts_folder() -> Path:
    """Where the parts are kept: of a clone in its `build`, of a wheel in the user's cache."""
    clone = (HERE.parent / "pyproject.toml").is_file()
    return (HERE.parent / "build" if clone else cache_folder()) / "web" / "parts"


def fetched() -> Path:
    """The folder of the parts, each fetched unless it is there.

    Raises:
        UserError: one cannot be fetched, or is another file than `parts.lock` says.
    """
    into = parts_folder()
    for part in read_lock(LOCK).values():
        have(part, into)
    return into


@verb("web_demo")
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="web_demo", description="Serve the page in which a browser runs a package by itself.")
    parser.add_argument("package", type=existing_path, nargs="?", help="NAME.rmse or NAME.rmse.zip, for onnx")
    parser.add_argument("--port", type=port, default=8001, metavar="N", help="8001 by default; 0: any that is free")
    args: argparse.Namespace = parser.parse_args(argv)
    if args.package is not None and not ((args.package / MANIFEST).is_file() or is_archive(args.package)):
        raise UserError(f"{args.package}: is no package; make one with rmse-export")
    try:
        import starlette  # noqa: F401

        from rmse_edge.serve.listen import bind, server
    except ImportError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UserError(f"{error.name} is not installed; install it with: pip install 'rmse-edge[serve]'") from None

    at = bind("127.0.0.1", args.port)
    app = application(args.package, fetched())
    address = f"http://localhost:{at.getsockname()[1]}"
    server(app, None, lambda: print(address, flush=True)).run(sockets=[at])


if __name__ == "__main__":
    raise SystemExit(main())
