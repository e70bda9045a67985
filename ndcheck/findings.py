"""What a run showed: the one value that all reports render, and the one way to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ndcheck.analysis.summarising import summarise
from ndcheck.analysis.summary import Summary
from ndcheck.judging.comparison import Measured, find_references
from ndcheck.judging.verdict import Judgement, ProbeVerdict, judge
from ndcheck.records import Arm, Run, Sample
from ndcheck.storage.explanation import read_advice
from ndcheck.storage.reading import uncollected
from ndcheck.storage.run_directory import SampleReader, read_run


@dataclass(frozen=True, eq=False)
class Findings:
    """A run's record, its samples, what they show, and what that means.

    ``samples`` are all of the run's, controls too, in the order that ``summary.samples`` has; they
    can be read again. ``directory`` is the run's, as the user named it: None where it has none.
    ``bad_lines`` name the lines of samples that were left out.
    """

    run: Run
    samples: Iterable[Sample]
    summary: Summary
    judgement: Judgement
    directory: Path | None = None
    bad_lines: tuple[str, ...] = ()

    @cached_property
    def verdicts(self) -> Mapping[tuple[Arm, str], ProbeVerdict]:
        """By arm and probe id."""
        return {(verdict.arm, verdict.probe_id): verdict for verdict in self.judgement.probes}

    @cached_property
    def advice(self) -> tuple[str, ...]:
        """What `ndcheck trace` made of the run. Raises UsageError where its file is damaged.

        Read when a report shows it: a damaged explanation takes nothing from a verdict.
        """
        return () if self.directory is None else tuple(read_advice(self.directory))

    @cached_property
    def measured(self) -> Measured:
        """What `ndcheck.judging.comparison.compare` takes; the samples are read once more."""
        return Measured(self.run, self.summary, find_references(self.samples, self.summary))


def find(run: Run, samples: Iterable[Sample]) -> Findings:
    """Summarise ``samples``, which can be iterated twice, and judge the run by them."""
    summary = summarise(samples, run.spec)
    if isinstance(samples, SampleReader):
        # Only now have all lines been held against the plan.
        run = replace(run, flaws=samples.flaws)
    return Findings(run, samples, summary, judge(run, summary))


def read_findings(directory: Path) -> Findings:
    """Read a run's directory, summarise and judge. Raises UsageError if it holds no run."""
    run = read_run(directory)
    samples = SampleReader(directory, run)
    with uncollected():
        found = find(run, samples)
    return replace(found, directory=directory, bad_lines=tuple(samples.bad_lines))
