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


class RandomWriter(gguf.GGUFWriter):
    """A file that says what its shape is, and takes matrices of random weights."""

    def __init__(self, path: str, architecture: str, name: str, shape: dict[str, Any], blocks: int) -> None:
        """
        Args:
            shape: width, ffn, heads, vocab, context (positions at most), and what else there may be.
            blocks: layers that have keys and values of their own.
        """
        super().__init__(path, architecture)
        self.random = np.random.default_rng(0)
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
        weights = self.random.standard_normal((rows, columns), np.float32) * columns**-0.5
        self.add_tensor(f"{name}.weight", gguf.quants.quantize(weights, Q4_0), raw_dtype=Q4_0)

    def finish(self) -> None:
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()


def write_twin(shape: dict[str, Any], path: str) -> None:
    """
    Args:
        shape: the fields of a `Twin`.
    """
    width, ffn, vocab = shape["width"], shape["ffn"], shape["vocab"]
    writer = RandomWriter(path, "llama", f"dense twin, width {width}", shape, shape["layers"])
    matrix = writer.matrix

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
    writer.finish()


if __name__ == "__main__":
    write_twin(json.loads(sys.argv[1]), sys.argv[2])
