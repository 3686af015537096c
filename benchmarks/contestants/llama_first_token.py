"""Seconds from opening a model with llama.cpp to its first token: MODEL THREADS TOKENS.

A program of llama.cpp's environment. Python's own start and the import of the bindings are over before the clock starts,
since a program that links llama.cpp has neither.
"""

from __future__ import annotations

import sys
from time import perf_counter

from .llama_cpp import LlamaCpp


def main() -> None:
    model, threads, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    start = perf_counter()
    opened = LlamaCpp(model, threads, 256)
    opened.feed(list(range(1, tokens + 1)))
    opened.next_token()
    print(perf_counter() - start)


if __name__ == "__main__":
    main()
