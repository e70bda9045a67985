"""A run from validated spec to exit code: open -> plan -> measure -> report."""

from __future__ import annotations

import importlib.util
import json
import shutil
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import typer

from ndcheck import environment
from ndcheck.analysis.statistics import trials_needed
from ndcheck.cli.console import EXIT_CODES, INTERRUPTED, note, note_bad_lines, prints_apart
from ndcheck.cli.progress import ActivityLine, ProgressLine
from ndcheck.cli.trust import Given, confirm
from ndcheck.errors import NdcheckError, TrialError, UsageError, doing
from ndcheck.findings import read_findings
from ndcheck.plan.conversations import as_messages
from ndcheck.plan.coverage import samples_to_try_all, untried_axes
from ndcheck.ranks import check_ranks, rank
from ndcheck.records import Probe, RunSpec, Sample, Trial
from ndcheck.reports.document import make_document
from ndcheck.reports.plots import MAX_PROBES
from ndcheck.reports.progress import minutes
from ndcheck.reports.terminal import print_report
from ndcheck.reports.untrusted import quoted
from ndcheck.reports.wording.reproduction import can_go_on, resume_command
from ndcheck.reports.write import write_reports
from ndcheck.request import DEFAULTS
from ndcheck.runner import (
    Progress,
    begin,
    capture,
    fit_spec,
    new_directory,
    plan,
    refuse_other_prompts,
    refused_axes,
    run_trials,
    slug,
)
from ndcheck.samplers import base
from ndcheck.samplers.backends import backend_of
from ndcheck.samplers.base import Rendered, Sampler, open_sampler
from ndcheck.samplers.calibration import estimate
from ndcheck.samplers.endpoint.private import Private
from ndcheck.storage.evidence import is_continued_by, is_spec_of
from ndcheck.storage.reading import uncollected
from ndcheck.storage.run_directory import RunDirectory, SampleReader, read_run

MAX_LINES_SHOWN, MAX_TEXT_SHOWN = 32, 1000
"""Of a prompt, in lines and in characters of each."""


def start(
    spec: RunSpec,
    private: Private,
    out: Path | None,
    *,
    as_json: bool,
    quiet: bool,
    html: bool,
    plots: bool,
) -> int:
    """Measure from the beginning. Returns the exit code."""
    check_ranks(spec)
    if rank() > 0:
        return follow(spec)
    check_plots(wanted=plots)
    with (
        closing(new_directory(slug(spec.model), out)) as new,
        closing(open_for_run(spec, private, quiet=quiet)) as sampler,
    ):
        spec = fit(spec, sampler, quiet=quiet)
        with ActivityLine(quiet=quiet), doing("planning"):
            trials = plan(spec, sampler)
        if spec.target_rate:
            n_draws = trials_needed(spec.target_rate, spec.confidence)
            draws = "trials" if spec.repeats_are_draws else "distinct loads"
            note(
                f"{n_draws} {draws} of each probe and arm: if none diverges, a rate of "
                f"{spec.target_rate:g} is excluded at {spec.confidence:.0%}",
                quiet=quiet,
            )
        note_untried(spec, trials, quiet=quiet)
        with closing(begin(new, spec, sampler, trials)) as directory:
            return measure(
                directory, trials, sampler, [], as_json=as_json, quiet=quiet, html=html, plots=plots
            )


def note_untried(spec: RunSpec, trials: list[Trial], *, quiet: bool) -> None:
    """Say before hours of measuring that it can show nothing of some properties."""
    untried = untried_axes(spec, trials)
    if untried and spec.target_rate is None:
        needed = samples_to_try_all(spec)
        remedy = "" if needed is None or needed <= spec.n_samples else f": -n {needed} tries all"
        note(f"-n {spec.n_samples} leaves {', '.join(untried)} untried{remedy}", quiet=quiet)


def resume(
    path: Path,
    private: Private,
    given: Sequence[Given],
    *,
    as_json: bool,
    quiet: bool,
    html: bool,
    plots: bool,
) -> int:
    """Go on with a run as it was. Returns the exit code."""
    begun = read_run(path)
    spec = begun.spec
    confirm(spec, given, f"--resume {path}")
    if not is_spec_of(begun):
        raise UsageError(f"--resume {path}: its spec is not what it began with: start a new run")
    check_ranks(spec)
    if rank() > 0:
        return follow(spec)
    check_plots(wanted=plots)
    directory, finished = RunDirectory.resume(path)
    if directory.run.spec != spec:
        directory.close()
        raise UsageError(f"--resume {path}: its run.json was changed meanwhile")
    n_threads = directory.run.environment.numeric_flags.get("threads")
    with (
        closing(directory),
        closing(open_for_run(spec, private, n_threads, quiet=quiet)) as sampler,
    ):
        here = capture(spec, sampler)
        changed = environment.differences(directory.run.environment, here)
        if changed:
            raise UsageError(
                f"--resume {path}: this is not the environment it began in "
                f"({'; '.join(changed)}): start a new run"
            )
        trials = plan(spec, sampler)
        refuse_other_prompts(directory.run, sampler)
        if not is_continued_by(directory.run, finished, trials):
            raise UsageError(
                f"--resume {path}: ndcheck {directory.run.ndcheck_version} planned it otherwise: "
                "start a new run"
            )
        return measure(
            directory,
            trials,
            sampler,
            finished,
            as_json=as_json,
            quiet=quiet,
            html=html,
            plots=plots,
        )


