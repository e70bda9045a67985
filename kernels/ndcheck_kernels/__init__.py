"""Batch-invariant kernels: a result never depends on the batch around it."""
