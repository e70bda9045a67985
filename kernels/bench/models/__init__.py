"""Whole models: families, published shapes, decode steps, several GPUs."""
