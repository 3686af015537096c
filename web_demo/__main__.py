"""The page in which a browser runs a package by itself: fetches what it needs once, and serves it, with the package.

    python web_demo rmse-shakespeare-onnx.rmse      # http://localhost:8001

Nothing here computes: any server of files will do that knows ranges and sends the headers below. Without them a page is not
isolated, and the model runs on one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rmse_edge.cli.common import Parser, existing_path, verb
from rmse_edge.errors import UserError
from rmse_edge.serve.listen import bind, server

HERE = Path(__file__).resolve().parent
LOCK = HERE / "parts.lock"
PARTS = HERE.parent / "build" / "web" / "parts"
PAGE = HERE.parent / "rmse_edge" / "serve" / "page"
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
        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, headed)


def application(package: Path | None, parts: Path) -> Starlette:
    """The page, its parts, and a package: a folder or an archive, which the page loads by itself; None: it is picked."""

    async def index(request: Request) -> Response:
        text = (HERE / "index.html").read_text()
        place = "" if package is None else '<meta name="package" content="package' + "/" * package.is_dir() + '">\n'
        return HTMLResponse(text.replace("<title>", place + "<title>"))

    async def archive(request: Request) -> Response:
        assert package is not None
        return FileResponse(package)

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


async def script(request: Request) -> Response:
    name = request.path_params["name"]
    return FileResponse(HERE / f"{name}.js") if name in ("main", "worker") else Response(status_code=404)


def fetched() -> Path:
    """The folder of the parts, each fetched unless it is there.

    Raises:
        UserError: one cannot be fetched, or is another file than `parts.lock` says.
    """
    # The script that fetches the parts of the other app fetches these as well.
    spec = importlib.util.spec_from_file_location("rmse_edge_parts", HERE.parent / "android_demo" / "parts.py")
    assert spec is not None and spec.loader is not None
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for part in script.read_lock(LOCK).values():
        script.have(part, PARTS)
    return PARTS


@verb("web_demo")
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="web_demo", description="Serve the page in which a browser runs a package by itself.")
    parser.add_argument("package", type=existing_path, nargs="?", help="NAME.rmse or NAME.rmse.zip, for onnx")
    parser.add_argument("--port", type=int, default=8001, metavar="N")
    args: argparse.Namespace = parser.parse_args(argv)
    if args.package is not None and args.package.is_dir() and not (args.package / "manifest.json").is_file():
        raise UserError(f"{args.package}: is no package; make one with rmse-export")
    at = bind("127.0.0.1", args.port)
    app = application(args.package, fetched())
    address = f"http://localhost:{at.getsockname()[1]}"
    server(app, None, lambda: print(address, flush=True)).run(sockets=[at])


if __name__ == "__main__":
    raise SystemExit(main())
