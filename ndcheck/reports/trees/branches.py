"""The divergence tree as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ndcheck.analysis.summary import ProbeSummary
from ndcheck.analysis.tree import Branch, Fork
from ndcheck.reports.untrusted import quoted, quoted_tail
from ndcheck.reports.wording.phrases import count

_INDENT = "    "
_MIN_TEXT_WIDTH = 16
_REFERENCE = " (reference)"
_MAX_SEARCHED = 1000
"""Completions are built when looked at; going through a million for a mark takes a minute."""


def tree_lines(
    probe: ProbeSummary, width: int, max_completions: int, unit: str = "token"
) -> list[str]:
    """The most frequent completions, from what they share to where each goes its own way.

    Among them are the reference, if it is not a rare one, and the first fork, where the divergence
    begins; forks between completions that are not shown are left out. Positions count ``unit``s.
    """
    if not probe.completions:
        return []
    shared = "".join(probe.completions[0].token_texts[: probe.common_prefix_tokens])
    label = f"{count(probe.common_prefix_tokens, unit)} in common: "
    text_width = max(_MIN_TEXT_WIDTH, width - len(label))
    if probe.tree is None:
        return [label + quoted(shared, text_width)]
    reference = reference_id(probe)
    shown = shown_completions(probe, max_completions)
    lines = [label + quoted_tail(shared, text_width) if shared else f"no {unit} in common"]
    lines += _fork_lines(probe.tree, shown, reference, unit, "", width)
    if len(shown) < len(probe.completions):
        rest = probe.n_samples - sum(probe.completions[i - 1].count for i in shown)
        n_more = len(probe.completions) - len(shown)
        lines.append(f"and {n_more} more, {rest} of {probe.n_samples} samples")
    return lines


def shown_completions(probe: ProbeSummary, max_completions: int) -> set[int]:
    """The ids of the most frequent completions, of the reference, and of both sides of a fork."""
    shown = set(range(1, min(max_completions, len(probe.completions)) + 1))
    if probe.tree is not None:
        shown |= {branch.completion_ids[0] for branch in probe.tree.branches[:2]}
    reference = reference_id(probe)
    return shown if reference is None else shown | {reference}


def reference_id(probe: ProbeSummary) -> int | None:
    """The completion that does not diverge from the reference, its own, if it is a frequent one."""
    if not probe.n_trials:  # without a reference nothing diverges from it
        return None
    frequent = islice(probe.completions, _MAX_SEARCHED)
    return next((c.completion_id for c in frequent if c.first_divergence is None), None)


def _fork_lines(
    fork: Fork, shown: set[int], reference: int | None, unit: str, indent: str, width: int
) -> Iterator[str]:
    margin = "" if fork.margin is None else f" (top-2 margin {fork.margin:.2g})"
    yield f"{indent}at {unit} {fork.position + 1}{margin}:"
    branches = branches_to(fork, shown)
    digits = len(str(branches[0].count))
    for branch in branches:
        below = shown.intersection(branch.completion_ids)
        text, next_fork = _until_shown_fork(branch, below)
        label = f"{indent}  {branch.count:>{digits}}  "
        mark = _REFERENCE if below == {reference} else ""
        if branch.token_id is None:
            yield f"{label}ends here{mark}"
        else:
            text_width = width - len(label) - len(mark)
            yield label + quoted(text, max(_MIN_TEXT_WIDTH, text_width)) + mark
        if next_fork is not None:
            yield from _fork_lines(next_fork, below, reference, unit, indent + _INDENT, width)


def branches_to(fork: Fork, shown: set[int]) -> list[Branch]:
    """The branches that lead to ``shown``, all of which are below the fork."""
    found: list[Branch] = []
    missing = set(shown)
    for branch in fork.branches:
        if not missing:  # each of a million branches would be built to be looked at
            break
        if not missing.isdisjoint(branch.completion_ids):
            found.append(branch)
            missing.difference_update(branch.completion_ids)
    return found


def _until_shown_fork(branch: Branch, shown: set[int]) -> tuple[str, Fork | None]:
    """The branch's text up to the next fork that parts two completions of ``shown``."""
    texts = [branch.continuation]
    fork = branch.fork
    while fork is not None and len(branches := branches_to(fork, shown)) == 1:
        texts.append(branches[0].continuation)
        fork = branches[0].fork
    return "".join(texts), fork
