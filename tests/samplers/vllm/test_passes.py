"""What a scheduler's passes say: batches that shrank, prompts that were cut."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ndcheck.samplers.vllm.passes import Pass, count_prefills, describe_shape, smallest_batch

PASSES = st.lists(
    st.builds(
        Pass,
        st.dictionaries(st.integers(0, 3), st.integers(1, 5), min_size=1),
        st.integers(0, 2),
        st.integers(0, 2),
        st.integers(0, 1),
    ),
    max_size=12,
)


@given(PASSES)
def test_a_shape_loses_no_pass_and_no_token(passes):
    shapes = describe_shape(passes)
    repeated = [shape[1:] for shape in shapes for _ in range(shape[0])]
    assert repeated == [
        (len(p.tokens_of_row), sum(p.tokens_of_row.values()), p.running, p.waiting, p.preempted)
        for p in passes
    ]
    assert all(a[1:] != b[1:] for a, b in itertools.pairwise(shapes))
    assert smallest_batch(shapes) == min((len(p.tokens_of_row) for p in passes), default=0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_prefills_are_counted_from_the_first_pass_of_the_row(chunks, n_before):
    others = [Pass({1: 1}, 2, 1, 0)] * n_before
    passes = others + [Pass({0: n, 1: 1}, 2, 0, 0) for n in chunks] + [Pass({0: 1}, 1, 0, 0)]
    assert count_prefills(passes, 0, sum(chunks)) == len(chunks)
    assert count_prefills(passes, 0, sum(chunks) + 2) == 0
