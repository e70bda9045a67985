"""Which op gives a probe's row other bits in a batch than alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ndcheck.errors import UsageError
from ndcheck.explain.alignment import Geometry, clone_exactly, equal_bits, write_exactly
from ndcheck.explain.comparing import (
    Difference,
    NaturalPass,
    RepairedPass,
    Setting,
    cache_tensors,
    find_ops,
    place_of,
)
from ndcheck.explain.feeding import FedPass, advance
from ndcheck.explain.modules import holders_of_layers
from ndcheck.explain.recording import AlonePass, Cause, Key, Place, Record, unseen
from ndcheck.explain.traced import LoadTrace
from ndcheck.records import Arm, Decoding, Load, Probe
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.decoding.selection import choose_tokens, digest_row, gumbel_noise
from ndcheck.samplers.local.sampler import TransformersSampler

N_REPEATS = 4


@dataclass(frozen=True)
class Alone:
    """The probe's pass alone: ops and modules, logits [vocabulary], caches before and after.

    ``tracing_changed_bits``: the same pass untraced gives others, each time the same.
    """

    records: dict[Key, Record]
    logits: Tensor
    before: list[Tensor]
    after: list[Tensor]
    tracing_changed_bits: bool


class Tracer:
    """Traces one probe's pass at one step; the pass alone is recorded once.

    Raises UsageError where a load has no pass that corresponds to the one alone.
    """

    def __init__(
        self,
        sampler: TransformersSampler,
        probe: Probe,
        step: int,
        arm: Arm = "stock",
        decoding: Decoding | None = None,
        kernels: Callable[[], AbstractContextManager[Any]] | None = None,
        n_fed: int | None = None,
    ) -> None:
        """``n_fed``: tokens of the completion that a load is fed; None: as many as are decoded."""
        self._sampler = sampler
        self._probe = probe
        self._step = step
        self._decoding = decoding or Decoding(step + 1)
        # The static cache is as long as the run's: attention runs over all of it.
        self._max_tokens = max(self._decoding.max_tokens, step + 1)
        self._n_fed = max(n_fed or self._max_tokens, step + 1)
        self._kernels = kernels or (lambda: sampler.arm(arm, fuse=False))
        self._n_prompt = sampler.count_tokens(probe.content)
        if self._n_prompt + self._max_tokens > sampler.context:
            raise UsageError(
                f"--step {step}: with a prompt of {self._n_prompt} tokens it exceeds the model's "
                f"context of {sampler.context}"
            )
        self._holders = holders_of_layers(sampler.model)
        self._reaching: set[Place] = set()
        self.token_ids: list[int] = []

    @torch.inference_mode()
    def record_alone(self) -> Alone:
        """The pass alone, and on the way the tokens that every load is fed."""
        with self._kernels():
            batch, argument = self._advance(Load(1), None)
            before = list(map(clone_exactly, cache_tensors(batch.cache)))
            untraced, *again = (
                self._forward(self._fork(batch), argument, Load(1))[0] for _ in range(N_REPEATS)
            )
            with AlonePass(self._sampler.model) as watched:
                logits = self._forward(batch, argument, Load(1))[0]
        after = list(map(clone_exactly, cache_tensors(batch.cache)))
        repeats = all(equal_bits(untraced, each) for each in again)
        changed = repeats and not equal_bits(untraced, logits)
        return Alone(watched.records, logits, before, after, changed)

    def _fork(self, batch: ExactBatch) -> ExactBatch:
        """The batch with a cache of its own."""
        with unseen():  # by the scope of the arm's kernels
            return copy.deepcopy(batch, {id(self._sampler.model): self._sampler.model})

    @torch.inference_mode()
    def repeats(self, alone: Alone) -> bool:
        """Whether the pass alone still gives its bits, to which the loads are held."""
        with self._kernels():
            batch, argument = self._advance(Load(1), None)
            return equal_bits(self._forward(batch, argument, Load(1))[0], alone.logits)

    @torch.inference_mode()
    def trace(self, load: Load, slot: int, alone: Alone, *, varies: bool = False) -> LoadTrace:
        """The same pass under ``load``, compared with the one alone.

        ``varies``: where copies of the probe leave it as it is, others take their place.
        """
        if load.cache_state != "whole" and self._step == 0:
            raise UsageError(
                f"--step 0: a {load.cache_state} prefill has no pass that is comparable with the "
                "prefill alone: give --step 1 or more"
            )
        with self._kernels():
            loaded = _LoadedPass(self, load, slot, alone)
            found = self._compare(loaded, load, slot, alone)
            if varies and not found.logits_differ and len(load.slots) > 1:
                load = _other_neighbours(load, slot, self)
                loaded = _LoadedPass(self, load, slot, alone)
                if not equal_bits(loaded.run(), alone.logits):
                    return self._compare(loaded, load, slot, alone)
            return found

    def _compare(self, loaded: _LoadedPass, load: Load, slot: int, alone: Alone) -> LoadTrace:
        natural = NaturalPass(loaded.setting)
        traced = loaded.run(natural)
        cache_after = loaded.cache_differs(alone.after)
        untraced = loaded.run()
        logits_differ = not equal_bits(traced, alone.logits)
        changed = not equal_bits(traced, untraced)
        # With nothing put right, the pass is repeated: does it repeat its bits?
        n_repeats = N_REPEATS if changed else int(logits_differ)
        is_random = any(not equal_bits(untraced, loaded.run()) for _ in range(n_repeats))
        cache_before = loaded.cache_differs(alone.before)
        repaired = RepairedPass(loaded.setting)
        loaded.run(repaired, repair_cache=True)
        cache_reaches = bool(logits_differ and cache_before and loaded.follows_cache(untraced))
        named = {key: d for key, d in repaired.differences.items() if key[0] not in self._holders}
        causes = self._causes(loaded, load, slot, alone, named)
        reaching = self._reaching_places(loaded, named) if logits_differ else set()
        if named and logits_differ and not reaching and not cache_reaches:
            reaching = set(map(place_of, named))  # Together they do, as nothing else differs.
        return LoadTrace(
            load,
            slot,
            self._step,
            tuple(find_ops(natural, repaired, named, causes, reaching, alone.records)),
            logits_differ,
            (changed and not is_random) or alone.tracing_changed_bits,
            is_random,
            max(load.filler_lengths, default=0) > self._n_prompt,
            len(named) == len(repaired.differences),
            cache_before,
            cache_reaches,
            cache_after,
            f"{digest_row(traced) & 2**64 - 1:016x}",  # as samples are recorded
            {place_of(key): call for key, call in repaired.calls.items()},
            load.batch_size * loaded.n_fed,
        )

    def _causes(
        self,
        loaded: _LoadedPass,
        load: Load,
        slot: int,
        alone: Alone,
        named: dict[Key, Difference],
    ) -> dict[Key, Cause]:
        """What each difference follows.

        The pass is repeated, then with other neighbours, then with the probe in the first row.
        """
        if not named:
            return {}

        def digests(other: _LoadedPass) -> dict[Key, str]:
            again = RepairedPass(other.setting)
            other.run(again, repair_cache=True)
            return {key: d.digest for key, d in again.differences.items()}

        repeated = digests(loaded)
        with_others = repeated
        if load.batch_size > 1:
            with_others = digests(
                _LoadedPass(self, _other_neighbours(load, slot, self), slot, alone)
            )
        in_first_row = set(named)
        if slot:
            moved = load if 0 in load.slots else replace(load, slots=(0,))
            in_first_row = digests(_LoadedPass(self, moved, 0, alone)).keys() & named.keys()
        causes: dict[Key, Cause] = {}
        for key, difference in named.items():
            causes[key] = "shape"
            if repeated.get(key) != difference.digest:
                causes[key] = "chance"
            elif with_others.get(key) != difference.digest:
                causes[key] = "neighbours"
            elif key not in in_first_row:
                causes[key] = "place"
        return causes

    def _reaching_places(self, loaded: _LoadedPass, named: dict[Key, Difference]) -> set[Place]:
        """Where a difference, left in or put right with nothing put right after it, moves logits.

        A place that was seen to do so under one load is not tried again under another.
        """
        for key in named:
            if place_of(key) in self._reaching:
                continue
            left, mended = (
                loaded.run(
                    RepairedPass(loaded.setting, key, stop_after=stop_after), repair_cache=True
                )
                for stop_after in (False, True)
            )
            if not equal_bits(left, mended):
                self._reaching.add(place_of(key))
        return self._reaching & set(map(place_of, named))

    @torch.inference_mode()
    def logits(self, load: Load, slot: int | None) -> list[Tensor]:
        """The probe's logits [vocabulary] at every step so far, each kept apart.

        ``slot`` None: alone, where the tokens are drawn that every load is fed.
        """
        rows: list[Tensor] = []
        with self._kernels():
            if load.is_fed:
                batch, passes = self._feed(load, slot)
                for part, n_wanted in passes:
                    rows += batch.forward(part, max(1, n_wanted))[slot or 0, -n_wanted or 1 :]
                return [row.clone() for row in rows[: self._step + 1]]
            batch = self._open(load)
            logits = batch.prefill(load.cache_state, load.cut)
            for position in range(self._step + 1):
                if position:
                    logits = batch.step(self._next_tokens(logits, position - 1, load, slot))
                rows.append(logits[slot or 0].clone())
        return rows

    def _advance(self, load: Load, slot: int | None) -> tuple[ExactBatch, Tensor | FedPass | None]:
        """A batch just before the traced pass, and the tokens [rows] that pass takes in."""
        if load.is_fed:
            batch, passes = self._feed(load, slot)
            return batch, advance(batch, passes, self._step)
        batch = self._open(load)
        if self._step == 0:
            return batch, None
        logits = batch.prefill(load.cache_state, load.cut)
        for position in range(self._step - 1):
            logits = batch.step(self._next_tokens(logits, position, load, slot))
        return batch, self._next_tokens(logits, self._step - 1, load, slot)

    def _feed(self, load: Load, slot: int | None) -> tuple[ExactBatch, list[tuple[Tensor, int]]]:
        """A batch that holds nothing yet, and the passes of what it generates when it decodes."""
        batch, n_needed = self._open(load), self._n_fed - 1
        if load.width > 1:  # Passes after the traced one decide nothing.
            n_needed = min(n_needed, -(-self._step // load.width) * load.width)
        logits = batch.prefill(load.decoded.cache_state, load.decoded.cut)
        token_ids = [logits.new_empty(0, len(logits), dtype=torch.int64)]
        for position in range(n_needed):
            token_ids.append(self._next_tokens(logits, position, load, slot)[None])
            logits = batch.step(token_ids[-1][0])
        batch.reset(self._sampler.rows(load, self._probe))
        return batch, batch.passes(torch.cat(token_ids).T, load)

    def _open(self, load: Load) -> ExactBatch:
        rows = self._sampler.rows(load, self._probe)
        return self._sampler.open_batch(rows, self._max_tokens)

    @staticmethod
    def _forward(batch: ExactBatch, token_ids: Tensor | FedPass | None, load: Load) -> Tensor:
        if isinstance(token_ids, FedPass):
            return batch.forward(token_ids.token_ids, token_ids.n_wanted)[:, token_ids.index]
        return (
            batch.prefill(load.cache_state, load.cut)
            if token_ids is None
            else batch.step(token_ids)
        )

    def _next_tokens(self, logits: Tensor, position: int, load: Load, slot: int | None) -> Tensor:
        """Every row's own next token, but the probe's is the one it takes alone."""
        temperature, noise = self._decoding.temperature, None
        if temperature:
            noise = gumbel_noise(self._decoding.seed, position, logits.shape[-1]).to(logits.device)
        token_ids = choose_tokens(logits, temperature, noise)
        if slot is None:
            if len(self.token_ids) == position:
                self.token_ids.append(int(token_ids[0]))
        elif position < len(self.token_ids):
            token_ids[list(load.slots)] = self.token_ids[position]
        return token_ids

    def _geometry(self, load: Load, argument: Tensor | FedPass | None) -> Geometry:
        n_columns = max(self._n_prompt, *load.filler_lengths, 0)
        pad = n_columns - self._n_prompt
        queries = (1, 1) if self._step else (self._n_prompt, n_columns)
        width = (self._n_prompt + self._max_tokens, n_columns + self._max_tokens)
        if isinstance(argument, FedPass):
            n_columns = argument.token_ids.shape[1]
            column = n_columns - argument.n_wanted + argument.index if self._step else pad
            kept = argument.n_wanted, argument.index
            return Geometry(load.batch_size, pad, (queries[0], n_columns), width, column, kept)
        return Geometry(load.batch_size, pad, queries, width)


class _LoadedPass:
    """A load just before the traced pass, which can be run again and again from there."""

    def __init__(self, tracer: Tracer, load: Load, slot: int, alone: Alone) -> None:
        self._tracer = tracer
        self._load = load
        self._slot = slot
        self._alone = alone
        self._start, self._argument = tracer._advance(load, slot)
        self._batch = self._start
        model = tracer._sampler.model
        geometry = tracer._geometry(load, self._argument)
        self.setting = Setting(model, alone.records, geometry, slot, tracer._holders)

    def run(
        self, watch: NaturalPass | RepairedPass | None = None, *, repair_cache: bool = False
    ) -> Tensor:
        """The probe's logits [vocabulary]."""
        self._batch = self._tracer._fork(self._start)
        if repair_cache:
            with unseen():
                for ours, own in self._cache_rows(self._batch, self._alone.before) or ():
                    write_exactly(ours, (), own)
        if watch is None:
            logits = Tracer._forward(self._batch, self._argument, self._load)
        else:
            with watch:
                logits = Tracer._forward(self._batch, self._argument, self._load)
        return logits[self._slot].clone()

    def follows_cache(self, left: Tensor) -> bool:
        """Whether the logits, ``left`` as they are, move each time that the cache is put right."""
        mended, again, mended_again = (
            self.run(repair_cache=is_on) for is_on in (True, False, True)
        )
        repeats = equal_bits(left, again) and equal_bits(mended, mended_again)
        return repeats and not equal_bits(left, mended)

    @property
    def n_fed(self) -> int:
        """Tokens of a row that the pass is fed; 1 where it is not."""
        return self._argument.token_ids.shape[1] if isinstance(self._argument, FedPass) else 1

    def cache_differs(self, alone: list[Tensor]) -> bool | None:
        """Whether the probe's part of the cache, before the pass or after the last one, does."""
        batch = self._start if alone is self._alone.before else self._batch
        with unseen():
            rows = self._cache_rows(batch, alone)
            return None if rows is None else not all(equal_bits(a, b) for a, b in rows)

    def _cache_rows(
        self, batch: ExactBatch, alone: list[Tensor]
    ) -> list[tuple[Tensor, Tensor]] | None:
        held = list(cache_tensors(batch.cache))
        return self.setting.rows(held, alone)


def _other_neighbours(load: Load, slot: int, tracer: Tracer) -> Load:
    """The same shape, with fillers of other contents, and in the place of the probe's copies."""
    lengths, fillers = [], iter(load.filler_lengths)
    for row in range(load.batch_size):
        length = tracer._n_prompt if row in load.slots else next(fillers)
        lengths += [] if row == slot else [length]
    seed = load.filler_seed + 1
    return replace(load, slots=(slot,), filler_lengths=tuple(lengths), filler_seed=seed)
