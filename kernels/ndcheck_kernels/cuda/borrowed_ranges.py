"""From which M to which cuBLASLt without split-K was faster than ours, by (N, K).

Written by kernels/bench/ops/freeze_borrowed.py from borrowed.csv and borrowed_bits.csv of
results/kernels.
"""

RANGES: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {
    (1280, 8192): ((1025, 8192),),
    (2048, 2048): ((65, 1024), (2049, 8192)),
    (3584, 18944): ((1, 2), (17, 4096)),
    (4096, 4096): ((17, 32), (257, 8192)),
    (4096, 12288): ((33, 256), (2049, 8192)),
    (4608, 3584): ((1, 8192),),
    (6144, 4096): ((17, 8192),),
    (7168, 8192): ((17, 4096),),
    (8192, 1024): ((129, 256), (513, 8192)),
    (8192, 3584): ((65, 256), (513, 8192)),
    (24576, 4096): ((17, 512), (1025, 4096)),
    (37888, 3584): ((33, 1024), (2049, 8192)),
    (49152, 576): ((1, 8192),),
    (151936, 4096): ((65, 2048),),
}
OTHERS: tuple[tuple[int, int], ...] = ((17, 8192),)
"""Of shapes that were not measured."""
