"""Measuring from Python: `measure`, and a run with what it shows."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ndcheck import records
from ndcheck.analysis.summary import Summary
from ndcheck.errors import UsageError, did_you_mean
from ndcheck.findings import read_findings
from ndcheck.judging.verdict import Judgement, Outcome
from ndcheck.ranks import program
from ndcheck.reports.exports import tables
from ndcheck.reports.terminal import print_report
from ndcheck.reports.wording import phrases
from ndcheck.reports.wording.reproduction import reproduce_command
from ndcheck.reports.write import write_reports
from ndcheck.request import DEFAULTS, add_headers, make_private, make_spec
from ndcheck.runner import Progress, begin, fit_spec, new_directory, plan, run_trials, slug
from ndcheck.samplers.base import open_for_run
from ndcheck.samplers.endpoint.private import Private
from ndcheck.storage.reading import exists
from ndcheck.storage.run_directory import RUN_FILE, SAMPLES_FILE, NewDirectory, write_failure

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console, ConsoleOptions, RenderResult

BASELINES_DIRECTORY = Path("ndcheck-baselines")
SCREEN_WIDTH = 100
Watcher = Callable[[Progress], None]


def measure(
    model: str = DEFAULTS.model,
    *,
    out: str | Path | None = None,
    header: str | Sequence[str] = (),
    on_progress: Watcher = lambda progress: None,
    **options: Any,
) -> Run:
    """Measure as `ndcheck run` does, with its options as keywords, and return the run.

    >>> import ndcheck
    >>> run = ndcheck.measure("scripted:batch-dependent", loads=[1, 4], samples=40, max_tokens=8)
    >>> run.verdict
    'FAIL'
    >>> run.completions[["count", "first_divergence"]].to_dict("list")
    {'count': [45, 13], 'first_divergence': [3, None]}

    ``out`` is a new or empty directory (default: one in ``ndcheck-runs``); ``on_progress`` is
    called after every trial. Raises UsageError for an option that is wrong, BackendError where
    the model, its device or its server fails.
    """
    private = make_private(
        [header] if isinstance(header, str) else header,
        options.get("query", ()),
        options.get("extra_body"),
    )
    spec = add_headers(make_spec(model=model, **options), private.headers)
    with closing(new_directory(slug(spec.model), None if out is None else Path(out))) as new:
        return measure_spec(spec, new, on_progress, private)


def measure_spec(
    spec: records.RunSpec,
    new: NewDirectory,
    on_progress: Watcher = lambda progress: None,
    private: Private | None = None,
) -> Run:
    """The same for a spec; the reports are written beside the samples."""
    # Read when torch is imported, if it is not yet; `__main__` says why.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if spec.tensor_parallel > 1:
        raise UsageError(
            f"tp = {spec.tensor_parallel} takes a process for each rank: use {program(spec)}"
        )
    with closing(open_for_run(spec, private)) as sampler:
        spec = fit_spec(spec, sampler)
        trials = plan(spec, sampler)
        with closing(begin(new, spec, sampler, trials)) as directory:
            run_trials(trials, sampler, directory, on_progress=on_progress)
    run = Run(directory.path)
    run.write_reports()
    return run


def find_run(name: str, folder: Path = Path()) -> Path:
    """The directory of a run: ``name`` itself, or a baseline saved under that name.

    Both are looked for in ``folder``. Raises UsageError if neither holds a run.
    """
    saved = folder / BASELINES_DIRECTORY
    for path in (folder / name, saved / name):
        if exists(path / RUN_FILE):
            return path
    names = sorted(path.name for path in saved.iterdir()) if saved.is_dir() else []
    raise UsageError(
        f"{name} holds no run{did_you_mean(name, names) or ';'} saved baselines: "
        f"{', '.join(names) or 'none'}"
    )


def save_baseline(run: Run, name: str) -> Path:
    """Keep what a run measured in ``ndcheck-baselines/NAME``, which must be new."""
    path = BASELINES_DIRECTORY / name
    if path.name != name or exists(path):
        reason = "it exists; remove it first" if exists(path) else "give a plain name"
        raise UsageError(f"baseline {name}: {reason}")
    try:
        path.mkdir(parents=True)
        for file in (SAMPLES_FILE, RUN_FILE):  # run.json last: it is what makes it a run
            shutil.copyfile(run.path / file, path / file)
    except OSError as error:
        raise write_failure(path, error) from error
    return path


class Run:
    """A run's directory, read once, and what it shows.

    Data frames have the columns of the CSV files. Shown by rich or a notebook, it is the screen
    of `ndcheck run`.
    """

    def __init__(self, path: str | Path) -> None:
        """Read a run. Raises UsageError if ``path`` holds none."""
        self.path = Path(path)
        self.findings = read_findings(self.path)

    @property
    def record(self) -> records.Run:
        """How it was made, and how it ended."""
        return self.findings.run

    @property
    def summary(self) -> Summary:
        """What the samples show."""
        return self.findings.summary

    @property
    def judgement(self) -> Judgement:
        """The verdict on each probe, arm and property."""
        return self.findings.judgement

    @property
    def verdict(self) -> Outcome:
        """PASS, FAIL or INCONCLUSIVE."""
        return self.judgement.verdict.outcome

    @property
    def reasons(self) -> tuple[str, ...]:
        """What justifies the verdict."""
        return self.judgement.verdict.reasons

    @property
    def command(self) -> str:
        """The shell command that repeats the run."""
        return reproduce_command(self.record.spec, DEFAULTS, str(self.path))

    @property
    def samples(self) -> pd.DataFrame:
        """One row a sample, controls left out."""
        import pandas as pd

        return pd.concat(tables.sample_tables(self.findings), ignore_index=True)

    @property
    def completions(self) -> pd.DataFrame:
        """One row for each distinct completion of a probe in an arm, the most frequent first."""
        import pandas as pd

        return pd.concat(tables.completion_tables(self.findings), ignore_index=True)

    @property
    def loads(self) -> pd.DataFrame:
        """One row for each kind of load."""
        return tables.loads_table(self.findings)

    @property
    def properties(self) -> pd.DataFrame:
        """One row for each property of a probe in an arm, as the main table has it."""
        return tables.properties_table(self.findings)

    @property
    def probes(self) -> pd.DataFrame:
        """One row for each probe and arm: summary.csv."""
        return tables.summary_table(self.findings)

    def write_reports(self) -> None:
        """Write report.md and the CSV files. Raises BackendError if the disk refuses."""
        write_reports(self.findings, DEFAULTS)

    def print(self, console: Console) -> None:
        """The screen of `ndcheck run`."""
        print_report(console, self.findings, DEFAULTS)

    def __repr__(self) -> str:
        found = "; ".join(phrases.outcome(probe) for probe in self.summary.probes)
        return f"<ndcheck.Run {str(self.path)!r} {self.verdict}: {found}>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.console import Console
        from rich.text import Text

        screen = io.StringIO()
        self.print(
            Console(
                file=screen,
                width=options.max_width,
                highlight=False,
                force_terminal=console.is_terminal,
            )
        )
        yield Text.from_ansi(screen.getvalue())

    def _repr_html_(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=SCREEN_WIDTH, highlight=False, record=True)
        self.print(console)
        return console.export_html(
            inline_styles=True, code_format="<pre style='line-height:1.3'>{code}</pre>"
        )
