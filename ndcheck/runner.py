"""plan -> sampler -> store, one trial at a time, each kept before the next starts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path

from ndcheck import __version__, environment
from ndcheck.analysis.divergence import first_divergence
from ndcheck.analysis.statistics import trials_needed
from ndcheck.errors import TrialError, UsageError, doing, first_line
from ndcheck.plan.confirmations import plan_confirmations
from ndcheck.plan.faults import plant_fault
from ndcheck.plan.grid import batch_sizes_up_to
from ndcheck.plan.trials import plan_trials
from ndcheck.records import AXES, Arm, Axis, Environment, Run, RunSpec, RunStatus, Sample, Trial
from ndcheck.reports.wording import phrases
from ndcheck.samplers.backends import backend_of
from ndcheck.samplers.base import Sampler, WorksAhead
from ndcheck.samplers.options import DEFAULTS
from ndcheck.storage.evidence import spec_digest, trial_digests
from ndcheck.storage.reading import is_unicode
from ndcheck.storage.run_directory import NewDirectory, RunDirectory, failed_samples

RUNS_DIRECTORY = Path("ndcheck-runs")
MOST_PROMPT_TOKENS = 2_000_000
"""Of all probes: run.json holds their ids up to here, some 14 MB."""
NO_CACHE_CONTROL = "what the prefix cache holds cannot be set here and seen to work"


@dataclass(slots=True)
class Progress:
    """What is known so far; ``unique`` counts each arm's completions over all its probes.

    Positions count ``unit``s.
    """

    n_trials: int
    unit: str = "token"
    n_done: int = 0
    unique: dict[str, int] = field(default_factory=dict)
    first_divergence: int | None = None
    elapsed_s: float = 0.0
    _references: dict[tuple[Arm, str], tuple[int, ...]] = field(default_factory=dict)
    _completions: set[tuple[Arm, str, int]] = field(default_factory=set)

    def add(self, samples: Sequence[Sample]) -> bool:
        """Take one trial in; True if its tokens diverged from the reference."""
        self.n_done += 1
        diverged = False
        for sample in samples:
            if sample.error is not None or sample.role == "control":
                continue
            probe = (sample.arm, sample.probe_id)
            if sample.is_reference:
                self._references.setdefault(probe, sample.token_ids)
            key = (*probe, hash(sample.token_ids))
            if key not in self._completions:
                self._completions.add(key)
                self.unique[sample.arm] = self.unique.get(sample.arm, 0) + 1
            if probe not in self._references:
                continue
            position = first_divergence(sample.token_ids, self._references[probe])
            if position is not None:
                diverged = True
                if self.first_divergence is None or position < self.first_divergence:
                    self.first_divergence = position
        return diverged


def fit_spec(spec: RunSpec, sampler: Sampler) -> RunSpec:
    """The spec that `plan` takes: with what the sampler can vary and the batches that it can hold.

    Raises UsageError where it cannot do what was asked for by name.
    """
    return _fit_loads(_fit_axes(spec, sampler), sampler)


def _fit_axes(spec: RunSpec, sampler: Sampler) -> RunSpec:
    """``spec`` without the axes that are refused. Raises UsageError if one was named."""
    refused = refused_axes(spec, sampler)
    if spec.draft is not None and "width" in refused:
        raise UsageError(f"--draft: {refused['width']}")
    named = [axis for axis in spec.axes if axis in refused]
    asked_all = spec.axes in (AXES, backend_of(spec).blank(DEFAULTS).axes)
    if named and not asked_all:
        raise UsageError(f"--axes: {refused[named[0]]}: leave out {named[0]}")
    return replace(spec, axes=tuple(axis for axis in spec.axes if axis not in refused))


def refused_axes(spec: RunSpec, sampler: Sampler) -> dict[Axis, str]:
    """The axes along which nothing can be measured, each with why."""
    refused = dict(sampler.refused_axes)
    n_fed = spec.decoding.max_tokens - 1
    if n_fed < min(spec.widths):
        refused.setdefault("width", f"{n_fed} tokens after the first fill no pass")
    if not n_fed:
        refused.setdefault("scoring", "a single token follows from the prompt alone")
    if not sampler.cache_states:
        refused.setdefault("cache", NO_CACHE_CONTROL)
    return refused


def _fit_loads(spec: RunSpec, sampler: Sampler) -> RunSpec:
    """The spec with batch sizes: its own, or for `--loads auto` all that fit in memory."""
    if spec.batch_sizes:
        return spec
    longest = max(sampler.count_tokens(probe.content) for probe in spec.probes)
    largest = sampler.largest_batch_size(longest, spec.decoding)
    return replace(spec, batch_sizes=batch_sizes_up_to(largest))


def capture(spec: RunSpec, sampler: Sampler) -> Environment:
    """Where the model runs: of a server only it can tell."""
    if backend_of(spec).is_remote:
        return environment.capture_client(sampler.describe())
    return environment.capture(sampler.describe())


def plan(spec: RunSpec, sampler: Sampler) -> list[Trial]:
    """The run's trials. Raises UsageError where a prompt is empty or too long for the model."""
    lengths = {probe.probe_id: sampler.count_tokens(probe.content) for probe in spec.probes}
    for probe_id, length in lengths.items():
        if length == 0:
            raise UsageError(f"prompt {probe_id} has no tokens")
    n_draws = trials_needed(spec.target_rate, spec.confidence) if spec.target_rate else None
    trials = plan_trials(spec, lengths, sampler.context, n_draws, sampler.cache_states)
    if not sampler.interleaves_arms:
        trials.sort(key=lambda trial: spec.arms.index(trial.arm))
    return trials


