"""One pass over a stream of samples: a row of numbers for each, and a group for each probe and arm.

The rows (about 100 bytes each), the distinct completions and what the probe gave alone are all that
is kept. The reference is the commonest completion of the probe alone, which is known at the end: if
it is not the first, whose bits the others were compared with, the stream is read once more.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.divergence import (
    Reference,
    Stream,
    first_divergence,
    latent_divergence,
    read_stream,
)
from ndcheck.analysis.metrics import LogprobSums
from ndcheck.analysis.serving import Serving
from ndcheck.analysis.unique import Interner
from ndcheck.records import Arm, Axis, CacheState, Fault, Purpose, RunSpec, Sample

PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

OUTCOME = np.dtype(
    [
        ("index", np.int64),  # place in the stream
        ("group", np.int32),
        ("trial", np.int64),
        ("baseline", np.int64),  # -1: none
        ("purpose", np.int8),  # index in PURPOSES
        ("slot", np.int32),
        ("achieved", np.int32),  # batch size that ran; -1: unknown
        ("elapsed_s", np.float64),  # of the trial
        ("batch_size", np.int32),
        ("kind", np.int32),  # number of its LoadKind in the group
        ("load", np.int64),  # equal for equal loads
        ("completion", np.int32),  # by order of arrival; -1: error or control
        ("latent", np.int32),  # first latent divergence from the reference; -1: none
        ("dlogprob", np.float32),  # largest absolute difference from the reference, in nats
        ("logprobs", np.int64),  # fingerprint of all bits; 0: not recorded
        ("row_digests", np.int64),  # the same
        ("width", np.int32),  # of the load
        ("fed_tokens", np.int32),  # how many positions `Fed` compares; 0: the load is not fed
        ("other_bits", np.int32),
        ("other_tokens", np.int32),
        ("fed_digest", np.uint64),
        ("decoded_digest", np.uint64),
        ("draft_passes", np.int32),  # in which a draft model proposed tokens
        ("proposed", np.int32),
        ("accepted", np.int32),
    ]
)


class LoadKind(NamedTuple):
    """What is reported together; ``slot`` is None where a load has several."""

    purpose: Purpose
    batch_size: int
    slot: int | None
    cache_state: CacheState
    width: int
    scores: bool
    drafts: bool


Groups = dict[tuple[Arm, str], "Group"]
"""By arm and probe id; a group's number is its place."""


def collect(samples: Iterable[Sample], spec: RunSpec) -> tuple[NDArray[np.void], Groups]:
    """Read all samples: their OUTCOME rows, and the groups, the spec's first.

    The rows are sorted by group, then completions before errors and controls, then by trial and
    slot, so that what belongs together is a slice and need not be copied. A stream that can be
    iterated only once is kept.
    """
    if isinstance(samples, Iterator):
        samples = list(samples)
    rows, groups = _collect(samples, spec, {})
    commonest = {key: group.commonest_alone(rows) for key, group in groups.items()}
    chosen = {key: sample for key, sample in commonest.items() if sample is not None}
    if any(not groups[key].starts_from(sample) for key, sample in chosen.items()):
        rows, groups = _collect(samples, spec, chosen)
    order = np.lexsort((rows["slot"], rows["trial"], rows["completion"] < 0, rows["group"]))
    return rows[order], groups


def _collect(
    samples: Iterable[Sample], spec: RunSpec, references: Mapping[tuple[Arm, str], Sample]
) -> tuple[NDArray[np.void], Groups]:
    """One pass, in the order of the stream; without a reference given, the first alone is it."""
    groups: Groups = {}
    for probe in spec.probes:
        for arm in spec.arms:
            groups[arm, probe.probe_id] = Group(len(groups))
    for key, sample in references.items():
        groups.setdefault(key, Group(len(groups))).set_reference(sample)
    # Log-probabilities of minus infinity are legal; their differences are NaN.
    with np.errstate(invalid="ignore", over="ignore"):
        return np.fromiter(_read(samples, groups), OUTCOME), groups


def _read(samples: Iterable[Sample], groups: Groups) -> Iterator[tuple[Any, ...]]:
    for index, sample in enumerate(samples):
        key = sample.arm, sample.probe_id
        group = groups.get(key) or groups.setdefault(key, Group(len(groups)))
        yield from group.read(index, sample)
    for group in groups.values():
        yield from group.read_waiting()


