"""A real server in a thread of the test, and a model that talks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
from helpers import remembering_model, write_checkpoint
from small_tokenizers import BOS, EOS, byte_level, with_bos

from rmse_edge.chat import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, ChatTemplate, template_source
from rmse_edge.runtimes import LoopRuntime, open_runtime
from rmse_edge.runtimes.text.writer import open_tokenizer
from rmse_edge.serve.app import application
from rmse_edge.serve.engine import Engine, Model
from rmse_edge.serve.listen import bind, server

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAME = "tiny"
LONG = 4000  # tokens that take longer than any test waits


def write_talker(folder: Path) -> Path:
    """A checkpoint with a memory, a tokenizer that begins texts with <s>, and a chat template."""
    write_checkpoint(remembering_model(vocab_size=320, n_experts=4, top_k=2, max_loops=4), folder)
    with_bos(byte_level()).save(str(folder / "tokenizer.json"))
    config = json.loads((folder / TOKENIZER_CONFIG_FILE).read_text())
    (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config | {"bos_token": BOS, "eos_token": EOS}))
    (folder / TEMPLATE_FILE).write_text(CHATML)
    return folder


@dataclass
class Served:
    url: str
    engine: Engine
    stop: Callable[[], None]

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx2.post(
            self.url + path, content=data, headers={"content-type": "application/json", **headers}, timeout=60
        )

    def metric(self, name: str) -> float:
        lines = httpx2.get(self.url + "/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


@contextmanager
def serving(
    folder: Path, queue: int = 64, session_bytes: int = 64 << 20, prompt: int = 4096, **limits: Any
) -> Iterator[Served]:
    """`limits`: of `application`."""
    runtime = open_runtime(folder, threads=1)
    assert isinstance(runtime, LoopRuntime)
    template = ChatTemplate.open(folder) if template_source(folder) else None
    tokenizer = open_tokenizer(folder, runtime.info.vocab_size, needed=template is not None)
    model = Model(NAME, runtime, tokenizer, template, "no template", None, prompt, LONG)
    engine = Engine(model, queue, session_bytes)
    socket, begun = bind("127.0.0.1", 0), threading.Event()
    running = server(application(engine, **limits), engine, begun.set)
    thread = threading.Thread(target=lambda: running.run(sockets=[socket]))
    thread.start()

    def stop() -> None:
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive() and not engine.alive

    try:
        assert begun.wait(30)
        yield Served(f"http://127.0.0.1:{socket.getsockname()[1]}", engine, stop)
    finally:
        stop()


def soon(true: Callable[[], object]) -> None:
    """Wait until something has come true."""
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come true in 30 s")
