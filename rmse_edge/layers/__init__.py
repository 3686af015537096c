"""Mixers and parts that models are made of. They take numbers and know no model."""
