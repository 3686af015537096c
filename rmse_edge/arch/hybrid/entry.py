"""What the rest of the project asks a hybrid."""

from __future__ import annotations

from rmse_edge.arch.common.hybrid_entry import hybrid

from .config import HybridConfig

ARCH = hybrid(HybridConfig)
