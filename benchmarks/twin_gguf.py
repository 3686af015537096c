"""Write the dense twin: a GGUF of the llama architecture with random weights, every matrix in Q4_0, no vocabulary.

A program of llama.cpp's environment, which has the `gguf` package: python -m benchmarks.twin_gguf SHAPE FILE, where SHAPE
is a `Twin` in JSON. llama.cpp would keep the output matrix in Q6_K; here it is Q4_0 like the rest, the smallest that a
user could deploy.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import gguf
import numpy as np

Q4_0 = gguf.GGMLQuantizationType.Q4_0


def write_twin(shape: dict[str, Any], path: str, seed: int = 0) -> None:
    """
    Args:
        shape: the fields of a `Twin`: width, ffn, layers, heads, vocab, context (positions at most).
    """
    random = np.random.default_rng(seed)
    width, ffn, vocab = shape["width"], shape["ffn"], shape["vocab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"dense twin, width {width}")
    writer.add_context_length(shape["context"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(shape["layers"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["heads"])
    writer.add_rope_dimension_count(width // shape["heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    def matrix(name: str, rows: int, columns: int) -> None:
        weights = random.standard_normal((rows, columns), np.float32) * columns**-0.5
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weights, Q4_0), raw_dtype=Q4_0)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    matrix("token_embd", vocab, width)
    for layer in range(shape["layers"]):
        norm(f"blk.{layer}.attn_norm")
        for part in ("q", "k", "v", "output"):
            matrix(f"blk.{layer}.attn_{part}", width, width)
        norm(f"blk.{layer}.ffn_norm")
        matrix(f"blk.{layer}.ffn_gate", ffn, width)
        matrix(f"blk.{layer}.ffn_up", ffn, width)
        matrix(f"blk.{layer}.ffn_down", width, ffn)
    norm("output_norm")
    matrix("output", vocab, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write_twin(json.loads(sys.argv[1]), sys.argv[2])
