"""Write HRM-Text as llama.cpp runs it: a GGUF with random weights, every matrix in Q4_0, no vocabulary.

A program of llama.cpp's environment, as benchmarks/twin_gguf.py: python -m benchmarks.hrm_text_gguf SHAPE FILE, where SHAPE is an
`HrmText` in JSON. The file has the layers of the fast stack, then those of the slow one; what it calls blocks are calls of
layers, each of which has keys and values of its own (`vendor/llama.cpp/src/models/hrm-text.cpp` of llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import json
import sys
from typing import Any

from .twin_gguf import RandomWriter

ARCHITECTURE = "hrm_text"


def write_hrm_text(shape: dict[str, Any], path: str) -> None:
    """
    Args:
        shape: the fields of an `HrmText`.
    """
    width, ffn, vocab, layers = shape["width"], shape["ffn"], shape["vocab"], shape["layers"]
    calls = layers * shape["cycles"] * (shape["fast"] + 1)
    writer = RandomWriter(path, ARCHITECTURE, f"HRM-Text, width {width}", shape, calls)
    writer.add_embedding_scale(width**0.5)
    for key, count in (("layers_per_stack", layers), ("h_cycles", shape["cycles"]), ("l_cycles", shape["fast"])):
        writer.add_uint32(f"{ARCHITECTURE}.hrm.{key}", count)
    writer.add_bool(f"{ARCHITECTURE}.hrm.prefix_lm", False)
    writer.matrix("token_embd", vocab, width)
    writer.matrix("output", vocab, width)
    writer.vector("hrm.z_l_init", lambda random: random.standard_normal(width), width)
    for layer in range(2 * layers):
        for part in ("q", "k", "v", "gate", "output"):
            writer.matrix(f"blk.{layer}.attn_{part}", width, width)
        writer.matrix(f"blk.{layer}.ffn_gate", ffn, width)
        writer.matrix(f"blk.{layer}.ffn_up", ffn, width)
        writer.matrix(f"blk.{layer}.ffn_down", width, ffn)
    writer.finish()


if __name__ == "__main__":
    write_hrm_text(json.loads(sys.argv[1]), sys.argv[2])
