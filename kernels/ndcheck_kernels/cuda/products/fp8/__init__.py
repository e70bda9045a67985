"""Products of FP8 weights."""
