"""What the rest of the project asks Qwen3-Next."""

from __future__ import annotations

from rmse_edge.arch.common.hybrid_entry import hybrid

from .config import Qwen3NextConfig
from .stored import UNREAD, stored

ARCH = hybrid(Qwen3NextConfig, stored=stored, unread=UNREAD)
