"""An interpreter of Core ML's saved programs, in NumPy."""
