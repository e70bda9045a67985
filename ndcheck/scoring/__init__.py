"""Recorded completions, scored again by another computer: the same token ids in one pass."""
