"""Make a failing load as small as it can be and still give another completion than alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ndcheck.errors import BackendError, UsageError
from ndcheck.explain.alignment import equal_bits
from ndcheck.explain.failing import Failure
from ndcheck.records import ALONE, CacheState, Load
from ndcheck.samplers.local.decoding.selection import lowest_argmax
from ndcheck.samplers.local.sampler import TransformersSampler

MOST_FIRST = 8
"""Rows beside the probe's that are tried from the first on, one more each time."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids of every row, which row is the probe, and how the prompts are prefilled.

    ``n_tokens`` are decoded at most; the static cache is as long as that asks for. Where a `Load`
    of this ``width``, or that ``scores``, is fed, they are then fed again.
    """

    rows: tuple[tuple[int, ...], ...]
    slot: int
    cache_state: CacheState
    n_tokens: int
    cut: int | None = None
    """Where the prompts are cut, as in a `Load`."""
    width: int = 1
    scores: bool = False

    @property
    def load(self) -> Load:
        return Load(
            len(self.rows),
            cache_state=self.cache_state,
            cut=self.cut,
            width=self.width,
            scores=self.scores,
        )

    @property
    def probe(self) -> tuple[int, ...]:
        return self.rows[self.slot]

    @property
    def size(self) -> tuple[int, int]:
        """(rows, tokens in the other rows)."""
        return len(self.rows), sum(map(len, self.rows)) - len(self.probe)


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The smallest batch found, the token (0-based) where it parts, and both tokens there.

    In a latent failure the tokens are equal and the logits' bits are not. ``pass_lengths`` are the
    columns of each pass of the prefill, or of all passes of a batch that is fed; those before them
    are a prefix computed alone.
    """

    batch: Batch
    before: Batch
    position: int
    token_alone: int
    token_batched: int
    is_latent: bool
    n_tests: int
    pass_lengths: tuple[int, ...]


