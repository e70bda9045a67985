"""The numbers behind the figures, which the HTML report and the plots draw alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from ndcheck.analysis.summary import ProbeSummary
from ndcheck.findings import Findings
from ndcheck.records import Arm
from ndcheck.reports.trees.trunks import Trunk, find_trunk, walk
from ndcheck.reports.wording import phrases

MAX_COMPLETIONS = 1000
MAX_ROWS = 4000
"""Rows of all heat strips together; each gets its share, and at least MIN_ROWS."""
MIN_ROWS = 100
MAX_BINS = 40


class LoadGroup(NamedTuple):
    """Loads that a figure takes together: copies of the probe are no loads with one probe row."""

    name: str
    holds_copies: bool
    batch_size: int


@dataclass(frozen=True, slots=True)
class Row:
    """One sample in the heat strip.

    ``latent``: from which token on its bits differ and its tokens do not, and the end of that, from
    0; None where no bits were seen to differ.
    """

    sample_id: int
    trial_id: int
    load: str
    batch_size: int
    slot: int
    completion_id: int
    latent: tuple[int, int] | None


@dataclass(slots=True)
class ArmFigures:
    """One probe in one arm.

    ``unique_by_load`` goes by kind of load, ``divergences`` counts samples by the position
    (from 0) of their first divergence, ``reference_margins`` are the reference's top-1 minus top-2
    logits per token (NaN where there is no runner-up).
    """

    probe: ProbeSummary
    trunk: Trunk | None
    rows: list[Row] = field(default_factory=list)
    unique_by_load: dict[LoadGroup, set[int]] = field(default_factory=dict)
    divergences: Counter[int] = field(default_factory=Counter)
    reference_margins: tuple[float, ...] = ()

    @property
    def fillings(self) -> tuple[bool, ...]:
        """Whether loads of several rows hold copies: both kinds where both ran, never pooled."""
        found = {load.holds_copies for load in self.probe.loads if load.batch_size > 1}
        return tuple(sorted(found)) or (False,)

    def unique_by_batch_size(self, *, copies: bool) -> dict[int, int]:
        """Of loads full of copies, or of those with one probe row; a batch of one is both."""
        found: dict[int, set[int]] = {}
        for load, completions in self.unique_by_load.items():
            if load.batch_size == 1 or load.holds_copies == copies:
                found.setdefault(load.batch_size, set()).update(completions)
        return {batch_size: len(found[batch_size]) for batch_size in sorted(found)}

    def tokens_per_s(self, *, copies: bool) -> dict[int, float]:
        """The probe's tokens over the time of these trials, by batch size."""
        chosen = [x for x in self.probe.loads if x.batch_size == 1 or x.holds_copies == copies]
        found = {}
        by_size = sorted(chosen, key=lambda load: load.batch_size)
        for batch_size, group in groupby(by_size, key=lambda load: load.batch_size):
            timed = [(g.tokens_per_s, g.elapsed_s) for g in group if g.tokens_per_s is not None]
            if elapsed_s := sum(seconds for _, seconds in timed):
                found[batch_size] = sum(speed * seconds for speed, seconds in timed) / elapsed_s
        return found

    @property
    def forks(self) -> list[tuple[int, float]]:
        """Position and margin of every fork in the tree whose margin is known."""
        if self.trunk is None:
            return []
        return sorted(
            (parting.position, parting.margin)
            for trunk, _ in walk(self.trunk)
            for parting in trunk.partings
            if parting.margin is not None
        )


def series_name(arm: ArmFigures, *, copies: bool) -> str:
    """The arm, and how its batches are filled where they are in two ways."""
    name: str = arm.probe.arm
    return f"{name}, {phrases.filling(copies=copies)}" if len(arm.fillings) > 1 else name


def gather(findings: Findings) -> dict[tuple[Arm, str], ArmFigures]:
    """By arm and probe; the samples are read once more."""
    summary = findings.summary
    figures = {
        (probe.arm, probe.probe_id): ArmFigures(probe, find_trunk(probe, MAX_COMPLETIONS))
        for probe in summary.probes
    }
    n_rows = max(MIN_ROWS, MAX_ROWS // max(1, len(figures)))
    shown = {
        key: {trunk.completion.completion_id for trunk, _ in walk(arm.trunk)} if arm.trunk else ()
        for key, arm in figures.items()
    }
    n_seen: Counter[tuple[Arm, str]] = Counter()
    outcomes = zip(
        summary.samples.completion_id.tolist(),
        summary.samples.first_divergence.tolist(),
        summary.samples.latent_divergence.tolist(),
        strict=True,
    )
    for sample, (completion_id, first_divergence, first_latent) in zip(
        findings.samples, outcomes, strict=True
    ):
        if sample.role == "control" or completion_id < 0:
            continue
        key = (sample.arm, sample.probe_id)
        arm = figures[key]
        load = phrases.load_name(sample.purpose, sample.load)
        batch_size = sample.load.batch_size
        group = LoadGroup(load, len(sample.load.slots) > 1, batch_size)
        arm.unique_by_load.setdefault(group, set()).add(completion_id)
        if first_divergence >= 0:
            arm.divergences[first_divergence] += 1
        if sample.is_reference and first_divergence < 0 and not arm.reference_margins:
            arm.reference_margins = tuple(
                margin if math.isfinite(margin) else math.nan for margin in sample.margins
            )
        # Of more samples than rows, every so many: their shares stay what they are.
        stride = -(-arm.probe.n_samples // n_rows)
        if n_seen[key] % stride == 0 and completion_id in shown[key]:
            end = first_divergence if first_divergence >= 0 else len(sample.token_ids)
            row = Row(
                sample_id=sample.sample_id,
                trial_id=sample.trial_id,
                load=load,
                batch_size=batch_size,
                slot=sample.slot,
                completion_id=completion_id,
                latent=(first_latent, end) if first_latent >= 0 else None,
            )
            arm.rows.append(row)
        n_seen[key] += 1
    return figures


def bins(arms: Iterable[ArmFigures]) -> list[int]:
    """The first position of each bin, and the end of the last: whole tokens, equally wide."""
    longest = max((arm.trunk.completion.n_tokens for arm in arms if arm.trunk), default=0)
    latest = max((max(arm.divergences, default=-1) + 1 for arm in arms), default=0)
    n_tokens = max(longest, latest, 1)
    width = -(-n_tokens // MAX_BINS)
    return list(range(0, n_tokens + width, width))


def histogram(arm: ArmFigures, edges: list[int]) -> list[int]:
    """Diverged samples in each bin."""
    counts = [0] * (len(edges) - 1)
    for position, n_samples in arm.divergences.items():
        counts[position // edges[1]] += n_samples
    return counts
