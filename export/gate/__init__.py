"""The parity gate: an export fails unless the package says what the PyTorch model says."""
