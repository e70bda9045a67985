"""The shapes and batch sizes of the GEMM comparison."""

SHAPES = {
    "qkv 8B": (6144, 4096),
    "o 8B": (4096, 4096),
    "gate_up 8B": (24576, 4096),
    "down 8B": (4096, 12288),
    "lm_head 8B": (151936, 4096),
    "qkv 70B TP8": (1280, 8192),
    "o 70B TP8": (8192, 1024),
    "gate_up 70B TP8": (7168, 8192),
    "down 70B TP8": (8192, 3584),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