class Shrinker:
    """Runs candidates in the arm of the failure; ``on_test`` is told how many rows are left.

    Raises BackendError if the failure does not come again, and UsageError for a run that is not
    greedy.
    """

    def __init__(
        self,
        sampler: TransformersSampler,
        failure: Failure,
        kernels: Callable[[], AbstractContextManager[Any]] | None = None,
        on_test: Callable[[int, Batch], None] = lambda n_tests, best: None,
    ) -> None:
        if failure.run.spec.decoding.temperature > 0:
            raise UsageError("shrink works on greedy runs: this one has a temperature above 0")
        self._sampler = sampler
        self._failure = failure
        self._kernels = kernels or (lambda: sampler.arm(failure.sample.arm))
        self._on_test = on_test
        self._alone: dict[tuple[tuple[int, ...], int], list[tuple[int, torch.Tensor]]] = {}
        self.n_tests = 0

    def shrink(self) -> Shrunk:
        """Fewer rows, then a plainer prefill, shorter and plainer fillers, fewer tokens."""
        sample = self._failure.sample
        rows = self._sampler.rows(sample.load, self._failure.probe)
        before = Batch(
            tuple(map(tuple, rows)),
            sample.slot,
            sample.load.cache_state,
            self._failure.run.spec.decoding.max_tokens,
            sample.load.cut,
            sample.load.width,
            sample.load.scores,
        )
        if self.parts(before) is None:
            raise BackendError(
                f"sample {sample.sample_id} does not differ here: the machine, the number of "
                "threads or the software are not those of the run, or it differed there by chance"
                + ", or only passes with rejected tokens differ"
                * sample.load.drafts
            )
        best = before
        while True:
            start = best
            for simplify in SIMPLER:
                best = self._descend(best, simplify)
            if best == start:
                break
        parted = self.parts(best) or 0
        # Of a batch that is fed, the pass that parts stays whole, and holds a token at least.
        n_fed = max(-(-parted // best.width) * best.width, best.scores)
        fewest = replace(best, n_tokens=n_fed + 1)
        if self.parts(fewest) is not None:
            best = fewest
        position = self.parts(best)
        if position is None:
            raise BackendError("the smallest load found does not part the probe twice")
        alone, batched = self._completion(best, alone=True), self._completion(best, alone=False)
        return Shrunk(
            best,
            before,
            position,
            alone[position][0],
            batched[position][0],
            self._failure.is_latent,
            self.n_tests,
            self._pass_lengths(best),
        )

    def parts(self, batch: Batch) -> int | None:
        """The first token at which the probe in ``batch`` differs from the probe alone."""
        self.n_tests += 1
        alone = self._completion(batch, alone=True)
        with torch.inference_mode(), self._kernels():
            steps = enumerate(zip(alone, self._steps(batch, alone=False), strict=False))
            for position, ((token, logits), (other, others)) in steps:
                if token != other or (self._failure.is_latent and not equal_bits(logits, others)):
                    return position
        return None

    def _pass_lengths(self, batch: Batch) -> tuple[int, ...]:
        """The columns of every pass that the sampler makes over the whole batch."""
        shapes: list[tuple[int, int]] = []

        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            shapes.append(tuple(kwargs["input_ids"].shape))

        exact = self._sampler.open_batch(list(map(list, batch.rows)), batch.n_tokens)
        if batch.load.is_fed:
            fed = torch.zeros(len(batch.rows), batch.n_tokens - 1, dtype=torch.int64)
            passes = exact.passes(fed.to(exact.device), batch.load)
            return tuple(part.shape[1] for part, _ in passes)
        hook = self._sampler.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with torch.inference_mode(), self._kernels():
                exact.prefill(batch.cache_state, batch.cut)
        finally:
            hook.remove()
        if batch.cache_state == "prefix":  # The passes before the last computed prefixes alone.
            shapes = shapes[-1:]
        return tuple(n_columns for _, n_columns in shapes)

    def _descend(self, best: Batch, simplify: Callable[[Batch], Iterator[Batch]]) -> Batch:
        """Take the first simpler batch that still fails, again and again."""
        while True:
            for candidate in simplify(best):
                if self.parts(candidate) is not None:
                    best = candidate
                    self._on_test(self.n_tests, best)
                    break
            else:
                return best

    def _completion(self, batch: Batch, *, alone: bool) -> list[tuple[int, torch.Tensor]]:
        key = (batch.probe, batch.n_tokens)
        if alone and key in self._alone:
            return self._alone[key]
        with torch.inference_mode(), self._kernels():
            completion = list(self._steps(batch, alone=alone))
        if alone:
            self._alone[key] = completion
        return completion

    def _steps(self, batch: Batch, *, alone: bool) -> Iterator[tuple[int, torch.Tensor]]:
        """The probe's (token id, logits [vocabulary]) step by step; within the arm's kernels."""
        rows = [batch.probe] if alone else batch.rows
        slot = 0 if alone else batch.slot
        load = ALONE if alone else batch.load
        exact = self._sampler.open_batch(list(map(list, rows)), batch.n_tokens)
        logits = exact.prefill(load.decoded.cache_state, load.decoded.cut)
        completion = [lowest_argmax(logits)]
        for position in range(batch.n_tokens):
            if not load.is_fed:
                yield int(completion[-1][slot]), logits[slot].clone()
            if position + 1 < batch.n_tokens:
                logits = exact.step(completion[-1])
                completion.append(lowest_argmax(logits))
        if load.is_fed:
            exact.reset(list(map(list, rows)))
            for fed in exact.feed(torch.stack(completion[:-1], 1), load):
                for own in fed[slot]:
                    yield int(lowest_argmax(own[None])), own.clone()


def _narrower(batch: Batch) -> Iterator[Batch]:
    """Passes of fewer tokens, the fewest first."""
    for width in range(2, batch.width):
        yield replace(batch, width=width)


def _plainer_prefill(batch: Batch) -> Iterator[Batch]:
    plainer: dict[CacheState, tuple[CacheState, ...]] = {
        "whole": (),
        "chunked": ("whole",),
        "prefix": ("whole", "chunked"),
    }
    for state in plainer[batch.cache_state]:
        yield replace(batch, cache_state=state, cut=None)


def _fewer_rows(batch: Batch) -> Iterator[Batch]:
    """None of the others, or the first few: a failure may come at odd numbers of rows alone. Then
    delta debugging (Zeller and Hildebrandt 2002): leave out halves, then quarters, ...
    """
    others = [row for row in range(len(batch.rows)) if row != batch.slot]
    part = len(others) // 2
    dropped = [others[n:] for n in range(min(len(others), MOST_FIRST + 1))]
    while part:
        dropped += [others[start : start + part] for start in range(0, len(others), part)]
        part //= 2
    for some in dropped:
        rows = tuple(r for i, r in enumerate(batch.rows) if i not in some)
        yield replace(batch, rows=rows, slot=batch.slot - sum(d < batch.slot for d in some))


def _shorter_rows(batch: Batch) -> Iterator[Batch]:
    """Every other row at once, then one by one, the shortest first."""
    others = [row for row in range(len(batch.rows)) if row != batch.slot]
    longest = max((len(batch.rows[row]) for row in others), default=0)
    lengths = sorted({*range(1, min(longest, 9)), *(longest * k // 8 for k in range(1, 8))} - {0})
    for chosen in ([others] if len(others) > 1 else []) + [[row] for row in others]:
        for length in lengths:
            yield from _changed(batch, chosen, lambda row, n=length: row[:n])  # type: ignore[misc]


def _plainer_rows(batch: Batch) -> Iterator[Batch]:
    """Other rows as one token repeated."""
    others = [row for row in range(len(batch.rows)) if row != batch.slot]
    token = batch.probe[:1]
    for chosen in ([others] if len(others) > 1 else []) + [[row] for row in others]:
        yield from _changed(batch, chosen, lambda row: token * len(row))


def _changed(
    batch: Batch, chosen: list[int], change: Callable[[tuple[int, ...]], tuple[int, ...]]
) -> Iterator[Batch]:
    rows = tuple(change(r) if i in chosen else r for i, r in enumerate(batch.rows))
    if rows != batch.rows:
        yield replace(batch, rows=rows)


SIMPLER = (_plainer_prefill, _fewer_rows, _narrower, _shorter_rows, _plainer_rows)
"""What makes a batch simpler, in this order, again and again until none does."""
