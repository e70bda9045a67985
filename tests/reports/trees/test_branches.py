from __future__ import annotations

from dataclasses import replace

from rich.cells import cell_len

from ndcheck.reports.trees.branches import tree_lines


def test_one_completion_has_no_fork(passing) -> None:
    (line,) = tree_lines(passing.summary.probes[0], 60, 5)
    assert line.startswith("113 tokens in common: ' word0")
    assert line.endswith("'…")
    assert cell_len(line) == 60


def test_nested_forks_are_indented(two_arms) -> None:
    lines = tree_lines(two_arms.summary.probes[0], 60, 5)
    assert lines[1:] == [
        "at token 103 (top-2 margin 0.0078):",
        "  192  ' Queens, New York, on May 11'",
        "    at token 111 (top-2 margin 0.0078):",
        r"      190  ', 1918.\n' (reference)",
        "        2  '. His parents'",
        r"    8  ' New York City, on May 11, 1918.\n'",
    ]


def test_forks_between_hidden_completions_are_left_out(two_arms) -> None:
    lines = tree_lines(two_arms.summary.probes[0], 60, 1)
    assert lines[1:] == [
        "at token 103 (top-2 margin 0.0078):",
        r"  192  ' Queens, New York, on May 11, 1918.\n' (reference)",
        r"    8  ' New York City, on May 11, 1918.\n'",
        "and 1 more, 2 of 200 samples",
    ]


def test_the_first_fork_shows_even_if_few_take_it(many) -> None:
    probe = many.summary.probes[0]
    lines = tree_lines(probe, 60, 1)
    assert lines[1] == "at token 21 (top-2 margin 0.0078):"
    assert lines[-1] == "and 78 more, 3159 of 3739 samples"


def test_a_completion_that_ends_at_the_fork(hostile) -> None:
    probe = hostile.summary.probes[0]
    texts = [("a", "b"), ("a",)]
    completions = tuple(
        replace(completion, token_texts=tokens, count=1)
        for completion, tokens in zip(probe.completions, texts, strict=False)
    )
    tree = replace(
        probe.tree,
        position=1,
        margin=None,
        branches=(
            replace(probe.tree.branches[0], count=1, continuation="b", completion_ids=(1,)),
            replace(probe.tree.branches[1], token_id=None, continuation="", completion_ids=(2,)),
        ),
    )
    lines = tree_lines(
        replace(probe, completions=completions, find_tree=lambda: tree, n_samples=2), 60, 5
    )
    assert lines == [
        "1 token in common: 'a'",
        "at token 2:",
        "  1  'b' (reference)",
        "  2  ends here",
    ]


def test_nothing_in_common(hostile) -> None:
    probe = replace(hostile.summary.probes[0], common_prefix_tokens=0)
    assert tree_lines(probe, 60, 5)[0] == "no token in common"


def test_without_a_reference_none_is_marked(two_arms) -> None:
    probe = replace(two_arms.summary.probes[0], n_trials=0)
    assert not any("(reference)" in line for line in tree_lines(probe, 60, 5))


def test_nothing_measured(all_errors) -> None:
    assert tree_lines(all_errors.summary.probes[0], 60, 5) == []
