"""The load plan: which batches run, in which order, and what each is compared with.

A plan is a pure function of the run's spec and the probes' lengths, so a resumed run continues
the same one. It goes through the grid *batch size x axis* in rounds, with other filler contents
and another random slot in each round, until it holds the samples asked for. Every trial names its
baseline: the trial that differs from it along its axis only.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ndcheck.errors import UsageError
from ndcheck.records import Arm, Axis, CacheState, Endpoint, Fault, Load, Probe, RunSpec, Trial

CACHE_STATES: tuple[CacheState, ...] = ("chunked", "prefix")

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
    """One load of a round: ``baseline`` is the index of another cell of the same round.

    None stands for the reference.
    """

    axis: Axis
    load: Load
    baseline: int | None


def plan_trials(
    spec: RunSpec,
    prompt_lengths: Mapping[str, int],
    context: int,
    n_trials: int | None = None,
    cache_states: tuple[CacheState, ...] = CACHE_STATES,
) -> list[Trial]:
    """All trials of a run in execution order, arms interleaved on the same loads.

    ``prompt_lengths`` are in tokens by probe id, ``context`` is the model's limit in tokens.
    ``n_trials`` asks for that many trials of each probe and arm, beside the reference and the
    control, instead of ``spec.n_samples`` samples. ``cache_states`` are those that the backend
    can bring about. A server may change while it runs, so there the probe alone comes last too.
    Raises UsageError where a prompt and its completion do not fit the context.
    """
    trials: list[Trial] = []
    next_sample = 0

    def add(probe: Probe, axis: Axis, load: Load, baselines: Mapping[Arm, int]) -> dict[Arm, int]:
        nonlocal next_sample
        ids = {}
        for arm in spec.arms:
            ids[arm] = len(trials)
            trial = Trial(
                len(trials), arm, probe.probe_id, axis, load, next_sample, baselines.get(arm)
            )
            trials.append(trial)
            next_sample += trial.n_samples
        return ids

    for probe in spec.probes:
        length = prompt_lengths[probe.probe_id]
        if length + spec.decoding.max_tokens > context:
            raise UsageError(
                f"prompt {probe.probe_id} has {length} tokens: with --max-tokens "
                f"{spec.decoding.max_tokens} it exceeds the model's context of {context}"
            )
        room = context - spec.decoding.max_tokens
        reference = add(probe, "reference", Load(1), {})
        add(probe, "control", Load(1), reference)
        closes_alone = spec.endpoint is not None and spec.n_samples > 1
        n_samples, n_evidence = 1 + closes_alone, 0

        round_index = 0
        while n_evidence < n_trials if n_trials else n_samples < spec.n_samples:
            cells = list(
                _round_of_cells(spec, probe.probe_id, length, room, round_index, cache_states)
            )
            if not cells:
                break
            placed: list[dict[Arm, int]] = []
            for cell in cells:
                load = cell.load
                if not n_trials:
                    load = _trim_copies(load, spec.n_samples - n_samples, length)
                baselines = reference if cell.baseline is None else placed[cell.baseline]
                placed.append(add(probe, cell.axis, load, baselines))
                n_samples += len(load.slots)
                n_evidence += cell.axis != "reference"
                if n_evidence == n_trials or (not n_trials and n_samples == spec.n_samples):
                    break
            round_index += 1
        if closes_alone:
            add(probe, "run-to-run", Load(1), reference)
    return trials


def _round_of_cells(
    spec: RunSpec,
    probe_id: str,
    length: int,
    room: int,
    round_index: int,
    cache_states: tuple[CacheState, ...],
) -> Iterator[Cell]:
    """One pass over the grid. Only baselines that an asked-for axis needs are included."""
    index = 0
    if spec.batching == "continuous" and length <= SMALLEST_PAGE_TOKENS:  # No page to share.
        cache_states = tuple(state for state in cache_states if state != "prefix")

    def cell(axis: Axis, load: Load, baseline: int | None) -> Cell:
        nonlocal index
        index += 1
        return Cell(axis, load, baseline)

    for batch_size in spec.batch_sizes:
        seed = _derive_seed(spec.seed, probe_id, round_index, batch_size)
        rng = random.Random(seed)
        if batch_size == 1:
            alone = Load(1)
            if "run-to-run" in spec.axes:
                yield cell("run-to-run", alone, None)
            if "cache" in spec.axes:
                for state in cache_states:
                    yield cell("cache", replace(alone, cache_state=state), None)
            continue
        mixed = Load(batch_size, (0,), (length,) * (batch_size - 1), seed)
        copies = Load(batch_size, tuple(range(batch_size)))
        if spec.batching == "continuous":  # The seed also says who comes when.
            copies = replace(copies, filler_seed=seed)
        base = copies if spec.mode == "copies" else mixed
        # A baseline of other axes is evidence for batch size too, where that is asked for.
        base_axis: Axis = "batch-size" if "batch-size" in spec.axes else "reference"

        base_index = index
        if {"batch-size", "run-to-run", "cache"} & set(spec.axes):
            yield cell(base_axis, base, None)
        if "run-to-run" in spec.axes:
            yield cell("run-to-run", base, base_index)
        if "cache" in spec.axes:
            for state in cache_states:
                yield cell("cache", replace(base, cache_state=state), base_index)
        if not {"slot", "neighbours"} & set(spec.axes):
            continue
        mixed_index = base_index
        if spec.mode == "copies" or index == base_index:
            mixed_index = index
            yield cell(base_axis, mixed, None)
        if "slot" in spec.axes:
            middle, last = batch_size // 2, batch_size - 1
            for slot in dict.fromkeys((middle, last, rng.randrange(1, batch_size))):
                yield cell("slot", replace(mixed, slots=(slot,)), mixed_index)
        if "neighbours" in spec.axes:
            for lengths in _neighbour_lengths(rng, length, batch_size - 1, room):
                yield cell("neighbours", replace(mixed, filler_lengths=lengths), mixed_index)
            yield cell("neighbours", replace(mixed, filler_seed=seed + 1), mixed_index)


def _neighbour_lengths(
    rng: random.Random, length: int, n_fillers: int, room: int
) -> Iterator[tuple[int, ...]]:
    """Fillers all shorter, all longer (the probe is padded), and ragged."""
    shortest, longest = max(1, length // 2), min(room, 2 * length + 16)
    if shortest < length:
        yield tuple(rng.randint(shortest, length - 1) for _ in range(n_fillers))
    if longest > length:
        yield tuple(rng.randint(length + 1, longest) for _ in range(n_fillers))
        yield tuple(rng.randint(shortest, longest) for _ in range(n_fillers))


def _trim_copies(load: Load, n_copies: int, length: int) -> Load:
    """Keep the batch size but let fillers of the probe's length replace the copies too many."""
    n_fillers = len(load.slots) - n_copies
    if n_fillers <= 0:
        return load
    return replace(load, slots=load.slots[:n_copies], filler_lengths=(length,) * n_fillers)


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
    """The control's fault, within a reference completion of ``n_tokens``; None if too short."""
    return Fault(latent_at=n_tokens // 4, fork_at=n_tokens // 2) if n_tokens >= 2 else None
