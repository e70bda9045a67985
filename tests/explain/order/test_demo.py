"""The demonstration's figures are computed, and the published one is reproduced."""

from __future__ import annotations

import random
import sys

import pytest

from ndcheck.explain.order.demo import TERMS, compensated_sum, demo_lines, distinct_sums, plain_sum


def test_the_published_number_of_sums():
    assert len(distinct_sums(compensated_sum)) == 102
    assert len(distinct_sums(plain_sum)) == 258


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sum() compensates from Python 3.12 on")
def test_compensated_sum_is_pythons():
    rng = random.Random(1)
    terms = [*TERMS, *(-term for term in TERMS)]
    for _ in range(200):
        rng.shuffle(terms)
        assert compensated_sum(terms) == sum(terms)


def test_it_fits_a_screen():
    lines = list(demo_lines())
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
