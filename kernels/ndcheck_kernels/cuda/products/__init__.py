"""Matrix products: Triton kernels, and those borrowed from cuBLASLt."""