def follow(spec: RunSpec) -> int:
    """Compute what rank 0 measures, in silence. Returns the exit code."""
    from ndcheck.samplers.local.sampler import TransformersSampler

    with prints_apart(), closing(TransformersSampler(spec)) as sampler:
        sampler.follow()
    return 0


def open_for_run(
    spec: RunSpec, private: Private, n_threads: object = None, *, quiet: bool
) -> Sampler:
    """The run's sampler, and what to know of it on stderr."""
    note(f"{backend_of(spec).opening} {spec.model}", quiet=quiet)
    with ActivityLine(quiet=quiet), doing(f"opening {spec.model}"):
        sampler = base.open_for_run(spec, private, lambda line: note(line, quiet=quiet), n_threads)
    for line in sampler.notes:
        note(line, quiet=quiet)
    return sampler


def fit(spec: RunSpec, sampler: Sampler, *, quiet: bool) -> RunSpec:
    """What of the spec the backend can vary and hold, and on stderr what became of the rest."""
    fitted = fit_spec(spec, sampler)
    for axis, reason in refused_axes(spec, sampler).items():
        if axis in spec.axes:
            note(f"{axis} is left out: {reason}", quiet=quiet)
    if fitted.batch_sizes != spec.batch_sizes:
        note(f"--loads auto is {','.join(map(str, fitted.batch_sizes))}", quiet=quiet)
    return fitted


def measure(
    directory: RunDirectory,
    trials: list[Trial],
    sampler: Sampler,
    finished: list[Sample],
    *,
    as_json: bool,
    quiet: bool,
    html: bool,
    plots: bool,
) -> int:
    """Run the trials and report, also on what there is when something ends the run early."""
    failure: NdcheckError | None = None
    go_on = resume_command(directory.run.spec, str(directory.path))
    try:
        with ActivityLine(quiet=quiet) as activity, ProgressLine(quiet=quiet) as line:

            def show(progress: Progress) -> None:
                activity.settle()
                line.show(progress)

            run_trials(trials, sampler, directory, finished, show)
    except KeyboardInterrupt:
        report(directory.path, as_json=as_json, html=html, plots=plots)
        note(f"interrupted; go on with: {go_on}")
        return INTERRUPTED
    except NdcheckError as error:
        failure = error
    code = report(directory.path, as_json=as_json, html=html, plots=plots)
    if failure is not None:
        if any(sample.error is None for sample in SampleReader(directory.path)):
            may = can_go_on(directory.run, has_samples=True)
            note(f"finished trials are kept{f'; go on with: {go_on}' * may}")
        raise failure
    return code


def report(path: Path, *, as_json: bool, html: bool = False, plots: bool = False) -> int:
    """Write the reports of a run and show one. Returns the verdict's exit code."""
    from rich.console import Console

    check_plots(wanted=plots)
    with uncollected():
        findings = read_findings(path)
        note_bad_lines(findings.bad_lines)
        write_reports(findings, DEFAULTS, html=html, plots=plots)
    if html:
        note(f"wrote {path / 'report.html'}")
    if plots:
        rest = len(findings.run.spec.probes) - MAX_PROBES
        note(f"wrote {path / 'plots'}{f' without the last {rest} probes' * (rest > 0)}")
    if as_json:
        typer.echo(json.dumps(make_document(findings), indent=2, allow_nan=False))
    else:
        outputs = [flag for flag, wanted in (("--html", html), ("--plots", plots)) if wanted]
        print_report(Console(highlight=False), findings, DEFAULTS, outputs)
    return EXIT_CODES[findings.judgement.verdict.outcome]