class Group:
    """What one probe in one arm has shown so far.

    The probe alone comes first in a run; samples before it wait, so that any order gives the same.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.interner = Interner()
        self.first_divergences = array("i")
        """From the reference, by completion in order of arrival; -1: none."""
        self.reference: Reference | None = None
        self.logprob_sums: LogprobSums | None = None
        self._controls: dict[int, list[tuple[Sample, Stream]]] = {}
        """By trial: judged at the end, when what they are compared with is there."""
        self._wide_streams: dict[int, Stream] = {}
        """By trial, of loads alone that are no plain decoding: what their controls compare with."""
        self.kinds: dict[LoadKind, int] = {}
        self._alone: Counter[tuple[int, int, int]] = Counter()
        self._alone_trials: set[int] = set()
        self._alone_samples: dict[tuple[int, int, int], Sample] = {}
        """The first sample of each completion and bits that the probe gave alone."""
        self.serving = Serving()
        self._waiting: list[tuple[int, Sample]] = []
        self._trial: int | None = None
        self._load_columns: tuple[int, ...] = ()

    def read(self, index: int, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """OUTCOME rows of this sample and of those that waited for it; none if it has to wait."""
        if self.reference is None and sample.is_reference:
            self.set_reference(sample)
            yield from self.read_waiting()
        if self.reference is None:
            self._waiting.append((index, sample))
        else:
            yield self._outcome(index, sample)

    def read_waiting(self) -> Iterator[tuple[Any, ...]]:
        waiting, self._waiting = self._waiting, []
        for index, sample in waiting:
            yield self._outcome(index, sample)

    def set_reference(self, sample: Sample) -> None:
        """Compare all that follow with this one; only before any other is read."""
        stream = read_stream(sample)
        number = self._intern(sample, stream)
        self.reference = Reference(sample.trial_id, number, stream)
        self.logprob_sums = LogprobSums(stream.logprobs)

    def starts_from(self, sample: Sample) -> bool:
        """Is this the sample that the others were compared with?"""
        return self.reference is not None and self.reference.trial_id == sample.trial_id

    @property
    def controls(self) -> dict[int, bool]:
        """Whether the planted fault was caught, by trial; not where the baseline failed."""
        return {
            trial_id: all(self._catches(sample, stream) for sample, stream in rows)
            for trial_id, rows in self._controls.items()
        }

    @property
    def controlled(self) -> tuple[Axis, ...]:
        """The axes with a control of their own that was caught."""
        caught = self.controls
        loads = [rows[0][0].load for number, rows in self._controls.items() if caught[number]]
        kinds: dict[Axis, bool] = {
            "width": any(load.width > 1 and not load.drafts for load in loads),
            "scoring": any(load.scores for load in loads),
        }
        return tuple(axis for axis, is_caught in kinds.items() if is_caught)

    @property
    def controls_draft(self) -> bool:
        """Was a control caught in speculative decoding?"""
        caught = self.controls
        return any(rows[0][0].load.drafts and caught[n] for n, rows in self._controls.items())

    def commonest_alone(self, rows: NDArray[np.void]) -> Sample | None:
        """The first sample with the commonest completion, and bits, of the probe alone.

        Where chance may have decided which one that is (see `is_settled`), it is the one of them
        that all of the group's ``rows`` gave most often, then the earliest.
        """
        if not self._alone:
            return None
        own = rows["completion"][rows["group"] == self.number]
        in_all = np.bincount(own[own >= 0], minlength=len(self.interner))
        alone: Counter[int] = Counter()
        for (number, *_), n in self._alone.items():
            alone[number] += n
        most, next_most = ([*sorted(alone.values(), reverse=True), 0])[:2]
        settled = is_settled(most, next_most, alone.total())

        def rank(key: tuple[int, int, int]) -> tuple[int, ...]:
            number, trial_id = key[0], self._alone_samples[key].trial_id
            by_all = int(in_all[number])
            by_tokens = (alone[number], by_all) if settled else (by_all, alone[number])
            return *by_tokens, self._alone[key], -trial_id

        return self._alone_samples[max(self._alone, key=rank)]

    def _intern(self, sample: Sample, stream: Stream) -> int:
        number = self.interner.add(sample, stream)
        if number == len(self.first_divergences):
            at = None
            if self.reference is not None:
                at = first_divergence(self.reference.stream.token_ids, stream.token_ids)
            self.first_divergences.append(-1 if at is None else at)
        return number

    def _outcome(self, index: int, sample: Sample) -> tuple[Any, ...]:
        if sample.trial_id != self._trial:
            self._trial = sample.trial_id
            self._load_columns = self._read_load(sample)
        if sample.witness.connection:
            self.serving.add(sample)
        achieved = sample.witness.achieved_batch_size
        origin = (
            index,
            self.number,
            sample.trial_id,
            -1 if sample.baseline is None else sample.baseline,
            PURPOSES.index(sample.purpose),
            sample.slot,
            -1 if achieved is None else achieved,
            sample.elapsed_s,
            *self._load_columns,
        )
        fed = _wide_columns(sample)
        if sample.error is not None:
            return (*origin, -1, -1, np.nan, 0, 0, *fed)
        stream = read_stream(sample)
        if sample.role == "control":
            self._controls.setdefault(sample.trial_id, []).append((sample, stream))
            return (*origin, -1, -1, np.nan, 0, 0, *fed)
        if not sample.load.is_decoded and sample.load.batch_size == 1:
            self._wide_streams.setdefault(sample.trial_id, stream)
        number = self._intern(sample, stream)
        bits = _fingerprint(stream.logprobs), _fingerprint(stream.row_digests)
        if sample.is_reference:
            self._alone[number, *bits] += 1
            self._alone_trials.add(sample.trial_id)
            first = self._alone_samples.setdefault((number, *bits), sample)
            if sample.trial_id < first.trial_id:
                self._alone_samples[number, *bits] = sample
        return (*origin, number, *self._compare(sample, stream, number), *bits, *fed)

    def _read_load(self, sample: Sample) -> tuple[int, int, int]:
        """The columns ``batch_size``, ``kind`` and ``load``."""
        load = sample.load
        slot = load.slots[0] if len(load.slots) == 1 else None
        kind = LoadKind(
            *(sample.purpose, load.batch_size, slot, load.cache_state),
            *(load.width, load.scores, load.drafts),
        )
        return load.batch_size, self.kinds.setdefault(kind, len(self.kinds)), hash(load)

    def _compare(self, sample: Sample, stream: Stream, number: int) -> tuple[int, float]:
        """The columns ``latent`` and ``dlogprob``."""
        if self.reference is None or self.logprob_sums is None:
            return -1, np.nan
        if sample.trial_id == self.reference.trial_id:
            return -1, np.nan
        at = self.first_divergences[number]
        n_shared = at if at >= 0 else len(stream.token_ids)
        latent = latent_divergence(self.reference.stream, stream, n_shared)
        dlogprob = self.logprob_sums.add(stream.logprobs, n_shared)
        return -1 if latent is None else latent, dlogprob

    def _catches(self, sample: Sample, stream: Stream) -> bool:
        """Without a fault, or without what it is compared with, nothing shows."""
        baseline: Stream | None = None
        if not sample.load.is_decoded:
            baseline = self._wide_streams.get(-1 if sample.baseline is None else sample.baseline)
        elif sample.baseline in self._alone_trials and self.reference is not None:
            baseline = self.reference.stream
        return (
            sample.fault is not None
            and baseline is not None
            and is_caught(sample.fault, baseline, stream)
        )


def _wide_columns(sample: Sample) -> tuple[int, ...]:
    """The columns from ``width`` on."""
    fed, drafted, width = sample.fed, sample.drafted, sample.load.width
    counts = (0, 0, 0)
    if drafted is not None and sample.load.drafts:
        n_passes = sum(n > 0 for n in drafted.proposed)
        counts = n_passes, sum(drafted.proposed), sum(drafted.accepted)
    if fed is None or not sample.load.is_fed:
        return width, 0, 0, 0, 0, 0, *counts
    digests = (int(digest or "0", 16) for digest in (fed.digest, fed.decoded_digest))
    return width, fed.n_tokens, fed.n_other_bits, fed.n_other_tokens, *digests, *counts


def is_settled(most: Any, next_most: Any, total: Any) -> Any:
    """Is the commonest of several completions, by its counts, more than chance?

    A sign test at two standard deviations of the most frequent one against the next; arrays too.
    """
    return (next_most == 0) | ((most - next_most) ** 2 >= 4 * total)


def is_caught(fault: Fault, baseline: Stream, stream: Stream) -> bool:
    """Does the planted fault show exactly where it was planted, and nothing before it?"""
    if first_divergence(baseline.token_ids, stream.token_ids) != fault.fork_at:
        return False
    has_bits = (len(baseline.logprobs) and len(stream.logprobs)) or (
        len(baseline.row_digests) and len(stream.row_digests)
    )
    latent = latent_divergence(baseline, stream, fault.fork_at)
    expected = fault.latent_at if fault.latent_at < fault.fork_at else None
    return latent == expected if has_bits else True


def _fingerprint(bits: NDArray[Any]) -> int:
    """64 bits that stand for all of them, within this process; 0 for none."""
    return hash(bits.tobytes())
