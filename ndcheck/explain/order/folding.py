"""A tree of thousands of additions in a few words: runs of alike terms are folded into one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ndcheck.explain.order.sumtree import SumTree


@dataclass(frozen=True, slots=True)
class Fold:
    """Part of a sum: how its ``terms`` are added, each standing for a run of alike ones.

    ``how`` is "in order" (one after the other), "pairwise" (halves and their halves), "fused" (in
    one step), "in turn" (not summed by themselves, but each added to what was there before), or ""
    for a single leaf. ``first`` is its lowest leaf.
    """

    how: str
    terms: tuple[AlikeTerms, ...]
    n_leaves: int
    first: int

    @property
    def n_terms(self) -> int:
        return sum(run.count for run in self.terms)


@dataclass(frozen=True, slots=True)
class AlikeTerms:
    """``count`` terms of one form, each ``stride`` leaves after the one before."""

    count: int
    stride: int
    form: Fold


def fold(tree: SumTree) -> Fold:
    """The tree's folded form."""
    return _fold(tree, (tree.root,))


def phrase(form: Fold) -> str:
    """The whole form on one line, as in "in order: 4 × (64 in order)"."""
    if _is_flat(form):
        return f"{form.n_leaves} {_manner(form)}".rstrip()
    return f"{form.how}: {' + '.join(map(_run_phrase, form.terms))}"


def lines(form: Fold) -> Iterator[str]:
    """The form as an ASCII tree, one line a run of alike terms."""
    yield f"{_leaves(form)} {_manner(form)}".rstrip()
    yield from _branches(form, "")


def _branches(form: Fold, indent: str) -> Iterator[str]:
    if _is_flat(form):
        return
    for index, run in enumerate(form.terms):
        is_last = index == len(form.terms) - 1
        yield f"{indent}{'`-' if is_last else '|-'} {_heading(run)}"
        yield from _branches(run.form, indent + ("   " if is_last else "|  "))


def _heading(run: AlikeTerms) -> str:
    if not run.form.how:
        last = run.form.first + (run.count - 1) * run.stride
        return (
            f"term {last}" if run.count == 1 else f"terms {run.form.first} to {last}{_stride(run)}"
        )
    times = f"{run.count} x " if run.count > 1 else ""
    place = f"{abs(run.stride)} apart" if run.count > 1 else f"from {run.form.first}"
    return f"{times}{_leaves(run.form)} {_manner(run.form)}, {place}"


def _is_flat(form: Fold) -> bool:
    """Whether its terms are one run of leaves."""
    return not form.how or (len(form.terms) == 1 and not form.terms[0].form.how)


def _manner(form: Fold) -> str:
    return form.how + (_stride(form.terms[0]) if form.how and _is_flat(form) else "")


def _leaves(form: Fold) -> str:
    return f"{form.n_leaves} term{'s' * (form.n_leaves != 1)}"


def _run_phrase(run: AlikeTerms) -> str:
    if not run.form.how:
        return f"{run.count}{_stride(run)}"
    return f"{run.count} × ({phrase(run.form)})" if run.count > 1 else f"({phrase(run.form)})"


def _stride(run: AlikeTerms) -> str:
    if run.count == 1 or run.stride == 1:
        return ""
    return " backwards" if run.stride == -1 else f" (every {abs(run.stride)}{_suffix(run.stride)})"


def _suffix(stride: int) -> str:
    if abs(stride) % 100 in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(abs(stride) % 10, "th")


Term = tuple[int, ...]
"""What one step of a sum adds: one id, or the several that a fused step takes in."""


def _fold(tree: SumTree, term: Term) -> Fold:
    first = min(tree.first_leaves[node] for node in term)
    n_leaves = sum(tree.sizes[node] for node in term)
    if n_leaves == 1:
        return Fold("", (), 1, first)
    if len(term) > 1:
        return Fold("fused", tuple(_runs(tree, [(node,) for node in term])), n_leaves, first)
    terms = _chain(tree, term[0])
    if len(terms) == 1:  # one fused step
        return _fold(tree, terms[0])
    how = "in order"
    if len(terms) == 2 and _are_alike(tree, *terms):
        how, terms = "pairwise", _halves(tree, term[0])
    return Fold(how, tuple(_runs(tree, terms)), n_leaves, first)


