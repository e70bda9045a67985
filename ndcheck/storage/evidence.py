"""Is it the evidence that was planned? Each sample against its trial, and all trials at the end.

A run's directory may be cut short, edited or put together from others. What contradicts the plan
is left out and named, and what is left out or missing keeps a run from passing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

from ndcheck.records import Arm, Drafted, Fed, Load, Purpose, Run, RunSpec, Sample, Trial

DIGITS_PER_TRIAL = 8
MAX_NAMED = 5
UNMEASURED = frozenset({"answer", "answer_pattern"})
"""Fields of a spec and its probes that say what to look for in completions, however they came."""

Planned = tuple[Arm, str, Purpose, int | None, Load, int]
"""What all samples of a trial have in common, and the id of its first."""


class Ledger:
    """Takes a run's samples in one by one, each only once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._arms = set(run.spec.arms)
        self._probes = {probe.probe_id for probe in run.spec.probes}
        self._trials: dict[int, Planned] = {}
        self._n_samples: dict[int, int] = {}
        self._n_recorded: Counter[tuple[bool, bool]] = Counter()
        """Completions by whether they have log-probabilities, and digests of logits."""
        self._n_unconnected = 0
        self._seen: set[int] = set()
        self._possible_load: Load | None = None
        """That of the last sample, most often the same object as the next one's."""

    def refuse(self, sample: Sample) -> str | None:
        """Why a sample is no evidence of this run, or None, and then it is counted."""
        reason = self._contradicts_itself(sample) or self._contradicts_its_trial(sample)
        if reason is None and sample.sample_id in self._seen:
            reason = f"sample {sample.sample_id} is there twice"
        if reason is None:
            self._seen.add(sample.sample_id)
            self._n_samples[sample.trial_id] = self._n_samples.get(sample.trial_id, 0) + 1
            if sample.token_ids:
                self._n_recorded[bool(sample.logprobs), bool(sample.row_digests)] += 1
            if self._run.spec.endpoint is not None and sample.error is None:
                self._n_unconnected += not sample.witness.connection
        return reason

    def _contradicts_itself(self, sample: Sample) -> str | None:
        load, n_tokens = sample.load, len(sample.token_ids)
        if sample.arm not in self._arms:
            return f"the run has no arm {sample.arm}"
        if sample.probe_id not in self._probes:
            return f"the run has no probe {sample.probe_id!r}"
        if sample.slot not in load.slots:
            return f"slot {sample.slot} is none of its load's"
        if load is not self._possible_load:
            if reason := _contradicts_its_rows(load):
                return reason
            self._possible_load = load
        if sample.error is not None and n_tokens:
            return "it has tokens and an error"
        if (sample.error is not None) != (sample.finish_reason == "error"):
            return f"it ended by {sample.finish_reason!r}, which does not fit its error"
        if len(sample.token_texts) != n_tokens:
            return f"it has {n_tokens} tokens and the texts of {len(sample.token_texts)}"
        if (sample.fed is not None) != (load.is_fed and sample.error is None):
            return "what it says of tokens that were fed does not fit its load"
        if sample.fed is not None and not _is_possible_of_fed(sample.fed):
            return "what it says of tokens that were fed contradicts itself"
        if (sample.drafted is not None) != (load.drafts and sample.error is None):
            return "what it says of a draft does not fit its load"
        if sample.drafted is not None and not _is_possible(sample.drafted, load.width, n_tokens):
            return "what it says of a draft contradicts itself"
        for name, values in (
            ("logprobs", sample.logprobs),
            ("margins", sample.margins),
            ("row_digests", sample.row_digests),
        ):
            if values and len(values) != n_tokens:
                return f"it has {n_tokens} tokens and the {name} of {len(values)}"
        return None

    def _contradicts_its_trial(self, sample: Sample) -> str | None:
        number, n_planned = sample.trial_id, self._run.n_trials_planned
        if 0 < n_planned <= number:
            return f"trial {number} was not planned: the run has {n_planned}"
        first_sample_id = sample.sample_id - sample.load.slots.index(sample.slot)
        planned = (
            sample.arm,
            sample.probe_id,
            sample.purpose,
            sample.baseline,
            sample.load,
            first_sample_id,
        )
        known = self._trials.get(number)
        if known is None:
            at = number * DIGITS_PER_TRIAL
            digest = self._run.trial_digests[at : at + DIGITS_PER_TRIAL]
            if digest and digest != _digest(planned):
                return f"trial {number} was planned otherwise"
            self._trials[number] = planned
        elif known != planned:
            return f"it contradicts another sample of trial {number}"
        return None

    def flaws(self, bad_lines: Sequence[str]) -> tuple[str, ...]:
        """What keeps the samples taken in from being all that was planned, a sentence each."""
        run, found = self._run, []
        if bad_lines:
            found.append(f"lines of samples left out: {len(bad_lines)} (the first: {bad_lines[0]})")
        if not is_spec_of(run):
            found.append("run.json contradicts itself: its spec is not what the run began with")
        if run.trial_digests and len(run.trial_digests) != DIGITS_PER_TRIAL * run.n_trials_planned:
            found.append("run.json contradicts itself: it holds another number of trials")
        short = [
            number
            for number, n_samples in sorted(self._n_samples.items())
            if n_samples < len(self._trials[number][4].slots)
        ]
        if short:
            found.append(f"trials without all of their samples: {_list(short)}")
        if n_without := self._n_without_bits():
            found.append(f"completions without the bits that this run records: {n_without}")
        if self._n_unconnected:
            found.append(f"answers of no known connection: {self._n_unconnected}")
        # A run that was cut short says so itself, and where.
        n_missing = run.n_trials_planned - len(self._n_samples)
        if not run.n_trials_planned:
            found.append("run.json does not say how many trials were planned")
        elif run.status == "finished" and n_missing:
            stopped = f" ({run.stop_reason})" if run.stop_reason else ""
            found.append(
                f"trials that are missing: {n_missing} of {run.n_trials_planned} planned{stopped}"
            )
        return tuple(found)

    def _n_without_bits(self) -> int:
        """Completions whose bits cannot be compared, though others' can or no server is asked."""
        spec, recorded = self._run.spec, self._n_recorded
        if spec.endpoint is not None and spec.allow_latent:
            return 0
        most = tuple(map(max, zip(*recorded, strict=True))) if recorded else ()
        if spec.endpoint is None and not any(most):
            return recorded.total()
        return sum(n for kind, n in recorded.items() if kind != most)


