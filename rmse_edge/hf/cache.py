"""`RMSECache`: what `generate` carries from call to call: a KV ring per loop, the memory and a position per row."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .looped_cache import LoopedCache


class RMSECache(LoopedCache):
    """`LoopedCache` of RMS-E: keys and values of every loop in a ring of `window` slots, and the neural memory.

    Slot s of a row holds its largest committed position that is s modulo `window`; what a row has forgotten is overwritten,
    so the size does not grow with the text.
    """

    called: ClassVar[str] = "an RMSECache"
    kind: ClassVar[str] = "a ring"

    @property
    def keys(self) -> Tensor | None:
        """(K, B, G, W, hd) in the configuration's `kv_dtype`; None while empty."""
        return self.state.get("past_keys")

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self.state.get("past_values")
