"""Sampling from a serving engine in processes of its own, one an arm, driven over pipes."""
