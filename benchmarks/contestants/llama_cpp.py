"""llama.cpp on the dense twin, or on a looped model that it knows, through the functions that llama-cpp-python binds: nothing of Python's is timed but the calls.

A program of llama.cpp's environment. As in rmse-bench the last logits of a prompt are computed and all others left out,
decoding is teacher-forced behind a context of `CONTEXT` tokens, and every repetition does the same work.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import llama_cpp

from .protocol import CONTEXT, serve

BATCH = 512  # tokens of a prompt that are computed at once: llama.cpp's own default


class LlamaCpp:
    def __init__(self, model: str, threads: int, positions: int, reads: int | None = None) -> None:
        """
        Args:
            positions: of the longest text.
            reads: bytes of weights that a token is multiplied with; None: those of the file, once.
        """
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {Path(model).name}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = positions
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        # One token reads a single row of the embedding, which is Q4_0: 18 bytes for 32 weights.
        embedding = self.vocabulary * llama_cpp.llama_model_n_embd(self.model) * 18 // 32
        self.bytes = reads or llama_cpp.llama_model_size(self.model) - embedding
        self.facts = {
            "weights": {"loop": 0, "once": self.bytes},
            "parameters": llama_cpp.llama_model_n_params(self.model),
            "system": llama_cpp.llama_print_system_info().decode(),
            "version": llama_cpp.__version__,
        }

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def feed(self, tokens: list[int]) -> None:
        """Tokens behind those that were fed before, at most `BATCH`; the logits of the last are there afterwards."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        code = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        llama_cpp.llama_synchronize(self.context)

    def next_token(self) -> int:
        """The likeliest one."""
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return max(range(self.vocabulary), key=logits.__getitem__)

    def measure(self, test: str, tokens: int, loops: int | None) -> dict[str, Any]:
        """`loops` says nothing here."""
        before = CONTEXT if test == "tg" else 0
        ids = [(7919 * i + 13) % self.vocabulary for i in range(before + tokens)]
        self.reset()
        if before:
            self.feed(ids[:before])
        size = 1 if test == "tg" else BATCH
        start = perf_counter()
        for first in range(before, len(ids), size):
            self.feed(ids[first : first + size])
        speed = tokens / (perf_counter() - start)
        read = {"gb_per_s": speed * self.bytes / 1e9} if test == "tg" else {}
        return {"tok_per_s": speed} | read


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """What llama.cpp says, but for warnings and errors (levels 3 and 4 of ggml.h), which the log keeps."""
    if level in (3, 4):
        sys.stderr.write(text.decode(errors="replace"))


llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))


def start(given: dict[str, Any]) -> LlamaCpp:
    return LlamaCpp(**given)


if __name__ == "__main__":
    serve(start)
