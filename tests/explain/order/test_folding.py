"""Trees in words: every usual order has a short form."""

from __future__ import annotations

import pytest

from ndcheck.explain.order.folding import fold, lines, phrase

N = 64
FORMS = [
    (("in_order",), "64 in order"),
    (("backwards",), "64 in order backwards"),
    (("pairwise",), "64 pairwise"),
    (("blocks", 16), "in order: 4 × (16 in order)"),
    (("blocks", 24), "in order: 2 × (24 in order) + (16 in order)"),
    (("lanes", 8), "pairwise: 8 × (8 in order (every 8th))"),
    (("fused", 8), "in order: 8 × (8 fused)"),
]


@pytest.mark.parametrize(("builder", "expected"), FORMS)
def test_phrases(trees, builder, expected):
    name, *sizes = builder
    assert phrase(fold(getattr(trees, name)(N, *sizes))) == expected


def test_lines_are_a_tree(trees):
    assert list(lines(fold(trees.blocks(N, 24)))) == [
        "64 terms in order",
        "|- 2 x 24 terms in order, 24 apart",
        "`- 16 terms in order, from 48",
    ]
    assert list(lines(fold(trees.lanes(N, 8)))) == [
        "64 terms pairwise",
        "`- 8 x 8 terms in order (every 8th), 1 apart",
    ]


@pytest.mark.parametrize(("builder", "expected"), FORMS)
def test_no_leaf_is_lost(trees, builder, expected):
    def count(form):
        return 1 if not form.how else sum(run.count * count(run.form) for run in form.terms)

    name, *sizes = builder
    form = fold(getattr(trees, name)(N, *sizes))
    assert count(form) == form.n_leaves == N
