"""What the batches of a server's answers are said to have been."""

import pytest

from ndcheck.analysis.serving import ReachedBatch


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (((4, 10),), "4 (100 %)"),
        (((1, 1), (2, 99)), "1 (1 %), 2 (99 %)"),
        (((1, 1), (3, 2), (4, 997)), "4 (100 %), others (0.3 %)"),
        (((1, 4), (15, 60), (16, 936)), "15 (6 %), 16 (94 %), others (0.4 %)"),
    ],
)
def test_sizes_that_hardly_ran_are_one_share(sizes, said):
    assert ReachedBatch(16, sizes, 10, 0).distribution == said
