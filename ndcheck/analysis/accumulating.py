"""One pass over a stream of samples: a row of numbers for each, and a group for each probe and arm.

The rows (about 100 bytes each), the distinct completions and what the probe gave alone are all that
is kept. The reference is the commonest completion of the probe alone, which is known at the end: of
probes where it is not the first, whose bits the others were compared with, all is read once more.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.divergence import (
    Reference,
    Stream,
    first_divergence,
    is_caught,
    latent_divergence,
    read_stream,
)
from ndcheck.analysis.metrics import Deviation, LogprobSums
from ndcheck.analysis.serving import Serving
from ndcheck.analysis.statistics import is_settled
from ndcheck.analysis.unique import Interner
from ndcheck.records import ALONE, Arm, Axis, CacheState, Purpose, RunSpec, Sample

CONTENTS_KEPT = 64
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

OUTCOME = np.dtype(
    [
        ("index", np.int64),  # place in the stream
        ("slot", np.int32),
        ("achieved", np.int32),  # batch size that ran; -1: unknown
        ("elapsed_s", np.float64),  # of the trial
        ("group", np.int32),
        ("trial", np.int64),
        ("baseline", np.int64),  # -1: none
        ("purpose", np.int8),  # index in PURPOSES
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
    groups, contents = Groups(), Contents()
    for probe in spec.probes:
        for arm in spec.arms:
            groups[arm, probe.probe_id] = Group(len(groups), contents)
    rows = _collect(_all(samples, groups, contents), groups.values())
    completions = rows["completion"][np.argsort(rows["group"], kind="stable")]
    ends = np.cumsum(np.bincount(rows["group"], minlength=len(groups)))
    again, contents = Groups(), Contents()
    for (key, group), own in zip(groups.items(), np.split(completions, ends[:-1]), strict=True):
        commonest = group.commonest_alone(own)
        if commonest is not None and not group.starts_from(commonest):
            again[key] = Group(group.number, contents)
            again[key].set_reference(commonest)
    if again:
        stays = ~np.isin(rows["group"], [group.number for group in again.values()])
        rows = np.concatenate((rows[stays], _collect(_those_of(samples, again), again.values())))
        groups |= again
    order = np.lexsort((rows["slot"], rows["trial"], rows["completion"] < 0, rows["group"]))
    return rows[order], groups


Numbered = Iterator[tuple[int, "Group", Sample]]
"""A sample's place in the stream, its group, and the sample."""


def _all(samples: Iterable[Sample], groups: Groups, contents: Contents) -> Numbered:
    """The groups that are not there yet are added."""
    for index, sample in enumerate(samples):
        key = sample.arm, sample.probe_id
        yield index, groups.get(key) or groups.setdefault(key, Group(len(groups), contents)), sample


def _those_of(samples: Iterable[Sample], groups: Groups) -> Numbered:
    for index, sample in enumerate(samples):
        group = groups.get((sample.arm, sample.probe_id))
        if group is not None:
            yield index, group, sample


# Log-probabilities of minus infinity are legal; their differences are NaN.
@np.errstate(invalid="ignore", over="ignore")
def _collect(samples: Numbered, groups: Iterable[Group]) -> NDArray[np.void]:
    """One pass; where no reference is set, the first sample alone is it."""
    return np.fromiter(_read(samples, groups), OUTCOME)


def _read(samples: Numbered, groups: Iterable[Group]) -> Iterator[tuple[Any, ...]]:
    for index, group, sample in samples:
        if group.reference is None:
            yield from group.read_first(index, sample)
        else:
            yield group.read(index, sample)
    for group in groups:
        yield from group.read_waiting()


class _Trial(NamedTuple):
    """What the samples of a trial have in common; ``columns`` are group to load of OUTCOME."""

    trial_id: int
    is_control: bool
    is_alone: bool
    columns: tuple[int, ...]
    width: tuple[int, ...]
    """The columns from ``width`` on of a sample that was neither fed nor drafted."""


