"""What the batches of a server's answers are said to have been."""

import pytest

from ndcheck.analysis.serving import ReachedBatch, Serving
from ndcheck.records import Witness


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


@pytest.mark.parametrize(("n_connections", "n_draws"), [(2, 2), (9, 9), (10, None)])
def test_trials_over_few_connections_are_no_more_draws_of_a_replica(build, n_connections, n_draws):
    serving = Serving()
    for trial in range(10):
        witness = Witness(2, connection=f"c{trial % n_connections}")
        serving.add(build.sample(trial, "abc", witness=witness))
    doubts = serving.finding(sets_batch_size=True).doubts
    assert [d.split(" came ")[0] for d in doubts] == (["10 trials"] if n_draws else [])
    assert all(f"through {n_draws} connections: no more than so many draws" in d for d in doubts)
