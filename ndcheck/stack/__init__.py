"""What lies beneath a model and decides its bits: versions, libraries, kernels."""
