"""Write the dense twin: a GGUF of the llama architecture with random weights, every matrix in Q4_0, no vocabulary.

A program of llama.cpp's environment, which has the `gguf` package: python -m benchmarks.twin_gguf SHAPE FILE, where SHAPE
is a `Twin` in JSON. llama.cpp would keep the output matrix in Q6_K; here it is Q4_0 like the rest, the smallest that a
user could deploy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np

Q4_0 = gguf.GGMLQuantizationType.Q4_0
BLOCK, BYTES = gguf.GGML_QUANT_SIZES[Q4_0]  # weights, and what they take with their scale
SPREAD = 4.6  # deviation of the integers -8 to 7, if all are alike


class RandomWriter(gguf.GGUFWriter):
    """A file that says what its shape is, and takes tensors of random weights, which are drawn when they are written."""

    def __init__(self, path: str, architecture: str, name: str, shape: dict[str, Any], blocks: int) -> None:
        """
        Args:
            shape: width, ffn, heads, vocab, context (positions at most), and what else there may be.
            blocks: layers that have keys and values of their own.
        """
        super().__init__(path, architecture)
        self.draws: list[Callable[[np.random.Generator], np.ndarray]] = []
        self.add_name(name)
        self.add_context_length(shape["context"])
        self.add_embedding_length(shape["width"])
        self.add_feed_forward_length(shape["ffn"])
        self.add_block_count(blocks)
        self.add_head_count(shape["heads"])
        self.add_head_count_kv(shape["heads"])
        self.add_rope_dimension_count(shape["width"] // shape["heads"])
        self.add_layer_norm_rms_eps(1e-6)
        self.add_vocab_size(shape["vocab"])
        self.add_tokenizer_model("none")
        self.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    def matrix(self, name: str, rows: int, columns: int) -> None:
        """In Q4_0."""
        packed = (rows, columns // BLOCK * BYTES)
        self.add_tensor_info(f"{name}.weight", packed, np.dtype(np.uint8), rows * packed[1], Q4_0)
        self.draws.append(lambda random: drawn(random, rows, columns))

    def vector(self, name: str, draw: Callable[[np.random.Generator], np.ndarray], size: int) -> None:
        """In float32."""
        self.add_tensor_info(name, (size,), np.dtype(np.float32), 4 * size)
        self.draws.append(lambda random: draw(random).astype(np.float32))

    def norm(self, name: str, width: int) -> None:
        self.vector(f"{name}.weight", lambda random: np.ones(width), width)

    def finish(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_ti_data_to_file()
        for draw in self.draws:
            self.write_tensor_data(draw(random))
        self.close()


def write_twin(shape: dict[str, Any], path: str) -> None:
    """
    Args:
        shape: the fields of a `Twin`.
    """
    width, ffn, vocab = shape["width"], shape["ffn"], shape["vocab"]
    writer = RandomWriter(path, "llama", f"dense twin, width {width}", shape, shape["layers"])
    writer.matrix("token_embd", vocab, width)
    for layer in range(shape["layers"]):
        writer.norm(f"blk.{layer}.attn_norm", width)
        for part in ("q", "k", "v", "output"):
            writer.matrix(f"blk.{layer}.attn_{part}", width, width)
        writer.norm(f"blk.{layer}.ffn_norm", width)
        writer.matrix(f"blk.{layer}.ffn_gate", ffn, width)
        writer.matrix(f"blk.{layer}.ffn_up", ffn, width)
        writer.matrix(f"blk.{layer}.ffn_down", width, ffn)
    writer.norm("output_norm", width)
    writer.matrix("output", vocab, width)
    writer.finish()


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
