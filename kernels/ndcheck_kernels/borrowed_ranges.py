"""Where cuBLASLt without split-K was faster than our kernels, by (N, K): from and to which M.

Written by kernels/bench/freeze_borrowed.py from results/kernels/borrowed.csv. Empty: not measured.
"""

RANGES: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}