class _Content(NamedTuple):
    """What the tokens and bits of a sample are in its group.

    ``parts`` are kept so that their identities are not given to others. ``latent`` is as in
    OUTCOME, of other samples than the reference.
    """

    parts: tuple[tuple[Any, ...], ...]
    stream: Stream
    number: int
    bits: tuple[int, int]
    latent: int
    deviation: Deviation | None


Contents = dict[tuple[int, ...], _Content]
"""Of the samples read last, by the number of their group and the identity of what they hold."""


class Group:
    """What one probe in one arm has shown so far.

    The probe alone comes first in a run; samples before it wait, so that any order gives the same.
    """

    def __init__(self, number: int, contents: Contents) -> None:
        self.number = number
        self._contents = contents
        self.interner = Interner()
        self.first_divergences = array("i")
        """From the reference, by completion in order of arrival; -1: none."""
        self.first_error = ""
        self.reference: Reference | None = None
        self.logprob_sums: LogprobSums | None = None
        self._controls: defaultdict[int, list[tuple[Sample, Stream]]] = defaultdict(list)
        """By trial: judged at the end, when what they are compared with is there."""
        self._wide_streams: dict[int, Stream] = {}
        """By trial, of loads alone that are no plain decoding: what their controls compare with."""
        self.kinds: dict[LoadKind, int] = {}
        self._alone: Counter[tuple[int, int, int]] = Counter()
        self._alone_trials: set[int] = set()
        self._alone_samples: dict[tuple[int, int, int], Sample] = {}
        """The first sample of each completion and bits that the probe gave alone."""
        self.serving: Serving | None = None
        """Of the answers of a server, and where requests arrive at random."""
        self._waiting: list[tuple[int, Sample]] = []
        self._trial: _Trial | None = None

    def read_first(self, index: int, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """OUTCOME rows of this sample and of those that waited for it; none if it has to wait."""
        if not sample.is_reference:
            self._waiting.append((index, sample))
            return
        self.set_reference(sample)
        yield from self.read_waiting()
        yield self.read(index, sample)

    def read_waiting(self) -> Iterator[tuple[Any, ...]]:
        waiting, self._waiting = self._waiting, []
        for index, sample in waiting:
            yield self.read(index, sample)

    def set_reference(self, sample: Sample) -> None:
        """Compare all that follow with this one; only before any other is read."""
        stream = read_stream(sample)
        number = self._intern(sample, stream)
        self.reference = Reference(sample.trial_id, number, stream)
        self.logprob_sums = LogprobSums(stream.logprobs)

    def starts_from(self, sample: Sample) -> bool:
        """Is this the sample that the others were compared with?"""
        return self.reference is not None and self.reference.trial_id == sample.trial_id

    @cached_property
    def controls(self) -> dict[int, bool]:
        """Whether the planted fault was caught, by trial; not where the baseline failed.

        To be asked only when all samples are read.
        """
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

    def commonest_alone(self, completions: NDArray[np.int32]) -> Sample | None:
        """The first sample with the commonest completion, and bits, of the probe alone.

        Where chance may have decided which one that is (see `is_settled`), it is the one of them
        that all of the group's rows, of which these are the ``completions``, gave most often, then
        the earliest.
        """
        if not self._alone:
            return None
        if len(self._alone) == 1:
            (first,) = self._alone_samples.values()
            return first
        in_all = np.bincount(completions[completions >= 0], minlength=len(self.interner))
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

    def read(self, index: int, sample: Sample) -> tuple[Any, ...]:
        """The sample's OUTCOME row."""
        trial = self._trial
        if trial is None or trial.trial_id != sample.trial_id:
            trial = self._trial = self._read_trial(sample)
        if sample.witness.connection:
            self.serving = self.serving or Serving()
            self.serving.add(sample)
        achieved = sample.witness.achieved_batch_size
        own = index, sample.slot, -1 if achieved is None else achieved, sample.elapsed_s
        is_plain = sample.fed is None and sample.drafted is None
        wide = trial.width if is_plain else _wide_columns(sample)
        if sample.error is not None or trial.is_control:
            if sample.error is None:
                self._controls[sample.trial_id].append((sample, read_stream(sample)))
            elif not trial.is_control:
                self.first_error = self.first_error or sample.error
            return (*own, *trial.columns, -1, -1, np.nan, 0, 0, *wide)
        content = self._read_content(sample)
        if not sample.load.is_decoded and sample.load.batch_size == 1:
            self._wide_streams.setdefault(sample.trial_id, content.stream)
        if trial.is_alone:
            self._count_alone(sample, (content.number, *content.bits))
        latent, dlogprob, sums = -1, np.nan, self.logprob_sums
        is_other = self.reference is None or self.reference.trial_id != sample.trial_id
        if is_other and sums is not None and content.deviation is not None:
            latent, dlogprob = content.latent, sums.add(content.deviation)
        return (*own, *trial.columns, content.number, latent, dlogprob, *content.bits, *wide)

    def _count_alone(self, sample: Sample, kind: tuple[int, int, int]) -> None:
        self._alone[kind] += 1
        self._alone_trials.add(sample.trial_id)
        first = self._alone_samples.setdefault(kind, sample)
        if sample.trial_id < first.trial_id:
            self._alone_samples[kind] = sample

    def _read_trial(self, sample: Sample) -> _Trial:
        load, purpose = sample.load, sample.purpose
        slot = load.slots[0] if len(load.slots) == 1 else None
        kind = LoadKind(
            *(purpose, load.batch_size, slot, load.cache_state),
            *(load.width, load.scores, load.drafts),
        )
        columns = (
            self.number,
            sample.trial_id,
            -1 if sample.baseline is None else sample.baseline,
            PURPOSES.index(purpose),
            load.batch_size,
            self.kinds.setdefault(kind, len(self.kinds)),
            hash(load),
        )
        is_control = purpose == "control"
        is_alone = not is_control and load == ALONE
        return _Trial(sample.trial_id, is_control, is_alone, columns, (load.width, *[0] * 8))

    def _read_content(self, sample: Sample) -> _Content:
        """Samples that a reader found alike hold the same objects: they are looked at once."""
        parts = (sample.token_ids, sample.logprobs, sample.margins, sample.row_digests)
        key = (self.number, *map(id, parts))
        content = self._contents.get(key)
        if content is None:
            stream = read_stream(sample)
            number = self._intern(sample, stream)
            at = self.first_divergences[number]
            n_shared = at if at >= 0 else len(stream.token_ids)
            latent = deviation = None
            if self.reference is not None and self.logprob_sums is not None:
                latent = latent_divergence(self.reference.stream, stream, n_shared)
                deviation = self.logprob_sums.compare(stream.logprobs, n_shared)
            bits = _fingerprint(stream.logprobs), _fingerprint(stream.row_digests)
            latent_at = -1 if latent is None else latent
            content = _Content(parts, stream, number, bits, latent_at, deviation)
            if len(self._contents) == CONTENTS_KEPT:
                self._contents.clear()
            self._contents[key] = content
        return content

    def _catches(self, sample: Sample, stream: Stream) -> bool:
        """Without a fault, or without what it is compared with, nothing shows."""
        baseline: Stream | None = None
        if not sample.load.is_decoded:
            baseline = self._wide_streams.get(-1 if sample.baseline is None else sample.baseline)
        elif sample.baseline in self._alone_trials and self.reference is not None:
            baseline = self.reference.stream
        fault = sample.fault
        return fault is not None and baseline is not None and is_caught(fault, baseline, stream)


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


def _fingerprint(bits: NDArray[Any]) -> int:
    """64 bits that stand for all of them, within this process; 0 for none."""
    return hash(bits.tobytes())
