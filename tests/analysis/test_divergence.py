from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.analysis.divergence import first_divergence, latent_divergence, read_stream

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def as_ids(tokens):
    return np.array(tokens, np.int32)


@given(TOKENS, TOKENS)
def test_first_divergence_equals_brute_force_and_is_symmetric(a, b):
    longest = max(len(a), len(b))
    expected = next((i for i in range(longest) if a[i : i + 1] != b[i : i + 1]), None)
    assert first_divergence(as_ids(a), as_ids(b)) == expected
    assert first_divergence(as_ids(b), as_ids(a)) == expected


@pytest.mark.parametrize(
    ("a", "b", "at"),
    [([], [], None), ([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 2], None), ([1], [2], 0)],
)
def test_first_divergence_of_prefixes(a, b, at):
    assert first_divergence(as_ids(a), as_ids(b)) == at


def latent(a, b, n_shared):
    return latent_divergence(read_stream(a), read_stream(b), n_shared)


def test_latent_divergence_is_the_first_moved_bit(build):
    clean, moved = build.sample(1, "abcd"), build.sample(2, "abcd", moved=(1, 3))
    assert latent(clean, clean, 4) is None
    assert latent(clean, moved, 4) == latent(moved, clean, 4) == 1


def test_latent_divergence_looks_at_shared_tokens_only(build):
    clean, moved = build.sample(1, "abcd"), build.sample(2, "abXd", moved=(2,))
    assert latent(clean, moved, 2) is None


@pytest.mark.parametrize("field", ["logprobs", "row_digests"])
def test_either_kind_of_bits_is_enough(build, field):
    clean, moved = build.sample(1, "abcd"), build.sample(2, "abcd", moved=(2,))
    other = {"logprobs": "row_digests", "row_digests": "logprobs"}[field]
    assert latent(clean, replace(moved, **{other: getattr(clean, other)}), 4) == 2
    assert latent(clean, replace(moved, **{other: ()}), 4) == 2
    assert latent(replace(clean, **{field: ()}), replace(moved, **{other: ()}), 4) is None


def test_the_earlier_of_the_two_kinds_counts(build):
    clean, early, late = (build.sample(1, "abcd", moved=moved) for moved in ((), (1,), (3,)))
    for mixed in (
        replace(early, row_digests=late.row_digests),
        replace(late, row_digests=early.row_digests),
    ):
        assert latent(clean, mixed, 4) == 1


def test_bits_are_compared_not_values(build):
    def with_logprob(value):
        return build.sample(1, "a", logprobs=(value,), row_digests=())

    assert latent(with_logprob(float("nan")), with_logprob(float("nan")), 1) is None
    assert latent(with_logprob(0.0), with_logprob(-0.0), 1) == 0


@given(st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)), st.integers(0, 8))
def test_latent_divergence_equals_brute_force(build, a, b, n_shared):
    expected = min((t for t in a ^ b if t < n_shared), default=None)
    samples = [build.sample(1, "abcdefgh", moved=tuple(moved)) for moved in (a, b)]
    assert latent(*samples, n_shared) == expected