def _chain(tree: SumTree, node: int) -> list[Term]:
    """The terms that are added one after the other to what is always the larger operand."""
    terms: list[Term] = []
    while True:
        *small, large = sorted(tree.children(node), key=lambda c: tree.sizes[c])
        if tree.sizes[large] == tree.sizes[small[-1]]:
            break
        terms.append(tuple(small))
        node = large
        if len(small) == 1 and tree.sizes[small[0]] > 1 and _are_alike(tree, (node,), terms[-1]):
            return [(node,), *reversed(terms)]  # a chain of blocks, the first of them whole
    # The operands are of one size: a first pair or a first fused step, or two halves.
    start: list[Term] = [(node,)]
    if len(small) > 1:
        start = [tree.children(node)]
    elif tree.sizes[large] == 1 or not terms or tree.sizes[terms[-1][0]] > 1:
        pair = sorted((large, *small), key=lambda c: tree.first_leaves[c])
        goes_down = terms and tree.first_leaves[terms[-1][0]] < tree.first_leaves[pair[0]]
        start = [(c,) for c in (reversed(pair) if goes_down else pair)]
    return [*start, *reversed(terms)]


def _halves(tree: SumTree, node: int) -> list[Term]:
    """Terms of a balanced tree: split while every part has two halves of one shape."""
    level = list(tree.children(node))
    while all(
        len(pair) == 2 and _are_alike(tree, *((c,) for c in pair)) and len(_chain(tree, part)) == 2
        for part in level
        for pair in [tree.children(part)]
    ):
        level = [child for part in level for child in tree.children(part)]
    return [(part,) for part in sorted(level, key=tree.first_leaves.__getitem__)]


def _are_alike(tree: SumTree, a: Term, b: Term) -> bool:
    """Whether two terms are the same but for their place."""
    return _form(tree, a) == _form(tree, b)


def _form(tree: SumTree, term: Term) -> list[tuple[int, str]]:
    first = min(tree.first_leaves[node] for node in term)
    return sorted((tree.first_leaves[node] - first, tree.shapes[node]) for node in term)


def _runs(tree: SumTree, terms: list[Term]) -> Iterator[AlikeTerms]:
    """Runs of alike terms, and runs of alike groups of them."""
    places = [min(tree.first_leaves[node] for node in term) for term in terms]
    forms = [_form(tree, term) for term in terms]
    runs: list[tuple[int, int, int]] = []  # (first term, count, stride)
    start = 0
    while start < len(terms):
        end = start + 1
        stride = places[end] - places[start] if end < len(terms) else 1
        while (
            end < len(terms)
            and forms[end] == forms[start]
            and places[end] - places[end - 1] == stride
        ):
            end += 1
        runs.append((start, end - start, stride if end - start > 1 else 1))
        start = end

    def distance(a: int, b: int) -> int | None:
        """How far apart two runs are that differ in their place alone."""
        (i, *like), (j, *other) = runs[a], runs[b]
        return places[j] - places[i] if like == other and forms[i] == forms[j] else None

    def repeats(at: int, period: int) -> int:
        """How many equal groups of ``period`` runs follow each other, evenly spaced."""
        if at + 2 * period > len(runs) or (apart := distance(at, at + period)) is None:
            return 1
        end = at + period
        while end < len(runs) and distance(end - period, end) == apart:
            end += 1
        return (end - at) // period

    at = 0
    while at < len(runs):
        period = max((1, 2, 3), key=lambda p: (repeats(at, p) - 1) * p)
        count = repeats(at, period)
        group = [
            AlikeTerms(length, stride, _fold(tree, terms[first]))
            for first, length, stride in runs[at : at + (period if count > 1 else 1)]
        ]
        if count == 1:
            yield group[0]
            at += 1
            continue
        n_leaves = sum(run.count * run.form.n_leaves for run in group)
        stride = distance(at, at + period) or 0
        yield AlikeTerms(
            count, stride, Fold("in turn", tuple(group), n_leaves, places[runs[at][0]])
        )
        at += count * period
