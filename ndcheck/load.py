"""The load plan: which batches run, in which order, and what each is compared with.

A plan is a pure function of the run's spec and the probes' lengths, so a resumed run continues
the same one. It goes through the grid *batch size x axis* in rounds, with other filler contents,
slots and cuts of the prompt in each round, until it holds the samples asked for. Every trial names
its baseline: the trial that differs from it along its axis only.

A round runs the baselines from the largest batch to the smallest, the probe alone, and then all
else from the smallest to the largest: every size follows a larger one and a smaller one, and equal
loads run in another order. In process a load gives what it gave before, so there only `run-to-run`
repeats one.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ndcheck.errors import UsageError
from ndcheck.records import (
    Arm,
    Axis,
    CacheState,
    Endpoint,
    Fault,
    Load,
    Probe,
    RunSpec,
    Trial,
)

CACHE_STATES: tuple[CacheState, ...] = ("chunked", "prefix")

ALONE = Load(1)
N_PREFILL_CHUNKS = 3
MOST_CHUNKS = 16
CONFIRMED_LOADS = 2
"""Loads of an axis, in a probe's arm, that are run again where they diverged."""

SMALLEST_PAGE_TOKENS = 4
"""A paged cache shares whole pages, none smaller, so a prompt must be longer to share a prefix."""

FILLER_TEXT = (
    "the quick answer depends on order because floating point addition is not associative and "
    "every kernel may split its sums in another way when more requests arrive at once so a "
    "model that looks certain can still choose another word after a hundred tokens while "
    "nobody changed its weights its prompt or its settings only who else was waiting in line"
)
FILLER_WORDS = FILLER_TEXT.split()


def filler_text(seed: int, n_words: int) -> str:
    """Plain English words, a function of ``seed`` alone: the prompt of a filler."""
    return " ".join(random.Random(seed).choices(FILLER_WORDS, k=n_words))


