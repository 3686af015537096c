"""What the rest of the project asks Rodimus."""

from __future__ import annotations

from rmse_edge.arch.common.hybrid_entry import hybrid

from .config import RodimusConfig
from .stored import stored

ARCH = hybrid(RodimusConfig, stored=stored)
