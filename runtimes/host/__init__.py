"""What a text needs around an engine: calls, positions, caches, memory, sessions."""
