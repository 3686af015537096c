"""Benchmarks, perplexity, memory and time."""
