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
BLOCK, BYTES = gguf.GGML_QUANT_SIZES[Q4_0]  # weights, and what they take with their scale
SPREAD = 4.6  # deviation of the integers -8 to 7, if all are alike


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

    sizes: dict[str, tuple[int, int]] = {}  # of matrices, rows and columns
    norms = ["output_norm"]
    sizes["token_embd"] = vocab, width
    for layer in range(shape["layers"]):
        norms += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
        sizes |= {f"blk.{layer}.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
        sizes |= {f"blk.{layer}.ffn_{part}": (ffn, width) for part in ("gate", "up")}
        sizes[f"blk.{layer}.ffn_down"] = width, ffn
    sizes["output"] = vocab, width
    for name, (rows, columns) in sizes.items():
        packed = (rows, columns // BLOCK * BYTES)
        writer.add_tensor_info(f"{name}.weight", packed, np.dtype(np.uint8), rows * packed[1], Q4_0)
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", (width,), np.dtype(np.float32), 4 * width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for rows, columns in sizes.values():
        writer.write_tensor_data(drawn(random, rows, columns))
    for _ in norms:
        writer.write_tensor_data(np.ones(width, np.float32))
    writer.close()


def drawn(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A matrix as it is stored: of each block of 32 weights a scale and any 16 bytes, (rows, bytes) uint8.

    The twin of a large model has billions of weights, which need not be floats first.
    """
    blocks = random.integers(0, 256, (rows, columns // BLOCK, BYTES), np.uint8)
    scale = np.float16(columns**-0.5 / SPREAD)
    blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


if __name__ == "__main__":
    write_twin(json.loads(sys.argv[1]), sys.argv[2])