@lru_cache(1024)
def _contradicts_its_rows(load: Load) -> str | None:
    rows = sorted(set(load.slots))
    if len(rows) < len(load.slots) or rows[-1] >= load.batch_size:
        return f"its load has {load.batch_size} rows and the slots {load.slots}"
    if len(load.filler_lengths) != load.batch_size - len(rows):
        return f"its load has {load.batch_size} rows and {len(load.filler_lengths)} fillers"
    return None


def trial_digests(trials: Iterable[Trial]) -> str:
    """What `Run.trial_digests` holds of a plan."""
    ordered = sorted(trials, key=lambda trial: trial.trial_id)
    return "".join(
        _digest((t.arm, t.probe_id, t.purpose, t.baseline, t.load, t.first_sample_id))
        for t in ordered
    )


def spec_digest(spec: RunSpec) -> str:
    """What `Run.spec_digest` holds of a spec."""
    text = json.dumps(_given(spec), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def is_spec_of(run: Run) -> bool:
    """Is the spec the one that ``run`` began with? True where an earlier version kept no digest."""
    return run.spec_digest in ("", spec_digest(run.spec))


def _given(value: Any) -> Any:
    """Without defaults, and with one form for 5 and 5.0, which a file may not tell apart."""
    if is_dataclass(value):
        values = {f.name: (getattr(value, f.name), f.default) for f in fields(value)}
        return {
            name: _given(held)
            for name, (held, default) in values.items()
            if held != default and name not in UNMEASURED
        }
    if isinstance(value, tuple):
        return list(map(_given, value))
    return float(value) if type(value) is int else value


def is_continued_by(run: Run, finished: Iterable[Sample], trials: Sequence[Trial]) -> bool:
    """Are ``trials`` the plan that the run began with, and its samples some of theirs?

    A run that went on to confirm divergences holds more than it began with.
    """
    if run.trial_digests:
        return run.trial_digests.startswith(trial_digests(trials))
    if len(trials) != run.n_trials_planned:
        return False
    planned = {t.trial_id: (t.arm, t.probe_id, t.purpose, t.baseline, t.load) for t in trials}
    return all(
        planned[s.trial_id] == (s.arm, s.probe_id, s.purpose, s.baseline, s.load) for s in finished
    )


def _is_possible_of_fed(fed: Fed) -> bool:
    """A token that would be another has other bits, and so do logits of another digest."""
    is_other = fed.digest != fed.decoded_digest
    return is_other <= fed.n_other_bits <= fed.n_tokens and fed.n_other_tokens <= fed.n_other_bits


def _is_possible(drafted: Drafted, width: int, n_tokens: int) -> bool:
    """Do the passes propose and accept so much, and give so many tokens after the first?"""
    proposed, accepted = drafted.proposed, drafted.accepted
    return len(proposed) == len(accepted) and (
        all(a <= p < width for a, p in zip(accepted, proposed, strict=True))
        and n_tokens <= 1 + len(accepted) + sum(accepted)
    )


def _digest(planned: Planned) -> str:
    *rest, load, first_sample_id = planned
    text = f"({rest!r}, {_varied(load)}, {first_sample_id!r})"
    return hashlib.blake2b(text.encode(), digest_size=DIGITS_PER_TRIAL // 2).hexdigest()


@lru_cache(1024)
def _varied(load: Load) -> str:
    # A field that a later version adds leaves the digests of earlier runs as they are.
    return repr({f.name: v for f in fields(load) if (v := getattr(load, f.name)) != f.default})


def _list(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:MAX_NAMED]))
    return shown + (f" and {len(numbers) - MAX_NAMED} more" if len(numbers) > MAX_NAMED else "")
