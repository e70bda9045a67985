"""The reference experiment: 1000 completions of one prompt."""
