"""The probes and arms of a run, as the template of the HTML report reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ndcheck.analysis.summary import LoadFinding, ProbeSummary
from ndcheck.findings import Findings
from ndcheck.judging.verdict import Outcome, ProbeVerdict, Verdict, worst
from ndcheck.records import Arm
from ndcheck.reports.figures import ArmFigures, LoadGroup
from ndcheck.reports.trees.trunks import Trunk, find_trunk, walk
from ndcheck.reports.wording import phrases

MAX_IN_TREE = 150
N_COLOURS = 7


@dataclass(frozen=True, slots=True)
class ArmView:
    """One arm of one probe, as the template reads it."""

    index0: int
    arm: Arm
    figures: ArmFigures
    tree: Trunk | None
    colours: Mapping[int, int]
    """By completion: 0 the main trunk's, then 1 to N_COLOURS in turn."""
    verdict: Verdict
    axes: Mapping[str, Verdict]


@dataclass(frozen=True, slots=True)
class ProbeView:
    """One probe in all its arms."""

    index0: int
    probe_id: str
    prompt: str
    arms: tuple[ArmView, ...]

    @property
    def summaries(self) -> list[ProbeSummary]:
        return [arm.figures.probe for arm in self.arms]

    @property
    def has_margins(self) -> bool:
        return any(arm.figures.reference_margins or arm.figures.forks for arm in self.arms)

    @property
    def has_latent(self) -> bool:
        return any(row.latent is not None for arm in self.arms for row in arm.figures.rows)

    @property
    def outcome(self) -> Outcome:
        return worst([arm.verdict.outcome for arm in self.arms])


def make_views(
    findings: Findings, figures: Mapping[tuple[Arm, str], ArmFigures]
) -> list[ProbeView]:
    verdicts = findings.verdicts
    views: list[ProbeView] = []
    for probe in findings.run.spec.probes:
        keys = [key for key in figures if key[1] == probe.probe_id]
        if keys:
            arms = tuple(_arm(i, figures[key], verdicts[key]) for i, key in enumerate(keys))
            views.append(ProbeView(len(views), probe.probe_id, probe.prompt, arms))
    return views


def _arm(index0: int, figures: ArmFigures, verdict: ProbeVerdict) -> ArmView:
    order = [trunk for trunk, _ in walk(figures.trunk)] if figures.trunk else []
    colours = {
        trunk.completion.completion_id: 1 + (i - 1) % N_COLOURS if i else 0
        for i, trunk in enumerate(order)
    }
    return ArmView(
        index0=index0,
        arm=figures.probe.arm,
        figures=figures,
        tree=find_trunk(figures.probe, MAX_IN_TREE),
        colours=colours,
        verdict=verdict.verdict,
        axes={str(axis): v for axis, v in verdict.axes.items()},
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """All loads of one kind and batch size, with copies or without."""

    n_unique: int
    n_samples: int
    n_diverged: int
    n_latent: int
    n_trials: int


def load_matrix(arm: ArmView) -> tuple[list[int], dict[str, list[Cell | None]]]:
    """Batch sizes, and for each kind of load one cell for each of them."""
    loads = arm.figures.probe.loads
    sizes = sorted({load.batch_size for load in loads})
    grouped: dict[tuple[str, bool], dict[int, list[LoadFinding]]] = {}
    for load in loads:
        row = grouped.setdefault((phrases.load(load), load.holds_copies), {})
        row.setdefault(load.batch_size, []).append(load)
    unique = arm.figures.unique_by_load
    return sizes, {
        f"{name}, {phrases.filling(copies=True)}" if copies else name: [
            _cell(row.get(size, ()), len(unique.get(LoadGroup(name, copies, size), ())))
            for size in sizes
        ]
        for (name, copies), row in grouped.items()
    }


def _cell(loads: Iterable[LoadFinding], n_unique: int) -> Cell | None:
    loads = list(loads)
    if not loads:
        return None
    return Cell(
        n_unique=n_unique,
        n_samples=sum(load.n_samples for load in loads),
        n_diverged=sum(load.n_diverged_trials for load in loads),
        n_latent=sum(load.latent for load in loads),
        n_trials=sum(load.n_trials for load in loads),
    )
