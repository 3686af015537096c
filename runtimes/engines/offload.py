"""`expert_ram` from Python: the cache of runtimes/native/offload, which the kernels of this process ask for experts."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

from rmse_edge.errors import ArgumentError, PackageError

from .kernels import load_kernels


def kernels() -> ctypes.CDLL:
    """The library, its functions declared."""
    library = load_kernels()
    for name in ("problem", "figures", "error"):
        getattr(library, f"rmse_offload_{name}").restype = ctypes.c_char_p
    library.rmse_offload_open.restype = ctypes.c_void_p
    return library


class Offload:
    """The experts of one program, within a budget.

    From `__init__` to `begin` a trial runs: the program computes no experts, and says where they are. Afterwards they are read from
    its file when they are needed.
    """

    def __init__(self, program: Path) -> None:
        """
        Args:
            program: the file, which this process has loaded.
        Raises:
            PackageError: it cannot be read.
        """
        self._kernels = kernels()
        self._handle = ctypes.c_void_p(self._kernels.rmse_offload_open(str(program).encode()))
        if not self._handle:
            raise PackageError(self._said())

    def begin(self, budget: str) -> None:
        """
        Args:
            budget: bytes (`300M`), a share of all experts (`25%`), or `auto`.
        Raises:
            ArgumentError: it is none of these, or too small; names the smallest that works.
            PackageError: the file cannot be read.
        """
        code = self._kernels.rmse_offload_begin(self._handle, budget.encode())
        if code == 1:
            raise ArgumentError("expert_ram", self._said())
        if code:
            raise PackageError(self._said())

    def loop(self, k: int) -> None:
        """Tell which iteration the next call is of; -1: it is outside of the loop."""
        self._kernels.rmse_offload_loop(self._handle, ctypes.c_int64(k))

    def problem(self) -> str:
        """Why experts cannot be read, in one line; empty where they can."""
        return self._kernels.rmse_offload_problem(self._handle).decode(errors="replace")

    def figures(self, tokens: int) -> dict[str, Any]:
        """What happened since the last `clear`, while so many tokens were read or written; names as in docs/offload.md."""
        found = json.loads(self._kernels.rmse_offload_figures(self._handle))
        loops = found["loops"]

        def rate(*of: dict[str, int]) -> float | None:
            wanted = sum(each["wanted"] for each in of)
            return sum(each["found"] for each in of) / wanted if wanted else None

        each = max(1, tokens)
        return {
            "expert_bytes": found["expert_bytes"],
            "budget_bytes": found["budget_bytes"],
            "resident_expert_bytes": found["resident_bytes"],
            "hit_rate": rate(*loops, found["outside"]),
            "hit_rate_per_loop": [rate(loop) for loop in loops],
            "mib_read_per_token": found["bytes_read"] / each / 2**20,
            "stall_ms_per_token": found["stall_ns"] / each / 1e6,
            "prefetched": found["read_ahead"],
            "prefetched_used": found["used"],
            "prefetched_wasted": found["wasted"],
        }

    def clear(self) -> None:
        """Begin the figures anew."""
        self._kernels.rmse_offload_clear(self._handle)

    def close(self) -> None:
        """Give the memory back; experts are read where they are mapped again."""
        if self._handle:
            self._kernels.rmse_offload_close(self._handle)
            self._handle = ctypes.c_void_p(None)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def _said(self) -> str:
        return self._kernels.rmse_offload_error().decode(errors="replace")
