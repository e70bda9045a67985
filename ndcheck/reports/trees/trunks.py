"""The divergence tree as trunks: paths followed to their end, with what leaves them on the way.

A tree of a thousand completions may fork a thousand times in a row. Drawn as trunks it is flat:
whatever leaves a frequent path has fewer samples than what stays, so trunks nest about
log2(samples) deep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ndcheck.analysis.summary import Completion, ProbeSummary
from ndcheck.analysis.tree import Fork
from ndcheck.reports.trees.branches import branches_to, reference_id, shown_completions


@dataclass(frozen=True, slots=True)
class Parting:
    """A fork on a trunk, at a token position from 0: ``n_staying`` of ``n_samples`` go on.

    ``margin`` is top-1 minus top-2 logit, None where unknown. Exits whose completions are all left
    out of the tree are not in ``exits``.
    """

    position: int
    n_samples: int
    n_staying: int
    margin: float | None
    exits: tuple[Trunk, ...]

    @property
    def n_left_out(self) -> int:
        """Samples that leave by exits which are not shown."""
        return self.n_samples - self.n_staying - sum(trunk.n_samples for trunk in self.exits)


@dataclass(frozen=True, slots=True)
class Trunk:
    """The path from token ``start`` to the end of ``completion``, which ``n_samples`` enter."""

    start: int
    n_samples: int
    completion: Completion
    is_reference: bool
    partings: tuple[Parting, ...]

    def stretch(self, index: int) -> tuple[int, int]:
        """Token positions from parting ``index`` (-1: the start) to the next, or to the end."""
        start = self.start if index < 0 else self.partings[index].position
        following = self.partings[index + 1 : index + 2]
        return start, following[0].position if following else self.completion.n_tokens

    def text(self, index: int) -> str:
        """What is written there."""
        return "".join(self.completion.token_texts[slice(*self.stretch(index))])


def find_trunk(probe: ProbeSummary, max_completions: int) -> Trunk | None:
    """The reference's path, or the most frequent one; None where there is no completion.

    At most about ``max_completions`` are in it: the most frequent ones.
    """
    if not probe.completions:
        return None
    shown = shown_completions(probe, max_completions)
    return _follow(probe, probe.tree, 0, probe.n_samples, shown, reference_id(probe))


def _follow(
    probe: ProbeSummary,
    fork: Fork | None,
    start: int,
    n_samples: int,
    shown: set[int],
    reference: int | None,
) -> Trunk:
    partings = []
    while fork is not None:
        branches = branches_to(fork, shown)
        main = next((b for b in branches if reference in b.completion_ids), branches[0])
        if len(branches) > 1:
            exits = tuple(
                _follow(
                    probe,
                    branch.fork,
                    fork.position,
                    branch.count,
                    shown.intersection(branch.completion_ids),
                    None,
                )
                for branch in branches
                if branch is not main
            )
            n_at_fork = fork.n_samples
            partings.append(Parting(fork.position, n_at_fork, main.count, fork.margin, exits))
        shown = shown.intersection(main.completion_ids)
        fork = main.fork
    (completion_id,) = shown
    return Trunk(
        start=start,
        n_samples=n_samples,
        completion=probe.completions[completion_id - 1],
        is_reference=completion_id == reference,
        partings=tuple(partings),
    )


def walk(trunk: Trunk, parent: Trunk | None = None) -> Iterator[tuple[Trunk, Trunk | None]]:
    """Every trunk with the one it leaves, neighbours in the tree beside each other.

    Who leaves last comes first, so that in a picture of all rows the exits look like stairs.
    """
    yield trunk, parent
    for parting in reversed(trunk.partings):
        for leaving in parting.exits:
            yield from walk(leaving, trunk)
