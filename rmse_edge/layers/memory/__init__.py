"""Neural memories: small networks whose weights are per-sequence state."""
