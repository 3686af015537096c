"""The model that the app has inside."""

from __future__ import annotations

import numpy as np
from paths import ROOT

from rmse_edge.text import Tokenizer

SHIPPED = ROOT / "models" / "rmse-shakespeare"


def sample(count: int) -> np.ndarray:
    ids = Tokenizer(SHIPPED / "tokenizer.json").encode((SHIPPED / "sample.txt").read_text(encoding="utf-8"))
    return np.array(ids[:count])
