from itertools import combinations
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.analysis.divergence import first_divergence
from ndcheck.analysis.tree import Branch, Fork

TEXTS = st.lists(st.text("abc", max_size=6), min_size=1, max_size=14)


def summarised(build: SimpleNamespace, texts: list[str], **fields):
    """The first text is the reference."""
    samples = [build.sample(i, text, **fields) for i, text in enumerate(texts[1:], 1)]
    return build.probe([build.reference(texts[0], **fields), *samples])


def branches_below(fork: Fork | None) -> list[tuple[Fork, Branch]]:
    found, open_forks = [], [fork] if fork else []
    while open_forks:
        fork = open_forks.pop()
        found += [(fork, branch) for branch in fork.branches]
        open_forks += [branch.fork for branch in fork.branches if branch.fork]
    return found


def leaves(fork: Fork) -> list[tuple[str, int]]:
    """(text from the fork on, count), by walking the tree."""
    found = []
    for branch in fork.branches:
        below = leaves(branch.fork) if branch.fork else [("", branch.count)]
        found += [(branch.continuation + text, count) for text, count in below]
    return found


@given(TEXTS)
def test_walking_the_tree_gives_every_completion_and_count(build, texts):
    probe = summarised(build, texts)
    if probe.n_unique == 1:
        assert probe.tree is None
        return
    shared = texts[0][: probe.tree.position]
    assert probe.tree.position == probe.common_prefix_tokens
    assert sorted((shared + text, count) for text, count in leaves(probe.tree)) == sorted(
        (text, texts.count(text)) for text in set(texts)
    )


@given(TEXTS)
def test_counts_add_up_and_branches_are_in_order(build, texts):
    probe = summarised(build, texts)
    counts = {c.completion_id: c.count for c in probe.completions}
    for fork, branch in branches_below(probe.tree):
        assert fork.n_samples == sum(b.count for b in fork.branches)
        assert len(fork.branches) >= 2
        order = [(-b.count, -1 if b.token_id is None else b.token_id) for b in fork.branches]
        assert order == sorted(order)
        assert branch.count == sum(counts[i] for i in branch.completion_ids)
        assert list(branch.completion_ids) == sorted(branch.completion_ids)
        if branch.fork:
            assert branch.fork.n_samples == branch.count
        else:
            assert len(branch.completion_ids) == 1


@given(TEXTS)
def test_any_two_completions_part_at_the_fork_that_holds_both(build, texts):
    probe = summarised(build, texts)
    parted = {}
    for fork in {id(f): f for f, _ in branches_below(probe.tree)}.values():
        for one, other in combinations(fork.branches, 2):
            for i in one.completion_ids:
                for j in other.completion_ids:
                    parted[frozenset((i, j))] = fork.position
    assert parted == {
        frozenset((a.completion_id, b.completion_id)): first_divergence(a.token_ids, b.token_ids)
        for a, b in combinations(probe.completions, 2)
    }


def test_the_reference_experiment(build):
    probe = summarised(build, ["in Queens", "in New York", *["in Queens"] * 8])
    tree = probe.tree
    assert (tree.position, tree.n_samples) == (3, 10)
    queens, york = tree.branches
    assert queens == Branch(ord("Q"), "Q", 9, "Queens", (1,), None)
    assert york == Branch(ord("N"), "N", 1, "New York", (2,), None)
    assert tree.branches[-1] == york
    assert tree.branches[:1] == (queens,)


def test_a_completion_that_ends_is_a_branch_without_token(build):
    ended, going_on = summarised(build, ["ab", "abc", "abc", "ab"]).tree.branches
    assert ended == Branch(None, "", 2, "", (1,), None)
    assert going_on.continuation == "c"


def test_an_empty_completion(build):
    probe = summarised(build, ["", "a", "a"])
    assert probe.tree.position == probe.common_prefix_tokens == 0
    assert [b.token_text for b in probe.tree.branches] == ["a", ""]


def test_continuations_stop_at_the_next_fork(build):
    first, second = summarised(build, ["abcd", "abce", "axyz"]).tree.branches
    assert (first.continuation, first.count, first.completion_ids) == ("bc", 2, (1, 2))
    assert first.fork.position == 3
    assert second.continuation == "xyz"


def test_a_thousand_nested_forks(build):
    texts = ["a" * n + "b" for n in range(1000)]
    probe = summarised(build, texts, bits=False)
    positions, fork = [], probe.tree
    while fork:
        positions.append(fork.position)
        fork = next((b.fork for b in fork.branches if b.fork), None)
    assert positions == list(range(999))


@pytest.mark.parametrize("n_shared", [0, 15, 16, 17, 48, 1000])
def test_long_shared_prefixes(build, n_shared):
    probe = summarised(build, ["a" * n_shared + end for end in ("b", "c", "bc")])
    assert probe.tree.position == n_shared


def test_margin_is_the_smallest_on_the_most_frequent_branch(build):
    samples = [
        build.reference("ab", margins=(5.0, 4.0)),
        build.sample(1, "ab", margins=(5.0, 3.0)),
        build.sample(2, "abc", margins=(5.0, 2.0, 1.0)),
        build.sample(3, "ac", margins=(5.0, 0.5)),
    ]
    tree = build.probe(samples).tree
    assert tree.margin == 2.0
    # Most samples have ended at the next fork: there is no margin where nothing was generated.
    assert tree.branches[0].fork.margin is None


@pytest.mark.parametrize("margins", [(), (1.0, float("inf"))])
def test_unknown_margin_is_none(build, margins):
    samples = [build.reference("ab", margins=margins), build.sample(1, "ac", margins=margins)]
    assert build.probe(samples).tree.margin is None
