"""rmse-serve: a package or a checkpoint behind OpenAI's HTTP interface, and a page to type into."""

from __future__ import annotations

import argparse
import ipaddress
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rmse_edge.errors import TextError, UserError

from .common import Parser, existing_file, existing_model, model_folder, non_negative_int, port, positive_int, verb
from .flags import add_memory_flags, add_runtime_flags, open_model, prepare_memory

LOCAL = ("127.0.0.1", "::1", "localhost")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@verb("rmse-serve")
def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse(argv)
    keys = read_keys(args.api_key_file) if args.api_key_file else []
    local = is_local(args.host)
    if not local and not keys:
        raise UserError(
            f"--host {args.host}: whoever reaches this machine could use the model; give --api-key-file FILE, with a key a line"
        )
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; install it with: pip install 'rmse-edge[serve]'") from None
    from rmse_edge.chat import ChatTemplate
    from rmse_edge.runtimes import LoopRuntime
    from rmse_edge.runtimes.text.writer import open_tokenizer
    from rmse_edge.serve.app import application
    from rmse_edge.serve.engine import Engine, Model
    from rmse_edge.serve.listen import bind, server

    socket = bind(args.host, args.port)  # before the model is read: that may take a minute
    template, no_template = None, ""
    try:
        template = ChatTemplate.open(args.model)
    except TextError as error:
        no_template = str(error)
    runtime = open_model(args)
    assert isinstance(runtime, LoopRuntime)
    tokenizer = open_tokenizer(args.model, runtime.info.vocab_size, needed=template is not None)
    librarian = prepare_memory(runtime, args, warn)
    name = args.name or runtime.info.name
    model = Model(
        name, runtime, tokenizer, template, no_template, librarian, args.max_prompt_tokens, args.max_new_tokens
    )
    engine = Engine(model, args.queue, args.session_memory)
    app = application(engine, keys, {args.host.lower(), *LOCAL} if local and not keys else (), args.max_body)
    host = f"[{args.host}]" if ":" in args.host else args.host
    address = f"http://{host}:{socket.getsockname()[1]}"
    server(app, engine, lambda: print(f"{name} on {address}", flush=True)).run(sockets=[socket])
    return None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="rmse-serve",
        description="Serve a model over HTTP as OpenAI's clients expect it, and a page to try it with at /.",
    )
    parser.add_argument("model", type=existing_model, help="package (NAME.rmse or NAME.rmse.zip) or checkpoint folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="0: any that is free")
    parser.add_argument(
        "--api-key-file", type=existing_file, metavar="FILE",
        help="keys, one a line, of which clients must send one; needed where others than this machine are let in",
    )  # fmt: skip
    parser.add_argument("--name", help="what clients call the model (default: its own name)")
    group = parser.add_argument_group("limits")
    group.add_argument("--queue", type=non_negative_int, default=64, metavar="N", help="requests that may wait")
    group.add_argument(
        "--max-new-tokens", type=positive_int, default=4096, metavar="N", help="tokens an answer may ask for"
    )
    group.add_argument(
        "--max-prompt-tokens", type=positive_int, default=8192, metavar="N", help="tokens that are read for an answer"
    )
    group.add_argument("--max-body", type=size, default="1M", metavar="SIZE", help="size of a request")
    group.add_argument(
        "--session-memory", type=size, default="256M", metavar="SIZE",
        help="memory for the state of conversations between turns; 0: none is kept",
    )  # fmt: skip
    add_memory_flags(parser)
    add_runtime_flags(parser)
    args = parser.parse_args(argv)
    args.model = model_folder(args.model)
    return args


def warn(message: str) -> None:
    print(f"rmse-serve: {message}", file=sys.stderr)


def size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected bytes such as 300000, 64K, 256M or 1G")
    return int(found[1]) * UNITS[found[2]]


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_keys(path: Path) -> list[str]:
    """The keys of a file, one a line.

    Raises:
        UserError: there is none, or one is too short to be a secret.
    """
    from rmse_edge.text import read_text

    keys = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not keys:
        raise UserError(f"{path}: holds no key; put one a line")
    if short := next((number for number, key in enumerate(keys, 1) if len(key) < 16), None):
        raise UserError(f"{path}: key {short} has less than 16 characters; make one with: openssl rand -hex 16")
    return keys


if __name__ == "__main__":
    sys.exit(main())
