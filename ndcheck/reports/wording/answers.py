"""Whether answers flip where tokens do, and how right they are, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ndcheck.analysis.summary import ProbeSummary
from ndcheck.findings import Findings
from ndcheck.records import ARMS
from ndcheck.reports.wording.phrases import count, draws, load_name, percent


class Accuracy(NamedTuple):
    """Right samples of all with a known answer, over the probes of one arm, at one kind of load."""

    load: str
    n_right: int
    n_samples: int

    @property
    def share(self) -> float:
        return self.n_right / self.n_samples


def flips(probe: ProbeSummary) -> str | None:
    """Flips of the answer beside flips of tokens; None where no answers were asked for."""
    found = probe.answers
    if found is None:
        return None
    without = f", {found.n_without} without one" if found.n_without else ""
    return (
        f"answers: {found.n_unique} unique in {count(probe.n_samples, 'completion')}{without}, "
        f"flipped in {found.flipped_draws} of {draws(probe)}; tokens: {probe.n_unique} unique, "
        f"flipped in {probe.diverged_draws}"
    )


def accuracies(probes: Sequence[ProbeSummary]) -> list[Accuracy]:
    """By kind of load, the least accurate first; empty where no right answer is known."""
    counts: dict[str, list[int]] = {}
    for probe in probes:
        for load in probe.loads:
            if load.n_correct is not None and load.n_samples:
                name = f"{load_name(load.axis, load)} at {count(load.batch_size, 'row')}"
                known = counts.setdefault(name, [0, 0])
                known[0] += load.n_correct
                known[1] += load.n_samples
    return sorted((Accuracy(name, *known) for name, known in counts.items()), key=_share)


def _share(accuracy: Accuracy) -> float:
    return accuracy.share


def accuracy(findings: Findings) -> list[str]:
    """A sentence for each arm: how right its answers are, and the spread of that over loads."""
    sentences = []
    for arm in ARMS:
        probes = [probe for probe in findings.summary.probes if probe.arm == arm]
        by_load = accuracies(probes)
        if not by_load:
            continue
        n_prompts = sum(p.answers is not None and p.answers.n_correct is not None for p in probes)
        n_right = sum(each.n_right for each in by_load)
        n_samples = sum(each.n_samples for each in by_load)
        worst, best = by_load[0], by_load[-1]
        spread = f"the same in {count(len(by_load), 'kind')} of load"
        if worst.share < best.share:
            spread = f"by kind of load from {_of(worst)} to {_of(best)}"
        subject = f"{arm}: " if len(findings.run.spec.arms) > 1 else ""
        sentences.append(
            f"{subject}{percent(n_right / n_samples)} % right ({n_right} of {n_samples} answers to "
            f"{count(n_prompts, 'prompt')}), {spread}"
        )
    return sentences


def _of(found: Accuracy) -> str:
    return f"{percent(found.share)} % ({found.n_right} of {found.n_samples}, {found.load})"