def fit_to_length(token_ids: list[int], length: int) -> list[int]:
    """Cut or repeat ``token_ids`` to exactly ``length`` tokens."""
    repeats = -(-length // len(token_ids))
    return (token_ids * repeats)[:length]


def batch_sizes_up_to(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the largest."""
    powers = (2**i for i in range(largest.bit_length()))
    return tuple(dict.fromkeys((*powers, largest)))


@dataclass(frozen=True, slots=True)
class Cell:
    """One load of a round, and the load that it is compared with."""

    axis: Axis
    load: Load
    baseline: Load = ALONE


def plan_trials(
    spec: RunSpec,
    prompt_lengths: Mapping[str, int],
    context: int,
    n_draws: int | None = None,
    cache_states: tuple[CacheState, ...] = CACHE_STATES,
) -> list[Trial]:
    """All trials of a run in execution order, arms interleaved on the same loads.

    ``prompt_lengths`` are in tokens by probe id, ``context`` is the model's limit in tokens.
    ``n_draws`` asks for that many distinct loads of each probe and arm (trials, where a repeat is a
    draw) instead of ``spec.n_samples`` samples. ``cache_states`` are those that the backend can
    bring about. The plan is shorter where no other load exists. The probe alone comes first, in the
    rounds, and last.
    Raises UsageError where a prompt and its completion do not fit the context.
    """
    trials: list[Trial] = []
    for probe in spec.probes:
        length = prompt_lengths[probe.probe_id]
        if length + spec.decoding.max_tokens > context:
            raise UsageError(
                f"prompt {probe.probe_id} has {length} tokens: with --max-tokens "
                f"{spec.decoding.max_tokens} it exceeds the model's context of {context}"
            )
        states = cache_states
        if spec.batching == "continuous" and length <= SMALLEST_PAGE_TOKENS:  # No page to share.
            states = tuple(state for state in states if state != "prefix")
        grid = _Grid(spec, probe.probe_id, length, context - spec.decoding.max_tokens, states)
        _ProbePlan(trials, spec, probe, n_draws).add_all(grid)
    return trials


class _ProbePlan:
    """Adds the trials of one probe to those of the run."""

    def __init__(
        self, trials: list[Trial], spec: RunSpec, probe: Probe, n_draws: int | None
    ) -> None:
        self._trials = trials
        self._spec = spec
        self._probe = probe
        self._n_draws = n_draws
        self._first_ids: dict[Load, dict[Arm, int]] = {}
        self._n_run: Counter[Load] = Counter()
        self._n_samples = 0

    def add_all(self, grid: _Grid) -> None:
        alone_again = Cell("run-to-run", ALONE)
        self._add(Cell("reference", ALONE))
        # A process may compute its first batch unlike all others, and so its first reference.
        if self._n_missing() > 1:
            self._add(alone_again)
        self._add(Cell("control", ALONE))
        closes_alone = self._n_missing() > 0
        self._n_samples += closes_alone
        round_index, n_missing = 0, self._n_missing() + 1
        # A round that brings nothing new is the last.
        while 0 < self._n_missing() < n_missing:
            n_missing = self._n_missing()
            for cell in grid.round_of_cells(round_index):
                if self._n_missing() > 0:
                    self._add_if_new(cell, grid)
            round_index += 1
        if closes_alone:
            self._add(alone_again)

    def _n_missing(self) -> int:
        """Of the samples or draws asked for, those that are not planned yet."""
        if self._n_draws is None:
            return self._spec.n_samples - self._n_samples
        if self._spec.repeats_are_draws or self._spec.axes == ("run-to-run",):
            return self._n_draws + 1 - self._n_run.total()
        return self._n_draws + 1 - len(self._n_run)

    def _add_if_new(self, cell: Cell, grid: _Grid) -> None:
        n_copies = len(cell.load.slots)
        if self._n_draws is None and n_copies > self._n_missing():
            # With other rows than its baseline's, a load would differ from it along two axes.
            if cell.axis in ("run-to-run", "cache"):
                return
            n_copies = self._n_missing()
            cell = replace(cell, load=grid.with_copies(cell.load, n_copies))
        n_run = self._n_run[cell.load]
        if cell.baseline not in self._first_ids:
            return
        if cell.axis == "run-to-run":
            if "run-to-run" not in self._spec.axes and cell.load != ALONE and n_run > 1:
                return
        elif n_run and not self._spec.repeats_are_draws:
            return
        self._add(cell)

    def _add(self, cell: Cell) -> None:
        baselines = self._first_ids.get(cell.baseline, {})
        ids = {}
        for arm in self._spec.arms:
            ids[arm] = len(self._trials)
            last = self._trials[-1] if self._trials else None
            trial = Trial(
                trial_id=len(self._trials),
                arm=arm,
                probe_id=self._probe.probe_id,
                axis=cell.axis,
                load=cell.load,
                first_sample_id=last.first_sample_id + last.n_samples if last else 0,
                baseline=baselines.get(arm),
            )
            self._trials.append(trial)
        self._first_ids.setdefault(cell.load, ids)
        if cell.axis != "control":
            self._n_run[cell.load] += 1
            self._n_samples += len(cell.load.slots)


@dataclass(frozen=True, slots=True)
class _Grid:
    """The loads of one probe of ``length`` tokens; fillers have ``room`` for their prompts."""

    spec: RunSpec
    probe_id: str
    length: int
    room: int
    cache_states: tuple[CacheState, ...]

    def round_of_cells(self, round_index: int) -> Iterator[Cell]:
        """One pass over the grid. Only baselines that an asked-for axis needs are included."""
        sizes = sorted({size for size in self.spec.batch_sizes if size > 1})
        for size in reversed(sizes):
            yield from self._baselines(size, round_index)
        if round_index == 0 or "run-to-run" in self.spec.axes:
            yield Cell("run-to-run", ALONE)
        if 1 in self.spec.batch_sizes:
            yield from self._cached(ALONE, round_index)
        for size in sizes:
            yield from self._variants(size, round_index)

    def with_copies(self, load: Load, n_copies: int) -> Load:
        """Keep the batch size but let fillers of the probe's length replace the copies too many."""
        lengths = (self.length,) * (load.batch_size - n_copies)
        return replace(load, slots=load.slots[:n_copies], filler_lengths=lengths)

    def _baselines(self, size: int, round_index: int) -> Iterator[Cell]:
        axes = set(self.spec.axes)
        loads = []
        if {"batch-size", "run-to-run", "cache"} & axes:
            loads.append(self._base(size, round_index))
        if {"slot", "neighbours"} & axes:
            loads.append(self._mixed(size, round_index))
        for load in dict.fromkeys(loads):
            yield Cell("batch-size", load)

    def _variants(self, size: int, round_index: int) -> Iterator[Cell]:
        axes, rng = set(self.spec.axes), self._rng(size, round_index)
        base, mixed = self._base(size, round_index), self._mixed(size, round_index)
        yield Cell("run-to-run", base, base)
        yield from self._cached(base, round_index)
        if not {"slot", "neighbours"} & axes:
            return
        if mixed != base:
            yield Cell("run-to-run", mixed, mixed)
        if "slot" in axes:
            yield Cell("slot", replace(mixed, slots=(rng.randrange(1, size),)), mixed)
        if "neighbours" in axes:
            ragged = (round_index + size.bit_length()) % 2 == 0
            for lengths in _neighbour_lengths(rng, self.length, size - 1, self.room, ragged=ragged):
                yield Cell("neighbours", replace(mixed, filler_lengths=lengths), mixed)
            yield Cell("neighbours", replace(mixed, filler_seed=mixed.filler_seed + 1), mixed)

    def _cached(self, base: Load, round_index: int) -> Iterator[Cell]:
        if "cache" not in self.spec.axes:
            return
        for state in self.cache_states:
            cuts = self._cuts(state)
            # A batch has other fillers in each round: its cuts may come again.
            index = round_index if base == ALONE else round_index % len(cuts)
            if self.spec.repeats_are_draws:
                yield Cell("cache", replace(base, cache_state=state), base)
            elif index < len(cuts):
                yield Cell("cache", replace(base, cache_state=state, cut=cuts[index]), base)

    def _cuts(self, state: CacheState) -> list[int | None]:
        """The sampler's own cut, and all others, in an order drawn from the seed."""
        usual, fewest = self.length // 2, 1
        if state == "chunked":
            usual, fewest = -(-self.length // N_PREFILL_CHUNKS), -(-self.length // MOST_CHUNKS)
        others = [cut for cut in range(fewest, self.length) if cut != usual]
        random.Random(self._seed(1, 0)).shuffle(others)
        return [None, *others]

    def _base(self, size: int, round_index: int) -> Load:
        """What is repeated, and prefilled in other ways: copies, or a probe among fillers."""
        if not {"batch-size", "cache"} & set(self.spec.axes):
            round_index = 0  # Repeats of one load say more than repeats of several.
        if self.spec.mode == "mixed":
            return self._mixed(size, round_index)
        copies = Load(size, tuple(range(size)))
        seed = self._seed(size, round_index)
        if self.spec.batching == "continuous":  # The seed also says who comes when.
            return replace(copies, filler_seed=seed)
        if self.spec.repeats_are_draws or round_index == 0:
            return copies
        # The first row stays: it is what the probe alone, in its row 0, is compared with.
        others = self._rng(size, round_index).sample(range(1, size), max(0, size // 2 - 1))
        slots = (0, *sorted(others))
        return Load(size, slots, (self.length,) * (size - len(slots)), seed)

    def _mixed(self, size: int, round_index: int) -> Load:
        return Load(size, (0,), (self.length,) * (size - 1), self._seed(size, round_index))

    def _seed(self, size: int, round_index: int) -> int:
        return _derive_seed(self.spec.seed, self.probe_id, round_index, size)

    def _rng(self, size: int, round_index: int) -> random.Random:
        return random.Random(self._seed(size, round_index))


def plan_confirmations(
    trials: Sequence[Trial], rows_of: Mapping[int, Mapping[int, tuple[int, int]]]
) -> list[Trial]:
    """The first loads that parted from their baselines along each axis, once more.

    ``rows_of`` holds, by trial and slot, what stands for the tokens and for the bits of a row.
    Only a repeat tells a load that always parts from chance. Where tokens parted, bits are not
    looked at; loads that ran more than once have been repeated.
    """
    done = [trial for trial in trials if trial.trial_id in rows_of and trial.axis != "control"]
    n_run = Counter((trial.arm, trial.probe_id, trial.load) for trial in done)
    parted: dict[tuple[Arm, str], list[list[Trial]]] = defaultdict(lambda: [[], []])
    for trial in done:
        if trial.baseline is None or trial.baseline not in rows_of:
            continue
        rows, baseline = rows_of[trial.trial_id], rows_of[trial.baseline]
        pairs = [(rows[s], baseline[s]) for s in rows.keys() & baseline.keys()]
        pairs = pairs or [(rows[min(rows)], baseline[min(baseline)])]
        found = parted[trial.arm, trial.probe_id]
        if any(here[0] != there[0] for here, there in pairs):
            found[0].append(trial)
        elif any(here != there for here, there in pairs):
            found[1].append(trial)
    again: list[Trial] = []
    end = max((trial.first_sample_id + trial.n_samples for trial in trials), default=0)
    for in_tokens, in_bits in parted.values():
        n_of_axis: Counter[Axis] = Counter()
        for trial in in_tokens or in_bits:
            is_single = n_run[trial.arm, trial.probe_id, trial.load] == 1
            if not is_single or n_of_axis[trial.axis] == CONFIRMED_LOADS:
                continue
            n_of_axis[trial.axis] += 1
            repeat = replace(
                trial,
                trial_id=len(trials) + len(again),
                axis="run-to-run",
                first_sample_id=end,
                baseline=trial.trial_id,
            )
            again.append(repeat)
            end += repeat.n_samples
    return again


def _neighbour_lengths(
    rng: random.Random, length: int, n_fillers: int, room: int, *, ragged: bool
) -> Iterator[tuple[int, ...]]:
    """Fillers all shorter, and all longer (the probe is padded) or ragged, in turns."""
    shortest, longest = max(1, length // 2), min(room, 2 * length + 16)
    if shortest < length:
        yield tuple(rng.randint(shortest, length - 1) for _ in range(n_fillers))
    if longest > length:
        lowest = shortest if ragged else length + 1
        yield tuple(rng.randint(lowest, longest) for _ in range(n_fillers))


def _derive_seed(*parts: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True, slots=True)
class Arrival:
    """``together``, ``closed``, ``poisson`` with a rate per second, or ``bursts`` of a size."""

    kind: str
    rate_per_s: float = 0.0
    burst_size: int = 0
    gap_s: float = 0.0

    def offsets_s(self, load: Load) -> list[float]:
        """When each row of an open loop is sent, in seconds from the start, in row order."""
        if self.kind == "poisson":
            rng = random.Random(f"{load.filler_seed}/{load.batch_size}")
            offsets = [0.0]
            for _ in range(load.batch_size - 1):
                offsets.append(offsets[-1] + rng.expovariate(self.rate_per_s))
            return offsets
        if self.kind == "bursts":
            return [row // self.burst_size * self.gap_s for row in range(load.batch_size)]
        return [0.0] * load.batch_size


def parse_arrival(text: str) -> Arrival | None:
    """``together``, ``closed``, ``poisson:RATE`` or ``bursts:SIZE:SECONDS``; None if neither."""
    kind, *numbers = text.split(":")
    try:
        if kind in Endpoint.CLOSED_ARRIVALS and not numbers:
            return Arrival(kind)
        if kind == "poisson":
            (rate,) = map(float, numbers)
            return Arrival(kind, rate_per_s=rate) if 0 < rate < float("inf") else None
        if kind == "bursts":
            size, gap = int(numbers[0]), float(numbers[1])
            if len(numbers) == 2 and size >= 1 and 0 < gap < float("inf"):
                return Arrival(kind, burst_size=size, gap_s=gap)
    except (ValueError, IndexError):
        pass
    return None


def plant_fault(n_tokens: int) -> Fault | None:
    """The control's fault, within a reference completion of ``n_tokens``; None if it is empty."""
    return Fault(latent_at=n_tokens // 4, fork_at=n_tokens // 2) if n_tokens else None
