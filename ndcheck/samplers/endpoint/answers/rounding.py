"""Log-probabilities that a server begins to send with fewer digits, or more, are no other ones."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from ndcheck.samplers.endpoint.capabilities import FP32_DIGITS

MOST_DECIMALS = 6
"""Of a log-probability near 1, a whole fp32 number has more."""
LEAST_ROUNDED = 2
"""One number that moved to a near one of fewer digits may be another number."""
TIES = 1 + 1e-6
"""What lies halfway is rounded either way."""


class FirstDigits:
    """The log-probabilities that each completion of a probe had at first, by its tokens."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, tuple[int, ...]], tuple[float, ...]] = {}

    def are_other(
        self, probe_id: str, token_ids: tuple[int, ...], logprobs: tuple[float, ...]
    ) -> bool:
        """Do ``logprobs`` (nats) differ from the first in how they are rounded, and in that alone?

        They may be the first rounded, or what the first were rounded from.
        """
        first = self._known.setdefault((probe_id, token_ids), logprobs)
        return is_rounded(first, logprobs) or is_rounded(logprobs, first)


def is_rounded(fine: Sequence[float], coarse: Sequence[float]) -> bool:
    """Is ``coarse`` what ``fine`` gives, all of it, at one number of decimals or of digits?"""
    if sum(a != b for a, b in zip(fine, coarse, strict=True)) < LEAST_ROUNDED:
        return False
    written = [Decimal(repr(x)).normalize().as_tuple() for x in coarse]
    n_digits = max(len(number.digits) for number in written)
    n_decimals = max(-int(number.exponent) for number in written)
    if n_digits < 2:
        return False  # Zeros are all that fp32 has for tokens that are certain.
    most = TIES / 2 * 10.0**-n_decimals
    pairs = list(zip(fine, coarse, strict=True))
    return (n_decimals <= MOST_DECIMALS and all(abs(a - b) <= most for a, b in pairs)) or (
        n_digits < FP32_DIGITS and all(float(f"{a:.{n_digits}g}") == b for a, b in pairs)
    )
