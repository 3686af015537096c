"""Integers and scales from trained weights, one source of truth per package."""
