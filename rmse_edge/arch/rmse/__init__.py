"""RMS-E: one block of 512 experts, a neural memory and retrieval, applied until it is sure."""