def new_directory(name: str, out: Path | None) -> NewDirectory:
    """``out``, or a directory named by time and ``name`` in RUNS_DIRECTORY."""
    if out is not None:
        if not is_unicode(_run_id(out)):
            raise UsageError(f"--out {out}: a run is named after it, and it is not valid UTF-8")
        return NewDirectory.take(out)
    return NewDirectory.take_free(RUNS_DIRECTORY / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}")


def _run_id(path: Path) -> str:
    """The name of a run's directory, be it given as ``.`` or ``..``."""
    return (path.resolve() if path.name in ("", "..") else path).name


def begin(
    new: NewDirectory, spec: RunSpec, sampler: Sampler, trials: Sequence[Trial]
) -> RunDirectory:
    """The run that ``trials`` were planned for, in its directory."""
    run = Run(
        run_id=_run_id(new.path),
        ndcheck_version=__version__,
        spec=spec,
        environment=capture(spec, sampler),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        n_trials_planned=len(trials),
        trial_digests=trial_digests(trials),
        spec_digest=spec_digest(spec),
        nonce=secrets.token_hex(8),
        prompt_token_ids=_prompt_token_ids(spec, sampler),
    )
    return new.begin(run)


def _prompt_token_ids(spec: RunSpec, sampler: Sampler) -> tuple[str, ...]:
    """As `Run` holds them, so that `ndcheck score` needs no tokenizer."""
    found = [sampler.encode(probe.content) or () for probe in spec.probes]
    if not 0 < sum(map(len, found)) <= MOST_PROMPT_TOKENS:
        return ()
    return tuple(" ".join(map(str, ids)) for ids in found)


def refuse_other_prompts(run: Run, sampler: Sampler) -> None:
    """Raise UsageError where a prompt has other tokens than when ``run`` began."""
    ids = _prompt_token_ids(run.spec, sampler) if run.prompt_token_ids else ()
    for probe, before, now in zip(run.spec.probes, run.prompt_token_ids, ids, strict=False):
        if before and now and before != now:
            raise UsageError(
                f"prompt {probe.probe_id} has other tokens than when run {run.run_id} began: its "
                "chat template says the date, or the tokenizer is another: start a new run"
            )


def slug(model: str) -> str:
    """The end of a model's name, in characters that every file system takes."""
    name = model.rstrip("/").rpartition("/")[2]
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:40] or "model"


