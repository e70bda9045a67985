"""Shown on one screen: floating-point addition is not associative, so order decides bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

N_SHUFFLES = 10_000
TERMS = (1e-10, 1e-5, 1e-2, 1)
"""With their negatives: the example of Thinking Machines' "Defeating Nondeterminism" (2025).

The 1 is an int, as published: Python's `sum` treats it in another way than a float.
"""


Summation = Callable[[Sequence[float]], float]


def plain_sum(terms: Sequence[float]) -> float:
    """One addition after the other, as kernels and Python up to 3.11 add."""
    return reduce(add, terms)


def compensated_sum(terms: Sequence[float]) -> float:
    """What `sum` does since Python 3.12: Neumaier's sum, which carries rounding errors along.

    It does so for floats; ints are added plainly, which is what leaves 102 sums and not 1.
    """
    total, lost = 0.0, 0.0
    for term in terms:
        new = total + term
        if isinstance(term, float):
            larger, smaller = (total, term) if abs(total) >= abs(term) else (term, total)
            lost += (larger - new) + smaller
        total = new
    return total + lost


def distinct_sums(summation: Summation = plain_sum, seed: int = 42) -> list[float]:
    """The different sums of the 8 terms over N_SHUFFLES shuffles, ascending."""
    rng = random.Random(seed)
    terms = [*TERMS, *(-term for term in TERMS)]
    found = set()
    for _ in range(N_SHUFFLES):
        rng.shuffle(terms)
        found.add(summation(terms))
    return sorted(found)


@dataclass(frozen=True, slots=True)
class RowComparison:
    """One row times a [K, K] matrix, alone and as the first of ``rows`` rows, on one device."""

    dtype: str
    device: str
    rows: int
    n_different: int
    n_elements: int
    max_difference: float


def compare_rows(n_terms: int = 1024, sizes: tuple[int, ...] = (2, 8, 64)) -> list[RowComparison]:
    """A linear layer's row alone against the same row in a batch, on this machine."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.randn(max(sizes), n_terms, generator=generator).to(device, dtype)
        weight = torch.randn(n_terms, n_terms, generator=generator).to(device, dtype)
        alone = torch.nn.functional.linear(rows[:1], weight)
        for size in sizes:
            together = torch.nn.functional.linear(rows[:size], weight)[:1]
            different = together != alone
            found.append(
                RowComparison(
                    str(dtype).removeprefix("torch."),
                    device,
                    size,
                    int(different.sum()),
                    different.numel(),
                    float((together.double() - alone.double()).abs().max()),
                )
            )
    return found


def demo_lines() -> Iterator[str]:
    """The whole demonstration, in lines of up to 80 columns."""
    yield "1. Addition of floats is not associative"
    yield f"     (0.1 + 1e20) - 1e20 = {(0.1 + 1e20) - 1e20}"
    yield f"     0.1 + (1e20 - 1e20) = {0.1 + (1e20 - 1e20)}"
    yield ""
    sums = distinct_sums()
    yield f"2. So a sum depends on its order: {', '.join(f'{t:g}' for t in TERMS)} and their"
    yield f"   negatives, shuffled {N_SHUFFLES:,} times, have {len(sums)} different sums"
    yield f"     from {sums[0]:.3g} to {sums[-1]:.3g}; exactly, it is 0"
    published = distinct_sums(compensated_sum)
    yield f"     ({len(published)}, as published, with Python 3.12's sum(), which carries some of"
    yield "     the rounding errors along)"
    yield ""
    yield "3. And kernels choose an order by the batch: one row of a linear layer"
    yield "   (1024 x 1024), alone and as the first of several rows, on this machine"
    for row in compare_rows():
        by = f" (up to {row.max_difference:.2g})" if row.n_different else ""
        yield (
            f"     {row.dtype:<8} {row.device}, 1 row and {row.rows:>2} rows: "
            f"{row.n_different} of {row.n_elements} outputs differ{by}"
        )
    yield ""
    yield "See the orders: ndcheck order linear. What it does to a model: ndcheck run"