def print_plan(spec: RunSpec, private: Private, *, verbose: bool) -> int:
    """Print what a run would execute, each trial if ``verbose``, and its cost.

    Returns the exit code.
    """
    if rank() > 0:
        return 0
    untimed = backend_of(spec).untimed(spec)
    # What fits beside the weights is only known with them.
    load_weights = untimed is None or not spec.batch_sizes
    started = time.perf_counter()
    with (
        prints_apart(),
        closing(open_sampler(spec, load_weights=load_weights, private=private)) as sampler,
    ):
        load_s = time.perf_counter() - started
        for line in sampler.notes:
            note(line, quiet=False)
        spec = fit(spec, sampler, quiet=False)
        trials = plan(spec, sampler)
        prompt = prompt_rows(spec.probes[0], sampler.render(spec.probes[0].content))
        note_untried(spec, trials, quiet=False)
        duration = time_line(spec, trials, sampler, load_s, untimed)
    if verbose:
        print_trials(trials)
    n_rows = sum(trial.load.batch_size for trial in trials)
    counts = Counter(trial.purpose for trial in trials)
    cost = (
        f"up to {len(trials) * spec.decoding.max_tokens} decode steps and "
        f"{n_rows * spec.decoding.max_tokens} generated tokens"
    )
    if spec.batching == "continuous":
        arrivals = backend_of(spec).arrivals(spec)
        cost = f"continuous batching, arrivals {arrivals}: batch is the most in flight"
    summary = (
        f"{len(trials)} trials ({', '.join(f'{n} {purpose}' for purpose, n in counts.items())}), "
        f"{sum(t.n_samples for t in trials if t.role != 'control')} samples; {cost}"
    )
    width = shutil.get_terminal_size().columns
    typer.echo(textwrap.fill(summary, width, subsequent_indent="  ", break_on_hyphens=False))
    typer.echo(duration)
    typer.echo("\n".join(("", *prompt)))
    return 0


def time_line(
    spec: RunSpec, trials: list[Trial], sampler: Sampler, load_s: float, untimed: str | None
) -> str:
    """How long the run may take, by trials cut short, or that nobody knows."""
    if untimed is None:
        note("timing a few short trials", quiet=False)
        try:
            found = estimate(spec, trials, sampler)
        except TrialError as error:
            untimed = str(error)
        else:
            kind = "at least" if found.is_least else "about"
            length = minutes(load_s + found.elapsed_s)
            return (
                f"time: {kind} {length}, by {found.measured_s:.0f} s of short trials\n"
                "      (half as long again if loads diverge or others use the machine)"
            )
    reason = f" ({untimed})" if untimed else ""
    return f"time: unknown before it runs{reason}; its progress line says how much is left"


def print_trials(trials: list[Trial]) -> None:
    """A line for each."""
    header = (
        "trial",
        "arm",
        "probe",
        "axis",
        "batch",
        "slots",
        "fillers",
        "cache",
        "width",
        "baseline",
    )
    rows = [header, *(plan_row(trial) for trial in trials)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())
    typer.echo()


def prompt_rows(probe: Probe, rendered: Rendered | None) -> list[str]:
    """A probe as the model sees it, or as it is sent to a server, whose template is its own."""
    if rendered is None:
        heading = f"prompt {probe.probe_id}, as it is sent"
        parts = [(m["role"], m["content"]) for m in as_messages(probe.content)]
    else:
        heading = f"prompt {probe.probe_id}, as the model sees it: {len(rendered.tokens)} tokens"
        parts = [("text", rendered.text), *((str(i), text) for i, text in rendered.tokens)]
    lines = [f"{name:>9}  {quoted(text, MAX_TEXT_SHOWN)}" for name, text in parts]
    if len(lines) > MAX_LINES_SHOWN:
        half = MAX_LINES_SHOWN // 2
        lines[half:-half] = [f"{'':>9}  ... {len(lines) - 2 * half} more"]
    return [heading, *lines]


def plan_row(trial: Trial) -> tuple[str, ...]:
    """One trial as cells; long lists are shown by their ends."""
    load = trial.load
    lengths = sorted(set(load.filler_lengths))
    ends = "-".join(map(str, dict.fromkeys((lengths[0], lengths[-1])))) if lengths else ""
    fillers = f"{len(load.filler_lengths)} of {ends}" if lengths else ""
    slots = f"{load.slots[0]}-{load.slots[-1]}" if len(load.slots) > 1 else str(load.slots[0])
    return (
        str(trial.trial_id),
        trial.arm,
        trial.probe_id,
        trial.purpose,
        str(load.batch_size),
        slots,
        fillers,
        load.cache_state,
        "all" if load.scores else f"{'draft ' * load.drafts}{load.width}",
        "" if trial.baseline is None else str(trial.baseline),
    )


def refuse_other_options(
    context: typer.Context, allowed: set[str], option: str = "--resume"
) -> None:
    """Raise UsageError if the command line holds an option that ``option`` leaves no room for."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in allowed and source is not None and source.name == "COMMANDLINE":
            raise UsageError(
                f"{option} goes on with the run as it was: --{name.replace('_', '-')} "
                "cannot be changed; start a new run for that"
            )


def check_plots(*, wanted: bool) -> None:
    """Raise UsageError before anything is measured if the plots could not be drawn."""
    if wanted and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plots needs matplotlib: pip install 'ndcheck[plots]'")
