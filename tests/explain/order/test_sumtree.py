"""FPRev recovers any order of additions from subtree sizes, and nothing else."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndcheck.explain.order.sumtree import NotASumError, SumTree, read_tree


@st.composite
def sum_trees(draw, most_leaves=24):
    """Any tree: nodes join two to four subtrees, in any order of leaves."""
    n = draw(st.integers(2, most_leaves))
    rng = random.Random(draw(st.integers(0, 2**32)))
    ids, nodes = list(range(n)), []
    while len(ids) > 1:
        rng.shuffle(ids)
        width = min(len(ids), rng.choice((2, 2, 2, 3, 4)))
        nodes.append(tuple(ids[:width]))
        ids = [*ids[width:], n + len(nodes) - 1]
    return SumTree(n, tuple(nodes))


def common_size(tree, i, j):
    """Number of leaves below the lowest common ancestor of leaves i and j."""
    below = [{i}, {j}]
    for k, children in enumerate(tree.nodes):
        for ids in below:
            if not ids.isdisjoint(children):
                ids.add(tree.n_leaves + k)
        if tree.n_leaves + k in below[0] & below[1]:
            return tree.sizes[tree.n_leaves + k]
    raise ValueError(f"leaves {i} and {j} do not meet")


@given(sum_trees(), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_any_tree_is_recovered_whatever_the_pivots(tree, seed):
    sizes = lambda pairs: [common_size(tree, i, j) for i, j in pairs]  # noqa: E731
    found = read_tree(tree.n_leaves, sizes, seed)
    assert found.digest == tree.digest
    assert found.nodes == read_tree(tree.n_leaves, sizes, seed + 1).nodes
    assert sorted(c for children in found.nodes for c in children) == list(range(found.root))
    for i, j in [(0, 1), (0, tree.n_leaves - 1)]:
        assert i == j or common_size(found, i, j) == common_size(tree, i, j)


@given(sum_trees())
@settings(max_examples=60, deadline=None)
def test_evaluation_adds_in_the_order_of_the_nodes(tree):
    leaves = np.arange(tree.n_leaves, dtype=np.float32)
    if tree.largest_fan_in > 2:
        with pytest.raises(ValueError, match="fused"):
            tree.evaluate(leaves)
    else:
        assert tree.evaluate(leaves) == leaves.sum()


def test_evaluation_rounds_after_every_addition(trees):
    leaves = np.array([2.0**24, 1, 1, -(2.0**24)], np.float32)
    assert trees.in_order(4).evaluate(leaves) == 0  # each 1 is lost
    assert trees.pairwise(4).evaluate(leaves) == 1  # (a + c) + (b + d)
    assert trees.backwards(4).evaluate(leaves) == 2**24 - (2**24 - 2)


def test_digests_tell_orders_apart_and_operands_not(trees):
    n = 32
    orders = [
        trees.in_order(n),
        trees.backwards(n),
        trees.pairwise(n),
        trees.blocks(n, 8),
        trees.lanes(n, 8),
        trees.fused(n, 8),
    ]
    assert len({tree.digest for tree in orders}) == len(orders)
    swapped = SumTree(n, tuple(nodes[::-1] for nodes in orders[0].nodes))
    assert swapped.digest == orders[0].digest


@pytest.mark.parametrize(
    "sizes",
    [
        lambda pairs: [2 for _ in pairs],  # everybody is everybody's only sibling
        lambda pairs: [7 for _ in pairs],  # 7 leaves below a node of 4
    ],
)
def test_contradicting_readings_are_refused(sizes):
    with pytest.raises(NotASumError):
        read_tree(4, sizes)


def test_a_sum_in_order_takes_few_readings_either_way(trees):
    n = 256
    for tree in (trees.in_order(n), trees.backwards(n)):
        n_readings = 0

        def sizes(pairs, tree=tree):
            nonlocal n_readings
            n_readings += len(pairs)
            return [common_size(tree, i, j) for i, j in pairs]

        read_tree(n, sizes)
        assert n_readings < n * n / 8