def run_trials(
    trials: Sequence[Trial],
    sampler: Sampler,
    directory: RunDirectory,
    finished: Sequence[Sample] = (),
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Run:
    """Execute the trials that ``finished`` does not hold yet, and close the run's record.

    Loads that diverged once are run again after all others, which tells what a load does every time
    from chance; not where that would take an engine's other arm. A trial that fails alone is kept
    as samples with its error.
    KeyboardInterrupt and BackendError end the run, keep what is finished, and are raised again.
    """
    run = directory.run
    probes = {probe.probe_id: probe for probe in run.spec.probes}
    progress = Progress(len(trials), phrases.unit(run), elapsed_s=run.elapsed_s)
    lengths: dict[int, int] = {}
    reference_lengths: dict[tuple[Arm, str], int] = {}
    rows_of: dict[int, dict[int, tuple[int, int]]] = {}
    elapsed_before_s, started = run.elapsed_s, time.perf_counter()

    def close(status: RunStatus, stop_reason: str | None = None) -> Run:
        elapsed_s = elapsed_before_s + time.perf_counter() - started
        changes = tuple(dict.fromkeys((*run.changes, *sampler.changes())))
        directory.save(
            replace(
                run,
                status=status,
                stop_reason=stop_reason,
                elapsed_s=round(elapsed_s, 3),
                changes=changes,
            )
        )
        return directory.run

    def take_in(samples: Sequence[Sample]) -> bool:
        for sample in samples:
            lengths.setdefault(sample.trial_id, len(sample.token_ids))
            if sample.is_reference:
                key = sample.arm, sample.probe_id
                reference_lengths.setdefault(key, len(sample.token_ids))
            if sample.error is None:
                bits = hash((sample.logprobs, sample.row_digests))
                rows = rows_of.setdefault(sample.trial_id, {})
                rows[sample.slot] = hash(sample.token_ids), bits
        diverged = progress.add(samples)
        progress.elapsed_s = elapsed_before_s + time.perf_counter() - started
        return diverged

    by_trial: dict[int, list[Sample]] = {}
    for sample in finished:
        by_trial.setdefault(sample.trial_id, []).append(sample)

    def with_fault(trial: Trial) -> Trial:
        if trial.role != "control":
            return trial
        length = lengths.get(-1 if trial.baseline is None else trial.baseline)
        # Where the baseline failed, the first reference that did not takes its place.
        length = length or reference_lengths.get((trial.arm, trial.probe_id), 0)
        return replace(trial, fault=plant_fault(length))

    def begin_next(trial: Trial, following: Trial | None) -> None:
        if (
            isinstance(sampler, WorksAhead)
            and following is not None
            and following.trial_id not in by_trial
            # What is known of an arm does not change while the other computes.
            and following.arm != trial.arm
        ):
            probe = probes[following.probe_id]
            sampler.begin(with_fault(following), probe, run.spec.decoding)

    def execute(trials: Sequence[Trial]) -> bool:
        """False if a divergence ended it."""
        for trial, following in zip_longest(trials, trials[1:]):
            if trial.trial_id in by_trial:
                diverged = take_in(by_trial[trial.trial_id])
            else:
                trial = with_fault(trial)
                begin_next(trial, following)
                trial_started = time.perf_counter()
                try:
                    with doing(f"sampling trial {trial.trial_id}"):
                        probe = probes[trial.probe_id]
                        samples = sampler.sample(trial, probe, run.spec.decoding)
                except TrialError as error:
                    elapsed_s = time.perf_counter() - trial_started
                    samples = failed_samples(trial, str(error), elapsed_s)
                directory.append(samples)
                diverged = take_in(samples)
                on_progress(progress)
            if diverged and run.spec.stop_on_divergence:
                return False
        return True

    try:
        stop_reason = None
        if not execute(trials):
            stop_reason = "stopped at the first divergence, as asked"
        elif sampler.interleaves_arms:
            again = plan_confirmations(trials, rows_of)
            progress.n_trials += len(again)
            if again:
                # On disk before the first of them: a later reading holds every sample against it.
                everything = (*trials, *again)
                run = replace(
                    run,
                    n_trials_planned=len(everything),
                    trial_digests=trial_digests(everything),
                )
                directory.save(run)
            execute(again)
    except KeyboardInterrupt:
        close("interrupted")
        raise
    except UsageError as error:
        close("failed", first_line(error))
        raise
    except BaseException:
        close("failed")
        raise
    return close("finished", stop_reason)
