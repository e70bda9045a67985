"""The loads of one probe: batch size x axis, round after round.

Every round takes other filler contents, slots and cuts of the prompt.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ndcheck.records import ALONE, Axis, CacheState, Load, Purpose, RunSpec

CACHE_STATES: tuple[CacheState, ...] = ("chunked", "prefix")
N_PREFILL_CHUNKS = 3
MOST_CHUNKS = 16
SMALLEST_PAGE_TOKENS = 4
"""A paged cache shares whole pages, none smaller, so a prompt must be longer to share a prefix."""


def batch_sizes_up_to(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the largest."""
    powers = (2**i for i in range(largest.bit_length()))
    return tuple(dict.fromkeys((*powers, largest)))


@dataclass(frozen=True, slots=True)
class Cell:
    """One load of a round, and the load that it is compared with."""

    purpose: Purpose
    load: Load
    baseline: Load = ALONE


@dataclass(frozen=True, slots=True)
class Grid:
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
            yield from self._fed(ALONE, round_index)
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
        if {"batch-size", "run-to-run", "cache", "width", "scoring"} & axes:
            loads.append(self._base(size, round_index))
        if {"slot", "neighbours"} & axes:
            loads.append(self._mixed(size, round_index))
        for load in dict.fromkeys(loads):
            yield Cell("batch-size", load)

    def _variants(self, size: int, round_index: int) -> Iterator[Cell]:
        axes, rng = set(self.spec.axes), self._rng(size, round_index)
        base, mixed = self._base(size, round_index), self._mixed(size, round_index)
        yield Cell("run-to-run", base, base)
        yield from self._fed(base, round_index)
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

    def _fed(self, base: Load, round_index: int) -> Iterator[Cell]:
        """Alone all widths, drafts and ways to score; in a batch one of each kind, in turns.

        Each kind has a control of its own.
        """
        scored = [replace(base, scores=True)]
        if "chunked" in self.cache_states:
            cuts = self._cuts("chunked")
            cut = cuts[round_index % len(cuts)]
            scored.append(replace(base, scores=True, cache_state="chunked", cut=cut))
        longest = self.spec.decoding.max_tokens - 1
        wide = [replace(base, width=w) for w in self.spec.widths if w <= longest]
        kinds: list[tuple[Axis, list[Load]]] = [("width", wide), ("scoring", scored)]
        if self.spec.draft is not None:
            kinds.insert(1, ("width", [replace(load, drafts=True) for load in wide]))
        for axis, loads in kinds:
            if axis not in self.spec.axes:
                continue
            if loads and base != ALONE:
                loads = [loads[(round_index + base.batch_size.bit_length()) % len(loads)]]
            for nth, load in enumerate(loads):
                yield Cell(axis, load, base)
                if base == ALONE and round_index == nth == 0:
                    yield Cell("control", load, load)

    def _turns(self) -> int:
        """Rounds until a batch was fed in every way; 0 where none is."""
        axes = self.spec.axes
        return len(self.spec.widths) if "width" in axes else 2 * ("scoring" in axes)

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
            # Repeats of one load, and its passes of all widths, say more than those of several.
            round_index //= self._turns() or round_index + 1
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
