"""FP8 models and their products."""
